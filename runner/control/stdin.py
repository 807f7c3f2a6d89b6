"""Lines from a descriptor, read in a thread that a forked worker, a background job or garbage can't harm.

It imports the standard library only, nothing of `runner`. It reads on POSIX systems.
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
_MAX_REFUSED = 100  # lines in a row; an input with more is something else than commands
_DRAIN_S = 0.05  # spent at most on what already lies in a pipe or file when a run starts
_BACKGROUND_S = 0.25  # between two looks at whether this process came to the foreground
_PEEK_S = 0.1  # between two looks at a pipe whose first line has not ended yet
_LONGEST_BYTES = 4096  # a first line that is longer is no command
_ROOM_S = 0.05  # between two looks at whether there is room for another line
_BURST = 1000  # lines that are taken at once; then so many a second:
_LINES_PER_S = 2.0
_NONBLOCK = 2  # SPLICE_F_NONBLOCK
_tee = getattr(ctypes.CDLL(None, use_errno=True), "tee", None)  # Linux has it
if _tee is not None:
    _tee.argtypes = (ctypes.c_int, ctypes.c_int, ctypes.c_size_t, ctypes.c_uint)
    _tee.restype = ctypes.c_ssize_t


def is_terminal_or_pipe(fd: int) -> bool:
    """Says whether somebody may type commands there: not in a regular file, a socket or /dev/null."""
    return os.isatty(fd) or stat.S_ISFIFO(os.fstat(fd).st_mode)


def peek(fd: int) -> bytes:
    """Returns what lies in a pipe, up to 64 KiB, and leaves it there.

    Source: tee(2), https://man7.org/linux/man-pages/man2/tee.2.html

    Raises:
        OSError: the system has no such call, or `fd` is no pipe.
    """
    if _tee is None:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
    ours, theirs = os.pipe()
    try:
        size = _tee(fd, theirs, READ_BYTES, _NONBLOCK)
        if size < 0 and ctypes.get_errno() != errno.EAGAIN:
            raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
        return os.read(ours, size) if size > 0 else b""
    finally:
        os.close(ours)
        os.close(theirs)


class LineReader:
    """Reads lines from a descriptor that it owns, in a daemon thread.

    It waits without the lock of a stream: a worker process forked meanwhile closes its copy of `sys.stdin`,
    and would wait for that lock for ever.

    Args:
        take: called with each line; returns whether it was a command or blank.
        answer: called with what a person should know.
        is_command: says whether the first line of a pipe is a command. Where it is none, the pipe is somebody else's,
            such as a shell's loop over its lines, and nothing of it is read. None reads any pipe.
        refuse: called with the reason why a pipe is not read.
        has_room: says whether another line may be taken. Until then, what follows stays unread: whoever writes waits.
    """

    def __init__(
        self,
        fd: int,
        take: Callable[[str], bool],
        answer: Callable[[str], None],
        is_command: Callable[[str], bool] | None = None,
        refuse: Callable[[str], None] | None = None,
        has_room: Callable[[], bool] = lambda: True,
    ) -> None:
        self._fd, self._take, self._answer = fd, take, answer
        self._has_room = has_room
        self._allowance, self._allowed_at = float(_BURST), time.monotonic()  # lines that may be taken now
        self._lines: deque[bytes] = deque()  # read, and not taken yet
        self._refuse = refuse or answer
        self._is_terminal = os.isatty(fd)
        self._is_command = None if self._is_terminal else is_command  # until the first line of a pipe is known
        self._woken, self._wake = os.pipe()
        self._rest = b""  # of the line that no newline has ended yet
        self._refused = 0  # lines in a row
        self._is_open, self._is_ended = True, False  # the input has ended
        self._tells_end = self._is_wait_told = False
        self._thread = threading.Thread(target=self._run, name="commands", daemon=True)

    def start(self) -> None:
        if self._is_command is not None and not self._may_begin():
            self._thread.start()
            return
        deadline = 0 if self._is_terminal else time.monotonic() + _DRAIN_S
        self._serve(lambda: time.monotonic() < deadline and bool(select.select([self._fd], [], [], 0)[0]), _never)
        self._thread.start()

    def close(self) -> None:
        os.write(self._wake, b"\0")  # closing would not do: a forked worker may hold this end open too
        if self._thread is not threading.current_thread():
            self._thread.join(timeout=1)
        if not self._thread.is_alive():  # one that is still answering goes on to look at what it reads from
            for fd in (self._fd, self._woken, self._wake):
                os.close(fd)

    def _run(self) -> None:
        # If the process leaves the foreground between the look and the read, that read fails; nothing stops.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTTIN})
        while self._is_open and self._is_command is not None:
            ready = select.select([self._woken, self._fd], [], [])[0]
            # What is peeked at stays there, so that the pipe is ready at once again.
            if self._woken in ready or (not self._may_begin() and select.select([self._woken], [], [], _PEEK_S)[0]):
                return
        self._serve(self._wait, self._wait_for_room)

    def _may_begin(self) -> bool:
        """Says whether the first line of the pipe is known to be a command; where it is none, the reading ends."""
        try:
            has_ended = any(events & select.POLLHUP for _, events in self._poll())
            content = peek(self._fd)
        except OSError as error:
            self._end(f"standard input is a pipe that can't be looked into ({error.strerror})")
            return False
        *lines, rest = content.split(b"\n")
        if has_ended or len(rest) > _LONGEST_BYTES or len(content) >= READ_BYTES:
            lines.append(rest)
        texts = [line.decode(errors="replace").partition("#")[0].strip() for line in lines]
        first = next(filter(None, texts), None)
        if first is None:
            self._is_open = not has_ended
            return False
        assert self._is_command is not None
        if not self._is_command(first):
            shown = repr(first if len(first) <= 60 else first[:60] + "…")
            self._end(f"standard input is a pipe whose first line {shown} is no command")
            return False
        self._is_command = None
        return True

    def _poll(self) -> list[tuple[int, int]]:
        poll = select.poll()
        poll.register(self._fd, select.POLLIN)
        return poll.poll(0)

    def _end(self, reason: str) -> None:
        self._is_open = False
        self._refuse(f"{reason}: nothing of it is read; tracking.stdin=true reads it, tracking.stdin=false is silent")

    def _serve(self, may_read: Callable[[], bool], may_wait: Callable[[], bool]) -> None:
        """Takes lines and reads on, as long as the two functions say that it may read, and wait for room."""
        try:
            while self._is_open and self._take_lines(may_wait) and may_read():
                self._is_ended = not self._read()
                self._is_open = not self._is_ended or bool(self._lines)
        except (OSError, ValueError) as error:
            self._is_open = False
            self._answer(f"commands are no longer read: {error}")

    def _take_lines(self, may_wait: Callable[[], bool]) -> bool:
        """Takes the lines that were read; returns whether all are taken and more may be read."""
        while self._lines:
            if not self._may_take():
                self._tell_wait()
                if not may_wait():
                    return False
                continue
            self._allowance -= 1
            line = self._lines.popleft()
            self._refused = 0 if self._take(line.decode(errors="replace")) else self._refused + 1
            if self._refused >= _MAX_REFUSED:
                self._refuse_rest()
                return False
        if self._is_ended:
            self._is_open = False
            if self._tells_end:
                self._answer("end of input: no more commands are read")
        return self._is_open

    def _tell_wait(self) -> None:
        if not self._is_wait_told:
            self._is_wait_told = True
            self._answer(f"{_BURST} commands at once: the rest is read as these are done, {_LINES_PER_S:g} a second")

    def _may_take(self) -> bool:
        now = time.monotonic()
        self._allowance = min(_BURST, self._allowance + (now - self._allowed_at) * _LINES_PER_S)
        self._allowed_at = now
        return self._allowance >= 1 and self._has_room()

    def _wait_for_room(self) -> bool:
        """Waits a moment; returns whether to go on, or `close` was called."""
        return not select.select([self._woken], [], [], _ROOM_S)[0]

    def _refuse_rest(self) -> None:
        self._is_open = False
        self._lines.clear()
        self._answer(f"{_MAX_REFUSED} lines in a row were no commands: this input is read no further")

    def _wait(self) -> bool:
        """Blocks until there is something to read (True) or `close` is called (False)."""
        while True:
            is_ours = self._is_foreground()
            watched = [self._woken, self._fd] if is_ours else [self._woken]
            ready = select.select(watched, [], [], None if is_ours else _BACKGROUND_S)[0]
            if self._woken in ready:
                return False
            if ready and self._is_foreground():
                return True

    def _is_foreground(self) -> bool:
        """Whether this process may read: a background job that reads its terminal is stopped."""
        try:
            return not self._is_terminal or os.tcgetpgrp(self._fd) == os.getpgrp()
        except OSError:  # not this session's terminal, so without job control, or gone, which the read will tell
            return True

    def _read(self) -> bool:
        """Takes what is there; returns whether more may come."""
        try:
            chunk = os.read(self._fd, READ_BYTES)
        except BlockingIOError:
            return True
        except OSError:
            return not self._is_foreground()
        *lines, rest = (self._rest + (chunk or b"\n")).split(b"\n")
        self._rest = rest[: READ_BYTES + 1]
        self._lines += lines
        self._refused += len(rest) > READ_BYTES
        if self._refused >= _MAX_REFUSED:
            self._refuse_rest()
            return False
        self._tells_end = not chunk and self._is_terminal
        return bool(chunk)


def _never() -> bool:
    return False
