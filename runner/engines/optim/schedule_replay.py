"""Steps the scheduler of an engine, and replays its schedule on resume if its settings changed."""

from __future__ import annotations

import copy
import inspect
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

from runner.engines.optim.hyperparameters import (
    base_lrs,
    has_unseen_settings,
    plain_values,
    reorder,
    set_base_lr,
    walk_schedulers,
)
from runner.engines.optim.optimizer_state import chained_optimizers
from runner.utils.utils import one_line

# Keys of an optimizer group that schedulers set; the second ones only with cycle_momentum.
_SCHEDULED_KEYS = {"lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"}
_CYCLED_KEYS = {"momentum", "betas"}
_Group = dict[str, Any]
_NUM_PROBES = 64
_MAX_SIMULATED = 100_000  # steps; each takes about 5 us


class LRSchedule:
    """Steps a scheduler, and records events to replay it with changed settings.

    Learning rates depend on the scheduler's settings, the number of steps, and events: base rates set by a command, and
    metrics. Most of torch's schedulers compute a rate from the previous one. So after a change of settings, the rates
    are those of a new scheduler after the same steps and events, bit for bit.

    Args:
        metric: name of the evaluation metric that the scheduler is stepped with; None steps it after each update.
    """

    def __init__(self, optimizer: Optimizer | None, scheduler: LRScheduler | None, metric: str | None = None) -> None:
        self._optimizer, self._scheduler, self.metric = optimizer, scheduler, metric
        self._scheduler_per_step = scheduler if metric is None else None
        self._count = 0
        self._events: list[dict[str, Any]] = []
        for group in self._groups if scheduler is not None else ():  # ReduceLROnPlateau sets no base rate itself
            group.setdefault("initial_lr", _copy(group["lr"]))

    @property
    def _groups(self) -> list[_Group]:
        return [] if self._optimizer is None else self._optimizer.param_groups

    def step(self) -> None:
        """Steps the scheduler after an update."""
        self._count += 1
        if self._scheduler_per_step is not None:
            self._scheduler_per_step.step()

    def observe(self, numbers: Mapping[str, float]) -> None:
        """Steps a scheduler that depends on a metric.

        A second evaluation at the same step is ignored.

        Raises:
            ValueError: the evaluation has no such metric.
        """
        if self.metric is None or self._scheduler is None:
            return
        if self.metric not in numbers:
            raise ValueError(f"scheduler.metric={one_line(self.metric)}: expected one of {', '.join(sorted(numbers))}")
        if not any(event["count"] == self._count and "metric" in event for event in self._events):
            self._apply({"count": self._count, "metric": float(numbers[self.metric])})

    def set_lr(self, lr: float) -> None:
        """Sets the base rate of the first group and scales the other groups.

        The schedule continues.
        """
        assert self._optimizer is not None
        bases = base_lrs(self._optimizer)
        for index, base in enumerate(bases):
            set_base_lr(self._optimizer, self._scheduler, index, lr if base == bases[0] else lr * base / bases[0])
        self._events.append({"count": self._count, "base_lrs": base_lrs(self._optimizer)})

    def _apply(self, event: Mapping[str, Any]) -> None:
        scheduler: Any = self._scheduler
        if "metric" in event:
            scheduler.step(event["metric"])
        for index, lr in enumerate(event.get("base_lrs", ())):
            if lr is not None:
                assert self._optimizer is not None
                set_base_lr(self._optimizer, scheduler, index, lr)
        self._events.append(dict(event))

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of steps and the events."""
        return {"count": self._count, "events": [dict(event) for event in self._events]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a saved state; the scheduler has loaded its own state already."""
        self._count, self._events = state["count"], [dict(event) for event in state["events"]]

    def needs_replay(self, configured: Mapping[str, Any], saved: Mapping[str, Any]) -> bool:
        """Returns whether a resume replays the schedule.

        True if its settings changed, or if it has functions that may have changed.

        Raises:
            ValueError: the settings changed, and the scheduler has a state of its own, which can't be replayed.
        """
        if self._scheduler is None:
            return bool(configured["base_lrs"] != saved["base_lrs"])
        if all(map(_has_torch_state, walk_schedulers(self._scheduler))):
            is_changed = any(configured[key] != saved[key] for key in ("base_lrs", "groups", "scheduler"))
            return is_changed or has_unseen_settings(self._scheduler)
        if configured["scheduler"] != saved["scheduler"]:
            before, now = saved["scheduler"]["own"], configured["scheduler"]["own"]
            changes = [f"{key} {before.get(key)} -> {now[key]}" for key in now if before.get(key) != now[key]]
            raise ValueError(
                f"scheduler: {type(self._scheduler).__name__} keeps a state of its own, and its settings changed: "
                f"{', '.join(changes) or 'its parts'}; leave them as they were, or choose another schedule"
            )
        return False

    def replay(self, state: Mapping[str, Any]) -> list[_Group]:
        """Repeats the steps and events of a saved schedule with a scheduler just built.

        Returns:
            For each group the values that the scheduler has set, for `restore_values`.
        Raises:
            ValueError: the scheduler refuses that number of steps.
        """
        before = [plain_values(group, set()) for group in self._groups]
        try:
            # Torch warns of scheduler steps before the optimizer's first.
            with warnings.catch_warnings(action="ignore"):
                for event in state["events"]:
                    self._advance(event["count"])
                    self._apply(event)
                self._advance(state["count"])
        except Exception as error:
            raise ValueError(
                f"scheduler: {type(self._scheduler).__name__} can't go on after step {state['count']} "
                f"with these settings: {error}; choose others"
            ) from error
        return [self._scheduled_values(group, old) for group, old in zip(self._groups, before, strict=True)]

    def _advance(self, count: int) -> None:
        scheduler, num_steps = self._scheduler, count - self._count
        # The rates of a LambdaLR are functions of the step alone: all steps but the last can be skipped.
        if num_steps > 1 and type(scheduler) is LambdaLR:
            scheduler.last_epoch += num_steps - 1
            scheduler._step_count += num_steps - 1
            self._count += num_steps - 1
        while self._count < count:
            self.step()

    def _scheduled_values(self, group: _Group, before: _Group) -> _Group:
        """Returns values that the scheduler sets, or that have changed since `before`."""
        is_cycled = any(getattr(part, "cycle_momentum", False) for part in walk_schedulers(self._scheduler))
        changed_keys = {key for key, value in plain_values(group, set()).items() if before.get(key) != value}
        keys = _SCHEDULED_KEYS | changed_keys | (_CYCLED_KEYS if is_cycled else set())
        return {key: _copy(value) for key, value in group.items() if key in keys}

    def restore_values(self, scheduled_values: Sequence[_Group]) -> None:
        """Sets the values that `replay` returned; the optimizer's state is loaded already."""
        for group, values in zip(self._groups, scheduled_values, strict=True):
            for key in group.keys() & (_SCHEDULED_KEYS - values.keys()):  # left by another scheduler
                del group[key]
            group.update(values)

    def apply_base_lrs(self, configured: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
        """Sets base rates that the config has changed, if the schedule is not replayed."""
        if configured["base_lrs"] != saved["base_lrs"]:
            pairs = zip(configured["base_lrs"], saved["base_lrs"], strict=True)
            changed = [new if new != old else None for new, old in pairs]
            self._apply({"count": self._count, "base_lrs": changed})


def check_optimizer_step(optimizer: Any) -> None:
    """Checks that an optimizer's step needs no argument.

    Raises:
        ValueError: naming the argument.
    """
    for part in chained_optimizers(optimizer):
        if needed := _required_arguments(part):
            raise ValueError(
                f"{type(part).__name__}.step needs {', '.join(needed)}, which computes a step's loss again; "
                "expected a step without arguments: choose another optimizer"
            )


def check_scheduler_step(scheduler: Any, metric: str | None) -> None:
    """Checks that a scheduler's step requires no argument but a configured metric.

    Raises:
        ValueError: naming the argument, and the key that sets the metric.
    """
    needed, kind = _required_arguments(scheduler), type(scheduler).__name__
    if len(needed) == 1 and metric is None:
        raise ValueError(
            f"{kind}.step needs {needed[0]}: name a number of the evaluations, +scheduler.metric=eval/loss"
        )
    for part in walk_schedulers(scheduler):
        num_given = 1 if part is scheduler and metric is not None else 0
        if missing := _required_arguments(part)[num_given:]:
            raise ValueError(
                f"{type(part).__name__}.step needs {', '.join(missing)}; "
                "expected a step without arguments, or with a metric: choose another schedule"
            )
    if metric is not None and not needed:
        kind = "a constant rate" if scheduler is None else kind
        raise ValueError(f"expected no metric, found metric={metric}, which {kind} doesn't take; leave it out")


def _required_arguments(part: Any) -> list[str]:
    if isinstance(part, torch.optim.LBFGS):  # a subclass may give it a default, which fails in the first step
        return ["closure"]
    try:
        parameters = list(inspect.signature(type(part).step).parameters.values())[1:]
    except (AttributeError, TypeError, ValueError):  # no step, or a built-in one
        return []
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [p.name for p in parameters if p.default is inspect.Parameter.empty and p.kind not in variadic]


def find_lr_decrease(scheduler: Any, num_steps: int) -> int | None:
    """Returns a step by which a learning rate has decreased within a run.

    None if none does, as far as is known. Rates that are functions of the step are computed at some of the steps. Any
    other scheduler makes the first 100,000 steps on an optimizer without weights; a metric that it depends on never
    improves.
    """
    if type(scheduler) is LambdaLR:
        return _first_decrease(_probe(scheduler, num_steps))
    if scheduler is None:
        return None
    try:
        # Torch warns of scheduler steps before the optimizer's first.
        with warnings.catch_warnings(action="ignore"):
            return _first_decrease(_simulate(scheduler, min(num_steps, _MAX_SIMULATED)))
    except Exception:  # from a user's own scheduler: it can't be copied, or needs more than rates
        return None


def _probe(scheduler: LambdaLR, num_steps: int) -> Iterator[tuple[int, list[float]]]:
    """Yields some of the steps and their rates, which are functions of the step."""
    for number in range(_NUM_PROBES + 1):
        step = max(num_steps - 1, 0) * number // _NUM_PROBES
        yield step, [function(step) for function in scheduler.lr_lambdas]


def _simulate(scheduler: Any, num_steps: int) -> Iterator[tuple[int, list[float]]]:
    """Yields each step and its rates, of a copy of a scheduler without weights."""
    optimizer = scheduler.optimizer
    # `deepcopy` replaces the objects with these ids by their substitutes.
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.empty(0)) for g in optimizer.param_groups for p in g["params"]}
    simulated = torch.optim.SGD([{"params": [nn.Parameter(torch.empty(0))]} for _ in optimizer.param_groups])
    simulated.defaults = dict(optimizer.defaults)
    for simulated_group, group in zip(simulated.param_groups, optimizer.param_groups, strict=True):
        simulated_group.update({key: _copy(value) for key, value in group.items() if key != "params"})
    memo[id(optimizer)] = simulated
    copied = copy.deepcopy(scheduler, memo)
    arguments = [0.0] * len(_required_arguments(scheduler))
    for step in range(num_steps):
        yield step, [float(group["lr"]) for group in simulated.param_groups]
        copied.step(*arguments)


