"""Batches of an iterable dataset: one global order, resumed by the dataset's own state or by skipping ahead.

One reader reads the stream, here or in one loader worker, whatever the number of workers. Each rank reads the whole
stream and keeps its slice of each batch. So the order of samples depends on neither; the cost is that every rank reads
everything. The state of the dataset travels with each batch, so that prefetching does not move the position.
"""

import copy
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import IterableDataset, default_collate

from runner.utils.distributed import seed_all
from runner.utils.distributed.devices import pin
from runner.utils.modules.generators import ObjectGenerators
from runner.utils.sampler.batches import EvaluationData, Position, PositionedBatches, rank_slice
from runner.utils.sampler.workers import (
    AnnotatedBatch,
    LoaderSettings,
    describe_failure,
    hide_worker,
    kill_workers,
    next_batch,
)
from runner.utils.utils import checked_choice, checked_int, derive_seed, is_signal

_CPU = torch.device("cpu")
_STATE_METHODS = ("state_dict", "load_state_dict")
_COLLATE_SALT = -1


class StreamError(ValueError):
    """A stream that can't be read on: it is empty, begins nowhere, or has changed since the position was saved."""


def is_stream(dataset: Any) -> bool:
    """Returns whether a dataset is read in its own order, because it has no positions to choose from."""
    if isinstance(dataset, IterableDataset):
        return True
    is_map_style = hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")
    return hasattr(dataset, "__iter__") and not is_map_style


def has_state(dataset: Any) -> bool:
    """Returns whether an iterable dataset saves and loads its position."""
    return all(callable(getattr(dataset, method, None)) for method in _STATE_METHODS)


def find_shuffle_buffer(dataset: Any) -> int | None:
    """Returns the size of a shuffle buffer in a Hugging Face dataset, 0 if unknown; None without a buffer.

    The state of such a dataset lacks the samples in the buffer.

    Source: https://github.com/huggingface/datasets/issues/7444
    """
    waiting, seen = [getattr(dataset, "_ex_iterable", None)], set[int]()
    while waiting:
        part = waiting.pop()
        if part is None or id(part) in seen:
            continue
        seen.add(id(part))
        if type(part).__name__ == "BufferShuffledExamplesIterable":
            return int(getattr(part, "buffer_size", 0))
        inner = getattr(part, "ex_iterables", None)
        waiting += [getattr(part, "ex_iterable", None), *(inner if isinstance(inner, (list, tuple)) else ())]
    return None


@dataclass
class StreamItem:
    """A rank's slice of a batch, the position after the batch, and the weight of the slice."""

    batch: Any
    position: Position
    weight: float

    def pin_memory(self) -> "StreamItem":
        """Returns it with the batch in pinned memory; torch's loader calls this."""
        return StreamItem(pin(self.batch), self.position, self.weight)


