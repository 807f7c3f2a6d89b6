"""What is looked at in a run's first step, and told after it: what was put into a module and never called, its memory.

Must not import a config.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

from runner.engines import Engine
from runner.utils.altered import shorten
from runner.utils.mishaps import Halt

if TYPE_CHECKING:
    from runner.utils.attribution import Attribution


_PATIENCE_STEPS = 10  # of a layer that is skipped at random


class FirstStep:
    """The first step of one engine whose module was changed; what may be skipped at random is waited for a few more.

    Args:
        tell: called with each line.
    """

    def __init__(self, name: str, engine: Engine, tell: Callable[[str], None]) -> None:
        self._name, self._engine, self._tell = name, engine, tell
        recomputed = engine.changes.recomputed
        self._attribution: Attribution | None = None
        if recomputed is not None:
            from runner.utils.attribution import Attribution

            self._attribution = Attribution(engine.module, recomputed)
        engine.look_once(self._forward())
        self._num_steps, self._waits_for = 0, list[str]()

    @contextlib.contextmanager
    def _forward(self) -> Iterator[None]:
        self._engine.changes.watch_calls()  # from here on: an evaluation before it calls all there is
        if (recomputed := self._engine.changes.recomputed) is not None:
            recomputed.forget_calls()
        with self._attribution.forward() if self._attribution is not None else contextlib.nullcontext():
            yield
        if not self._engine.changes.is_compiled:  # backward would fail where nothing that is trained was called
            self._check(is_last=False)

    def _check(self, is_last: bool) -> None:
        changes = self._engine.changes
        try:
            self._waits_for = changes.check_calls(is_last)
            if changes.recomputed is not None:
                self._waits_for += changes.recomputed.check(is_last)
        except ValueError as error:
            raise Halt(f"optimizations of {self._name}: {error}") from error

    def prepared(self) -> None:
        """Looks at the step's gradients.

        Raises:
            Halt: something that was put in was never called.
        """
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
        recomputed = self._engine.changes.recomputed
        if recomputed is not None and self._attribution is not None:
            self._attribution.optimizer(self._engine.optimizer)
            self._tell(f"{self._name}, after the first step:\n{recomputed.describe()}")
            self._tell(self._attribution.describe())


def introduce(name: str, engine: Engine, tell: Callable[[str], None]) -> None:
    """Tells what an engine is and what was done to its module, and looks at its first step where there is reason to."""
    sizes = [(p.numel(), p.requires_grad) for p in engine.module.parameters()]
    total, frozen = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if not is_trained)
    left = f", {frozen:,} of them frozen" if frozen else ""
    tell(f"{name}: {engine.kind}, {total:,} parameters{left}, on {engine.device}")
    if table := engine.changes.table():
        tell("\n".join([f"{name}, optimizations:", *(f"  {line}" for line in table)]))
        engine.first = FirstStep(name, engine, tell) if engine.optimizer is not None else None
