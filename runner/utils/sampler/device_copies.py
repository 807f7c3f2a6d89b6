"""Copies batches to an accelerator on a stream of their own, while the device computes."""

from __future__ import annotations

import copy
from collections import UserDict, deque
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from runner.utils.distributed.devices import has_streams, map_parts
from runner.utils.distributed.memory import is_out_of_memory

_MAX_AHEAD = 2  # batches for which the device has not begun to compute


class CopyStream(Protocol):
    """A stream for copies to a device, beside the stream that computes."""

    def copy(self, tensor: Tensor) -> Tensor: ...
    def record_event(self) -> Any: ...
    def deliver(self, event: Any, tensors: list[Tensor]) -> None: ...


class DeviceStream:
    """A stream of an accelerator. The copies are allocated on it, so they need not wait for the computing."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._module = torch.get_device_module(device)
        self._stream = self._module.Stream(device)
        self._begun = deque[Any]()  # events at which the computing could begin with the latest batches

    def copy(self, tensor: Tensor) -> Tensor:
        """Queues the copy of a tensor; its source stays valid if torch has pinned it."""
        with self._module.stream(self._stream):
            return tensor.to(self._device, non_blocking=True)

    def record_event(self) -> Any:
        """Returns an event after the copies so far."""
        return self._stream.record_event()

    def deliver(self, event: Any, tensors: list[Tensor]) -> None:
        """Has the computing wait for an event, and the memory of tensors wait for the computing before it is reused."""
        computing = self._module.current_stream(self._device)
        computing.wait_event(event)
        for tensor in tensors:
            tensor.record_stream(computing)
        # Memory that waits is only reused when the host asks, so without a limit each batch that the host is ahead of
        # the device would have memory of its own.
        self._begun.append(computing.record_event())
        if len(self._begun) > _MAX_AHEAD:
            self._begun.popleft().synchronize()


@dataclass
class CopiedBatch:
    """A batch whose tensors are on their way to the device; `event` is None if none is."""

    batch: Any
    tensors: list[Tensor] = field(default_factory=list)
    event: Any = None


class BatchCopier:
    """Copies the dense tensors of a batch, in any nest that `move` enters.

    Objects that move themselves stay on the host, except a `UserDict` such as transformers' BatchEncoding: the
    allocator must know each tensor. The step moves what stays.
    """

    def __init__(self, stream: CopyStream) -> None:
        self._stream = stream

    def start(self, batch: Any) -> CopiedBatch:
        """Queues the copies of a batch's tensors."""
        tensors: list[Tensor] = []

        def copy_part(part: Any) -> Any:
            if isinstance(part, Tensor):
                if _is_dense(part) and part.numel():
                    part = self._stream.copy(part)
                    tensors.append(part)
                return part
            if isinstance(part, type) or not callable(getattr(part, "to", None)):
                return None
            if isinstance(part, UserDict):
                part = copy.copy(part)
                part.data = {key: map_parts(value, copy_part) for key, value in part.data.items()}
            return part

        try:
            copied = map_parts(batch, copy_part)
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
            return CopiedBatch(batch)  # the step may free memory before it moves the batch
        return CopiedBatch(copied, tensors, self._stream.record_event()) if tensors else CopiedBatch(copied)

    def finish(self, copied: CopiedBatch) -> Any:
        """Returns the batch, ready for the computing that is queued next."""
        if copied.event is not None:
            self._stream.deliver(copied.event, copied.tensors)
        return copied.batch


def _is_dense(tensor: Tensor) -> bool:
    """Returns whether a tensor is on the CPU and of a kind whose memory `record_stream` can keep on a device."""
    is_strided = tensor.device.type == "cpu" and tensor.layout is torch.strided
    return is_strided and not tensor.is_nested and not tensor.is_quantized


def make_copier(device: torch.device) -> BatchCopier | None:
    """Returns the copier to a device; None for one without streams, such as the CPU."""
    return BatchCopier(DeviceStream(device)) if has_streams(device) else None
