"""Stores and collectives, on real gloo processes."""

import contextlib
import os
import pickle
import signal
import threading
import time

import pytest
import torch.distributed as dist
from ranks import run_ranks

from runner.config.errors import ConfigError
from runner.launch.environment import ProcessEnvironment
from runner.utils import distributed
from runner.utils.distributed import (
    RankError,
    RankLostError,
    all_gather_object,
    create_store,
    is_rank_zero,
    process_group,
    run_on_all_ranks,
    run_on_rank_zero,
    wait_for_keys,
)


@pytest.mark.parametrize("is_file", [True, False])
def test_stores_in_a_file_and_at_an_address_wait_alike(tmp_path, is_file):
    if is_file:
        place = ProcessEnvironment(has_external_store=True, store_file=str(tmp_path / "store"))
    else:
        host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = ProcessEnvironment(has_external_store=True, port=host.port)
    first, second = create_store(place, 10.0), create_store(place, 10.0)
    assert isinstance(first, dist.FileStore if is_file else dist.TCPStore)
    assert not wait_for_keys(first, ["a", "b"], 0.05)
    second.set("a", "")
    assert not wait_for_keys(first, ["a", "b"], 0.05)
    late = threading.Timer(0.05, second.set, ("b", "1"))
    late.start()
    assert wait_for_keys(first, ["a", "b"], 10.0)
    late.join()
    with pytest.raises(InterruptedError), interrupted(0.05):
        wait_for_keys(first, ["c"], 60.0)
    del first, second
    assert (tmp_path / "store").exists() is is_file  # a file stays, for a rank that is restarted


@contextlib.contextmanager
def interrupted(after_s):
    def raise_error(*_):
        raise InterruptedError

    before = signal.signal(signal.SIGALRM, raise_error)
    signal.setitimer(signal.ITIMER_REAL, after_s)
    try:
        yield
    finally:
        signal.signal(signal.SIGALRM, before)


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
def test_all_gather_object_returns_values_of_any_size_by_rank(count):
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


def test_a_failure_of_one_rank_is_raised_on_all_and_a_common_one_unchanged():
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


def test_a_config_error_of_one_rank_is_reported_without_its_type():
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


def test_a_pickle_from_another_rank_is_reported_and_not_executed(tmp_path):
    (told,) = set(run_ranks(2, _send_a_pickle, str(tmp_path / "canary")))
    assert told.startswith("rank 1 has sent something else than a message: ")
    assert not (tmp_path / "canary").exists()


def _return_what_cannot_be_sent():
    try:
        run_on_all_ranks(lambda: {1} if distributed.rank() == 1 else 0)
    except RankError as error:
        return str(error)
    return None


def test_a_value_that_cannot_be_sent_is_reported_on_all_ranks():
    told = "rank 1: TypeError: a message can't hold a builtins.set"
    assert run_ranks(2, _return_what_cannot_be_sent) == [told, told]


def test_no_rank_enters_the_block_before_all_have_connected(monkeypatch, tmp_path):
    # A rank that enters and fails at once closes its connections while a slower one still connects.
    connected = tmp_path / "connected"
    new_group = dist.new_group

    def connect_slowly(**settings):
        group = new_group(**settings)
        if dist.get_rank() == 0:
            time.sleep(0.5)
            connected.touch()
        return group

    monkeypatch.setattr(dist, "new_group", connect_slowly)
    assert run_ranks(2, connected.exists) == [True, True]


def _lose():
    all_gather_object(0)
    if distributed.rank() == 1:
        os._exit(7)
    began = time.monotonic()
    with pytest.raises(RankLostError):
        all_gather_object(1)
    return time.monotonic() - began


def test_a_lost_rank_is_an_error_without_a_timeout():
    with pytest.raises(AssertionError, match="rank 1 has no result"):
        run_ranks(2, _lose, timeout_s=15)
