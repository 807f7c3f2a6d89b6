"""A simulated device on the CPU whose copies are done as late as events allow; missing waits show as NaN."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


@dataclass(eq=False)
class Event:
    """An event on a stream; one of the compute stream has a number."""

    work: Callable[[], None] | None = None
    after: list[Event] = field(default_factory=list)
    number: int = 0

    def pass_(self) -> None:
        after, self.after = self.after, []
        for event in after:
            event.pass_()
        work, self.work = self.work, None
        if work is not None:
            work()

    @property
    def has_passed(self) -> bool:
        return self.work is None and all(event.has_passed for event in self.after)


class Region:
    """A tensor's memory region, without a reference that keeps it alive.

    A weak reference to the tensor itself would not do: the garbage collector clears it before finalizers run.
    """

    def __init__(self, tensor: Tensor) -> None:
        self._storage = StorageWeakRef(tensor.untyped_storage())
        self._dtype = tensor.dtype
        self._place = tensor.storage_offset(), tensor.shape, tensor.stride()

    def find(self) -> Tensor | None:
        """Returns the numbers there, or None once the memory is freed."""
        storage = torch.UntypedStorage._new_with_weak_ptr(self._storage.cdata)
        return None if storage is None else torch.empty(0, dtype=self._dtype).set_(storage, *self._place)


class LazyDevice:
    """Stands in for `CopyStreams`: computes on the host, and its copies are done only when they are waited for.

    These are counted as mistakes: a source that is freed before its copy is done, a target freed before its own, a copy
    that does not wait for computing. What is read before it has arrived is NaN.
    """

    def __init__(self, seed: int = 0) -> None:
        self.device = torch.device("cpu")
        self.mistakes: list[str] = []
        self.num_allocated = self.num_sent = self.num_brought = self.num_waits = self.num_kept = 0
        self._num_events = 0
        self._last: dict[str, Event] = {}
        self._random = random.Random(seed)

    def record_event(self) -> Event:
        self._num_events += 1
        return Event(number=self._num_events)

    def _copy(self, stream: str, source: Tensor, target: Tensor, after: Sequence[Event], least: int) -> Event:
        """Queues a copy that waits for the events; one of them must have at least the number `least`."""
        if max((event.number for event in after), default=0) < least:
            self.mistakes.append(f"{stream}: a copy does not wait for what was computed before")
        kept, goal = Region(source), Region(target)

        def work() -> None:
            from_, to = kept.find(), goal.find()
            if from_ is None or to is None:
                self.mistakes.append(
                    f"{stream}: {'source' if from_ is None else 'target'} freed before its copy was done"
                )
            else:
                with torch.no_grad():
                    to.copy_(from_)

        before = [self._last[stream]] if stream in self._last else []
        self._last[stream] = event = Event(work, [*before, *after])
        return event

    def copy_to_host(self, source: Tensor, buffer: Tensor, after: Sequence[Event]) -> tuple[None, Event]:
        self.num_sent += 1
        event = self._copy("out", source, buffer, after, least=1)
        event.buffer = buffer  # type: ignore[attr-defined]  # a view; what it shows is the pool's
        return None, event

    def copy_to_device(self, buffer: Tensor, target: Tensor, after: Sequence[Event]) -> Event:
        self.num_brought += 1
        with torch.no_grad():
            target.fill_(float("nan"))
        event = self._copy("back", buffer, target, after, least=self._num_events)  # the memory may have been in use
        event.buffer = buffer  # type: ignore[attr-defined]
        return event

    def current_stream(self) -> str:
        return "computing"

    def wait_event(self, event: Event, stream: str) -> None:
        self.num_waits += 1
        event.pass_()

    def record_stream(self, tensor: Tensor, owner: str) -> None:
        assert owner == "computing"

    def record_copy_stream(self, source: Tensor) -> None:
        self.num_kept += 1

    def synchronize(self, event: Event) -> None:
        event.pass_()

    def is_done(self, event: Event) -> bool:
        if self._random.random() < 0.2:
            event.pass_()
        return event.has_passed

    def elapsed_s(self, begin: Event, end: Event) -> float:
        return 1.0

    def allocate(self, num_bytes: int) -> Tensor:
        self.num_allocated += 1
        return torch.full((num_bytes,), 255, dtype=torch.uint8)

    def is_capturing(self) -> bool:
        return False


class LazyCopyStream:
    """Stands in for `DeviceStream`: a copy is NaN, or -1 for integers, until its event has been waited for.

    `in_use` has the addresses of the tensors whose memory waits for the computing before it is reused.
    """

    def __init__(self) -> None:
        self.in_use: set[int] = set()
        self.num_copies = self.num_delivered = 0
        self._last = Event()

    def copy(self, tensor: Tensor) -> Tensor:
        target = torch.empty_like(tensor)
        target.fill_(float("nan") if tensor.is_floating_point() else True if tensor.dtype is torch.bool else -1)

        def work() -> None:
            target.copy_(tensor)  # pinned memory lives until its copy is done

        self._last = Event(work, [self._last])
        self.num_copies += 1
        return target

    def record_event(self) -> Event:
        return Event(after=[self._last])

    def deliver(self, event: Event, tensors: list[Tensor]) -> None:
        self.num_delivered += 1
        event.pass_()
        self.in_use |= {tensor.data_ptr() for tensor in tensors}
