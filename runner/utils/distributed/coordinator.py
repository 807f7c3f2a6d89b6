"""How the ranks of a run decide the same at the same step, without a collective that training would not make.

A rank that has something to say raises a flag; the flag rides on what the ranks exchange anyway, and only where it
arrives do they all meet. Imports `distributed` of its siblings.
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
    """What a rank said."""

    rank: int
    topic: str
    content: Any


class Coordinator:
    """What this rank has to say, and what all have said, in one order.

    On one process there is nobody to wait for: what was said is heard at once.

    Args:
        store: where a rank that leaves in the midst of a step says why.
        is_late: what arrives on an accelerator is read a step later, when it has been there for long, instead of
            holding the step until the device is done. A step can then not be undone for it.
    """

    def __init__(self, store: dist.Store | None = None, is_late: bool = False) -> None:
        self.is_late = is_late
        self._store = store
        self._is_many = distributed.is_distributed()
        self._words: deque[tuple[str, Any]] = deque()
        self._arrived: list[tuple[Tensor, Any]] = []
        self.is_spread = False  # each rank has a part of the model: any use of it is an exchange
        self._lost: RankLostError | None = None  # nobody has left word of why
        self.has_aborted = False  # this rank, so that its process is to end and its connections with it
        self.is_alone = False  # a rank has left, this one or another: nothing more can be exchanged
        self._num_failures = 0
        self.deferred_error: BaseException | None = None  # of this rank alone, until the others know

    def post(self, topic: str, content: Any = None) -> None:
        """Has something to say at the next occasion; a signal handler or another thread may call it."""
        self._words.append((topic, content))

    def num_unsent(self) -> int:
        """Returns how much this rank has to say that the others have not heard."""
        return len(self._words)

    @property
    def has_messages(self) -> bool:
        """Whether this rank's flag is up."""
        return bool(self._words)

    def receive_flag(self, flag: Tensor) -> None:
        """Takes what an exchange brought: above 0 where a rank's flag was up. The tensor must not change."""
        if self.is_late and flag.is_cuda:
            flag = flag.detach().to("cpu", non_blocking=True)
            event = torch.cuda.Event()
            event.record()
            self._arrived.append((flag, event))
        else:
            self._arrived.append((flag.detach().clone() if self.is_late else flag.detach(), None))

    def poll(self) -> list[Message]:
        """Returns what all ranks said, where a flag was up in a step's exchange; else, at no cost, nothing."""
        if not self._is_many:
            return self.exchange() if self._words else []
        num_unread = 1 if self.is_late else 0
        is_called = False
        while len(self._arrived) > num_unread:
            flag, event = self._arrived.pop(0)
            if event is not None:
                event.synchronize()
            is_called |= bool(flag.any())
        return self.exchange() if is_called else []

    def exchange(self) -> list[Message]:
        """Returns what all ranks have said so far; all ranks are here, and their flags are down."""
        own = []
        while self._words:
            own.append(self._words.popleft())
        self._arrived.clear()
        said = distributed.all_gather_object(own)
        return [Message(rank, topic, content) for rank, words in enumerate(said) for topic, content in words]

    def defer_error(self, work: Callable[[], None]) -> None:
        """Does what may fail on this rank alone: on several ranks that is kept for the next time that all meet."""
        if not self._is_many:
            work()
            return
        try:
            work()
        except BaseException as error:
            if is_signal(error) or isinstance(error, (RankLostError, RankError, InterruptedError)):  # all know
                raise
            self.deferred_error = self.deferred_error or error

    def run_on_all_ranks(self, work: Callable[[], T]) -> list[T]:
        """Returns what `work` gave on every rank, by rank; all ranks call it.

        Raises:
            RankError: it failed on one of them, or something before it did.
            LeftError: it failed here, where the others may wait in the midst of it.
        """

        def untroubled() -> T:
            trouble, self.deferred_error = self.deferred_error, None
            if trouble is not None:
                raise trouble
            if not (self.is_spread and self._is_many):
                return work()
            try:
                return work()
            except BaseException as error:
                if is_signal(error) or isinstance(error, RankLostError):
                    raise
                if self.fails_everywhere():
                    raise
                raise self.abort(describe(error), is_told=False) from error

        return distributed.run_on_all_ranks(untroubled)

    def abort(self, reason: str, is_told: bool) -> RankAbortError:
        """Leaves word of why this rank goes in the midst of what all do, and returns what is to be raised.

        Nothing more is to be exchanged then: the others find their connections closed, and read it.
        """
        self.has_aborted = self.is_alone = True
        if self._store is not None and self._is_many:
            word = f"rank {distributed.rank()}: {reason}".encode("utf-8", "backslashreplace").decode()
            with contextlib.suppress(RuntimeError):  # the store has gone before
                first = self._store.compare_set(_LEFT, "", word).decode(errors="replace")
                if first != word and first.partition(": ")[2] == reason:  # that rank tells it
                    return RankAbortError(first, is_told=True)
        return RankAbortError(reason, is_told)

    def fails_everywhere(self) -> bool:
        """Says whether all ranks fail at once, after the same collectives, so that none waits for another in one.

        A rank that fails calls it where the others can't be told. It learns of them through the store, not by a
        collective, and waits for them no longer than a moment.
        """
        if self._store is None or not self._is_many:
            return False
        self._num_failures += 1
        keys = [f"failed/{self._num_failures}/{rank}" for rank in range(distributed.world_size())]
        try:
            self._store.set(keys[distributed.rank()], str(distributed.count_collectives()))
            if not distributed.wait_for(self._store, keys, _PATIENCE_S):
                return False
            return len({self._store.get(key) for key in keys}) == 1
        except RuntimeError:  # the store has gone
            return False

    def abort_reason(self, error: BaseException) -> str | None:
        """Returns why another rank has left, if `error` may come of that.

        Raises:
            LostError: it comes of that, and nobody has left word.
        """
        if not self._is_many or not is_connection_error(error):
            return None
        if error is self._lost:
            raise error
        with contextlib.suppress(RuntimeError):  # the store has gone too
            if self._store is not None and distributed.wait_for(self._store, [_LEFT], _PATIENCE_S):
                self.is_alone = True
                return self._store.get(_LEFT).decode(errors="replace")
        self._lost = RankLostError(f"another rank is gone, or does not answer ({str(error).splitlines()[0]})")
        raise self._lost from error


_LEFT = "left"
_PATIENCE_S = 2.0  # for a rank that closes its connections to have left word before, or for all to fail
