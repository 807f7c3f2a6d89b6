"""The terminal of a program, which may be closed while the program runs. Imports the standard library alone."""

from __future__ import annotations

import errno
import io
import os
import sys
import termios
from typing import Any


def leave_closed() -> None:
    """Points standard streams at /dev/null where they lead to a terminal that was closed: writing would raise."""
    for fd in (0, 1, 2):
        try:
            termios.tcgetattr(fd)
        except termios.error as error:
            if error.args[0] == errno.EIO:
                null = os.open(os.devnull, os.O_RDWR)
                os.dup2(null, fd)
                os.close(null)


class _Terminal(io.FileIO):
    """A terminal to write to, and nothing once it is closed: it may be so before its SIGHUP is here."""

    def write(self, data: Any, /) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno != errno.EIO:
                raise
            leave_closed()
            return super().write(data)


def open_missing() -> None:
    """Opens /dev/null for each standard stream that was closed before the program began.

    A file of the program's would get its number, and hold what a C library prints.
    """
    for fd in (0, 1, 2):
        try:
            os.fstat(fd)
        except OSError:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free
            os.set_inheritable(null, True)


def escape_unencodable() -> None:
    """Has standard output escape what its encoding lacks, as standard error does: printing never raises for that."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def outlive() -> None:
    """Has `sys.stdout` and `sys.stderr` take what is printed after their terminal was closed."""
    open_missing()
    escape_unencodable()
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if not isinstance(stream, io.TextIOWrapper) or not stream.isatty():
            continue
        stream.flush()
        raw = _Terminal(stream.fileno(), "wb", closefd=False)
        is_unbuffered = isinstance(stream.buffer, io.RawIOBase)
        buffer: Any = raw if is_unbuffered else io.BufferedWriter(raw)
        wrapped = io.TextIOWrapper(
            buffer, encoding=stream.encoding, errors=stream.errors, line_buffering=stream.line_buffering,
            write_through=stream.write_through,
        )  # fmt: skip
        setattr(sys, name, wrapped)
