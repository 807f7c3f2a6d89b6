"""Batches that are copied to a device while it computes are the same batches; without a device, on a simulated one."""

import collections
import contextlib
import itertools
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.utils.rnn import PackedSequence, pack_sequence

from runner.engines import Engine, Engines
from runner.utils.distributed.devices import map_parts
from runner.utils.sampler import RandomSampler
from runner.utils.sampler.batches import Batches
from runner.utils.sampler.device_copies import BatchCopier, make_copier
from runner.utils.sampler.stream import StreamBatches
from runner.utils.train import Loop
from runner.utils.train.failures import FailurePolicy
from tests.lazy_device import LazyCopyStream

LENGTH, SIZE = 11, 3


class Numbers:
    """Samples with a draw of their own; the one at `fails_at` can't be read."""

    def __init__(self, fails_at=None):
        self.fails_at = fails_at

    def __len__(self):
        return LENGTH

    def __getitem__(self, index):
        if index == self.fails_at:
            raise OSError(f"number {index}")
        return {
            "x": torch.tensor([float(index), torch.rand(()).item()]),
            "pair": (torch.tensor(index), f"text {index}"),
        }


class Endless:
    def __iter__(self):
        return iter([{"x": torch.tensor([float(number)]), "pair": (number, "text")} for number in range(LENGTH)])


def make(num_workers=2, is_copied=True, dataset=None, **changes):
    batches = Batches(
        dataset or Numbers(), RandomSampler(LENGTH, seed=3), SIZE, seed=7, num_workers=num_workers, **changes
    )
    batches.copy_with(BatchCopier(LazyCopyStream()) if is_copied else None)
    return batches


def as_plain(batch):
    return map_parts(batch, lambda part: part.tolist() if isinstance(part, torch.Tensor) else None)


def take(batches, count, prefetches):
    """Returns batches as plain values; the next one is prefetched after each for which `prefetches` is true."""
    found = []
    for _, prefetches_now in zip(range(count), itertools.cycle(prefetches), strict=False):
        found.append(as_plain(next(batches)))
        if prefetches_now and batches.prefetch is not None:
            batches.prefetch()
    return found


PLAIN = take(make(0, is_copied=False), 16, [False])


@settings(max_examples=6, deadline=None)
@given(
    cut=st.integers(0, 8),
    prefetches=st.lists(st.booleans(), min_size=1, max_size=4),
    num_workers=st.sampled_from([1, 2]),
)
def test_batches_cut_anywhere_go_on_after_the_delivered_one_whatever_was_prefetched(cut, prefetches, num_workers):
    first, second = make(num_workers), make(0)
    try:
        assert take(first, cut, prefetches) == PLAIN[:cut]
        second.load_state_dict(first.state_dict())
        assert first.num_samples_total == second.num_samples_total == SIZE * cut
        assert take(first, 3, prefetches) == PLAIN[cut : cut + 3]
        assert take(second, 4, prefetches) == PLAIN[cut : cut + 4]
    finally:
        first.close()


def test_seeking_and_loading_drop_the_prefetched_batch():
    batches = make()
    try:
        start = batches.position()
        take(batches, 2, [True])
        batches.seek(start)
        batches.prefetch()
        assert batches.num_samples_total == 0
        assert take(batches, 3, [True]) == PLAIN[:3]
        state = batches.state_dict()
        take(batches, 2, [True])
        batches.load_state_dict(state)
        assert take(batches, 2, [True]) == PLAIN[3:5]
        batches.close()
        assert take(batches, 2, [False]) == PLAIN[5:7]
    finally:
        batches.close()


def test_a_position_that_is_sought_again_keeps_the_prefetched_batch():
    batches = make()
    try:
        next(batches)
        batches.prefetch()
        copies = batches._copier._stream.num_copies
        batches.seek(batches.position())
        batches.prefetch()
        assert as_plain(next(batches)) == PLAIN[1]
        assert batches._copier._stream.num_copies == copies
    finally:
        batches.close()


def test_an_error_of_a_prefetched_batch_is_raised_when_it_is_its_turn():
    third = int(PLAIN[2]["pair"][0][1])
    batches = make(dataset=Numbers(fails_at=third))
    try:
        assert take(batches, 2, [True]) == PLAIN[:2]
        assert batches.state_dict()["ordinal"] == 2 * SIZE
        for _ in range(2):  # it is read again, and fails again
            with pytest.raises(OSError, match=f"number {third}"):
                next(batches)
            batches.prefetch()
        batches.dataset.fails_at = None
        batches.close()
        assert take(batches, 2, [True]) == PLAIN[2:4]
    finally:
        batches.close()


