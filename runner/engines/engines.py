"""A dict of engines, trained one after the other on each batch.

Must not import a config.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from runner.engines.engine import Engine
from runner.engines.forward import Number, keep
from runner.engines.gradients import EMPTY
from runner.engines.metrics import read_all
from runner.engines.strategies import map_tensors
from runner.utils.distributed import all_gather_object, is_distributed, move, run_on_all_ranks, seed_all
from runner.utils.modules.generators import HeldGenerators
from runner.utils.modules.weights import load_weights
from runner.utils.utils import derive_seed, describe

# What loading a state raises that was saved of something else, or by another program.
_MISFITS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)


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
    _held: HeldGenerators | None = None
    _shared: tuple[int, ...] | None = None

    def seed(self, seed: int, shared: tuple[int, ...] | None = None) -> None:
        """Seeds all that a forward may draw from: the global generators, and those that the engines hold.

        Args:
            shared: what a seed is mixed of that is the same on every rank, for the generators that the engines hold:
                each rank has built them alike, so that their draws may have to agree. None takes `seed`.
        """
        self._shared = shared
        seed_all(seed, self.device)
        held = self._held or self.find_generators()
        if held.paths:
            held.seed(seed if shared is None else derive_seed(*shared))

    def find_generators(self) -> HeldGenerators:
        """Looks for the generators that modules, feeders and optimizers hold, which `seed` reseeds from then on."""
        roots: dict[str, Any] = {}
        for name, engine in self.items():
            roots |= {name: engine.module, f"{name}.feeder": engine.feeder, f"{name}.optimizer": engine.optimizer}
        self._held = HeldGenerators(**roots)
        return self._held

    def find_unseeded(self) -> list[str]:
        """Returns warnings of generators that the engines hold and that can't be reseeded for each forward."""
        effect = "its numbers depend on where the run is cut"
        remedy = "draw from torch, NumPy, random or a generator of theirs"
        held = self._held or self.find_generators()
        return [f"{path}: expected a generator that a seed decides; {effect}; {remedy}" for path in held.unseeded]

    def find_late_generators(self) -> list[str]:
        """Looks for generators once more, after the first step; returns warnings of those that were made in it."""
        before = {} if self._held is None else dict(zip(self._held.paths, self._held.sources, strict=True))
        known, now = set(self.find_unseeded()), self.find_generators()
        made = [path for path, source in zip(now.paths, now.sources, strict=True) if before.get(path) is not source]
        effect = "the first step after each start draws other numbers than in a run that is not cut"
        notes = [
            f"{path}: expected a generator made in __init__, found one made in a forward; {effect}" for path in made
        ]
        return notes + [note for note in self.find_unseeded() if note not in known]

    def micro_step(self, batch: Any, weight: float = 1.0) -> None:
        """Runs one micro-step of every engine on the same batch, whose losses count `weight` times."""
        batch = move(batch, self.device)
        for engine in self.values():
            engine.micro_step(batch, weight)

    def step(self, hear: Callable[[], Mapping[str, str]] = dict) -> dict[str, str]:
        """Ends the step of every engine; returns what was not finite, by engine.

        Where an engine is to stop at that, none is updated, and the step is to be discarded; where it is to skip, it
        has skipped and the others are updated.

        Args:
            hear: called when all is exchanged and nothing updated; returns what else was not finite.
        """
        faults = {name: fault for name, engine in self.items() if (fault := engine.prepare())}
        faults |= hear()
        if faults and self.is_stopped_by(faults):
            return faults
        self.is_updating = True
        if self._shared is not None and is_distributed():  # an update that draws must be the same on every rank
            seed_all(derive_seed(derive_seed(*self._shared)), self.device)
        for name, engine in self.items():
            if name in faults:
                engine.skip()
            else:
                engine.update()
        self.is_updating = False
        return faults

    def is_stopped_by(self, faults: Mapping[str, str]) -> bool:
        """Says whether one of the engines at fault is to stop at that."""
        named = [name for name, fault in faults.items() if name in self and fault != EMPTY]
        return any(self[name].on_nonfinite == "stop" for name in named)

    @property
    def can_shadow(self) -> bool:
        """Whether a rank that can't make its share of a step can release the others from it."""
        return all(engine.can_shadow for engine in self.values())

    def shadow_step(self) -> None:
        """Takes part in what is left of a step's exchanges, with nothing to give but word of it."""
        for engine in self.values():
            engine.shadow_step()

    def discard(self) -> None:
        """Makes every engine what it was before the step's first micro-step."""
        for engine in self.values():
            engine.discard()

    def find_late_faults(self, is_alone: bool = False) -> dict[str, str]:
        """Returns what was not finite in steps already done, by engine; only where the device was not waited for.

        Args:
            is_alone: nothing is exchanged with other ranks.
        """
        if not any(engine.looks_late for engine in self.values()):
            return {}
        own = {name: fault for name, engine in self.items() if (fault := engine.find_late_fault())}
        found = [own] if is_alone else all_gather_object(own)
        return {name: fault for faults in reversed(found) for name, fault in faults.items()}

    def take_metrics(self) -> dict[str, float]:
        """Returns every engine's metrics since the last call."""
        return {f"{self._prefix(name)}{key}": v for name, e in self.items() for key, v in e.take_metrics().items()}

    def share_metrics(self) -> None:
        """Makes what was gathered since metrics were last taken the same on every rank."""
        for engine in self.values():
            engine.share_metrics()

    def sync_buffers(self) -> None:
        """Makes buffers on every rank those of the leader."""
        for engine in self.values():
            engine.strategy.sync_buffers(engine.module)

    @property
    def is_sharded(self) -> bool:
        """Whether each rank holds but a part of some weights."""
        return any(engine.strategy.is_sharded for engine in self.values())

    def evaluate(
        self,
        batches: Iterable[tuple[int, Any, int]],
        is_cut: Callable[[], bool] = bool,
        seed: int = 0,
        together: Callable[[Callable[[], Any]], list[Any]] = run_on_all_ranks,
    ) -> dict[str, float]:
        """Returns the means of loss and the forward's other numbers, each batch weighted by its terms or samples.

        Of several ranks each takes its batches; the means are those of one process, to the last bit, where the
        forwards are.

        Args:
            batches: a batch's number among all, the batch, and the number of its samples; 0 leaves it out.
            is_cut: asked before each batch; True ends at once.
            seed: decides, with a batch's number, what is drawn at random in its forward.
            together: calls a function on every rank and returns what each gave.
        Raises:
            InterruptedError: where `is_cut` said so, on whichever rank.
            ValueError: without a single batch.
        """

        def run() -> list[_Evaluated] | None:
            own: list[tuple[int, int, dict[str, Number], dict[str, Number]]] = []
            with torch.no_grad():
                for number, batch, num_samples in batches:
                    self.seed(derive_seed(seed, number))
                    if is_cut() and not self.is_sharded:
                        return None
                    own.append((number, num_samples, *self._forward(move(batch, self.device))))
            is_late = self.is_sharded and is_cut()  # a rank that leaves before would leave the others waiting
            return None if is_late else [(number, size, _floats(v), _floats(w)) for number, size, v, w in own]

        self.sync_buffers()
        for engine in self.values():
            engine.eval()
        try:
            parts = together(run)
        finally:
            for engine in self.values():
                engine.train()
        if any(part is None for part in parts):
            raise InterruptedError("the evaluation was cut short")
        return _means([each for part in parts for each in part or ()])

    def _forward(self, batch: Any) -> tuple[dict[str, Number], dict[str, Number]]:
        """Returns a batch's numbers, and the weights of those that have one."""
        found: dict[str, Number] = {}
        weights: dict[str, Number] = {}
        for name, engine in self.items():
            tokens = engine.tokens
            output = engine.forward(batch)
            engine.tokens = tokens  # evaluation is not throughput
            numbers = output.extras if output.weight is not None else {"loss": keep(output.loss), **output.extras}
            for key, value in numbers.items():
                found[self._prefix(name) + key] = value
                if output.weight is not None:
                    weights[self._prefix(name) + key] = output.weight.terms
        return found, weights

    def report(self, function: Callable[[nn.Module, Any], Mapping[str, Any]], dataset: Any) -> dict[str, Any]:
        """Returns what `function(module, dataset)` shows of each module, in evaluation mode."""
        shown: dict[str, Any] = {}
        for name, engine in self.items():
            with engine.evaluating(), engine.strategy.gathered():
                shown |= {self._prefix(name) + key: value for key, value in function(engine.module, dataset).items()}
        return shown

    def observe(self, numbers: Mapping[str, float]) -> None:
        """Steps the schedulers that need a metric with those of an evaluation, as the leader measured them.

        Raises:
            ValueError: the evaluation has no such metric.
        """
        if any(engine.schedule.metric is not None for engine in self.values()):
            found = all_gather_object(dict(numbers))[0]
            for engine in self.values():
                engine.schedule.observe(found)

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
                load_weights(engine.module, engine.strategy.to_local(state[name], engine.module))
            except _MISFITS as error:
                misfit = _tell_misfit(engine.module, state[name]) or error
                remedy = "resume with the model as it was"
                raise ValueError(f"engine {name}: its saved weights do not fit: {misfit}; {remedy}") from error
            try:
                found = engine.load_state_dict(state[f"{name}.optimizer"], allows_changes, list(state[name]))
            except _MISFITS as error:
                misfit = describe(error)
                raise ValueError(f"engine {name}: the saved state of its optimizer does not fit: {misfit}") from error
            notes += [f"{name}.{note}" for note in found]
        return notes

    def export_states(self) -> dict[str, dict[str, Tensor]]:
        """Returns each engine's weights as evaluation uses them."""
        states = {}
        self.sync_buffers()
        for name, engine in self.items():
            with engine.evaluating():
                whole = engine.strategy.to_full(
                    dict(engine.module.state_dict(keep_vars=True))
                )  # at once: ties stay ties
                state = copy.deepcopy(map_tensors(whole, Tensor.detach))
                states[name] = engine.applied.exported(state)
        return states

    def _prefix(self, name: str) -> str:
        return f"{name}/" if len(self) > 1 else ""


