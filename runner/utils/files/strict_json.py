"""JSON of unknown origin, parsed within bounds: what is no such JSON raises ValueError, and nothing else.

Imports the standard library alone.
"""

from __future__ import annotations

import json
from typing import Any

MAX_DEPTH = 100
_MAX_SHOWN = 60


def parse_json(content: bytes | str, max_depth: int = MAX_DEPTH) -> Any:
    """Returns the value of a JSON text in UTF-8. NaN and infinities are read as Python writes them.

    Raises:
        ValueError: it is not JSON, holds a key twice in one object, or is nested deeper than `max_depth`.
    """
    try:
        text = content.decode() if isinstance(content, bytes) else content
        value = json.loads(text, object_pairs_hook=_unique)
    except RecursionError:
        raise ValueError(f"nested over {max_depth} deep") from None
    # So few brackets can't be nested deeper; counting them is fast.
    if text.count("[") + text.count("{") > max_depth:
        _check_depth(value, max_depth)
    return value


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        seen = set[str]()
        for key, _ in pairs:
            if key in seen:
                raise ValueError(f"the key {key[:_MAX_SHOWN]!r} is twice in one object")
            seen.add(key)
    return found


def _check_depth(value: Any, max_depth: int) -> None:
    level, depth = [value], 0
    while containers := [each for each in level if isinstance(each, (dict, list))]:
        depth += 1
        if depth > max_depth:
            raise ValueError(f"nested over {max_depth} deep")
        level = [item for each in containers for item in (each.values() if isinstance(each, dict) else each)]
