"""Reading of lines from a descriptor, in a thread that a forked worker or a background job cannot block.

Works on POSIX systems and imports the standard library only.
"""

from __future__ import annotations

import ctypes
import errno
import os
import select
import signal
import stat
import threading
import time
from collections import deque
from collections.abc import Callable

READ_BYTES = 64 * 1024
_MAX_REJECTED = 100  # invalid lines in a row; an input with more holds something else than commands
_DRAIN_S = 0.05  # spent at most on the lines that are ready in a pipe or file when a run starts
_BACKGROUND_S = 0.25  # between two checks whether this process came to the foreground
_PEEK_S = 0.1  # between two looks at a pipe whose first line is incomplete
_MAX_FIRST_LINE_BYTES = 4096  # a longer first line is no command
_ROOM_S = 0.05  # between two checks for room
_BURST = 1000  # lines that are processed at once
_LINES_PER_S = 2.0  # after these
_NONBLOCK = 2  # SPLICE_F_NONBLOCK
_tee = getattr(ctypes.CDLL(None, use_errno=True), "tee", None)  # Linux has it
if _tee is not None:
    _tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
    _tee.restype = ctypes.c_ssize_t


def without_comment(line: str) -> str:
    """Returns a typed line without blanks around it and without a `#` and the text after it."""
    return line.partition("#")[0].strip()


def quote_typed(text: str) -> str:
    """Returns typed text in quotes, shortened, with its control characters escaped."""
    return repr(text if len(text) <= 60 else text[:60] + "…")


def is_terminal_or_pipe(fd: int) -> bool:
    """Returns whether a person may type commands there: not in a regular file, a socket or /dev/null."""
    return os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode)


def peek(fd: int) -> bytes:
    """Returns the content of a pipe, up to 64 KiB, without consuming it.

    Source: tee(2), https://man7.org/linux/man-pages/man2/tee.2.html

    Raises:
        OSError: the system has no such call, or `fd` is no pipe.
    """
    if _tee is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    read_fd, write_fd = os.pipe()
    try:
        size = _tee(fd, write_fd, READ_BYTES, _NONBLOCK)
        if size < 0 and ctypes.get_errno() != errno.EAGAIN:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return os.read(read_fd, size) if size > 0 else b""
    finally:
        os.close(read_fd)
        os.close(write_fd)


