"""Failures of a step that are no bug in the program, and the policy for them."""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from runner.utils.distributed import memory
from runner.utils.files.open_files import describe_limit, is_out_of_files
from runner.utils.sampler.stream import StreamError

_REMEDIES = {  # by errno
    errno.ENOENT: "leave the files of a run in place",
    errno.ELOOP: "put the file or folder itself in the place of the link",
    errno.EINVAL: "choose another name, or remove what has that name",
}


class TrainingStopped(Exception):
    """An error that ends training; the message is the reason.

    Attributes:
        is_complete: the state of all engines is that after the last completed step, so it can be saved.
    """

    def __init__(self, message: str, is_complete: bool = True) -> None:
        super().__init__(message)
        self.is_complete = is_complete


class SetupError(TrainingStopped):
    """A mistake in the config that is found before the first step."""


class StepAborted(Exception):
    """A step failed while the loop was stopping anyway."""


class RemoteFailure(Exception):
    """A failure on one rank, as seen by every rank; the message is the rank and the reason.

    Attributes:
        is_expected: False for a bug, which is re-raised with its traceback.
        is_oom: the rank ran out of memory.
        is_early: a mistake in the config that was found before the first step.
    """

    def __init__(self, rank: int, reason: str, is_expected: bool, is_oom: bool, is_early: bool = False) -> None:
        super().__init__(f"rank {rank}: {reason}")
        self.rank = rank
        self.is_expected = is_expected
        self.is_oom = is_oom
        self.is_early = is_early


@dataclass(frozen=True)
class FailurePolicy:
    """The reaction to a failed step.

    Args:
        on_oom: the reaction to running out of memory: end the loop (stop) or skip the step (skip).
        max_skips: number of steps that may be skipped before the loop ends, including those with non-finite values.
    """

    on_oom: str = "stop"
    max_skips: int = 100


def describe_failure(error: BaseException, when: str, device: torch.device) -> str | None:
    """Returns a message with the remedy for an error that is no bug in the program; None for any other error."""
    if memory.is_out_of_memory(error):
        first_line = (str(error).splitlines() or [""])[0]
        return (
            f"Out of memory {when}: {memory.describe_memory(device)}; a smaller batch, or the same cut into more "
            f"micro-steps, needs less ({type(error).__name__}: {first_line})"
        )
    if not isinstance(error, TrainingStopped) and is_out_of_files(error):
        last_line = (str(error).splitlines() or [""])[-1]
        return f"Too many open files {when}: {describe_limit()} ({type(error).__name__}: {last_line})"
    if isinstance(error, StreamError):
        return f"data.train {when}: {error}"
    is_worker_dead = isinstance(error, RuntimeError) and "DataLoader worker (pid" in str(error)
    return f"A loader worker died {when}: {error}" if is_worker_dead else None


@contextlib.contextmanager
def value_errors_as(task: str, kind: type[Exception]) -> Iterator[None]:
    """Raises a ValueError of the block, such as weights that can't be merged, as another kind with the task."""
    try:
        yield
    except ValueError as error:
        raise kind(f"{task}: {error}") from error


@contextlib.contextmanager
def disk_errors_as(what: str, as_error: type[Exception]) -> Iterator[None]:
    """Raises an OSError of the block as `as_error`, with a remedy.

    Args:
        what: the noun of the message: "<what> can't be written".
    """
    try:
        yield
    except OSError as error:
        default = describe_limit() if is_out_of_files(error) else "make room or the folder writable"
        remedy = f"what was saved before is whole: {_REMEDIES.get(error.errno or 0, default)}, then resume"
        raise as_error(f"{what} can't be written: {error}; {remedy}") from error
