"""Saves checkpoints in a thread beside training.

The loop waits only while the state is copied to the host.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from runner.utils.io import HostSnapshot

_LARGE_BYTES = 128 << 20  # of a state that is written while it is copied


class Writer(Protocol):
    """Commits a checkpoint: `Checkpoints`, or `ShardedCheckpoints` on all ranks."""

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
    """Saves checkpoints in a thread, one at a time.

    All callbacks are called in that thread.

    Args:
        before_commit: called when all files are on disk, before the rename; an error it raises fails the save.
        before_prune: called with the steps to be pruned; False keeps them.
        saved: called as saved(step, path) after a commit.
        failed: called as failed(step, error). The next save is tried all the same.
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
        """Copies the state and commits it in the thread.

        First waits for a save that is still running.

        Raises:
            TypeError, ValueError: something in it can't be stored.
        """
        self._wait()
        # The buffers of the previous snapshots are reused.
        previous, self._snapshots = self._snapshots, {}
        snapshots = {
            name: HostSnapshot(value, copy_now=False, reuse=previous.get(name)) for name, value in parts.items()
        }
        self._snapshots = snapshots
        # The thread writes tensors of a large state as soon as they are copied. The first time, while buffers are
        # allocated, that would delay the loop, and so would the encoding of a small state's header.
        num_bytes = sum(snapshot.num_bytes for snapshot in snapshots.values())
        is_overlapped = bool(previous) and num_bytes >= _LARGE_BYTES
        # A daemon: a second signal ends the program during a write, which is then not committed.
        thread = threading.Thread(target=self._commit, args=(step, snapshots, facts, metric), name="saver", daemon=True)
        if is_overlapped:
            thread.start()
            self._thread = thread
        for snapshot in snapshots.values():
            snapshot.copy()
        if not is_overlapped:
            thread.start()
            self._thread = thread

    def close(self) -> None:
        """Waits for a running save.

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

    def _commit(self, step: int, parts: Mapping[str, HostSnapshot], facts: Mapping[str, Any], metric: Any) -> None:
        try:
            path = self._checkpoints.save(step, parts, facts, metric, self._before_commit, self._before_prune)
            self._error = None
            self._saved(step, path)
        except Exception as error:
            self._error = error
            self._failed(step, error)
