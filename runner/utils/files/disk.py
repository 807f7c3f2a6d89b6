"""File operations of a run: one function for each kind that creates, opens, renames, removes or flushes a file.

Call them through the module: a test that replaces them records the operations and simulates a loss of power. Each also
raises the audit event `runner.disk` before it begins. Data that is not flushed may be lost, and names may reach the
disk in any order.

Inside a `confine` block, no operation below the folder follows a link out of it. Operations run relative to a handle of
the folder, one component of the path at a time, so a link that is created meanwhile is not followed either.

Source: T. S. Pillai et al., All File Systems Are Not Created Equal (ALICE), OSDI 2014, and J. Mohan et al., Finding
Crash-Consistency Bugs with Bounded Black-Box Crash Testing (CrashMonkey), OSDI 2018, for what may be lost;
https://sqlite.org/atomiccommit.html for the order of writing, flushing and naming; openat(2), "Rationale for openat()",
https://man7.org/linux/man-pages/man2/openat.2.html, for operations relative to a handle.
"""

from __future__ import annotations

import errno
import os
import stat
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

_FOLDER_FLAGS = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_SAFE_FLAGS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY  # opening a pipe that nobody reads would block
_IS_LINK = "a link, which is not followed"
_IS_IRREGULAR = "no regular file"


def create(path: Path, mode: str) -> BinaryIO:
    """Opens a new or truncated file for writing; `mode` is "xb", "wb", "x+b" or "w+b"."""
    sys.audit("runner.disk", "create", path)
    return cast(BinaryIO, open(path, mode, opener=_open))


def open_append(path: Path) -> int:
    """Opens a file for appending, creating it if needed; returns its descriptor."""
    sys.audit("runner.disk", "open_append", path)
    return _open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)


def open_unsynced(path: Path, flags: int, mode: int = 0o666) -> int:
    """Opens a file that need not survive a loss of power, such as a lock or log; returns its descriptor."""
    sys.audit("runner.disk", "open_unsynced", path)
    return _open(path, flags | os.O_CLOEXEC, mode)


def open_read(path: Path) -> BinaryIO:
    """Opens a file for reading."""
    return cast(BinaryIO, open(path, "rb", opener=_open))


def make_folder(path: Path) -> None:
    """Creates a folder in an existing one."""
    sys.audit("runner.disk", "make_folder", path)
    with _parent_handle(path) as (name, where):
        os.mkdir(name, **where)


def rename(old: Path, new: Path) -> None:
    """Renames a file or folder, replacing a file or link of the new name."""
    sys.audit("runner.disk", "rename", old, new)
    with _parent_handle(old) as (source, source_where), _parent_handle(new) as (target, target_where):
        os.replace(source, target, src_dir_fd=source_where.get("dir_fd"), dst_dir_fd=target_where.get("dir_fd"))


def unlink(path: Path) -> None:
    """Removes a file or link."""
    sys.audit("runner.disk", "unlink", path)
    with _parent_handle(path) as (name, where):
        os.unlink(name, **where)


def remove_folder(path: Path) -> None:
    """Removes an empty folder."""
    sys.audit("runner.disk", "remove_folder", path)
    with _parent_handle(path) as (name, where):
        os.rmdir(name, **where)


def sync_file(path: Path, descriptor: int | None = None) -> None:
    """Flushes the content of a file to disk, through its descriptor if it is open; not its name."""
    sys.audit("runner.disk", "sync_file", path)
    if descriptor is not None:
        os.fsync(descriptor)
    else:
        with open_read(path) as file:
            os.fsync(file.fileno())


def sync_folder(path: Path) -> None:
    """Flushes the names in a folder to disk."""
    sys.audit("runner.disk", "sync_folder", path)
    with _folder_handle(path) as descriptor:
        os.fsync(descriptor)


def list_folder(path: Path) -> list[tuple[str, bool]]:
    """Returns the sorted names in a folder, each with True for a folder. A link counts as no folder, as does `path`."""
    if is_confined(path):
        with _folder_handle(path) as folder:
            # Opened anew: threads that share a handle would share its position in the listing.
            descriptor = os.open(".", _FOLDER_FLAGS, dir_fd=folder)
    else:
        descriptor = os.open(path, _FOLDER_FLAGS | os.O_NOFOLLOW)
    try:
        with os.scandir(descriptor) as entries:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    finally:
        os.close(descriptor)


def is_folder(path: Path) -> bool:
    """Returns whether a path is a folder.

    Raises:
        OSError: the path is confined, and it or one of its parents is a link.
    """
    if not is_confined(path):
        return os.path.isdir(path)
    try:
        with _folder_handle(path):
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def confine(root: Path, links: Mapping[str, str] = {}) -> Iterator[None]:
    """Keeps the operations of this process below a folder from following links, during a block.

    It applies to every thread, and to paths that begin literally with the folder's path or its real path. A link among
    the parents is an OSError (ELOOP) with the link's path. Opening a link, pipe or device is an OSError as well.
    Replacing, renaming and removing a link never follow it. If another folder takes the path, operations fail as if the
    folder had been deleted.

    Args:
        root: the folder; links in its own path are followed once, now, unless another confined folder contains it.
        links: permitted links: by path relative to `root`, the target folder. They are followed as long as they lead
            there.
    Raises:
        OSError: the folder can't be opened.
    """
    global _roots
    added = _Root(root, links)
    with _lock:
        _roots = (*_roots, added)
    try:
        yield
    finally:
        with _lock:
            _roots = tuple(entry for entry in _roots if entry is not added)


