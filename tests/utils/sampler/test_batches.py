import dataclasses
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import textwrap
import time

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from processes import descendants_of, wait_for_end
from torch.utils.data import ConcatDataset, Subset, TensorDataset
from torch.utils.data._utils.pin_memory import pin_memory

from runner.utils.sampler import BatchedOrderedSampler, OrderedSampler, PoolSampler, RandomSampler
from runner.utils.sampler.batches import Batches, EvaluationData, rank_slice
from runner.utils.sampler.stream import StreamBatches


def lengths(length):
    return [1 + index % 5 for index in range(length)]


SAMPLERS = {
    "random": lambda length: (RandomSampler(length, seed=3), 4),
    "drawn again": lambda length: (RandomSampler(length, seed=3, replacement=True), 4),
    "pool": lambda length: (PoolSampler(length, seed=3), 4),
    "ordered": lambda length: (OrderedSampler(length), 4),
    "batched": lambda length: (
        BatchedOrderedSampler(lengths(length), max_cost=9, shuffle=True),
        None,
    ),
}


class Noisy:
    """A dataset whose samples are the index and a number of each of the three global generators."""

    def __init__(self, length):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        return index, torch.rand(()).item(), random.random(), np.random.rand()


def as_lists(samples):
    return [tuple(sample) for sample in samples]


def make(kind, length=11, num_workers=0, **changes):
    sampler, batch_size = SAMPLERS[kind](length)
    return Batches(Noisy(length), sampler, batch_size, seed=7, num_workers=num_workers, collate=as_lists, **changes)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def assert_resumes(kind, length, cut, workers_before, workers_after):
    whole = take(make(kind, length), cut + 6)
    first, second = make(kind, length, workers_before), make(kind, length, workers_after)
    try:
        assert take(first, cut) == whole[:cut]
        second.load_state_dict(json.loads(json.dumps(first.state_dict())))
        assert take(second, 6) == whole[cut:]
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize("kind", SAMPLERS)
@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 30), cut=st.integers(0, 25))
def test_a_stream_resumed_anywhere_yields_exactly_the_rest(kind, length, cut):
    assert_resumes(kind, length, cut, 0, 0)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:This DataLoader will create")  # more workers than cores
@pytest.mark.parametrize("kind", SAMPLERS)
@settings(max_examples=4, deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    length=st.integers(1, 30),
    cut=st.integers(0, 12),
    workers=st.sampled_from([(1, 1), (3, 3), (0, 3), (3, 0), (1, 3)]),
)
def test_a_stream_resumed_anywhere_yields_exactly_the_rest_with_workers(kind, length, cut, workers):
    assert_resumes(kind, length, cut, *workers)


def test_prefetched_batches_do_not_move_the_position():
    batches = make("random", num_workers=1, prefetch_factor=8)
    take(batches, 2)
    state = batches.state_dict()
    batches.close()
    assert (state["ordinal"], batches.num_samples_total, batches.num_samples) == (8, 8, 4)
    assert state["sampler"]["position"] == 8


def test_batches_are_always_full_and_cover_each_epoch_once():
    indices = [sample[0] for batch in take(make("random", 10), 15) for sample in batch]
    assert len(indices) == 60
    assert all(sorted(indices[start : start + 10]) == list(range(10)) for start in range(0, 60, 10))


def test_a_dataset_smaller_than_a_batch_fills_it():
    assert [len(batch) for batch in take(make("pool", 3), 4)] == [4] * 4


class Reversed(RandomSampler):
    """A sampler of the user's, that iterates in its own way."""

    def __iter__(self):
        return (10 - index for index in super().__iter__())


def test_a_sampler_that_iterates_in_its_own_way_is_iterated():
    own, plain = (Batches(range(11), kind(11, seed=3), 4, collate=list) for kind in (Reversed, RandomSampler))
    assert take(own, 6) == [[10 - index for index in batch] for batch in take(plain, 6)]


def test_an_empty_sampler_is_an_error():
    with pytest.raises(ValueError, match="empty"):
        next(Batches([], OrderedSampler(0), 2))


