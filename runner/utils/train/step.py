"""One step: its batches through every engine, and what becomes of a step that goes wrong, on all ranks alike.

A step that can't be made is discarded whole: afterwards all is as it was before its first micro-step. What it drives it
knows by Protocols: it must not import engines.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch

from runner.utils import distributed
from runner.utils.distributed import RankError, RankLostError
from runner.utils.distributed.coordinator import Coordinator, Message
from runner.utils.distributed.memory import is_out_of_memory
from runner.utils.train.failures import (
    FailurePolicy,
    RemoteFailure,
    SetupError,
    StepAborted,
    TrainingStopped,
    describe_failure,
)
from runner.utils.utils import add_note, derive_seed, describe, is_signal


class EngineGroup(Protocol):
    """What is trained: one engine or several."""

    @property
    def device(self) -> torch.device: ...
    @property
    def tokens(self) -> int: ...
    @property
    def is_updating(self) -> bool: ...
    @property
    def can_shadow(self) -> bool: ...
    def seed(self, seed: int, shared: tuple[int, ...], /) -> None: ...
    def micro_step(self, batch: Any, weight: float, /) -> None: ...
    def step(self, hear: Callable[[], Mapping[str, str]], /) -> Mapping[str, str]: ...
    def shadow_step(self) -> None: ...
    def discard(self) -> None: ...
    def is_stopped_by(self, faults: Mapping[str, str], /) -> bool: ...
    def find_late_faults(self, is_alone: bool = False) -> Mapping[str, str]: ...
    def take_metrics(self) -> dict[str, float]: ...


class BatchStream(Protocol):
    """An endless iterator of batches that knows how many samples it has given, and goes back to a position."""

    weight: float

    @property
    def num_samples_total(self) -> int: ...
    def __next__(self) -> Any: ...
    def position(self) -> Any: ...
    def seek(self, position: Any, /) -> None: ...


class StepRunner:
    """Makes steps, one at a time, and counts those left out.

    Args:
        hear: called with what ranks have said of anything but a step.
        warn: called with what a person should know of a step that was left out.
    """

    def __init__(
        self,
        engines: EngineGroup,
        batches: BatchStream,
        coordinator: Coordinator,
        *,
        accumulate: int,
        seed: int,
        policy: FailurePolicy,
        hear: Callable[[Message], None],
        warn: Callable[[str], None],
    ) -> None:
        self._engines, self._batches, self.coordinator = engines, batches, coordinator
        self._accumulate, self._seeds, self._policy = accumulate, (seed, distributed.rank()), policy
        self._hear_other, self._warn = hear, warn
        self._weighted: dict[str, set[int]] = {}  # ranks on which an engine's losses have a weight
        self.num_skipped = 0
        self.too_many: str | None = None  # why the loop is to end at the next boundary
        self.is_whole = True  # what is trained stands between two steps

    def run(self, step: int, is_stopping: Callable[[], bool]) -> None:
        """Makes the step after `step` steps.

        Raises:
            Halt: it can't be made, and is not to be left out; or some of it was done.
            LostError: another rank is gone.
        """
        position, first_sample = self._batches.position(), self._batches.num_samples_total
        seed, rank = self._seeds
        try:
            for micro_step in range(self._accumulate):
                batch = next(self._batches)
                self._engines.seed(derive_seed(seed, step, micro_step, rank), (seed, step, micro_step))
                self._engines.micro_step(batch, self._batches.weight)
            faults = self._engines.step(self._poll_messages)
        except BaseException as error:
            if is_signal(error):
                raise
            faults = self._recover(error, step, position, is_stopping)
        if faults:
            self._leave_out(faults, step, position, first_sample)

    def _poll_messages(self) -> dict[str, str]:
        """Returns the faults that ranks have found in their share of the step.

        Raises:
            Elsewhere: one of them can't make it.
        """
        words = self.coordinator.poll()
        faults: dict[str, str] = {}
        for word in words:
            if word.topic == "fault":
                name, fault = word.content
                faults.setdefault(name, f"on rank {word.rank} {fault}")
            elif word.topic == "weighted":
                self._weighted.setdefault(word.content, set()).add(word.rank)
            elif word.topic != "error":
                self._hear_other(word)
        for word in words:
            if word.topic == "error":
                raise RemoteFailure(word.rank, *word.content)
        for name, ranks in self._weighted.items():
            if len(ranks) < distributed.world_size():
                found = f"{name}: the forward returned a weight on some ranks and not on others"
                raise TrainingStopped(f"{found}; return it on all or on none: the losses would not count alike")
        return faults

    def _recover(
        self, error: BaseException, step: int, position: Any, is_stopping: Callable[[], bool]
    ) -> dict[str, str]:
        """Discards the step; returns why it is left out.

        Raises:
            BaseException: the error itself, where it is a mistake in the program of this rank.
        """
        device = self._engines.device
        reason, is_oom = describe_failure(error, f"in step {step + 1}", device), is_out_of_memory(error)
        if not isinstance(error, RemoteFailure) and self._engines.is_updating:
            raise self._leave_update(error, reason)
        if isinstance(error, TrainingStopped) and not error.is_complete:  # by which another error may be told
            self.is_whole = False
        shared: RemoteFailure | None = None
        if distributed.is_distributed():
            try:
                shared = self.share(error, reason, is_oom)
            except BaseException:
                if self.coordinator.is_alone and not self.coordinator.is_spread:
                    with contextlib.suppress(Exception):  # `is_whole` tells it
                        self._discard(position)
                raise
            reason, is_oom = shared.describe(), shared.is_oom
        self._discard(position)
        if shared is not None and not shared.is_expected and shared.rank != distributed.rank():
            raise TrainingStopped(shared.describe())
        if reason is None or (shared is not None and not shared.is_expected):
            raise error
        if is_stopping():  # the signal that asked for it may have ended a worker too
            raise StepAborted(reason) from error
        if shared is not None and shared.is_early:
            raise SetupError(reason, is_whole=False) from error
        if self._policy.on_oom == "stop" or not is_oom:
            raise TrainingStopped(reason) from error
        try:
            for _ in range(self._accumulate):
                next(self._batches)
        except BaseException:
            self._batches.seek(position)
            raise
        return {"": reason}

    def _leave_update(self, error: BaseException, reason: str | None) -> BaseException:
        """Returns what an error in the midst of an update is to be raised as: the state is no step's."""
        self.is_whole = False
        remedy = "Its update was under way: go on from the last checkpoint"
        if reason is None:
            add_note(error, remedy)
        message = describe(error) if reason is None else f"{reason}. {remedy}"
        if distributed.is_distributed():
            left = self.coordinator.abort(message, is_told=reason is not None)
            left.__cause__ = error
            return left
        if reason is None:
            return error
        halt = TrainingStopped(message, is_whole=False)
        halt.__cause__ = error
        return halt

    def share(self, error: BaseException, reason: str | None = None, is_oom: bool = False) -> RemoteFailure:
        """Tells the other ranks, in their next exchange, of what this one can't do; returns what all know then.

        Raises:
            LostError, Halt: they are not there any more, or can't be told but by this rank's leaving.
        """
        if isinstance(error, RemoteFailure):
            return error
        if isinstance(error, (RankError, RankLostError)):
            raise error
        left = self.coordinator.abort_reason(error)
        if left is not None:
            raise TrainingStopped(left, is_whole=False) from error
        message = reason or (str(error) if isinstance(error, TrainingStopped) else describe(error))
        is_told, is_early = reason is not None or isinstance(error, TrainingStopped), isinstance(error, SetupError)
        # Heard a step later, it would come after the update of a step that lacks this rank's share.
        if not self._engines.can_shadow or self.coordinator.is_late:
            if self.coordinator.fails_everywhere():
                return RemoteFailure(distributed.rank(), message, is_told, False, is_early)  # no further step is made
            raise self.coordinator.abort(message, is_told) from error
        self.coordinator.post("error", (message, is_told, is_oom, is_early))
        self._engines.shadow_step()
        try:
            self._poll_messages()
        except RemoteFailure as elsewhere:
            return elsewhere
        raise AssertionError("a word was said and not heard")

    def _discard(self, position: Any) -> None:
        try:
            self._engines.discard()
        except Exception as error:  # such as an accelerator that has failed for good
            self.is_whole = False
            add_note(error, "The step can't be discarded, and nothing is saved: go on from the last checkpoint")
            raise
        self._batches.seek(position)

    def _leave_out(self, faults: Mapping[str, str], step: int, position: Any, first_sample: int) -> None:
        """Ends the loop with a step that is not to be left out, or counts it."""
        samples = f"samples {first_sample} to {self._batches.num_samples_total - 1} of the stream"
        message = f"Step {step + 1} ({samples}) went wrong. {describe_faults(faults)}"
        if self._engines.is_stopped_by(faults):
            self._discard(position)
            raise TrainingStopped(f"{message}. The step was discarded: the run stands at step {step}")
        self.num_skipped += 1
        most = self._policy.max_skips
        self._warn(f"{message}. It is left out, as number {self.num_skipped} of at most {most}")
        if self.num_skipped > most:
            self.too_many = f"More steps went wrong than the {most} that may be left out"


def describe_faults(faults: Mapping[str, str]) -> str:
    """Returns what went wrong, by engine, as one text."""
    return "; ".join(f"{name}: {fault}" if name else fault for name, fault in faults.items())
