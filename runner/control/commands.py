"""What may be typed while a run goes on: commands, their parsing, their schedule, and reading them.

It knows nothing of the run: the loop asks for what is due at its step boundaries, and does it. It imports the
standard library only, nothing of `runner`. It reads on POSIX systems.
"""

from __future__ import annotations

import contextlib
import difflib
import itertools
import math
import os
import re
import sys
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import IO, Any

from runner.control.stdin import READ_BYTES, LineReader, is_terminal_or_pipe

_MEANINGS = {  # name: (how it is typed, what it does)
    "save": ("save", "write a checkpoint"),
    "export": ("export", "write the weights alone, for use elsewhere"),
    "eval": ("eval", "evaluate on the validation data"),
    "quit": ("quit", "save and end the run"),
    "lr": ("lr 3e-4", "set the learning rate, a number above 0"),
    "time": ("time, or time to 2000", "say where the run stands, or when it reaches a step"),
    "events": ("events", "list what is scheduled"),
    "help": ("help", "show this list"),
}
_AT_STEP = ("COMMAND@STEP", "do it when that step is done: eval@20, lr 1e-4@50, quit@40")
HELP = "\n".join(f"{form:<24}{meaning}" for form, meaning in [*_MEANINGS.values(), _AT_STEP])
MOST_PENDING = 1000  # commands that wait; then no line is read until some are done
_MOST_SHOWN = 20  # of the scheduled commands
_MAX_RATE = 1e9  # above it an update of any optimizer may overflow float32
_MAX_LINE = READ_BYTES // 4  # characters: a line cut at READ_BYTES is above it in any encoding of UTF-8


class CommandError(ValueError):
    """A line that is no command: one line with what was typed, the nearest command and the remedy."""


@dataclass(frozen=True, slots=True)
class Command:
    """One command, due when `step` steps are done or, if None, at the next boundary; `str` is its typed form.

    `argument` is the rate of `lr`, the step of `time to`, None for the others.
    """

    name: str
    argument: float | int | None = None
    step: int | None = None

    def __str__(self) -> str:
        typed = self.name
        if self.argument is not None:
            typed += f" to {self.argument}" if self.name == "time" else f" {float(self.argument)!r}"
        return typed if self.step is None else f"{typed}@{self.step}"


def parse(line: str) -> Command:
    """Returns the command that a line holds; case, surplus blanks and what follows a `#` do not count.

    Raises:
        CommandError: the line is not exactly one command.
    """
    typed = _without_comment(line)
    if len(line) > _MAX_LINE:
        raise CommandError(f'{_shown(typed)} is too long, over {_MAX_LINE} characters; type "help" to see all')
    body, at, when = typed.lower().partition("@")
    name, *words = body.split() or [""]
    if name not in _MEANINGS:
        raise CommandError(f'{_shown(typed)} is no command; {_nearest(body, at + when)}; type "help" to see all')
    try:
        return Command(name, _argument(name, words), _whole(when.strip()) if at else None)
    except ValueError as error:
        remedy = f'write {_MEANINGS[name][0]}; type "help" to see all'
        raise CommandError(f"{_shown(typed)}: {error}; {remedy}") from None


def _argument(name: str, words: list[str]) -> float | int | None:
    if name == "lr":
        return _rate(words)
    if name == "time" and words:
        if words[0] != "to" or len(words) != 2:
            raise ValueError('"time" takes nothing, or "to" and a step')
        return _whole(words[1])
    if words:
        raise ValueError(f'"{name}" takes nothing but @STEP, found {_shown(" ".join(words))}')
    return None


def _rate(words: list[str]) -> float:
    if not words:
        raise ValueError('"lr" lacks its number')
    number = math.nan
    # The characters are tested because float() alone takes "infinity", "1_0" and digits of other scripts.
    if len(words) == 1 and set(words[0]) <= set("0123456789.e+-"):
        with contextlib.suppress(ValueError):
            number = float(words[0])
    if not (math.isfinite(number) and number > 0):
        raise ValueError(f"expected one finite number above 0, found {_shown(' '.join(words))}")
    if number > _MAX_RATE:
        raise ValueError(f"expected at most {_MAX_RATE:g}, found {_shown(' '.join(words))}")
    return number


