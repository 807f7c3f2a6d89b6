"""Compares a sample with the same one fetched again, in a process that leaves the dataset here as it is."""

from __future__ import annotations

import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

_DIFFERS, _MOST_S = 1, 30


class Repeated:
    """A forked process that fetches a sample again and compares the two; it ends after 30 s at the latest."""

    def __init__(self) -> None:
        self._pid: int | None = None

    def start(self, sample: Any, fetch: Callable[[], Any]) -> None:
        """Compares a sample with what `fetch` returns there."""
        if sys.platform != "linux":
            return
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of threads beside it, as a loader worker's fork has them too
            try:
                self._pid = os.fork()
            except OSError:  # no memory or process left
                return
        if self._pid == 0:
            _compare(sample, fetch)

    def has_differed(self) -> bool:
        """Says, once, whether the comparison has ended with two different samples."""
        if self._pid is None:
            return False
        try:
            pid, status = os.waitpid(self._pid, os.WNOHANG)
        except ChildProcessError:  # another has waited for it, or this is a copy in another process
            self._pid = None
            return False
        if not pid:
            return False
        self._pid = None
        return os.WIFEXITED(status) and os.WEXITSTATUS(status) == _DIFFERS


def _compare(sample: Any, fetch: Callable[[], Any]) -> None:
    """Ends this process with what the comparison gave; an error counts as no difference."""
    status = 0
    try:
        for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, signal.SIG_IGN)
        for number in (signal.SIGTERM, signal.SIGALRM):
            signal.signal(number, signal.SIG_DFL)
        signal.alarm(_MOST_S)
        torch.set_num_threads(1)  # those of the forking process are not here
        silent = os.open(os.devnull, os.O_WRONLY)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        status = 0 if is_same(sample, fetch()) else _DIFFERS
    except BaseException:  # the dataset's, which may fail in another process
        pass
    finally:
        os._exit(status)


def is_same(one: Any, other: Any) -> bool:
    """Says whether two samples are the same as far as they consist of containers, arrays, numbers and texts."""
    if type(one) is not type(other):
        return False
    if isinstance(one, torch.Tensor):
        if one.layout is not torch.strided or one.shape != other.shape or one.dtype != other.dtype:
            return one.layout is not torch.strided
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, np.ndarray):
        if one.dtype.hasobject or one.shape != other.shape:
            return one.dtype.hasobject
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (str, bytes, int, float, complex, np.generic)):
        return bool(one == other or (one != one and other != other))
    if isinstance(one, Sequence):
        return len(one) == len(other) and all(map(is_same, one, other))
    return True
