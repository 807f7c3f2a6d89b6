"""Batches: an endless stream of collated batches that knows which samples were delivered.

Owns the way from a sampler's indices to a batch, in this process or through loader workers, this rank's slice of it,
the position of what was delivered, and the randomness of a sample. Must not import the samplers: any iterable with
`state_dict()` and `load_state_dict()` is one.
"""

import copy
import ctypes
import itertools
import pickle
import signal
import sys
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
from runner.utils.files.open_files import end_worker_without_files, separate_offsets
from runner.utils.sampler.samples import Samples
from runner.utils.utils import add_note, checked_choice, checked_int, derive_seed, describe, is_signal, message_of

_GRACE_S = 1.0


class Sampler(Protocol):
    """What `Batches` asks of a sampler: `iter` yields the rest of an epoch, or the next if none is left."""

    def __iter__(self) -> Iterator[Any]: ...
    def state_dict(self) -> Mapping[str, Any]: ...
    def load_state_dict(self, state: Mapping[str, Any], /) -> None: ...


class Batches:
    """Yields collated batches of a map-style dataset without end; its state is the position of the last one.

    With a `batch_size`, indices are chained across epochs and every batch is full; without one the sampler
    yields lists of indices. The sampler belongs to the stream and runs ahead of it when workers prefetch: the
    position to save is `state_dict()` of the batches. An error in the dataset, or a worker that dies, raises
    from `next` and leaves the position where it was; the next call starts again from there.

    With `seed_samples` the global generators of torch, `random` and NumPy, and those that the dataset and `collate`
    hold, are reseeded from (seed, ordinal of the sample in the whole stream) before `dataset[i]`: its augmentation
    depends neither on workers, ranks and batches nor on where the run was cut. Without workers the global ones are
    those of this process, left as the last sample left them. Generators that are made or replaced later are reseeded
    from that sample on, or warned of. Without `seed_samples` a dataset with `__getitems__` is called once a batch.

    Of `num_ranks` each takes its slice of every batch of the one global order, and `weight` says what it counts for:
    where slices differ in size, the mean over the ranks of `weight` x a slice's mean is the batch's mean. Positions
    are the global ones, whatever the number of ranks.
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
        num_ranks: int = 1,
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
        samples = Samples(dataset, self._seed if is_seeded else None, self.collate, is_repeated=is_rank_zero())
        self._fetched = Fetched(samples, self.collate)
        self._rank, self._num_ranks = rank, checked_int("Batches: num_ranks", num_ranks, 1)
        self._stream: Iterator[Any] | None = None
        self._drawn: deque[tuple[tuple[Mapping[str, Any], int], float]] = deque()
        self._delivered: tuple[Mapping[str, Any], int] = (sampler.state_dict(), 0)
        self._num_samples = 0
        self.weight = 1.0

    @property
    def num_samples(self) -> int:
        """The number of samples in the batch delivered last, on all ranks; 0 before the first."""
        return self._num_samples

    @property
    def num_samples_total(self) -> int:
        """The number of samples delivered since the stream's first."""
        return self._delivered[1]

    @property
    def epoch(self) -> int | None:
        """The epoch that the next batch begins in, or None if the sampler's state does not say."""
        return self._delivered[0].get("epoch")

    def __iter__(self) -> "Batches":
        return self

    def __next__(self) -> Any:
        try:
            if self._stream is None:
                self._stream = self._start()
            batch = opened(next(self._stream))
        except BaseException as error:
            lost = _find_lost_worker(self._stream, error)
            if is_signal(error):
                self.kill_workers()
            self.close()
            if lost is not None:
                raise lost from error
            raise
        ordinal = self._delivered[1]
        self._delivered, self.weight = self._drawn.popleft()
        self._num_samples = self._delivered[1] - ordinal
        return batch

    def state_dict(self) -> dict[str, Any]:
        """Returns the sampler's state after the batch delivered last, and the number of samples delivered."""
        sampler_state, ordinal = self._delivered
        return {"sampler": copy.deepcopy(dict(sampler_state)), "ordinal": ordinal}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Moves the stream to a saved position, whatever the number of workers it was saved with.

        Raises:
            TypeError, ValueError: it is no state of batches, or the sampler refuses its part; the position
                stays where it was.
        """
        if not {"sampler", "ordinal"} <= state.keys():
            raise ValueError(f"Batches.load_state_dict: expected sampler and ordinal, found {list(state)}.")
        ordinal = checked_int("Batches.load_state_dict: ordinal", state["ordinal"], 0)
        self.close()
        self._sampler.load_state_dict(state["sampler"])
        self._delivered = (self._sampler.state_dict(), ordinal)
        self._num_samples = 0

    def position(self) -> tuple[Mapping[str, Any], int]:
        """Returns the position as it is, for `seek`, at no cost."""
        return self._delivered

    def seek(self, position: tuple[Mapping[str, Any], int]) -> None:
        """Goes back to a position: the batches delivered since then come again."""
        if position is not self._delivered:
            self.close()
            self._delivered = position
            self._sampler.load_state_dict(position[0])
            self._num_samples = 0

    def start_epoch_after(self, state: Mapping[str, Any]) -> None:
        """Moves to the first epoch of which a saved position had taken nothing; the ordinal goes on.

        For a state that this sampler refuses: of another length, seed or setting.

        Raises:
            TypeError, ValueError: the state or this sampler's own has no epoch and position.
        """
        where = "Batches.start_epoch_after"
        own, saved = dict(self._sampler.state_dict()), dict(state["sampler"])
        for name in ("epoch", "position"):
            if name not in own:
                raise ValueError(f"{where}: this sampler has no {name} to start at, only {list(own)}.")
            own[name] = checked_int(f"{where}: {name}", saved.get(name), 0)
        moved = own | {"epoch": own["epoch"] + (own["position"] > 0), "position": 0}
        self.load_state_dict({"sampler": moved, "ordinal": state["ordinal"]})

    def close(self) -> None:
        """Ends the workers and drops what they prefetched; `next` goes on from the batch delivered last."""
        stream, self._stream = self._stream, None
        shut_down = getattr(stream, "_shutdown_workers", None)
        if shut_down is not None:
            shut_down()
            kill_workers(stream)  # those that hang: torch only asks them to end
        self._drawn.clear()
        self._sampler.load_state_dict(self._delivered[0])

    def kill_workers(self) -> None:
        """Ends the workers at once, whatever they do; `close` is to follow."""
        kill_workers(self._stream)

    def _start(self) -> Iterator[Any]:
        draws = self._draws()
        if not self._num_workers and not self._pin_memory:
            return (self._fetched[draw] for draw in draws)
        generator = torch.Generator().manual_seed(derive_seed(self._seed, self._delivered[1], self._rank))
        loader: DataLoader[Any] = DataLoader(
            self._fetched,
            batch_size=None,
            sampler=draws,
            num_workers=self._num_workers,
            collate_fn=_as_it_is,
            pin_memory=self._pin_memory,
            # The loader draws its workers' base seed: not from the global generator.
            generator=generator,
            prefetch_factor=self._prefetch_factor if self._num_workers else None,
            worker_init_fn=start_worker,
        )
        return iter(loader)

    def _draws(self) -> Iterator[tuple[int, list[Any]]]:
        """Yields (ordinal of the first sample, indices) of each batch, and notes the position after it."""
        ordinal = self._delivered[1]
        indices = self._indices()
        while True:
            draw = next(indices) if self._batch_size is None else list(itertools.islice(indices, self._batch_size))
            first, ordinal = ordinal, ordinal + len(draw)
            start, end = slice_of(len(draw), self._rank, self._num_ranks)
            weight = 1.0 if self._num_ranks == 1 else (end - start) * self._num_ranks / max(len(draw), 1)
            self._drawn.append(((self._sampler.state_dict(), ordinal), weight))
            # A rank without a sample takes one all the same: it counts for nothing, but all ranks make every step.
            yield (first + start, draw[start:end]) if start < end else (first, draw[:1])

    def _indices(self) -> Iterator[Any]:
        """Yields what the sampler yields, epoch after epoch."""
        num_empty = 0
        # A sampler that was saved at the very end of an epoch may begin with one empty pass.
        while num_empty < 2:
            num_empty += 1
            for item in self._sampler:
                num_empty = 0
                yield item
        raise ValueError("Batches: expected a sampler that yields something, found an empty one; is there any data?")


def slice_of(length: int, rank: int, num_ranks: int) -> tuple[int, int]:
    """Returns where a rank's share of a batch starts and ends: neighbours, of sizes that differ by one at most."""
    return rank * length // num_ranks, (rank + 1) * length // num_ranks


