"""The loop: batches through every engine, and at step boundaries metrics, commands, and what is due every X steps.

It owns the count of steps. What it drives it knows by the Protocols below: it must not import engines, tracking or
commands. A *step* is one optimizer update; a *micro-step* one forward and backward.
"""

from __future__ import annotations

import resource
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch

from runner.utils.distributed import generator_of
from runner.utils.utils import mix


class Trained(Protocol):
    """What is trained: one engine or several."""

    @property
    def device(self) -> torch.device: ...
    @property
    def tokens(self) -> int: ...
    def micro_step(self, batch: Any) -> None: ...
    def take_metrics(self) -> dict[str, float]: ...


class Stream(Protocol):
    """An endless iterator of batches that knows how many samples it has given."""

    @property
    def num_samples_total(self) -> int: ...
    def __next__(self) -> Any: ...


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


@dataclass(frozen=True)
class Action:
    """Something done every `every` steps and at the end; 0 switches it off."""

    do: Callable[[], None]
    every: int

    def is_due(self, step: int, is_last: bool) -> bool:
        """Says whether the boundary after `step` is one of its own."""
        return self.every > 0 and (is_last or step % self.every == 0)


class Stop(Exception):
    """Raised by a command to end the loop; its message is the reason."""


class Loop:
    """Trains for `steps` steps.

    Args:
        actions: by name, in the order they are done at a boundary; a command of that name does it at once. A loop
            that is stopped does `save`, and no other, before it returns.
        commands: more commands by name, each called with its argument; `Stop` ends the loop.
        log: called as log(step, values) every `log_every` steps.
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
        actions: Mapping[str, Action] | None = None,
        commands: Mapping[str, Callable[[Any], None]] | None = None,
        inbox: Inbox | None = None,
        screen: Screen | None = None,
    ) -> None:
        self.engines = engines
        self.batches = batches
        self.steps = steps
        self.accumulate = accumulate
        self.step = 0
        self._seeds = (seed, rank)
        self._log = Action(self.log_metrics, log_every if log else 0)
        self._write = log
        self._actions = dict(actions or {})
        self._done_at: dict[str, int] = {}
        self._commands = dict(commands or {})
        self._inbox = inbox
        self._screen = screen
        self._stop: str | None = None
        self._generator = generator_of(engines.device)
        self._started, self._first_step = time.perf_counter(), 0
        self._shown: dict[str, float] = {}
        self._restart_clock()

    def stop(self, reason: str) -> None:
        """Ends the loop at the next step boundary; only sets a flag, so a signal handler may call it."""
        self._stop = reason

    @property
    def is_stopping(self) -> bool:
        """Whether the loop was asked to end."""
        return self._stop is not None

    def run(self) -> str:
        """Trains to the last step or until it is stopped; returns "finished" or the reason it was stopped for."""
        self._started, self._first_step = time.perf_counter(), self.step
        self._restart_clock()
        while self.step < self.steps and self._stop is None:
            self._train_step()
            self._boundary()
        if self._stop is None:
            return "finished"
        if "save" in self._actions and self._done_at.get("save") != self.step:
            self.do("save")
        return self._stop

    def _train_step(self) -> None:
        seed, rank = self._seeds
        for micro_step in range(self.accumulate):
            batch = next(self.batches)
            self._generator.manual_seed(mix(seed, self.step, micro_step, rank))
            self.engines.micro_step(batch)
        self.step += 1

    def _boundary(self) -> None:
        step = self.step
        is_last = step >= self.steps
        if self._log.is_due(step, is_last):
            self._log.do()
        if self._screen is not None:
            self._screen.update(step, **self._shown)
        if self._inbox is not None:
            self._execute(self._inbox.due(step))
        for name, action in self._actions.items():
            if self._stop is None and action.is_due(step, is_last) and self._done_at.get(name) != step:
                self.do(name)

    def do(self, name: str) -> None:
        """Does an action now; the time it takes does not count as training."""
        began = time.perf_counter()
        self._done_at[name] = self.step
        self._actions[name].do()
        self._paused_s += time.perf_counter() - began

    def _execute(self, typed: Sequence[Typed]) -> None:
        # Actions come last: what is saved at this boundary must hold what was typed for it.
        for command in sorted(typed, key=lambda command: command.name in self._actions):
            try:
                if command.name in self._actions:
                    self.do(command.name)
                else:
                    self._commands[command.name](command.argument)
            except Stop as stop:
                self._stop = str(stop)

    def log_metrics(self) -> None:
        """Writes the metrics gathered since the last time, and what the clock says of the steps since then."""
        now = time.perf_counter()
        num_steps = self.step - self._log_step
        seconds = max(now - self._log_time - self._paused_s, 1e-9)
        values = {f"train/{name}": value for name, value in self.engines.take_metrics().items()}
        values["train/step_time_s"] = seconds / max(num_steps, 1)
        values["train/samples_per_s"] = (self.batches.num_samples_total - self._log_samples) / seconds
        if self.engines.tokens:
            values["train/tokens_per_s"] = (self.engines.tokens - self._log_tokens) / seconds
        values["train/memory_gb"] = memory_gb(self.engines.device)
        assert self._write is not None
        self._write(self.step, values)
        self._shown = {key: values[key] for key in _SHOWN if key in values}
        self._restart_clock(now)

    def _restart_clock(self, now: float | None = None) -> None:
        self._log_time = time.perf_counter() if now is None else now
        self._log_step, self._log_samples = self.step, self.batches.num_samples_total
        self._log_tokens, self._paused_s = self.engines.tokens, 0.0

    def pace(self) -> tuple[float, float]:
        """Returns seconds since `run` began, and seconds a step since then."""
        elapsed_s = time.perf_counter() - self._started
        return elapsed_s, elapsed_s / max(self.step - self._first_step, 1)

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps done."""
        return {"step": self.step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on after the steps done."""
        self.step = int(state["step"])


_SHOWN = ("train/loss", "train/tokens_per_s", "train/samples_per_s")
_PEAK_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024


def memory_gb(device: torch.device) -> float:
    """Returns the peak memory so far: the device's own, or on the CPU the process's resident set, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT_BYTES / 1e9
