"""Tensors that autograd keeps, moved off a device until they are needed again.

An `Offloader` decides what is moved, when it is brought back, and how long each copy of it must live. How a device does
it, it knows by the Protocol `Transport`. Imports torch only.

Two rules keep it right (they were broken elsewhere: https://github.com/pytorch/torchtune/pull/1867): a source is held
until its copy has ended, whoever else lets go of it; and what is brought back is waited for before it is used.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
import weakref
from collections import deque
from typing import Any

import torch
from torch import Tensor

from runner.utils.unsloth.pinned_memory import PinnedBuffer, PinnedBufferPool
from runner.utils.unsloth.streams import Transport


class Handle:
    """A tensor on the device, on the host, or both. Autograd holds it; with it go its copies."""

    def __init__(self, source: Tensor, transport: Transport, timer: TransferTimer | None) -> None:
        self._transport = transport
        self.source: Tensor | None = source
        self.origin = weakref.ref(source)
        self.version = source._version
        self.shape, self.stride, self.dtype, self.num_bytes = source.shape, source.stride(), source.dtype, source.nbytes
        self.ready, self.timer = transport.mark(), timer
        self.buffer: PinnedBuffer | None = None
        self.is_changed = False
        self.stream = transport.current()
        self.is_used = False
        self.coming: tuple[Tensor, Any, Any] | None = None  # brought ahead of need, not asked for yet; its stream
        self.brought: tuple[weakref.ref[Tensor], Any, Any] | None = None  # and the event of its arrival; its stream
        self.before: weakref.ref[Handle] | None = None

    def release_source(self) -> None:
        """Gives the device's memory back: the copy on the host is whole."""
        if self.source is not None:
            self.is_changed |= self.source._version != self.version
            self.source = None

    def __del__(self) -> None:
        if getattr(self, "coming", None) is not None:  # nobody asked for it: its memory is computing's again
            self._transport.wait(*self.coming[1:])  # type: ignore[index]


class TransferTimer:
    """What one block's inputs took to move, and, where that is to be found out, whether it hides behind the block."""

    _ENOUGH, _MOST = 3, 10  # calls

    def __init__(self, transport: Transport, is_auto: bool) -> None:
        self._transport, self.is_measuring = transport, is_auto
        self.is_worth_it = True
        self.moved_bytes = self.stalls = 0  # stalls: inputs that backward asked for before they were on their way
        self._calls: list[tuple[list[tuple[Any, Any]], list[tuple[Any, Any]]]] = []  # spans of forward and of copies

    def begin(self) -> Any:
        """Returns what `end` is to be given after a forward of the block; its inputs are on their way already."""
        if not self.is_measuring:
            return None
        self._decide()
        self._calls.append(([], []))
        return self._transport.mark()

    def end(self, begun: Any) -> None:
        """Takes the time of a forward."""
        if begun is not None and self._calls:
            self._calls[-1][0].append((begun, self._transport.mark()))

    def moved(self, num_bytes: int, begin: Any, end: Any) -> None:
        """Counts a copy to the host, between two events."""
        self.moved_bytes += num_bytes
        if self._calls:
            self._calls[-1][1].append((begin, end))

    def _decide(self) -> None:
        """Leaves the inputs alone from now on, where copying takes longer than the forward that it hides behind."""
        ended = [call for call in self._calls if all(call) and all(map(self._has_passed, (*call[0], *call[1])))]
        if len(ended) > self._ENOUGH:  # the first one loads kernels
            forward_s, copy_s = (min(self._seconds(call[part]) for call in ended[1:]) for part in (0, 1))
            self.is_worth_it = copy_s <= forward_s
        if len(ended) > self._ENOUGH or len(self._calls) > self._MOST:  # or nothing of it is ever moved
            self.is_measuring, self._calls = False, []

    def _has_passed(self, span: tuple[Any, Any]) -> bool:
        return self._transport.is_done(span[1])

    def _seconds(self, spans: list[tuple[Any, Any]]) -> float:
        return sum(self._transport.seconds(begin, end) for begin, end in spans)


