"""Restores the parts of an engine from a saved state, with the config's changes."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from runner.engines.optim.group_values import check_group_values, group_values
from runner.engines.optim.hyperparameters import apply_changes, find_changed_kinds, reorder_hyperparameters
from runner.engines.optim.optimizer_state import (
    MatchedState,
    Names,
    extra_state,
    groups_of,
    load_extra_state,
    match_state,
)
from runner.engines.optim.schedule_replay import LRSchedule, reorder_events, saved_history

_SCHEDULED = {"optimizer", "scheduler"}


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
        raise ValueError(
            f"{notes[0]}; resume with the same config, or with resume_allow_changes=true: it then begins anew"
        )
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
            saved["optimizer"] = matched.state
            saved_settings = reorder_hyperparameters(saved_settings, matched.order, configured)
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
        check_group_values(optimizer, built_values)
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
