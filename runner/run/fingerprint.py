"""Whether the data is still what a run was trained on, where a dataset tells by a `fingerprint`. Imports nothing.

A dataset whose items mean something only with what was fitted, such as codes with their codec, says so by a string that
changes with it.
"""

from typing import Any

_LONGEST = 200  # characters of a saved fingerprint that are shown


def fingerprint_of(dataset: Any) -> str | None:
    """Returns what a dataset says of its content, or None."""
    found = getattr(dataset, "fingerprint", None)
    return None if found is None else str(found)


def find_change(dataset: Any, saved: str | None, is_allowed: bool = True) -> str | None:
    """Returns what is to be told where a dataset says another thing than when a run was saved.

    Raises:
        ValueError: the same, where it is not allowed.
    """
    now = fingerprint_of(dataset)
    if saved is None or now is None or now == saved:
        return None
    kind = type(dataset).__name__
    changed = f"{kind}: its data is not what the run was trained on: {now} now, {saved[:_LONGEST]} then"
    if is_allowed:
        return changed
    raise ValueError(f"{changed}; give it that data, or go on with this: resume_allow_changes=true")
