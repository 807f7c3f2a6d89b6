"""`runner.utils.unsloth.offload`: tensors are restored unchanged in any order, however late copies are done."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.autograd.graph import saved_tensors_hooks

from runner.utils.unsloth.offload import Offloader, TransferTimer
from runner.utils.unsloth.pinned_memory import PinnedBufferPool
from tests.lazy_device import LazyDevice


def computed(num: int = 4, *, size: int = 32) -> Tensor:
    """Returns a tensor like one of a forward: not a leaf, with `requires_grad`."""
    return torch.full((size,), float(num)).requires_grad_() * 1


@settings(max_examples=150, deadline=None)
@given(
    data=st.data(),
    keep_last=st.integers(0, 3),
    in_flight=st.integers(1, 3),
    prefetch=st.integers(0, 3),
    host_limit=st.sampled_from([None, 0, 600, 2000]),
    seed=st.integers(0, 2**16),
)
@pytest.mark.filterwarnings("ignore:unsloth. host_limit")
def test_any_order_brings_back_what_was_packed(
    data: st.DataObject, keep_last: int, in_flight: int, prefetch: int, host_limit: int | None, seed: int
) -> None:
    device = LazyDevice(seed)
    offloader = Offloader(
        device, min_bytes=0, keep_last=keep_last, in_flight=in_flight, prefetch=prefetch, host_limit=host_limit
    )
    alive: dict[int, Any] = {}
    sizes = st.sampled_from([32, 33, 64, 200])
    for number in range(data.draw(st.integers(1, 24))):
        action = data.draw(st.sampled_from(["pack", "pack", "pack", "unpack", "release", "abandon"]))
        if action == "pack" or not alive:
            alive[number] = offloader.pack(computed(number, size=data.draw(sizes)))
            continue
        chosen = data.draw(st.sampled_from(sorted(alive)))
        if action != "abandon":
            found = offloader.unpack(alive[chosen])
            assert found.eq(chosen).all(), (chosen, found)
            del found
        if action != "unpack":
            del alive[chosen]
    for chosen in sorted(alive, reverse=True):
        assert offloader.unpack(alive[chosen]).eq(chosen).all()
    alive.clear()
    assert not device.mistakes
    assert host_limit is None or offloader.pool.peak_bytes <= host_limit


def test_the_newest_stay_and_the_others_give_their_memory_back() -> None:
    offloader = Offloader(LazyDevice(), min_bytes=0, keep_last=2, in_flight=1)
    handles = [offloader.pack(computed(number)) for number in range(6)]
    is_there = [handle.source is not None for handle in handles]
    assert is_there == [False, False, False, True, True, True]  # one on its way, two that stay
    assert offloader.pool.held_bytes == 4 * 512


def test_what_comes_next_is_brought_ahead() -> None:
    device = LazyDevice()
    offloader = Offloader(device, min_bytes=0, keep_last=0, in_flight=1, prefetch=1)
    timer = offloader.timer()
    handles = [offloader.pack(computed(number), timer) for number in range(6)]
    stalls = timer.stalls
    for handle in reversed(handles):
        offloader.unpack(handle)
    assert device.num_brought == 5  # the last was not gone yet
    assert timer.stalls - stalls <= 1


@pytest.mark.parametrize("prefetch", [0, 1, 3])
def test_as_many_inputs_are_brought_ahead_as_is_asked_for(prefetch: int) -> None:
    device = LazyDevice()
    offloader = Offloader(device, min_bytes=0, keep_last=0, in_flight=1, prefetch=prefetch)
    handles = [offloader.pack(computed(number)) for number in range(6)]
    offloader.unpack(handles[4])
    assert device.num_brought == 1 + prefetch


class Noting(LazyDevice):
    """Records the events that each copy waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.copies: list[tuple[str, Any, Sequence[Any]]] = []  # direction, its end, what it waits for

    def copy_to_host(self, source: Tensor, buffer: Tensor, after: Sequence[Any]) -> tuple[None, Any]:
        begin, end = super().copy_to_host(source, buffer, after)
        self.copies.append(("out", end, list(after)))
        return begin, end

    def copy_to_device(self, buffer: Tensor, target: Tensor, after: Sequence[Any]) -> Any:
        end = super().copy_to_device(buffer, target, after)
        self.copies.append(("back", end, list(after)))
        return end


