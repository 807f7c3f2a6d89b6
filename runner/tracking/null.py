"""Stand-ins for the tracker, run record and saver on ranks that write no files.

Each has exactly the public methods of the class it replaces, so that a misspelt call fails on every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


class NullTracker:
    """A `Tracker` that writes nothing."""

    def log(self, step: int, values: Mapping[str, Any]) -> None: ...

    def counts(self) -> dict[str, int]:
        return {}

    def text(self, step: int, name: str, text: str) -> None: ...

    def image(self, step: int, name: str, picture: Any) -> None: ...

    def audio(self, step: int, name: str, audio: Any) -> None: ...

    def histogram(self, step: int, name: str, values: Any) -> None: ...

    def hparams(self, values: Mapping[str, bool | float | str], metrics: list[str] | None = None) -> None: ...

    def flush(self) -> None: ...

    def close(self, status: str = "finished") -> None: ...


class NullRunRecord:
    """A `RunRecord` that reads and writes nothing."""

    crashed: dict[str, Any] | None = None
    faults: tuple[str, ...] = ()

    def start_session(self, **facts: Any) -> None: ...

    def update(self, **facts: Any) -> None: ...

    def finish(self, status: str, reason: str | None = None, **facts: Any) -> None: ...

    def read(self) -> dict[str, Any]:
        return {}


class NullSaver:
    """A `Saver` that saves nothing."""

    def save(self, step: int, parts: Mapping[str, Any], facts: Mapping[str, Any], metric: Any = None) -> None: ...

    def close(self) -> None: ...
