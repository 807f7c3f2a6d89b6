"""Batches: an endless stream of collated batches whose state is the position of the last delivered batch.

It draws indices from a sampler, slices them by rank, fetches and collates the samples here or in loader workers, and
seeds the random generators of each sample.
"""

import copy
import itertools
import multiprocessing
import os
import pickle
import signal
import traceback
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any, Protocol

import torch
from torch.utils.data import DataLoader, Dataset, default_collate, get_worker_info
from torch.utils.data._utils import signal_handling

from runner.utils.distributed import is_rank_zero
from runner.utils.files.open_files import exit_worker_at_file_limit, unshare_file_offsets
from runner.utils.sampler.samples import SampleFetcher
from runner.utils.utils import (
    add_note,
    checked_choice,
    checked_int,
    derive_seed,
    describe,
    is_signal,
    message_of,
    signal_with_parent,
)

_GRACE_S = 1.0


class Sampler(Protocol):
    """A sampler: `iter` yields the rest of the epoch, or the next epoch if none is left."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


class Batches:
    """An endless iterator of collated batches of a map-style dataset; its state is the position of the last one.

    The sampler belongs to the stream and runs ahead of it when workers prefetch, so save the `state_dict()` of the
    batches, not of the sampler. An error of the dataset, or a worker that dies, raises from `next` and does not move
    the position; the next call starts again there.

    With several ranks, each gets its slice of every batch of the one global order. Slices may differ in size: the mean
    over the ranks of `weight` x the slice's mean is the batch's mean. Positions are global, so the number of ranks may
    change between runs.

    Args:
        dataset: has `__getitem__` and `__len__`. Without `seed_samples`, its `__getitems__` is called once per batch.
        sampler: yields indices, or lists of indices if `batch_size` is None.
        batch_size: samples per batch over all ranks. Indices are chained across epochs, so every batch is full.
        seed: seed of the samples.
        num_workers: loader processes; 0 fetches in this process.
        collate: makes a batch of a list of samples; by default torch's `default_collate`.
        pin_memory: returns tensors in pinned memory.
        seed_samples: before `dataset[i]`, reseeds the global generators of torch, `random` and NumPy and those that the
            dataset and `collate` refer to, from (seed, ordinal of the sample in the stream). A sample then depends
            neither on workers, ranks and batches nor on interruptions. Generators created later are reseeded from that
            sample on, with a warning if samples before it were affected.
        prefetch_factor: batches prefetched by each worker.
        rank, world_size: this rank and the number of ranks.
    Attributes:
        num_samples: number of samples in the batch delivered last, over all ranks; 0 before the first.
        weight: weight of this rank's slice of the batch delivered last; 1 if all slices are equally large.
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
        self._seed = checked_int("Batches: seed", seed)
        self._sampler = sampler
        self._batch_size = None if batch_size is None else checked_int("Batches: batch_size", batch_size, 1)
        self._num_workers = checked_int("Batches: num_workers", num_workers, 0)
        self._prefetch_factor = checked_int("Batches: prefetch_factor", prefetch_factor, 1)
        self._pin_memory = checked_choice("Batches: pin_memory", pin_memory, (False, True))
        is_seeded = checked_choice("Batches: seed_samples", seed_samples, (False, True))
        self.dataset = dataset
        self.collate = default_collate if collate is None else collate
        samples = SampleFetcher(dataset, self._seed if is_seeded else None, self.collate, is_repeated=is_rank_zero())
        self._fetcher = BatchFetcher(samples, self.collate)
        self._rank = rank
        self._world_size = checked_int("Batches: world_size", world_size, 1)
        self._stream: Iterator[Any] | None = None
        self._planned: deque[tuple[tuple[Mapping[str, Any], int], float]] = deque()
        self._delivered: tuple[Mapping[str, Any], int] = (sampler.state_dict(), 0)
        self.num_samples = 0
        self.weight = 1.0

    @property
    def num_samples_total(self) -> int:
        """The number of samples delivered since the start of the stream."""
        return self._delivered[1]

    @property
    def epoch(self) -> int | None:
        """The epoch in which the next batch begins; None if the sampler's state has no epoch."""
        return self._delivered[0].get("epoch")

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        try:
            if self._stream is None:
                self._stream = self._start()
            batch = _next_batch(self._stream)
        except BaseException as error:
            if is_signal(error):
                self.kill_workers()
            self.close()
            raise
        num_delivered = self._delivered[1]
        self._delivered, self.weight = self._planned.popleft()
        self.num_samples = self._delivered[1] - num_delivered
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the sampler's state after the batch delivered last, and the number of samples delivered."""
        sampler_state, ordinal = self._delivered
        return {"sampler": copy.deepcopy(dict(sampler_state)), "ordinal": ordinal}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to a saved position; the number of workers and ranks may differ from the saving run's.

        Raises:
            TypeError, ValueError: `state` is no state of batches, or the sampler refuses it; the position stays.
        """
        if not {"sampler", "ordinal"} <= state.keys():
            raise ValueError(f"Batches.load_state_dict: expected sampler and ordinal, found {list(state)}.")
        ordinal = checked_int("Batches.load_state_dict: ordinal", state["ordinal"], 0)
        self.close()
        self._sampler.load_state_dict(state["sampler"])
        self._delivered = (self._sampler.state_dict(), ordinal)
        self.num_samples = 0

    def position(self) -> tuple[Mapping[str, Any], int]:
        """Returns the position of the last delivered batch, for `seek`; a cheap reference, not a copy."""
        return self._delivered

    def seek(self, position: tuple[Mapping[str, Any], int]) -> None:
        """Moves back to an earlier position: later batches are delivered again."""
        if position is not self._delivered:
            self._delivered = position
            self.close()  # moves the sampler there
            self.num_samples = 0

    def start_next_epoch(self, state: Mapping[str, Any]) -> None:
        """Moves to the next epoch that a saved position has not begun; the count of samples continues.

        It is for a state that this sampler refuses because its length, seed or settings differ.

        Raises:
            TypeError, ValueError: the state or this sampler's own has no epoch and position.
        """
        where = "Batches.start_next_epoch"
        saved = dict(state["sampler"])
        moved = dict(self._sampler.state_dict())
        for name in ("epoch", "position"):
            if name not in moved:
                raise ValueError(f"{where}: this sampler has no {name} to start at, only {list(moved)}.")
            moved[name] = checked_int(f"{where}: {name}", saved.get(name), 0)
        moved["epoch"] += moved["position"] > 0
        moved["position"] = 0
        self.load_state_dict({"sampler": moved, "ordinal": state["ordinal"]})

    def close(self) -> None:
        """Shuts down the workers and drops prefetched batches; `next` continues after the last delivered batch."""
        stream, self._stream = self._stream, None
        if (shut_down := getattr(stream, "_shutdown_workers", None)) is not None:
            shut_down()
            kill_workers(stream)  # torch only asks workers to exit: kill those that hang
        self._planned.clear()
        self._sampler.load_state_dict(self._delivered[0])

    def kill_workers(self) -> None:
        """Kills the workers at once; call `close` afterwards."""
        kill_workers(self._stream)

    def _start(self) -> Iterator[Any]:
        plans = self._plan_batches()
        if not self._num_workers and not self._pin_memory:
            return (self._fetcher[plan] for plan in plans)
        loader = DataLoader(
            self._fetcher,
            batch_size=None,
            sampler=plans,
            num_workers=self._num_workers,
            collate_fn=_identity,
            pin_memory=self._pin_memory,
            # By default the loader draws the base seed of its workers from the global generator.
            generator=torch.Generator().manual_seed(derive_seed(self._seed, self._delivered[1], self._rank)),
            prefetch_factor=self._prefetch_factor if self._num_workers else None,
            worker_init_fn=start_worker,
        )
        return iter(loader)

    def _plan_batches(self) -> Iterator[tuple[int, list[Any]]]:
        """Yields (ordinal of the first sample, indices) of each batch; adds the position after it to `_planned`."""
        ordinal = self._delivered[1]
        indices = self._indices()
        while True:
            batch = next(indices) if self._batch_size is None else list(itertools.islice(indices, self._batch_size))
            first, ordinal = ordinal, ordinal + len(batch)
            start, end = rank_slice(len(batch), self._rank, self._world_size)
            weight = 1.0 if self._world_size == 1 else (end - start) * self._world_size / max(len(batch), 1)
            self._planned.append(((self._sampler.state_dict(), ordinal), weight))
            # A rank with an empty slice gets one sample of weight 0: every rank must run every step.
            yield (first + start, batch[start:end]) if start < end else (first, batch[:1])

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


@dataclass
class FailedBatch:
    """An error of a dataset or collate in place of a batch. Torch would keep only the type of a worker's error.

    Args:
        notes: lines such as the index of the sample, added to the error when it is raised again.
    """

    error: BaseException
    notes: list[str]


@dataclass
class AnnotatedBatch:
    """A batch with warnings about its samples."""

    batch: Any
    notes: list[str]


def unwrap_batch(batch: Any) -> Any:
    """Returns the batch of a fetcher's result, and issues its warnings.

    Raises:
        BaseException: the error of the dataset or collate, with the dataset's index in its notes.
    """
    if isinstance(batch, FailedBatch):
        present = getattr(batch.error, "__notes__", ())
        for note in [note for note in batch.notes if note not in present]:
            add_note(batch.error, note)
        raise batch.error
    if isinstance(batch, AnnotatedBatch):
        for note in batch.notes:
            warnings.warn(note, stacklevel=2)
        return batch.batch
    return batch


class BatchFetcher(Dataset[Any]):
    """Fetches the samples of a planned batch and collates them; returns an error as a `FailedBatch`."""

    def __init__(self, samples: "SampleFetcher", collate: Callable[[list[Any]], Any] | None) -> None:
        self._samples = samples
        self._collate = default_collate if collate is None else collate

    def __getitem__(self, plan: tuple[int, list[Any]]) -> Any:
        try:
            samples = self._samples[plan]
            self._samples.current = None
            batch = self._collate(samples)
            notes = self._samples.pop_notes()
            return AnnotatedBatch(batch, notes) if notes else batch
        except BaseException as error:
            if is_signal(error):
                raise
            return self._describe_failure(error, plan)

    def _describe_failure(self, error: BaseException, plan: tuple[int, list[Any]]) -> FailedBatch:
        dataset, current = self._samples.dataset_name, self._samples.current
        if current is None:
            location = f"in collate, of indices {plan[1]!r:.100} of the dataset {dataset}"
        else:
            location = f"at index {current[1]!r:.100} of the dataset {dataset}, position {current[0]} of the order"
        if isinstance(error, StopIteration):  # would end the iteration over batches
            stopped, error = error, RuntimeError(describe(error))
            error.__cause__ = stopped
        notes = [location]
        if get_worker_info() is not None:
            trace = "".join(traceback.format_exception(error)).replace("Traceback (most recent call last):\n", "")
            notes.append(f"in a loader worker:\n{trace}")
            original, error = error, _to_picklable(error)
            notes = [*getattr(original, "__notes__", ()), *notes] if error is original else notes
        return FailedBatch(error, notes)


def _to_picklable(error: BaseException) -> BaseException:
    """Returns the error if pickling preserves it, otherwise a RuntimeError with its type and message."""
    try:
        copied = pickle.loads(pickle.dumps(error))
        if type(copied) is type(error) and message_of(copied) == message_of(error):
            return error
    except Exception:  # of the error class's own methods
        pass
    return RuntimeError(describe(error))


def _identity(batch: Any) -> Any:
    return batch


@dataclass
class EvaluationData:
    """One ordered pass over a dataset, the same each time, as (number of the batch, batch, number of its samples).

    Rank r of R takes the batches r, r + R, r + 2 R, ... All ranks take equally many: a rank that runs out repeats the
    last batch, with 0 as the number of samples.
    """

    dataset: Dataset[Any]
    batch_size: int
    num_workers: int
    collate: Callable[[list[Any]], Any] | None
    seed: int | None
    rank: int = 0
    world_size: int = 1

    def __iter__(self) -> Iterator[tuple[int, Any, int]]:
        length = len(self.dataset)  # type: ignore[arg-type]
        plans = [
            (first, [*range(first, min(first + self.batch_size, length))])
            for first in range(0, length, self.batch_size)
        ]
        numbers = range(self.rank, -(-len(plans) // self.world_size) * self.world_size, self.world_size)
        rank_plans = [plans[min(number, len(plans) - 1)] for number in numbers]
        loader = DataLoader(
            BatchFetcher(SampleFetcher(self.dataset, self.seed, self.collate), self.collate),
            batch_size=None,
            sampler=rank_plans,
            num_workers=self.num_workers,
            collate_fn=_identity,
            generator=torch.Generator(),  # by default it would draw from the global one
            worker_init_fn=start_worker,
        )
        batches = iter(loader)
        try:
            for number, (_, indices) in zip(numbers, rank_plans, strict=True):
                yield number, _next_batch(batches), len(indices) if number < len(plans) else 0
        finally:
            kill_workers(batches)  # if the iteration was abandoned


def _next_batch(stream: Any) -> Any:
    """Returns the next batch of a loader.

    Raises:
        RuntimeError: a worker has died.
        BaseException: the error of the dataset or collate.
    """
    try:
        return unwrap_batch(next(stream))
    except BaseException as error:
        if (worker_error := _find_dead_worker(stream, error)) is not None:
            raise worker_error from error
        raise


def _find_dead_worker(stream: Any, error: BaseException) -> RuntimeError | None:
    """Returns the error to raise for a lost connection to a dead worker; None if `error` has another reason."""
    workers = getattr(stream, "_workers", ())
    # An error of the dataset has notes with its index; one without comes from the loader's own connection.
    if not workers or not isinstance(error, (EOFError, ConnectionError)) or hasattr(error, "__notes__"):
        return None
    try:
        ended = connection.wait([worker.sentinel for worker in workers], timeout=_GRACE_S)
        for worker in workers:
            if worker.sentinel in ended:
                worker.join(_GRACE_S)  # its connection closes before its exit code is known
                return RuntimeError(f"DataLoader worker (pid {worker.pid}) exited with exit code {worker.exitcode}")
    except RuntimeError as torch_error:  # raised by torch's handler of SIGCHLD
        return torch_error
    return RuntimeError(f"DataLoader worker (pid unknown) has closed its connection: {error!r}")


def kill_workers(stream: Any) -> None:
    """Kills the loader workers of an iterator that are still alive: joining one that hangs would block."""
    alive = [worker for worker in getattr(stream, "_workers", ()) if worker.is_alive()]
    if alive and stream._worker_pids_set:  # otherwise torch raises an error for each killed worker
        signal_handling._remove_worker_pids(id(stream))
        stream._worker_pids_set = False
    for worker in alive:
        worker.kill()


def start_worker(worker: int) -> None:
    """Prepares a loader worker: signal handlers, death with the parent, file offsets, the limit on open files.

    The worker ignores the signals that a terminal or scheduler sends to all processes of a run, and the first SIGTERM.
    The second SIGTERM, which the loader sends to a worker that hangs, ends it.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)

    def end_at_the_next(*_: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    signal.signal(signal.SIGTERM, end_at_the_next)
    # If the parent is killed, what this worker has inherited, such as connections to other ranks, must close too.
    _end_with_parent()
    unshare_file_offsets()
    exit_worker_at_file_limit(worker)


def _end_with_parent() -> None:
    """Has this process killed when the one that started it ends, or now if it has ended: torch may not notice that."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    assert parent.pid is not None
    is_from_server = type(multiprocessing.current_process()).__name__ == "ForkServerProcess"
    signal_with_parent(signal.SIGKILL, os.getppid() if is_from_server else parent.pid)
    # Not after a fork: workers that were started later have inherited the connection that `is_alive` reads.
    if is_from_server and not parent.is_alive():
        os._exit(1)
