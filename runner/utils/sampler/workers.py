"""Loader workers: how they start and end, and how their batches, errors and warnings arrive in this process."""

import multiprocessing
import os
import pickle
import signal
import sys
import traceback
import warnings
from dataclasses import dataclass
from multiprocessing import connection
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, get_worker_info
from torch.utils.data._utils import signal_handling
from torch.utils.data._utils import worker as loader_worker

from runner.utils.distributed.devices import pin
from runner.utils.files.open_files import exit_worker_at_file_limit, unshare_file_offsets
from runner.utils.sampler.packing import PackedBatch
from runner.utils.utils import (
    add_note,
    checked_choice,
    checked_int,
    describe,
    is_signal,
    message_of,
    signal_with_parent,
)

DEFAULT_PREFETCH = 2  # batches of each worker
_GRACE_S = 1.0


@dataclass(frozen=True)
class LoaderSettings:
    """Settings of a DataLoader.

    Args:
        num_workers: loader processes; 0 fetches in this process.
        prefetch_factor: batches prefetched by each worker.
        pin_memory: returns tensors in pinned memory.
        is_persistent: a loader that is iterated again uses the same workers.
    Raises:
        TypeError, ValueError: an argument has the wrong type or is out of range.
    """

    num_workers: int = 0
    prefetch_factor: int = DEFAULT_PREFETCH
    pin_memory: bool = False
    is_persistent: bool = False

    def __post_init__(self) -> None:
        checked_int("num_workers", self.num_workers, 0)
        checked_int("prefetch_factor", self.prefetch_factor, 1)
        checked_choice("pin_memory", self.pin_memory, (False, True))
        checked_choice("is_persistent", self.is_persistent, (False, True))

    def make_loader(self, dataset: Dataset[Any], sampler: Any = None, seed: int | None = None) -> DataLoader[Any]:
        """Returns a loader of a dataset whose items are whole batches; without a sampler it is iterated.

        Args:
            seed: of the workers; None: that of a new `torch.Generator`.
        """
        # By default the loader draws the base seed of its workers from the global generator.
        generator = torch.Generator()
        return DataLoader(
            dataset,
            batch_size=None,
            sampler=sampler,
            num_workers=self.num_workers,
            collate_fn=_pack if self.num_workers else _identity,
            pin_memory=self.pin_memory,
            generator=generator if seed is None else generator.manual_seed(seed),
            prefetch_factor=self.prefetch_factor if self.num_workers else None,
            persistent_workers=self.is_persistent and self.num_workers > 0,
            worker_init_fn=start_worker,
        )


def _identity(batch: Any) -> Any:
    return batch


def _pack(batch: Any) -> Any:
    """Returns a batch, of a worker, ready for its way to this process."""
    try:
        return PackedBatch(batch)
    except Exception as error:  # such as a part that can't be pickled
        return describe_failure(error, "in sending a batch from its loader worker", is_in_worker=True)


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
    """A batch with warnings about its samples.

    In a loader that pins memory, each batch is one, so that `pin` decides about its parts.
    """

    batch: Any
    notes: list[str]

    def pin_memory(self) -> "AnnotatedBatch":
        """Returns it with the batch in pinned memory; torch's loader calls this."""
        return AnnotatedBatch(pin(self.batch), self.notes)


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


def describe_failure(error: BaseException, location: str, is_in_worker: bool | None = None) -> FailedBatch:
    """Returns an error of a dataset or collate as a `FailedBatch`, from a worker with the error's traceback.

    Args:
        location: the sample or batch that was being fetched.
        is_in_worker: this process is a loader worker; None: as torch says.
    """
    if isinstance(error, StopIteration):  # would end the iteration over batches
        stopped, error = error, RuntimeError(describe(error))
        error.__cause__ = stopped
    notes = [location]
    if is_in_worker is None:
        is_in_worker = get_worker_info() is not None
    if is_in_worker:
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


def next_batch(stream: Any) -> Any:
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


def release_workers(stream: Any) -> None:
    """Has torch ignore the death of an iterator's workers, which wait for the next pass, until `resume_workers`."""
    if stream._worker_pids_set:
        signal_handling._remove_worker_pids(id(stream))
        stream._worker_pids_set = False


def resume_workers(loader: DataLoader[Any]) -> Any:
    """Returns the iterator of the next pass of a loader whose workers were released; None if a worker has died."""
    stream: Any = loader._iterator
    if not all(worker.is_alive() for worker in stream._workers):
        return None
    try:
        # From here on torch raises an error, in whatever this process does, if a worker is killed.
        signal_handling._set_worker_pids(id(stream), tuple(worker.pid for worker in stream._workers))
        stream._worker_pids_set = True
        return iter(loader)
    except BaseException as error:
        kill_workers(stream)
        if is_signal(error):
            raise
        return None


def start_worker(number: int) -> None:
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
    exit_worker_at_file_limit(number)


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


def hide_worker() -> bool:
    """Has torch say that this is no loader worker from now on; returns whether it is one.

    A stream then reads as it does without workers. In a worker, `datasets` would split its shards over the workers,
    which changes the order of some streams (interleaved, concatenated) even if there is one worker.
    """
    if get_worker_info() is None:
        return False
    loader_worker._worker_info = None
    # `datasets` does this in a worker: a forked lock may be held for ever.
    if reset_lock := getattr(sys.modules.get("fsspec.asyn"), "reset_lock", None):
        reset_lock()
    return True