class StreamReader:
    """Reads the samples of an iterable dataset one by one, through epochs, from a position.

    Args:
        order: the state of the order at the position: `epoch`, `position` in it, and the dataset's own `stream` state.
        ordinal: number of samples before the position.
        skips: reads the epoch again up to the position, instead of loading the dataset's state.
        seed: of the samples; None does not reseed.
        initial: the dataset's state before it was read for the first time; None if it has not been read.
    Attributes:
        ordinal: of the sample that is read next.
    """

    def __init__(
        self,
        dataset: Any,
        order: Mapping[str, Any],
        ordinal: int,
        *,
        skips: bool,
        seed: int | None,
        initial: Any = None,
    ) -> None:
        self.ordinal = ordinal
        self._dataset = dataset
        self._epoch, self._num_before = order["epoch"], order["position"]
        self._skips = skips
        self._seed = seed
        self._iterator: Iterator[Any] | None = None
        self._is_new = True  # nothing was read in this pass yet
        self._ahead: list[Any] = []  # at most one sample that was read, but not returned yet
        self._error: Exception | None = None  # raised by reading ahead
        self._is_over = False  # this pass has ended
        self._is_resumed = False  # this pass began at a saved state, and may be empty
        is_resumed = order["stream"] is not None
        self._begin(order["stream"] if is_resumed else initial, is_resumed)
        if skips:
            self._skip()

    def read(self) -> Any:
        """Returns the next sample; at the end of an epoch, the first one of the next epoch.

        Raises:
            StreamError: the stream has no sample.
        """
        if self._error is not None:
            raise self._error
        if not self._ahead and not self._read_ahead():
            if self._is_new and not self._is_resumed:
                raise StreamError("the stream is empty: expected a sample in each epoch; is there any data?")
            if not self._is_new or self._num_before:  # unless the saved state was that at the end of the epoch before
                self._epoch += 1
            self._num_before = 0
            self._begin(None)
            return self.read()
        self.ordinal += 1
        self._num_before += 1
        return self._ahead.pop()

    def position(self) -> Position:
        """Returns the position after the sample returned last.

        One more sample is read, because only that shows whether the epoch has ended. An error of reading it is raised
        when it is its turn.
        """
        state = None if self._skips else copy.deepcopy(self._dataset.state_dict())
        try:
            is_end = not self._read_ahead()
        except Exception as error:
            self._error, is_end = error, False
        epoch, position = (self._epoch + 1, 0) if is_end else (self._epoch, self._num_before)
        return {"epoch": epoch, "position": position, "stream": state}, self.ordinal

    def _begin(self, state: Any, is_resumed: bool = False) -> None:
        """Begins a pass over the dataset, at the state if there is one."""
        if callable(set_epoch := getattr(self._dataset, "set_epoch", None)):
            set_epoch(self._epoch)
        if state is not None and not self._skips:
            self._dataset.load_state_dict(copy.deepcopy(state))
        _seed(self._seed, self.ordinal)  # some streams read their first sample here
        self._iterator = iter(self._dataset)
        _drop_stale_state(self._iterator)
        if self._skips and self._iterator is self._dataset:
            raise StreamError("data.resume=skip: expected a stream that iter() begins anew, found an iterator")
        self._is_new, self._is_over, self._is_resumed = True, False, is_resumed

    def _read_ahead(self) -> bool:
        """Reads the next sample of this pass, unless it was read; returns False at the end of the pass."""
        if self._ahead or self._is_over:
            return not self._is_over
        assert self._iterator is not None
        _seed(self._seed, self.ordinal)
        for sample in self._iterator:
            self._ahead.append(sample)
            self._is_new = False
            return True
        self._is_over = True
        return False

    def _skip(self) -> None:
        """Reads this epoch up to the position."""
        position, end = self._num_before, self.ordinal
        self.ordinal -= position
        while self.ordinal < end:
            if not self._read_ahead():
                found = f"the stream ended after {position - (end - self.ordinal)} samples of epoch {self._epoch}"
                raise StreamError(f"data.resume=skip: {found}, expected more than the {position} that were trained on")
            self._ahead.clear()
            self.ordinal += 1


def _drop_stale_state(iterator: Any) -> None:
    """Has torchdata's Loader report its own state again after it was loaded at the end of an epoch.

    Its iterator (torchdata 0.11) has then looked for a next item, found none, and keeps the state before as that of all
    later items.
    """
    is_loader = type(iterator).__module__.startswith("torchdata.") and hasattr(iterator, "_cached_state_dict")
    if is_loader and iterator._cached_item is None:
        iterator._cached_state_dict = None


def _seed(seed: int | None, ordinal: int) -> None:
    """Reseeds the global generators for a sample, unless the seed is None."""
    if seed is not None:
        seed_all(derive_seed(seed, ordinal), _CPU)


