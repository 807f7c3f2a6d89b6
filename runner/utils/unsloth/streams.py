"""Copies between an accelerator and host memory on streams beside computation."""

import contextlib
import weakref
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_PAGE_BYTES = 4096
_CUDA_HOST_REGISTER_PORTABLE = 1


class CopyStreams:
    """The compute stream of an accelerator, events on it, and one copy stream for each direction.

    The compute stream is the stream that is current at each call, not the one at construction. An event is done when
    the device has completed all work that was queued on its stream before.

    Args:
        is_timed: events also record the time, which costs a little more.
    """

    def __init__(self, device: torch.device, is_timed: bool = False) -> None:
        self.device = device
        self._module = torch.get_device_module(device)
        self._to_host_stream = self._module.Stream(device)
        self._to_device_stream = self._module.Stream(device)
        self._is_timed = is_timed

    def record_event(self) -> Any:
        """Returns an event at the current end of the compute stream."""
        return self._record(self.current_stream())

    def _record(self, stream: Any) -> Any:
        event = self._module.Event(enable_timing=self._is_timed)
        event.record(stream)
        return event

    def copy_to_host(self, source: Tensor, buffer: Tensor, after: Sequence[Any]) -> tuple[Any, Any]:
        """Queues a copy to the host after events; returns the events of its begin and end."""
        return self._copy(self._to_host_stream, source, buffer, after)

    def copy_to_device(self, buffer: Tensor, target: Tensor, after: Sequence[Any]) -> Any:
        """Queues a copy to the device after events; returns the event of its end."""
        return self._copy(self._to_device_stream, buffer, target, after)[1]

    def _copy(self, stream: Any, source: Tensor, target: Tensor, after: Sequence[Any]) -> tuple[Any, Any]:
        for event in after:
            stream.wait_event(event)
        begin = self._record(stream) if self._is_timed else None
        with torch.no_grad(), self._module.stream(stream):
            target.copy_(source, non_blocking=True)
        return begin, self._record(stream)

    def current_stream(self) -> Any:
        """Returns the current compute stream, which owns the memory that is allocated now."""
        return self._module.current_stream(self.device)

    def wait_event(self, event: Any, stream: Any) -> None:
        """Queues a wait for an event on a stream, without blocking the host."""
        stream.wait_event(event)

    def record_stream(self, tensor: Tensor, owner: Any) -> None:
        """Tells the allocator that the current stream uses a tensor, unless it is `owner`."""
        if (current := self.current_stream()) != owner:
            tensor.record_stream(current)

    def record_copy_stream(self, source: Tensor) -> None:
        """Tells the allocator that the copy stream reads a source.

        Avoid it where the compute stream waits for the copy anyway: the host runs ahead of the device, and until the
        copies are done, the allocator would keep the memory of all these sources.
        """
        source.record_stream(self._to_host_stream)

    def synchronize(self, event: Any) -> None:
        """Blocks the host until an event is done."""
        event.synchronize()

    def is_done(self, event: Any) -> bool:
        return bool(event.query())

    def elapsed_s(self, begin: Any, end: Any) -> float:
        return float(begin.elapsed_time(end)) / 1e3

    def allocate(self, num_bytes: int) -> Tensor:
        """Returns pinned host memory, uint8 [num_bytes].

        Torch's own allocator for pinned memory rounds up to a power of two.
        """
        if self.device.type == "cuda":
            # Whole pages: a page can be registered only once, so two buffers must not share one.
            size = -(-num_bytes // _PAGE_BYTES) * _PAGE_BYTES
            raw = torch.empty(size + _PAGE_BYTES, dtype=torch.uint8, device="cpu")
            start = -raw.data_ptr() % _PAGE_BYTES
            buffer = raw[start : start + size]
            runtime: Any = torch.cuda.cudart()
            if int(runtime.cudaHostRegister(buffer.data_ptr(), size, _CUDA_HOST_REGISTER_PORTABLE)) == 0:
                weakref.finalize(buffer, runtime.cudaHostUnregister, buffer.data_ptr())
                return buffer
            # The failure stays pending, and the next CUDA call would raise it: clear it here.
            with contextlib.suppress(RuntimeError):
                torch.zeros((), device=self.device)
        return torch.empty(num_bytes, dtype=torch.uint8, device="cpu", pin_memory=True)

    def is_capturing(self) -> bool:
        """Returns whether a CUDA graph is being captured."""
        is_current_stream_capturing = getattr(self._module, "is_current_stream_capturing", None)
        return is_current_stream_capturing is not None and bool(is_current_stream_capturing())
