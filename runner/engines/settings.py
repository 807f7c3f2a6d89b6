"""The settings of an optimizer and its scheduler: as configured, as changed live, and as a resume finds them.

Must not import a config.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from torch import Tensor
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR, LRScheduler

_KINDS = ("optimizer", "scheduler")
_RATES = {"lr", "initial_lr"}  # they move with the schedule: the base rates are compared instead
_POSITIONS = {"_step_count", "last_epoch", "_last_lr", "base_lrs", "_get_lr_called_within_step", "_is_initial"}


def base_lrs(optimizer: Optimizer | None) -> list[float]:
    """Returns the rate of each group before its schedule's factor."""
    return [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups] if optimizer else []


def lrs(optimizer: Optimizer | None) -> list[float]:
    """Returns the rate of each group as it stands."""
    return [float(group["lr"]) for group in optimizer.param_groups] if optimizer else []


def set_base_lr(optimizer: Optimizer, scheduler: LRScheduler | None, index: int, lr: float) -> None:
    """Makes `lr` the base rate of a group; its schedule goes on from there."""
    group = optimizer.param_groups[index]
    base = float(group.get("initial_lr", group["lr"]))
    ratio = lr / base if base else 1.0
    group["lr"] = lr if group["lr"] == base else group["lr"] * ratio
    for key in group.keys() & {"max_lr", "min_lr"}:  # of torch's cyclic schedules
        group[key] *= ratio
    if scheduler is None:
        return
    group["initial_lr"] = lr
    for each in [scheduler, *getattr(scheduler, "_schedulers", ())]:  # one of several has no rates of its own
        if hasattr(each, "base_lrs"):
            each.base_lrs[index] = lr


def check_held(optimizer: Optimizer | None, named: Iterable[tuple[str, Tensor]]) -> None:
    """Checks that an optimizer holds every parameter that is to be trained: another would stay as it is, silently.

    Raises:
        ValueError: naming those that it does not hold.
    """
    if optimizer is None:
        return
    held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if left := [name for name, parameter in named if id(parameter) not in held]:
        remedy = "freeze them (optimizations.freeze), or give them to it"
        raise ValueError(f"it lacks parameters that are trained: {', '.join(left)}; {remedy}")


def set_base_lrs(optimizer: Optimizer, scheduler: LRScheduler | None, lr: float) -> None:
    """Makes `lr` the base rate of the first group, scaling the others alike."""
    bases = base_lrs(optimizer)
    for index, base in enumerate(bases):
        set_base_lr(optimizer, scheduler, index, lr if base == bases[0] else lr * base / bases[0])


def configured(optimizer: Optimizer | None, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Returns the settings of an optimizer and scheduler just built, as plain values."""
    groups = [_plain(group, _RATES | {"params"}) for group in optimizer.param_groups] if optimizer else []
    kinds = dict(zip(_KINDS, (_kind(optimizer), _kind(scheduler)), strict=True))
    schedule = _configured_schedule(scheduler) if scheduler else {}
    return {"kinds": kinds, "base_lrs": base_lrs(optimizer), "groups": groups, "scheduler": schedule}


def _configured_schedule(scheduler: Any) -> dict[str, Any]:
    """Returns the plain settings of a schedule, and those of the schedules that it is made of."""
    parts = [_configured_schedule(each) for each in getattr(scheduler, "_schedulers", ())]
    return {"own": _plain(vars(scheduler), _POSITIONS), "parts": parts}


def _kind(part: Any) -> str | None:
    return None if part is None else type(part).__name__


def find_changed_kinds(parts: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Returns which of an engine's parts are of another kind than in a saved state, and how."""
    notes = []
    for name, part in parts.items():
        was = state["configured"]["kinds"].get(name, None if state.get(name) is None else "one")
        now = _kind(part) if name in _KINDS else None if part is None else "one"
        if now != was:
            notes.append(f"{name}: this engine has {now or 'none'}, the saved state {was or 'none'}")
    return notes


def load_parts(
    parts: Mapping[str, Any],
    state: Mapping[str, Any],
    now: Mapping[str, Any],
    fit: Callable[[str, Any], Any],
    allows_changes: bool,
) -> list[str]:
    """Has an engine's parts take back their states, and what the config says otherwise by now take effect.

    Args:
        now: the settings as configured.
        fit: called with a part's name and its whole state; returns the state as this rank holds it.
    Returns:
        Which parts begin anew, as the state has none of their kind.
    Raises:
        ValueError: there is such a part, and changes are not allowed.
    """
    notes = find_changed_kinds(parts, state)
    if notes and not allows_changes:
        raise ValueError(f"{notes[0]}; resume with the same config, or allow changes: it then begins anew")
    changed = {note.partition(":")[0] for note in notes}
    for name, part in parts.items():
        if part is not None and name not in changed:
            part.load_state_dict(fit(name, state[name]))
    if parts["optimizer"] is not None and not changed & set(_KINDS):
        apply_changes(parts["optimizer"], parts["scheduler"], now, state["configured"])
    return [f"{note}: it begins anew" for note in notes]


def apply_changes(
    optimizer: Optimizer, scheduler: LRScheduler | None, now: Mapping[str, Any], before: Mapping[str, Any]
) -> None:
    """Sets, in an optimizer and scheduler just restored, what the config says otherwise than when they were saved."""
    for index, (new, old) in enumerate(zip(now["base_lrs"], before["base_lrs"], strict=True)):
        if new != old:
            set_base_lr(optimizer, scheduler, index, new)
    for group, new, old in zip(optimizer.param_groups, now["groups"], before["groups"], strict=True):
        group.update({key: value for key, value in new.items() if key not in old or old[key] != value})
    if scheduler is None:
        return
    _apply_schedule(scheduler, now["scheduler"], before["scheduler"])
    if isinstance(scheduler, LambdaLR):  # what its functions hold does not show in its state
        _recompute(optimizer, scheduler)


def _apply_schedule(scheduler: Any, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    old = before["own"]
    vars(scheduler).update({key: value for key, value in now["own"].items() if key not in old or old[key] != value})
    for each, new, was in zip(getattr(scheduler, "_schedulers", ()), now["parts"], before["parts"], strict=False):
        _apply_schedule(each, new, was)


def _recompute(optimizer: Optimizer, scheduler: LambdaLR) -> None:
    for group, base, function in zip(optimizer.param_groups, scheduler.base_lrs, scheduler.lr_lambdas, strict=True):
        lr = base * function(scheduler.last_epoch)
        if not math.isclose(group["lr"], lr, rel_tol=1e-9):  # nearer is a live change's own rounding
            group["lr"] = lr


def _plain(values: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    return {str(key): value for key, value in values.items() if key not in left_out and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(each) for each in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    return value is None or type(value) in (bool, int, float, str)
