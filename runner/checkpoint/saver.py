"""Checkpoints written beside the loop: it is held while the state is copied, and a thread does the rest.

Must not know what is saved, nor how a run is told of it.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from runner.utils.io import HostSnapshot


class Writer(Protocol):
    """What commits a checkpoint: `checkpoint.Checkpoints`, or all ranks at once."""

    def save(
        self,
        step: int,
        parts: Mapping[str, HostSnapshot],
        facts: Mapping[str, Any],
        metric: Any,
        before_commit: Callable[[], None],
        before_prune: Callable[[set[int]], bool],
        /,
    ) -> Path: ...


class Saver:
    """Commits checkpoints, one at a time.

    Args:
        before_commit: called, in the thread, when all but the final name is on disk; what it raises fails the save.
        before_prune: called, in the thread, with the steps to be removed; False keeps them.
        saved: called, in the thread, as saved(step, path).
        failed: called, in the thread, as failed(step, error). The next save tries anew.
    """

    def __init__(
        self,
        checkpoints: Writer,
        *,
        before_commit: Callable[[], None],
        before_prune: Callable[[set[int]], bool] = lambda steps: True,
        saved: Callable[[int, Path], None],
        failed: Callable[[int, Exception], None],
    ) -> None:
        self._checkpoints = checkpoints
        self._before_commit, self._before_prune = before_commit, before_prune
        self._saved, self._failed = saved, failed
        self._thread: threading.Thread | None = None
        self._error: Exception | None = None
        self._snapshots: dict[str, HostSnapshot] = {}

    def save(self, step: int, parts: Mapping[str, Any], facts: Mapping[str, Any], metric: Any = None) -> None:
        """Copies the state, and has it committed; waits for a save that is still under way.

        Raises:
            TypeError, ValueError: something in it can't be stored.
        """
        self._wait()
        old, self._snapshots = self._snapshots, {}
        snapshots = {name: HostSnapshot(value, at_once=not old, over=old.get(name)) for name, value in parts.items()}
        self._snapshots = snapshots
        arguments = step, snapshots, facts, metric
        # A daemon: a second signal ends the program in the midst of a write, which then never was.
        self._thread = threading.Thread(target=self._commit, args=arguments, name="saver", daemon=True)
        self._thread.start()
        if old:  # it writes each tensor as soon as it is copied; the first time that would hold the loop longer
            for snapshot in snapshots.values():
                snapshot.copy()

    def close(self) -> None:
        """Waits for the save under way.

        Raises:
            OSError: the last save failed.
        """
        self._wait()
        error, self._error = self._error, None
        if error is not None:
            raise error

    def _wait(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _commit(self, step: int, parts: Mapping[str, HostSnapshot], facts: Mapping[str, Any], metric: Any) -> None:
        try:
            path = self._checkpoints.save(step, parts, facts, metric, self._before_commit, self._before_prune)
            self._error = None
            self._saved(step, path)
        except Exception as error:
            self._error = error
            self._failed(step, error)
