"""Lines from a descriptor, read in a thread that a forked worker, a background job or garbage can't harm.

It imports the standard library only, nothing of `runner`. It reads on POSIX systems.
"""

from __future__ import annotations

import os
import select
import signal
import threading
import time
from collections.abc import Callable

READ_BYTES = 64 * 1024
_MAX_REFUSED = 100  # lines in a row; an input with more is something else than commands
_DRAIN_S = 0.05  # spent at most on what already lies in a pipe or file when a run starts
_BACKGROUND_S = 0.25  # between two looks at whether this process came to the foreground


class Reader:
    """Reads lines from a descriptor that it owns, in a daemon thread.

    It waits without the lock of a stream: a worker process forked meanwhile closes its copy of `sys.stdin`,
    and would wait for that lock for ever.
    """

    def __init__(self, fd: int, take: Callable[[str], bool], answer: Callable[[str], None]) -> None:
        self._fd, self._take, self._answer = fd, take, answer
        self._is_terminal = os.isatty(fd)
        self._woken, self._wake = os.pipe()
        self._rest = b""  # of the line that no newline has ended yet
        self._refused = 0  # lines in a row
        self._is_open = True
        self._thread = threading.Thread(target=self._run, name="commands", daemon=True)

    def start(self) -> None:
        deadline = 0 if self._is_terminal else time.monotonic() + _DRAIN_S
        self._serve(lambda: time.monotonic() < deadline and bool(select.select([self._fd], [], [], 0)[0]))
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
        self._serve(self._wait)

    def _serve(self, may_read: Callable[[], bool]) -> None:
        try:
            while self._is_open and may_read():
                self._is_open = self._read()
        except (OSError, ValueError) as error:
            self._is_open = False
            self._answer(f"commands are no longer read: {error}")

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
        for line in lines:
            self._refused = 0 if self._take(line.decode(errors="replace")) else self._refused + 1
            if self._refused >= _MAX_REFUSED:
                break
        self._refused += len(rest) > READ_BYTES
        if self._refused >= _MAX_REFUSED:
            self._answer(f"{_MAX_REFUSED} lines in a row were no commands: this input is read no further")
            return False
        if not chunk and self._is_terminal:
            self._answer("end of input: no more commands are read")
        return bool(chunk)
