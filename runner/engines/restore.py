"""Restores an engine's optimizer, schedule, scaler and averages from a saved state, with the changes of a config since.

Must not import a config.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.optim import Optimizer

from runner.engines.optim.group_values import check_values, values_of
from runner.engines.optim.hyperparameters import apply_changes, find_changed_kinds, reorder
from runner.engines.optim.optimizer_state import Matched, Names, groups_of, match, numbers_of, set_numbers
from runner.engines.optim.schedule import LRSchedule, recall, reorder_events

_KINDS = {"optimizer", "scheduler"}


def restore(
    parts: Mapping[str, Any],
    schedule: LRSchedule,
    state: Mapping[str, Any],
    now: Mapping[str, Any],
    names: Names,
    saved_order: Sequence[str],
    fit: Callable[[str, Any], Any],
    allows_changes: bool,
) -> list[str]:
    """Has an engine's parts take back their states, and what the config says otherwise by now take effect.

    Args:
        now: the settings as configured.
        names: of the module's parameters.
        saved_order: the names of the saved weights in their order.
        fit: called with a part's name and its whole state; returns the state as this rank holds it.
    Returns:
        Which parts begin anew, as the state has none of their kind.
    Raises:
        ValueError: there is such a part, and changes are not allowed.
        TypeError: a group of the optimizer would hold a value of another kind.
    """
    notes = find_changed_kinds(parts, state)
    if notes and not allows_changes:
        raise ValueError(
            f"{notes[0]}; resume with the same config, or with resume_allow_changes=true: it then begins anew"
        )
    changed = {note.partition(":")[0] for note in notes}
    notes = [f"{note}: it begins anew" for note in notes]
    optimizer: Optimizer | None = parts["optimizer"]
    saved, before, is_replayed = dict(state), dict(state["configured"]), bool(changed & _KINDS)
    if optimizer is not None:
        built = values_of(optimizer)
        history = recall(state, groups_of(state["optimizer"] or {}))
        if changed & _KINDS:  # rates that were set live were those of the other schedule or optimizer
            metrics = [event for event in history["events"] if "metric" in event]
            history = {"count": 0, "events": []} if "scheduler" in changed else {**history, "events": metrics}
        if "optimizer" not in changed:
            matched = match(state["optimizer"], optimizer, names, saved_order)
            notes += _check(matched, allows_changes)
            saved["optimizer"], before = matched.state, reorder(before, matched.order, now)
            history = reorder_events(history, matched.order, now, before)
            is_replayed |= matched.order != list(range(len(before["groups"])))
        is_replayed = schedule.is_replayed(now, before) or is_replayed
        owned = schedule.replay(history) if is_replayed else []
    for name, part in parts.items():
        if part is not None and name not in changed and not (name == "scheduler" and is_replayed):
            part.load_state_dict(fit(name, saved[name]))
    if optimizer is not None and not is_replayed:
        schedule.load_state_dict(history)
        schedule.take_base_lrs(now, before)
    if optimizer is not None and "optimizer" not in changed:
        apply_changes(optimizer, now, before)
        check_values(optimizer, built)
        set_numbers(optimizer, state.get("numbers") or [{}] * len(numbers_of(optimizer)))
        if is_replayed:
            schedule.restore(owned)
    return notes


def _check(matched: Matched, allows_changes: bool) -> list[str]:
    """Checks that each parameter has its saved state, and each saved state its parameter; returns what begins anew."""
    if not matched.missing and not matched.left:
        return []
    expected, found = ", ".join(matched.missing) or "no others", ", ".join(matched.left) or "none of them"
    text = f"optimizer: expected the state of {expected}, found that of {found}"
    if not allows_changes:
        remedy = "resume with the parameters as they were, or allow changes (resume_allow_changes=true)"
        raise ValueError(f"{text}: parameters were renamed, added or removed; {remedy}")
    return [f"{text}: they begin anew"]