def _whole(word: str) -> int:
    if re.fullmatch("[0-9]{1,18}", word) and int(word) >= 1:
        return int(word)
    raise ValueError(f"expected a step, a whole number from 1 on, found {_shown(word)}")


def _nearest(body: str, at_step: str) -> str:
    """Says which command is nearest, with the rest of the line where that makes it a right one."""
    word = "".join(itertools.takewhile(str.isalpha, body))
    close = difflib.get_close_matches(word, _MEANINGS, n=1, cutoff=0.5)
    if not close:
        return f"there are {', '.join(_MEANINGS)}"
    rest = body[len(word) :].lstrip(" =:")
    with contextlib.suppress(CommandError):
        return f'the nearest is "{parse(close[0] + " " + rest + at_step)}"'
    return f'the nearest is "{close[0]}"'


def _is_command(line: str) -> bool:
    try:
        parse(line)
    except CommandError:
        return False
    return True


def _without_comment(line: str) -> str:
    return line.partition("#")[0].strip()


def _shown(typed: str) -> str:
    """Quotes what was typed, short and with its control characters escaped."""
    return repr(typed if len(typed) <= 60 else typed[:60] + "…")


class CommandQueue:
    """Takes commands typed while a run goes on; the loop asks for those that are due at its step boundaries.

    `answer` gets a message a call, from the reading thread and from callers of `start`, `take` and `due`: it
    must be thread-safe. `stream` is read by its descriptor; None is `sys.stdin` at the time of `start`. Where
    that is closed, or has no descriptor, nothing is read. Of the many processes of a run, one reads.
    """

    def __init__(self, answer: Callable[[str], None], *, stream: IO[Any] | None = None) -> None:
        self._answer = answer
        self._stream = stream
        self._reader: LineReader | None = None
        self._lock = threading.Lock()
        self._waiting: list[Command] = []  # in the order typed
        self._next_step = math.inf  # the earliest boundary with something to do; 0 is the next one
        self._step = 0  # the last boundary seen

    def start(
        self,
        step: int = 0,
        take: Callable[[str], bool] | None = None,
        *,
        peeks: bool = False,
        warn: Callable[[str], None] | None = None,
        num_elsewhere: Callable[[], int] = int,
    ) -> None:
        """Begins to read, `step` steps being done; what lies ready in a pipe or file is taken at once.

        Args:
            take: gets each line, to have all ranks of a run take it.
            peeks: reads a terminal and a pipe whose first line is a command, and nothing else.
            warn: called with the reason why a pipe is not read.
            num_elsewhere: returns how many lines `take` has, and not given to `take` of this object yet.
        """
        self._step = step
        stream = sys.stdin if self._stream is None else self._stream
        if self._reader is not None or stream is None:
            return
        try:
            fd = os.dup(stream.fileno())  # ours, whoever closes the original and reuses its number
        except (OSError, ValueError, AttributeError):
            return
        if peeks and not is_terminal_or_pipe(fd):
            os.close(fd)
            return
        self._reader = LineReader(
            fd,
            take or self.take,
            self._answer,
            _is_command if peeks else None,
            warn,
            lambda: len(self._waiting) + num_elsewhere() < MOST_PENDING,
        )
        self._reader.start()

    def close(self) -> None:
        """Ends the reading and leaves the stream open; `start` may follow, here or on another instance."""
        if self._reader is not None:
            self._reader.close()
            self._reader = None

    def due(self, step: int) -> list[Command]:
        """Returns, once and in the order typed, what is to be done now that `step` steps are done.

        Of equal commands that are due at once only the first is done: each but `lr` has no other effect again.
        """
        self._step = step
        if step < self._next_step:
            return []
        with self._lock:
            due = [c for c in self._waiting if c.step is None or c.step <= step]
            self._wait_for([c for c in self._waiting if c.step is not None and c.step > step])
        due = _without_repeats(due)
        passed = [command for command in due if command.step is not None and command.step < step]
        for command in passed[:_MOST_SHOWN]:
            self._answer(f"step {command.step} has passed; now at {step}: {command} is done now")
        if len(passed) > _MOST_SHOWN:
            self._answer(f"... ({len(passed)} in all whose step has passed)")
        return due

    def take(self, line: str) -> bool:
        """Takes one line as if it were typed and answers it; returns whether it was a command or blank."""
        if not _without_comment(line):
            return True
        try:
            command = parse(line)
            self._schedule(command)
        except CommandError as error:
            self._answer(str(error))
            return False
        if command.step is not None:
            self._answer(f"{replace(command, step=None)} at step {command.step}")
        return True

    @property
    def pending(self) -> tuple[Command, ...]:
        """The scheduled commands, by step; those of one step in the order typed."""
        with self._lock:
            scheduled = [c for c in self._waiting if c.step is not None]
        return tuple(sorted(scheduled, key=lambda c: c.step or 0))

    def state_dict(self) -> dict[str, list[str]]:
        """Returns the scheduled commands in their typed form."""
        return {"pending": [str(c) for c in self.pending]}

    def load_state_dict(self, state: dict[str, list[str]]) -> None:
        """Takes saved commands before those typed here, which stay.

        Raises:
            ValueError: an entry is no command with a step; nothing is taken then.
        """
        saved = [parse(line) for line in state["pending"]]
        if bare := [str(c) for c in saved if c.step is None]:
            raise ValueError(f"pending commands: expected each with a step, as in eval@20, found {bare}")
        with self._lock:
            self._wait_for(saved + [c for c in self._waiting if c not in saved])

    def _schedule(self, command: Command) -> None:
        with self._lock:
            # due() stores its step, then reads this; here it is reversed, so that one always sees the other.
            earliest, self._next_step = self._next_step, 0
            step = self._step
            is_passed = command.step is not None and command.step <= step
            if not is_passed:
                self._waiting.append(command)
                earliest = min(earliest, command.step or 0)
            self._next_step = earliest
        if is_passed:
            now = replace(command, step=None)
            raise CommandError(f'step {command.step} has passed; now at {step}: type "{now}" to do it now')

    def _wait_for(self, waiting: list[Command]) -> None:
        self._waiting = waiting
        self._next_step = min((c.step or 0 for c in waiting), default=math.inf)


