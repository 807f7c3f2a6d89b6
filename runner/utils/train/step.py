"""One step: its batches through every engine, and the recovery from a failed step, alike on all ranks.

A failed step is discarded: engines and batches return to their state before its first micro-step.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

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
from runner.utils.train.protocols import BatchStream, EngineGroup
from runner.utils.utils import add_note, derive_seeds, describe, is_signal

_NUM_SEEDS = 256  # steps whose seeds are derived together


class StepRunner:
    """Runs steps, one at a time, and counts the skipped ones.

    Args:
        accumulate: micro-steps per step.
        seed: seed of the run, from which each micro-step's seed is derived.
        policy: the reaction to failed steps.
        on_message: called with each message of a rank that is not about a step.
        warn: called with a message about a skipped step.
    Attributes:
        num_skipped: the number of steps skipped so far.
        stop_reason: set when too many steps were skipped: the loop must end at the next boundary.
        is_complete: the engines' state is that between two steps, so it can be saved.
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
        on_message: Callable[[Message], None],
        warn: Callable[[str], None],
    ) -> None:
        self.coordinator = coordinator
        self.num_skipped = 0
        self.stop_reason: str | None = None
        self.is_complete = True
        self._engines = engines
        self._batches = batches
        self._prefetch: Callable[[], None] | None = getattr(batches, "prefetch", None)
        self._accumulate = accumulate
        self._seed = seed
        self._rank = distributed.rank()
        self._policy = policy
        self._on_message = on_message
        self._warn = warn
        self._seeds: list[list[int]] = []  # by micro-step and step, from `_first_seeded` on
        self._first_seeded = 0
        self._weighted_ranks: dict[str, set[int]] = {}  # by engine: the ranks on which its losses have a weight

    def run(self, step: int, is_stopping: Callable[[], bool], is_last: bool = False) -> None:
        """Runs the step that follows `step` completed steps, or skips it.

        Args:
            is_last: no step follows, so no batch is read for it.
        Raises:
            TrainingStopped: the step failed and must not be skipped, or it failed during its update.
            StepAborted: the step failed while the loop was stopping.
            RankLostError: another rank is gone.
        """
        position, first_sample = self._batches.position(), self._batches.num_samples_total
        self._engines.begin_step(step)
        if not (self._seeds and self._first_seeded <= step < self._first_seeded + _NUM_SEEDS):
            self._derive_seeds(step)
        try:
            for micro_step in range(self._accumulate):
                batch = next(self._batches)
                own_seed = self._seeds[micro_step][step - self._first_seeded]
                self._engines.seed(own_seed, (self._seed, step, micro_step))
                self._engines.micro_step(batch, self._batches.weight)
                if self._prefetch is not None:  # the device is busy with this micro-step
                    is_end = micro_step + 1 == self._accumulate and (is_last or is_stopping())
                    if not is_end:
                        self._prefetch()
            faults = self._engines.step(self._poll_messages)
        except BaseException as error:
            if is_signal(error):
                raise
            faults = self._recover(error, step, position, is_stopping)
        if faults:
            self._skip_step(faults, step, position, first_sample)

    def _derive_seeds(self, step: int) -> None:
        """Derives the seeds of this rank's micro-steps in the next steps, each from the seed of the run alone."""
        steps = range(step, step + _NUM_SEEDS)
        self._seeds = [derive_seeds(self._seed, steps, number, self._rank) for number in range(self._accumulate)]
        self._first_seeded = step

    def _poll_messages(self) -> dict[str, str]:
        """Returns the faults (non-finite values) that ranks have found in the step, by engine.

        Raises:
            RemoteFailure: a rank has failed in the step.
        """
        messages = self.coordinator.poll()
        faults: dict[str, str] = {}
        if not messages and not self._weighted_ranks:
            return faults
        for message in messages:
            if message.topic == "fault":
                name, fault = message.content
                faults.setdefault(name, f"on rank {message.rank} {fault}")
            elif message.topic == "weighted":
                self._weighted_ranks.setdefault(message.content, set()).add(message.rank)
            elif message.topic != "error":
                self._on_message(message)
        for message in messages:  # after all others are handled
            if message.topic == "error":
                raise RemoteFailure(message.rank, *message.content)
        for name, ranks in self._weighted_ranks.items():
            if len(ranks) < distributed.world_size():
                raise TrainingStopped(
                    f"{name}: the forward returned a weight on some ranks and not on others; return it on all or on "
                    "none: the losses would not count alike"
                )
        return faults

    def _recover(
        self, error: BaseException, step: int, position: Any, is_stopping: Callable[[], bool]
    ) -> dict[str, str]:
        """Discards a failed step and returns the reason to skip it.

        Raises:
            TrainingStopped, StepAborted, RankLostError: the step must not be skipped.
            BaseException: the error itself if it is a bug on this rank.
        """
        reason = describe_failure(error, f"in step {step + 1}", self._engines.device)
        is_oom = is_out_of_memory(error)
        if not isinstance(error, RemoteFailure) and self._engines.is_updating:
            self._abort_update(error, str(error) if isinstance(error, TrainingStopped) else reason)
        if isinstance(error, TrainingStopped) and not error.is_complete:
            self.is_complete = False
        failure: RemoteFailure | None = None
        if distributed.is_distributed():
            try:
                failure = self.share_failure(error, reason, is_oom)
            except BaseException:
                if self.coordinator.is_disconnected and not self.coordinator.is_sharded:
                    with contextlib.suppress(Exception):  # then `is_complete` is False
                        self._discard(position)
                raise
            reason, is_oom = str(failure), failure.is_oom
        self._discard(position)
        if failure is not None and not failure.is_expected and failure.rank != distributed.rank():
            raise TrainingStopped(str(failure))
        if reason is None or (failure is not None and not failure.is_expected):
            raise error
        if is_stopping():
            # The signal that stops the loop may have ended a loader worker too: no failure of its own.
            raise StepAborted(reason) from error
        if failure is not None and failure.is_early:
            raise SetupError(reason, is_complete=False) from error
        if self._policy.on_oom == "stop" or not is_oom:
            raise TrainingStopped(reason) from error
        try:
            for _ in range(self._accumulate):  # skip the step's batches
                next(self._batches)
        except BaseException:
            self._batches.seek(position)
            raise
        return {"": reason}

    def _abort_update(self, error: BaseException, reason: str | None) -> NoReturn:
        """Raises the error of a failure during an update, whose state belongs to no step."""
        self.is_complete = False
        lost_reason = self.coordinator.abort_reason(error)
        if lost_reason is not None:  # engines in turns: another rank has failed while this one waited for it
            raise TrainingStopped(lost_reason, is_complete=False) from error
        if isinstance(error, SetupError) and not distributed.is_distributed():
            raise error
        remedy = "Its update was under way: go on from the last checkpoint"
        if reason is None:
            add_note(error, remedy)
        message = describe(error) if reason is None else f"{reason}. {remedy}"
        if distributed.is_distributed():
            raise self.coordinator.abort(message, is_expected=reason is not None) from error
        if reason is None:
            raise error
        raise TrainingStopped(message, is_complete=False) from error

    def share_failure(self, error: BaseException, reason: str | None = None, is_oom: bool = False) -> RemoteFailure:
        """Shares this rank's failure with all ranks in their next exchange; returns the failure that all ranks see.

        If several ranks fail in a step, all see the failure of the same one.

        Raises:
            RankLostError, TrainingStopped: the others are gone, or this rank must abort to notify them.
        """
        if isinstance(error, RemoteFailure):
            return error
        if isinstance(error, (RankError, RankLostError)):
            raise error
        abort_reason = self.coordinator.abort_reason(error)
        if abort_reason is not None:
            raise TrainingStopped(abort_reason, is_complete=False) from error
        message = reason or (str(error) if isinstance(error, TrainingStopped) else describe(error))
        is_expected = reason is not None or isinstance(error, TrainingStopped)
        is_early = isinstance(error, SetupError)
        # A delayed flag would arrive after the update of a step that lacks this rank's gradients.
        if not self._engines.can_shadow or self.coordinator.delays_flags:
            if self.coordinator.all_ranks_fail():
                return RemoteFailure(self._rank, message, is_expected, is_oom=False, is_early=is_early)  # never skipped
            raise self.coordinator.abort(message, is_expected) from error
        self.coordinator.post("error", (message, is_expected, is_oom, is_early))
        self._engines.shadow_step()
        try:
            self._poll_messages()
        except RemoteFailure as failure:
            return failure
        raise AssertionError("an error was posted and not received")

    def _discard(self, position: Any) -> None:
        try:
            self._engines.discard()
        except Exception as error:  # such as an accelerator that has failed for good
            self.is_complete = False
            add_note(error, "The step can't be discarded, and nothing is saved: go on from the last checkpoint")
            raise
        self._batches.seek(position)

    def _skip_step(self, faults: Mapping[str, str], step: int, position: Any, first_sample: int) -> None:
        """Counts a faulty step as skipped, or discards it and raises if an engine must stop at its fault."""
        message = (
            f"Step {step + 1} (samples {first_sample} to {self._batches.num_samples_total - 1} of the stream) "
            f"went wrong. {describe_faults(faults)}"
        )
        if self._engines.is_stopped_by(faults):
            self._discard(position)
            raise TrainingStopped(f"{message}. The step was discarded: the run stands at step {step}")
        self.num_skipped += 1
        most = self._policy.max_skips
        self._warn(f"{message}. It is left out, as number {self.num_skipped} of at most {most}")
        if self.num_skipped > most:
            self.stop_reason = f"More steps went wrong than the {most} that may be left out"


def describe_faults(faults: Mapping[str, str]) -> str:
    """Returns faults by engine as one text."""
    return "; ".join(f"{name}: {fault}" if name else fault for name, fault in faults.items())
