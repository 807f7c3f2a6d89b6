"""Hyperparameters of an optimizer and its scheduler.

They exist as configured, as changed while training, and as saved.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from runner.engines.optim.optimizer_state import chained_optimizers

# Of the optimizers of these libraries, those that support sparse gradients.
_LIBRARIES = ("torch", "runner", "bitsandbytes", "prodigyopt", "schedulefree")
_SUPPORT_SPARSE = (torch.optim.SGD, torch.optim.Adagrad, torch.optim.SparseAdam)
_KINDS = ("optimizer", "scheduler")
_RENAMED_KINDS = {("ChainedOptimizer", "Joined")}  # a class, and its name in checkpoints from before it was renamed
_RATES = {"lr", "initial_lr"}  # they change with the schedule: base rates are compared instead
_NOT_COMPARED = _RATES | {"params", "param_names"}
_POSITIONS = {"_step_count", "last_epoch", "_last_lr", "base_lrs", "_get_lr_called_within_step", "_is_initial"}
_PARTS = {"optimizer", "_schedulers", "_scale_fn_ref"}  # the last one follows from CyclicLR's mode


def base_lrs(optimizer: Optimizer | None) -> list[float]:
    """Returns the base learning rate of each group, before the schedule's factor."""
    return [float(g.get("initial_lr", g["lr"])) for g in optimizer.param_groups] if optimizer else []


def current_lrs(optimizer: Optimizer | None) -> list[float]:
    """Returns the current learning rate of each group."""
    return [float(group["lr"]) for group in optimizer.param_groups] if optimizer else []


def set_base_lr(optimizer: Optimizer, scheduler: LRScheduler | None, index: int, lr: float) -> None:
    """Sets the base rate of a group; its schedule continues from there."""
    group = optimizer.param_groups[index]
    base = float(group.get("initial_lr", group["lr"]))
    ratio = lr / base if base else 1.0
    set_group_value(group, "lr", lr if float(group["lr"]) == base else float(group["lr"]) * ratio)
    for key in group.keys() & {"max_lr", "min_lr"}:  # of torch's cyclic schedules
        group[key] *= ratio
    if scheduler is None:
        return
    set_group_value(group, "initial_lr", lr)
    for part in walk_schedulers(scheduler):
        if hasattr(part, "base_lrs"):
            part.base_lrs[index] = lr
        if hasattr(part, "max_lrs"):
            part.max_lrs[index] *= ratio


def walk_schedulers(scheduler: Any) -> Iterator[Any]:
    """Yields a scheduler and all schedulers inside it."""
    yield scheduler
    for part in getattr(scheduler, "_schedulers", ()):
        yield from walk_schedulers(part)


def set_group_value(group: dict[str, Any], key: str, value: Any) -> None:
    """Sets a value of a group.

    A tensor is filled in place, since a compiled update reads that tensor.
    """
    if isinstance(group.get(key), Tensor):
        group[key].fill_(value)
    else:
        group[key] = value


def check_covers_parameters(optimizer: Optimizer | None, named: Iterable[tuple[str, Tensor]]) -> None:
    """Checks that an optimizer holds every trained parameter.

    Any other would silently not be trained.

    Raises:
        ValueError: naming the parameters that it lacks.
    """
    if optimizer is None:
        return
    held_ids = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    if missing := [name for name, parameter in named if id(parameter) not in held_ids]:
        raise ValueError(
            f"it lacks parameters that are trained: {', '.join(missing)}; "
            "freeze them (optimizations.freeze), or give them to it"
        )


def check_sparse(module: nn.Module, optimizer: Any, is_sharded: bool) -> None:
    """Checks that layers with sparse gradients have an optimizer that supports these.

    Few of torch's do.

    Args:
        is_sharded: each rank holds a part of every weight.
    Raises:
        ValueError: naming the layers, and the optimizers that support sparse gradients.
    """
    layers = {name: layer for name, layer in module.named_modules() if getattr(layer, "sparse", False) is True}
    sparse_ids = {id(p) for layer in layers.values() for p in layer.parameters(recurse=False) if p.requires_grad}
    for part in chained_optimizers(optimizer):
        held_ids = {id(parameter) for group in part.param_groups for parameter in group["params"]}
        kind = type(part).__name__
        is_known = type(part).__module__.partition(".")[0] in _LIBRARIES
        supports_sparse = isinstance(part, _SUPPORT_SPARSE)
        keys_in_use = {key for group in part.param_groups for key in ("momentum", "weight_decay") if group.get(key)}
        unsupported_keys = sorted(keys_in_use) if supports_sparse else []
        is_unsupported = is_known and (unsupported_keys or not supports_sparse)
        if held_ids & sparse_ids and (is_sharded or is_unsupported):
            keys = " with " + " and ".join(unsupported_keys) if unsupported_keys else ""
            found = f"{kind}{' under FSDP' if is_sharded else keys}"
            remedy = "set sparse=false there" + ("" if is_sharded else ", or choose SparseAdam, Adagrad or plain SGD")
            raise ValueError(f"{found} can't take the sparse gradients of {', '.join(layers)}; {remedy}")
        if isinstance(part, torch.optim.SparseAdam) and held_ids - sparse_ids:
            raise ValueError(f"{kind} takes sparse gradients alone; give dense parameters to another optimizer")


