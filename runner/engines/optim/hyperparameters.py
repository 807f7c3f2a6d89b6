"""The settings of an optimizer and its scheduler: as configured, as changed live, and as a resume finds them.

Must not import a config.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_TAKE_SPARSE = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam)  # of these libraries' optimizers
_LIBRARIES = ("torch", "runner", "bitsandbytes", "prodigyopt", "schedulefree")
_KINDS = ("optimizer", "scheduler")
_RATES = {"lr", "initial_lr"}  # they move with the schedule: the base rates are compared instead
_LEFT_OUT = _RATES | {"params", "param_names"}
_POSITIONS = {"_step_count", "last_epoch", "_last_lr", "base_lrs", "_get_lr_called_within_step", "_is_initial"}
_PARTS = {"optimizer", "_schedulers", "_scale_fn_ref"}  # the last follows from CyclicLR's mode


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
    put(group, "lr", lr if float(group["lr"]) == base else float(group["lr"]) * ratio)
    for key in group.keys() & {"max_lr", "min_lr"}:  # of torch's cyclic schedules
        group[key] *= ratio
    if scheduler is None:
        return
    put(group, "initial_lr", lr)
    for each in walk(scheduler):
        if hasattr(each, "base_lrs"):
            each.base_lrs[index] = lr
        if hasattr(each, "max_lrs"):
            each.max_lrs[index] *= ratio


def walk(scheduler: Any) -> Iterator[Any]:
    """Yields a scheduler and all those that it is made of."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from walk(part)


def put(group: dict[str, Any], key: str, value: Any) -> None:
    """Sets a value of a group; a rate that is a tensor is filled, as a compiled update reads that tensor."""
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def check_covers_parameters(optimizer: Optimizer | None, named: Iterable[tuple[str, Tensor]]) -> None:
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


def check_sparse(module: nn.Module, optimizer: Any, is_sharded: bool) -> None:
    """Checks that layers with sparse gradients, of which torch's optimizers take few, have one that takes them.

    Args:
        is_sharded: each rank holds a part of every weight.
    Raises:
        ValueError: naming the layers, and the optimizers that take sparse gradients.
    """
    layers = {name: each for name, each in module.named_modules() if getattr(each, "sparse", False) is True}
    weights = {id(p) for each in layers.values() for p in each.parameters(recurse=False) if p.requires_grad}
    for part in getattr(optimizer, "optimizers", None) or [optimizer]:
        own = {id(parameter) for group in part.param_groups for parameter in group["params"]}
        kind = type(part).__name__
        is_known = type(part).__module__.partition(".")[0] in _LIBRARIES
        takes_sparse, keys = isinstance(part, _TAKE_SPARSE), list[str]()
        for key in ("momentum", "weight_decay"):
            keys += [key] if takes_sparse and any(group.get(key) for group in part.param_groups) else []
        if own & weights and (is_sharded or (is_known and (keys or not takes_sparse))):
            found = f"{kind}{' under FSDP' if is_sharded else ' with ' + ' and '.join(keys) if keys else ''}"
            remedy = "set sparse=false there" + ("" if is_sharded else ", or choose SparseAdam, Adagrad or plain SGD")
            raise ValueError(f"{found} can't take the sparse gradients of {', '.join(layers)}; {remedy}")
        if isinstance(part, torch.optim.SparseAdam) and own - weights:
            raise ValueError(f"{kind} takes sparse gradients alone; give dense parameters to another optimizer")


def set_base_lrs(optimizer: Optimizer, scheduler: LRScheduler | None, lr: float) -> None:
    """Makes `lr` the base rate of the first group, scaling the others alike."""
    bases = base_lrs(optimizer)
    for index, base in enumerate(bases):
        set_base_lr(optimizer, scheduler, index, lr if base == bases[0] else lr * base / bases[0])


def snapshot_hyperparameters(optimizer: Optimizer | None, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Returns the settings of an optimizer and scheduler just built, as plain values."""
    groups = [describe(group, _LEFT_OUT) for group in optimizer.param_groups] if optimizer else []
    kinds = dict(zip(_KINDS, (_kind(optimizer), _kind(scheduler)), strict=True))
    schedule = _configured_schedule(scheduler) if scheduler else {}
    return {"kinds": kinds, "base_lrs": base_lrs(optimizer), "groups": groups, "scheduler": schedule}


def _configured_schedule(scheduler: Any) -> dict[str, Any]:
    """Returns the plain settings of a schedule, and those of the schedules that it is made of."""
    parts = [_configured_schedule(each) for each in getattr(scheduler, "_schedulers", ())]
    own = describe(vars(scheduler), _POSITIONS | _PARTS)
    counts = {key: sorted(value.items()) for key, value in vars(scheduler).items() if isinstance(value, Counter)}
    return {"own": own | counts, "parts": parts}


def has_unseen_settings(scheduler: Any) -> bool:
    """Says whether a schedule holds functions or other objects, which its configured settings do not tell."""
    for each in walk(scheduler):
        known = _configured_schedule(each)["own"].keys() | _POSITIONS | _PARTS
        if vars(each).keys() - known:
            return True
    return False


def reorder(before: Mapping[str, Any], order: Sequence[int | None], now: Mapping[str, Any]) -> dict[str, Any]:
    """Returns saved settings with the groups in the order of the present ones; None stands for a group not saved."""
    groups = [describe(group, _LEFT_OUT) for group in before["groups"]]
    return {
        **before,
        "base_lrs": pick(before["base_lrs"], order, now["base_lrs"]),
        "groups": pick(groups, order, now["groups"]),
    }


def pick(saved: Sequence[Any], order: Sequence[int | None], default: Sequence[Any]) -> list[Any]:
    """Returns what was saved of each group, in the present order."""
    return [own if index is None else saved[index] for index, own in zip(order, default, strict=True)]


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


def apply_changes(optimizer: Optimizer, now: Mapping[str, Any], before: Mapping[str, Any]) -> None:
    """Sets, in the groups of an optimizer just restored, what the config says otherwise than when they were saved."""
    for group, new, old in zip(optimizer.param_groups, now["groups"], before["groups"], strict=True):
        group.update({key: value for key, value in new.items() if key not in old or old[key] != value})


def describe(values: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Returns those of some values that are plain, such as numbers and nests of them."""
    return {str(key): value for key, value in values.items() if key not in left_out and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(_is_plain(each) for each in value)
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(each) for key, each in value.items())
    return value is None or type(value) in (bool, int, float, str)
