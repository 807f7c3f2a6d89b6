"""A strict JSON parser for files of unknown origin: any fault is a ValueError."""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
_MAX_SHOWN = 60


def parse_json(content: bytes | str, max_depth: int = MAX_DEPTH) -> Any:
    """Returns the value of a JSON text in UTF-8. It accepts NaN and infinities as Python writes them.

    Raises:
        ValueError: the text is not JSON, has a key twice in one object, or is nested deeper than `max_depth`.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"nested over {max_depth} deep") from None
    # Counting brackets is fast, and fewer than `max_depth` can't be nested deeper.
    if text.count("[") + text.count("{") > max_depth:
        _check_depth(value, max_depth)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    value = dict(pairs)
    if len(value) < len(pairs):
        seen = set[str]()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:_MAX_SHOWN]!r} is twice in one object")
            seen.add(key)
    return value


def _check_depth(value: Any, max_depth: int) -> None:
    level = [value]
    depth = 0
    while containers := [item for item in level if isinstance(item, (dict, list))]:
        depth += 1
        if depth > max_depth:
            raise ValueError(f"nested over {max_depth} deep")
        level = []
        for container in containers:
            level += container.values() if isinstance(container, dict) else container
