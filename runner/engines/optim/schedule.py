"""An engine's learning-rate schedule: stepped, changed live, and replayed by a resume with other settings.

Must not import a config.
"""

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
    describe,
    has_unseen_settings,
    pick,
    set_base_lr,
    set_base_lrs,
    walk,
)
from runner.utils.utils import one_line

_OWNED = {"lr", "initial_lr", "max_lr", "min_lr", "swa_lr", "max_momentum", "base_momentum"}  # keys of a group
_CYCLED = {"momentum", "betas"}  # with cycle_momentum
_Group = dict[str, Any]
_NUM_LOOKS = 64
_MOST_SIMULATED = 100_000  # steps, of some 5 us


class LRSchedule:
    """Steps a scheduler, and records what a resume with other settings needs to replay it.

    The rates follow from the scheduler's settings, the number of steps, and events: base rates that were set live, and
    metrics. Most of torch's schedulers compute a rate from the one before, so the rates of other settings are those
    that a new scheduler has after the same steps and events, to the bit.

    Args:
        metric: the number of an evaluation that the scheduler steps with, in place of each update.
    """

    def __init__(self, optimizer: Optimizer | None, scheduler: LRScheduler | None, metric: str | None = None) -> None:
        self._optimizer, self._scheduler, self.metric = optimizer, scheduler, metric
        self._is_stepped = scheduler is not None and metric is None
        self._has_own_state = scheduler is not None and not all(map(_has_torchs_state, walk(scheduler)))
        self._count = 0
        self._events: list[dict[str, Any]] = []
        for group in self._groups if scheduler is not None else ():  # ReduceLROnPlateau sets no base rate itself
            group.setdefault("initial_lr", _copy(group["lr"]))

    @property
    def _groups(self) -> list[_Group]:
        return [] if self._optimizer is None else self._optimizer.param_groups

    def step(self) -> None:
        """Moves the rates on after an update."""
        self._count += 1
        if self._is_stepped:
            assert self._scheduler is not None
            self._scheduler.step()

    def observe(self, numbers: Mapping[str, float]) -> None:
        """Steps a scheduler that needs a metric with that of an evaluation; a second one at a step is ignored.

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
        """Makes `lr` the base rate of the first group, scaling the others alike; the schedule goes on from it."""
        assert self._optimizer is not None
        set_base_lrs(self._optimizer, self._scheduler, lr)
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
        """Takes back what `state_dict` gave; the scheduler has taken back its own state."""
        self._count, self._events = state["count"], [dict(event) for event in state["events"]]

    def is_replayed(self, now: Mapping[str, Any], before: Mapping[str, Any]) -> bool:
        """Says whether a resume replays the schedule: its settings differ, or hold functions that may.

        Raises:
            ValueError: they differ, and the scheduler keeps a state of its own, which can't be replayed.
        """
        if self._scheduler is None:
            return bool(now["base_lrs"] != before["base_lrs"])
        if not self._has_own_state:
            is_changed = any(now[part] != before[part] for part in ("base_lrs", "groups", "scheduler"))
            return is_changed or has_unseen_settings(self._scheduler)
        if now["scheduler"] != before["scheduler"]:
            kind = type(self._scheduler).__name__
            changes = _tell_changes(before["scheduler"]["own"], now["scheduler"]["own"]) or "its parts"
            remedy = "leave them as they were, or choose another schedule"
            raise ValueError(
                f"scheduler: {kind} keeps a state of its own, and its settings changed: {changes}; {remedy}"
            )
        return False

    def replay(self, state: Mapping[str, Any]) -> list[_Group]:
        """Repeats the steps and events of a saved schedule with a scheduler just built.

        Returns:
            What the schedule then owns of each group; see `restore`.
        Raises:
            ValueError: the scheduler refuses so many steps.
        """
        before = [describe(group, set()) for group in self._groups]
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # of a step before the optimizer's
                for event in state["events"]:
                    self._advance(event["count"])
                    self._apply(event)
                self._advance(state["count"])
        except Exception as error:
            kind, count = type(self._scheduler).__name__, state["count"]
            found = f"{kind} can't go on after step {count} with these settings: {error}"
            raise ValueError(f"scheduler: {found}; choose others") from error
        return [self._owned_of(group, old) for group, old in zip(self._groups, before, strict=True)]

    def _advance(self, count: int) -> None:
        scheduler, num_steps = self._scheduler, count - self._count
        if num_steps > 1 and type(scheduler) is LambdaLR:  # its rates are functions of the step alone
            scheduler.last_epoch += num_steps - 1
            scheduler._step_count += num_steps - 1
            self._count += num_steps - 1
        while self._count < count:
            self.step()

    def _owned_of(self, group: _Group, before: _Group) -> _Group:
        is_cycled = any(getattr(each, "cycle_momentum", False) for each in walk(self._scheduler))
        moved = {key for key, value in describe(group, set()).items() if before.get(key) != value}
        owned = _OWNED | moved | (_CYCLED if is_cycled else set())
        return {key: _copy(value) for key, value in group.items() if key in owned}

    def restore(self, owned: Sequence[_Group]) -> None:
        """Sets what a replayed schedule owns of each group, after the optimizer has taken back its state."""
        for group, values in zip(self._groups, owned, strict=True):
            for key in group.keys() & (_OWNED - values.keys()):  # of another schedule
                del group[key]
            group.update(values)

    def take_base_lrs(self, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
        """Sets base rates that the config has changed, under a schedule that is not replayed."""
        changed = [new if new != old else None for new, old in zip(now["base_lrs"], before["base_lrs"], strict=True)]
        if any(lr is not None for lr in changed):
            self._apply({"count": self._count, "base_lrs": changed})


def check_optimizer_step(optimizer: Any) -> None:
    """Checks that an optimizer's step needs no argument.

    Raises:
        ValueError: naming what it needs.
    """
    for each in getattr(optimizer, "optimizers", None) or [optimizer]:
        if needed := _needed_by(each):
            found = f"{type(each).__name__}.step needs {', '.join(needed)}, which computes a step's loss again"
            raise ValueError(f"{found}; expected a step without arguments: choose another optimizer")


def check_scheduler_step(scheduler: Any, metric: str | None) -> None:
    """Checks that a scheduler's step needs no argument, or a metric that is named.

    Raises:
        ValueError: naming what it needs, and the key that gives it.
    """
    needed, kind = _needed_by(scheduler), type(scheduler).__name__
    if len(needed) == 1 and metric is None:
        raise ValueError(
            f"{kind}.step needs {needed[0]}: name a number of the evaluations, +scheduler.metric=eval/loss"
        )
    for each in walk(scheduler):
        if unmet := _needed_by(each)[1 if each is scheduler and metric is not None else 0 :]:
            found = f"{type(each).__name__}.step needs {', '.join(unmet)}"
            raise ValueError(f"{found}; expected a step without arguments, or with a metric: choose another schedule")
    if metric is not None and not needed:
        kind = "a constant rate" if scheduler is None else kind
        raise ValueError(f"expected no metric, found metric={metric}, which {kind} doesn't take; leave it out")


def _needed_by(part: Any) -> list[str]:
    """Returns the arguments without which a part can't be stepped."""
    if isinstance(part, torch.optim.LBFGS):  # a subclass may give it a default, which fails in the first step
        return ["closure"]
    try:
        parameters = list(inspect.signature(type(part).step).parameters.values())[1:]
    except (AttributeError, TypeError, ValueError):  # no step, or a built-in one
        return []
    kinds = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    return [each.name for each in parameters if each.default is inspect.Parameter.empty and each.kind not in kinds]


