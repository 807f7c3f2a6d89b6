"""A dataset of the source code of Python's standard library."""

from __future__ import annotations

import os
import sysconfig
import zlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

SPLITS = ("train", "validation")
# Tests, installed packages, applications, and folders with mostly tables or generated code.
SKIPPED_FOLDERS = frozenset(
    {"__pycache__", "dist-packages", "encodings", "idle_test", "idlelib", "lib2to3", "pydoc_data"}
    | {"site-packages", "test", "tests", "turtledemo"}
)
GENERATED_PREFIX = "_sysconfigdata"
MAX_FILE_BYTES = 16 << 20
MAX_BYTES = 1 << 30  # of all files of a split
MAX_ENTRIES = 1_000_000  # of the folder and those below it


class SourceCode(Dataset[dict[str, Tensor]]):
    """Windows of bytes over the Python files under one folder, split by file.

    The files of a split form one stream, sorted by name, with a zero byte after each. Window `i` is the `context + 1`
    bytes from byte `i * context`. Neighbours share one byte, so each byte except the first is predicted once. A
    remainder shorter than a window is left out. A file's split depends only on its relative name, and is the same on
    every machine.

    Args:
        split: "train" or "validation".
        context: number of bytes that a model sees; a window has one more, for the last prediction.
        max_windows: maximum number of windows, evenly spaced over the stream; None: all.
        validation_fraction: share of the files that is for validation, 0 to 1.
        root: folder to read; None: the running interpreter's standard library.

    Raises:
        ValueError: an argument is out of range, or the split is shorter than a window.
        FileNotFoundError: there is no Python source under `root`.
    """

    def __init__(
        self,
        split: str = "train",
        context: int = 256,
        max_windows: int | None = None,
        validation_fraction: float = 0.05,
        root: str | None = None,
    ) -> None:
        self._settings = (split, context, max_windows, validation_fraction, root)
        if split not in SPLITS:
            raise ValueError(f"SourceCode: split is one of {', '.join(SPLITS)}, not {split!r}")
        if not _is_count(context) or not (max_windows is None or _is_count(max_windows)):
            found = f"{context!r:.60}, {max_windows!r:.60}"
            raise ValueError(f"SourceCode: context and max_windows are whole numbers, at least 1, not {found}")
        if type(validation_fraction) not in (int, float) or not 0 <= validation_fraction <= 1:
            raise ValueError(f"SourceCode: validation_fraction is 0 to 1, not {validation_fraction!r:.60}")
        folder = sysconfig.get_paths()["stdlib"] if root is None else os.fspath(root)
        names = list_sources(folder)
        if not names:
            raise FileNotFoundError(
                f"SourceCode: no Python source under {folder} (a frozen or zipped interpreter ships none); "
                "set root to a folder with .py files"
            )
        self.context = context
        self.files = [name for name in names if in_validation(name, validation_fraction) == (split == "validation")]
        self._stream = read_stream(folder, self.files)
        num_windows = max(len(self._stream) - 1, 0) // context
        if num_windows == 0:
            raise ValueError(
                f"SourceCode: the {split} split has {len(self.files)} of {len(names)} files and "
                f"{len(self._stream)} bytes, less than one window of {context + 1}; lower context or change "
                f"validation_fraction, now {validation_fraction}"
            )
        self._num_windows = num_windows
        self._num_kept = num_windows if max_windows is None else min(max_windows, num_windows)

    def __len__(self) -> int:
        return self._num_kept

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns one sample: `window`, uint8 [context + 1]."""
        if not 0 <= index < self._num_kept:
            raise IndexError(f"SourceCode: window {index} of {self._num_kept}")
        start = index * self._num_windows // self._num_kept * self.context
        # A view would take the whole stream along when a DataLoader worker sends the sample.
        return {"window": self._stream[start : start + self.context + 1].clone()}

    def __reduce__(self) -> tuple[Any, ...]:
        # Pickled as its settings: a spawned worker reads the files again in about 15 ms instead of receiving megabytes.
        return type(self), self._settings


def _is_count(value: object) -> bool:
    return type(value) is int and value >= 1


def list_sources(folder: str) -> list[str]:
    """Returns the sorted relative names, with forward slashes, of the Python files that the dataset reads.

    Raises:
        ValueError: the folder has too many entries, for example because links in it form a cycle.
    """
    names = []
    num_entries = 0
    pending = [""] if os.path.isdir(folder) else []  # some interpreters have a zipped library
    while pending:
        prefix = pending.pop()
        with os.scandir(os.path.join(folder, prefix)) as entries:
            for entry in entries:
                num_entries += 1
                if num_entries > MAX_ENTRIES:
                    raise ValueError(
                        f"SourceCode: {folder} has over {MAX_ENTRIES:,} entries; set root to a smaller folder"
                    )
                if entry.is_dir():
                    if entry.name not in SKIPPED_FOLDERS:
                        pending.append(f"{prefix}{entry.name}/")
                elif entry.name.endswith(".py") and not entry.name.startswith(GENERATED_PREFIX) and entry.is_file():
                    names.append(prefix + entry.name)
    return sorted(names)


def in_validation(name: str, fraction: float) -> bool:
    """Returns whether a file is for validation, by the checksum of its name: True for `fraction` of all names."""
    return zlib.crc32(name.encode()) < fraction * 2**32


def read_stream(folder: str, names: list[str]) -> Tensor:
    """Returns the bytes of the files in order, with a zero byte after each: uint8 [total].

    Raises:
        ValueError: a file, or all files together, are larger than the limit.
    """
    stream = bytearray()
    for name in names:
        with open(os.path.join(folder, name), "rb") as file:
            content = file.read(MAX_FILE_BYTES + 1)
        if len(content) > MAX_FILE_BYTES or len(stream) > MAX_BYTES:
            found = f"{name} is" if len(content) > MAX_FILE_BYTES else f"the files up to {name} are"
            limits = f"{MAX_FILE_BYTES:,} bytes, or all over {MAX_BYTES:,}"
            raise ValueError(f"SourceCode: {found} too large: no file may have over {limits}; set root to source code")
        stream += content
        stream.append(0)
    return torch.frombuffer(stream, dtype=torch.uint8) if stream else torch.empty(0, dtype=torch.uint8)
