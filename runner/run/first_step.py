"""Checks of an engine's first step, and a report after it.

A parameter that a forward creates or replaces would not be trained, and a module that an optimization adds has no
effect where it is never called: both end the run. Parameters are checked later, too.
"""

from __future__ import annotations

import contextlib
import itertools
import operator
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from runner.engines import Engine
from runner.engines.forward import OutputError
from runner.engines.optim.fused import describe_kernels
from runner.engines.optim.parameter_groups import describe_groups
from runner.utils.train.failures import TrainingStopped
from runner.utils.wrapper.protocol import shorten

_PATIENCE_STEPS = 10  # of waiting for a layer that is skipped at random


class KnownTensors:
    """The parameters of an engine's optimizer, and the buffers of its checkpoints."""

    def __init__(self, name: str, engine: Engine) -> None:
        self._name, self._module = name, engine.module
        self._parameters = {key: (p, p.requires_grad) for key, p in engine.module.named_parameters()}
        self._buffers = _saved_buffers(engine.module)
        parts = list(engine.module.modules())
        self._tables: list[dict[str, Any]] = [table for part in parts for table in (part._parameters, part._modules)]
        self._objects, self._flags = self._snapshot()

    def _snapshot(self) -> tuple[list[Any], list[bool]]:
        """Returns the parameters and children of all modules, and the requires_grad of each known parameter."""
        objects = list(itertools.chain.from_iterable(map(dict.values, self._tables)))
        return objects, [parameter.requires_grad for parameter, _ in self._parameters.values()]

    def check_quickly(self, when: str) -> None:
        """Checks the parameters alone, in about 40 us for a hundred modules where nothing has changed."""
        objects, flags = self._snapshot()
        is_same = len(objects) == len(self._objects) and all(map(operator.is_, objects, self._objects))
        if not is_same or flags != self._flags:
            self._check_parameters(when)

    def check_tensors(self, when: str = "its first forward") -> None:
        """Checks that the module still has the same parameters and buffers.

        Weights that are gathered from the ranks' shards replace them until the next backward or save.

        Args:
            when: the forwards that may have changed the module.
        Raises:
            TrainingStopped: naming the parameters or buffers that differ.
        """
        self._check_parameters(when)
        if buffers := sorted(self._buffers ^ _saved_buffers(self._module)):
            raise TrainingStopped(
                f"{self._name}: {when} has created or removed buffers: {shorten(buffers)}. A checkpoint "
                "that holds them would not fit the module of a resumed run; create them in the module's __init__, or "
                "register them with persistent=False",
                is_complete=False,
            )

    def _check_parameters(self, when: str) -> None:
        now = dict(self._module.named_parameters())
        names = [name for name in self._parameters | now if self._is_other(name, now.get(name))]
        if names:
            raise TrainingStopped(
                f"{self._name}: {when} has created, replaced, removed or unfrozen parameters: "
                f"{shorten(names)}. They would not be trained, for the optimizer was made before; do it in the "
                "module's __init__, such as by calling it there on a sample batch",
                is_complete=False,
            )

    def _is_other(self, name: str, now: Tensor | None) -> bool:
        """Returns True if a parameter is not the one of the optimizer and the checkpoints."""
        before, was_trained = self._parameters.get(name, (None, False))
        if before is None or now is None:
            return True
        return (now is not before and was_trained) or (now.requires_grad and (now is not before or not was_trained))


class FirstStepCheck:
    """Checks the first step of an engine that trains; a module that may be skipped at random has a few more steps.

    Args:
        log: called with each line.
        tensors: of the engine's module, as they are before the step.
    """

    def __init__(self, name: str, engine: Engine, log: Callable[[str], None], tensors: KnownTensors) -> None:
        self._name = name
        self._engine = engine
        self._log = log
        self._tensors = tensors
        engine.wrap_next_forward(self._forward())
        self._num_steps = 0
        self._idle: list[str] = []  # modules that were not called yet and may still be

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        applied = self._engine.applied
        applied.watch_calls()  # from here on: an evaluation before the first step calls every module
        try:
            with contextlib.ExitStack() as contexts:
                for monitor in applied.monitors:
                    contexts.enter_context(monitor.forward())
                yield
        except OutputError:  # as of a loss without gradients: that no adapter was called explains it better
            self._check(is_last=False)
            raise
        if not self._engine.strategy.is_sharded:  # else gathered weights replace the shards until after backward
            self._tensors.check_tensors()
        if not applied.is_compiled:  # backward would fail where no trained module was called
            self._check(is_last=False)

    def _check(self, is_last: bool) -> None:
        applied = self._engine.applied
        try:
            self._idle = applied.check_calls(is_last)
            for monitor in applied.monitors:
                self._idle += monitor.check(is_last)
        except ValueError as error:
            raise TrainingStopped(f"optimizations of {self._name}: {error}") from error

    def prepared(self) -> None:
        """Checks the step before the optimizer's update.

        Raises:
            TrainingStopped: a module of an optimization was never called; parameters are not those of before.
        """
        if self._num_steps == 0:
            self._tensors.check_tensors()
        self._check(is_last=self._num_steps + 1 >= _PATIENCE_STEPS)
        for monitor in self._engine.applied.monitors:
            monitor.gradients()

    def updated(self) -> bool:
        """Logs the report of the first step; returns True if no further step is checked."""
        self._num_steps += 1
        if self._num_steps == 1:
            for monitor in self._engine.applied.monitors:
                self._log(f"{self._name}, after the first step:\n{monitor.describe(self._engine.optimizer)}")
            if self._idle:
                self._log(f"{self._name}: not called in the first step, and waited for: {shorten(self._idle)}")
        return not self._idle


def _saved_buffers(module: nn.Module) -> set[str]:
    found: set[str] = set()
    for prefix, part in module.named_modules():
        saved = part._buffers.keys() - part._non_persistent_buffers_set
        found |= {f"{prefix}.{key}".removeprefix(".") for key in saved if part._buffers[key] is not None}
    return found


def log_model_summary(name: str, engine: Engine, log: Callable[[str], None]) -> KnownTensors | None:
    """Logs an engine's size and its module's optimizations, and has its first step checked.

    Returns:
        The tensors to check later, too, of an engine that trains; else None.
    """
    parameters = list(engine.module.parameters())
    total = sum(parameter.numel() for parameter in parameters)
    frozen = sum(parameter.numel() for parameter in parameters if not parameter.requires_grad)
    left = f", {frozen:,} of them frozen" if frozen else ""
    teacher = "" if engine.optimizer else ", not trained: evaluation mode"
    log(f"{name}: {engine.kind}, {total:,} parameters{left}, on {engine.device}{teacher}")
    if table := engine.applied.table():
        log("\n".join([f"{name}, optimizations:", *(f"  {line}" for line in table)]))
    if engine.optimizer is None:
        return None
    log(f"{name}, optimizer: {describe_kernels(engine.optimizer)}")
    if table := describe_groups(engine.optimizer, engine.module):
        log("\n".join([f"{name}, parameter groups:", *(f"  {line}" for line in table)]))
    tensors = KnownTensors(name, engine)
    engine.first_step_hook = FirstStepCheck(name, engine, log, tensors)
    return tensors
