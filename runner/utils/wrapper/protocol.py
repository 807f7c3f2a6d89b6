"""The contract of an optimization of a module, and the order in which optimizations are applied.

Imports no torch at import: a config is checked against these types before torch is loaded.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from enum import Enum, IntEnum
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    import torch
    from torch import nn

Export = Callable[[Mapping[str, Any]], dict[str, Any]]
Load = Callable[[Mapping[str, Any]], None]


class Stage(IntEnum):
    """The order of application, lowest first; within a stage, the order of the config.

    DDP or FSDP, the optimizer and the EMA come after all of them.
    """

    FREEZE = 1  # which parameters are trained
    ADAPT = 2  # parameters added to modules
    REPLACE = 3  # modules replaced by others; the stage of an optimization that defines none
    QUANTIZE = 4  # the arithmetic of modules
    PLACE = 5  # the devices of the module; without one, it is moved to the run's device first of all
    COMPILE = 6
    RECOMPUTE = 7


class Purpose(Enum):
    """The use of a module: to train or evaluate a run, to evaluate exported weights, or to write an export."""

    train = "train"
    use = "use"
    write = "write"


class Optimization(Protocol):
    """Changes a module in place.

    A class may also define `stage`, a `Stage`, and `check(others)`, which raises a ValueError where the others, by
    their names in the config, are incompatible with it.
    """

    def apply(self, module: nn.Module, context: Context) -> Applied | None:
        """Applies the changes and returns them, None for none; an error leaves the module unchanged."""


class FirstStepMonitor(Protocol):
    """Observes an optimized module in the first step of training."""

    def forward(self) -> AbstractContextManager[None]:
        """Returns the context in which the first forward runs."""

    def check(self, is_last: bool) -> list[str]:
        """Returns modules that have not run yet and may still; all that has not run is an error in the last check."""

    def gradients(self) -> None:
        """Observes the gradients of the first step."""

    def describe(self, optimizer: Any) -> str:
        """Returns a report of the first step, after the optimizer's."""


@dataclass(frozen=True)
class Context:
    """The circumstances in which an optimization is applied.

    Args:
        device: the device of the run; None leaves the module where it is.
        others: all optimizations of the module, by their names in the config.
        reserved: names of modules that earlier optimizations want left as they are.
    """

    device: torch.device | None = None
    purpose: Purpose = Purpose.train
    others: Mapping[str, Optimization] = field(default_factory=dict)
    reserved: Collection[str] = ()


@dataclass
class Applied:
    """The changes that one optimization has made to a module.

    Args:
        rows: label and text of each row in the start-up table; without one, the row names the class.
        skipped: modules that were left out, by name, with the reason.
        undo: restores the module.
        expected: names of modules that must be called in the first step.
        was_called: finds out about a call of an expected module in a compiled graph, where hooks don't run.
        is_compiled: the calls of the module's children are hidden in a compiled graph.
        keeps_in_eval: names of parameters whose frozen modules run in evaluation mode.
        reserved: names of modules that later optimizations must leave as they are.
        export: turns a state of the module into the state that is exported.
        files: returns further files of an exported state, by name: tensors, or the value of a .json file.
        load: loads the result of `export`; None for the module's own `load_state_dict`.
        monitor: observes the first step.
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    skipped: Mapping[str, str] = field(default_factory=dict)
    undo: Callable[[], Any] | None = None
    expected: Sequence[str] = ()
    was_called: Callable[[str], bool] | None = None
    is_compiled: bool = False
    keeps_in_eval: Sequence[str] = ()
    reserved: Collection[str] = ()
    export: Export | None = None
    load: Load | None = None
    files: Export | None = None
    monitor: FirstStepMonitor | None = None


def stage_of(optimization: Optimization) -> Stage:
    """Returns the stage in which an optimization is applied.

    Raises:
        ValueError: it is none of `Stage`.
    """
    return Stage(getattr(optimization, "stage", Stage.REPLACE))


def check_with_others(name: str, optimizations: Mapping[str, Optimization]) -> None:
    """Checks that one of several optimizations may be applied together with the others.

    Raises:
        ValueError: another is incompatible with it.
    """
    if check := getattr(optimizations[name], "check", None):
        check({other: each for other, each in optimizations.items() if other != name})


def make_row(label: str, names: Collection[str], remark: str = "") -> tuple[str, str]:
    """Returns a row of the start-up table: the number of modules or parameters, and some of their names."""
    return label, f"{len(names)}: {shorten(list(names))}{remark}"


def shorten(names: Sequence[str], most: int = 3) -> str:
    """Returns some of the names, where there are many the first and the last."""
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[: most - 1])} ... {names[-1]}"