def _tell_misfit(module: nn.Module, saved: Mapping[str, Any]) -> str | None:
    """Returns which weights a module lacks in a saved state, and which there are in their place, with their shapes."""
    own = {name: _shape_of(value) for name, value in module.state_dict().items()}
    found = {name: _shape_of(value) for name, value in saved.items()}
    expected = [f"{name}{shape}" for name, shape in own.items() if found.get(name) != shape]
    others = [f"{name}{shape}" for name, shape in found.items() if own.get(name) != shape]
    if not expected and not others:
        return None
    return f"expected {', '.join(expected) or 'no others'}, found {', '.join(others) or 'none of them'}"


def _shape_of(value: Any) -> str:
    return str([*value.shape]) if isinstance(value, Tensor) else ""


# A batch's number, its samples, its numbers, and the weights of those that have one.
_Evaluated = tuple[int, int, dict[str, float], dict[str, float]]


def _floats(values: Mapping[str, Number]) -> dict[str, float]:
    return dict(zip(values, read_all(list(values.values())), strict=True))


def _means(found: list[_Evaluated]) -> dict[str, float]:
    """Returns the means of batches' numbers, by their terms or else samples, added up in the order of the batches.

    Raises:
        ValueError: there is no batch, or some have a weight and others none.
    """
    counted = sorted((each for each in found if each[1]), key=lambda each: each[0])
    sums, totals, weighted = dict[str, float](), dict[str, float](), dict[str, bool]()
    if not counted:
        raise ValueError("data.eval: the dataset is empty; there is nothing to evaluate on")
    for _, size, values, weights in counted:
        for name, value in values.items():
            if weighted.setdefault(name, name in weights) is not (name in weights):
                remedy = "return it always or never: the losses would not count alike"
                raise ValueError(f"{name}: a forward returned a weight in some batches and not in others; {remedy}")
            weight = weights.get(name, size)
            sums[name] = sums.get(name, 0.0) + (value * weight if weight else 0.0)
            totals[name] = totals.get(name, 0.0) + weight
    return {name: value / totals[name] if totals[name] else math.nan for name, value in sums.items()}