def test_random_numbers_of_a_sample_do_not_depend_on_the_batch_size():
    def samples(size):
        batches = Batches(Noisy(12), RandomSampler(12, seed=1), size, seed=7, collate=as_lists)
        return [sample for batch in take(batches, 24 // size) for sample in batch]

    assert samples(2) == samples(4) == samples(12)
    assert len({sample[1] for sample in samples(2)}) == 24


def test_without_seeding_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(Batches(list(range(9)), RandomSampler(9), 3, seed_samples=False), 2)
    assert torch.equal(torch.rand(3), expected)


class Whole(Noisy):
    calls = 0

    def __getitems__(self, indices):
        self.calls += 1
        return [self[index] for index in indices]


def test_getitems_is_called_once_per_batch_without_seeding():
    dataset = Whole(8)
    batches = Batches(dataset, OrderedSampler(8), 4, collate=as_lists, seed_samples=False)
    assert [sample[0] for sample in next(batches)] == [0, 1, 2, 3]
    assert dataset.calls == 1


class Holding(Noisy):
    """A dataset that also draws from generators of its own, one created with the first sample."""

    def __init__(self, length):
        super().__init__(length)
        own = random.Random(0)
        self.transforms = [lambda value: value + own.random()]
        self.own = {"numpy": np.random.default_rng(0), "torch": torch.Generator()}
        self.late = None

    def __getitem__(self, index):
        if self.late is None:
            self.late = np.random.RandomState(0)
        own = self.own["numpy"].normal(), torch.rand((), generator=self.own["torch"]).item(), self.late.rand()
        return *super().__getitem__(index), *own, self.transforms[0](0)


class HoldingAll(Holding):
    def __init__(self, length):
        super().__init__(length)
        self.late = np.random.RandomState(0)


JITTER = random.Random(0)


def jitter(samples):
    return [(*sample, JITTER.random()) for sample in samples]


WRAPPED = {
    "bare": Holding,
    "fetching many": type("HoldingWhole", (Holding, Whole), {}),
    "subset": lambda length: Subset(Holding(length + 3), range(3, length + 3)),
    "subset of one that fetches many": lambda length: Subset(WRAPPED["fetching many"](length), range(length)),
    "concatenation": lambda length: ConcatDataset([HoldingAll(1), Subset(HoldingAll(length), range(1, length))]),
}


def samples_of(kind, size, count, cut=None, world_size=1, num_workers=0):
    """Returns the samples of `count` batches over all ranks in order; at batch `cut` the streams are resumed."""

    def make(rank):
        settings = {"rank": rank, "world_size": world_size, "num_workers": num_workers}
        return Batches(WRAPPED[kind](9), RandomSampler(9, seed=1), size, seed=7, collate=as_lists, **settings)

    streams = [make(rank) for rank in range(world_size)]
    samples = []
    for number in range(count):
        if number == cut:
            states = [each.state_dict() for each in streams]
            for each in streams:
                each.close()
            streams = [make(rank) for rank in range(world_size)]
            for each, state in zip(streams, states, strict=True):
                each.load_state_dict(state)
        samples += [sample for each in streams for sample in next(each)]
    for each in streams:
        each.close()
    return samples


@pytest.mark.parametrize("kind", WRAPPED)
@settings(max_examples=15, deadline=None)
@given(size=st.sampled_from([2, 3, 4, 6, 12]), world_size=st.integers(1, 2), cut=st.integers(1, 4))
def test_random_numbers_of_a_sample_depend_on_neither_batches_nor_ranks_nor_resuming(kind, size, world_size, cut):
    expected = samples_of(kind, 1, 24)
    assert all(len({sample[i] for sample in expected}) == 24 for i in range(1, 8))
    assert samples_of(kind, size, 24 // size, cut, world_size) == expected


@pytest.mark.parametrize("kind", ["bare", "subset of one that fetches many"])
def test_random_numbers_of_a_sample_do_not_depend_on_workers(kind):
    assert samples_of(kind, 3, 5, cut=2, num_workers=2) == samples_of(kind, 3, 5)


def test_a_generator_of_collate_gives_the_same_numbers_after_a_resume():
    def make():
        return Batches(Noisy(9), RandomSampler(9, seed=1), 4, seed=7, collate=jitter)

    first, second = make(), make()
    before = take(first, 2)
    state = first.state_dict()
    second.load_state_dict(state)
    after = take(first, 2)
    assert take(second, 2) == after
    assert len({sample[-1] for batch in before + after for sample in batch}) == 16


def test_a_datasets_own_generator_gives_the_same_numbers_in_each_evaluation():
    data = Holding(9)
    passes = [list(EvaluationData(data, size, 0, as_lists, 5)) for size in (4, 4, 2)]
    assert passes[0] == passes[1]
    assert [s for _, batch, _ in passes[0] for s in batch] == [s for _, batch, _ in passes[2] for s in batch]


def test_workers_of_two_ranks_draw_different_numbers_without_seeding():
    def first(rank):
        batches = Batches(
            Noisy(8), OrderedSampler(8), 4, collate=as_lists, seed_samples=False, num_workers=1, rank=rank, world_size=2
        )
        try:
            return {value for sample in next(batches) for value in sample[1:]}
        finally:
            batches.close()

    assert first(0).isdisjoint(first(1))
    assert first(0) == first(0)


class Failing(Noisy):
    is_broken = True

    def __getitem__(self, index):
        if index == 5 and self.is_broken:
            raise OSError("the disk")
        return super().__getitem__(index)


def test_an_error_in_the_dataset_leaves_the_position():
    dataset = Failing(12)
    batches = Batches(dataset, OrderedSampler(12), 4, collate=as_lists)
    next(batches)
    state = batches.state_dict()
    with pytest.raises(OSError, match="the disk"):
        next(batches)
    assert batches.state_dict() == state
    dataset.is_broken = False
    assert [sample[0] for sample in next(batches)] == [4, 5, 6, 7]


def test_a_stream_continues_after_closing_it_twice():
    batches = make("ordered", 12, num_workers=1)
    next(batches)
    batches.close()
    batches.close()
    assert [sample[0] for sample in next(batches)] == [4, 5, 6, 7]
    batches.close()


def test_torch_collates_by_default():
    batch = next(Batches([{"x": float(i)} for i in range(4)], OrderedSampler(4), 4))
    assert batch["x"].tolist() == [0, 1, 2, 3]


@pytest.mark.parametrize("kind", SAMPLERS)
def test_data_of_another_length_starts_the_next_epoch_and_keeps_the_ordinal(kind):
    before, after = make(kind, 11), make(kind, 17)
    take(before, 2)
    state = before.state_dict()
    with pytest.raises(ValueError, match="17"):
        after.load_state_dict(state)
    after.start_next_epoch(state)
    moved = after.state_dict()
    assert (moved["sampler"]["epoch"], moved["sampler"]["position"]) == (1, 0)
    assert (after.num_samples_total, moved["ordinal"]) == (before.num_samples_total, state["ordinal"])
    expected, _ = SAMPLERS[kind](17)
    expected.load_state_dict(moved["sampler"])
    indices = [index for batch in take(after, 2) for index, *_ in batch]
    assert indices == list(np.concatenate([np.atleast_1d(item) for item in expected]))[: len(indices)]


def test_an_epoch_that_has_not_begun_is_not_skipped():
    before, after = make("random", 12), make("random", 8)
    take(before, 3)
    after.start_next_epoch(before.state_dict())
    assert after.epoch == before.epoch == 1


def test_a_sampler_without_an_epoch_cannot_start_the_next_one():
    with pytest.raises(ValueError, match="has no epoch to start at"):
        Batches(Noisy(3), Bare(), 1).start_next_epoch({"sampler": {}, "ordinal": 0})


class Bare:
    def __iter__(self):
        return iter([0])

    def state_dict(self):
        return {"place": 0}

    def load_state_dict(self, state):
        pass


@dataclasses.dataclass
class Pair:
    x: torch.Tensor
    name: str


@pytest.mark.parametrize("kind", ["map-style", "stream"])
def test_torchs_loader_pins_the_parts_of_a_nested_batch(monkeypatch, kind):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # a machine without an accelerator
    if kind == "stream":
        loader = StreamBatches([torch.zeros(1)], 1, skips=True, collate=pair)._start()
        found = next(loader)
    else:
        batches = Batches([torch.zeros(1)], OrderedSampler(1), 1, collate=pair, pin_memory=True)
        found = batches._fetcher[0, [0]]
    pinned = pin_memory(found).batch
    assert (pinned.x.item(), pinned.name, found.batch.x.item()) == (1, "pair", 0)


def pair(samples):
    return Pair(samples[0], "pair")


def pids(samples):
    return {os.getpid()}


@pytest.mark.parametrize("seed", [None, 5])
def test_persistent_workers_of_an_evaluation_give_the_same_batches_in_each_pass(seed):
    data = EvaluationData(Noisy(9), 4, 2, as_lists, seed, is_persistent=True)
    try:
        passes = [list(data) for _ in range(3)]
        assert passes[0] == passes[1] == passes[2]
        fresh = EvaluationData(Noisy(9), 4, 2, as_lists, seed, is_persistent=True)
        assert list(fresh) == passes[0]
        fresh.close()
        if seed is not None:  # then they also equal those of other workers
            assert passes[0] == list(EvaluationData(Noisy(9), 4, 0, as_lists, seed))
    finally:
        data.close()


def test_persistent_workers_of_an_evaluation_are_kept_until_it_is_closed_or_a_pass_is_cut():
    data = EvaluationData(Noisy(9), 4, 2, pids, 5, is_persistent=True)

    def workers_of_pass():
        return set.union(*(batch for _, batch, _ in data))

    first = workers_of_pass()
    assert len(first) == 2
    assert workers_of_pass() == first
    next(iter(data))  # an abandoned pass ends its workers
    second = workers_of_pass()
    assert not first & second
    data.close()
    wait_for_end(first | second, timeout_s=10)
    assert not second & workers_of_pass()
    data.close()


_MISSING = object()


class Changing:
    """A dataset whose samples depend on its class, on an identity and on what the samples before have changed."""

    num_calls = 0
    offset = 0

    def __init__(self):
        self.scale = _MISSING

    def __len__(self):
        return 9

    def __getitem__(self, index):
        Changing.num_calls += 1
        return os.getpid(), index, Changing.num_calls, Changing.offset, self.scale is _MISSING


def test_an_evaluation_starts_workers_for_each_pass_by_default(monkeypatch):
    data = EvaluationData(Changing(), 2, 2, list, 5, is_persistent=None)
    passes, processes = [], set()
    for offset in (1, 2):
        monkeypatch.setattr(Changing, "offset", offset)
        samples = [sample for _, batch, _ in data for sample in batch]
        processes |= {sample[0] for sample in samples}
        passes.append([sample[1:] for sample in samples])
    assert len(processes) == 4
    assert {sample[2:] for sample in passes[0]} == {(1, True)}
    assert passes[1] == [(index, number, 2, True) for index, number, _, _ in passes[0]]


def wait_without_error(pid):
    """Waits for the end of a process, and for torch's handler of its signal, which would raise."""
    wait_for_end({pid}, timeout_s=10)
    time.sleep(0.05)


@pytest.mark.parametrize(("dataset", "is_persistent"), [(Noisy(9), True), (TensorDataset(torch.arange(9)), None)])
def test_a_kept_worker_that_is_killed_between_passes_is_replaced(dataset, is_persistent):
    data = EvaluationData(dataset, 4, 2, None, 5, is_persistent=is_persistent)
    try:
        first = list(data)
        workers = multiprocessing.active_children()
        assert len(workers) == 2
        os.kill(workers[0].pid, signal.SIGKILL)
        wait_without_error(workers[0].pid)
        assert str(list(data)) == str(first)
        assert not set(workers) & set(multiprocessing.active_children())
        assert str(list(data)) == str(first)
    finally:
        data.close()
    assert not multiprocessing.active_children()


def kill_one_and_read(batches):
    os.kill(multiprocessing.active_children()[0].pid, signal.SIGKILL)
    list(batches)


def test_a_kept_worker_that_is_killed_within_a_pass_ends_the_pass_and_no_other():
    data = EvaluationData(TensorDataset(torch.arange(99)), 4, 2, None, 5, is_persistent=None)
    try:
        first = list(data)
        batches = iter(data)
        next(batches)
        with pytest.raises(RuntimeError, match="DataLoader worker"):
            kill_one_and_read(batches)
        assert str(list(data)) == str(first)
    finally:
        data.close()


@pytest.mark.parametrize("is_persistent", [True, False])
def test_passes_of_an_evaluation_at_once_have_workers_of_their_own(is_persistent):
    data = EvaluationData(Noisy(40), 2, 2, None, 5, is_persistent=is_persistent)
    try:
        whole = str(list(data))
        dropped, passed = iter(data), []
        next(dropped)
        for batch in data:
            passed.append(batch)
            if len(passed) == 5:
                del dropped
        assert str(passed) == whole
        assert all(str(one) == str(other) for one, other in zip(data, data, strict=True))
        assert len(multiprocessing.active_children()) <= 4
    finally:
        data.close()


@pytest.mark.parametrize("is_persistent", [True, None, False])
def test_closing_an_evaluation_ends_the_workers_of_a_pass_in_progress(is_persistent):
    data = EvaluationData(TensorDataset(torch.arange(99)), 2, 2, None, 5, is_persistent=is_persistent)
    batches = iter(data)
    next(batches)
    workers = {worker.pid for worker in multiprocessing.active_children()}
    assert len(workers) == 2
    data.close()
    wait_for_end(workers, timeout_s=10)
    batches.close()


@given(length=st.integers(1, 200), ranks=st.integers(1, 9))
def test_rank_slices_cover_a_batch_in_order_and_differ_by_one_at_most(length, ranks):
    slices = [rank_slice(length, rank, ranks) for rank in range(ranks)]
    assert [index for start, end in slices for index in range(start, end)] == list(range(length))
    assert max(end - start for start, end in slices) - min(end - start for start, end in slices) <= 1


class Indices:
    lengths = torch.arange(37) % 5 + 1

    def __len__(self):
        return 37

    def __getitem__(self, index):
        return index


def rank_streams(count, make_sampler, batch_size):
    shared = {"collate": list, "world_size": count}
    return [Batches(Indices(), make_sampler(), batch_size, rank=rank, **shared) for rank in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("is_batched", [False, True])
def test_slices_of_all_ranks_are_the_global_batches_and_weights_give_their_mean(count, is_batched):
    def make_sampler():
        return (
            BatchedOrderedSampler(Indices.lengths, max_cost=9, shuffle=True) if is_batched else PoolSampler(37, seed=3)
        )

    size = None if is_batched else 6
    (alone,) = rank_streams(1, make_sampler, size)
    ranks = rank_streams(count, make_sampler, size)
    for _ in range(20):
        expected, found = next(alone), [next(each) for each in ranks]
        counted = [batch for batch, each in zip(found, ranks, strict=True) if each.weight]
        assert [index for batch in counted for index in batch] == expected
        mean = sum(each.weight * sum(batch) / len(batch) for batch, each in zip(found, ranks, strict=True)) / count
        assert mean == pytest.approx(sum(expected) / len(expected))
        assert all(len(batch) > 0 for batch in found)  # every rank runs every step
        assert {str(each.state_dict()) for each in ranks} == {str(alone.state_dict())}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_ranks_split_the_batches_of_an_evaluation_and_take_equally_many(count):
    passes = [list(EvaluationData(Indices(), 10, 0, list, None, rank, count)) for rank in range(count)]
    assert len({len(each) for each in passes}) == 1
    counted = sorted((number, batch) for each in passes for number, batch, size in each if size)
    assert counted == [(number, list(range(number * 10, min(number * 10 + 10, 37)))) for number in range(4)]


# Starts two workers, each of which takes a second from its first instruction to its preparation.
SLOW_START = """
import multiprocessing
import os
import sys
import time
from runner.utils.sampler import OrderedSampler
from runner.utils.sampler.batches import Batches

class Slow(list):
    def __setstate__(self, state):
        time.sleep(1)

if __name__ == "__main__":
    multiprocessing.set_start_method(sys.argv[1])
    if sys.argv[1] == "fork":
        os.register_at_fork(after_in_child=lambda: time.sleep(1))
    dataset = Slow(range(8))
    dataset.has_state = True  # so that it is restored through __setstate__
    next(Batches(dataset, OrderedSampler(8), 2, num_workers=2))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="it lists processes in /proc")
@pytest.mark.parametrize("method", ["fork", "spawn", "forkserver"])
def test_a_worker_whose_parent_is_killed_before_it_is_prepared_ends(tmp_path, method):
    script = tmp_path / "slow_start.py"
    script.write_text(textwrap.dedent(SLOW_START))
    process = subprocess.Popen([sys.executable, script, method])
    num_processes = {"fork": 2, "spawn": 3, "forkserver": 4}[method]  # with the resource tracker, and the server
    while len(workers := descendants_of(process.pid)) < num_processes:
        assert process.poll() is None
        time.sleep(0.005)
    process.kill()
    process.wait()
    wait_for_end(workers, timeout_s=60)
