"""Loader workers that are kept between passes over a dataset, and begin each pass in the state of new workers.

A new worker has a copy of the dataset as this process has it, and generators that its number decides. A kept worker
receives that copy, pickled, with its first batch of a pass. It is not kept if the copy would not be exact.
"""

import io
import pickle
import random
import sys
import warnings
from dataclasses import dataclass
from types import NoneType
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

MOST_BYTES = 4 << 20  # of the pickled copy: then it takes less time than a new worker
_LIBRARIES = {*sys.stdlib_module_names, "torch", "numpy"}  # whose own ways of pickling are exact
# Methods with which a class may leave attributes out of a copy, or affect others when a copy is dropped.
_METHODS = ("__reduce_ex__", "__reduce__", "__getstate__", "__setstate__", "__del__")


class _UnsuitableError(Exception):
    """An object whose pickled copy may differ from it, or is too large."""


@dataclass(frozen=True)
class FirstPlan:
    """The first plan of a worker in a pass.

    Attributes:
        fetcher: pickled, as this process has it now; None if the worker is new.
    """

    plan: Any
    fetcher: bytes | None


class KeptFetcher(Dataset[Any]):
    """Fetches planned batches in a worker; at each `FirstPlan` as a new worker would.

    Args:
        fetcher: called with each plan.
    """

    def __init__(self, fetcher: Dataset[Any]) -> None:
        self._fetcher = fetcher
        self._states: tuple[Any, ...] | None = None  # of the worker's generators when it was new

    def __getitem__(self, plan: Any) -> Any:
        if isinstance(plan, FirstPlan):
            if self._states is None:
                self._states = random.getstate(), np.random.get_state(), torch.get_rng_state()
            if plan.fetcher is not None:
                self._fetcher = pickle.loads(plan.fetcher)
                python_state, numpy_state, torch_state = self._states
                random.setstate(python_state)
                np.random.set_state(numpy_state)
                torch.set_rng_state(torch_state)
            plan = plan.plan
        return self._fetcher[plan]


def pickle_exactly(fetcher: Any) -> bytes | None:
    """Returns an object pickled; None if a copy may differ from it, is larger than `MOST_BYTES`, or can't be made."""
    file = _BoundedFile()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            _ExactPickler(file, pickle.HIGHEST_PROTOCOL).dump(fetcher)
            pickle.loads(file.getvalue())
    except Exception:  # of any class's own methods
        return None
    return file.getvalue()


class _BoundedFile(io.BytesIO):
    def write(self, content: Any, /) -> int:
        if self.tell() + len(content) > MOST_BYTES:
            raise _UnsuitableError
        return super().write(content)


class _ExactPickler(pickle.Pickler):
    """Pickles objects by all their attributes; refuses others, and large arrays before they are copied."""

    def reducer_override(self, obj: Any) -> Any:
        """Leaves it to pickle to reduce an object.

        Raises:
            _UnsuitableError: its copy may differ from it, or is too large.
        """
        if isinstance(obj, Tensor):
            is_large = obj.untyped_storage().nbytes() > MOST_BYTES
            if is_large or obj.is_shared() or not obj.is_cpu:
                raise _UnsuitableError
        if isinstance(obj, np.ndarray) and (obj.nbytes > MOST_BYTES or _is_in_foreign_memory(obj)):
            raise _UnsuitableError
        if not isinstance(obj, type) and not all(_is_of_library(type(obj), name) for name in _METHODS):
            raise _UnsuitableError
        return NotImplemented


def _is_in_foreign_memory(array: np.ndarray) -> bool:
    """Returns whether an array shows memory that may be shared between processes, such as that of a file."""
    base: Any = array
    while isinstance(base, np.ndarray):
        base = base.base
    return not isinstance(base, (bytes, bytearray, NoneType))


def _is_of_library(kind: type[Any], name: str) -> bool:
    """Returns whether a method of a class, or the lack of it, comes from Python, torch or NumPy."""
    owner = next((base for base in kind.__mro__ if name in vars(base)), object)
    package = owner.__module__.partition(".")[0]
    return package in _LIBRARIES or package.startswith("_cython")  # NumPy's functions