class Offloader:
    """Moves saved tensors of one device to the host and back: `pack` and `unpack` are a pair of saved-tensor hooks.

    Args:
        is_auto: finds out for which blocks it is worth it.
        min_bytes: of a tensor that is moved.
        keep_last: so many, the newest, stay on the device.
        in_flight: so many copies may be under way before computing waits for the oldest.
        prefetch: so many are brought back ahead of need.
        host_limit: bytes of host memory.
    """

    def __init__(
        self,
        transport: Transport,
        *,
        is_auto: bool = False,
        min_bytes: int = 1 << 20,
        keep_last: int = 1,
        in_flight: int = 2,
        prefetch: int = 1,
        host_limit: int | None = None,
    ) -> None:
        self.transport, self.is_auto = transport, is_auto
        self.min_bytes, self.keep_last, self.in_flight, self.prefetch = min_bytes, keep_last, in_flight, prefetch
        self.memory = PinnedBufferPool(transport, host_limit)
        self._kept: deque[weakref.ref[Handle]] = deque()
        self._under_way: deque[tuple[Any, Any, Tensor, weakref.ref[Handle]]] = (
            deque()
        )  # end, stream, source, its handle
        self._by_tensor: weakref.WeakValueDictionary[int, Handle] = weakref.WeakValueDictionary()
        self._newest: weakref.ref[Handle] | None = None
        self._lock = threading.RLock()  # backward has a thread of its own
        self._has_warned = False
        self._stream = transport.current()
        self._is_on_one_stream = True  # every block ran on the stream that was current here

    def __del__(self) -> None:
        with contextlib.suppress(AttributeError, RuntimeError):  # it was never made whole; the device is gone
            for under_way in self._under_way:  # its source and buffer are freed now
                self.transport.finish(under_way[0])

    def timer(self) -> TransferTimer:
        """Returns what is to be given to `pack` with the inputs of one block."""
        return TransferTimer(self.transport, self.is_auto)

    def pack(self, tensor: Tensor, timer: TransferTimer | None = None) -> Any:
        """Returns what autograd is to keep in place of a tensor."""
        if not self._is_eligible(tensor):
            return tensor, tensor._version
        with self._lock:
            self._settle()
            handle = self._by_tensor.get(id(tensor))
            if handle is not None and handle.origin() is tensor and handle.version == tensor._version:
                return handle  # the input of several blocks
            handle = Handle(tensor, self.transport, timer)
            self._is_on_one_stream = self._is_on_one_stream and handle.stream == self._stream
            self._by_tensor[id(tensor)] = handle
            handle.before, self._newest = self._newest, weakref.ref(handle)
            self._kept.append(self._newest)
            while len(self._kept) > self.keep_last:
                if (oldest := self._kept.popleft()()) is not None and oldest.source is not None:
                    self._send(oldest)
            return handle

    def _is_eligible(self, tensor: Tensor) -> bool:
        return (
            type(tensor) is Tensor
            and tensor.requires_grad
            and not tensor.is_leaf
            and tensor.device == self.transport.device
            and tensor.layout is torch.strided
            and tensor.nbytes >= max(self.min_bytes, 1)
            and _is_dense(tensor)
            and not self.transport.is_capturing()
        )

    def _send(self, handle: Handle) -> None:
        lease = self.memory.lease(handle.num_bytes)
        if lease is None:
            self._warn()
            return
        assert handle.source is not None
        begin, end = self.transport.send(handle.source, _shaped(lease, handle), [handle.ready, *lease.last])
        lease.last[:] = [end]
        if not self._is_on_one_stream:  # the source may be of another stream than the one that waits for its copy
            self.transport.keep(handle.source)
        handle.buffer = lease
        if handle.timer is not None:
            handle.timer.moved(handle.num_bytes, begin, end)
        self._under_way.append((end, handle.stream, handle.source, weakref.ref(handle)))
        while len(self._under_way) > self.in_flight:
            self.transport.wait(*self._under_way[0][:2])  # what is computed next may have the memory
            self._end_oldest()

    def _settle(self) -> None:
        """Lets go of what was moved by now."""
        while self._under_way and self.transport.is_done(self._under_way[0][0]):
            self._end_oldest()

    def _end_oldest(self) -> None:
        if (handle := self._under_way.popleft()[3]()) is not None:
            handle.release_source()

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
            self._settle()
            found = self._find(packed)
            self._prefetch(packed)
            return found

    def _find(self, handle: Handle) -> Tensor:
        origin = handle.origin()
        is_unchanged = not handle.is_changed and (origin is None or origin._version == handle.version)
        _check_unchanged(is_unchanged, handle.shape)
        if handle.source is not None:
            return handle.source
        handle.is_used = True
        if handle.brought is not None and (found := handle.brought[0]()) is not None:
            self.transport.wait(handle.brought[1], self.transport.current())
            self.transport.record_stream(found, handle.brought[2])
            return found
        if handle.coming is None:
            if handle.timer is not None:
                handle.timer.stalls += 1
            handle.coming = self._bring(handle)
        (target, event, stream), handle.coming = handle.coming, None
        self.transport.wait(event, self.transport.current())
        self.transport.record_stream(target, stream)
        handle.brought = weakref.ref(target), event, stream
        return target

    def _bring(self, handle: Handle) -> tuple[Tensor, Any, Any]:
        assert handle.buffer is not None
        target = torch.empty_strided(handle.shape, handle.stride, dtype=handle.dtype, device=self.transport.device)
        after = [self.transport.mark(), *handle.buffer.last]  # the memory may have been in use until now
        event = self.transport.bring(_shaped(handle.buffer, handle), target, after)
        handle.buffer.last[1:] = [event]
        return target, event, self.transport.current()

    def _prefetch(self, handle: Handle) -> None:
        """Begins to bring back what was packed before; a guess, for backward goes from the last to the first."""
        for _ in range(self.prefetch):
            before = None if handle.before is None else handle.before()
            if before is None:
                return
            is_there = before.source is not None or before.coming is not None or before.buffer is None
            if not is_there and not before.is_used and (before.brought is None or before.brought[0]() is None):
                before.coming = self._bring(before)
            handle = before

    def _warn(self) -> None:
        if not self._has_warned:
            self._has_warned = True
            warnings.warn(
                f"unsloth: host_limit, or what the host can lock, is reached at {self.memory.held_bytes} bytes: what "
                f"is more stays on the device; raise host_limit, or take a smaller batch",
                stacklevel=2,
            )


def _shaped(lease: PinnedBuffer, handle: Handle) -> Tensor:
    """Returns a buffer as a tensor of the handle's shape and strides."""
    flat = lease.buffer[: handle.num_bytes].view(handle.dtype)
    return flat.as_strided(handle.shape, handle.stride)


def _is_dense(tensor: Tensor) -> bool:
    """Says whether a tensor's numbers fill its memory, each once: then a copy of its strides is one of its bytes."""
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
