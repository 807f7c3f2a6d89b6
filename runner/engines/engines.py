"""Engines: a dict of engines, trained on each batch together or in turns."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor, nn

from runner.engines.engine import Engine
from runner.engines.evaluation import evaluate
from runner.engines.gradients import EMPTY
from runner.engines.strategies import map_tensors
from runner.utils.distributed import all_gather_object, is_distributed, move, run_on_all_ranks, seed_all
from runner.utils.modules.generators import ObjectGenerators
from runner.utils.modules.weights import load_weights
from runner.utils.train.failures import TrainingStopped
from runner.utils.utils import derive_seed, describe

# Errors of loading a state that was saved from another model or by another program.
_LOAD_ERRORS = (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError)

Turn = list[tuple[str, Engine]]  # engines that are updated together, after the forwards of all of them
Seeds = tuple[int, tuple[int, ...] | None]


class Engines(dict[str, Engine]):
    """Engines by name.

    The metrics of a single engine are named `loss`, those of several `<engine>/loss`.

    Attributes:
        device: the device that batches are moved to.
        alternates: each engine is updated before the next one's forward, instead of all after all forwards.
        is_updating: true from the first update of a step: the step can no longer be discarded.
    """

    alternates = False
    is_updating = False
    _turns: list[Turn] | None = None  # of the current step
    _has_intervals = False  # the turns differ between steps
    _last_seeds: Seeds | None = None  # arguments of the last `seed`
    _generators: ObjectGenerators | None = None
    _shared_seeds: tuple[int, ...] | None = None

    def __init__(self, *args: Any, **engines: Engine) -> None:
        super().__init__()
        self._is_distributed = is_distributed()
        self._micro_steps: list[tuple[Any, float, Seeds | None]] = []  # of the step, for its later turns
        for name, engine in dict(*args, **engines).items():
            self[name] = engine

    def __setitem__(self, name: str, engine: Engine) -> None:
        super().__setitem__(name, engine)
        self._turns = None
        self.device = next(iter(self.values())).device
        self._defers_finite_check = any(engine.defers_finite_check for engine in self.values())
        if engine.other_modules is not None:
            engine.other_modules.connect(name, self)

    @property
    def tokens(self) -> int:
        """Number of tokens trained on so far; all engines see the same batches."""
        return max([engine.tokens for engine in self.values()])

    def seed(self, seed: int, shared_seeds: tuple[int, ...] | None = None) -> None:
        """Seeds every generator that a forward may draw from.

        These are the global generators, and those that the engines hold.

        Args:
            shared_seeds: numbers that are the same on every rank, from which the seed of the held generators is
                derived. Each rank has built these generators alike, so their draws may have to agree. None uses `seed`.
        """
        self._shared_seeds, self._last_seeds = shared_seeds, (seed, shared_seeds)
        seed_all(seed, self.device)
        generators = self._generators or self.find_generators()
        if generators.paths:
            generators.seed(seed if shared_seeds is None else derive_seed(*shared_seeds))

    def find_generators(self) -> ObjectGenerators:
        """Finds the generators that modules, feeders and optimizers hold.

        `seed` seeds them from then on.
        """
        roots: dict[str, Any] = {}
        for name, engine in self.items():
            roots |= {name: engine.module, f"{name}.feeder": engine.feeder, f"{name}.optimizer": engine.optimizer}
            if engine.loss is not None:
                roots[f"{name}.loss"] = engine.loss.function
        self._generators = ObjectGenerators(**roots)
        return self._generators

    def find_unseeded(self) -> list[str]:
        """Returns a warning for each held generator that can't be seeded for each forward."""
        generators = self._generators or self.find_generators()
        return [
            f"{path}: expected a generator that a seed decides; its numbers depend on where the run is cut; "
            "draw from torch, NumPy, random or a generator of theirs"
            for path in generators.unseeded
        ]

    def find_late_generators(self) -> list[str]:
        """Finds generators again, after the first step.

        Returns a warning for each that was made in that step.
        """
        before = self._generators
        known_sources = {} if before is None else dict(zip(before.paths, before.sources, strict=True))
        known_warnings = set(self.find_unseeded())
        now = self.find_generators()
        warnings = [
            f"{path}: expected a generator made in __init__, found one made in a forward; "
            "the first step after each start draws other numbers than in a run that is not cut"
            for path, source in zip(now.paths, now.sources, strict=True)
            if known_sources.get(path) is not source
        ]
        return warnings + [warning for warning in self.find_unseeded() if warning not in known_warnings]

    def begin_step(self, step: int) -> None:
        """Selects the engines that run in the step that follows `step` completed steps of the run."""
        if self._turns is None or self._has_intervals:
            self._plan(step)

    def _plan(self, step: int) -> list[Turn]:
        """Divides the engines that run in a step into turns, and has the last of each turn carry the flag."""
        trained = [(name, engine) for name, engine in self.items() if engine.optimizer is not None]
        due = [(name, engine) for name, engine in self.items() if engine.is_due(step)]
        due_trained = [(name, engine) for name, engine in due if engine.optimizer is not None]
        self._has_intervals = any(engine.every > 1 for _, engine in trained)
        self._turns = [due]
        if self.alternates and len(due_trained) > 1:
            first = [(name, engine) for name, engine in due if engine.optimizer is None or engine is due_trained[0][1]]
            self._turns = [first, *([pair] for pair in due_trained[1:])]
        if self._has_intervals or len(self._turns) > 1:
            for _, engine in trained:
                engine.strategy.carries_flag = False
            for turn in self._turns:
                trained_in_turn = [engine for _, engine in turn if engine.optimizer is not None]
                if trained_in_turn:
                    trained_in_turn[-1].strategy.carries_flag = True
        return self._turns

    def micro_step(self, batch: Any, weight: float = 1.0) -> None:
        """Runs one micro-step of the engines of the first turn; those of later turns run it in `step`.

        `weight` is relative to a mean of 1 over the ranks.
        """
        if self.device.type != "cpu":
            batch = move(batch, self.device)
        turns = self._turns or self._plan(0)
        if len(turns) > 1:
            self._micro_steps.append((batch, weight, self._last_seeds))
        for _, engine in turns[0]:  # here, not by `_run`: few frames are above a user's module
            if engine.other_modules is None:
                engine.micro_step(batch, weight)
            else:
                with engine.other_modules:
                    engine.micro_step(batch, weight)

    def _run(self, turn: Turn, batch: Any, weight: float) -> None:
        for _, engine in turn:
            if engine.other_modules is None:
                engine.micro_step(batch, weight)
            else:
                with engine.other_modules:
                    engine.micro_step(batch, weight)

    def step(self, poll_faults: Callable[[], Mapping[str, str]] = dict) -> dict[str, str]:
        """Ends the step of every engine; first runs the later turns, each after the updates of the one before.

        Returns the faults (values that are not finite) by engine. If an engine at fault stops the run, none is updated,
        and the caller discards the step. If it skips such steps, it has skipped this one, and the other engines are
        updated.

        Args:
            poll_faults: called in each turn, after all exchanges and before any update; returns the faults of other
                ranks.
        Raises:
            TrainingStopped: an engine of a later turn stops the run at its fault: earlier updates can't be undone.
        """
        turns = self._turns or self._plan(0)
        faults = self._update(turns[0], poll_faults)
        if len(turns) > 1 and self.is_updating:
            for number, turn in enumerate(turns[1:], 1):
                for batch, weight, seeds in self._micro_steps:
                    if seeds is not None:
                        seed, shared_seeds = seeds
                        self.seed(derive_seed(seed, number), shared_seeds and (*shared_seeds, number))
                    self._run(turn, batch, weight)
                later_faults = self._update(turn, poll_faults)
                if later_faults and self.is_stopped_by(later_faults):
                    raise TrainingStopped("; ".join(f"{name}: {fault}" for name, fault in later_faults.items()))
                faults |= later_faults
            self._micro_steps.clear()
        self.is_updating = False
        return faults

    def _update(self, turn: Turn, poll_faults: Callable[[], Mapping[str, str]]) -> dict[str, str]:
        """Updates the engines of a turn and returns their faults; updates none if one of them stops the run."""
        faults: dict[str, str] = {}
        for name, engine in turn:
            fault = engine.prepare()
            if fault is not None:
                faults[name] = fault
        faults |= poll_faults()
        if faults and self.is_stopped_by(faults):
            return faults
        self.is_updating = True
        if self._is_distributed and self._shared_seeds is not None:
            # An optimizer that draws random numbers must draw the same ones on every rank.
            seed_all(derive_seed(derive_seed(*self._shared_seeds)), self.device)
        for name, engine in turn:
            if name in faults:
                engine.skip()
            else:
                engine.update()
        return faults

    def is_stopped_by(self, faults: Mapping[str, str]) -> bool:
        """Returns whether one of the engines at fault has `on_nonfinite=stop`."""
        at_fault = (self[name] for name, fault in faults.items() if name in self and fault != EMPTY)
        return any(engine.on_nonfinite == "stop" for engine in at_fault)

    @property
    def can_shadow(self) -> bool:
        """True if this rank can join the all-reduces of a step that it can't complete."""
        return all(engine.can_shadow for _, engine in self._first_turn)

    @property
    def _first_turn(self) -> Turn:
        """The engines of the only turn that can be discarded: a later one follows an update."""
        return (self._turns or self._plan(0))[0]

    def shadow_step(self) -> None:
        """Joins the pending all-reduces of the step with zero gradients and the flag set."""
        for _, engine in self._first_turn:
            engine.shadow_step()

    def discard(self) -> None:
        """Restores every engine to its state before the step's first micro-step."""
        self._micro_steps.clear()
        for engine in self.values():
            engine.discard()

    def find_late_faults(self, is_alone: bool = False) -> dict[str, str]:
        """Returns earlier steps' faults of engines that defer the finite check.

        Args:
            is_alone: returns those of this rank, without a collective.
        """
        if not self._defers_finite_check:
            return {}
        local_faults = {name: fault for name, engine in self.items() if (fault := engine.find_late_fault())}
        by_rank = [local_faults] if is_alone else all_gather_object(local_faults)
        return {name: fault for faults in reversed(by_rank) for name, fault in faults.items()}  # of the lowest rank

    def take_metrics(self) -> dict[str, float]:
        """Returns every engine's metrics since the last call."""
        metrics: dict[str, float] = {}
        for name, engine in self.items():
            numbers = engine.take_metrics()
            metrics = metrics | self.prefixed(name, numbers) if len(self) > 1 else numbers
        return metrics

    def share_metrics(self) -> None:
        """Averages the metrics since they were last taken over the ranks."""
        for engine in self.values():
            engine.share_metrics()

    def sync_buffers(self) -> None:
        """Broadcasts the buffers of rank zero."""
        for engine in self.values():
            engine.strategy.sync_buffers(engine.module)

    @property
    def is_sharded(self) -> bool:
        """True if each rank holds only a part of some weights."""
        return any(engine.strategy.is_sharded for engine in self.values())

    def evaluate(
        self,
        batches: Iterable[tuple[int, Any, int]],
        is_cut: Callable[[], bool] = bool,
        seed: int = 0,
        together: Callable[[Callable[[], Any]], list[Any]] = run_on_all_ranks,
    ) -> dict[str, Any]:
        """Returns the means of loss and the forward's other numbers, and the results of the metrics.

        Without a batch it returns nothing. Each batch is weighted by its terms or samples. Each rank evaluates its own
        batches. The result has the same bits as that of one process if the forwards do.

        Args:
            batches: (batch number among all, batch, number of its samples); with 0 samples it is not counted.
            is_cut: called before each batch; True ends the evaluation.
            seed: random numbers of a forward depend on this seed and the batch number alone.
            together: calls a function on every rank and returns all results.
        Raises:
            InterruptedError: `is_cut` returned True on some rank.
        """
        return evaluate(self, batches, is_cut, seed, together)

    def report(self, function: Callable[[nn.Module, Any], Mapping[str, Any]], dataset: Any) -> dict[str, Any]:
        """Returns the items of `function(module, dataset)` for each module that is evaluated.

        Modules are in evaluation mode.
        """
        items: dict[str, Any] = {}
        for name, engine in self.items():
            if not engine.has_own_loss:
                continue
            with engine.evaluating(), engine.strategy.unsharded():
                items |= self.prefixed(name, function(engine.module, dataset))
        return items

    def observe(self, numbers: Mapping[str, float]) -> None:
        """Steps the schedulers that depend on a metric, with rank zero's metrics.

        Raises:
            ValueError: the evaluation has no such metric.
        """
        if any(engine.schedule.metric is not None for engine in self.values()):
            numbers_of_rank_zero = all_gather_object(dict(numbers))[0]
            for engine in self.values():
                engine.schedule.observe(numbers_of_rank_zero)

    def set_lr(self, lr: float) -> None:
        """Sets every engine's base learning rate."""
        for engine in self.values():
            if engine.optimizer is not None:
                engine.set_lr(lr)

    def state_dict(self) -> dict[str, Any]:
        """Returns `<name>` (weights) and `<name>.optimizer` (the rest) of each engine."""
        state: dict[str, Any] = {}
        for name, engine in self.items():
            state[name] = engine.module.state_dict()
            state[f"{name}.optimizer"] = engine.state_dict()
        return state

    def load_state_dict(self, state: Mapping[str, Any], allows_changes: bool = False) -> list[str]:
        """Loads a saved state; returns a note for each part that starts anew.

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
            except _LOAD_ERRORS as error:
                raise ValueError(
                    f"engine {name}: its saved weights do not fit: "
                    f"{_describe_mismatch(engine.module, state[name]) or error}; resume with the model as it was"
                ) from error
            try:
                engine_notes = engine.load_state_dict(state[f"{name}.optimizer"], allows_changes, list(state[name]))
            except _LOAD_ERRORS as error:
                raise ValueError(
                    f"engine {name}: the saved state of its optimizer does not fit: {describe(error)}"
                ) from error
            notes += [f"{name}.{note}" for note in engine_notes]
        return notes

    def export_states(self) -> dict[str, dict[str, Tensor]]:
        """Returns each engine's full weights as evaluation uses them.

        They are averaged by the EMA, if there is one.
        """
        states = {}
        self.sync_buffers()
        for name, engine in self.items():
            with engine.evaluating():
                # In one call, with the parameters themselves: tied weights stay tied.
                full = engine.strategy.to_full(dict(engine.module.state_dict(keep_vars=True)))
                detached = copy.deepcopy(map_tensors(full, Tensor.detach))
                states[name] = engine.applied.exported(detached)
        return states

    def prefixed(self, name: str, items: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the items under their names in the metrics of the run."""
        return {f"{name}/{key}": value for key, value in items.items()} if len(self) > 1 else dict(items)


def _describe_mismatch(module: nn.Module, saved: Mapping[str, Any]) -> str | None:
    module_shapes = {name: _shape_of(value) for name, value in module.state_dict().items()}
    saved_shapes = {name: _shape_of(value) for name, value in saved.items()}
    expected = [f"{name}{shape}" for name, shape in module_shapes.items() if saved_shapes.get(name) != shape]
    found = [f"{name}{shape}" for name, shape in saved_shapes.items() if module_shapes.get(name) != shape]
    if not expected and not found:
        return None
    return f"expected {', '.join(expected) or 'no others'}, found {', '.join(found) or 'none of them'}"


def _shape_of(value: Any) -> str:
    return str([*value.shape]) if isinstance(value, Tensor) else ""