class _BatchReader(IterableDataset[Any]):
    """Yields a rank's slice of each batch from a position, as `StreamItem`; the last is a `FailedBatch` on an error."""

    def __init__(
        self,
        dataset: Any,
        collate: Callable[[list[Any]], Any],
        batch_size: int,
        *,
        skips: bool,
        seed: int | None,
        rank: int,
        world_size: int,
    ) -> None:
        self._dataset = dataset
        self._collate = collate
        self._batch_size = batch_size
        self._skips = skips
        self._seed = seed
        self._rank = rank
        self._world_size = world_size
        self._generators: ObjectGenerators | None = None
        self._initial: Any = None  # the dataset's state before it was read for the first time
        self.start: Position = ({}, 0)

    def __iter__(self) -> Iterator[Any]:
        first, end = rank_slice(self._batch_size, self._rank, self._world_size)
        weight = (end - first) * self._world_size / self._batch_size
        # A rank with an empty slice gets one sample of weight 0: every rank must run every step.
        first, end = (first, end) if first < end else (0, 1)
        name = type(self._dataset).__name__
        place = f"at position {self.start[1]} of the stream {name}"
        is_in_worker = hide_worker()
        try:
            reader = self._open()
            while True:
                samples = []
                for _ in range(self._batch_size):
                    place = f"at position {reader.ordinal} of the stream {name}"
                    samples.append(reader.read())
                place = (
                    f"in collate, of {self._batch_size} samples up to position {reader.ordinal} of the stream {name}"
                )
                self._seed_collate(reader.ordinal - self._batch_size + end)
                # Collated before a sample is read ahead, since a stream may write to the same array each time.
                batch = self._collate(samples[first:end])
                place = f"in the state at position {reader.ordinal} of the stream {name}"
                yield StreamItem(batch, reader.position(), weight)
        except BaseException as error:
            if is_signal(error) or isinstance(error, GeneratorExit):
                raise
            yield describe_failure(error, place, is_in_worker)

    def _seed_collate(self, ordinal: int) -> None:
        if self._seed is not None:
            seed = derive_seed(self._seed, ordinal, _COLLATE_SALT)
            seed_all(seed, _CPU)
            if self._generators is None:
                self._generators = ObjectGenerators(collate=self._collate)
            self._generators.seed(seed)

    def _open(self) -> StreamReader:
        order, ordinal = self.start
        initial = self._initial
        if initial is None and order["stream"] is None and not self._skips:
            # To return to the start in this process. A dataset may refuse that before it has been iterated.
            with suppress(Exception):
                self._initial = copy.deepcopy(self._dataset.state_dict())
        return StreamReader(self._dataset, order, ordinal, skips=self._skips, seed=self._seed, initial=initial)