class LineReader:
    """Reads lines from a descriptor that it owns, in a daemon thread.

    It waits without holding the lock of a stream: a worker process that is forked meanwhile closes its copy of
    `sys.stdin`, and would wait for that lock for ever.

    Args:
        submit: called with each line; returns whether it was a command or blank.
        answer: called with messages for the person who types.
        is_command: returns whether the first line of a pipe is a command. If it is not, the pipe belongs to another
            program, such as a shell loop over its lines, and nothing of it is read. None reads any pipe.
        warn: called with the reason why a pipe is not read.
        has_room: returns whether a line may be submitted. Until then the rest stays unread, and its writer waits.
    """

    def __init__(
        self,
        fd: int,
        submit: Callable[[str], bool],
        answer: Callable[[str], None],
        is_command: Callable[[str], bool] | None = None,
        warn: Callable[[str], None] | None = None,
        has_room: Callable[[str], bool] = lambda line: True,
    ) -> None:
        self._fd = fd
        self._submit = submit
        self._answer = answer
        self._warn = warn or answer
        self._has_room = has_room
        self._is_terminal = os.isatty(fd)
        self._is_command = None if self._is_terminal else is_command  # None once the first line of a pipe is known
        self._allowance = float(_BURST)  # lines that may be submitted now
        self._allowed_at = time.monotonic()
        self._lines: deque[str] = deque()  # read, and not yet submitted
        self._rest = b""  # of a line whose newline has not come
        self._num_rejected = 0  # invalid lines in a row
        self._wait_fd, self._wake_fd = os.pipe()
        self._is_open = True
        self._has_ended = False  # at the end of the input
        self._announces_end = False
        self._has_announced_wait = False
        self._thread = threading.Thread(target=self._run, name="commands", daemon=True)

    def start(self) -> None:
        """Submits the lines that are ready, then starts the thread."""
        if self._is_command is None or self._check_first_line():
            deadline = 0 if self._is_terminal else time.monotonic() + _DRAIN_S
            self._read_lines(lambda: time.monotonic() < deadline and _is_ready(self._fd), lambda: False)
        self._thread.start()

    def close(self) -> None:
        """Ends the thread."""
        os.write(self._wake_fd, b"\0")  # closing it is not enough: a forked worker may hold this end open too
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1)
        if not self._thread.is_alive():  # a thread that is still answering goes on to look at its descriptors
            for fd in (self._fd, self._wait_fd, self._wake_fd):
                os.close(fd)

    def _run(self) -> None:
        # If the process leaves the foreground between the look and the read, the read then fails; without this mask
        # the signal would stop the process.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTIN})
        while self._is_open and self._is_command is not None:
            ready = select.select([self._wait_fd, self._fd], [], [])[0]
            if self._wait_fd in ready:
                return
            # The pipe keeps what is peeked at, so it is ready again at once: sleep between two looks.
            if not self._check_first_line() and _is_ready(self._wait_fd, _PEEK_S):
                return
        self._read_lines(self._wait_for_input, lambda: not _is_ready(self._wait_fd, _ROOM_S))

    def _check_first_line(self) -> bool:
        """Returns whether the first line of the pipe is known to be a command; if it is another, the reading ends."""
        try:
            poll = select.poll()
            poll.register(self._fd, select.POLLIN)
            has_ended = any(events & select.POLLHUP for _, events in poll.poll(0))
            content = peek(self._fd)
        except OSError as error:
            self._refuse_pipe(f"standard input is a pipe that can't be looked into ({error.strerror})")
            return False
        *lines, rest = content.split(b"\n")
        if has_ended or len(rest) > _MAX_FIRST_LINE_BYTES or len(content) >= READ_BYTES:
            lines.append(rest)
        texts = [without_comment(line.decode(errors="replace")) for line in lines]
        first = next(filter(None, texts), None)
        if first is None:
            self._is_open = not has_ended
            return False
        assert self._is_command is not None
        if not self._is_command(first):
            self._refuse_pipe(f"standard input is a pipe whose first line {quote_typed(first)} is no command")
            return False
        self._is_command = None
        return True

    def _refuse_pipe(self, reason: str) -> None:
        self._is_open = False
        self._warn(f"{reason}: nothing of it is read; tracking.stdin=true reads it, tracking.stdin=false is silent")

    def _read_lines(self, may_read: Callable[[], bool], may_wait: Callable[[], bool]) -> None:
        """Reads and submits lines until one of the functions returns False.

        Args:
            may_read: waits for input; returns whether to read on.
            may_wait: waits a moment for room; returns whether to wait on.
        """
        try:
            while self._is_open and self._submit_lines(may_wait) and may_read():
                self._has_ended = not self._read_chunk()
                self._is_open = not self._has_ended or bool(self._lines)
        except (OSError, ValueError) as error:
            self._is_open = False
            self._answer(f"commands are no longer read: {error}")

    def _submit_lines(self, may_wait: Callable[[], bool]) -> bool:
        """Submits the lines that were read; returns whether all were and more may be read."""
        while self._lines:
            if not self._may_submit(self._lines[0]):
                if not self._has_announced_wait:
                    self._has_announced_wait = True
                    rest = f"the rest is read as these are done, {_LINES_PER_S:g} a second"
                    self._answer(f"{_BURST} commands at once: {rest}")
                if not may_wait():
                    return False
                continue
            self._allowance -= 1
            self._num_rejected = 0 if self._submit(self._lines.popleft()) else self._num_rejected + 1
            if self._num_rejected >= _MAX_REJECTED:
                self._reject_rest()
                return False
        if self._has_ended:
            self._is_open = False
            if self._announces_end:
                self._answer("end of input: no more commands are read")
        return self._is_open

    def _may_submit(self, line: str) -> bool:
        now = time.monotonic()
        self._allowance = min(_BURST, self._allowance + (now - self._allowed_at) * _LINES_PER_S)
        self._allowed_at = now
        return self._allowance >= 1 and self._has_room(line)

    def _reject_rest(self) -> None:
        self._is_open = False
        self._lines.clear()
        self._answer(f"{_MAX_REJECTED} lines in a row were no commands: this input is read no further")

    def _wait_for_input(self) -> bool:
        """Blocks until there is something to read (True) or `close` is called (False)."""
        while True:
            is_foreground = self._is_foreground()
            watched = [self._wait_fd, self._fd] if is_foreground else [self._wait_fd]
            ready = select.select(watched, [], [], None if is_foreground else _BACKGROUND_S)[0]
            if self._wait_fd in ready:
                return False
            if ready and self._is_foreground():
                return True

    def _is_foreground(self) -> bool:
        """Returns whether this process may read: a background job that reads its terminal is stopped."""
        try:
            return not self._is_terminal or os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:  # a terminal of another session has no job control; one that is gone fails in the read
            return True

    def _read_chunk(self) -> bool:
        """Reads the bytes that are ready; returns whether more may come."""
        try:
            chunk = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return not self._is_foreground()
        *lines, rest = (self._rest + (chunk or b"\n")).split(b"\n")
        self._rest = rest[: READ_BYTES + 1]
        self._lines += [line.decode(errors="replace") for line in lines]
        self._num_rejected += len(rest) > READ_BYTES
        if self._num_rejected >= _MAX_REJECTED:
            self._reject_rest()
            return False
        self._announces_end = not chunk and self._is_terminal
        return bool(chunk)


def _is_ready(fd: int, timeout_s: float = 0) -> bool:
    return bool(select.select([fd], [], [], timeout_s)[0])
