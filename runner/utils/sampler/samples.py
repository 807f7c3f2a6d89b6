"""Samples of a dataset, each fetched with all random generators seeded for it.

Must not import the samplers, nor what makes batches of samples.
"""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from runner.utils.distributed import seed_all
from runner.utils.modules.generators import HeldGenerators
from runner.utils.utils import derive_seed

_CPU = torch.device("cpu")
_MOST_SEARCHES = 8  # for nothing


class Samples(Dataset[Any]):
    """Fetches the samples of a draw; with a seed, each after reseeding all generators by its ordinal.

    `collate` is not called: the generators that it holds are reseeded with the dataset's. Generators that a sample
    has made or replaced were not seeded for it: it is fetched again.

    Args:
        is_repeated: compares the first sample with the same one fetched again.
    """

    def __init__(self, dataset: Any, seed: int | None, collate: Any = None, *, is_repeated: bool = False) -> None:
        self._dataset = dataset
        self._seed = seed
        self._collate = collate
        self._held: HeldGenerators | None = None  # in this process: a worker has copies
        self._num_fetched, self._num_idle, self._is_watched = 0, 0, True
        self._is_repeated = is_repeated
        self._notes: list[str] = []
        self.at: tuple[int, Any] | None = None  # ordinal and index of the sample that is fetched
        self.kind = type(dataset).__name__

    def __getitem__(self, draw: tuple[int, list[Any]]) -> Any:
        first, indices = draw
        if self._seed is None:
            fetch_all = getattr(self._dataset, "__getitems__", None)
            if fetch_all is None:
                return self._fetch_plainly(first, indices)
            self.at = first, indices
            return fetch_all(indices)
        if self._held is None:
            self._held = self._find()
        return [self._fetch(ordinal, index) for ordinal, index in enumerate(indices, first)]

    def take_notes(self) -> list[str]:
        """Returns what a person should know of the samples since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _fetch_plainly(self, first: int, indices: list[Any]) -> list[Any]:
        samples = []
        for ordinal, index in enumerate(indices, first):
            self.at = ordinal, index
            samples.append(self._dataset[index])
        return samples

    def _find(self) -> HeldGenerators:
        return HeldGenerators(dataset=self._dataset, collate=self._collate)

    def _fetch(self, ordinal: int, index: Any) -> Any:
        sample = self._draw(ordinal, index)
        assert self._held is not None
        self._num_fetched += 1
        # A generator may be made where no change is looked for: all is searched after 1, 2, 4, 8, ... samples.
        is_due = not self._num_fetched & (self._num_fetched - 1)
        if is_due or (self._is_watched and (self._held.is_replaced() or self._may_have_more())):
            sample = self._search(sample, ordinal, index)
        if self._num_fetched == 1 and self._is_repeated and getattr(get_worker_info(), "id", 0) == 0:
            sample = self._compare(sample, ordinal, index)
        return sample

    def _compare(self, sample: Any, ordinal: int, index: Any) -> Any:
        """Compares a sample with the same one fetched again; returns it as it was.

        A forked process that fetches it would share the offsets of open files with this one, and its connections.
        """
        # The dataset may return one array each time, and write to it.
        with contextlib.suppress(Exception):  # what can't be copied or fetched twice is not compared
            kept = copy.deepcopy(sample)
            again = self._draw(ordinal, index)
            if not is_same(kept, again):
                self._notes.append(
                    f"data.train ({self.kind}): expected the same sample for the same index and seed, found another; "
                    "it depends on something that can't be seeded, such as np.random.default_rng() in each call, or on "
                    "the samples before it, and so on workers and on where the run is cut; draw from torch, NumPy, "
                    "random or a generator that the dataset holds"
                )
            return sample if is_same(kept, sample) else kept
        return sample

    def _may_have_more(self) -> bool:
        assert self._held is not None
        return self._num_idle < _MOST_SEARCHES and self._held.may_have_more()

    def _search(self, sample: Any, ordinal: int, index: Any) -> Any:
        """Searches for generators again; returns the sample, fetched again where there are others than before."""
        before = self._held
        assert before is not None
        is_changed = before.is_replaced() or before.may_have_more()
        self._held = self._find()
        known = {id(source) for source in before.sources}
        made = [path for path, each in zip(self._held.paths, self._held.sources, strict=True) if id(each) not in known]
        effect = "samples before depend on loader workers and on where the run is cut"
        if self._num_fetched > 1:
            self._notes += [
                f"{path}: expected a generator that a seed decides; {effect}"
                for path in self._held.unseeded
                if path not in before.unseeded
            ]
        if not made:
            self._num_idle += is_changed
            return sample
        if not is_changed and self._num_fetched > 1:
            remedy = "make it in the dataset's __init__"
            self._notes += [f"{path}: found after {self._num_fetched} samples; {effect}; {remedy}" for path in made]
        again = self._draw(ordinal, index)
        if self._held.is_replaced():  # in each sample: only its own seed can decide what it draws
            if self._is_watched and not is_same(sample, again):
                self._notes += [f"{path}: replaced in each sample, so that it can't be seeded" for path in made]
            self._is_watched = False
        return again

    def _draw(self, ordinal: int, index: Any) -> Any:
        assert self._seed is not None
        assert self._held is not None
        self.at = ordinal, index
        seed = derive_seed(self._seed, ordinal)
        seed_all(seed, _CPU)
        self._held.seed(seed)
        return self._dataset[index]


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
