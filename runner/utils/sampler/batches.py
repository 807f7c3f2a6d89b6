"""Batches: an endless stream of collated batches whose state is the position of the last delivered batch.

It draws indices from a sampler, slices them by rank, fetches and collates the samples here or in loader workers, and
seeds the random generators of each sample.
"""

import copy
import itertools
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, default_collate

from runner.utils.distributed import is_rank_zero, seed_all
from runner.utils.sampler.device_copies import BatchCopier, CopiedBatch
from runner.utils.sampler.rows import RowsIdentity, fetch_rows, has_rows, identify_rows
from runner.utils.sampler.samplers import EpochSampler
from runner.utils.sampler.samples import SampleFetcher
from runner.utils.sampler.workers import (
    AnnotatedBatch,
    FailedBatch,
    LoaderSettings,
    describe_failure,
    kill_workers,
    next_batch,
    release_workers,
    resume_workers,
)
from runner.utils.utils import checked_choice, checked_int, derive_seed, is_signal

Position = tuple[Mapping[str, Any], int]  # the state of the order of samples, and the number of samples up to there
PrefetchedBatch = tuple[CopiedBatch, Position, float]  # with the position after it and its weight
_CPU = torch.device("cpu")


class Sampler(Protocol):
    """A sampler: `iter` yields the rest of the epoch, or the next epoch if none is left."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


class PositionedBatches(ABC):
    """An endless iterator of batches whose state is the position of the batch delivered last, not of prefetched ones.

    An error of the dataset, or a worker that dies, raises from `next` and does not move the position; the next call
    starts again there.

    Args:
        start: the position before the first batch.
    Attributes:
        num_samples: number of samples in the batch delivered last, over all ranks; 0 before the first.
        weight: weight of this rank's slice of the batch delivered last; 1 if all slices are equally large.
        prefetch: reads the batch after the one delivered last, and starts its copy to the device; `next` raises its
            error. Call it when the device has work. None without a device, or without workers: reading a batch here
            takes this process's time and its random generators.
    """

    prefetch: Callable[[], None] | None = None
    _copier: BatchCopier | None = None

    def __init__(
        self, dataset: Any, collate: Callable[[list[Any]], Any] | None, start: Position, settings: LoaderSettings
    ) -> None:
        self.dataset = dataset
        self.collate = default_collate if collate is None else collate
        self._settings = settings
        self._stream: Iterator[Any] | None = None
        self._delivered = start
        self._ahead: PrefetchedBatch | BaseException | None = None
        self.num_samples = 0
        self.weight = 1.0

    @abstractmethod
    def _start(self) -> Iterator[Any]:
        """Returns an iterator of the items after the batch delivered last."""

    @abstractmethod
    def _receive(self, item: Any) -> tuple[Any, Position, float]:
        """Returns the batch, the position after it and its weight, from an item of the iterator."""

    @property
    def num_samples_total(self) -> int:
        """The number of samples delivered since the start of the stream."""
        return self._delivered[1]

    @property
    def epoch(self) -> int | None:
        """The epoch in which the next batch begins; None if the sampler's state has no epoch."""
        return self._delivered[0].get("epoch")

    def __iter__(self) -> "PositionedBatches":
        return self

    def __next__(self) -> Any:
        if self._copier is None:
            batch, position, self.weight = self._read()
        else:
            batch, position, self.weight = self._finish_copies(self._copier)
        self.num_samples = position[1] - self._delivered[1]
        self._delivered = position
        return batch

    def _read(self) -> tuple[Any, Position, float]:
        """Returns the next batch, its position and its weight; an error starts the stream anew."""
        try:
            if self._stream is None:
                self._stream = self._start()
            return self._receive(next_batch(self._stream))
        except BaseException as error:
            if is_signal(error):
                self.kill_workers()
            self.close()
            raise

    def copy_with(self, copier: BatchCopier | None) -> None:
        """Has a copier copy the batches to a device before they are delivered; None delivers them as they are."""
        self._copier = copier
        self.prefetch = self._prefetch if copier is not None and self._settings.num_workers else None

    def _prefetch(self) -> None:
        assert self._copier is not None
        if self._ahead is not None:
            return
        try:
            self._ahead = self._start_copies(self._copier)
        except BaseException as error:
            if is_signal(error):
                raise
            self._ahead = error

    def _start_copies(self, copier: BatchCopier) -> PrefetchedBatch:
        batch, position, weight = self._read()
        try:
            return copier.start(batch), position, weight
        except BaseException:
            self.close()
            raise

    def _finish_copies(self, copier: BatchCopier) -> tuple[Any, Position, float]:
        ahead, self._ahead = self._ahead, None
        if isinstance(ahead, BaseException):
            raise ahead
        copied, position, weight = self._start_copies(copier) if ahead is None else ahead
        return copier.finish(copied), position, weight

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the order after the batch delivered last, and the number of samples delivered."""
        order, ordinal = self._delivered
        return {"sampler": copy.deepcopy(dict(order)), "ordinal": ordinal}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves to a saved position; the number of workers and ranks may differ from the saving run's.

        Raises:
            TypeError, ValueError: `state` is no state of batches, or of another order; the position stays.
        """
        if not {"sampler", "ordinal"} <= state.keys():
            raise ValueError(f"Batches.load_state_dict: expected sampler and ordinal, found {list(state)}.")
        ordinal = checked_int("Batches.load_state_dict: ordinal", state["ordinal"], 0)
        self.close()
        self._delivered = (self._load_order(state["sampler"]), ordinal)
        self.num_samples = 0

    @abstractmethod
    def _load_order(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        """Checks a saved state of the order and returns it."""

    def position(self) -> Position:
        """Returns the position of the last delivered batch, for `seek`; a cheap reference, not a copy."""
        return self._delivered

    def seek(self, position: Position) -> None:
        """Moves back to an earlier position: later batches are delivered again."""
        if position is not self._delivered:
            self._delivered = position
            self.close()
            self.num_samples = 0

    def start_next_epoch(self, state: Mapping[str, Any]) -> None:
        """Moves to the next epoch that a saved position has not begun; the count of samples continues.

        It is for a state that this order refuses because its length, seed or settings differ.

        Raises:
            TypeError, ValueError: the state or this order's own has no epoch and position.
        """
        where = "Batches.start_next_epoch"
        saved = dict(state["sampler"])
        moved = self._first_of_epoch()
        for name in ("epoch", "position"):
            if name not in moved:
                raise ValueError(f"{where}: this sampler has no {name} to start at, only {list(moved)}.")
            moved[name] = checked_int(f"{where}: {name}", saved.get(name), 0)
        moved["epoch"] += moved["position"] > 0
        moved["position"] = 0
        self.load_state_dict({"sampler": moved, "ordinal": state["ordinal"]})

    @abstractmethod
    def _first_of_epoch(self) -> dict[str, Any]:
        """Returns a state of the order whose epoch and position can be set to the beginning of another epoch."""

    def close(self) -> None:
        """Shuts down the workers and drops prefetched batches; `next` continues after the last delivered batch."""
        stream, self._stream, self._ahead = self._stream, None, None
        if (shut_down := getattr(stream, "_shutdown_workers", None)) is not None:
            shut_down()
            kill_workers(stream)  # torch only asks workers to exit: kill those that hang

    def kill_workers(self) -> None:
        """Kills the workers at once; call `close` afterwards."""
        kill_workers(self._stream)


class Batches(PositionedBatches):
    """An endless iterator of collated batches of a map-style dataset; its state is the position of the last one.

    The sampler belongs to the stream and runs ahead of it when workers prefetch, so save the `state_dict()` of the
    batches, not of the sampler.

    With several ranks, each gets its slice of every batch of the one global order. Slices may differ in size: the mean
    over the ranks of `weight` x the slice's mean is the batch's mean. Positions are global, so the number of ranks may
    change between runs.

    Args:
        dataset: has `__getitem__` and `__len__`. Without `seed_samples`, its `__getitems__` is called once per batch.
        sampler: yields indices, or lists of indices if `batch_size` is None.
        batch_size: samples per batch over all ranks. Indices are chained across epochs, so every batch is full.
        seed: seed of the samples.
        num_workers, prefetch_factor, pin_memory: as in `LoaderSettings`.
        collate: makes a batch of a list of samples; by default torch's `default_collate`.
        seed_samples: before `dataset[i]`, reseeds the global generators of torch, `random` and NumPy and those that the
            dataset and `collate` refer to, from (seed, ordinal of the sample in the stream). A sample then depends
            neither on workers, ranks and batches nor on interruptions. Generators created later are reseeded from that
            sample on, with a warning if samples before it were affected.
        rank, world_size: this rank and the number of ranks.
    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    def __init__(
        self,
        dataset: Any,
        sampler: Sampler,
        batch_size: int | None = None,
        *,
        seed: int = 0,
        num_workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        seed_samples: bool = True,
        prefetch_factor: int = 2,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        settings = LoaderSettings(num_workers, prefetch_factor, pin_memory)
        super().__init__(dataset, collate, (sampler.state_dict(), 0), settings)
        self._seed = checked_int("Batches: seed", seed)
        self._sampler = sampler
        self._batch_size = None if batch_size is None else checked_int("Batches: batch_size", batch_size, 1)
        is_seeded = checked_choice("Batches: seed_samples", seed_samples, (False, True))
        samples = SampleFetcher(dataset, self._seed if is_seeded else None, self.collate, is_repeated=is_rank_zero())
        self._fetcher = BatchFetcher(samples, self.collate, pins=pin_memory)
        self._rank = rank
        self._world_size = checked_int("Batches: world_size", world_size, 1)
        self._planned: deque[tuple[Position, float]] = deque()

    def close(self) -> None:
        super().close()
        self._planned.clear()
        self._sampler.load_state_dict(self._delivered[0])

    def _load_order(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        self._sampler.load_state_dict(state)
        return self._sampler.state_dict()

    def _first_of_epoch(self) -> dict[str, Any]:
        return dict(self._sampler.state_dict())

    def _receive(self, item: Any) -> tuple[Any, Position, float]:
        return item, *self._planned.popleft()

    def _start(self) -> Iterator[Any]:
        plans = self._plan_batches()
        if not self._settings.num_workers and not self._settings.pin_memory:
            return (self._fetcher[plan] for plan in plans)
        seed = derive_seed(self._seed, self._delivered[1], self._rank)
        return iter(self._settings.make_loader(self._fetcher, plans, seed))

    def _plan_batches(self) -> Iterator[tuple[int, list[Any]]]:
        """Yields (ordinal of the first sample, indices) of each batch; adds the position after it to `_planned`."""
        ordinal = self._delivered[1]
        for batch in self._index_batches():
            first, ordinal = ordinal, ordinal + len(batch)
            start, end = rank_slice(len(batch), self._rank, self._world_size)
            weight = 1.0 if self._world_size == 1 else (end - start) * self._world_size / max(len(batch), 1)
            self._planned.append(((self._sampler.state_dict(), ordinal), weight))
            # A rank with an empty slice gets one sample of weight 0: every rank must run every step.
            yield (first + start, batch[start:end]) if start < end else (first, batch[:1])

    def _index_batches(self) -> Iterator[list[Any]]:
        """Yields the indices of each batch over all ranks."""
        sampler, size = self._sampler, self._batch_size
        if size is None:
            yield from self._indices()
        # A subclass may iterate in its own way.
        elif isinstance(sampler, EpochSampler) and type(sampler).__iter__ is EpochSampler.__iter__ and len(sampler):
            while True:
                yield sampler.take(size)
        else:
            indices = self._indices()
            while batch := list(itertools.islice(indices, size)):
                yield batch

    def _indices(self) -> Iterator[Any]:
        num_empty = 0
        # A sampler that was saved at the end of an epoch may begin with one empty pass.
        while num_empty < 2:
            num_empty += 1
            for item in self._sampler:
                num_empty = 0
                yield item
        raise ValueError("Batches: expected a sampler that yields something, found an empty one; is there any data?")


def rank_slice(length: int, rank: int, world_size: int) -> tuple[int, int]:
    """Returns the start and end of a rank's slice of a batch; the sizes of slices differ by one at most."""
    return rank * length // world_size, (rank + 1) * length // world_size


class BatchFetcher(Dataset[Any]):
    """Fetches the samples of a planned batch and collates them; returns an error as a `FailedBatch`.

    Args:
        pins: the loader pins memory.
        batch_seed: reseeds the global generators for each batch, from this seed and the batch's first ordinal. It is
            for workers that are used again, whose generators would be where the pass before left them.
    """

    def __init__(
        self,
        samples: "SampleFetcher",
        collate: Callable[[list[Any]], Any] | None,
        *,
        pins: bool = False,
        batch_seed: int | None = None,
    ) -> None:
        self._samples = samples
        self._collate = default_collate if collate is None else collate
        self._pins = pins
        self._batch_seed = batch_seed
        self._has_rows = has_rows(samples.dataset, self._collate)

    def __getitem__(self, plan: tuple[int, list[Any]]) -> Any:
        if self._has_rows and (rows := fetch_rows(self._samples.dataset, plan[1])) is not None:
            return AnnotatedBatch(rows, []) if self._pins else rows
        try:
            if self._batch_seed is not None:
                seed_all(derive_seed(self._batch_seed, plan[0]), _CPU)
            samples = self._samples[plan]
            self._samples.current = None
            batch = self._collate(samples)
            notes = self._samples.pop_notes()
            return AnnotatedBatch(batch, notes) if notes or self._pins else batch
        except BaseException as error:
            if is_signal(error):
                raise
            return self._describe_failure(error, plan)

    def _describe_failure(self, error: BaseException, plan: tuple[int, list[Any]]) -> FailedBatch:
        dataset, current = self._samples.dataset_name, self._samples.current
        if current is None:
            return describe_failure(error, f"in collate, of indices {plan[1]!r:.100} of the dataset {dataset}")
        location = f"at index {current[1]!r:.100} of the dataset {dataset}, position {current[0]} of the order"
        return describe_failure(error, location)


@dataclass
class EvaluationData:
    """One ordered pass over a dataset, the same each time, as (number of the batch, batch, number of its samples).

    Rank r of R takes the batches r, r + R, r + 2 R, ... All ranks take equally many: a rank that runs out repeats the
    last batch, with 0 as the number of samples.

    Args:
        seed: of the samples; None does not reseed.
        is_persistent: True: passes use the same workers, until `close`, and draws of samples that are not reseeded
            begin anew with each batch. None: passes use the same workers while new ones would return the same, which
            is known of the rows of a small `TensorDataset` only.
    """

    dataset: Any
    batch_size: int
    num_workers: int
    collate: Callable[[list[Any]], Any] | None
    seed: int | None
    rank: int = 0
    world_size: int = 1
    prefetch_factor: int = 2
    pin_memory: bool = False
    is_persistent: bool | None = False
    # The loader whose workers wait for the next pass, and the rows that they have.
    _kept: tuple[Any, RowsIdentity | None] = field(default=(None, None), init=False, repr=False, compare=False)
    _streams: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)  # of passes in progress

    def __iter__(self) -> Iterator[tuple[int, Any, int]]:
        plans = self._plan_batches()
        numbers = range(self.rank, -(-len(plans) // self.world_size) * self.world_size, self.world_size)
        rank_plans = [plans[min(number, len(plans) - 1)] for number in numbers]
        rows = None
        if self.is_persistent is None and self.num_workers:
            rows = identify_rows(self.dataset, self.collate)
        is_kept = self.num_workers > 0 and (bool(self.is_persistent) or rows is not None)
        loader, batches = self._resume_kept(rows)
        if batches is None:
            loader = self._make_loader(rank_plans, is_kept)
            batches = iter(loader)
        self._streams.append(batches)
        is_whole = False
        try:
            for number, (_, indices) in zip(numbers, rank_plans, strict=True):
                yield number, next_batch(batches), len(indices) if number < len(plans) else 0
            is_whole = True
        finally:
            is_open = batches in self._streams
            if is_open:
                self._streams.remove(batches)
            # Of two passes at once, the workers of one are kept.
            if is_whole and is_kept and is_open and self._kept[0] is None:
                release_workers(batches)
                self._kept = loader, rows
            else:
                kill_workers(batches)  # if the iteration was abandoned

    def _resume_kept(self, rows: RowsIdentity | None) -> tuple[Any, Any]:
        """Returns the kept loader and its iterator; None twice if there is none, its rows differ or a worker died."""
        loader, kept_rows = self._kept
        self._kept = None, None
        if loader is None:
            return None, None
        if kept_rows == rows and (batches := resume_workers(loader)) is not None:
            return loader, batches
        kill_workers(loader._iterator)
        return None, None

    def close(self) -> None:
        """Ends workers that are kept for the next pass, and those of passes in progress."""
        loader, _ = self._kept
        streams = [*self._streams, getattr(loader, "_iterator", None)]
        self._kept = None, None
        self._streams.clear()
        for stream in streams:
            kill_workers(stream)

    def _plan_batches(self) -> list[tuple[int, list[int]]]:
        """Returns (first index, indices) of each batch."""
        length = len(self.dataset)
        firsts = range(0, length, self.batch_size)
        return [(first, [*range(first, min(first + self.batch_size, length))]) for first in firsts]

    def _make_loader(self, plans: list[tuple[int, list[int]]], is_kept: bool) -> DataLoader[Any]:
        settings = LoaderSettings(self.num_workers, self.prefetch_factor, self.pin_memory, is_kept)
        samples = SampleFetcher(self.dataset, self.seed, self.collate)
        batch_seed = 0 if is_kept and self.seed is None else None
        return settings.make_loader(
            BatchFetcher(samples, self.collate, pins=self.pin_memory, batch_seed=batch_seed), plans
        )
