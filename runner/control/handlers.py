"""The table of commands and their handlers.

A new command is a row of `COMMANDS` and a function. Importing this module does not import torch: a checkpoint's
pending commands are checked by the table.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from runner.control.commands import Command, CommandQueue, CommandSpec, parse_step
from runner.control.stdin import quote_typed

if TYPE_CHECKING:
    from runner.utils.distributed.coordinator import Coordinator
    from runner.utils.train.loop import Loop

_MAX_ANSWERS = 20  # at one step
_MAX_SHOWN = 20  # scheduled commands in an answer
_MAX_RATE = 1e9  # above it an update of any optimizer may overflow float32


class CommandHandlers:
    """Reads commands on rank zero, executes them on every rank, and answers each once.

    Args:
        set_lr: called with a learning rate for all engines.
        answer: called with each answer.
    """

    def __init__(
        self, set_lr: Callable[[float], None], coordinator: Coordinator, answer: Callable[[str], None]
    ) -> None:
        self.set_lr = set_lr
        self.queue = CommandQueue(COMMANDS, answer)
        self._coordinator = coordinator
        self._answer = answer
        self._answered_step = 0  # the last step with an answer
        self._num_answers = 0  # at that step

    @property
    def by_name(self) -> Mapping[str, Callable[[Any, Any], None]]:
        """The handlers by command, each called with the loop and the command's argument."""
        return {name: partial(spec.handler, self) for name, spec in COMMANDS.items()}

    def start(self, step: int, *, peeks: bool, warn: Callable[[str], None]) -> None:
        """Starts to read commands, on rank zero; the arguments are those of `CommandQueue.start`."""
        from runner.utils.distributed import is_distributed, is_rank_zero  # imports torch

        if is_rank_zero():
            num_relayed, relay = (self._coordinator.num_unsent, self._relay) if is_distributed() else (int, None)
            self.queue.start(step, relay, peeks=peeks, warn=warn, num_relayed=num_relayed)

    def _relay(self, line: str) -> bool:
        """Sends a line to all ranks if it is a command; returns whether it is one."""
        if not self.queue.is_command(line):
            return self.queue.submit(line)  # which answers with the mistake, or ignores a blank line
        self._coordinator.post("line", line)
        return True

    def answer(self, step: int, text: str) -> None:
        """Answers a command that was executed at a step boundary, unless many were answered there before."""
        if step != self._answered_step:
            self._answered_step = step
            self._num_answers = 0
        self._num_answers += 1
        if self._num_answers <= _MAX_ANSWERS:
            self._answer(text)
        elif self._num_answers == _MAX_ANSWERS + 1:
            self._answer("... (further commands at this step are done without an answer)")


def _request_action(handlers: CommandHandlers, loop: Loop, argument: None, *, action: str) -> None:
    loop.request_action(action)


def _quit(handlers: CommandHandlers, loop: Loop, argument: None) -> None:
    from runner.utils.train import Stop  # imports torch

    raise Stop("quit")


def _set_lr(handlers: CommandHandlers, loop: Loop, lr: float) -> None:
    handlers.set_lr(lr)
    handlers.answer(loop.step, f"The base learning rate is {lr:g} from step {loop.step + 1} on")


def _answer_time(handlers: CommandHandlers, loop: Loop, target_step: int | None) -> None:
    elapsed_s, step_s = loop.throughput.overall(loop.step)
    handlers.answer(loop.step, describe_time(loop.step, loop.steps, step_s, elapsed_s, target_step))


def _answer_events(handlers: CommandHandlers, loop: Loop, argument: None) -> None:
    handlers.answer(loop.step, describe_events(handlers.queue.pending))


def _answer_help(handlers: CommandHandlers, loop: Loop, argument: None) -> None:
    handlers.answer(loop.step, HELP)


def _parse_lr(words: list[str]) -> float:
    if not words:
        raise ValueError('"lr" lacks its number')
    typed = " ".join(words)
    # float() alone accepts "infinity", "1_0" and digits of other scripts, so the form is checked first.
    lr = float(typed) if re.fullmatch(r"[+-]?(\d+\.?\d*|\.\d+)(e[+-]?\d+)?", typed, re.ASCII) else math.nan
    if not (math.isfinite(lr) and lr > 0):
        raise ValueError(f"expected one finite number above 0, found {quote_typed(typed)}")
    if lr > _MAX_RATE:
        raise ValueError(f"expected at most {_MAX_RATE:g}, found {quote_typed(typed)}")
    return lr


def _parse_target_step(words: list[str]) -> int | None:
    if not words:
        return None
    if words[0] != "to" or len(words) != 2:
        raise ValueError('"time" takes nothing, or "to" and a step')
    return parse_step(words[1])


COMMANDS: Mapping[str, CommandSpec] = {
    "save": CommandSpec("save", "write a checkpoint", None, partial(_request_action, action="save")),
    "export": CommandSpec(
        "export", "write the weights alone, for use elsewhere", None, partial(_request_action, action="export")
    ),
    "eval": CommandSpec("eval", "evaluate on the validation data", None, partial(_request_action, action="eval")),
    "quit": CommandSpec("quit", "save and end the run", None, _quit),
    "lr": CommandSpec("lr 3e-4", "set the learning rate, a number above 0", _parse_lr, _set_lr),
    "time": CommandSpec(
        "time, or time to 2000", "say where the run stands, or when it reaches a step", _parse_target_step, _answer_time
    ),
    "events": CommandSpec("events", "list what is scheduled", None, _answer_events),
    "help": CommandSpec("help", "show this list", None, _answer_help),
}
_AT_STEP = ("COMMAND@STEP", "do it when that step is done: eval@20, lr 1e-4@50, quit@40")
_HELP_ROWS = [*((spec.form, spec.help) for spec in COMMANDS.values()), _AT_STEP]
HELP = "\n".join(f"{form:<24}{meaning}" for form, meaning in _HELP_ROWS)


def describe_time(step: int, total_steps: int, seconds_per_step: float, elapsed_s: float, to: int | None = None) -> str:
    """Returns the progress of a run or, with `to`, when it reaches that step; an unknown step time is 0 or nan."""
    is_timed = math.isfinite(seconds_per_step) and seconds_per_step > 0
    step_time = f"({_format_step_time(seconds_per_step)} a step)" if is_timed else "(no step timed yet)"
    if to is None:
        remaining = f"{_format_clock((total_steps - step) * seconds_per_step)} to go " if is_timed else ""
        return f"step {step} of {total_steps}, {_format_clock(elapsed_s)} gone, {remaining}{step_time}"
    if to <= step:
        return f"step {to} has passed; now at {step} of {total_steps}"
    if to > total_steps:
        return f"step {to} will not be reached: the run ends at {total_steps}; now at {step}"
    wait = _format_clock((to - step) * seconds_per_step) if is_timed else "a time not known"
    return f"step {to} in {wait} {step_time}"


def describe_events(pending: Sequence[Command]) -> str:
    """Returns the scheduled commands as one line."""
    rest = f", ... ({len(pending)} in all)" if len(pending) > _MAX_SHOWN else ""
    shown = ", ".join(map(str, pending[:_MAX_SHOWN]))
    return f"scheduled: {shown}{rest}" if pending else "nothing is scheduled"


def _format_clock(seconds: float) -> str:
    minutes, rest_s = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest_s:02}"


def _format_step_time(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"
