"""Restores the parts of an engine from a saved state, with the config's changes."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from runner.engines.optim.fused import check_fused_state, keep_saved_kernels
from runner.engines.optim.hyperparameters import apply_changes, find_changed_kinds, reorder_hyperparameters
from runner.engines.optim.optimizer_state import (
    MatchedState,
    Names,
    chained_optimizers,
    extra_state,
    groups_of,
    load_extra_state,
    match_state,
)
from runner.engines.optim.schedule_replay import LRSchedule, reorder_events, saved_history

_SCHEDULED = {"optimizer", "scheduler"}
_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # tensors if the update is compiled
_NOT_COMPARED = {"params", "param_names"}
_MAX_FLOAT = torch.finfo(torch.float32).max

Groups = Sequence[Mapping[str, Any]]  # the values of each group


def restore(
    parts: Mapping[str, Any],
    schedule: LRSchedule,
    state: Mapping[str, Any],
    configured: Mapping[str, Any],
    names: Names,
    saved_order: Sequence[str],
    to_local: Callable[[str, Any], Any],
    allows_changes: bool,
) -> list[str]:
    """Loads the saved state of an engine's parts.

    Hyperparameters that the config has changed since take effect. The schedule is replayed from its first step if its
    settings changed; otherwise its saved state is loaded.

    Args:
        parts: the optimizer, scheduler, scaler and averages by name; None if the engine lacks that part.
        configured: the hyperparameters as configured now; see `snapshot_hyperparameters`.
        names: the names of the module's parameters by id.
        saved_order: the names of the saved weights in their order.
        to_local: called with a part's name and its full state; returns this rank's part of the state.
        allows_changes: a part whose state is missing or of another kind starts anew instead of raising.
    Returns:
        A note for each part that starts anew.
    Raises:
        ValueError: there is such a part, and changes are not allowed.
        TypeError: a value in an optimizer group has the wrong type.
    """
    notes = find_changed_kinds(parts, state)
    if notes and not allows_changes:
        remedy = "resume with the same config, or with resume_allow_changes=true: it then begins anew"
        raise ValueError(f"{notes[0]}; {remedy}")
    changed = {note.partition(":")[0] for note in notes}
    notes = [f"{note}: it begins anew" for note in notes]
    optimizer: Optimizer | None = parts["optimizer"]
    saved, saved_settings, is_replayed = dict(state), dict(state["configured"]), bool(changed & _SCHEDULED)
    if optimizer is not None:
        built_values = group_values(optimizer)
        history = _kept_history(state, changed)
        if "optimizer" not in changed:
            matched = match_state(state["optimizer"], optimizer, names, saved_order)
            notes += _check_matched(matched, allows_changes)
            saved_settings = reorder_hyperparameters(saved_settings, matched.order, configured)
            saved["optimizer"] = keep_saved_kernels(matched.state, optimizer, configured, saved_settings)
            history = reorder_events(history, matched.order, configured, saved_settings)
            is_replayed |= matched.order != list(range(len(saved_settings["groups"])))
        is_replayed = schedule.needs_replay(configured, saved_settings) or is_replayed
        scheduled_values = schedule.replay(history) if is_replayed else []
    for name, part in parts.items():
        if part is not None and name not in changed and not (name == "scheduler" and is_replayed):
            part.load_state_dict(to_local(name, saved[name]))
    if optimizer is not None and not is_replayed:
        schedule.load_state_dict(history)
        schedule.apply_base_lrs(configured, saved_settings)
    if optimizer is not None and "optimizer" not in changed:
        apply_changes(optimizer, configured, saved_settings)
        _check_loaded(optimizer, built_values)
        load_extra_state(optimizer, state.get("numbers") or [{}] * len(extra_state(optimizer)))
        if is_replayed:
            schedule.restore_values(scheduled_values)
    return notes


def _kept_history(state: Mapping[str, Any], changed: set[str]) -> dict[str, Any]:
    """Returns the saved schedule without events that a changed part makes obsolete."""
    if "scheduler" in changed:
        return {"count": 0, "events": []}
    history = saved_history(state, groups_of(state["optimizer"] or {}))
    if "optimizer" in changed:
        # Base rates that a command has set belong to the previous optimizer; metrics still count.
        history["events"] = [event for event in history["events"] if "metric" in event]
    return history


def _check_matched(matched: MatchedState, allows_changes: bool) -> list[str]:
    """Checks that every parameter has a saved state and the reverse.

    Returns a note if some start anew.
    """
    if not matched.missing and not matched.unmatched:
        return []
    expected = ", ".join(matched.missing) or "no others"
    found = ", ".join(matched.unmatched) or "none of them"
    text = f"optimizer: expected the state of {expected}, found that of {found}"
    if not allows_changes:
        raise ValueError(
            f"{text}: parameters were renamed, added or removed; resume with the parameters as they were, "
            "or allow changes (resume_allow_changes=true)"
        )
    return [f"{text}: they begin anew"]


def _check_loaded(optimizer: Optimizer, built: Groups) -> None:
    """Checks the types of the groups' values and the shapes of fused tensors; torch checks neither.

    Args:
        built: the result of `group_values` before the state was loaded.
    Raises:
        TypeError, ValueError: a value has another type than the group was built with, or a tensor another shape.
    """
    check_group_values(optimizer, built)
    check_fused_state(optimizer)


def group_values(optimizer: Optimizer) -> Groups:
    """Returns the current values of each group."""
    return [dict(group) for part in chained_optimizers(optimizer) for group in part.param_groups]


def check_group_values(optimizer: Optimizer, built: Groups) -> None:
    """Checks that each value has the type of the value that its group was built with.

    A saved state may be damaged or come from somebody else. Torch loads it unchecked, and the next update would fail.
    `capturable`, which compilation sets on an accelerator, is reset if the group's parameters are on a CPU.

    Args:
        built: the result of `group_values` before the state was loaded.
    Raises:
        TypeError: naming the group and key.
    """
    groups = [(part, group) for part in chained_optimizers(optimizer) for group in part.param_groups]
    for number, ((part, group), built_group) in enumerate(zip(groups, built, strict=True)):
        is_torchs = type(part).__module__.startswith("torch.optim.")
        on_cpu = any(parameter.device.type == "cpu" for parameter in group["params"])
        if is_torchs and on_cpu and type(group.get("capturable")) is bool and "capturable" in built_group:
            group["capturable"] = built_group["capturable"]
        # A group that torch's default has updated so far leaves the fused kernel that it was built with.
        leaves_fused = is_torchs and (group.get("fused") is None or group["fused"] is False)
        not_compared = _NOT_COMPARED | ({"fused"} if leaves_fused else set())
        compared_keys = [key for key in built_group if key in group and key not in not_compared]
        for key in compared_keys:
            is_strict = is_torchs and key not in _RATES
            if not _is_compatible(group[key], built_group[key], is_strict, is_torchs):
                expected, found = _describe_value(built_group[key]), _describe_value(group[key])
                raise TypeError(f"group {number}: {key}: expected {expected}, found {found}")


def _is_compatible(found: Any, expected: Any, is_strict: bool, is_torchs: bool) -> bool:
    """Returns whether a value can replace another of its type.

    Args:
        is_strict: a tensor can't replace a number.
        is_torchs: of an optimizer of torch, whose strings, booleans and None never change; other optimizers may change
            theirs while training.
    """
    if _is_number(expected) or (isinstance(expected, Tensor) and expected.numel() == 1):
        if isinstance(found, Tensor):
            return found.numel() == 1 and not found.is_complex() and (isinstance(expected, Tensor) or not is_strict)
        return _is_number(found) and not (math.isfinite(found) and abs(found) > _MAX_FLOAT)
    if isinstance(expected, (list, tuple)):
        is_list = isinstance(found, (list, tuple)) and len(found) == len(expected)
        return is_list and all(
            _is_compatible(item, expected_item, is_strict, is_torchs)
            for item, expected_item in zip(found, expected, strict=True)
        )
    if expected is None or isinstance(expected, (bool, str)):
        if is_torchs and not (expected is None and isinstance(found, bool)):
            return type(found) is type(expected) and bool(found == expected)
        return expected is None or isinstance(found, type(expected))
    return True  # of a type that only the optimizer knows


def _is_number(value: Any) -> bool:
    return abs(value) < 1 << 127 if type(value) is int else type(value) is float


def _describe_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}: {', '.join(_describe_value(item) for item in value[:4])}"
    if isinstance(value, Tensor):
        return f"a tensor {[*value.shape]}"
    return f"{value!r:.60}" if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
