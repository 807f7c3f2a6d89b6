"""What is looked at in a run's first step, and told after it: parameters that are not those of before, what was put
into a module and never called, its memory. The parameters are looked at later, too.

Must not import a config.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from runner.engines import Engine
from runner.engines.forward import OutputError
from runner.utils.train.failures import TrainingStopped
from runner.utils.wrapper.applied import shorten

if TYPE_CHECKING:
    from runner.utils.unsloth.memory_report import MemoryReport


_PATIENCE_STEPS = 10  # of a layer that is skipped at random


class KnownTensors:
    """The parameters that an optimizer was made of, and the buffers that a checkpoint holds, of one engine."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._name, self._module = name, engine.module
        self._parameters = {key: (p, p.requires_grad) for key, p in engine.module.named_parameters()}
        self._buffers = _saved_buffers(engine.module)
        parts = list(engine.module.modules())
        self._tables: list[dict[str, Any]] = [table for part in parts for table in (part._parameters, part._modules)]
        self._held, self._flags = self._hold()

    def _hold(self) -> tuple[list[Any], list[bool]]:
        """Returns what stands in all modules, and which of the parameters are trained."""
        held = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        return held, [parameter.requires_grad for parameter, _ in self._parameters.values()]

    def check_quickly(self, when: str) -> None:
        """Checks the parameters likewise, at some 40 us for a hundred modules where nothing has changed."""
        held, flags = self._hold()
        is_same = len(held) == len(self._held) and all(map(operator.is_, held, self._held))
        if not is_same or flags != self._flags:
            self._check_parameters(when)

    def check(self, when: str = "its first forward") -> None:
        """Checks that the module has the parameters that it had, and the buffers that a checkpoint holds.

        Weights that are gathered from the ranks' shards stand for others until the next backward or save.

        Args:
            when: the forwards that may have changed it.
        Raises:
            Halt: naming those that it has not, or has beside.
        """
        self._check_parameters(when)
        if buffers := sorted(self._buffers ^ _saved_buffers(self._module)):
            raise TrainingStopped(
                f"{self._name}: {when} has created or removed buffers: {shorten(buffers)}. A checkpoint "
                "that holds them would not fit the module of a resumed run; create them in the module's __init__, or "
                "register them with persistent=False",
                is_whole=False,
            )

    def _check_parameters(self, when: str) -> None:
        now = dict(self._module.named_parameters())
        names = [name for name in self._parameters | now if self._is_other(name, now.get(name))]
        if names:
            raise TrainingStopped(
                f"{self._name}: {when} has created, replaced, removed or unfrozen parameters: "
                f"{shorten(names)}. They would not be trained, for the optimizer was made before; do it in the "
                "module's __init__, such as by calling it there on a sample batch",
                is_whole=False,
            )

    def _is_other(self, name: str, now: Tensor | None) -> bool:
        """Says whether a parameter is not what the optimizer and a checkpoint take it for."""
        before, was_trained = self._parameters.get(name, (None, False))
        if before is None or now is None:
            return True
        return (now is not before and was_trained) or (now.requires_grad and (now is not before or not was_trained))


class FirstStepCheck:
    """The first step of one engine that trains; what may be skipped at random is waited for a few more.

    Args:
        tell: called with each line.
        tensors: of its module, as they are before.
    """

    def __init__(self, name: str, engine: Engine, tell: Callable[[str], None], tensors: KnownTensors) -> None:
        self._name, self._engine, self._tell = name, engine, tell
        recomputed = engine.applied.recomputed
        self._attribution: MemoryReport | None = None
        if recomputed is not None:
            from runner.utils.unsloth.memory_report import MemoryReport

            self._attribution = MemoryReport(engine.module, recomputed)
        self._tensors = tensors
        engine.first_step_hook(self._forward())
        self._num_steps, self._waits_for = 0, list[str]()

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        self._engine.applied.watch_calls()  # from here on: an evaluation before it calls all there is
        if (recomputed := self._engine.applied.recomputed) is not None:
            recomputed.forget_calls()
        try:
            with self._attribution.forward() if self._attribution is not None else contextlib.nullcontext():
                yield
        except OutputError:  # as of a loss without gradients: that no adapter was called tells more
            self._check(is_last=False)
            raise
        if not self._engine.strategy.is_sharded:  # else gathered weights stand for the shards until after backward
            self._tensors.check()
        if not self._engine.applied.is_compiled:  # backward would fail where nothing that is trained was called
            self._check(is_last=False)

    def _check(self, is_last: bool) -> None:
        changes = self._engine.applied
        try:
            self._waits_for = changes.check_calls(is_last)
            if changes.recomputed is not None:
                self._waits_for += changes.recomputed.check(is_last)
        except ValueError as error:
            raise TrainingStopped(f"optimizations of {self._name}: {error}") from error

    def prepared(self) -> None:
        """Looks at the step's gradients.

        Raises:
            Halt: something that was put in was never called; parameters are not those of before.
        """
        if self._num_steps == 0:
            self._tensors.check()
        self._check(is_last=self._num_steps + 1 >= _PATIENCE_STEPS)
        if self._attribution is not None:
            self._attribution.gradients()

    def updated(self) -> bool:
        """Tells what was found; says whether there is nothing left to look at."""
        self._num_steps += 1
        if self._num_steps == 1:
            self._tell_memory()
            if self._waits_for:
                idle = shorten(self._waits_for)
                self._tell(f"{self._name}: not called in the first step, and waited for: {idle}")
        return not self._waits_for

    def _tell_memory(self) -> None:
        recomputed = self._engine.applied.recomputed
        if recomputed is not None and self._attribution is not None:
            self._attribution.optimizer(self._engine.optimizer)
            self._tell(f"{self._name}, after the first step:\n{recomputed.describe()}")
            self._tell(self._attribution.describe())


def _saved_buffers(module: nn.Module) -> set[str]:
    """Returns the names of the buffers that are part of a module's state."""
    found: set[str] = set()
    for prefix, part in module.named_modules():
        for key, buffer in part._buffers.items():
            if buffer is not None and key not in part._non_persistent_buffers_set:
                found.add(f"{prefix}.{key}" if prefix else key)
    return found


def log_model_summary(name: str, engine: Engine, tell: Callable[[str], None]) -> KnownTensors | None:
    """Tells what an engine is and what was done to its module, and looks at its first step.

    Returns:
        What is to be checked later, too, of an engine that trains.
    """
    sizes = [(p.numel(), p.requires_grad) for p in engine.module.parameters()]
    total, frozen = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if not is_trained)
    left = f", {frozen:,} of them frozen" if frozen else ""
    tell(f"{name}: {engine.kind}, {total:,} parameters{left}, on {engine.device}")
    if table := engine.applied.table():
        tell("\n".join([f"{name}, optimizations:", *(f"  {line}" for line in table)]))
    if engine.optimizer is None:
        return None
    tensors = KnownTensors(name, engine)
    engine.first = FirstStepCheck(name, engine, tell, tensors)
    return tensors
