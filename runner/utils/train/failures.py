"""What goes wrong in a step without being a mistake in the program, and what is to become of the step then.

Imports `memory` and `open_files` of its siblings.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from runner.utils.distributed import memory
from runner.utils.files.open_files import describe_limit, is_out_of_files

_DEAD_WORKER = "DataLoader worker (pid"


class TrainingStopped(Exception):
    """Training can't go on; the message says why. With `is_whole`, the state is that of the last step done."""

    def __init__(self, message: str, is_whole: bool = True) -> None:
        super().__init__(message)
        self.is_complete = is_whole


class SetupError(TrainingStopped):
    """A mistake in the config that was found before the first step."""


class StepAborted(Exception):
    """A step was not made, and the loop is stopping anyway."""


class RemoteFailure(Exception):
    """What one rank can't do, as all ranks know it. `is_told`: it is no mistake in the program.

    `is_early`: it is a mistake that was found before the first step.
    """

    def __init__(self, rank: int, reason: str, is_told: bool, is_oom: bool, is_early: bool = False) -> None:
        super().__init__(reason)
        self.rank, self.reason, self.is_expected, self.is_oom = rank, reason, is_told, is_oom
        self.is_early = is_early

    def describe(self) -> str:
        """Says on which rank it was, and what."""
        return f"rank {self.rank}: {self.reason}"


@dataclass(frozen=True)
class FailurePolicy:
    """What becomes of a step that went wrong.

    Args:
        on_oom: out of memory ends the loop (stop), or the step is left out (skip).
        max_skips: steps that may be left out, for that or for what is not finite, before the loop ends.
    """

    on_oom: str = "stop"
    max_skips: int = 100


def describe_failure(error: BaseException, when: str, device: torch.device) -> str | None:
    """Returns what a person should know of an error that is no mistake in the program; None for any other."""
    if memory.is_out_of_memory(error):
        first = (str(error).splitlines() or [""])[0]
        remedy = "a smaller batch, or the same cut into more micro-steps, needs less"
        return f"Out of memory {when}: {memory.describe(device)}; {remedy} ({type(error).__name__}: {first})"
    if not isinstance(error, TrainingStopped) and is_out_of_files(error):
        found = (str(error).splitlines() or [""])[-1]
        return f"Too many open files {when}: {describe_limit()} ({type(error).__name__}: {found})"
    if isinstance(error, RuntimeError) and _DEAD_WORKER in str(error):
        return f"A loader worker died {when}: {error}"
    return None


@contextlib.contextmanager
def disk_errors_as(what: str, as_error: type[Exception]) -> Iterator[None]:
    """What the disk refuses is raised as `as_error`, with the remedy."""
    try:
        yield
    except OSError as error:
        action = describe_limit() if is_out_of_files(error) else "make room or the folder writable"
        if isinstance(error, FileNotFoundError):
            action = "leave the files of a run in place"
        elif error.errno == errno.ELOOP:
            action = "put the file or folder itself in the place of the link"
        elif error.errno == errno.EINVAL:
            action = "choose another name, or remove what has that name"
        remedy = f"what was saved before is whole: {action}, then resume"
        raise as_error(f"{what} can't be written: {error}; {remedy}") from error