def test_a_signal_while_prefetching_is_raised_at_once(monkeypatch):
    batches = make()
    try:
        next(batches)
        monkeypatch.setattr("runner.utils.sampler.batches.next_batch", interrupt)
        with pytest.raises(KeyboardInterrupt):
            batches.prefetch()
        monkeypatch.undo()
        assert as_plain(next(batches)) == PLAIN[1]
    finally:
        batches.close()


def interrupt(stream):
    raise KeyboardInterrupt(15)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_batches_of_a_stream_are_copied_alike(num_workers):
    def make_stream(is_copied):
        batches = StreamBatches(Endless(), SIZE, skips=True, num_workers=num_workers)
        batches.copy_with(BatchCopier(LazyCopyStream()) if is_copied else None)
        return batches

    plain, copied = make_stream(False), make_stream(True)
    try:
        expected = take(plain, 9, [False])
        assert take(copied, 4, [True]) == expected[:4]
        copied.seek(copied.position())
        state = copied.state_dict()
        assert take(copied, 2, [True]) == expected[4:6]
        copied.load_state_dict(state)
        assert take(copied, 5, [True]) == expected[4:]
    finally:
        plain.close()
        copied.close()


@dataclass
class Example:
    x: torch.Tensor
    text: str


class Graph:
    """Moves itself, with tensors that nobody else knows."""

    def __init__(self):
        self.nodes = torch.ones(2)

    def to(self, device, non_blocking=False):
        return self


class Encoding(collections.UserDict):
    """As transformers' BatchEncoding: a mapping with attributes of its own, that moves itself."""

    def __init__(self, data, note):
        super().__init__(data)
        self.note = note

    def to(self, device, non_blocking=False):
        self.data = {key: value.to(device) for key, value in self.data.items()}
        return self


def test_tensors_of_a_nest_are_copied_and_their_memory_is_not_reused_before_the_computing_is_done():
    stream = LazyCopyStream()
    copier = BatchCopier(stream)
    graph, packed = Graph(), pack_sequence([torch.ones(2)])
    nest: Any = {
        "example": Example(torch.ones(1), "text"),
        "list": [torch.ones(1, dtype=torch.int64), 3, (torch.ones(1, dtype=torch.bool), None)],
        "encoding": Encoding({"ids": torch.ones(1)}, "kept"),
        "graph": graph,
        "packed": packed,
        "empty": torch.empty(0),
    }
    started = copier.start(nest)
    assert started.batch["example"].x.isnan().all()
    assert started.batch["list"][0].tolist() == [-1]
    batch = copier.finish(started)
    copies = [batch["example"].x, batch["list"][0], batch["list"][2][0], batch["encoding"]["ids"]]
    assert all(tensor.tolist() == [1] for tensor in copies)
    assert stream.in_use == {tensor.data_ptr() for tensor in copies}
    assert (type(batch["encoding"]), batch["encoding"].note) == (Encoding, "kept")
    assert nest["encoding"]["ids"] is not batch["encoding"]["ids"]
    assert batch["graph"] is graph
    assert batch["packed"] is packed
    assert isinstance(packed, PackedSequence)
    assert batch["example"].text == "text"


@pytest.mark.filterwarnings("ignore:.*:UserWarning")
def test_tensors_that_are_not_dense_are_left_to_the_step():
    stream = LazyCopyStream()
    copier = BatchCopier(stream)
    batch = [
        torch.eye(2).to_sparse(),
        torch.eye(2).to_sparse_csr(),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(1)]),
        torch.nested.nested_tensor([torch.ones(2), torch.ones(1)], layout=torch.jagged),
        torch.quantize_per_tensor(torch.ones(2), 1.0, 0, torch.qint8),
    ]
    found = copier.finish(copier.start(batch))
    assert all(part is other for part, other in zip(found, batch, strict=True))
    assert stream.num_copies == 0


def test_a_batch_without_tensors_waits_for_nothing():
    stream = LazyCopyStream()
    copier = BatchCopier(stream)
    assert copier.finish(copier.start(["text", 3])) == ["text", 3]
    assert (stream.num_copies, stream.num_delivered) == (0, 0)


class Full(LazyCopyStream):
    def copy(self, tensor):
        raise torch.OutOfMemoryError("no memory")


def test_a_batch_for_which_the_device_has_no_memory_yet_is_left_to_the_step():
    batch = {"x": torch.ones(2)}
    copier = BatchCopier(Full())
    assert copier.finish(copier.start(batch)) is batch


