"""Files that are replaced whole, files that only grow, files that one process holds, and files read within bounds.

Owns the order of writing, flushing and renaming, by the operations of `disk`. It runs on POSIX systems.
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

_EAGER_BYTES = 8 << 20
_MOST_LEVELS = 64  # of folders in folders
_MOST_SKIPPED_BYTES = 256 << 20
_WRITE = 2  # SYNC_FILE_RANGE_WRITE: begin, and don't wait
_begin_writeback = getattr(ctypes.CDLL(None), "sync_file_range", None)
if _begin_writeback is not None:
    _begin_writeback.argtypes = (ctypes.c_int, ctypes.c_int64, ctypes.c_int64, ctypes.c_uint)


class UnreadableError(OSError):
    """A path that is no regular file, or a file that is larger than its reader takes; `strerror` says which."""

    def __init__(self, path: str | os.PathLike[str], reason: str) -> None:
        super().__init__(errno.EINVAL, reason, os.fspath(path))

    def __str__(self) -> str:
        """Returns the path and the reason."""
        return f"{self.filename}: {self.strerror}"


class AppendFile:
    """A file that only grows, without a buffer of its own: what was appended is visible to every reader.

    Raises:
        OSError: naming the file, from each method, when the disk refuses or the file was deleted meanwhile.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _naming(path):
            self._fd = disk.open_append(path)
            disk.sync_folder(path.parent)

    def append(self, data: bytes) -> None:
        """All of `data` is in the file; on an error a first part of it may be."""
        with _naming(self.path):
            if not os.fstat(self._fd).st_nlink:
                raise FileNotFoundError(2, "it was deleted while it was written to")
            _write_all(self._fd, data)

    def sync(self) -> None:
        """What was appended survives a loss of power."""
        with _naming(self.path):
            disk.sync_file(self.path, self._fd)

    def close(self) -> None:
        """The file takes no more; closing again does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


class EagerFile:
    """A file open for writing whose content the kernel begins to put on disk while more is written.

    So the flush at the end has less to wait for: a third of the time for a gigabyte. Where the kernel has no such
    call, it is the file itself.
    """

    def __init__(self, file: BinaryIO) -> None:
        self._file = file
        self._begun = 0

    def write(self, data: Any) -> int:
        """Writes all of `data`."""
        count = self._file.write(data)
        end = self._file.tell()
        if _begin_writeback is not None and end - self._begun >= _EAGER_BYTES:
            self._file.flush()
            _begin_writeback(self._file.fileno(), self._begun, end - self._begun, _WRITE)
            self._begun = end
        return count

    def __getattr__(self, name: str) -> Any:
        return getattr(self._file, name)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Gives a path beside `path` to write to, which takes its place, flushed to disk, when the block ends well.

    Links are followed, but below a folder to which `disk.confine` holds: there a link at `path` is replaced itself.
    Where the block raises, the old file stays and the new one goes. The folder must exist: a writer that made it would
    bring back one that was deleted while the program ran.
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
    """The file holds exactly `chunks`; a reader sees the old content or the new, never a part.

    Raises:
        OSError: naming the file, when its folder is gone or it can't be written; the old content then stays.
    """
    with _naming(path), atomic_path(path) as temporary, disk.create(temporary, "wb") as file:
        file.writelines(chunks)


def read_bounded(path: str | os.PathLike[str], max_bytes: int) -> bytes:
    """Returns the content of a regular file of at most `max_bytes`; returns or raises at once.

    Raises:
        UnreadableError: it is a link, FIFO, device, socket or folder, or is larger.
        OSError: it is not there, or the disk refuses.
    """
    with open_regular(path) as file:
        content = file.read(max_bytes + 1)
    if len(content) > max_bytes:
        raise UnreadableError(path, f"is larger than {max_bytes:,} bytes, the most that is read of such a file")
    return content


def open_regular(path: str | os.PathLike[str], *, follows_link: bool = False) -> BinaryIO:
    """Opens a regular file to read; opening a FIFO would wait for its writer, and opening a device acts on it.

    Args:
        follows_link: of the last name; links to the folders above it are always followed.
    Raises:
        UnreadableError: it is a link, FIFO, device, socket or folder.
        OSError: it is not there, or the disk refuses.
    """
    check_regular(path, follows_link=follows_link)
    flags = os.O_RDONLY | os.O_NONBLOCK | os.O_NOCTTY | os.O_CLOEXEC
    descriptor = os.open(path, flags if follows_link else flags | os.O_NOFOLLOW)
    try:
        _check_mode(path, os.fstat(descriptor).st_mode)  # another file may have taken its place
        return cast(BinaryIO, os.fdopen(descriptor, "rb"))
    except BaseException:
        os.close(descriptor)
        raise


def check_regular(path: str | os.PathLike[str], *, follows_link: bool = False) -> None:
    """Checks that a path is a regular file, for a reader that opens it by its name.

    Raises:
        UnreadableError: it is a link, FIFO, device, socket or folder.
        OSError: it is not there, or the disk refuses.
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
    """Yields the lines of a file with their ends, and None for each that is longer than `max_bytes`.

    After 256 MB of such lines it yields no more: a file of holes can be of any size.
    """
    num_skipped = 0
    while line := file.readline(max_bytes + 1):
        if len(line) <= max_bytes:
            yield line
            continue
        while num_skipped < _MOST_SKIPPED_BYTES and not line.endswith(b"\n") and (line := file.readline(max_bytes)):
            num_skipped += len(line)
        yield None
        if num_skipped >= _MOST_SKIPPED_BYTES:
            return