def snapshot_hyperparameters(optimizer: Optimizer | None, scheduler: LRScheduler | None) -> dict[str, Any]:
    """Returns the hyperparameters of an optimizer and scheduler as plain values."""
    groups = [plain_values(group, _NOT_COMPARED) for group in optimizer.param_groups] if optimizer else []
    return {
        "kinds": {"optimizer": _kind(optimizer), "scheduler": _kind(scheduler)},
        "base_lrs": base_lrs(optimizer),
        "groups": groups,
        "scheduler": _scheduler_settings(scheduler) if scheduler else {},
    }


def _scheduler_settings(scheduler: Any) -> dict[str, Any]:
    """Returns the plain settings of a scheduler, and of the schedulers inside it."""
    parts = [_scheduler_settings(part) for part in getattr(scheduler, "_schedulers", ())]
    settings = plain_values(vars(scheduler), _POSITIONS | _PARTS)
    counters = {key: sorted(value.items()) for key, value in vars(scheduler).items() if isinstance(value, Counter)}
    return {"own": settings | counters, "parts": parts}


def has_unseen_settings(scheduler: Any) -> bool:
    """Returns whether a scheduler has settings that are not plain, such as functions."""
    parts = walk_schedulers(scheduler)
    return any(vars(part).keys() - _scheduler_settings(part)["own"].keys() - _POSITIONS - _PARTS for part in parts)


def reorder_hyperparameters(
    saved: Mapping[str, Any], order: Sequence[int | None], configured: Mapping[str, Any]
) -> dict[str, Any]:
    """Returns saved hyperparameters in the order of the current groups.

    Those of a new group are as configured.

    Args:
        order: for each current group the index of the saved group, or None.
    """
    groups = [plain_values(group, _NOT_COMPARED) for group in saved["groups"]]
    return {
        **saved,
        "base_lrs": reorder(saved["base_lrs"], order, configured["base_lrs"]),
        "groups": reorder(groups, order, configured["groups"]),
    }


def reorder(saved: Sequence[Any], order: Sequence[int | None], defaults: Sequence[Any]) -> list[Any]:
    """Returns the saved item of each current group; the default if `order` is None."""
    return [default if index is None else saved[index] for index, default in zip(order, defaults, strict=True)]


def _kind(part: Any) -> str | None:
    return None if part is None else type(part).__name__


def find_changed_kinds(parts: Mapping[str, Any], state: Mapping[str, Any]) -> list[str]:
    """Returns a note for each part whose class differs from that of the saved state."""
    notes = []
    for name, part in parts.items():
        saved_kind = state["configured"]["kinds"].get(name, None if state.get(name) is None else "one")
        kind = _kind(part) if name in _KINDS else None if part is None else "one"
        if kind != saved_kind and (kind, saved_kind) not in _RENAMED_KINDS:
            notes.append(f"{name}: this engine has {kind or 'none'}, the saved state {saved_kind or 'none'}")
    return notes


def apply_changes(optimizer: Optimizer, configured: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Sets the values that the config has changed since the loaded state was saved.

    `fused` is left out: the loaded state has its final value, on which the tensors that torch keeps depend.
    """
    for group, new, old in zip(optimizer.param_groups, configured["groups"], saved["groups"], strict=True):
        changes = {key: value for key, value in new.items() if key not in old or old[key] != value}
        group.update({key: value for key, value in changes.items() if key != "fused"})


def plain_values(values: Mapping[str, Any], left_out: set[str]) -> dict[str, Any]:
    """Returns the values that are numbers, strings, booleans, None, or nests of these."""
    return {str(key): value for key, value in values.items() if key not in left_out and _is_plain(value)}


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, tuple)):
        return all(map(_is_plain, value))
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_plain(item) for key, item in value.items())
    return value is None or type(value) in (bool, int, float, str)
