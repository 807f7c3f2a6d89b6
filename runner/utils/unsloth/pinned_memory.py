"""A pool of pinned host buffers.

Allocating pinned memory synchronizes the device, so buffers are reused.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

from torch import Tensor

from runner.utils.unsloth.streams import CopyStreams


class PinnedBuffer:
    """A buffer acquired from a pool.

    It returns to the pool when this object is garbage-collected.

    Attributes:
        buffer: uint8, page-locked.
        pending_events: events of the last copies from or to the buffer; a copy into it must wait for them.
    """

    def __init__(self, pool: PinnedBufferPool, buffer: Tensor) -> None:
        self.buffer = buffer
        self.pending_events: list[Any] = []
        weakref.finalize(self, pool.release, buffer, self.pending_events)


class PinnedBufferPool:
    """Pinned host buffers, reused for tensors of about the same size.

    Args:
        limit_bytes: of all buffers together; None is no limit.
    """

    def __init__(self, streams: CopyStreams, limit_bytes: int | None) -> None:
        self._streams, self._limit_bytes = streams, limit_bytes
        self._free: list[tuple[Tensor, list[Any]]] = []  # buffer, pending events
        self.held_bytes = self.peak_bytes = 0
        # A garbage collection may release a buffer in any thread, and in the middle of `acquire`: hence reentrant.
        self._lock = threading.RLock()

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):  # the device is gone
            for _, pending_events in self._free:  # a copy may still read or write the memory that is freed now
                for event in pending_events:
                    self._streams.synchronize(event)

    def acquire(self, num_bytes: int) -> PinnedBuffer | None:
        """Returns a buffer of that size or up to an eighth more.

        None if the limit, or the memory that the host can lock, is reached.
        """
        size = _round_up(num_bytes)
        with self._lock:
            for index, (buffer, pending_events) in enumerate(self._free):
                if size <= buffer.numel() <= size + size // 8:
                    del self._free[index]
                    reused = PinnedBuffer(self, buffer)
                    reused.pending_events += pending_events
                    return reused
            self._free_unused(size)
            if self._limit_bytes is not None and self.held_bytes + size > self._limit_bytes:
                return None
            try:
                buffer = self._streams.allocate(size)
            except RuntimeError:  # the host can't lock more memory: the same as a limit
                return None
            self.held_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return PinnedBuffer(self, buffer)

    def _free_unused(self, size: int) -> None:
        """Frees unused buffers while over the limit, or while more than half is unused."""
        unused_bytes = sum(buffer.numel() for buffer, _ in self._free)
        kept = []
        for buffer, pending_events in self._free:
            is_over_limit = self._limit_bytes is not None and self.held_bytes + size > self._limit_bytes
            is_wanted = not is_over_limit and unused_bytes <= self.held_bytes / 2
            if is_wanted or not all(map(self._streams.is_done, pending_events)):
                kept.append((buffer, pending_events))
            else:
                self.held_bytes -= buffer.numel()
                unused_bytes -= buffer.numel()
        self._free = kept

    def release(self, buffer: Tensor, pending_events: list[Any]) -> None:
        """Returns a buffer to the pool; a copy into it must wait for the events."""
        with self._lock:
            self._free.append((buffer, pending_events))


def _round_up(num_bytes: int) -> int:
    """Returns a size up to an eighth larger, so that there are few distinct sizes."""
    granularity = max(1 << max(num_bytes.bit_length() - 4, 0), 512)
    return -(-num_bytes // granularity) * granularity
