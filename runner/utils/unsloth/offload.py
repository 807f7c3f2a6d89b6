"""Offloads saved tensors to pinned host memory, and prefetches them for backward.

Two rules prevent wrong gradients (both were broken in https://github.com/pytorch/torchtune/pull/1867). A source on the
device is kept until its copy is done, even if nobody else references it. A tensor that was copied back is used only
after the copy is done.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import deque
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runner.utils.unsloth.pinned_memory import PinnedBuffer, PinnedBufferPool
from runner.utils.unsloth.streams import CopyStreams


class _Prefetched(NamedTuple):
    """A tensor on the device whose copy from the host is queued.

    Attributes:
        arrived: event of the end of the copy.
        stream: the compute stream that owns the tensor's memory.
    """

    tensor: Tensor
    arrived: Any
    stream: Any


class OffloadedTensor:
    """A saved tensor on the device, on the host, or on both.

    Autograd holds this object instead of the tensor.

    Attributes:
        source: the tensor itself, until its copy to the host is done.
        source_ref: weak reference to the tensor, to find changes in place.
        ready: event after which the source has its values.
        buffer: pinned memory of the copy on the host; None if the tensor was not offloaded.
        prefetched: set if the tensor was copied back and `unpack` has not returned it yet.
        restored: weak reference to the tensor that `unpack` returned, the event of its arrival, and its stream.
        was_unpacked: backward has used this tensor already; it is not prefetched again.
        previous: the tensor packed before this one, which backward needs next.
    """

    prefetched: _Prefetched | None = None  # of the class: `__del__` also runs where construction failed

    def __init__(self, source: Tensor, streams: CopyStreams, timer: TransferTimer | None) -> None:
        self._streams = streams
        self.source: Tensor | None = source
        self.source_ref = weakref.ref(source)
        self.version = source._version
        self.shape, self.stride, self.dtype, self.num_bytes = source.shape, source.stride(), source.dtype, source.nbytes
        self.ready = streams.record_event()
        self.stream = streams.current_stream()
        self.timer = timer
        self.buffer: PinnedBuffer | None = None
        self.is_changed = False
        self.was_unpacked = False
        self.restored: tuple[weakref.ref[Tensor], Any, Any] | None = None
        self.previous: weakref.ref[OffloadedTensor] | None = None

    def __del__(self) -> None:
        # A prefetched tensor that was never used: computation may reuse its memory only after the copy into it.
        if self.prefetched is not None:
            self._streams.wait_event(self.prefetched.arrived, self.prefetched.stream)


class TransferTimer:
    """Times the copies of a block's inputs, to decide whether offloading pays.

    Copies to the host run beside the block's forward. If they take longer than that, they delay the device.

    Args:
        is_auto: measures the first calls and then decides; otherwise inputs are always offloaded.

    Attributes:
        stalls: number of inputs that backward needed before their prefetch had begun.
    """

    _MIN_CALLS, _MAX_CALLS = 3, 10

    def __init__(self, streams: CopyStreams, is_auto: bool) -> None:
        self._streams, self.is_measuring = streams, is_auto
        self.is_worth_it = True
        self.moved_bytes = self.stalls = 0
        # Of each call: the spans (begin and end event) of its forward, and those of its copies.
        self._calls: list[tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]] = []

    def start(self) -> Any:
        """Begins a forward of the block; returns an event for `stop`.

        Copies of its inputs are queued later.
        """
        if not self.is_measuring:
            return None
        self._decide()
        self._calls.append(([], []))
        return self._streams.record_event()

    def stop(self, started: Any) -> None:
        if started is not None and self._calls:
            self._calls[-1][0].append((started, self._streams.record_event()))

    def add_copy(self, num_bytes: int, begin: Any, end: Any) -> None:
        """Counts a copy to the host, between two events."""
        self.moved_bytes += num_bytes
        if self._calls:
            self._calls[-1][1].append((begin, end))

    def _decide(self) -> None:
        """Ends the measurement after enough calls.

        Offloading pays if copies are not slower than the forward.
        """
        complete = [call for call in self._calls if all(call) and all(map(self._is_done, (*call[0], *call[1])))]
        if len(complete) > self._MIN_CALLS:
            measured = complete[1:]  # the first call also loads kernels
            forward_s = min(self._seconds(forwards) for forwards, _ in measured)
            copy_s = min(self._seconds(copies) for _, copies in measured)
            self.is_worth_it = copy_s <= forward_s
        # After too many calls without a copy, no input of the block is ever offloaded.
        if len(complete) > self._MIN_CALLS or len(self._calls) > self._MAX_CALLS:
            self.is_measuring, self._calls = False, []

    def _is_done(self, span: tuple[Any, Any]) -> bool:
        return self._streams.is_done(span[1])

    def _seconds(self, spans: list[tuple[Any, Any]]) -> float:
        return sum(self._streams.elapsed_s(begin, end) for begin, end in spans)


class _Copy(NamedTuple):
    """A copy to the host that is not done yet; it keeps the source alive."""

    end: Any
    stream: Any
    source: Tensor
    handle: weakref.ref[OffloadedTensor]


class Offloader:
    """Offloads saved tensors of one device.

    `pack` and `unpack` are a pair of `saved_tensors_hooks`.

    Args:
        is_auto: decides for each block whether offloading pays; see `TransferTimer`.
        min_bytes: smaller tensors stay on the device.
        keep_last: number of newest tensors that stay on the device, since backward needs them first.
        in_flight: number of copies that may be pending before the compute stream waits for the oldest.
        prefetch: number of tensors that are copied back ahead of need.
        host_limit: bytes of pinned host memory; None is no limit.
    """

    def __init__(
        self,
        streams: CopyStreams,
        *,
        is_auto: bool = False,
        min_bytes: int = 1 << 20,
        keep_last: int = 1,
        in_flight: int = 2,
        prefetch: int = 1,
        host_limit: int | None = None,
    ) -> None:
        self.streams, self.is_auto = streams, is_auto
        self.min_bytes, self.keep_last, self.in_flight, self.prefetch = min_bytes, keep_last, in_flight, prefetch
        self.pool = PinnedBufferPool(streams, host_limit)
        self._newest: deque[weakref.ref[OffloadedTensor]] = deque()  # not offloaded yet
        self._copies: deque[_Copy] = deque()
        self._by_tensor_id: weakref.WeakValueDictionary[int, OffloadedTensor] = weakref.WeakValueDictionary()
        self._last_packed: weakref.ref[OffloadedTensor] | None = None
        self._lock = threading.RLock()  # backward runs in a thread of its own
        self._has_warned = False
        self._stream = streams.current_stream()
        self._has_one_stream = True  # every block ran on `_stream`

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, RuntimeError):  # construction failed, or the device is gone
            for copy in self._copies:  # its source and buffer are freed now
                self.streams.synchronize(copy.end)

    def timer(self) -> TransferTimer:
        """Returns a timer for one block, to be passed to `pack` with the block's inputs."""
        return TransferTimer(self.streams, self.is_auto)

    def pack(self, tensor: Tensor, timer: TransferTimer | None = None) -> Any:
        """Returns the object that autograd saves instead of a tensor."""
        if not self._is_eligible(tensor):
            return tensor, tensor._version
        with self._lock:
            self._release_copied()
            handle = self._by_tensor_id.get(id(tensor))
            # The same tensor is the input of several blocks; an id alone could be that of a freed tensor.
            if handle is not None and handle.source_ref() is tensor and handle.version == tensor._version:
                return handle
            handle = OffloadedTensor(tensor, self.streams, timer)
            self._has_one_stream = self._has_one_stream and handle.stream == self._stream
            self._by_tensor_id[id(tensor)] = handle
            handle.previous, self._last_packed = self._last_packed, weakref.ref(handle)
            self._newest.append(self._last_packed)
            while len(self._newest) > self.keep_last:
                oldest = self._newest.popleft()()
                if oldest is not None and oldest.source is not None:
                    self._offload(oldest)
            return handle

    def _is_eligible(self, tensor: Tensor) -> bool:
        return (
            type(tensor) is Tensor
            and tensor.requires_grad
            and not tensor.is_leaf
            and tensor.device == self.streams.device
            and tensor.layout is torch.strided
            and tensor.nbytes >= max(self.min_bytes, 1)
            and _is_dense(tensor)
            and not self.streams.is_capturing()
        )

    def _offload(self, handle: OffloadedTensor) -> None:
        buffer = self.pool.acquire(handle.num_bytes)
        if buffer is None:
            self._warn()
            return
        assert handle.source is not None
        after = [handle.ready, *buffer.pending_events]
        begin, end = self.streams.copy_to_host(handle.source, _view_as(buffer, handle), after)
        buffer.pending_events[:] = [end]
        # With several compute streams, the stream that owns the source may not be the one that waits for the copy.
        if not self._has_one_stream:
            self.streams.record_copy_stream(handle.source)
        handle.buffer = buffer
        if handle.timer is not None:
            handle.timer.add_copy(handle.num_bytes, begin, end)
        self._copies.append(_Copy(end, handle.stream, handle.source, weakref.ref(handle)))
        while len(self._copies) > self.in_flight:
            # Later computation may reuse the source's memory: it has to wait for the copy.
            self.streams.wait_event(self._copies[0].end, self._copies[0].stream)
            self._release_oldest()

    def _release_copied(self) -> None:
        while self._copies and self.streams.is_done(self._copies[0].end):
            self._release_oldest()

    def _release_oldest(self) -> None:
        """Drops the source on the device of the oldest copy, which is complete or waited for."""
        handle = self._copies.popleft().handle()
        if handle is not None and handle.source is not None:
            handle.is_changed |= handle.source._version != handle.version
            handle.source = None

    def unpack(self, packed: Any) -> Tensor:
        """Returns the tensor that was packed.

        Raises:
            RuntimeError: it was changed in place meanwhile.
        """
        if isinstance(packed, tuple):
            tensor, version = packed
            _check_unchanged(tensor._version == version, tensor.shape)
            return tensor
        with self._lock:
            self._release_copied()
            tensor = self._restore(packed)
            self._prefetch_before(packed)
            return tensor

    def _restore(self, handle: OffloadedTensor) -> Tensor:
        """Returns the tensor on the device.

        The current compute stream waits for its arrival.
        """
        source = handle.source_ref()
        is_unchanged = not handle.is_changed and (source is None or source._version == handle.version)
        _check_unchanged(is_unchanged, handle.shape)
        if handle.source is not None:
            return handle.source
        handle.was_unpacked = True
        if handle.restored is not None and (tensor := handle.restored[0]()) is not None:
            return self._use(_Prefetched(tensor, *handle.restored[1:]))
        if handle.prefetched is None:
            if handle.timer is not None:
                handle.timer.stalls += 1
            handle.prefetched = self._prefetch(handle)
        prefetched, handle.prefetched = handle.prefetched, None
        handle.restored = weakref.ref(prefetched.tensor), prefetched.arrived, prefetched.stream
        return self._use(prefetched)

    def _use(self, prefetched: _Prefetched) -> Tensor:
        self.streams.wait_event(prefetched.arrived, self.streams.current_stream())
        self.streams.record_stream(prefetched.tensor, prefetched.stream)
        return prefetched.tensor

    def _prefetch(self, handle: OffloadedTensor) -> _Prefetched:
        assert handle.buffer is not None
        target = torch.empty_strided(handle.shape, handle.stride, dtype=handle.dtype, device=self.streams.device)
        # The event after which the target's memory is no longer used by earlier computation.
        after = [self.streams.record_event(), *handle.buffer.pending_events]
        arrived = self.streams.copy_to_device(_view_as(handle.buffer, handle), target, after)
        handle.buffer.pending_events[1:] = [arrived]
        return _Prefetched(target, arrived, self.streams.current_stream())

    def _prefetch_before(self, handle: OffloadedTensor) -> None:
        """Prefetches the tensors packed before this one.

        It is a guess: backward usually runs in reverse order.
        """
        for _ in range(self.prefetch):
            previous = None if handle.previous is None else handle.previous()
            if previous is None:
                return
            is_on_device = previous.source is not None or previous.prefetched is not None or previous.buffer is None
            is_restored = previous.restored is not None and previous.restored[0]() is not None
            if not is_on_device and not is_restored and not previous.was_unpacked:
                previous.prefetched = self._prefetch(previous)
            handle = previous

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"unsloth: host_limit, or what the host can lock, is reached at {self.pool.held_bytes} bytes: what "
                f"is more stays on the device; raise host_limit, or take a smaller batch",
                stacklevel=2,
            )


def _view_as(pinned: PinnedBuffer, handle: OffloadedTensor) -> Tensor:
    return pinned.buffer[: handle.num_bytes].view(handle.dtype).as_strided(handle.shape, handle.stride)


def _is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor fills its memory without gaps or overlaps.

    A copy with the same strides then has the same number of bytes.
    """
    if tensor.is_contiguous():
        return True
    expected = 1
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size != 1 and stride != expected:
            return False
        expected *= size
    return True


def _check_unchanged(is_unchanged: bool, shape: torch.Size) -> None:
    if not is_unchanged:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: an input "
            f"of shape {list(shape)} of a block that is recomputed in the backward pass; change a copy of it instead"
        )
