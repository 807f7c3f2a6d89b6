"""Samplers: the order of samples as a pure function of (settings, seed, epoch, position), and the position in it.

Shuffles are keyed permutations, computed block by block.

`iter(sampler)` yields the rest of the epoch; the next `iter` yields the next epoch. A state saved after k items resumes
with item k + 1, and after the last item with the first of the next epoch. A live iterator follows its sampler: it
continues from a state loaded within its epoch and ends with the epoch. A loader that prefetches runs ahead of training,
so `Batches` keeps the position of the last delivered batch.
"""

import itertools
import math
import warnings
import zlib
from abc import ABC, abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, Generic, Literal, TypeVar

import numpy as np
from numpy.typing import NDArray

from runner.utils.sampler.permutation import random_bits, shuffled
from runner.utils.utils import checked_choice, checked_int, derive_seed

T = TypeVar("T")
Setting = int | float | str | None

_FIRST_BLOCK = 64
_LARGEST_BLOCK = 16384
_CHUNK = 65536
_LARGEST_LENGTH = 2**62


class EpochSampler(ABC, Generic[T]):
    """Yields endless epochs of `length` items; a subclass computes the items at given positions."""

    def __init__(self, length: int, settings: dict[str, Setting]) -> None:
        self._length = length
        self._settings = settings
        self._num_taken = 0
        self._block: list[T] = []  # items for `take`
        self._block_start = 0

    @abstractmethod
    def _items(self, epoch: int, start: int, count: int) -> Iterable[T]:
        """Returns the items at positions start ... start + count - 1 of an epoch."""

    def __len__(self) -> int:
        """Returns the number of items in an epoch, independent of the position."""
        return self._length

    def __iter__(self) -> Iterator[T]:
        epoch = self._num_taken // max(1, self._length)
        block_size = _FIRST_BLOCK
        while self._length and self._num_taken // self._length == epoch:
            taken = self._num_taken
            position = taken - epoch * self._length
            for item in self._items(epoch, position, min(block_size, self._length - position)):
                taken += 1
                self._num_taken = taken
                yield item
                if self._num_taken != taken:
                    break
            else:
                block_size = min(4 * block_size, _LARGEST_BLOCK)

    def take(self, count: int) -> list[T]:
        """Returns the next `count` items, also across epochs: those that repeated iteration yields, at less cost.

        Raises:
            ValueError: an epoch has no items.
        """
        if not self._length:
            raise ValueError(f"{type(self).__name__}.take: expected items in an epoch, found none.")
        taken: list[T] = []
        while len(taken) < count:
            offset = self._num_taken - self._block_start
            if not 0 <= offset < len(self._block):
                epoch, position = divmod(self._num_taken, self._length)
                size = min(max(_FIRST_BLOCK, 4 * len(self._block)), _LARGEST_BLOCK, self._length - position)
                self._block = list(self._items(epoch, position, size))
                self._block_start = self._num_taken
                offset = 0
            part = self._block[offset : offset + count - len(taken)]
            self._num_taken += len(part)
            taken += part
        return taken

    def state_dict(self) -> dict[str, Setting]:
        """Returns the position and the settings it belongs to, as plain values."""
        epoch, position = divmod(self._num_taken, max(1, self._length))
        return {"epoch": epoch, "position": position, "sampler": type(self).__name__, **self._settings}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved position; a refused state leaves the position as it is.

        Raises:
            TypeError, ValueError: the state has another sampler, length, seed or setting, or no valid position.
        """
        where = f"{type(self).__name__}.load_state_dict"
        for name, value in self.state_dict().items():
            if name not in ("epoch", "position") and state.get(name) != value:
                raise ValueError(
                    f"{where}: the state has {name}={state.get(name)!r}, this sampler has {name}={value!r}. "
                    "Resume with the data and settings of the saved run, or start without its state."
                )
        epoch = checked_int(f"{where}: epoch", state.get("epoch"), 0)
        position = checked_int(f"{where}: position", state.get("position"), 0, self._length)
        self._num_taken = epoch * self._length + position


class OrderedSampler(EpochSampler[int]):
    """Yields 0, 1, ... length - 1 in every epoch.

    Raises:
        TypeError, ValueError: `length` is no integer from 0 to 2**62.
    """

    def __init__(self, length: int) -> None:
        length = checked_int("OrderedSampler: length", length, 0, _LARGEST_LENGTH)
        super().__init__(length, {"length": length})

    def _items(self, epoch: int, start: int, count: int) -> Iterable[int]:
        return range(start, start + count)


class RandomSampler(EpochSampler[int]):
    """Yields range(length) in a new order each epoch; with `replacement`, `length` independent draws.

    Raises:
        TypeError, ValueError: an argument has the wrong type, or `length` is not from 0 to 2**62.
    """

    def __init__(self, length: int, seed: int = 0, replacement: bool = False) -> None:
        length = checked_int("RandomSampler: length", length, 0, _LARGEST_LENGTH)
        self._seed = checked_int("RandomSampler: seed", seed)
        self._replacement = checked_choice("RandomSampler: replacement", replacement, (False, True))
        super().__init__(length, {"length": length, "seed": self._seed, "replacement": self._replacement})

    def _items(self, epoch: int, start: int, count: int) -> list[int]:
        if not self._replacement:
            return shuffled(self._length, self._seed, epoch, start, count)
        return (random_bits(start, count, derive_seed(self._seed, epoch)) % self._length).tolist()


class PoolSampler(EpochSampler[T]):
    """Draws without replacement from a pool of values, refilled in a new order when it is empty.

    `sample()` and iteration draw from the same pool; iteration ends when the pool is empty. A saved state contains the
    number of values, not the values.

    Args:
        values_or_length: a sequence of values (a list is copied, any other sequence must not change), or an int for
            range(int).
    Raises:
        TypeError, ValueError: an argument has the wrong type, or a length is not from 0 to 2**62.
    """

    def __init__(self, values_or_length: Sequence[T] | int, seed: int = 0) -> None:
        values: Any = values_or_length
        is_sequence = hasattr(values, "__len__") and hasattr(values, "__getitem__") and not isinstance(values, Mapping)
        name = "PoolSampler: values, unless a sequence,"
        length = len(values) if is_sequence else checked_int(name, values, 0, _LARGEST_LENGTH)
        self._values = tuple(values) if isinstance(values, list) else values if is_sequence else None
        self._seed = checked_int("PoolSampler: seed", seed)
        super().__init__(length, {"length": length, "seed": self._seed})

    def sample(self) -> T:
        """Returns the next value of the pool; an empty pool is refilled first.

        Raises:
            IndexError: the pool was built without values.
        """
        if not self._length:
            raise IndexError("PoolSampler.sample: expected a bag with values, found one built without any.")
        return self.take(1)[0]

    def _items(self, epoch: int, start: int, count: int) -> list[T]:
        # Salted, so that a sweep over samplers with the same seed compares different orders.
        drawn: Any = shuffled(self._length, derive_seed(self._seed, 1), epoch, start, count)
        return drawn if self._values is None else [self._values[i] for i in drawn]


class BatchedOrderedSampler(EpochSampler[list[int]]):
    """Yields batches of consecutive indices, as large as the limits allow, for DataLoader's `batch_sampler`.

    Args:
        lengths: lengths of the items, numbers >= 0 `[num_items]` as a list, array or CPU tensor; used as float64.
        max_size: the most items in a batch.
        max_cost: the highest cost of a batch, in the unit of the lengths.
        cost: the cost of a batch: its longest length x its number of items ("padded"), or the sum of its lengths
            ("sum").
        shuffle: yields whole batches in a new order each epoch.
        drop_last: drops the last batch unless it is full. A batch is full at `max_size` items, or if its cost leaves no
            room for an item as long as its longest ("padded") or of any length above 0 ("sum").
        oversized: the reaction to an item longer than `max_cost`: an error, or a batch of its own ("single").
        seed: seed of the shuffle.
    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range, or an item is longer than `max_cost`.
    Warns:
        UserWarning: `drop_last` dropped the only batch.
    """

    def __init__(
        self,
        lengths: Any,
        *,
        max_size: int | None = None,
        max_cost: float | None = None,
        cost: Literal["padded", "sum"] = "padded",
        shuffle: bool = False,
        drop_last: bool = False,
        oversized: Literal["error", "single"] = "error",
        seed: int = 0,
    ) -> None:
        where = "BatchedOrderedSampler"
        settings: dict[str, Setting] = {
            "max_size": None if max_size is None else checked_int(f"{where}: max_size", max_size, 1),
            "max_cost": None if max_cost is None else _checked_cost(max_cost),
            "cost": checked_choice(f"{where}: cost", cost, ("padded", "sum")),
            "oversized": checked_choice(f"{where}: oversized", oversized, ("error", "single")),
            "drop_last": checked_choice(f"{where}: drop_last", drop_last, (False, True)),
            "shuffle": checked_choice(f"{where}: shuffle", shuffle, (False, True)),
            "seed": checked_int(f"{where}: seed", seed),
        }
        if max_size is None and max_cost is None:
            raise ValueError(f"{where}: expected max_size, max_cost or both, found neither.")
        budget = math.inf if max_cost is None else float(max_cost)
        vector = _checked_lengths(lengths, budget if oversized == "error" else math.inf)
        starts, is_last_full = _find_batch_starts(vector, max_size, budget, cost)
        if is_last_full or not drop_last:
            starts.append(len(vector))
        elif len(starts) == 1:
            warnings.warn(f"{where}: drop_last leaves nothing of {len(vector)} items.", stacklevel=2)
        self._bounds = np.frombuffer(starts, np.int64)
        self._key = int(seed) if shuffle else None
        settings = {"length": len(vector), **settings, "bounds_crc32": zlib.crc32(starts)}
        super().__init__(len(starts) - 1, settings)

    def _items(self, epoch: int, start: int, count: int) -> Iterator[list[int]]:
        order = (
            np.arange(start, start + count)
            if self._key is None
            else np.array(shuffled(self._length, self._key, epoch, start, count))
        )
        spans = zip(self._bounds[order].tolist(), self._bounds[order + 1].tolist(), strict=True)
        return (list(range(start, end)) for start, end in spans)


def _find_batch_starts(lengths: NDArray[Any], size: int | None, budget: float, cost: str) -> tuple["array[int]", bool]:
    """Returns the first index of each batch, and whether the last batch is full."""
    # Without max_size: one more than there are items, so that a batch of all items is not full by its size.
    max_size = min(size or math.inf, len(lengths) + 1)
    padded, summed = (budget, math.inf) if cost == "padded" else (math.inf, budget)
    starts = array("q")
    start = room = end = 0
    total = 0.0
    for base in range(0, len(lengths), _CHUNK):
        chunk = lengths[base : base + _CHUNK]
        rooms = _max_counts(chunk, max_size, padded).tolist()
        for i, item_room, length in zip(itertools.count(base), rooms, chunk.tolist(), strict=False):
            total += length
            if item_room < room:  # the longest item so far decides
                room, end = item_room, start + item_room
            if i >= end or total > summed:
                starts.append(i)
                start, room, end, total = i, item_room, i + item_room, length
    return starts, len(lengths) >= end or total >= summed


def _max_counts(lengths: NDArray[Any], max_size: float, budget: float) -> NDArray[np.int64]:
    """Returns the most items of each length that a batch may have, at least 1, int64 [count]."""
    with np.errstate(divide="ignore", over="ignore"):
        rooms = np.where(lengths > 0, budget / lengths, np.inf).clip(1, max_size).astype(np.int64)
    # The quotient is rounded and may be off by one, so correct it by the products.
    rooms += (rooms + 1) * lengths <= budget
    rooms -= rooms * lengths > budget
    return rooms.clip(1, int(max_size))


def _checked_lengths(lengths: Any, longest: float) -> NDArray[np.float64]:
    where = "BatchedOrderedSampler: lengths"
    vector = np.asarray(lengths)
    if vector.ndim != 1 or vector.dtype.kind not in "iuf":
        raise TypeError(f"{where}: expected a vector of numbers, found {vector.ndim} axes of {vector.dtype}.")
    vector = vector.astype(np.float64)
    is_bad = ~((vector >= 0) & (vector <= longest) & np.isfinite(vector))
    if is_bad.any():
        first = int(is_bad.argmax())
        remedy = "" if longest == math.inf else ', max_cost; or oversized="single" for longer ones'
        raise ValueError(f"{where}[{first}]={vector[first]}: expected 0 <= length <= {longest}{remedy}.")
    return vector


def _checked_cost(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float | np.number) or not 0 < value < math.inf:
        raise ValueError(f"BatchedOrderedSampler: max_cost: expected a finite number > 0, found {value!r}.")
    return float(value)
