"""Memory of the host that a device copies to by itself: allocating it stops the device, so it is used again.

Imports torch only.
"""

from __future__ import annotations

import contextlib
import threading
import weakref
from typing import Any

from torch import Tensor

from runner.utils.unsloth.streams import Transport


class PinnedBuffer:
    """A buffer of the host for as long as somebody holds this; then another may have it."""

    def __init__(self, pool: PinnedBufferPool, buffer: Tensor) -> None:
        self.buffer = buffer
        self.last: list[Any] = []  # what must have passed before it is written again
        weakref.finalize(self, pool.take_back, buffer, self.last)


class PinnedBufferPool:
    """Buffers on the host, used again by tensors of about their size; allocating one stops the device.

    Args:
        limit: bytes in all; None is no limit.
    """

    def __init__(self, transport: Transport, limit: int | None) -> None:
        self._transport, self._limit = transport, limit
        self._free: list[tuple[Tensor, list[Any]]] = []
        self.held_bytes = self.peak_bytes = 0
        self._lock = threading.RLock()  # a lease may end in any thread, and while another is made

    def __del__(self) -> None:
        with contextlib.suppress(RuntimeError):  # the device is gone
            for _, last in self._free:  # a copy may still read or write what is freed now
                for event in last:
                    self._transport.finish(event)

    def lease(self, num_bytes: int) -> PinnedBuffer | None:
        """Returns a buffer of that size or up to an eighth more, or None where the limit or the host leaves none."""
        size = _rounded(num_bytes)
        with self._lock:
            for index, (buffer, last) in enumerate(self._free):
                if size <= buffer.numel() <= size + size // 8:
                    del self._free[index]
                    lease = PinnedBuffer(self, buffer)
                    lease.last += last
                    return lease
            self._make_room(size)
            if self._limit is not None and self.held_bytes + size > self._limit:
                return None
            try:
                buffer = self._transport.allocate(size)
            except RuntimeError:  # the host has no more that can be locked: as beyond the limit
                return None
            self.held_bytes += size
            self.peak_bytes = max(self.peak_bytes, self.held_bytes)
        return PinnedBuffer(self, buffer)

    def _make_room(self, size: int) -> None:
        """Gives up buffers that fit nothing, the oldest first: over the limit, or once they are half of all."""
        idle = sum(buffer.numel() for buffer, _ in self._free)
        kept = []
        for buffer, last in self._free:
            is_over = self._limit is not None and self.held_bytes + size > self._limit
            if (is_over or idle > self.held_bytes / 2) and all(map(self._transport.is_done, last)):
                self.held_bytes -= buffer.numel()
                idle -= buffer.numel()
            else:
                kept.append((buffer, last))
        self._free = kept

    def take_back(self, buffer: Tensor, last: list[Any]) -> None:
        """Has a buffer again, to be written once these events have passed."""
        with self._lock:
            self._free.append((buffer, last))


def _rounded(num_bytes: int) -> int:
    """Returns a size up to an eighth larger, of which there are few."""
    step = max(1 << max(num_bytes.bit_length() - 4, 0), 512)
    return -(-num_bytes // step) * step