def test_a_copy_waits_for_the_last_one_of_its_host_buffer() -> None:
    """The source may be older than that copy, so waiting for earlier computation is not enough."""
    device = Noting()
    offloader = Offloader(device, min_bytes=0, keep_last=1, in_flight=1, prefetch=0)
    first, second, third = (offloader.pack(computed(number)) for number in range(3))
    assert [direction for direction, _, _ in device.copies] == ["out", "out"]  # the third stays
    offloader.unpack(first)
    (_, sent, _), _, (_, brought, after) = device.copies
    assert sent in after
    del first
    gc.collect()
    offloader.pack(computed(4))  # sends the third, into the buffer that the first had
    assert device.num_allocated == 2
    assert brought in device.copies[3][2]
    assert [offloader.unpack(handle)[0].item() for handle in (second, third)] == [1, 2]


def test_strides_and_values_come_back_as_they_were() -> None:
    offloader = Offloader(LazyDevice(), min_bytes=0, keep_last=0, in_flight=1)
    base = torch.randn(4, 5, 6).requires_grad_() * 1
    views = [base, base.permute(2, 0, 1), base.bfloat16(), base.double().transpose(0, 1)]
    packed = [offloader.pack(view) for view in views]
    expected = [(view.detach().clone(), view.stride()) for view in views]
    offloader.pack(computed())
    for handle, (value, stride) in zip(packed, expected, strict=True):
        found = offloader.unpack(handle)
        assert torch.equal(found, value)
        assert (found.stride(), found.dtype) == (stride, value.dtype)


def test_what_is_not_worth_moving_or_can_not_be_moved_stays() -> None:
    device = LazyDevice()
    offloader = Offloader(device, min_bytes=128, keep_last=0)
    leaf, plain = torch.randn(64, requires_grad=True), torch.randn(64) * 1
    expanded, gapped = computed(size=1).expand(64), computed(size=128)[::2]
    for tensor in (leaf, plain, computed(size=8), expanded, gapped):
        assert offloader.unpack(offloader.pack(tensor)) is tensor
    assert not device.num_sent


def test_the_input_of_several_blocks_is_moved_once() -> None:
    device = LazyDevice()
    offloader = Offloader(device, min_bytes=0, keep_last=0, in_flight=1)
    shared = computed(7)
    handles = [offloader.pack(each) for each in (shared, computed(), shared, computed(), shared)]
    assert handles[0] is handles[2] is handles[4]
    assert device.num_sent == 3


def test_a_host_buffer_lives_as_long_as_its_handle_and_then_serves_another() -> None:
    device = LazyDevice()
    offloader = Offloader(device, min_bytes=0, keep_last=0, in_flight=1)
    for _ in range(10):
        handles = [offloader.pack(computed(number)) for number in range(4)]
        for _ in range(2):
            assert [offloader.unpack(handle)[0].item() for handle in reversed(handles)] == [3, 2, 1, 0]
        del handles
    gc.collect()
    assert device.num_allocated <= 5
    assert not device.mistakes


def test_buffers_of_other_sizes_are_given_up() -> None:
    offloader = Offloader(LazyDevice(), min_bytes=0, keep_last=0, in_flight=1)
    for size in range(1000, 60000, 1000):  # as batches of another length each
        offloader.pack(computed(size=size))
    assert offloader.pool.held_bytes < 4 * 4 * 60000


def test_beyond_the_limit_inputs_stay_and_it_is_said_once() -> None:
    offloader = Offloader(LazyDevice(), min_bytes=0, keep_last=0, in_flight=1, host_limit=1100)
    with pytest.warns(UserWarning, match="is reached at 1024 bytes") as said:
        handles = [offloader.pack(computed(number)) for number in range(6)]
    assert len(said) == 1
    assert [offloader.unpack(handle)[0].item() for handle in handles] == [0, 1, 2, 3, 4, 5]


def test_a_source_changed_while_it_is_copied_raises() -> None:
    device = LazyDevice()
    offloader = Offloader(device, min_bytes=0, keep_last=0, in_flight=1)
    tensor = computed()
    handle = offloader.pack(tensor)
    with torch.no_grad():
        tensor.add_(1)
    offloader.pack(computed())
    with pytest.raises(RuntimeError, match=r"modified by an inplace operation: an input of shape \[32\]"):
        offloader.unpack(handle)


def test_two_backward_passes_over_one_graph_through_the_hooks() -> None:
    device = LazyDevice()
    offloader = Offloader(device, min_bytes=0, keep_last=0, in_flight=1)
    x = torch.randn(32, requires_grad=True)
    with saved_tensors_hooks(offloader.pack, offloader.unpack):
        y = ((x * 2).sin() * (x * 3).cos()).exp().sum()
    plain = ((x * 2).sin() * (x * 3).cos()).exp().sum()
    (expected,) = torch.autograd.grad(plain, x)
    for _ in range(2):
        assert torch.equal(torch.autograd.grad(y, x, retain_graph=True)[0], expected)
    assert not device.mistakes


