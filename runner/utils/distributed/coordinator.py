"""Makes all ranks act on an event at the same step, without an extra collective in an undisturbed step.

A rank with a pending message sets a flag that is reduced together with the gradients. Only when the flag arrives do the
ranks run an all-gather to exchange their messages.
"""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Callable
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from runner.utils import distributed
from runner.utils.distributed import RankAbortError, RankError, RankLostError, is_connection_error
from runner.utils.utils import describe, is_signal

T = TypeVar("T")


class Message(NamedTuple):
    """A message that a rank posted."""

    rank: int
    topic: str
    content: Any


class Coordinator:
    """The messages that this rank posts, and those of all ranks in one order.

    On one process `poll` returns a message as soon as it is posted.

    Args:
        store: the store in which a rank that aborts in the middle of a step leaves its reason.
        delays_flags: a flag that arrives on an accelerator is read one step later, when its copy is long done, so that
            reading it does not wait for the device. A step can then not be discarded because of a message.
    Attributes:
        is_sharded: each rank has a shard of the model, so any use of the model is a collective.
        has_aborted: this rank has aborted: its process must end so that its connections are closed.
        is_disconnected: this rank or another one has aborted: nothing more can be exchanged.
        deferred_error: an error of this rank that the other ranks do not know yet.
    """

    def __init__(self, store: dist.Store | None = None, delays_flags: bool = False) -> None:
        self.delays_flags = delays_flags
        self.is_sharded = False
        self.has_aborted = False
        self.is_disconnected = False
        self.deferred_error: BaseException | None = None
        self._store = store
        self._is_distributed = distributed.is_distributed()
        self._outbox: deque[tuple[str, Any]] = deque()
        self._flags: list[tuple[Tensor, Any]] = []  # each with the CUDA event of its copy, or None
        self._lost_error: RankLostError | None = None  # raised when a rank was lost without a reason
        self._num_failures = 0

    def post(self, topic: str, content: Any = None) -> None:
        """Queues a message for the next exchange; safe to call from a signal handler or another thread."""
        self._outbox.append((topic, content))

    def num_unsent(self) -> int:
        """Returns the number of this rank's messages that the other ranks have not received."""
        return len(self._outbox)

    @property
    def has_messages(self) -> bool:
        """True if this rank has messages to send: the flag to reduce."""
        return bool(self._outbox)

    def receive_flag(self, flag: Tensor) -> None:
        """Keeps the reduced flag of a step, above 0 if any rank has messages. The tensor must not change later."""
        if self.delays_flags and flag.is_cuda:
            flag = flag.detach().to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._flags.append((flag, event))
        else:
            self._flags.append((flag.detach().clone() if self.delays_flags else flag.detach(), None))

    def poll(self) -> list[Message]:
        """Returns the messages of all ranks if the flag of a step was set; otherwise an empty list, at no cost."""
        if not self._is_distributed:
            return self.exchange() if self._outbox else []
        num_unread = 1 if self.delays_flags else 0
        is_set = False
        while len(self._flags) > num_unread:
            flag, event = self._flags.pop(0)
            if event is not None:
                event.synchronize()
            is_set |= bool(flag)
        return self.exchange() if is_set else []

    def exchange(self) -> list[Message]:
        """Returns the messages of all ranks so far and clears the flags; every rank must call it."""
        sent = []
        while self._outbox:  # not `list(...)` and `clear`: a signal handler may post in between
            sent.append(self._outbox.popleft())
        self._flags.clear()
        received = distributed.all_gather_object(sent)
        return [Message(rank, topic, content) for rank, messages in enumerate(received) for topic, content in messages]

    def defer_error(self, work: Callable[[], None]) -> None:
        """Runs work that may fail on this rank alone; with several ranks, its error waits for the next exchange."""
        try:
            work()
        except BaseException as error:
            is_known_to_all = isinstance(error, (RankLostError, RankError, InterruptedError))
            if not self._is_distributed or is_signal(error) or is_known_to_all:
                raise
            self.deferred_error = self.deferred_error or error

    def run_on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Returns the results of `work` on all ranks, by rank; every rank must call it.

        Raises:
            RankError: `work` failed on a rank, or a rank had a deferred error.
            RankAbortError: `work` failed on this rank while the others may wait for it in a collective.
        """

        def run() -> T:
            deferred, self.deferred_error = self.deferred_error, None
            if deferred is not None:
                raise deferred
            try:
                return work()
            except BaseException as error:
                may_be_alone = self.is_sharded and self._is_distributed
                if not may_be_alone or is_signal(error) or isinstance(error, RankLostError) or self.all_ranks_fail():
                    raise
                raise self.abort(describe(error), is_expected=False) from error

        return distributed.run_on_all_ranks(run)

    def abort(self, reason: str, is_expected: bool) -> RankAbortError:
        """Leaves this rank's reason in the store and returns the error to raise, in the middle of a collective step.

        Nothing more may be exchanged afterwards. The other ranks find their connections closed and read the reason.
        """
        self.has_aborted = self.is_disconnected = True
        if self._store is not None and self._is_distributed:
            text = f"rank {distributed.rank()}: {reason}".encode("utf-8", "backslashreplace").decode()
            with contextlib.suppress(RuntimeError):  # the store is gone
                first = self._store.compare_set(_ABORT_KEY, "", text).decode(errors="replace")
                if first != text and first.partition(": ")[2] == reason:  # another rank reports the same reason
                    return RankAbortError(first, is_expected=True)
        return RankAbortError(reason, is_expected)

    def all_ranks_fail(self) -> bool:
        """Returns whether all ranks fail after the same collectives, so that none waits for another one.

        A rank that fails calls it where it can't notify the others. It asks the store, not a collective, and waits for
        the other ranks for two seconds at most.
        """
        if self._store is None or not self._is_distributed:
            return False
        self._num_failures += 1
        keys = [f"failed/{self._num_failures}/{rank}" for rank in range(distributed.world_size())]
        try:
            self._store.set(keys[distributed.rank()], str(distributed.count_collectives()))
            if not distributed.wait_for_keys(self._store, keys, _ABORT_TIMEOUT_S):
                return False
            return len({self._store.get(key) for key in keys}) == 1
        except RuntimeError:  # the store is gone
            return False

    def abort_reason(self, error: BaseException) -> str | None:
        """Returns another rank's reason to abort if `error` may be its consequence, otherwise None.

        Raises:
            RankLostError: `error` is a lost connection, and no rank has left a reason.
        """
        if not self._is_distributed or not is_connection_error(error):
            return None
        if error is self._lost_error:
            raise error
        with contextlib.suppress(RuntimeError):  # the store is gone too
            if self._store is not None and distributed.wait_for_keys(self._store, [_ABORT_KEY], _ABORT_TIMEOUT_S):
                self.is_disconnected = True
                return self._store.get(_ABORT_KEY).decode(errors="replace")
        self._lost_error = RankLostError(f"another rank is gone, or does not answer ({str(error).splitlines()[0]})")
        raise self._lost_error from error


_ABORT_KEY = "left"
_ABORT_TIMEOUT_S = 2.0  # enough for the rank that closes its connections to write its reason before, or for all to fail
