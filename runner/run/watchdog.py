"""A watchdog for one rank of several.

A rank without progress is ended, with the stacks of its threads in the log. A single process has no watchdog: no other
waits for it.
"""

from __future__ import annotations

import contextlib
import faulthandler
import fcntl
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from runner.utils.files import disk

_ORPHAN_GRACE_S = 30.0  # for a rank without a launcher, to save and end
_MARGIN_S = 5.0


@contextlib.contextmanager
def watchdog(progress: Callable[[], Any], timeout_s: float, log: Path, name: str) -> Iterator[None]:
    """Ends this process with status 1 if a block makes no progress.

    Args:
        progress: returns a value that changes with progress; called from a thread.
        timeout_s: without a change for this time, the process ends.
        log: the file for the stacks.
        name: of this rank, in the log.
    """
    is_over, parent = threading.Event(), os.getppid()
    descriptor = disk.open_unsynced(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    with os.fdopen(descriptor, "a", encoding="utf-8") as file:

        def watch() -> None:
            last, since, orphan_since = progress(), time.monotonic(), None
            while not is_over.wait(min(timeout_s / 4, 1.0)):
                now, current = time.monotonic(), progress()
                if current != last:
                    last, since = current, now
                    # For a main thread that never releases the GIL: this timer needs no Python.
                    faulthandler.dump_traceback_later(timeout_s + _MARGIN_S, file=file, exit=True)
                if os.getppid() != parent:
                    orphan_since = orphan_since or now
                if now - since > timeout_s or now - (orphan_since or now) > _ORPHAN_GRACE_S:
                    why = f"made no step for {now - since:.0f} s" if orphan_since is None else "has lost its launcher"
                    # Ranks that hang together write to one file; the timer above ends a wait for the lock.
                    with contextlib.suppress(OSError):
                        fcntl.flock(file, fcntl.LOCK_EX)
                    file.write(f"{name} {why} and is ended; its stacks:\n")
                    file.flush()
                    faulthandler.dump_traceback(file=file)
                    os._exit(1)

        thread = threading.Thread(target=watch, name="watch", daemon=True)
        thread.start()
        try:
            yield
        finally:
            is_over.set()
            faulthandler.cancel_dump_traceback_later()
            thread.join()