class StreamBatches(PositionedBatches):
    """An endless iterator of collated batches of an iterable dataset; its state is the position of the last one.

    At the end of the stream, the next epoch begins: `set_epoch(epoch)` is called where it exists, then `iter`. Batches
    are full, across epochs. The dataset's state must be that after the sample it has yielded last.

    Args:
        dataset: has `__iter__`, and `state_dict` and `load_state_dict` unless it `skips`.
        batch_size: samples per batch over all ranks.
        skips: returns to a position by reading the epoch again, which must yield the same samples.
        num_workers: 0 reads in this process; any other number in one worker, because there is one order.
        seed: of the samples.
        seed_samples: reseeds the global generators of torch, `random` and NumPy before each sample from (seed, ordinal
            of the sample), and also those of `collate` before each batch. Generators of the dataset belong to its own
            state.
        collate, prefetch_factor, pin_memory, rank, world_size: as in `Batches`.
    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    def __init__(
        self,
        dataset: Any,
        batch_size: int,
        *,
        skips: bool = False,
        seed: int = 0,
        num_workers: int = 0,
        collate: Callable[[list[Any]], Any] | None = None,
        pin_memory: bool = False,
        seed_samples: bool = True,
        prefetch_factor: int = 2,
        rank: int = 0,
        world_size: int = 1,
    ) -> None:
        settings = LoaderSettings(min(num_workers, 1), prefetch_factor, pin_memory)
        super().__init__(dataset, collate, ({"epoch": 0, "position": 0, "stream": None}, 0), settings)
        self._seed = checked_int("StreamBatches: seed", seed)
        self._skips = skips
        self._rank = rank
        is_seeded = checked_choice("StreamBatches: seed_samples", seed_samples, (False, True))
        self._reader = _BatchReader(
            dataset,
            self.collate,
            checked_int("StreamBatches: batch_size", batch_size, 1),
            skips=skips,
            seed=self._seed if is_seeded else None,
            rank=rank,
            world_size=checked_int("StreamBatches: world_size", world_size, 1),
        )

    def _start(self) -> Iterator[Any]:
        self._reader.start = self._delivered
        if not self._settings.num_workers and not self._settings.pin_memory:
            return iter(self._reader)
        return iter(
            self._settings.make_loader(self._reader, None, derive_seed(self._seed, self._delivered[1], self._rank))
        )

    def _receive(self, item: Any) -> tuple[Any, Position, float]:
        return item.batch, item.position, item.weight

    def _first_of_epoch(self) -> dict[str, Any]:
        return {"epoch": 0, "position": 0, "stream": None}

    def _load_order(self, state: Mapping[str, Any]) -> Mapping[str, Any]:
        where = "StreamBatches.load_state_dict"
        if "stream" not in state:
            raise ValueError(f"{where}: expected the state of a stream, found that of a sampler, {list(state)}.")
        epoch = checked_int(f"{where}: epoch", state.get("epoch"), 0)
        position = checked_int(f"{where}: position", state.get("position"), 0)
        if state["stream"] is None and position and not self._skips:
            raise ValueError(f"{where}: the state has no state of the dataset; it was saved with data.resume=skip.")
        return {"epoch": epoch, "position": position, "stream": copy.deepcopy(state["stream"])}


class StreamEvaluation(EvaluationData):
    """One pass over an iterable dataset, which must end, with the batches of each rank as in `EvaluationData`.

    Each rank reads the whole stream and collates its own batches, in this process or in a worker that each pass starts.
    """

    def __iter__(self) -> Iterator[tuple[int, Any, int]]:
        settings = LoaderSettings(min(self.num_workers, 1), self.prefetch_factor, self.pin_memory)
        reader = _PassReader(self)
        is_local = not self.num_workers and not self.pin_memory
        batches = iter(reader) if is_local else iter(settings.make_loader(reader))
        try:
            while True:
                try:
                    item = next_batch(batches)
                except StopIteration:
                    return
                yield item
        finally:
            kill_workers(batches)


class _PassReader(IterableDataset[Any]):
    """Yields a rank's (number of the batch, batch, number of its samples) of one pass; on an error a `FailedBatch`."""

    def __init__(self, data: EvaluationData) -> None:
        self._data = data

    def __iter__(self) -> Iterator[Any]:
        data = self._data
        number = 0
        samples: list[Any] = []
        is_in_worker = hide_worker()
        try:
            for samples in self._read_batches():
                if number % data.world_size == data.rank:
                    yield self._collate(number, samples, len(samples))
                number += 1
            num_left = number % data.world_size  # batches of the last round, if not every rank has one
            if num_left and data.rank >= num_left:
                yield self._collate(number - num_left + data.rank, samples, 0)
        except BaseException as error:
            if is_signal(error) or isinstance(error, GeneratorExit):
                raise
            place = f"in batch {number} of the stream {type(data.dataset).__name__}"
            yield describe_failure(error, place, is_in_worker)

    def _read_batches(self) -> Iterator[list[Any]]:
        samples, ordinal = list[Any](), 0
        iterator = iter(self._data.dataset)
        while True:
            _seed(self._data.seed, ordinal)
            for sample in iterator:
                samples.append(sample)
                break
            else:
                break
            ordinal += 1
            if len(samples) == self._data.batch_size:
                yield samples
                samples = []
        if samples:
            yield samples

    def _collate(self, number: int, samples: list[Any], count: int) -> AnnotatedBatch:
        collate = self._data.collate or default_collate
        return AnnotatedBatch((number, collate(samples), count), [])
