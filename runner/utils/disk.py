"""Every change that a run makes to the names and the durability of its files: one function each.

A test that replaces these functions sees the operations in their order, and builds from them what a loss of power could
have left. Call them through the module. What is not synchronized may be lost, and names may change in any order.

Source: T. S. Pillai et al., All File Systems Are Not Created Equal (ALICE), OSDI 2014, and J. Mohan et al., Finding
Crash-Consistency Bugs with Bounded Black-Box Crash Testing (CrashMonkey), OSDI 2018, for what may be lost;
https://sqlite.org/atomiccommit.html for the order of writing, flushing and naming.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import BinaryIO, cast


def create(path: Path, mode: str) -> BinaryIO:
    """Opens a new file, or an emptied one, to write to: "xb", "wb", or one of these with a "+"."""
    return cast(BinaryIO, open(path, mode))


def open_append(path: Path) -> int:
    """Opens a file to append to, which is made where it is not there; returns its descriptor."""
    return os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)


def make_folder(path: Path) -> None:
    """Makes a folder in one that is there."""
    os.mkdir(path)


def rename(old: Path, new: Path) -> None:
    """Renames a file or folder, in place of a file that has the name."""
    os.replace(old, new)


def unlink(path: Path) -> None:
    """Removes a file or link."""
    os.unlink(path)


def remove_folder(path: Path) -> None:
    """Removes an empty folder."""
    os.rmdir(path)


def sync_file(path: Path, descriptor: int | None = None) -> None:
    """Makes the content of a file survive a loss of power, by a descriptor where it is open; not its name."""
    if descriptor is None:
        _sync(path)
    else:
        os.fsync(descriptor)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a loss of power."""
    _sync(path)


def _sync(path: Path) -> None:
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
