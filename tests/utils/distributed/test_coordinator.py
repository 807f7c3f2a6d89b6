"""Collectives, coordinator and slices, on real gloo processes."""

import os
import pickle
import time

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st
from ranks import run_ranks

from runner.config.errors import ConfigError
from runner.launch.environment import ProcessEnvironment
from runner.utils import distributed
from runner.utils.distributed import (
    RankError,
    RankLostError,
    all_gather_object,
    is_rank_zero,
    process_group,
    run_on_all_ranks,
    run_on_rank_zero,
)
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.sampler import BatchedOrderedSampler, PoolSampler
from runner.utils.sampler.batches import Batches, EvaluationData, slice_of


def test_on_one_process_collectives_are_no_ops():
    assert all_gather_object({"a": 1}) == [{"a": 1}]
    assert run_on_all_ranks(lambda: 3) == [3]
    assert run_on_rank_zero(lambda: 4) == 4
    assert (distributed.world_size(), distributed.rank(), is_rank_zero(), distributed.is_distributed()) == (
        1,
        0,
        True,
        False,
    )
    with pytest.raises(ZeroDivisionError):
        run_on_all_ranks(lambda: 1 / 0)


def _collect():
    rank = distributed.rank()
    values = ["x" * size * (rank + 1) for size in (0, 10, 1000, 3000, 100_000)]
    found = [all_gather_object(value) for value in values]
    assert found == [
        [value[: len(value) // (rank + 1)] * (r + 1) for r in range(dist.get_world_size())] for value in values
    ]
    return run_on_rank_zero(lambda: f"of {rank}"), run_on_all_ranks(lambda: rank), distributed.world_size()


@pytest.mark.parametrize("count", [2, 4])
def test_values_of_any_size_come_by_rank(count):
    assert run_ranks(count, _collect) == [("of 0", list(range(count)), count)] * count


def _fail(which):
    def work():
        if distributed.rank() in which:
            raise ValueError(f"mistake {distributed.rank() if len(which) < 3 else ''}")

    try:
        run_on_all_ranks(work)
    except Exception as error:
        return type(error), str(error), type(error.__cause__)
    return None


def test_what_fails_on_one_rank_is_raised_on_all_and_what_fails_on_all_as_it_is():
    nothing = type(None)
    assert run_ranks(3, _fail, [1]) == [
        (RankError, "rank 1: ValueError: mistake 1", nothing),
        (RankError, "rank 1: ValueError: mistake 1", ValueError),
        (RankError, "rank 1: ValueError: mistake 1", nothing),
    ]
    assert run_ranks(3, _fail, [0, 1, 2]) == [(ValueError, "mistake ", nothing)] * 3


def _make_mistake():
    def work():
        if distributed.rank() == 1:
            raise ConfigError("seed=-1: expected 0 or more")

    try:
        run_on_all_ranks(lambda: run_on_all_ranks(work))
    except RankError as error:
        return str(error)
    return None


def test_a_mistake_of_the_users_is_told_without_its_type():
    assert set(run_ranks(2, _make_mistake)) == {"rank 1: seed=-1: expected 0 or more"}


class Canary:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return os.mkdir, (self.path,)


def _send_a_pickle(canary):
    try:
        if distributed.rank() == 1:
            process_group._gather_encoded(pickle.dumps(Canary(canary)), process_group._control_group)
        else:
            all_gather_object("word")
    except RankError as error:
        return str(error)
    return None


def test_a_pickle_from_another_rank_is_told_and_not_executed(tmp_path):
    (told,) = set(run_ranks(2, _send_a_pickle, str(tmp_path / "canary")))
    assert told.startswith("rank 1 has sent something else than a message: ")
    assert not (tmp_path / "canary").exists()


def _return_what_cannot_be_sent():
    try:
        run_on_all_ranks(lambda: {1} if distributed.rank() == 1 else 0)
    except RankError as error:
        return str(error)
    return None


def test_what_cannot_be_sent_is_told_on_all_ranks():
    told = "rank 1: TypeError: a message can't hold a builtins.set"
    assert run_ranks(2, _return_what_cannot_be_sent) == [told, told]


def _leave(store_file, port):
    coordinator = Coordinator(
        distributed.connect(ProcessEnvironment(port=port, has_external_store=True, store_file=store_file), 10.0)
    )
    fails_alike = coordinator.fails_everywhere()
    if distributed.rank() == 1:
        return fails_alike, str(coordinator.abort("it \udcff fails", is_told=False))
    return fails_alike, coordinator.abort_reason(RankLostError("nobody answers"))


@pytest.mark.parametrize("is_file", [True, False])
def test_a_rank_that_leaves_tells_why_through_either_kind_of_store(tmp_path, is_file):
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = run_ranks(2, _leave, str(tmp_path / "store") if is_file else "", host.port)
    assert found == [(True, "rank 1: it \\udcff fails"), (True, "it \udcff fails")]


def _lose():
    all_gather_object(0)
    if distributed.rank() == 1:
        os._exit(7)
    began = time.monotonic()
    with pytest.raises(RankLostError):
        all_gather_object(1)
    return time.monotonic() - began


def test_a_rank_that_is_gone_is_an_error_at_once_and_not_a_wait():
    with pytest.raises(AssertionError, match="rank 1 gave nothing"):
        run_ranks(2, _lose, timeout_s=15)


def _exchange(coordinator, speaks):
    """A step's exchange: a flag that is the sum of all."""
    flag = torch.tensor([float(coordinator.has_messages)])
    dist.all_reduce(flag)
    coordinator.receive_flag(flag)
    return coordinator.poll() if speaks else None


def _talk(is_late):
    coordinator, rank, heard = Coordinator(is_late=is_late), distributed.rank(), []
    for step in range(6):
        if step == 2 and rank == 1:
            coordinator.post("stop", "here")
        if step == 4:
            coordinator.post("line", rank)
        heard.append([tuple(word) for word in _exchange(coordinator, True)])
    return heard


@pytest.mark.parametrize("is_late", [False, True])
def test_all_hear_the_same_in_the_same_step_and_nothing_where_nobody_speaks(is_late):
    lines = [(0, "line", 0), (1, "line", 1), (2, "line", 2)]
    expected = [[], [], [(1, "stop", "here")], [], lines, []]
    if is_late:
        expected = [[], *expected[:-1]]
    assert run_ranks(3, _talk, is_late) == [expected] * 3


def _be_in_trouble():
    coordinator = Coordinator()
    coordinator.defer_error(lambda: 1 / 0 if distributed.rank() == 0 else None)
    try:
        coordinator.run_on_all_ranks(lambda: 1)
    except RankError as error:
        return str(error)
    return None


def test_what_fails_on_one_rank_alone_is_told_where_all_meet_next():
    assert run_ranks(2, _be_in_trouble) == ["rank 0: ZeroDivisionError: division by zero"] * 2


def test_on_one_process_what_is_guarded_is_raised():
    with pytest.raises(ZeroDivisionError):
        Coordinator().defer_error(lambda: 1 / 0)


@given(length=st.integers(1, 200), ranks=st.integers(1, 9))
def test_slices_are_the_whole_in_order_and_differ_by_one_at_most(length, ranks):
    slices = [slice_of(length, rank, ranks) for rank in range(ranks)]
    assert [index for start, end in slices for index in range(start, end)] == list(range(length))
    assert max(end - start for start, end in slices) - min(end - start for start, end in slices) <= 1


class Indices:
    lengths = torch.arange(37) % 5 + 1

    def __len__(self):
        return 37

    def __getitem__(self, index):
        return index


def streams(count, make_sampler, batch_size):
    shared = {"collate": list, "num_ranks": count}
    return [Batches(Indices(), make_sampler(), batch_size, rank=rank, **shared) for rank in range(count)]


@pytest.mark.parametrize("count", [1, 2, 4, 7])
@pytest.mark.parametrize("is_batched", [False, True])
def test_the_ranks_together_have_the_one_global_order_and_weights_make_it_one_mean(count, is_batched):
    def make_sampler():
        return (
            BatchedOrderedSampler(Indices.lengths, max_cost=9, shuffle=True) if is_batched else PoolSampler(37, seed=3)
        )

    size = None if is_batched else 6
    (alone,) = streams(1, make_sampler, size)
    ranks = streams(count, make_sampler, size)
    for _ in range(20):
        expected, found = next(alone), [next(each) for each in ranks]
        counted = [batch for batch, each in zip(found, ranks, strict=True) if each.weight]
        assert [index for batch in counted for index in batch] == expected
        mean = sum(each.weight * sum(batch) / len(batch) for batch, each in zip(found, ranks, strict=True)) / count
        assert mean == pytest.approx(sum(expected) / len(expected))
        assert all(len(batch) > 0 for batch in found)  # every rank makes every step
        assert {str(each.state_dict()) for each in ranks} == {str(alone.state_dict())}


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_of_an_evaluation_each_rank_has_its_batches_and_all_as_many(count):
    passes = [list(EvaluationData(Indices(), 10, 0, list, None, rank, count)) for rank in range(count)]
    assert len({len(each) for each in passes}) == 1
    counted = sorted((number, batch) for each in passes for number, batch, size in each if size)
    assert counted == [(number, list(range(number * 10, min(number * 10 + 10, 37)))) for number in range(4)]
