"""A mix of several map-style datasets by weight, whose order is a pure function of the position.

Blocks of positions hold each dataset in exact proportion, up to rounding that later blocks even out, in an order that
is shuffled anew in each block. A dataset's samples follow its own shuffled order: each of its passes has every sample
once. So any position is computed from the position alone.
"""

import math
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset

from runner.utils.sampler.permutation import random_bits, shuffled
from runner.utils.sampler.samplers import EpochSampler
from runner.utils.utils import add_note, checked_int, derive_seed

_BLOCK = 1024  # positions
_CHOICES, _ORDERS = 1, 2  # salts of the seed


class Mix(ConcatDataset[Any]):
    """Several datasets in one, for `MixSampler`. Without that sampler it is their concatenation.

    Args:
        datasets: with `__getitem__` and `__len__`, by name or as a list.
        weights: a number above 0 for each dataset, by the same names or as a list: the shares of samples. Default: 1.
    Raises:
        TypeError, ValueError: an argument has the wrong type, a dataset is empty, or a weight is not above 0.
    """

    def __init__(
        self,
        datasets: Mapping[str, Any] | Sequence[Any],
        weights: Mapping[str, float] | Sequence[float] | None = None,
    ) -> None:
        by_name = dict(datasets) if isinstance(datasets, Mapping) else dict(_numbered(datasets))
        if not by_name:
            raise ValueError("Mix: expected one dataset or more, found none.")
        if weights is None:
            weights = dict.fromkeys(by_name, 1.0)
        weights = dict(weights) if isinstance(weights, Mapping) else dict(_numbered(weights))
        if weights.keys() != by_name.keys():
            raise ValueError(f"Mix: expected weights of {', '.join(by_name)}, found those of {', '.join(weights)}.")
        for name, dataset in by_name.items():
            if not len(dataset):
                raise ValueError(f"Mix: the dataset {name} is empty.")
        super().__init__(list(by_name.values()))
        self.names = list(by_name)
        self.sizes = [len(dataset) for dataset in by_name.values()]
        self.weights = [_checked_weight(name, weights[name]) for name in by_name]

    @property
    def fingerprint(self) -> str | None:
        """The fingerprints of the datasets that have one; None without any."""
        found = [getattr(dataset, "fingerprint", None) for dataset in self.datasets]
        named = [f"{name}: {text}" for name, text in zip(self.names, found, strict=True) if text is not None]
        return "; ".join(named) or None

    def __getitem__(self, index: int) -> Any:
        number, own_index = self._locate(index)
        try:
            return self.datasets[number][own_index]
        except Exception as error:
            add_note(error, f"at index {own_index} of the dataset {self.names[number]}")
            raise

    def __getitems__(self, indices: list[int]) -> list[Any]:
        """Returns samples by their indices, with one call for each dataset that can return several."""
        own_indices: dict[int, list[int]] = {}
        places: dict[int, list[int]] = {}
        for place, index in enumerate(indices):
            number, own_index = self._locate(index)
            own_indices.setdefault(number, []).append(own_index)
            places.setdefault(number, []).append(place)
        samples: list[Any] = [None] * len(indices)
        for number, chosen in own_indices.items():
            fetch_all = getattr(self.datasets[number], "__getitems__", None)
            found = fetch_all(chosen) if fetch_all else [self[indices[place]] for place in places[number]]
            for place, sample in zip(places[number], found, strict=True):
                samples[place] = sample
        return samples

    def _locate(self, index: int) -> tuple[int, int]:
        """Returns the number of a dataset and the index in it."""
        number = bisect_right(self.cumulative_sizes, index)
        return number, index - (self.cumulative_sizes[number - 1] if number else 0)


class MixSampler(EpochSampler[int]):
    """Yields the indices of a `Mix` in proportion to its weights.

    An epoch has as many samples as all datasets together. At the end of each block of 1024 samples, the count of a
    dataset differs from its exact share by fewer samples than there are datasets.

    Raises:
        TypeError: the seed is no integer.
    """

    def __init__(self, mix: Mix, seed: int = 0) -> None:
        self._seed = checked_int("MixSampler: seed", seed)
        self._sizes = mix.sizes
        self._offsets = [0, *mix.cumulative_sizes[:-1]]
        self._weights = _as_integers(mix.weights)
        parts = zip(mix.names, mix.sizes, mix.weights, strict=True)
        described = ", ".join(f"{name} {size} x {weight:g}" for name, size, weight in parts)
        super().__init__(len(mix), {"mix": described, "seed": self._seed})

    def _items(self, epoch: int, start: int, count: int) -> list[int]:
        first = epoch * self._length + start
        first_block, end_block = first // _BLOCK, -(-(first + count) // _BLOCK)
        choices = np.concatenate([self._choose(block) for block in range(first_block, end_block)])
        low = first - first_block * _BLOCK
        indices = np.empty(count, np.int64)
        for number, num_before in enumerate(self._count(first_block * _BLOCK)):
            places = np.flatnonzero(choices[low : low + count] == number)
            if places.size:
                num_before += int(np.count_nonzero(choices[:low] == number))
                indices[places] = self._draw(number, num_before, places.size)
        found: list[int] = indices.tolist()
        return found

    def _choose(self, block: int) -> NDArray[np.int64]:
        """Returns the number of the dataset at each position of a block, int64 [1024]."""
        pairs = zip(self._count(block * _BLOCK), self._count((block + 1) * _BLOCK), strict=True)
        choices = np.repeat(np.arange(len(self._sizes)), [after - before for before, after in pairs])
        order = random_bits(0, _BLOCK, derive_seed(self._seed, _CHOICES, block)).argsort(kind="stable")
        return choices[order]

    def _count(self, num_positions: int) -> list[int]:
        """Returns the samples of each dataset among the first positions; no dataset ever has fewer than before."""
        counts = []
        num_left, weight_left = num_positions, sum(self._weights)
        for weight in self._weights:
            # Each dataset splits what the ones before have left, so that every count rises with the positions.
            counts.append(num_left * weight // weight_left)
            num_left -= counts[-1]
            weight_left -= weight
        return counts

    def _draw(self, number: int, first: int, count: int) -> NDArray[np.int64]:
        """Returns the indices of a dataset's samples first ... first + count - 1 in its own endless order."""
        size, seed = self._sizes[number], derive_seed(self._seed, _ORDERS, number)
        drawn: list[int] = []
        while len(drawn) < count:
            passed, position = divmod(first + len(drawn), size)
            drawn += shuffled(size, seed, passed, position, min(count - len(drawn), size - position))
        return np.array(drawn, np.int64) + self._offsets[number]


def _numbered(values: Sequence[Any]) -> list[tuple[str, Any]]:
    return [(str(number), value) for number, value in enumerate(values)]


def _checked_weight(name: str, weight: Any) -> float:
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < float("inf"):
        raise ValueError(f"Mix: weight of {name}: expected a finite number above 0, found {weight!r}.")
    return float(weight)


def _as_integers(weights: list[float]) -> list[int]:
    """Returns weights in exact proportion to the decimal numbers that were typed: 0.1 and 0.3 are 1 and 3."""
    fractions = [Fraction(repr(weight)) for weight in weights]
    denominator = math.lcm(*(fraction.denominator for fraction in fractions))
    return [int(fraction * denominator) for fraction in fractions]
