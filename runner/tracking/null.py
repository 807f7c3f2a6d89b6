"""What stands, on the ranks that only follow, where the leader has what writes. Imports nothing."""

from __future__ import annotations

from typing import Any


class Silent:
    """Takes every call, and does nothing: of a tracker, a record, a saver that another rank has."""

    crashed = None
    faults: tuple[str, ...] = ()

    def __getattr__(self, name: str) -> Any:
        return _do_nothing


def _do_nothing(*args: Any, **kwargs: Any) -> None:
    return None
