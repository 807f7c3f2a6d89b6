"""Standard streams of a program whose terminal may be closed while it runs."""

from __future__ import annotations

import errno
import io
import os
import sys
import termios
from typing import Any


def redirect_closed_streams() -> None:
    """Redirects standard streams of a closed terminal to /dev/null, as writing to that terminal would raise."""
    for fd in (0, 1, 2):
        try:
            termios.tcgetattr(fd)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, fd)
                os.close(null)


class _Terminal(io.FileIO):
    """Writes to a terminal; discards output after the terminal was closed, even before its SIGHUP arrives."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            redirect_closed_streams()
            return super().write(data)


def prepare_streams() -> None:
    """Opens /dev/null for each standard stream that was closed before the program started.

    Otherwise a file of the program gets the stream's number, and what a C library prints ends up in it. Standard output
    escapes characters that its encoding lacks, as standard error does, instead of raising.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # `open` takes the lowest number that is free
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def survive_closed_terminal() -> None:
    """Makes `sys.stdout` and `sys.stderr` accept output after their terminal was closed."""
    prepare_streams()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or not stream.isatty():
            continue
        stream.flush()
        raw = _Terminal(stream.fileno(), "wb", closefd=False)
        buffer: Any = raw if isinstance(stream.buffer, io.RawIOBase) else io.BufferedWriter(raw)
        wrapped = io.TextIOWrapper(
            buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )  # fmt: skip
        setattr(sys, name, wrapped)
