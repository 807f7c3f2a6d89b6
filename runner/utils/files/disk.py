"""Every operation of a run on its files that makes, opens, replaces, removes or synchronizes one: one function each.

A test that replaces these functions sees the operations in their order, and builds from them what a loss of power could
have left; each also raises an audit event, `runner.disk`, before it begins. Call them through the module. What is not
synchronized may be lost, and names may change in any order.

While `confine` is open for a folder, no operation below that folder follows a link out of it: each is done relative to
a handle of the folder, one component of the path at a time, so a link that is put there meanwhile is not followed.

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
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO, cast

_FOLDER = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
_GUARDS = os.O_NOFOLLOW | os.O_NONBLOCK | os.O_NOCTTY  # opening a pipe that nobody reads would block
_IS_LINK = "a link, which is not followed"
_IS_IRREGULAR = "no regular file"


def create(path: Path, mode: str) -> BinaryIO:
    """Opens a new file, or an emptied one, to write to: "xb", "wb", or one of these with a "+"."""
    sys.audit("runner.disk", "create", path)
    return cast(BinaryIO, open(path, mode, opener=_open))


def open_append(path: Path) -> int:
    """Opens a file to append to, which is made where it is not there; returns its descriptor."""
    sys.audit("runner.disk", "open_append", path)
    return _open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC)


def open_unsynced(path: Path, flags: int, mode: int = 0o666) -> int:
    """Opens a file that need not survive a loss of power, a lock or a log; returns its descriptor."""
    sys.audit("runner.disk", "open_unsynced", path)
    return _open(path, flags | os.O_CLOEXEC, mode)


def open_read(path: Path) -> BinaryIO:
    """Opens a file to read."""
    return cast(BinaryIO, open(path, "rb", opener=_open))


def make_folder(path: Path) -> None:
    """Makes a folder in one that is there."""
    sys.audit("runner.disk", "make_folder", path)
    with _entry(path) as (name, where):
        os.mkdir(name, **where)


def rename(old: Path, new: Path) -> None:
    """Renames a file or folder, in place of a file or link that has the name."""
    sys.audit("runner.disk", "rename", old, new)
    with _entry(old) as (source, source_where), _entry(new) as (target, target_where):
        places = {"src_dir_fd": source_where.get("dir_fd"), "dst_dir_fd": target_where.get("dir_fd")}
        os.replace(source, target, **{key: folder for key, folder in places.items() if folder is not None})


def unlink(path: Path) -> None:
    """Removes a file or link."""
    sys.audit("runner.disk", "unlink", path)
    with _entry(path) as (name, where):
        os.unlink(name, **where)


def remove_folder(path: Path) -> None:
    """Removes an empty folder."""
    sys.audit("runner.disk", "remove_folder", path)
    with _entry(path) as (name, where):
        os.rmdir(name, **where)


def sync_file(path: Path, descriptor: int | None = None) -> None:
    """Makes the content of a file survive a loss of power, by a descriptor where it is open; not its name."""
    sys.audit("runner.disk", "sync_file", path)
    if descriptor is not None:
        os.fsync(descriptor)
        return
    opened = _open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(opened)
    finally:
        os.close(opened)


def sync_folder(path: Path) -> None:
    """Makes the names in a folder survive a loss of power."""
    sys.audit("runner.disk", "sync_folder", path)
    with _folder(path) as descriptor:
        os.fsync(descriptor)


def list_folder(path: Path) -> list[tuple[str, bool]]:
    """Returns the names in a folder in order, each with a flag for a folder; a link is no folder, nor is `path` one."""
    if is_confined(path):
        with _folder(path) as folder:
            own = os.open(".", _FOLDER, dir_fd=folder)  # with a position that no other thread moves
    else:
        own = os.open(path, _FOLDER | os.O_NOFOLLOW)
    try:
        with os.scandir(own) as entries:
            return sorted((entry.name, entry.is_dir(follow_symlinks=False)) for entry in entries)
    finally:
        os.close(own)


def is_folder(path: Path) -> bool:
    """Says whether there is a folder.

    Raises:
        OSError: it, or a folder on the way to it, is a link that is not followed.
    """
    if not is_confined(path):
        return os.path.isdir(path)
    try:
        with _folder(path):
            return True
    except (FileNotFoundError, NotADirectoryError):
        return False


@contextmanager
def confine(root: Path, links: Mapping[str, str] = {}) -> Iterator[None]:
    """Keeps the operations of this process below a folder from following a link, for the length of a block.

    It holds for every thread and for paths that begin, as they are written, with the folder's own path or its real
    one. A link on the way is an OSError (ELOOP) that names the link, and a file to be opened that is a link, a pipe or
    a device is one as well. A link that is replaced, renamed or removed itself is not followed anyway. Once another
    folder has the path, operations fail as where the folder was deleted.

    Args:
        root: links on the way to the folder itself are followed once, now, unless another confined folder holds it.
        links: the folder that a link below `root` leads to, by the link's path relative to `root`: such a link is
            followed as long as it leads there.
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
            _roots = tuple(each for each in _roots if each is not added)


def is_confined(path: Path) -> bool:
    """Says whether a path is that of a confined folder, or below one."""
    return _find_root(path) is not None