def _first_decrease(rates: Iterable[tuple[int, list[float]]]) -> int | None:
    """Returns the first step with a rate below an earlier rate of its group.

    Differences by rounding are ignored.
    """
    highest: list[float] = []
    for step, values in rates:
        if any(value < before * (1 - 1e-6) for value, before in zip(values, highest, strict=False)):
            return step
        highest = list(map(max, values, highest or values))
    return None


def reorder_events(
    state: Mapping[str, Any], order: Sequence[int | None], configured: Mapping[str, Any], saved: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a saved schedule with its rates in the order of the current groups.

    A rate that a command has set is dropped if the config has changed the base rate since.

    Args:
        order: for each current group the index of the saved group, or None.
        configured: the hyperparameters as configured now.
        saved: those of the saved state, in the current order.
    """
    rates = zip(order, configured["base_lrs"], saved["base_lrs"], strict=True)
    kept_order = [index if new == old else None for index, new, old in rates]
    events = []
    for event in state["events"]:
        if "base_lrs" in event:
            event = {**event, "base_lrs": reorder(event["base_lrs"], kept_order, [None] * len(order))}
        events.append(event)
    return {**state, "events": events}


def saved_history(state: Mapping[str, Any], groups: Sequence[_Group]) -> dict[str, Any]:
    """Returns the steps and events of an engine's saved state.

    Those of an older version are derived from its rates.

    Args:
        groups: those of the saved optimizer.
    """
    if "schedule" in state:
        return dict(state["schedule"])
    count = (state["scheduler"] or {}).get("last_epoch", state["counters"]["steps"])
    lrs = [float(group["initial_lr"] if "initial_lr" in group else group["lr"]) for group in groups]
    was_set_by_command = lrs != state["configured"]["base_lrs"]
    return {"count": count, "events": [{"count": count, "base_lrs": lrs}] if was_set_by_command else []}


def _has_torch_state(scheduler: Any) -> bool:
    """Returns whether a scheduler's state is all of its attributes, as in torch."""
    load = getattr(type(scheduler), "load_state_dict", None)
    return getattr(load, "__module__", "").startswith("torch.")


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