@dataclass
class Failed:
    """An error of a dataset or collate, in place of a batch: torch's own way out of a worker keeps only its type.

    Args:
        notes: where it was, added to the error when it is raised again.
    """

    error: BaseException
    notes: list[str]


@dataclass
class Noted:
    """A batch, and what a person should know of how its samples were drawn."""

    batch: Any
    notes: list[str]


def opened(batch: Any) -> Any:
    """Returns a batch, and warns of what was noted of it.

    Raises:
        BaseException: what the dataset or collate raised in its place, with the dataset's index in its notes.
    """
    if isinstance(batch, Failed):
        known = getattr(batch.error, "__notes__", ())
        for note in [note for note in batch.notes if note not in known]:
            add_note(batch.error, note)
        raise batch.error
    if isinstance(batch, Noted):
        for note in batch.notes:
            warnings.warn(note, stacklevel=2)
        return batch.batch
    return batch


class Fetched(Dataset[Any]):
    """Fetches the batch of a draw: its samples, collated; or what failed on the way."""

    def __init__(self, samples: "Samples", collate: Callable[[list[Any]], Any] | None) -> None:
        self._samples = samples
        self._collate = default_collate if collate is None else collate

    def __getitem__(self, draw: tuple[int, list[Any]]) -> Any:
        try:
            samples = self._samples[draw]
            self._samples.at = None
            batch = self._collate(samples)
            notes = self._samples.take_notes()
            return Noted(batch, notes) if notes else batch
        except BaseException as error:
            if is_signal(error):
                raise
            return self._failed(error, draw)

    def _failed(self, error: BaseException, draw: tuple[int, list[Any]]) -> Failed:
        kind, at = self._samples.kind, self._samples.at
        if at is None:
            place = f"in collate, of indices {draw[1]!r:.100} of the dataset {kind}"
        else:
            place = f"at index {at[1]!r:.100} of the dataset {kind}, position {at[0]} of the order"
        if isinstance(error, StopIteration):  # who iterates would take it as the end
            stopped, error = error, RuntimeError(describe(error))
            error.__cause__ = stopped
        notes = [place]
        if get_worker_info() is not None:
            trace = "".join(traceback.format_exception(error)).replace("Traceback (most recent call last):\n", "")
            notes.append(f"in a loader worker:\n{trace}")
            own, error = error, _portable(error)
            notes = [*getattr(own, "__notes__", ()), *notes] if error is own else notes
        return Failed(error, notes)