class Clock(LazyDevice):
    """Returns fixed durations for forwards and copies."""

    def __init__(self, forward_s: float, copy_s: float) -> None:
        super().__init__()
        self.forward_s, self.copy_s = forward_s, copy_s

    def elapsed_s(self, begin: Any, end: Any) -> float:
        return self.copy_s if begin == "copy" else self.forward_s


@pytest.mark.parametrize(("copies", "is_worth_it"), [(1, True), (2, False)])
@pytest.mark.parametrize("is_auto", [True, False])
def test_auto_leaves_alone_what_takes_longer_to_move_than_it_hides(
    copies: int, is_auto: bool, is_worth_it: bool
) -> None:
    device = Clock(forward_s=1.5e-3, copy_s=1e-3)
    timer = TransferTimer(device, is_auto)
    for _ in range(5):
        begun = timer.start()
        for _ in range(copies):
            timer.add_copy(10, "copy", device.record_event())
        timer.stop(begun)
    timer.start()
    assert timer.is_worth_it is (is_worth_it or not is_auto)
    assert not timer.is_measuring
    assert timer.moved_bytes == 50 * copies


def test_a_block_of_which_nothing_is_moved_is_not_measured_for_ever() -> None:
    timer = TransferTimer(Clock(1.0, 1.0), is_auto=True)
    for _ in range(20):
        timer.stop(timer.start())
    assert timer.is_worth_it
    assert not timer.is_measuring


def test_buffers_are_given_up_in_whatever_order_their_copies_end() -> None:
    class Stubborn(LazyDevice):
        def is_done(self, event: Any) -> bool:
            return event != "busy"

        def synchronize(self, event: Any) -> None:
            assert event == "busy"

    memory = PinnedBufferPool(Stubborn(), limit_bytes=3000)
    for size, last in ((600, []), (1200, ["busy"]), (900, [])):
        memory.release(torch.empty(size, dtype=torch.uint8), last)
    memory.held_bytes = 2700
    lease = memory.acquire(1500)
    assert lease is not None
    assert [buffer.numel() for buffer, _ in memory._free] == [1200]


class SeveralStreams(LazyDevice):
    """Computes on one of several streams; records tensors that are used on another stream than their own."""

    stream = "first"

    def __init__(self) -> None:
        super().__init__()
        self.lent: list[tuple[str, str]] = []
        self.waiting: list[str] = []

    def wait_event(self, event: Any, stream: str) -> None:
        self.waiting.append(stream)
        super().wait_event(event, stream)

    def current_stream(self) -> str:
        return self.stream

    def record_stream(self, tensor: Tensor, owner: str) -> None:
        self.lent.append((owner, self.stream))


def test_sources_are_kept_by_the_allocator_once_blocks_run_on_several_streams() -> None:
    """The stream that waits for a copy may not be the stream that owns the source's memory."""
    device = SeveralStreams()
    offloader = Offloader(device, min_bytes=0, keep_last=0, in_flight=1)
    packed = [offloader.pack(computed(number)) for number in range(3)]
    assert (device.num_sent, device.num_kept) == (3, 0)
    device.stream = "second"
    packed += [offloader.pack(computed(number)) for number in range(3, 6)]
    device.stream = "first"
    packed += [offloader.pack(computed(number)) for number in range(6, 9)]
    assert (device.num_sent, device.num_kept) == (9, 6)
    assert [offloader.unpack(handle)[0].item() for handle in packed] == [*range(9)]


def test_a_tensor_that_was_brought_back_on_one_stream_is_lent_to_another() -> None:
    device = SeveralStreams()
    offloader = Offloader(device, min_bytes=0, keep_last=0, in_flight=1, prefetch=0)
    handles = [offloader.pack(computed(number)) for number in range(4)]
    found = offloader.unpack(handles[0])
    device.stream, device.waiting = "second", []
    assert offloader.unpack(handles[0]) is found
    assert device.waiting == ["second"]  # it may be on its way still
    assert device.lent == [("first", "first"), ("first", "second")]


def test_an_offloader_ends_after_its_copies() -> None:
    device = LazyDevice()
    offloader = Offloader(device, min_bytes=0, keep_last=0, in_flight=3)
    source = computed(5)
    handle = offloader.pack(source)
    buffer = handle.buffer.buffer
    del offloader, handle, source
    gc.collect()
    assert not device.mistakes
    assert buffer[:128].view(torch.float32).eq(5).all()
