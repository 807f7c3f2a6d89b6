"""Stochastic weight averaging: the mean of the weights over the last part of training."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch.nn.modules.batchnorm import _BatchNorm

from runner.callbacks.run_view import RunView
from runner.engines.ema import EqualAverages
from runner.engines.gradients import BufferSnapshot
from runner.utils.distributed import all_gather_object
from runner.utils.train.failures import SetupError
from runner.utils.utils import checked_int

SUFFIX = "_swa"


class WeightAveraging:
    """Averages the weights of each trained engine, as `torch.optim.swa_utils.AveragedModel` does.

    After the last step, the averaged weights are evaluated as `eval/swa/...` and written to
    `exports/<engine>_swa.safetensors`. The statistics of BatchNorm layers are computed anew for them, as
    `torch.optim.swa_utils.update_bn` does. Training itself stays the same: choose a schedule whose rates stay high,
    such as torch's SWALR.

    Args:
        start: the first step that is averaged: a step, at least 1, or a share of the run's steps below 1.
        every: steps between updates of the averages, at least 1.
        update_bn: computes the statistics of BatchNorm layers in one pass over data.train.
        bn_batches: number of batches of that pass; None for all.
    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, start: float = 0.75, every: int = 1, update_bn: bool = True, bn_batches: int | None = None
    ) -> None:
        if not start >= 0 or (start >= 1 and start != int(start)):
            raise ValueError(f"start={start}: expected a step, 1 or more, or a share of the steps below 1")
        self.start = start
        self.every = checked_int("every", every, 1)
        self.update_bn = update_bn
        self.bn_batches = None if bn_batches is None else checked_int("bn_batches", bn_batches, 1)
        self._averages: dict[str, EqualAverages] = {}  # by engine
        self._loaded: dict[str, Any] = {}  # a saved state, until the run starts
        self._finished_step = 0  # after which the averages were evaluated and exported
        self._first_step = 1

    def on_start(self, view: RunView) -> None:
        for name, engine in view.engines.items():
            if engine.optimizer is None:
                continue
            if engine.ema is not None or hasattr(engine.optimizer, "eval"):
                optimizer = type(engine.optimizer).__name__
                found = "ema; set its ema=null" if engine.ema is not None else f"{optimizer}; choose another optimizer"
                expected = f"expected no other average of the weights of engine {name}"
                raise SetupError(f"{expected}, found that of {found}, or leave this callback out", is_complete=False)
            self._averages[name] = EqualAverages(engine.module)
            if self._loaded:
                state = self._loaded["averages"][name]
                weights = engine.strategy.to_local(state["weights"], engine.module)
                self._averages[name].load_state_dict({**state, "weights": weights})
        self._loaded = {}
        if self.update_bn and view.is_stream and any(self._find_norms(view).values()):
            expected = "update_bn: expected data.train with a length, for a pass over it; found a stream"
            raise SetupError(f"{expected}; set callbacks.weight_averaging.update_bn=false", is_complete=False)
        self._first_step = max(int(self.start if self.start >= 1 else round(self.start * view.steps)), 1)

    def on_step(self, view: RunView) -> None:
        if view.step >= self._first_step and (view.step - self._first_step) % self.every == 0:
            for averages in self._averages.values():
                averages.update()

    def on_save(self, view: RunView) -> None:
        if view.is_last:
            self._finish(view)

    def on_end(self, view: RunView, status: str) -> None:
        if status == "finished":  # if there was no save after the last step
            self._finish(view)

    def _finish(self, view: RunView) -> None:
        is_begun = any(averages.num_updates for averages in self._averages.values())
        if not is_begun or self._finished_step == view.step:
            return
        if any(all_gather_object(view.is_stopping)):  # after a resume
            return
        with self._averaged(view):
            if self.update_bn:
                self._update_bn(view)
            try:
                numbers = view.evaluate()
            except InterruptedError:
                return
            if numbers:
                view.log({name.replace("eval/", "eval/swa/", 1): value for name, value in numbers.items()})
            view.export(SUFFIX, numbers)
        self._finished_step = view.step

    @contextlib.contextmanager
    def _averaged(self, view: RunView) -> Iterator[None]:
        """Returns a context in which the weights are the averages; then weights and buffers are as before."""
        snapshots = [BufferSnapshot(view.engines[name].module) for name in self._averages]
        for snapshot in snapshots:
            snapshot.save()
        for averages in self._averages.values():
            averages.swap()
        try:
            yield
        finally:
            for averages in self._averages.values():
                averages.swap()
            for snapshot in snapshots:
                snapshot.restore()

    def _find_norms(self, view: RunView) -> dict[str, list[_BatchNorm]]:
        """Returns the BatchNorm layers that train, by engine."""
        norms = {}
        for name in self._averages:
            parts = view.engines[name].module.modules()
            norms[name] = [part for part in parts if isinstance(part, _BatchNorm) and part.training]
        return norms

    @torch.no_grad()
    def _update_bn(self, view: RunView) -> None:
        """Computes the statistics of the BatchNorm layers that train, as means over the batches of a pass.

        Every rank makes the whole pass, so that the statistics do not depend on the number of ranks.
        """
        norms = self._find_norms(view)
        momenta = {norm: norm.momentum for of_engine in norms.values() for norm in of_engine}
        if not momenta:
            return
        for norm in momenta:
            norm.reset_running_stats()
            norm.momentum = None  # a mean over all batches
        tokens = {name: view.engines[name].tokens for name in norms}
        try:
            for batch in view.training_batches(self.bn_batches):
                for name, of_engine in norms.items():
                    if of_engine:
                        view.engines[name].forward(batch)
        finally:
            for norm, momentum in momenta.items():
                norm.momentum = momentum
            for name, count in tokens.items():
                view.engines[name].tokens = count

    def state_dict(self) -> dict[str, Any]:
        if self._loaded or not self._averages:
            return self._loaded
        averages = {name: averages.state_dict() for name, averages in self._averages.items()}
        return {"averages": averages, "finished_step": self._finished_step}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Keeps a state until the run starts."""
        self._loaded = dict(state)
        self._finished_step = state.get("finished_step", 0)
