"""The loop: batches through every engine, and at step boundaries metrics, commands, and what is due every X steps.

It owns the count of steps, and what becomes of a step that goes wrong: it is discarded whole. What it drives it knows
by the Protocols below: it must not import engines, tracking or commands. A *step* is one optimizer update; a
*micro-step* one forward and backward.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch

from runner.utils.agenda import Action, Agenda
from runner.utils.distributed import seed_all
from runner.utils.memory import Peak, is_out_of_memory
from runner.utils.mishaps import Halt, Policy, explain
from runner.utils.pace import Pace
from runner.utils.utils import mix


class Trained(Protocol):
    """What is trained: one engine or several."""

    @property
    def device(self) -> torch.device: ...
    @property
    def tokens(self) -> int: ...
    @property
    def is_updating(self) -> bool: ...
    def micro_step(self, batch: Any) -> None: ...
    def step(self) -> Mapping[str, str]: ...
    def discard(self) -> None: ...
    def is_stopped_by(self, faults: Mapping[str, str], /) -> bool: ...
    def find_late_faults(self) -> Mapping[str, str]: ...
    def take_metrics(self) -> dict[str, float]: ...


class Stream(Protocol):
    """An endless iterator of batches that knows how many samples it has given, and goes back to a mark."""

    @property
    def num_samples_total(self) -> int: ...
    def __next__(self) -> Any: ...
    def mark(self) -> Any: ...
    def rewind(self, mark: Any, /) -> None: ...


class Typed(Protocol):
    """A command for the loop: its name and what stands behind it."""

    @property
    def name(self) -> str: ...
    @property
    def argument(self) -> float | int | None: ...


class Inbox(Protocol):
    """Commands that came in while the loop went on."""

    def due(self, step: int) -> Sequence[Typed]: ...


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
        rank: decides, with seed, step and micro-step, what is drawn at random in a forward.
    """

    def __init__(
        self,
        engines: Trained,
        batches: Stream,
        *,
        steps: int,
        accumulate: int = 1,
        seed: int = 0,
        rank: int = 0,
        log_every: int = 0,
        log: Callable[[int, Mapping[str, float]], None] | None = None,
        warn: Callable[[str], None] | None = None,
        actions: Mapping[str, Action] | None = None,
        commands: Mapping[str, Callable[[Any], None]] | None = None,
        inbox: Inbox | None = None,
        screen: Screen | None = None,
        policy: Policy | None = None,
    ) -> None:
        self.engines = engines
        self.batches = batches
        self.steps = steps
        self.accumulate = accumulate
        self.step = self.num_skipped = 0
        self._seeds = (seed, rank)
        self._log = Action(self.log_metrics, log_every if log else 0)
        self._write = log
        self._warn = warn or (lambda text: None)
        self.agenda = Agenda(actions or {})
        self._saved_at: int | None = None
        self._commands = dict(commands or {})
        self._inbox = inbox
        self._screen = screen
        self._policy = policy or Policy()
        self._stop: str | None = None
        self._halt: Halt | None = None
        self._shown: dict[str, float] = {}
        self._peak = Peak(engines.device)
        self.pace = Pace()

    def stop(self, reason: str) -> None:
        """Ends the loop at the next step boundary, for the first reason given; a signal handler may call it."""
        if self._stop is None:
            self._stop = reason

    @property
    def is_stopping(self) -> bool:
        """Whether the loop was asked to end."""
        return self._stop is not None

    def run(self) -> str:
        """Trains to the last step or until it is stopped; returns "finished" or the reason it was stopped for.

        Raises:
            Halt: it can't go on; saved, if the state is whole.
        """
        self.pace.begin(*self._done())
        try:
            self._do_owed()
            while self.step < self.steps and self._stop is None:
                self._train_step()
                self._boundary()
                if self._halt is not None:
                    raise self._halt
        except Halt as halt:
            if halt.is_whole:
                self._save_last()
            raise
        except Exception as error:
            reason = explain(error, f"after step {self.step}", self.engines.device)
            if reason is None:
                raise
            if self._stop is None:
                self._save_last()
                raise Halt(reason) from error
        if self._stop is None:
            return "finished"
        self._save_last()
        return self._stop

    def _save_last(self) -> None:
        if "save" in self.agenda.actions and self._saved_at != self.step:
            self.do("save")

    def _train_step(self) -> None:
        mark, first_sample = self.batches.mark(), self.batches.num_samples_total
        (seed, rank), device = self._seeds, self.engines.device
        try:
            for micro_step in range(self.accumulate):
                batch = next(self.batches)
                seed_all(mix(seed, self.step, micro_step, rank), device)
                self.engines.micro_step(batch)
            faults = self.engines.step()
        except Exception as error:
            faults = self._recover(error, mark)
        if faults:
            self._take(faults, mark, first_sample)
        self.step += 1

    def _recover(self, error: Exception, mark: Any) -> dict[str, str]:
        """Discards the step; returns why it is left out.

        Raises:
            Halt: it is not to be left out, or some of it was done.
        """
        reason = explain(error, f"in step {self.step + 1}", self.engines.device)
        if reason is None:
            raise error
        if self.engines.is_updating:
            raise Halt(f"{reason}. Its update was under way: go on from the last checkpoint", is_whole=False) from error
        self._discard(mark)
        if self._stop is not None:  # the signal that asked for it may have ended a worker too
            raise error
        if self._policy.on_oom == "stop" or not is_out_of_memory(error):
            raise Halt(reason) from error
        for _ in range(self.accumulate):
            next(self.batches)
        return {"": reason}

    def _discard(self, mark: Any) -> None:
        self.engines.discard()
        self.batches.rewind(mark)

    def _take(self, faults: Mapping[str, str], mark: Any, first_sample: int) -> None:
        """Ends the loop with a step that is not to be left out, or counts it."""
        samples = f"samples {first_sample} to {self.batches.num_samples_total - 1} of the stream"
        message = f"Step {self.step + 1} ({samples}) went wrong. {_tell(faults)}"
        if self.engines.is_stopped_by(faults):
            self._discard(mark)
            raise Halt(f"{message}. The step was discarded: the run stands at step {self.step}")
        self.num_skipped += 1
        self._warn(f"{message}. It is left out, as number {self.num_skipped} of at most {self._policy.max_skips}")
        if self.num_skipped > self._policy.max_skips:
            self._halt = Halt(f"More steps went wrong than the {self._policy.max_skips} that may be left out")

    def _boundary(self) -> None:
        step = self.step
        is_last = step >= self.steps
        if self._log.is_due(step, is_last):
            self._log.do()
        if self._screen is not None:
            self._screen.update(step, **self._shown)
        typed = self._execute(self._inbox.due(step)) if self._inbox is not None else ()
        if self.agenda.add_due(step, is_last, typed):
            self._do_owed()

    def _do_owed(self) -> None:
        self.agenda.do_owed(self.do, lambda: self.is_stopping)

    def do(self, name: str) -> None:
        """Does an action now; the time it takes does not count as training."""
        began = time.perf_counter()
        if name == "save":
            self._check_late()
        self.agenda.actions[name].do()
        if name == "save":
            self._saved_at = self.step
        self.pace.pause(time.perf_counter() - began)

    def _execute(self, typed: Sequence[Typed]) -> set[str]:
        """Does what was typed but for actions, and returns those: they have their order."""
        for command in typed:
            try:
                if command.name not in self.agenda.actions:
                    self._commands[command.name](command.argument)
            except Stop as stop:
                self.stop(str(stop))
        return {command.name for command in typed if command.name in self.agenda.actions}

    def _check_late(self) -> None:
        faults = self.engines.find_late_faults()
        if faults:
            remedy = "go on from the last checkpoint, and skip such steps to have their gradients looked at before"
            raise Halt(f"Up to step {self.step} something went wrong. {_tell(faults)}: {remedy}", is_whole=False)

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
        return {"step": self.step, "skipped": self.num_skipped, "owed": self.agenda.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the steps done."""
        self.step, self.num_skipped = int(state["step"]), int(state["skipped"])
        self.agenda.owed = list(state["owed"])
        self._saved_at = self.step


def _tell(faults: Mapping[str, str]) -> str:
    return "; ".join(f"{name}: {fault}" if name else fault for name, fault in faults.items())


_SHOWN = {"train/loss": "loss", "train/tokens_per_s": "tok/s", "train/samples_per_s": "samples/s"}
