"""A dict of engines, trained one after the other on each batch.

Must not import a config.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runner.engines.engine import Engine
from runner.utils.distributed import move, seed_all
from runner.utils.utils import mix


class Engines(dict[str, Engine]):
    """Engines by name; with one, metrics are named `loss`, with several `<engine>/loss`."""

    @property
    def device(self) -> torch.device:
        """The device that batches go to."""
        return next(iter(self.values())).device

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, as the forwards counted them; each engine sees the same ones."""
        return max(engine.tokens for engine in self.values())

    is_updating = False  # a step can be discarded whole until its first update

    def micro_step(self, batch: Any) -> None:
        """Runs one micro-step of every engine on the same batch."""
        batch = move(batch, self.device)
        for engine in self.values():
            engine.micro_step(batch)

    def step(self) -> dict[str, str]:
        """Ends the step of every engine; returns what was not finite, by engine.

        Where an engine is to stop at that, none is updated, and the step is to be discarded; where it is to skip, it
        has skipped and the others are updated.
        """
        faults = {name: fault for name, engine in self.items() if (fault := engine.prepare())}
        if faults and self.is_stopped_by(faults):
            return faults
        self.is_updating = True
        for name, engine in self.items():
            if name in faults:
                engine.skip()
            else:
                engine.update()
        self.is_updating = False
        return faults

    def is_stopped_by(self, faults: Mapping[str, str]) -> bool:
        """Says whether one of the engines at fault is to stop at that."""
        return any(name in self and self[name].on_nonfinite == "stop" for name in faults)

    def discard(self) -> None:
        """Makes every engine what it was before the step's first micro-step."""
        for engine in self.values():
            engine.discard()

    def find_late_faults(self) -> dict[str, str]:
        """Returns what was not finite in steps already done, by engine; only where the device was not waited for."""
        return {name: fault for name, engine in self.items() if (fault := engine.find_late_fault())}

    def take_metrics(self) -> dict[str, float]:
        """Returns every engine's metrics since the last call."""
        return {f"{self._prefix(name)}{key}": v for name, e in self.items() for key, v in e.take_metrics().items()}

    def evaluate(
        self, batches: Iterable[tuple[Any, int]], is_cut: Callable[[], bool] = bool, seed: int = 0
    ) -> dict[str, float]:
        """Returns the means of loss and the forward's other numbers, each batch weighted by its samples.

        Args:
            batches: pairs of a batch and the number of its samples.
            is_cut: asked before each batch; True ends at once.
            seed: decides, with a batch's number, what is drawn at random in its forward.
        Raises:
            InterruptedError: where `is_cut` said so.
            ValueError: without a single batch.
        """
        total, sums = 0, dict[str, Tensor]()
        for engine in self.values():
            engine.eval()
        try:
            with torch.no_grad():
                for number, (batch, num_samples) in enumerate(batches):
                    seed_all(mix(seed, number), self.device)
                    if is_cut():
                        raise InterruptedError("the evaluation was cut short")
                    total += num_samples
                    self._add(sums, move(batch, self.device), num_samples)
        finally:
            for engine in self.values():
                engine.train()
        if not total:
            raise ValueError("data.eval: the dataset is empty; there is nothing to evaluate on")
        return {name: float(value) / total for name, value in sums.items()}

    def _add(self, sums: dict[str, Tensor], batch: Any, num_samples: int) -> None:
        for name, engine in self.items():
            tokens = engine.tokens
            loss, extras = engine.forward(batch)
            engine.tokens = tokens  # evaluation is not throughput
            for key, value in {"loss": loss, **extras}.items():
                key = self._prefix(name) + key
                term = value.detach().double() * num_samples
                sums[key] = sums[key] + term if key in sums else term

    def report(self, function: Callable[[nn.Module, Any], Mapping[str, Any]], dataset: Any) -> dict[str, Any]:
        """Returns what `function(module, dataset)` shows of each module, in evaluation mode."""
        shown: dict[str, Any] = {}
        for name, engine in self.items():
            with engine.evaluating():
                shown |= {self._prefix(name) + key: value for key, value in function(engine.module, dataset).items()}
        return shown

    def set_lr(self, lr: float) -> None:
        """Sets every engine's base learning rate."""
        for engine in self.values():
            if engine.optimizer is not None:
                engine.set_lr(lr)

    def state_dict(self) -> dict[str, Any]:
        """Returns two entries an engine: `<name>`, weights under the user's names, and `<name>.optimizer`, the rest."""
        state: dict[str, Any] = {}
        for name, engine in self.items():
            state[name] = engine.module.state_dict()
            state[f"{name}.optimizer"] = engine.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], allows_changes: bool = False) -> list[str]:
        """Takes back what `state_dict` gave; returns which parts begin anew, where changes are allowed.

        Raises:
            ValueError: engines of other names, or weights of other names or shapes.
        """
        saved = sorted(name for name in state if "." not in name)
        if saved != sorted(self):
            raise ValueError(f"engines: here {sorted(self)}, in the saved state {saved}; resume with the same config")
        notes: list[str] = []
        for name, engine in self.items():
            try:
                engine.module.load_state_dict(state[name])
            except RuntimeError as error:
                raise ValueError(f"engine {name}: its saved weights do not fit: {error}") from error
            try:
                found = engine.load_state_dict(state[f"{name}.optimizer"], allows_changes)
            except (KeyError, RuntimeError) as error:
                raise ValueError(f"engine {name}: the saved state of its optimizer does not fit: {error!r}") from error
            notes += [f"{name}.{note}" for note in found]
        return notes

    def export_states(self) -> dict[str, dict[str, Tensor]]:
        """Returns each engine's weights as evaluation uses them."""
        states = {}
        for name, engine in self.items():
            with engine.evaluating():
                states[name] = copy.deepcopy(dict(engine.module.state_dict()))  # at once, so that ties stay ties
        return states

    def _prefix(self, name: str) -> str:
        return f"{name}/" if len(self) > 1 else ""