class _Root:
    """A confined folder and its handle."""

    def __init__(self, root: Path, links: Mapping[str, str]) -> None:
        self._descriptor = -1
        self._path = os.path.abspath(root)
        self.prefixes = {os.path.join(path, "") for path in (self._path, os.path.realpath(self._path))}
        self._links = dict(links)
        with _folder(root) as descriptor:
            self._descriptor = os.dup(descriptor)

    def __del__(self) -> None:
        # Not at the end of `confine`: the number would be another file's while a thread still uses it.
        if self._descriptor >= 0:
            os.close(self._descriptor)

    @contextmanager
    def enter(self, names: Sequence[str]) -> Iterator[int]:
        """Yields the descriptor of a folder below, by the names that lead to it."""
        self._check_path()
        folder = self._descriptor
        try:
            for number, name in enumerate(names, 1):
                below = self._open_below(folder, name, os.path.join(*names[:number]))
                if folder != self._descriptor:
                    os.close(folder)
                folder = below
            yield folder
        finally:
            if folder != self._descriptor:
                os.close(folder)

    def _check_path(self) -> None:
        """Raises FileNotFoundError where the path is not the folder's any more: what is read by it is another's."""
        with suppress(FileNotFoundError):
            if os.path.samestat(os.stat(self._path), os.fstat(self._descriptor)):
                return
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self._path)

    def _open_below(self, folder: int, name: str, place: str) -> int:
        path = os.path.join(self._path, place)
        try:
            return os.open(name, _FOLDER | os.O_NOFOLLOW, dir_fd=folder)
        except OSError as error:
            if (target := _read_link(folder, name)) is None:
                raise OSError(error.errno, error.strerror, path) from None
        wanted = self._links.get(place)
        if wanted is None or os.path.realpath(os.path.join(os.path.dirname(path), target)) != wanted:
            raise OSError(errno.ELOOP, _IS_LINK, path)
        return os.open(wanted, _FOLDER | os.O_NOFOLLOW)


def _read_link(folder: int, name: str) -> str | None:
    try:
        return os.readlink(name, dir_fd=folder)
    except OSError:  # it is none
        return None


_roots: tuple[_Root, ...] = ()  # replaced whole: a thread or a signal handler looks through it without the lock
_lock = threading.Lock()


def _find_root(path: str | Path) -> tuple[_Root, list[str]] | None:
    """Returns the innermost confined folder that holds a path, the last to be confined first, and the names below."""
    roots = _roots
    if not roots:
        return None
    text = os.path.join(os.path.abspath(path), "")
    found = [(prefix, root) for root in reversed(roots) for prefix in root.prefixes if text.startswith(prefix)]
    if not found:
        return None
    prefix, root = max(found, key=lambda pair: len(pair[0]))
    return root, text[len(prefix) :].split(os.sep)[:-1]


@contextmanager
def _folder(path: Path) -> Iterator[int]:
    """Yields the descriptor of a folder."""
    if found := _find_root(path):
        root, names = found
        with root.enter(names) as descriptor:
            yield descriptor
        return
    descriptor = os.open(path, _FOLDER)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


@contextmanager
def _entry(path: str | Path) -> Iterator[tuple[str, dict[str, int]]]:
    """Yields a name and the folder that has it, as an argument of os; without that folder, the name is the path."""
    found = _find_root(path)
    if found is None or not found[1]:
        yield os.fspath(path), {}
        return
    root, names = found
    with root.enter(names[:-1]) as folder:
        try:
            yield names[-1], {"dir_fd": folder}
        except OSError as error:
            if error.filename != names[-1]:
                raise
            reason = _IS_LINK if error.errno == errno.ELOOP else error.strerror
            raise OSError(error.errno, reason, os.fspath(path)) from None


def _open(path: str | Path, flags: int, mode: int = 0o666) -> int:
    with _entry(path) as (name, where):
        if not where:
            return os.open(name, flags, mode)
        try:
            descriptor = os.open(name, (flags & ~os.O_TRUNC) | _GUARDS, mode, **where)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            raise OSError(errno.EINVAL, _IS_IRREGULAR, os.fspath(path)) from None  # a pipe or socket
    status = os.fstat(descriptor)
    if not stat.S_ISREG(status.st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, _IS_IRREGULAR, os.fspath(path))
    if status.st_nlink > 1 and flags & (os.O_APPEND | os.O_TRUNC):
        os.close(descriptor)
        _separate(Path(path))
        return _open(path, flags, mode)
    if flags & os.O_TRUNC:
        os.ftruncate(descriptor, 0)
    os.set_blocking(descriptor, True)
    return descriptor


def _separate(path: Path) -> None:
    """Makes a file that has other names, hard links, one of its own: what is written to it changes no other."""
    copied = path.with_name(f".{path.name}.{os.getpid()}.copied")
    with suppress(FileNotFoundError):
        unlink(copied)
    with open_read(path) as source, create(copied, "xb") as goal:
        while chunk := source.read(1 << 20):
            goal.write(chunk)
        goal.flush()
        os.fsync(goal.fileno())
    rename(copied, path)
    sync_folder(path.parent)
