import contextlib
import signal
import threading
from collections import namedtuple

import pytest
import torch
import torch.distributed as dist

from runner.launch.environment import ProcessEnvironment
from runner.utils.distributed import connect, default_generator, move, pick_device, wait_for


def test_auto_takes_an_accelerator_where_there_is_one():
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert pick_device("auto") == found
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_device_that_is_not_there_is_an_error_that_names_it(name):
    with pytest.raises(ValueError, match=f"device='{name}'.*expected"):
        pick_device(name)


def test_the_cpu_generator_decides_what_is_drawn():
    default_generator(torch.device("cpu")).manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(3))


def test_moving_keeps_the_shape_of_a_nest():
    Pair = namedtuple("Pair", "a b")
    batch = {"x": [torch.ones(2), "text"], "pair": Pair(torch.zeros(1), 3)}
    moved = move(batch, torch.device("meta"))
    assert moved["x"][0].device.type == moved["pair"].a.device.type == "meta"
    assert (moved["x"][1], moved["pair"].b, type(moved["pair"])) == ("text", 3, Pair)
    assert move(batch, torch.device("cpu")) is batch


@pytest.mark.parametrize("is_file", [True, False])
def test_ranks_meet_in_a_file_or_at_an_address_and_wait_alike(tmp_path, is_file):
    if is_file:
        place = ProcessEnvironment(has_external_store=True, store_file=str(tmp_path / "store"))
    else:
        host = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        place = ProcessEnvironment(has_external_store=True, port=host.port)
    first, second = connect(place, 10.0), connect(place, 10.0)
    assert isinstance(first, dist.FileStore if is_file else dist.TCPStore)
    assert not wait_for(first, ["a", "b"], 0.05)
    second.set("a", "")
    assert not wait_for(first, ["a", "b"], 0.05)
    late = threading.Timer(0.05, second.set, ("b", "1"))
    late.start()
    assert wait_for(first, ["a", "b"], 10.0)
    late.join()
    with pytest.raises(InterruptedError), interrupted(0.05):
        wait_for(first, ["c"], 60.0)
    del first, second
    assert (tmp_path / "store").exists() is is_file  # for a rank that comes again


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


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_gpu_generator_decides_what_is_drawn_there():
    device = torch.device("cuda")
    default_generator(device).manual_seed(5)
    first = torch.rand(3, device=device)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(3, device=device))
    assert move({"x": torch.ones(1)}, device)["x"].is_cuda
