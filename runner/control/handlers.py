"""What a person types while a run goes on: taken on the leader, done on every rank, answered once.

Must not know how a run is saved or evaluated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Protocol

from runner.control.commands import HELP, CommandError, CommandQueue, describe_events, describe_time, parse
from runner.utils.distributed import is_distributed, is_rank_zero
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.train import Stop
from runner.utils.train.throughput import Throughput

_MOST_ANSWERS = 20  # at one step


class HasProgress(Protocol):
    """The loop that is talked to."""

    step: int
    steps: int
    throughput: Throughput


class HasLearningRate(Protocol):
    """What has a learning rate."""

    def set_lr(self, lr: float) -> None: ...


class CommandHandlers:
    """Commands and their answers.

    Args:
        answer: called with each answer.
    """

    def __init__(self, engines: HasLearningRate, coordinator: Coordinator, answer: Callable[[str], None]) -> None:
        self._engines, self._agreement, self._answer = engines, coordinator, answer
        self.queue = CommandQueue(answer)
        self.loop: HasProgress | None = None
        self._answered = 0, 0  # the last step with an answer, and how many it had

    @property
    def commands(self) -> Mapping[str, Callable[[Any], None]]:
        """What is done at a command, by name."""
        return {
            "quit": self._quit,
            "lr": self._set_lr,
            "time": self._tell_time,
            "events": lambda _: self._answer_due(describe_events(self.queue.pending)),
            "help": lambda _: self._answer_due(HELP),
        }

    def start(self, step: int, *, peeks: bool, warn: Callable[[str], None]) -> None:
        """Begins to read what is typed, on the leader; the arguments are those of `Commands.start`."""
        if is_rank_zero():
            waiting, relay = (self._agreement.num_unsent, self._relay) if is_distributed() else (int, None)
            self.queue.start(step, relay, peeks=peeks, warn=warn, num_elsewhere=waiting)

    def _relay(self, line: str) -> bool:
        """Has all ranks take what was typed here, if it is a command."""
        try:
            parse(line)
        except CommandError:
            return self.queue.take(line)  # it answers
        self._agreement.post("line", line)
        return True

    def _answer_due(self, text: str) -> None:
        """Answers a command that was due, with the first few at one step."""
        assert self.loop is not None
        step, count = self._answered
        count = count + 1 if step == self.loop.step else 1
        self._answered = self.loop.step, count
        if count <= _MOST_ANSWERS:
            self._answer(text)
        elif count == _MOST_ANSWERS + 1:
            self._answer("... (further commands at this step are done without an answer)")

    def _quit(self, _: Any) -> None:
        raise Stop("quit")

    def _set_lr(self, lr: float) -> None:
        assert self.loop is not None
        self._engines.set_lr(lr)
        self._answer_due(f"The base learning rate is {lr:g} from step {self.loop.step + 1} on")

    def _tell_time(self, to: int | None) -> None:
        assert self.loop is not None
        elapsed_s, step_s = self.loop.throughput.overall(self.loop.step)
        self._answer_due(describe_time(self.loop.step, self.loop.steps, step_s, elapsed_s, to))
