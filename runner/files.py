"""Files of a run's folder as bytes: one that only grows, and one that is replaced whole.

Owns complete writes and errors that name the file. It must not import torch, Hydra, OmegaConf or a sibling.
"""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


class AppendFile:
    """A file that only grows, without a buffer of its own: what was appended is visible to every reader.

    Raises: OSError naming the file, from each method, when the disk refuses.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        with _naming(path):
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o666)

    def append(self, data: bytes) -> None:
        """All of `data` is in the file; on an error a first part of it may be."""
        with _naming(self.path):
            _write_all(self._fd, data)

    def sync(self) -> None:
        """What was appended survives a loss of power."""
        with _naming(self.path):
            os.fsync(self._fd)

    def close(self) -> None:
        """The file takes no more; closing again does nothing."""
        if self._fd >= 0:
            fd, self._fd = self._fd, -1
            os.close(fd)


def replace_file(path: Path, chunks: Iterable[bytes]) -> None:
    """The file holds exactly `chunks`; a reader sees the old content or the new, never a part.

    Raises: OSError naming the file when it can't be written; the old content then stays.
    """
    beside = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with _naming(path):
        try:
            with open(beside, "wb") as file:
                file.writelines(chunks)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            beside.unlink(missing_ok=True)
            raise
        _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    fd = os.open(folder, os.O_RDONLY | os.O_CLOEXEC)
    try:
        os.fsync(fd)
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
        reason = f"{error.strerror}; what was written before stays: make the folder writable, then resume"
        raise OSError(error.errno, reason, str(path)) from error
