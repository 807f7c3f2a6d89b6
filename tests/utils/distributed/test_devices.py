from collections import namedtuple

import pytest
import torch

from runner.utils.distributed import default_generator, move, pick_device


def test_auto_picks_the_accelerator_if_there_is_one():
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert pick_device("auto") == found
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_missing_device_is_an_error_that_names_it(name):
    with pytest.raises(ValueError, match=f"device='{name}'.*expected"):
        pick_device(name)


def test_the_default_generator_of_the_cpu_is_torchs():
    default_generator(torch.device("cpu")).manual_seed(5)
    first = torch.rand(3)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(3))


def test_move_keeps_the_structure_of_nested_containers():
    Pair = namedtuple("Pair", "a b")
    batch = {"x": [torch.ones(2), "text"], "pair": Pair(torch.zeros(1), 3)}
    moved = move(batch, torch.device("meta"))
    assert moved["x"][0].device.type == moved["pair"].a.device.type == "meta"
    assert (moved["x"][1], moved["pair"].b, type(moved["pair"])) == ("text", 3, Pair)
    assert move(batch, torch.device("cpu")) is batch


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_default_generator_of_the_gpu_is_torchs():
    device = torch.device("cuda")
    default_generator(device).manual_seed(5)
    first = torch.rand(3, device=device)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(3, device=device))
    assert move({"x": torch.ones(1)}, device)["x"].is_cuda
