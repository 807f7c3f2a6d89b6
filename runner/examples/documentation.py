"""A dataset of English prose: the chapters of Python's reference that `help()` shows."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset

from runner.examples.source_code import SPLITS, in_validation

MAX_CONTEXT = 1 << 20


class Documentation(Dataset[dict[str, Tensor]]):
    """Windows of bytes over the chapters in `pydoc_data.topics`, split by chapter.

    The chapters of a split form one stream, sorted by name, with a zero byte after each. Window `i` is the
    `context + 1` bytes from byte `i * context`.

    Args:
        split: "train" or "validation".
        context: number of bytes that a model sees; a window has one more, for the last prediction.
        max_windows: maximum number of windows, evenly spaced over the stream; None: all.
        validation_fraction: share of the chapters that is for validation, 0 to 1.

    Raises:
        ValueError: an argument is out of range, the split is shorter than a window, or this Python has no chapters.
    """

    def __init__(
        self, split: str = "train", context: int = 256, max_windows: int | None = None, validation_fraction: float = 0.2
    ) -> None:
        self._settings = (split, context, max_windows, validation_fraction)
        if split not in SPLITS:
            raise ValueError(f"Documentation: split is one of {', '.join(SPLITS)}, not {split!r:.60}")
        if type(context) is not int or not 1 <= context <= MAX_CONTEXT:
            raise ValueError(f"Documentation: context is a whole number from 1 to {MAX_CONTEXT}, not {context!r:.60}")
        if max_windows is not None and (type(max_windows) is not int or max_windows < 1):
            raise ValueError(f"Documentation: max_windows is a whole number from 1 on or null, not {max_windows!r:.60}")
        if type(validation_fraction) not in (int, float) or not 0 <= validation_fraction <= 1:
            raise ValueError(f"Documentation: validation_fraction is 0 to 1, not {validation_fraction!r:.60}")
        chapters = read_chapters()
        is_validation = split == "validation"
        names = [name for name in sorted(chapters) if in_validation(name, validation_fraction) == is_validation]
        stream = b"".join(chapters[name].encode() + b"\0" for name in names)
        self._num_windows = max(len(stream) - 1, 0) // context
        if not self._num_windows:
            found = f"{len(names)} chapters of {len(stream)} bytes"
            raise ValueError(f"Documentation: the {split} split has {found}, less than one window of {context + 1}")
        self.context = context
        self._stream = torch.frombuffer(bytearray(stream), dtype=torch.uint8)
        self._num_kept = min(max_windows or self._num_windows, self._num_windows)

    def __len__(self) -> int:
        return self._num_kept

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Returns one sample: `window`, uint8 [context + 1]."""
        if not 0 <= index < self._num_kept:
            raise IndexError(f"Documentation: window {index} of {self._num_kept}")
        start = index * self._num_windows // self._num_kept * self.context
        return {"window": self._stream[start : start + self.context + 1].clone()}

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), self._settings


def read_chapters() -> dict[str, str]:
    """Returns the chapters of Python's reference by name.

    Raises:
        ValueError: the running interpreter was installed without them.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError as error:
        raise ValueError("Documentation: this Python has no pydoc_data.topics, the text of help()") from error
    return topics