def _portable(error: BaseException) -> BaseException:
    """Returns an error that can leave a loader worker: itself, or one with its type's name and its message."""
    try:
        copied = pickle.loads(pickle.dumps(error))
        if type(copied) is type(error) and message_of(copied) == message_of(error):
            return error
    except Exception:  # of another's own methods
        pass
    return RuntimeError(describe(error))


def _as_it_is(batch: Any) -> Any:
    return batch


@dataclass
class EvaluationData:
    """One ordered pass over a dataset, the same each time: iterates a batch's number, the batch, its number of samples.

    Of several ranks each takes every so many-th batch, and all as many: one that there is not is the last one again,
    with no samples.
    """

    dataset: Dataset[Any]
    batch_size: int
    num_workers: int
    collate: Callable[[list[Any]], Any] | None
    seed: int | None
    rank: int = 0
    num_ranks: int = 1

    def __iter__(self) -> Iterator[tuple[int, Any, int]]:
        length = len(self.dataset)  # type: ignore[arg-type]
        draws = [
            (first, [*range(first, min(first + self.batch_size, length))])
            for first in range(0, length, self.batch_size)
        ]
        numbers = range(self.rank, -(-len(draws) // self.num_ranks) * self.num_ranks, self.num_ranks)
        own = [draws[min(number, len(draws) - 1)] for number in numbers]
        loader: DataLoader[Any] = DataLoader(
            Fetched(Samples(self.dataset, self.seed, self.collate), self.collate),
            batch_size=None,
            sampler=own,
            num_workers=self.num_workers,
            collate_fn=_as_it_is,
            generator=torch.Generator(),  # else it draws from the global one
            worker_init_fn=start_worker,
        )
        batches = iter(loader)
        try:
            for number, (_, indices) in zip(numbers, own, strict=True):
                yield number, _next_of(batches), len(indices) if number < len(draws) else 0
        finally:
            kill_workers(batches)  # where it was cut short


def _next_of(stream: Any) -> Any:
    """Returns a loader's next batch, opened.

    Raises:
        RuntimeError: a worker has died.
    """
    try:
        return opened(next(stream))
    except BaseException as error:
        if (lost := _find_lost_worker(stream, error)) is not None:
            raise lost from error
        raise


def _find_lost_worker(stream: Any, error: BaseException) -> RuntimeError | None:
    """Returns what an error of the connection to a worker that died is told as; None of any other error."""
    workers = getattr(stream, "_workers", ())
    # What a dataset raised has its index in a note; without one it is of the loader's own connection.
    if not workers or not isinstance(error, (EOFError, ConnectionError)) or hasattr(error, "__notes__"):
        return None
    try:
        ended = connection.wait([worker.sentinel for worker in workers], timeout=_GRACE_S)
        for worker in workers:
            if worker.sentinel in ended:
                worker.join(_GRACE_S)  # its files are closed before it has an exit code
                return RuntimeError(f"DataLoader worker (pid {worker.pid}) exited with exit code {worker.exitcode}")
    except RuntimeError as dead:  # raised by torch's handler of SIGCHLD
        return dead
    return RuntimeError(f"DataLoader worker (pid unknown) has closed its connection: {error!r}")


def kill_workers(stream: Any) -> None:
    """Kills the loader workers of an iterator that still live: one that hangs would be waited for."""
    alive = [worker for worker in getattr(stream, "_workers", ()) if worker.is_alive()]
    if not alive:
        return
    if stream._worker_pids_set:  # else torch raises an error for each that is killed
        signal_handling._remove_worker_pids(id(stream))
        stream._worker_pids_set = False
    for worker in alive:
        worker.kill()


def die_with_parent() -> None:
    """Has the kernel kill this process when the one that forked it dies, however; where it is no Linux, nothing."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(1, int(signal.SIGKILL))  # PR_SET_PDEATHSIG


def start_worker(worker: int) -> None:
    """Prepares a loader worker for signals, for files that others read too, and for a lack of files."""
    ignore_interrupts(worker)
    separate_offsets()
    end_worker_without_files(worker)


def ignore_interrupts(worker: int) -> None:
    """Lets a loader worker live through the signals that a terminal or scheduler sends to all processes of a run.

    The first SIGTERM counts as such; the second, which the loader sends to a worker that hangs, ends it.
    """
    for number in (signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2):
        signal.signal(number, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, lambda *_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    die_with_parent()  # which may be killed: what it has open, such as connections to other ranks, is to close then
