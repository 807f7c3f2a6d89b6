"""Fetches samples of a dataset, each with all random generators seeded for it."""

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.utils.data import Dataset, get_worker_info

from runner.utils.distributed import seed_all
from runner.utils.modules.generators import ObjectGenerators
from runner.utils.utils import derive_seed

_CPU = torch.device("cpu")
_MAX_FRUITLESS = 8  # searches for new generators that found none


class SampleFetcher(Dataset[Any]):
    """Fetches the samples of a planned batch; with a seed, reseeds all generators by each sample's ordinal before.

    A sample that creates or replaces a generator is fetched again, because that generator was not seeded for it.

    Args:
        seed: seed of the samples; None does not reseed.
        collate: not called; the generators that it refers to are reseeded with the dataset's.
        is_repeated: fetches the first sample twice and adds a warning if the two differ.
    Attributes:
        current: (ordinal, index) of the sample that is being fetched; None outside of the dataset.
        dataset_name: name of the dataset's class.
    """

    def __init__(self, dataset: Any, seed: int | None, collate: Any = None, *, is_repeated: bool = False) -> None:
        self.dataset = dataset
        self._seed = seed
        self._collate = collate
        self._generators: Any = None  # `ObjectGenerators`, made where they are used: a worker has its own copies
        self._num_fetched = 0
        self._num_fruitless = 0
        self._is_watched = True  # looks for new generators after each sample
        self._is_repeated = is_repeated
        self._notes: list[str] = []
        self.current: tuple[int, Any] | None = None
        self.dataset_name = type(dataset).__name__

    def __getitem__(self, plan: tuple[int, list[Any]]) -> Any:
        first, indices = plan
        if self._seed is None:
            return self._fetch_unseeded(first, indices)
        if self._generators is None:
            self._generators = self._find_generators()
        return [self._fetch(ordinal, index) for ordinal, index in enumerate(indices, first)]

    def pop_notes(self) -> list[str]:
        """Returns the warnings about samples since the last call."""
        notes, self._notes = self._notes, []
        return notes

    def _fetch_unseeded(self, first: int, indices: list[Any]) -> list[Any]:
        if fetch_all := getattr(self.dataset, "__getitems__", None):
            self.current = first, indices
            samples: list[Any] = fetch_all(indices)
            return samples
        samples = []
        try:
            for index in indices:
                samples.append(self.dataset[index])
        except BaseException:
            self.current = first + len(samples), indices[len(samples)]
            raise
        return samples

    def _find_generators(self) -> ObjectGenerators:
        return ObjectGenerators(dataset=self.dataset, collate=self._collate)

    def _fetch(self, ordinal: int, index: Any) -> Any:
        sample = self._fetch_once(ordinal, index)
        self._num_fetched += 1
        # A new generator may escape the cheap checks, so everything is searched after 1, 2, 4, 8, ... samples.
        is_due = not self._num_fetched & (self._num_fetched - 1)
        if is_due or (self._is_watched and (self._generators.is_replaced() or self._may_have_more())):
            sample = self._search_generators(sample, ordinal, index)
        if self._num_fetched == 1 and self._is_repeated and getattr(get_worker_info(), "id", 0) == 0:
            sample = self._compare(sample, ordinal, index)
        return sample

    def _compare(self, sample: Any, ordinal: int, index: Any) -> Any:
        """Fetches a sample again and adds a warning if the two differ; returns the first one.

        It is fetched in this process: a forked one would share the offsets of open files and connections with it.
        """
        with contextlib.suppress(Exception):  # a sample that can't be copied or fetched twice is not compared
            kept = copy.deepcopy(sample)  # the dataset may return the same array each time and write to it
            again = self._fetch_once(ordinal, index)
            if not is_same(kept, again):
                self._notes.append(
                    f"data.train ({self.dataset_name}): expected the same sample for the same index and seed, found "
                    "another; it depends on something that can't be seeded, such as np.random.default_rng() in each "
                    "call, or on the samples before it, and so on workers and on where the run is cut; draw from "
                    "torch, NumPy, random or a generator that the dataset holds"
                )
            return sample if is_same(kept, sample) else kept
        return sample

    def _may_have_more(self) -> bool:
        return self._num_fruitless < _MAX_FRUITLESS and self._generators.may_have_more()

    def _search_generators(self, sample: Any, ordinal: int, index: Any) -> Any:
        """Searches for generators again; returns the sample, fetched again if there are new ones."""
        before = self._generators
        is_changed = before.is_replaced() or before.may_have_more()
        self._generators = self._find_generators()
        known = {id(source) for source in before.sources}
        found = zip(self._generators.paths, self._generators.sources, strict=True)
        new_paths = [path for path, source in found if id(source) not in known]
        effect = "samples before depend on loader workers and on where the run is cut"
        if self._num_fetched > 1:
            self._notes += [
                f"{path}: expected a generator that a seed decides; {effect}"
                for path in self._generators.unseeded
                if path not in before.unseeded
            ]
        if not new_paths:
            self._num_fruitless += is_changed
            return sample
        if not is_changed and self._num_fetched > 1:
            self._notes += [
                f"{path}: found after {self._num_fetched} samples; {effect}; make it in the dataset's __init__"
                for path in new_paths
            ]
        again = self._fetch_once(ordinal, index)
        if self._generators.is_replaced():  # each sample creates its own, which only its own seed can determine
            if self._is_watched and not is_same(sample, again):
                self._notes += [f"{path}: replaced in each sample, so that it can't be seeded" for path in new_paths]
            self._is_watched = False
        return again

    def _fetch_once(self, ordinal: int, index: Any) -> Any:
        self.current = ordinal, index
        assert self._seed is not None  # `_fetch_unseeded` otherwise
        seed = derive_seed(self._seed, ordinal)
        seed_all(seed, _CPU)
        self._generators.seed(seed)
        return self.dataset[index]


def is_same(one: Any, other: Any) -> bool:
    """Returns whether two samples are equal; parts other than containers, arrays, numbers and texts count as equal."""
    if type(one) is not type(other):
        return False
    if isinstance(one, (torch.Tensor, np.ndarray)):
        is_opaque = one.dtype.hasobject if isinstance(one, np.ndarray) else one.layout is not torch.strided
        if is_opaque or one.shape != other.shape or (isinstance(one, torch.Tensor) and one.dtype != other.dtype):
            return is_opaque
        return bool(((one == other) | ((one != one) & (other != other))).all())
    if isinstance(one, Mapping):
        return one.keys() == other.keys() and all(is_same(value, other[key]) for key, value in one.items())
    if isinstance(one, (str, bytes, int, float, complex, np.generic)):
        return bool(one == other or (one != one and other != other))
    if isinstance(one, Sequence):
        return len(one) == len(other) and all(map(is_same, one, other))
    return True
