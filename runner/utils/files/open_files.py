"""Open files: their limit, the remedy and a reserve for the last save; and positions that a fork would share."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import stat
import sys
from types import TracebackType

_NUMBERS = (errno.EMFILE, errno.ENFILE)
# The second is what a process without a free descriptor says of one that another process has sent to it.
_TEXTS = (os.strerror(errno.EMFILE), "items of ancdata", f"exit code {errno.EMFILE}")
_NUM_RESERVED = 16
_OPEN_FILES = "/proc/self/fd"
_BEFORE_TEMPORARY_FOLDER = -50  # multiprocessing removes it at -100, the highest first


def is_out_of_files(error: BaseException) -> bool:
    """Says whether an error, or what it was raised from, comes from too many open files."""
    seen: list[BaseException] = []
    found: BaseException | None = error
    while found is not None and found not in seen:
        is_system = isinstance(found, OSError) and found.errno in _NUMBERS
        if is_system or (isinstance(found, (OSError, RuntimeError)) and any(text in str(found) for text in _TEXTS)):
            return True
        seen.append(found)
        found = found.__cause__ or found.__context__
    return False


def describe_limit() -> str:
    """Returns how many files a process may have open, and what to do where that is too few."""
    remedy = (
        "raise the limit (ulimit -n), close files that were read, or set data.num_workers=0, since each tensor "
        "from a loader worker keeps a file open"
    )
    try:
        import resource
    except ImportError:  # Windows
        return remedy
    return f"at most {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} may be open; {remedy}"


class Reserve:
    """Open files that do nothing, closed so that a save can open its own where a program has used up the limit."""

    def __init__(self) -> None:
        self._descriptors: list[int] = []

    def open(self) -> None:
        """Takes the files."""
        with contextlib.suppress(OSError):
            for _ in range(_NUM_RESERVED):
                self._descriptors.append(os.open(os.devnull, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))

    def close(self) -> None:
        """Gives the files back; again, it does nothing."""
        while self._descriptors:
            os.close(self._descriptors.pop())


def separate_offsets() -> None:
    """Gives this forked process a position of its own in each file that it reads, where the system lists open files.

    A fork shares positions: of two loader workers that seek and read in one file, each gets bytes of the other's.

    Source: fork(2), https://man7.org/linux/man-pages/man2/fork.2.html
    """
    try:
        descriptors = [int(name) for name in os.listdir(_OPEN_FILES)]
    except OSError:
        return
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # it was that of the list, or may not be opened again
            is_read = fcntl.fcntl(descriptor, fcntl.F_GETFL) & os.O_ACCMODE != os.O_WRONLY
            if descriptor > 2 and is_read and stat.S_ISREG(os.fstat(descriptor).st_mode):
                _reopen(descriptor)


def _reopen(descriptor: int) -> None:
    flags = fcntl.fcntl(descriptor, fcntl.F_GETFL) & (os.O_ACCMODE | os.O_APPEND)
    again = os.open(f"{_OPEN_FILES}/{descriptor}", flags | os.O_CLOEXEC)
    try:
        os.lseek(again, os.lseek(descriptor, 0, os.SEEK_CUR), os.SEEK_SET)
        os.dup2(again, descriptor, os.get_inheritable(descriptor))
    finally:
        os.close(again)


def end_worker_without_files(worker: int) -> None:
    """Ends this loader worker, in place of a wait without end, when it has no file left to send a batch.

    The threads that send batches tell an error and drop the batch. A worker that ends otherwise has files left to
    remove its temporary folder.
    """
    from multiprocessing.queues import Queue
    from multiprocessing.util import Finalize

    reserve = Reserve()
    reserve.open()
    Finalize(None, reserve.close, exitpriority=_BEFORE_TEMPORARY_FOLDER)

    def end(error: BaseException | None) -> None:
        if error is not None and is_out_of_files(error):
            text = f"Loader worker {worker}: too many open files ({error}): {describe_limit()}\n"
            os.write(2, text.encode())
            os._exit(errno.EMFILE)

    tell_feeder, tell_any = Queue._on_queue_feeder_error, sys.excepthook  # type: ignore[attr-defined]

    def on_feeder_error(error: BaseException, value: object) -> None:
        end(error)
        tell_feeder(error, value)

    def on_any_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        end(error)
        tell_any(kind, error, trace)

    Queue._on_queue_feeder_error = staticmethod(on_feeder_error)  # type: ignore[attr-defined]
    sys.excepthook = on_any_error
