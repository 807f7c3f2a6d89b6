"""The loop: batches through every engine, and at step boundaries metrics, commands, and what is due every X steps.

It owns the count of steps. What it drives it knows by Protocols: it must not import engines, tracking or commands. A
*step* is one optimizer update; a *micro-step* one forward and backward. Of several ranks each has its loop, and all do
the same at the same step: what one of them alone is told goes through their coordinator.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runner.utils import distributed
from runner.utils.distributed import RankLostError
from runner.utils.distributed.coordinator import Coordinator, Message
from runner.utils.distributed.memory import Peak
from runner.utils.files.open_files import Reserve
from runner.utils.train.failures import FailurePolicy, StepAborted, TrainingStopped, describe_failure
from runner.utils.train.step import BatchStream, EngineGroup, StepRunner, describe_faults
from runner.utils.train.throughput import Throughput
from runner.utils.utils import describe, is_signal, message_of


@dataclass(frozen=True)
class Action:
    """Something done every `every` steps and at the end; 0 switches it off.

    `do` raises InterruptedError where the loop is stopping and it had to leave off: it is then owed.
    """

    do: Callable[[], None]
    every: int

    def is_due(self, step: int, is_last: bool) -> bool:
        """Says whether the boundary after `step` is one of its own."""
        return self.every > 0 and (is_last or step % self.every == 0)


class Schedule:
    """Actions by name, in the order they are done at a boundary, and the names of those owed."""

    def __init__(self, actions: Mapping[str, Action]) -> None:
        self.actions = dict(actions)
        self.pending: list[str] = []

    def enqueue(self, name: str) -> None:
        """Owes an action, beside those that are due."""
        self.pending.append(name)

    def enqueue_due(self, step: int, is_last: bool, typed: Collection[str]) -> bool:
        """Owes each action that was typed or is due, once; returns whether anything is owed."""
        for name, action in self.actions.items():
            if name in typed or action.is_due(step, is_last):
                self.pending.append(name)
        return bool(self.pending)

    def run_pending(self, do: Callable[[str], None], is_stopping: Callable[[], bool]) -> None:
        """Does what is owed, in order, until the loop is stopping; what was not done to its end stays owed."""
        while self.pending and not is_stopping():
            try:
                do(self.pending[0])
            except InterruptedError:
                return
            self.pending.pop(0)

    def state_dict(self) -> list[str]:
        """Returns the names owed: nothing where it is the save alone, which is what asks."""
        return [] if set(self.pending) <= {"save"} else list(self.pending)


class LoopCommand(Protocol):
    """A command for the loop: its name and what stands behind it."""

    @property
    def name(self) -> str: ...
    @property
    def argument(self) -> float | int | None: ...


class CommandSource(Protocol):
    """Commands that came in while the loop went on."""

    def due(self, step: int) -> Sequence[LoopCommand]: ...
    def take(self, line: str) -> bool: ...


class ProgressDisplay(Protocol):
    """Where a person looks."""

    def update(self, step: int, **shown: float) -> None: ...
    def print(self, text: str) -> None: ...


class Stop(Exception):
    """Raised by a command to end the loop; its message is the reason."""


class Loop:
    """Trains for `steps` steps.

    Args:
        actions: by name, in the order they are done at a boundary; a command of that name does it too. A loop
            that is stopped does `save`, and no other, before it returns; what it owes is part of its state.
        commands: more commands by name, each called with its argument; `Stop` ends the loop.
        log: called as log(step, values) every `log_every` steps.
        warn: called with what a person should know of a step that was left out.
        accumulate: micro-steps a step.
        seed: decides, with step, micro-step and rank, what is drawn at random in a forward.
        coordinator: of the ranks; by default this process is alone.
        check: called after each step, before it counts, until it returns True; what it raises ends the loop.
    """

    def __init__(
        self,
        engines: EngineGroup,
        batches: BatchStream,
        *,
        steps: int,
        accumulate: int = 1,
        seed: int = 0,
        log_every: int = 0,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
        warn: Callable[[str], None] | None = None,
        actions: Mapping[str, Action] | None = None,
        commands: Mapping[str, Callable[[Any], None]] | None = None,
        inbox: CommandSource | None = None,
        screen: ProgressDisplay | None = None,
        policy: FailurePolicy | None = None,
        coordinator: Coordinator | None = None,
        check: Callable[[], bool] | None = None,
    ) -> None:
        self.engines = engines
        self.batches = batches
        self.steps = steps
        self.step = 0
        self.coordinator = coordinator or Coordinator()
        self._warn = warn or (lambda text: None)
        self.step_runner = StepRunner(
            engines, batches, self.coordinator, accumulate=accumulate, seed=seed, policy=policy or FailurePolicy(),
            hear=self._poll_messages, warn=self._warn,
        )  # fmt: skip
        self._log = Action(self.log_metrics, log_every if log else 0)
        self._write = log
        self.schedule = Schedule(actions or {})
        self._saved_at: int | None = None
        self._commands = dict(commands or {})
        self._queue = inbox
        self._display = screen
        self._check = check
        self._stop: str | None = None
        self._asked: str | None = None
        self._shown: dict[str, float] = {}
        self._peak = Peak(engines.device)
        self.throughput = Throughput()
        self._reserve = Reserve()

    def stop(self, reason: str) -> None:
        """Ends the loop at the next step boundary, for the first reason given; a signal handler may call it.

        On several ranks it is the boundary of the next step whose exchange tells all of it.
        """
        if self._asked is None:
            self._asked = reason
            if distributed.is_distributed():
                self.coordinator.post("stop", reason)
            else:
                self._end(reason)

    def _end(self, reason: str) -> None:
        if self._stop is None:
            self._stop = reason

    def _is_ending(self) -> bool:
        return self._stop is not None

    def _poll_messages(self, word: Message) -> None:
        if word.topic == "stop":
            self._end(word.content)
        elif word.topic == "line" and self._queue is not None:
            self._queue.take(word.content)

    @property
    def is_stopping(self) -> bool:
        """Whether the loop was asked to end; it ends where all ranks know."""
        return self._asked is not None or self._stop is not None

    @property
    def num_skipped(self) -> int:
        """The number of steps left out so far."""
        return self.step_runner.num_skipped

    def exchange_messages(self) -> None:
        """Takes what any rank has said so far; all ranks call it between two steps."""
        for word in self.coordinator.exchange():
            self._poll_messages(word)

    def run(self) -> str:
        """Trains to the last step or until it is stopped; returns "finished" or the reason it was stopped for.

        Raises:
            Halt: it can't go on; saved, if the state is whole.
            LostError: another rank is gone.
            BaseException: what a part of the program raised; saved likewise.
        """
        self.throughput.begin(*self._done())
        self._reserve.open()
        try:
            self._run_pending()
            self.coordinator.run_on_all_ranks(bool)  # none of the ranks has failed before the first step
            while self.step < self.steps and self._stop is None:
                self.step_runner.run(self.step, self._is_ending)
                if self._check is not None:
                    self.coordinator.defer_error(self._check_once)
                self.step += 1
                self._boundary()
                if self.step_runner.too_many is not None:
                    raise TrainingStopped(self.step_runner.too_many)
            self.coordinator.run_on_all_ranks(bool)  # no rank knows of a failure that the others don't
        except StepAborted:
            pass
        except BaseException as error:
            if is_signal(error):
                raise
            if isinstance(error, RankLostError) and not self.coordinator.is_alone:
                self.coordinator.abort_reason(error)
            if self.coordinator.is_alone:
                self._keep_alone()
                raise
            reason = describe_failure(error, f"after step {self.step}", self.engines.device)
            if reason is None or self._stop is None:
                self._keep_work(error)
                if reason is None:
                    raise
                raise TrainingStopped(reason) from error
        finally:
            self._reserve.close()
        if self._stop is None:
            return "finished"
        self._save_stopped()
        return self._stop

    def _check_once(self) -> None:
        assert self._check is not None
        if self._check():
            self._check = None

    def _keep_work(self, error: BaseException) -> None:
        """Saves the state of the last step done before an error ends the loop, where there is one.

        What the save raises is told and no more: it must not hide the error.
        """
        if not self.step_runner.is_whole or (isinstance(error, TrainingStopped) and not error.is_complete):
            return
        try:
            self._save_last()
        except BaseException as second:
            if is_signal(second) or isinstance(second, RankLostError):
                raise
            if message_of(error) not in message_of(second):
                self._warn(f"The state of step {self.step} can't be saved: {describe(second)}")

    def _keep_alone(self) -> None:
        """Has the leader save the last step done when the ranks can exchange nothing more, where it has all of it."""
        is_kept = "save" in self.schedule.actions and self._saved_at != self.step
        if not is_kept or not distributed.is_rank_zero() or self.coordinator.is_spread or not self.step_runner.is_whole:
            return
        self._reserve.close()
        try:
            if faults := self.engines.find_late_faults(is_alone=True):
                raise TrainingStopped(describe_faults(faults))
            self.schedule.actions["save"].do()
        except Exception as error:
            self._warn(f"The state of step {self.step} can't be saved: {describe(error)}")

    def _save_stopped(self) -> None:
        try:
            self._save_last()
        except BaseException as error:
            if is_signal(error) or isinstance(error, RankLostError):
                raise
            self._keep_work(error)  # what failed once may not fail again
            raise

    def _save_last(self) -> None:
        self._reserve.close()
        if "save" not in self.schedule.actions:
            return
        saved = self.coordinator.run_on_all_ranks(lambda: self._saved_at)
        if any(step != self.step for step in saved):
            self.do("save")
            self.coordinator.run_on_all_ranks(bool)  # it has failed on none

    def _boundary(self) -> None:
        step = self.step
        is_last = step >= self.steps
        if self._log.is_due(step, is_last):
            self.coordinator.defer_error(self._log.do)
        if self._display is not None:
            self._display.update(step, **self._shown)
        typed = self._execute(self._queue.due(step)) if self._queue is not None else ()
        if self.schedule.enqueue_due(step, is_last, typed):
            self._run_pending()
        if self.coordinator.deferred_error is not None:
            self._share_trouble(self.coordinator.deferred_error)

    def _share_trouble(self, trouble: BaseException) -> None:
        """Raises what failed on this rank alone, once the others are on their way to know it.

        Where no step follows, the ranks learn it when they meet at the end of the loop.
        """
        if self.step < self.steps and self._stop is None and self.step_runner.too_many is None:
            self.coordinator.deferred_error = None
            self.step_runner.share(trouble, describe_failure(trouble, f"after step {self.step}", self.engines.device))
            raise trouble

    def _run_pending(self) -> None:
        self.schedule.run_pending(self.do, lambda: self._stop is not None)

    def do(self, name: str) -> None:
        """Does an action now; the time it takes does not count as training."""
        began = time.perf_counter()
        if name == "save":
            self._check_late()
            self.coordinator.run_on_all_ranks(bool)  # none of the ranks is in trouble
        try:
            self.coordinator.defer_error(self.schedule.actions[name].do)
        except InterruptedError:  # on whichever rank: why, all are to know
            self.exchange_messages()
            raise
        if name == "save" and self.coordinator.deferred_error is None:
            self._saved_at = self.step
        self.throughput.pause(time.perf_counter() - began)

    def _execute(self, typed: Sequence[LoopCommand]) -> set[str]:
        """Does what was typed but for actions, and returns those: they have their order."""
        for command in typed:
            try:
                if command.name not in self.schedule.actions:
                    self._commands[command.name](command.argument)
            except Stop as stop:
                self._end(str(stop))  # all ranks have this command
        return {command.name for command in typed if command.name in self.schedule.actions}

    def _check_late(self) -> None:
        faults = self.engines.find_late_faults()
        if faults:
            remedy = "go on from the last checkpoint, and skip such steps to have their gradients looked at before"
            raise TrainingStopped(
                f"Up to step {self.step} something went wrong. {describe_faults(faults)}: {remedy}", is_whole=False
            )

    def log_metrics(self) -> None:
        """Writes the metrics gathered since the last time, and what the clock says of the steps since then."""
        self._check_late()
        values = {f"train/{name}": value for name, value in self.engines.take_metrics().items()}
        for name, value in self.throughput.measure(*self._done()).items():
            values[f"train/{name}"] = value
        values["train/memory_gb"] = self._peak.read_gb()
        assert self._write is not None
        self._write(self.step, values)
        self._shown = {name: values[key] for key, name in _SHOWN.items() if key in values}

    def _done(self) -> tuple[int, int, int]:
        return self.step, self.batches.num_samples_total, self.engines.tokens

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps done and of those left out, and the actions owed at this boundary."""
        return {"step": self.step, "skipped": self.step_runner.num_skipped, "owed": self.schedule.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the steps done."""
        self.step, self.step_runner.num_skipped = int(state["step"]), int(state["skipped"])
        self.schedule.pending = list(state["owed"])
        self._saved_at = self.step


_SHOWN = {"train/loss": "loss", "train/tokens_per_s": "tok/s", "train/samples_per_s": "samples/s"}
