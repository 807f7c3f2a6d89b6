"""Files: atomic replacement, appending, locking, and bounded reading, on POSIX systems.

Each function writes, flushes and renames in an order that survives a loss of power, by the operations of `disk`.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import secrets
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO, cast

from runner.utils.files import disk

_WRITEBACK_BYTES = 8 << 20
_MAX_DEPTH = 64  # levels of nested folders
_MAX_SKIPPED_BYTES = 256 << 20
_SYNC_FILE_RANGE_WRITE = 2  # of <fcntl.h>: start the writeback without waiting for it
_begin_writeback = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _begin_writeback is not None:
    _begin_writeback.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class UnreadableError(OSError):
    """A path that is no regular file, or a file larger than its limit; `strerror` is the reason."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(errno.EINVAL, reason, os.fspath(path))

    def __str__(self) -> str:
        return f"{self.filename}: {self.strerror}"


class AppendFile:
    """A file opened for appending, unbuffered: appended data is visible to every reader at once.

    Raises:
        OSError: from each method, with the file's path: the disk refuses, or the file was deleted meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with adding_path(path):
            self._fd = disk.open_append(path)
            disk.sync_folder(path.parent)

    def append(self, data: bytes) -> None:
        """Appends all of `data`; after an error, the file may end with a part of it."""
        with adding_path(self.path):
            if not os.fstat(self._fd).st_nlink:
                raise FileNotFoundError(2, "it was deleted while it was written to")
            rest = memoryview(data)
            while rest:
                rest = rest[os.write(self._fd, rest) :]

    def size(self) -> int:
        """Returns the size of the file in bytes."""
        return os.fstat(self._fd).st_size

    def truncate(self, size: int) -> None:
        """Cuts the file to `size` bytes."""
        with adding_path(self.path):
            os.ftruncate(self._fd, size)

    def sync(self) -> None:
        """Flushes the appended data to disk."""
        with adding_path(self.path):
            disk.sync_file(self.path, self._fd)

    def close(self) -> None:
        """Closes the file; closing it again does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class WritebackFile:
    """A wrapper of a file open for writing that starts the kernel's writeback every 8 MiB.

    The flush at the end then takes a third of the time for 1 GB. Without `sync_file_range`, which only Linux has, it
    writes to the file and no more.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._writeback_end = 0

    def write(self, data: Any) -> int:
        """Writes all of `data` and returns its size in bytes."""
        count = self._file.write(data)
        end = self._file.tell()
        if _begin_writeback is not None and end - self._writeback_end >= _WRITEBACK_BYTES:
            self._file.flush()
            _begin_writeback(
                self._file.fileno(), self._writeback_end, end - self._writeback_end, _SYNC_FILE_RANGE_WRITE
            )
            self._writeback_end = end
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yields a temporary path beside `path`; on success it is flushed to disk and renamed to `path`.

    If the block raises, the old file stays and the temporary one is removed. A link at `path` is followed, except below
    a folder confined by `disk.confine`, where it is replaced. The folder must exist: creating it here would bring back
    a run folder that was deleted while the program ran.
    """
    final = Path(path) if disk.is_confined(Path(path)) else Path(os.path.realpath(path))
    temporary = final.with_name(f".{secrets.token_hex(8)}.tmp")
    try:
        yield temporary
        disk.sync_file(temporary)
        disk.rename(temporary, final)
    except BaseException:
        if temporary.exists():
            disk.unlink(temporary)
        raise
    disk.sync_folder(final.parent)


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """Replaces the content of a file with `chunks`; a reader sees the old content or the new, never a part.

    Raises:
        OSError: with the file's path: its folder is gone or it can't be written; the old content stays.
    """
    with adding_path(path), atomic_path(path) as temporary, disk.create(temporary, "wb") as file:
        file.writelines(chunks)


def read_bounded(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Returns the content of a regular file of at most `max_bytes`, without blocking.

    Raises:
        UnreadableError: the path is a link, FIFO, device, socket or folder, or the file is larger.
        OSError: the file does not exist, or the disk refuses.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UnreadableError(path, f"is larger than {max_bytes:,} bytes, the most that is read of such a file")
    return content


def open_regular(path: str | os.PathLike[str], *, follows_link: bool = False) -> BinaryIO:
    """Opens a regular file for reading. Opening a FIFO would block, and opening a device may act on it.

    Args:
        follows_link: whether `path` may be a link; links among its parent folders are always followed.
    Raises:
        UnreadableError: the path is a link, FIFO, device, socket or folder.
        OSError: the file does not exist, or the disk refuses.
    """
    check_regular(path, follows_link=follows_link)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(path, flags if follows_link else flags | os.O_NOFOLLOW)
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)  # it may have been replaced since the first check
        return cast(BinaryIO, os.fdopen(descriptor, "rb"))
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | os.PathLike[str], *, follows_link: bool = False) -> None:
    """Checks that a path is a regular file, for a library that opens it by its name.

    Raises:
        UnreadableError: the path is a link, FIFO, device, socket or folder.
        OSError: the file does not exist, or the disk refuses.
    """
    _check_mode(path, os.stat(path, follow_symlinks=follows_link).st_mode)


