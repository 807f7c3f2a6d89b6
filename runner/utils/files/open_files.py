"""Open files: their limit, a reserve of descriptors for the last save, and offsets that a fork shares."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import resource
import stat
import sys
from types import TracebackType

_ERRNOS = (errno.EMFILE, errno.ENFILE)
# The second is the error of a process that has no free descriptor to receive one from another process.
_MESSAGES = (os.strerror(errno.EMFILE), "items of ancdata", f"exit code {errno.EMFILE}")
_NUM_RESERVED = 16
_OPEN_FILES = "/proc/self/fd"
# multiprocessing removes its temporary folder at priority -100; higher priorities run first.
_BEFORE_TEMPORARY_FOLDER = -50


def is_out_of_files(error: BaseException) -> bool:
    """Returns whether an error or one of its causes comes from too many open files."""
    seen: list[BaseException] = []
    cause: BaseException | None = error
    while cause is not None and cause not in seen:
        has_number = isinstance(cause, OSError) and cause.errno in _ERRNOS
        if has_number or (isinstance(cause, (OSError, RuntimeError)) and any(text in str(cause) for text in _MESSAGES)):
            return True
        seen.append(cause)
        cause = cause.__cause__ or cause.__context__
    return False


def describe_limit() -> str:
    """Returns the limit on open files and the remedy if it is too low."""
    return (
        f"at most {resource.getrlimit(resource.RLIMIT_NOFILE)[0]} may be open; raise the limit (ulimit -n), close "
        "files that were read, or set data.num_workers=0, since each tensor from a loader worker keeps a file open"
    )


class DescriptorReserve(contextlib.ExitStack):
    """Sixteen file descriptors kept open. `close` closes them for a save when the program has reached the limit."""

    def open(self) -> None:
        with contextlib.suppress(OSError):
            for _ in range(_NUM_RESERVED):
                self.callback(os.close, os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC))


def unshare_file_offsets() -> None:
    """Reopens the files that this forked process reads, so that it does not share their offsets with its parent.

    With shared offsets, two loader workers that seek and read in one file get each other's bytes. It does nothing on a
    system without /proc.

    Source: fork(2), https://man7.org/linux/man-pages/man2/fork.2.html
    """
    try:
        descriptors = [int(name) for name in os.listdir(_OPEN_FILES)]
    except OSError:
        return
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # the descriptor of the listing itself, or a file that can't be reopened
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


def exit_worker_at_file_limit(worker: int) -> None:
    """Makes this loader worker exit when it has no descriptor left to send a batch.

    Otherwise the thread that sends batches prints an error and drops the batch, and the parent waits forever. A few
    descriptors are reserved, so that a worker that exits normally can remove its temporary folder.
    """
    from multiprocessing.queues import Queue
    from multiprocessing.util import Finalize

    reserve = DescriptorReserve()
    reserve.open()
    Finalize(None, reserve.close, exitpriority=_BEFORE_TEMPORARY_FOLDER)

    def exit_at_limit(error: BaseException | None) -> None:
        if error is not None and is_out_of_files(error):
            text = f"Loader worker {worker}: too many open files ({error}): {describe_limit()}\n"
            os.write(2, text.encode())
            os._exit(errno.EMFILE)

    feeder_handler = Queue._on_queue_feeder_error  # type: ignore[attr-defined]
    any_handler = sys.excepthook

    def on_feeder_error(error: BaseException, value: object) -> None:
        exit_at_limit(error)
        feeder_handler(error, value)

    def on_any_error(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        exit_at_limit(error)
        any_handler(kind, error, trace)

    Queue._on_queue_feeder_error = staticmethod(on_feeder_error)  # type: ignore[attr-defined]
    sys.excepthook = on_any_error