def make_folder(folder: Path, run: Path) -> None:
    """Makes a folder below a run's folder, and those between, but never the run's: once deleted, it stays deleted.

    Raises:
        FileNotFoundError: the run's folder does not exist.
        OSError: the folder is not below the run's.
    """
    if not Path(os.path.abspath(folder)).is_relative_to(os.path.abspath(run)):
        raise OSError(errno.EINVAL, "not a place in the run's folder", str(folder))
    if folder.parent != run:
        make_folder(folder.parent, run)
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
    """Makes a folder and those above it, their names flushed to disk.

    Raises:
        FileExistsError: it is there, where it is not to be, or is a file.
    """
    if folder.is_dir():
        if not exist_ok:
            raise FileExistsError(17, "it is there already", str(folder))
        return
    make_folders(folder.parent)
    try:
        disk.make_folder(folder)
    except FileExistsError:  # by another process, a moment ago
        if not exist_ok or not folder.is_dir():
            raise
    disk.sync_folder(folder.parent)


def remove_tree(folder: Path) -> None:
    """Removes a folder with all that is in it, as far as the disk lets it; no link is followed."""
    with suppress(OSError):
        files, folders = find_files(folder)
        for file in files:
            disk.unlink(file)
        for each in reversed(folders):
            disk.remove_folder(each)


def find_files(folder: Path) -> tuple[list[Path], list[Path]]:
    """Returns what is below a folder but for folders, and the folders: itself, then those in it, outermost first.

    No link is followed, and no folder entered that is over 64 levels down.
    """
    files, folders = list[Path](), [folder]
    for parent in folders:  # it grows
        if len(parent.parts) - len(folder.parts) > _MOST_LEVELS:
            continue
        for name, is_folder in disk.list_folder(parent):
            (folders if is_folder else files).append(parent / name)
    return files, folders


@contextmanager
def held(path: Path) -> Iterator[None]:
    """This process alone holds the file, which is made where it is not there, for the length of a block.

    The hold ends with the process, however that ends, and forked children have no part in it.

    Raises:
        BlockingIOError: another process holds it.
    """
    with _naming(path):
        fd = disk.open_unsynced(path, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        with _naming(path):
            fcntl.lockf(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(fd)


def _write_all(fd: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(fd, view) :]


@contextmanager
def _naming(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        is_named = error.filename is not None and Path(error.filename).name == path.name
        if is_named or error.errno == errno.ELOOP:  # which names a link on the way
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error