def _without_repeats(commands: list[Command]) -> list[Command]:
    seen = set[Command]()
    kept = []
    for command in commands:
        if command.name == "lr" or command not in seen:
            seen.add(command)
            kept.append(command)
    return kept


def describe_time(step: int, total_steps: int, seconds_per_step: float, elapsed_s: float, to: int | None = None) -> str:
    """Says where a run stands or, with `to`, when it reaches that step; an unknown pace is 0 or nan."""
    is_timed = math.isfinite(seconds_per_step) and seconds_per_step > 0
    pace = f"({_pace(seconds_per_step)} a step)" if is_timed else "(no step timed yet)"
    if to is None:
        left = f"{_clock((total_steps - step) * seconds_per_step)} to go " if is_timed else ""
        return f"step {step} of {total_steps}, {_clock(elapsed_s)} gone, {left}{pace}"
    if to <= step:
        return f"step {to} has passed; now at {step} of {total_steps}"
    if to > total_steps:
        return f"step {to} will not be reached: the run ends at {total_steps}; now at {step}"
    return f"step {to} in {_clock((to - step) * seconds_per_step) if is_timed else 'a time not known'} {pace}"


def describe_events(pending: Sequence[Command]) -> str:
    """Says what is scheduled, in the order given."""
    rest = f", ... ({len(pending)} in all)" if len(pending) > _MOST_SHOWN else ""
    shown = ", ".join(map(str, pending[:_MOST_SHOWN]))
    return f"scheduled: {shown}{rest}" if pending else "nothing is scheduled"


def _clock(seconds: float) -> str:
    minutes, rest_s = divmod(max(0, round(seconds)), 60)
    return f"{minutes // 60}:{minutes % 60:02}:{rest_s:02}"


def _pace(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 0.1 else f"{seconds * 1e3:.2f} ms"