def is_confined(path: Path) -> bool:
    """Returns whether a path is a confined folder or below one."""
    return _find_root(path) is not None


class _Root:
    def __init__(self, root: Path, links: Mapping[str, str]) -> None:
        self._descriptor = -1
        self._path = os.path.abspath(root)
        self.prefixes = {os.path.join(path, "") for path in (self._path, os.path.realpath(self._path))}
        self._links = dict(links)
        with _folder_handle(root) as descriptor:
            self._descriptor = os.dup(descriptor)

    def __del__(self) -> None:
        # Not at the end of `confine`: a thread may still use the descriptor, whose number a new file could get.
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @contextmanager
    def enter(self, names: Sequence[str]) -> Iterator[int]:
        """Yields the descriptor of a subfolder, given the names on its path."""
        self._check_path()
        folder = self._descriptor
        with ExitStack() as opened:
            for number, name in enumerate(names, 1):
                folder = self._open_below(folder, name, os.path.join(*names[:number]))
                opened.callback(os.close, folder)
            yield folder

    def _check_path(self) -> None:
        """Raises FileNotFoundError if another folder has taken the path."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                return
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._path)

    def _open_below(self, folder: int, name: str, relative: str) -> int:
        path = os.path.join(self._path, relative)
        try:
            return os.open(name, _FOLDER_FLAGS | os.O_NOFOLLOW, dir_fd=folder)
        except OSError as error:
            try:
                target = os.readlink(name, dir_fd=folder)
            except OSError:  # no link
                raise OSError(error.errno, error.strerror, path) from None
        permitted = self._links.get(relative)
        if permitted is None or os.path.realpath(os.path.join(os.path.dirname(path), target)) != permitted:
            raise OSError(errno.ELOOP, _IS_LINK, path)
        return os.open(permitted, _FOLDER_FLAGS | os.O_NOFOLLOW)


_roots: tuple[_Root, ...] = ()  # replaced as a whole: threads and signal handlers read it without the lock
_lock = threading.Lock()


def _find_root(path: str | Path) -> tuple[_Root, list[str]] | None:
    """Returns the innermost confined folder of a path, and the path's names below it; None if it is not confined.

    Of equal folders the one confined last is returned.
    """
    if not _roots:
        return None
    text = os.path.join(os.path.abspath(path), "")
    containing = [(prefix, root) for root in reversed(_roots) for prefix in root.prefixes if text.startswith(prefix)]
    if not containing:
        return None
    prefix, root = max(containing, key=lambda pair: len(pair[0]))
    return root, text[len(prefix) :].split(os.sep)[:-1]


@contextmanager
def _folder_handle(path: Path) -> Iterator[int]:
    if confined := _find_root(path):
        root, names = confined
        with root.enter(names) as descriptor:
            yield descriptor
        return
    descriptor = os.open(path, _FOLDER_FLAGS)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _parent_handle(path: str | Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields a path's name and `{"dir_fd": handle of its parent}`; for an unconfined path, the path and {}."""
    confined = _find_root(path)
    if confined is None or not confined[1]:  # the confined folder itself has no parent below it
        yield os.fspath(path), {}
        return
    root, names = confined
    with root.enter(names[:-1]) as folder:
        try:
            yield names[-1], {"dir_fd": folder}
        except OSError as error:
            if error.filename != names[-1]:
                raise
            reason = _IS_LINK if error.errno == errno.ELOOP else error.strerror
            raise OSError(error.errno, reason, os.fspath(path)) from None


def _open(path: str | Path, flags: int, mode: int = 0o666) -> int:
    with _parent_handle(path) as (name, where):
        if not where:
            return os.open(name, flags, mode)
        try:
            descriptor = os.open(name, (flags & ~os.O_TRUNC) | _SAFE_FLAGS, mode, **where)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            raise OSError(errno.EINVAL, _IS_IRREGULAR, os.fspath(path)) from None  # ENXIO: a pipe or socket
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, _IS_IRREGULAR, os.fspath(path))
    if status.st_nlink > 1 and flags & (os.O_APPEND | os.O_TRUNC):
        os.close(descriptor)
        _break_hard_links(Path(path))
        return _open(path, flags, mode)
    if flags & os.O_TRUNC:
        os.ftruncate(descriptor, 0)
    os.set_blocking(descriptor, True)
    return descriptor


def _break_hard_links(path: Path) -> None:
    """Replaces a file that has several hard links by a copy, so that writing to it changes no other file."""
    copied = path.with_name(f".{path.name}.{os.getpid()}.copied")
    with suppress(FileNotFoundError):
        unlink(copied)
    with open_read(path) as source, create(copied, "xb") as target:
        while chunk := source.read(1 << 20):
            target.write(chunk)
        target.flush()
        os.fsync(target.fileno())
    rename(copied, path)
    sync_folder(path.parent)