def _check_mode(path: str | os.PathLike[str], mode: int) -> None:
    if not stat.S_ISREG(mode):
        raise UnreadableError(path, f"is {_KINDS.get(stat.S_IFMT(mode), 'a special file')}, expected a regular file")


_KINDS = {
    stat.S_IFLNK: "a link",
    stat.S_IFIFO: "a FIFO",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
    stat.S_IFDIR: "a folder",
}


def iterate_lines(file: BinaryIO, max_bytes: int) -> Iterator[bytes | None]:
    """Yields the lines of a file with their line ends, and None for each line longer than `max_bytes`.

    It stops after 256 MiB of such lines: a sparse file can have any size.
    """
    num_skipped = 0
    while line := file.readline(max_bytes + 1):
        if len(line) <= max_bytes:
            yield line
            continue
        while num_skipped < _MAX_SKIPPED_BYTES and not line.endswith(b"\n") and (line := file.readline(max_bytes)):
            num_skipped += len(line)
        yield None
        if num_skipped >= _MAX_SKIPPED_BYTES:
            return


def make_folder_below(folder: Path, run: Path) -> None:
    """Creates a folder below a run's folder, with its parents, but never the run's folder itself.

    A run's folder that was deleted stays deleted.

    Raises:
        FileNotFoundError: the run's folder does not exist.
        OSError: `folder` is not below `run`.
    """
    if not Path(os.path.abspath(folder)).is_relative_to(os.path.abspath(run)):
        raise OSError(errno.EINVAL, "not a place in the run's folder", str(folder))
    if folder.parent != run:
        make_folder_below(folder.parent, run)
    try:
        disk.make_folder(folder)
    except FileNotFoundError:
        raise FileNotFoundError(2, "the run's folder was deleted", str(run)) from None
    except FileExistsError:
        if not disk.is_folder(folder):
            raise
    else:
        disk.sync_folder(folder.parent)


def make_folders(folder: Path, exist_ok: bool = True) -> None:
    """Creates a folder and its parents, and flushes their names to disk.

    Raises:
        FileExistsError: the folder exists and `exist_ok` is False, or the path is a file.
    """
    if folder.is_dir():
        if not exist_ok:
            raise FileExistsError(17, "it is there already", str(folder))
        return
    make_folders(folder.parent)
    try:
        disk.make_folder(folder)
    except FileExistsError:  # another process has just created it
        if not exist_ok or not folder.is_dir():
            raise
    disk.sync_folder(folder.parent)


def remove_tree(folder: Path) -> None:
    """Removes a folder with its content, as far as the disk permits; follows no link."""
    with suppress(OSError):
        files, folders = list_tree(folder)
        for file in files:
            disk.unlink(file)
        for subfolder in reversed(folders):
            disk.remove_folder(subfolder)


def list_tree(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns the files and the folders of a tree: `folder` first, then its subfolders, outermost first.

    Links count as files and are not followed. Folders more than 64 levels down are not entered.
    """
    files, folders = list[Path](), [folder]
    for parent in folders:  # the list grows meanwhile
        if len(parent.parts) - len(folder.parts) > _MAX_DEPTH:
            continue
        for name, is_folder in disk.list_folder(parent):
            (folders if is_folder else files).append(parent / name)
    return files, folders


@contextmanager
def lock_file(path: Path) -> Iterator[None]:
    """Locks a file for this process during a block; the file is created if it does not exist.

    The lock ends with the process, even if that is killed. Forked children do not inherit it.

    Raises:
        BlockingIOError: another process has locked the file.
    """
    with adding_path(path):
        fd = disk.open_unsynced(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with adding_path(path):
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


@contextmanager
def adding_path(path: Path) -> Iterator[None]:
    """Adds the path to an OSError of the block that does not name it."""
    try:
        yield
    except OSError as error:
        is_named = error.filename is not None and Path(error.filename).name == path.name
        if is_named or error.errno == errno.ELOOP:  # the latter has the path of a link among the parents
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
