"""Protocols of the loop's parts: engines, batches, typed commands and a progress display."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch


class EngineGroup(Protocol):
    """The engines of a run, trained together on each batch.

    A step is `begin_step`, `micro_step` once or more, then `step`. Until `is_updating` is set, `discard` undoes it.
    """

    is_updating: bool

    @property
    def device(self) -> torch.device: ...
    @property
    def tokens(self) -> int: ...
    @property
    def can_shadow(self) -> bool: ...
    def seed(self, seed: int, shared: tuple[int, ...], /) -> None: ...
    def begin_step(self, step: int, /) -> None: ...
    def micro_step(self, batch: Any, weight: float, /) -> None: ...
    def step(self, poll_faults: Callable[[], Mapping[str, str]], /) -> Mapping[str, str]: ...
    def shadow_step(self) -> None: ...
    def discard(self) -> None: ...
    def is_stopped_by(self, faults: Mapping[str, str], /) -> bool: ...
    def find_late_faults(self, is_alone: bool = False) -> Mapping[str, str]: ...
    def take_metrics(self) -> dict[str, float]: ...


class BatchStream(Protocol):
    """An endless iterator of batches that counts the samples it has yielded and can seek to an earlier position.

    One may have a method `prefetch`, which the loop calls while the device is busy with the batch yielded last.
    """

    weight: float

    @property
    def num_samples_total(self) -> int: ...
    def __next__(self) -> Any: ...
    def position(self) -> Any: ...
    def seek(self, position: Any, /) -> None: ...


class LoopCommand(Protocol):
    """A command to the loop, by name, with its argument."""

    @property
    def name(self) -> str: ...
    @property
    def argument(self) -> float | int | None: ...


class CommandSource(Protocol):
    """A queue of typed commands: `due` returns those for the boundary after a step, `submit` adds a line."""

    def due(self, step: int) -> Sequence[LoopCommand]: ...
    def submit(self, line: str) -> bool: ...


class ProgressDisplay(Protocol):
    """A display of the progress, such as a status line; it must not change the values that were last logged."""

    def update(self, step: int, logged: Mapping[str, float], /) -> None: ...
