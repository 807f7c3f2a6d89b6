import dataclasses
import random
from collections import UserDict, defaultdict, namedtuple
from typing import Any

import numpy as np
import pytest
import torch

from runner.utils.distributed import default_generator, move, pick_device, seed_all
from runner.utils.distributed.devices import pin


def test_auto_picks_the_accelerator_if_there_is_one():
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else torch.device("cpu")
    assert pick_device("auto") == found
    assert pick_device("cpu") == torch.device("cpu")


@pytest.mark.parametrize("name", ["gpu", "cuda:99"])
def test_a_missing_device_is_an_error_that_names_it(name):
    with pytest.raises(ValueError, match=f"device='{name}'.*expected"):
        pick_device(name)


@pytest.mark.parametrize("seed", [0, 1, 2**32, 2**63 - 1])
def test_the_global_generators_are_seeded_as_by_their_own_functions(seed):
    def draw():
        numbers = [random.gauss(0, 1), random.random(), random.getrandbits(70), np.random.normal(), np.random.rand()]
        return [*numbers, torch.rand(1).item()]

    random.gauss(0, 1)  # keeps the second number of a pair for the next call
    seed_all(seed, torch.device("cpu"))
    found = draw()
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)
    assert found == draw()


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


Pair = namedtuple("Pair", "a b")


@dataclasses.dataclass(frozen=True)
class Example:
    x: torch.Tensor
    name: str
    extra: Any = None
    length: int = dataclasses.field(default=3, init=False)


class Graph:
    """An object that moves itself, as those of torch_geometric do; its `to` takes the device alone."""

    def __init__(self, x):
        self.x = x

    def to(self, device):
        return Graph(self.x.to(device))


class InPlace(UserDict):
    """A mapping that moves its values in place and returns nothing."""

    def to(self, device, non_blocking=False):
        self.data = {key: value.to(device) for key, value in self.data.items()}


class Attributed(dict):
    """A mapping with an attribute of its own."""


def test_move_enters_dataclasses_and_mappings_of_any_type_and_keeps_what_is_no_tensor():
    attributed = Attributed(x=torch.ones(1))
    attributed.source = "file"
    array = np.ones(2)
    example = Example(torch.ones(2), "one", [Pair(torch.zeros(1), array)])
    batch = {"example": example, "counts": defaultdict(list, {"x": torch.ones(1)}), "attributed": attributed}
    moved = move(batch, torch.device("meta"))
    found = moved["example"]
    assert (type(found), found.name, found.length, type(found.extra[0])) == (Example, "one", 3, Pair)
    assert found.x.device.type == found.extra[0].a.device.type == "meta"
    assert found.extra[0].b is array
    assert type(moved["counts"]) is defaultdict
    assert moved["counts"]["x"].device.type == moved["attributed"]["x"].device.type == "meta"
    assert moved["attributed"].source == "file"
    assert example.x.device.type == attributed["x"].device.type == "cpu"  # the batch itself is unchanged


def test_an_object_with_a_method_to_moves_itself():
    moved = move([Graph(torch.ones(1)), InPlace(x=torch.ones(1))], torch.device("meta"))
    assert isinstance(moved[0], Graph)
    assert isinstance(moved[1], InPlace)
    assert moved[0].x.device.type == moved[1]["x"].device.type == "meta"


def test_a_batch_encoding_of_transformers_moves_and_keeps_its_type():
    encoding = pytest.importorskip("transformers").BatchEncoding({"input_ids": torch.ones(2, dtype=torch.int64)})
    moved = move({"text": encoding}, torch.device("meta"))["text"]
    assert type(moved) is type(encoding)
    assert moved["input_ids"].device.type == moved.input_ids.device.type == "meta"


def test_pin_pins_each_tensor_of_a_nest(monkeypatch):
    monkeypatch.setattr(torch.Tensor, "pin_memory", lambda tensor: tensor + 1)  # a machine without an accelerator

    class PinsItself:
        def pin_memory(self):
            return "pinned"

    batch = {"example": Example(torch.zeros(1), "one", (torch.zeros(1), "text")), "own": PinsItself()}
    pinned = pin(batch)
    assert (pinned["example"].x.item(), pinned["example"].extra[0].item(), pinned["example"].extra[1]) == (1, 1, "text")
    assert (pinned["own"], type(pinned["example"]), batch["example"].x.item()) == ("pinned", Example, 0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_nest_is_pinned_and_moved_to_the_gpu():
    pinned = pin({"example": Example(torch.ones(1), "one", [torch.ones(1)])})["example"]
    assert pinned.x.is_pinned()
    assert pinned.extra[0].is_pinned()
    assert move(pinned, torch.device("cuda")).extra[0].is_cuda


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_the_default_generator_of_the_gpu_is_torchs():
    device = torch.device("cuda")
    default_generator(device).manual_seed(5)
    first = torch.rand(3, device=device)
    torch.manual_seed(5)
    assert torch.equal(first, torch.rand(3, device=device))
    assert move({"x": torch.ones(1)}, device)["x"].is_cuda