def test_on_the_cpu_nothing_is_copied_or_prefetched():
    assert make_copier(torch.device("cpu")) is None
    assert make(2, is_copied=False).prefetch is None
    assert make(0).prefetch is None


class Model(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(2, 1)
        self.dropout = torch.nn.Dropout(0.5)

    def forward(self, x, pair):
        return (self.layer(self.dropout(x)) - pair[0][:, None]).square().mean()


def make_loop(batches, kind=Model, **changes):
    torch.manual_seed(0)
    model = kind()
    engines = Engines(model=Engine(model, torch.optim.Adam(model.parameters(), lr=1e-2), on_nonfinite="stop"))
    return Loop(engines, batches, seed=5, accumulate=2, **changes)


def test_a_loop_that_is_cut_with_a_prefetched_batch_goes_on_as_without_a_device():
    plain = make_loop(make(0, is_copied=False), steps=7)
    plain.run()
    states = []
    for steps in (3, 4, 7):
        batches = make()
        loop = make_loop(batches, steps=steps)
        try:
            if states:
                loop.engines.load_state_dict(states[-1][0])
                loop.load_state_dict(states[-1][1])
                batches.load_state_dict(states[-1][2])
            loop.run()
            assert batches._copier._stream.num_delivered == 2 * (steps - (states[-1][1]["step"] if states else 0))
            assert batches._ahead is None  # no step follows
            states.append((loop.engines.state_dict(), loop.state_dict(), batches.state_dict()))
        finally:
            batches.close()
    for name, weight in plain.engines["model"].module.state_dict().items():
        assert torch.equal(states[-1][0]["model"][name], weight)


class OnceFull(Model):
    """Runs out of memory in its sixth forward."""

    num_calls = 0

    def forward(self, x, pair):
        self.num_calls += 1
        if self.num_calls == 6:
            raise torch.OutOfMemoryError("no memory")
        return super().forward(x, pair)


def test_a_step_that_is_skipped_drops_the_prefetched_batch():
    finals = []
    for is_copied in (False, True):
        batches = make(2, is_copied=is_copied)
        loop = make_loop(batches, OnceFull, steps=5, policy=FailurePolicy("skip", 1))
        try:
            loop.run()
        finally:
            batches.close()
        assert loop.step_runner.num_skipped == 1
        finals.append((batches.state_dict(), loop.engines["model"].module.state_dict()))
    (plain_state, plain), (state, copied) = finals
    assert state == plain_state
    assert all(torch.equal(copied[name], weight) for name, weight in plain.items())


class FakeAccelerator:
    """A module such as torch.cuda, and its two streams; it notes each call."""

    def __init__(self):
        self.calls = []
        self.computing = self.make_stream("computing")

    def make_stream(self, name):
        stream = SimpleNamespace()
        stream.wait_event = lambda event: self.calls.append(f"{name} waits for {event.name}")
        stream.record_event = lambda: self.make_event(name)
        return stream

    def make_event(self, name):
        event = SimpleNamespace(name=f"event {len(self.calls)} of {name}")
        event.synchronize = lambda: self.calls.append(f"host waits for {event.name}")
        return event

    def Stream(self, device):
        return self.make_stream("copies")

    def stream(self, stream):
        return contextlib.nullcontext()

    def current_stream(self, device):
        return self.computing


def test_an_accelerator_computes_after_the_copy_and_the_host_is_a_few_batches_ahead_at_most(monkeypatch):
    accelerator = FakeAccelerator()
    monkeypatch.setattr(torch, "get_device_module", lambda device: accelerator)
    copier = make_copier(torch.device("cuda"))
    stream = copier._stream
    for number in range(4):
        tensor = SimpleNamespace(record_stream=lambda used_on: accelerator.calls.append(used_on))
        stream.deliver(stream.record_event(), [tensor])
        waits = [call for call in accelerator.calls if str(call).startswith("host")]
        assert len(waits) == max(0, number - 1)
    assert accelerator.calls[:2] == ["computing waits for event 0 of copies", accelerator.computing]
    assert waits[0] == "host waits for event 2 of computing"  # that of the first batch


def test_a_device_without_streams_has_no_copier(monkeypatch):
    monkeypatch.setattr(torch, "get_device_module", lambda device: SimpleNamespace())
    assert make_copier(torch.device("mps")) is None


@pytest.mark.parametrize("kind", ["xla", "hpu", "vulkan", "lazy", "privateuseone"])
def test_a_device_that_torch_has_no_module_for_has_no_copier(kind):
    assert make_copier(torch.device(kind)) is None
