"""Messages, deferred errors and aborts of several ranks, on real gloo processes."""

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks

from runner.launch.environment import ProcessEnvironment
from runner.utils import distributed
from runner.utils.distributed import RankError, RankLostError
from runner.utils.distributed.coordinator import Coordinator


def _leave(store_file, port):
    coordinator = Coordinator(
        distributed.create_store(ProcessEnvironment(port=port, has_external_store=True, store_file=store_file), 10.0)
    )
    fails_alike = coordinator.all_ranks_fail()
    if distributed.rank() == 1:
        return fails_alike, str(coordinator.abort("it \udcff fails", is_expected=False))
    return fails_alike, coordinator.abort_reason(RankLostError("nobody answers"))


@pytest.mark.parametrize("is_file", [True, False])
def test_a_rank_that_aborts_leaves_its_reason_in_either_kind_of_store(tmp_path, is_file):
    host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    found = run_ranks(2, _leave, str(tmp_path / "store") if is_file else "", host.port)
    assert found == [(True, "rank 1: it \\udcff fails"), (True, "it \udcff fails")]


def _exchange(coordinator, polls):
    """The exchange of a step: the flags of all ranks are added."""
    flag = torch.tensor([float(coordinator.has_messages)])
    dist.all_reduce(flag)
    coordinator.receive_flag(flag)
    return coordinator.poll() if polls else None


def _talk(is_late):
    coordinator, rank, heard = Coordinator(delays_flags=is_late), distributed.rank(), []
    for step in range(6):
        if step == 2 and rank == 1:
            coordinator.post("stop", "here")
        if step == 4:
            coordinator.post("line", rank)
        heard.append([tuple(word) for word in _exchange(coordinator, True)])
    return heard


@pytest.mark.parametrize("is_late", [False, True])
def test_all_ranks_receive_the_same_messages_in_the_same_step(is_late):
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


def test_a_deferred_error_is_raised_on_all_ranks_at_the_next_exchange():
    assert run_ranks(2, _be_in_trouble) == ["rank 0: ZeroDivisionError: division by zero"] * 2


def test_on_one_process_an_error_is_not_deferred():
    with pytest.raises(ZeroDivisionError):
        Coordinator().defer_error(lambda: 1 / 0)
