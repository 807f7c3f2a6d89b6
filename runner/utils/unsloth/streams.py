"""Copies between an accelerator and the host, on streams of their own beside its computing. Imports torch only."""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

_PAGE, _PORTABLE = 4096, 1


class Transport(Protocol):
    """What a device can do: it computes in order, and copies beside that, each copy waiting for what it is told to."""

    device: torch.device

    def mark(self) -> Any:
        """Returns an event: what computing was asked to do so far."""

    def send(self, source: Tensor, buffer: Tensor, after: Sequence[Any]) -> tuple[Any, Any]:
        """Copies to the host once the events have passed; returns the events of its begin and end."""

    def bring(self, buffer: Tensor, target: Tensor, after: Sequence[Any]) -> Any:
        """Copies to the device once the events have passed; returns the event of its end."""

    def current(self) -> Any:
        """Returns the stream that computing is asked of now: memory belongs to the one that it was allocated on."""

    def wait(self, event: Any, stream: Any) -> None:
        """Has a stream wait for an event; the program does not."""

    def record_stream(self, tensor: Tensor, owner: Any) -> None:
        """Has what computing is asked of now use a tensor that was allocated on another stream, perhaps."""

    def keep(self, source: Tensor) -> None:
        """Keeps a source's memory from being used again, on whichever stream, before its copy to the host is done."""

    def finish(self, event: Any) -> None:
        """Waits for an event in the program itself."""

    def is_done(self, event: Any) -> bool:
        """Says whether an event has passed."""

    def seconds(self, begin: Any, end: Any) -> float:
        """Returns the time between two events that have passed."""

    def allocate(self, num_bytes: int) -> Tensor:
        """Returns memory of the host, uint8 [num_bytes], that the device can copy to by itself."""

    def is_capturing(self) -> bool:
        """Says whether a graph of the device's work is being recorded, in which nothing may be moved."""


class CopyStreams:
    """The `Transport` of an accelerator: two streams, one a direction, and events.

    Computing is whatever stream is current when it is asked for, not the one that was when this was made.

    Args:
        is_timed: events tell the time, too, and cost a little more.
    """

    def __init__(self, device: torch.device, is_timed: bool = False) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self._out, self._back = self._module.Stream(device), self._module.Stream(device)
        self._is_timed = is_timed

    def mark(self) -> Any:
        """Returns an event of the current stream."""
        return self._record(self.current())

    def _record(self, stream: Any) -> Any:
        event = self._module.Event(enable_timing=self._is_timed)
        event.record(stream)
        return event

    def send(self, source: Tensor, buffer: Tensor, after: Sequence[Any]) -> tuple[Any, Any]:
        """Copies to the host once the events have passed; returns the events of its begin and end."""
        return self._copy(self._out, source, buffer, after)

    def bring(self, buffer: Tensor, target: Tensor, after: Sequence[Any]) -> Any:
        """Copies to the device once the events have passed; returns the event of its end."""
        return self._copy(self._back, buffer, target, after)[1]

    def _copy(self, stream: Any, source: Tensor, target: Tensor, after: Sequence[Any]) -> tuple[Any, Any]:
        for event in after:
            stream.wait_event(event)
        begin = self._record(stream) if self._is_timed else None
        with torch.no_grad(), self._module.stream(stream):
            target.copy_(source, non_blocking=True)
        return begin, self._record(stream)

    def current(self) -> Any:
        """Returns the current stream."""
        return self._module.current_stream(self.device)

    def wait(self, event: Any, stream: Any) -> None:
        """Has a stream wait for an event."""
        stream.wait_event(event)

    def record_stream(self, tensor: Tensor, owner: Any) -> None:
        """Tells the allocator of another stream than the tensor's own, if it is another."""
        if (current := self.current()) != owner:
            tensor.record_stream(current)

    def keep(self, source: Tensor) -> None:
        """Tells the allocator that the copy stream reads the source; its memory is then free only when that is done.

        Not for every copy: the program is ahead of the device, and meanwhile each such source would need its memory.
        """
        source.record_stream(self._out)

    def finish(self, event: Any) -> None:
        """Waits for an event in the program itself."""
        event.synchronize()

    def is_done(self, event: Any) -> bool:
        """Says whether an event has passed."""
        return bool(event.query())

    def seconds(self, begin: Any, end: Any) -> float:
        """Returns the time between two events that have passed."""
        return float(begin.elapsed_time(end)) / 1e3

    def allocate(self, num_bytes: int) -> Tensor:
        """Returns page-locked memory of the host, uint8 [num_bytes]; torch's own is rounded up to a power of two."""
        if self.device.type == "cuda":
            size = -(-num_bytes // _PAGE) * _PAGE  # whole pages: others may be locked through another buffer already
            raw = torch.empty(size + _PAGE, dtype=torch.uint8, device="cpu")
            start = -raw.data_ptr() % _PAGE
            buffer = raw[start : start + size]
            runtime: Any = torch.cuda.cudart()
            if int(runtime.cudaHostRegister(buffer.data_ptr(), size, _PORTABLE)) == 0:
                weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
                return buffer
            with contextlib.suppress(RuntimeError):  # the next call is told of it, whatever it is
                torch.zeros((), device=self.device)
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def is_capturing(self) -> bool:
        """Says whether a graph of the device's work is being recorded."""
        asked = getattr(self._module, "is_current_stream_capturing", None)
        return asked is not None and bool(asked())


def has_streams(device: torch.device) -> bool:
    """Says whether copies to and from a device can go on beside its computing."""
    return device.type not in ("cpu", "meta") and hasattr(torch.get_device_module(device), "Stream")