def find_fall(scheduler: Any, num_steps: int) -> int | None:
    """Returns a step by which a rate has fallen within a run, or None as far as is known before the run.

    Rates that are functions of the step are computed at some of the steps. Any other scheduler makes the first 100,000
    steps on an optimizer without weights. A metric that it needs never improves.
    """
    if type(scheduler) is LambdaLR:
        steps = [max(num_steps - 1, 0) * number // _NUM_LOOKS for number in range(_NUM_LOOKS + 1)]
        rates = ([function(step) for function in scheduler.lr_lambdas] for step in steps)
        return _first_fall(zip(steps, rates, strict=True))
    if scheduler is None:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of a step before the optimizer's
            return _first_fall(_simulate(scheduler, min(num_steps, _MOST_SIMULATED)))
    except Exception:  # of another's own methods: it can't be copied, or needs more than rates
        return None


def _simulate(scheduler: Any, num_steps: int) -> Iterator[tuple[int, list[float]]]:
    """Yields each step and its rates, of a copy of a scheduler over an optimizer without weights."""
    optimizer = scheduler.optimizer
    memo: dict[int, Any] = {id(p): nn.Parameter(torch.empty(0)) for g in optimizer.param_groups for p in g["params"]}
    simulated = torch.optim.SGD([{"params": [nn.Parameter(torch.empty(0))]} for _ in optimizer.param_groups])
    simulated.defaults = dict(optimizer.defaults)
    for own, group in zip(simulated.param_groups, optimizer.param_groups, strict=True):
        own.update({key: _copy(value) for key, value in group.items() if key != "params"})
    memo[id(optimizer)] = simulated
    copied = copy.deepcopy(scheduler, memo)
    metric = [0.0] * len(_needed_by(scheduler))
    for step in range(num_steps):
        yield step, [float(group["lr"]) for group in simulated.param_groups]
        copied.step(*metric)


def _first_fall(rates: Iterable[tuple[int, list[float]]]) -> int | None:
    """Returns the first step where a rate lies below one before by more than rounding."""
    highest: list[float] = []
    for step, values in rates:
        if any(value < before * (1 - 1e-6) for value, before in zip(values, highest, strict=False)):
            return step
        highest = list(map(max, values, highest or values))
    return None


def reorder_events(
    state: Mapping[str, Any], order: Sequence[int | None], now: Mapping[str, Any], before: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns a saved schedule with its rates in the present order of the groups.

    A rate that was set live counts no more where the config has changed the base rate since.

    Args:
        now: the settings as configured.
        before: those of the saved state, in the present order.
    """
    is_kept = [new == old for new, old in zip(now["base_lrs"], before["base_lrs"], strict=True)]
    events = []
    for event in state["events"]:
        if "base_lrs" in event:
            lrs = pick(event["base_lrs"], order, [None] * len(order))
            event = {**event, "base_lrs": [lr if kept else None for lr, kept in zip(lrs, is_kept, strict=True)]}
        events.append(event)
    return {**state, "events": events}


def recall(state: Mapping[str, Any], groups: Sequence[_Group]) -> dict[str, Any]:
    """Returns the steps and events of an engine's saved state, of which an older one says less.

    Args:
        groups: of the saved optimizer.
    """
    if "schedule" in state:
        return dict(state["schedule"])
    count = (state["scheduler"] or {}).get("last_epoch", state["counters"]["steps"])
    base = [float(group["initial_lr"] if "initial_lr" in group else group["lr"]) for group in groups]
    is_live = base != state["configured"]["base_lrs"]
    return {"count": count, "events": [{"count": count, "base_lrs": base}] if is_live else []}


def _has_torchs_state(scheduler: Any) -> bool:
    """Says whether a scheduler's state is all of its attributes, as torch keeps it."""
    load = getattr(type(scheduler), "load_state_dict", None)
    return getattr(load, "__module__", "").startswith("torch.")


def _tell_changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    keys = [key for key in now if before.get(key) != now[key]]
    return ", ".join(f"{key} {before.get(key)} -> {now[key]}" for key in keys)


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value
