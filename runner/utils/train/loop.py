"""The loop: batches through every engine, and at step boundaries metrics, commands, and what is due every X steps.

It owns the count of steps. What it drives it knows by Protocols: it must not import engines, tracking or commands. A
*step* is one optimizer update; a *micro-step* one forward and backward. Of several ranks each has its loop, and all do
the same at the same step: what one of them alone is told goes through their agreement.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from runner.utils import distributed
from runner.utils.distributed import LostError
from runner.utils.distributed.coordinator import Agreement, Word
from runner.utils.distributed.memory import Peak
from runner.utils.files.open_files import Reserve
from runner.utils.train.failures import Cut, Halt, Policy, explain
from runner.utils.train.step import Steps, Stream, Trained, tell
from runner.utils.train.throughput import Pace
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


class Agenda:
    """Actions by name, in the order they are done at a boundary, and the names of those owed."""

    def __init__(self, actions: Mapping[str, Action]) -> None:
        self.actions = dict(actions)
        self.owed: list[str] = []

    def owe(self, name: str) -> None:
        """Owes an action, beside those that are due."""
        self.owed.append(name)

    def add_due(self, step: int, is_last: bool, typed: Collection[str]) -> bool:
        """Owes each action that was typed or is due, once; returns whether anything is owed."""
        for name, action in self.actions.items():
            if name in typed or action.is_due(step, is_last):
                self.owed.append(name)
        return bool(self.owed)

    def do_owed(self, do: Callable[[str], None], is_stopping: Callable[[], bool]) -> None:
        """Does what is owed, in order, until the loop is stopping; what was not done to its end stays owed."""
        while self.owed and not is_stopping():
            try:
                do(self.owed[0])
            except InterruptedError:
                return
            self.owed.pop(0)

    def state_dict(self) -> list[str]:
        """Returns the names owed: nothing where it is the save alone, which is what asks."""
        return [] if set(self.owed) <= {"save"} else list(self.owed)


class Typed(Protocol):
    """A command for the loop: its name and what stands behind it."""

    @property
    def name(self) -> str: ...
    @property
    def argument(self) -> float | int | None: ...


class Inbox(Protocol):
    """Commands that came in while the loop went on."""

    def due(self, step: int) -> Sequence[Typed]: ...
    def take(self, line: str) -> bool: ...


class Screen(Protocol):
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
        agreement: of the ranks; by default this process is alone.
        check: called after each step, before it counts, until it returns True; what it raises ends the loop.
    """

    def __init__(
        self,
        engines: Trained,
        batches: Stream,
        *,
        steps: int,
        accumulate: int = 1,
        seed: int = 0,
        log_every: int = 0,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
        warn: Callable[[str], None] | None = None,
        actions: Mapping[str, Action] | None = None,
        commands: Mapping[str, Callable[[Any], None]] | None = None,
        inbox: Inbox | None = None,
        screen: Screen | None = None,
        policy: Policy | None = None,
        agreement: Agreement | None = None,
        check: Callable[[], bool] | None = None,
    ) -> None:
        self.engines = engines
        self.batches = batches
        self.steps = steps
        self.step = 0
        self.agreement = agreement or Agreement()
        self._warn = warn or (lambda text: None)
        self.maker = Steps(
            engines, batches, self.agreement, accumulate=accumulate, seed=seed, policy=policy or Policy(),
            hear=self._hear, warn=self._warn,
        )  # fmt: skip
        self._log = Action(self.log_metrics, log_every if log else 0)
        self._write = log
        self.agenda = Agenda(actions or {})
        self._saved_at: int | None = None
        self._commands = dict(commands or {})
        self._inbox = inbox
        self._screen = screen
        self._check = check
        self._stop: str | None = None
        self._asked: str | None = None
        self._shown: dict[str, float] = {}
        self._peak = Peak(engines.device)
        self.pace = Pace()
        self._reserve = Reserve()

    def stop(self, reason: str) -> None:
        """Ends the loop at the next step boundary, for the first reason given; a signal handler may call it.

        On several ranks it is the boundary of the next step whose exchange tells all of it.
        """
        if self._asked is None:
            self._asked = reason
            if distributed.is_many():
                self.agreement.say("stop", reason)
            else:
                self._end(reason)

    def _end(self, reason: str) -> None:
        if self._stop is None:
            self._stop = reason

    def _is_ending(self) -> bool:
        return self._stop is not None

    def _hear(self, word: Word) -> None:
        if word.topic == "stop":
            self._end(word.content)
        elif word.topic == "line" and self._inbox is not None:
            self._inbox.take(word.content)

    @property
    def is_stopping(self) -> bool:
        """Whether the loop was asked to end; it ends where all ranks know."""
        return self._asked is not None or self._stop is not None

    @property
    def num_skipped(self) -> int:
        """The number of steps left out so far."""
        return self.maker.num_skipped

    def meet(self) -> None:
        """Takes what any rank has said so far; all ranks call it between two steps."""
        for word in self.agreement.meet():
            self._hear(word)

    def run(self) -> str:
        """Trains to the last step or until it is stopped; returns "finished" or the reason it was stopped for.

        Raises:
            Halt: it can't go on; saved, if the state is whole.
            LostError: another rank is gone.
            BaseException: what a part of the program raised; saved likewise.
        """
        self.pace.begin(*self._done())
        self._reserve.open()
        try:
            self._do_owed()
            self.agreement.together(bool)  # none of the ranks has failed before the first step
            while self.step < self.steps and self._stop is None:
                self.maker.take(self.step, self._is_ending)
                if self._check is not None:
                    self.agreement.guarded(self._check_once)
                self.step += 1
                self._boundary()
                if self.maker.too_many is not None:
                    raise Halt(self.maker.too_many)
            self.agreement.together(bool)  # no rank knows of a failure that the others don't
        except Cut:
            pass
        except BaseException as error:
            if is_signal(error):
                raise
            if isinstance(error, LostError) and not self.agreement.is_alone:
                self.agreement.why_left(error)
            if self.agreement.is_alone:
                self._keep_alone()
                raise
            reason = explain(error, f"after step {self.step}", self.engines.device)
            if reason is None or self._stop is None:
                self._keep_work(error)
                if reason is None:
                    raise
                raise Halt(reason) from error
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
        if not self.maker.is_whole or (isinstance(error, Halt) and not error.is_whole):
            return
        try:
            self._save_last()
        except BaseException as second:
            if is_signal(second) or isinstance(second, LostError):
                raise
            if message_of(error) not in message_of(second):
                self._warn(f"The state of step {self.step} can't be saved: {describe(second)}")

    def _keep_alone(self) -> None:
        """Has the leader save the last step done when the ranks can exchange nothing more, where it has all of it."""
        is_kept = "save" in self.agenda.actions and self._saved_at != self.step
        if not is_kept or not distributed.is_leader() or self.agreement.is_spread or not self.maker.is_whole:
            return
        self._reserve.close()
        try:
            if faults := self.engines.find_late_faults(is_alone=True):
                raise Halt(tell(faults))
            self.agenda.actions["save"].do()
        except Exception as error:
            self._warn(f"The state of step {self.step} can't be saved: {describe(error)}")

    def _save_stopped(self) -> None:
        try:
            self._save_last()
        except BaseException as error:
            if is_signal(error) or isinstance(error, LostError):
                raise
            self._keep_work(error)  # what failed once may not fail again
            raise

    def _save_last(self) -> None:
        self._reserve.close()
        if "save" not in self.agenda.actions:
            return
        saved = self.agreement.together(lambda: self._saved_at)
        if any(step != self.step for step in saved):
            self.do("save")
            self.agreement.together(bool)  # it has failed on none

    def _boundary(self) -> None:
        step = self.step
        is_last = step >= self.steps
        if self._log.is_due(step, is_last):
            self.agreement.guarded(self._log.do)
        if self._screen is not None:
            self._screen.update(step, **self._shown)
        typed = self._execute(self._inbox.due(step)) if self._inbox is not None else ()
        if self.agenda.add_due(step, is_last, typed):
            self._do_owed()
        if self.agreement.trouble is not None:
            self._share_trouble(self.agreement.trouble)

    def _share_trouble(self, trouble: BaseException) -> None:
        """Raises what failed on this rank alone, once the others are on their way to know it.

        Where no step follows, the ranks learn it when they meet at the end of the loop.
        """
        if self.step < self.steps and self._stop is None and self.maker.too_many is None:
            self.agreement.trouble = None
            self.maker.share(trouble, explain(trouble, f"after step {self.step}", self.engines.device))
            raise trouble

    def _do_owed(self) -> None:
        self.agenda.do_owed(self.do, lambda: self._stop is not None)

    def do(self, name: str) -> None:
        """Does an action now; the time it takes does not count as training."""
        began = time.perf_counter()
        if name == "save":
            self._check_late()
            self.agreement.together(bool)  # none of the ranks is in trouble
        try:
            self.agreement.guarded(self.agenda.actions[name].do)
        except InterruptedError:  # on whichever rank: why, all are to know
            self.meet()
            raise
        if name == "save" and self.agreement.trouble is None:
            self._saved_at = self.step
        self.pace.pause(time.perf_counter() - began)

    def _execute(self, typed: Sequence[Typed]) -> set[str]:
        """Does what was typed but for actions, and returns those: they have their order."""
        for command in typed:
            try:
                if command.name not in self.agenda.actions:
                    self._commands[command.name](command.argument)
            except Stop as stop:
                self._end(str(stop))  # all ranks have this command
        return {command.name for command in typed if command.name in self.agenda.actions}

    def _check_late(self) -> None:
        faults = self.engines.find_late_faults()
        if faults:
            remedy = "go on from the last checkpoint, and skip such steps to have their gradients looked at before"
            raise Halt(f"Up to step {self.step} something went wrong. {tell(faults)}: {remedy}", is_whole=False)

    def log_metrics(self) -> None:
        """Writes the metrics gathered since the last time, and what the clock says of the steps since then."""
        self._check_late()
        values = {f"train/{name}": value for name, value in self.engines.take_metrics().items()}
        for name, value in self.pace.look(*self._done()).items():
            values[f"train/{name}"] = value
        values["train/memory_gb"] = self._peak.read_gb()
        assert self._write is not None
        self._write(self.step, values)
        self._shown = {name: values[key] for key, name in _SHOWN.items() if key in values}

    def _done(self) -> tuple[int, int, int]:
        return self.step, self.batches.num_samples_total, self.engines.tokens

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps done and of those left out, and the actions owed at this boundary."""
        return {"step": self.step, "skipped": self.maker.num_skipped, "owed": self.agenda.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the steps done."""
        self.step, self.maker.num_skipped = int(state["step"]), int(state["skipped"])
        self.agenda.owed = list(state["owed"])
        self._saved_at = self.step


_SHOWN = {"train/loss": "loss", "train/tokens_per_s": "tok/s", "train/samples_per_s": "samples/s"}
