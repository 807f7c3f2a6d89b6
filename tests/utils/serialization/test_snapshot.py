"""A snapshot that reuses an earlier one leaves the same files as a snapshot that does not."""

from collections import OrderedDict
from unittest import mock

import numpy as np
import pytest
import torch
from torch import nn

from runner.utils import io
from runner.utils.serialization import FlattenedState, HostSnapshot

BIG = 1 << 70


def make_state():
    """Returns a state like that of an engine: many tensors first, then numbers and a few tensors."""
    weight = torch.arange(12.0).reshape(3, 4)
    square = torch.arange(9.0).reshape(3, 3)
    return {
        "weights": OrderedDict({"weight": weight, "tied": weight, "view": weight.detach(), "row": weight[1:]}),
        "optimizer": {
            "state": {i: {"step": torch.tensor(float(i)), "moment": torch.full((i, 2), 0.5)} for i in range(60)},
            "groups": [{"lr": 0.1, "params": [*range(60)], "names": ["a", "b"], "betas": (0.9, 0.99), "flag": True}],
        },
        "others": [
            square,
            square.detach(),
            torch.ones(2, dtype=torch.complex64),
            torch.ones(2, dtype=torch.complex128),
        ],
        "bytes": {"mask": torch.tensor([True, False]), "half": torch.ones(3).half(), "none": torch.empty(0, 3)},
        "counters": {"steps": 3, "norm": None},
        "metrics": {"loss": torch.ones(2, dtype=torch.float64), "rate": 0.5},
    }


def set_item(*keys_and_value):
    *keys, last, value = keys_and_value

    def change(state):
        for key in keys:
            state = state[key]
        state[last] = value(state[last]) if callable(value) else value

    return change


def rename(state):
    state["weights"] = OrderedDict({"other" if key == "row" else key: value for key, value in state["weights"].items()})


def reorder(state):
    state["weights"].move_to_end("weight")


def key_of_another_type(state):
    states = state["optimizer"]["state"]
    state["optimizer"]["state"] = {True if key == 1 else key: value for key, value in states.items()}


def tie(state):
    states = state["optimizer"]["state"]
    states[3]["step"] = states[4]["step"]


def update(state):
    state["weights"]["weight"].add_(1)
    for moments in state["optimizer"]["state"].values():
        moments["moment"].mul_(2)


CHANGES = {
    "nothing": lambda state: None,
    "contents": update,
    "a number": set_item("counters", "steps", 4),
    "a number to a large one": set_item("counters", "steps", BIG),
    "a number to one of another type": set_item("counters", "steps", True),
    "a rate": set_item("optimizer", "groups", 0, "lr", -0.0),
    "a rate to NaN": set_item("optimizer", "groups", 0, "lr", float("nan")),
    "a number to bytes": set_item("counters", "steps", b""),
    "a list": set_item("optimizer", "groups", 0, "params", [0, True, 2.5, BIG]),
    "a number to a tensor": set_item("counters", "norm", torch.ones(1)),
    "metrics": set_item("metrics", "loss", torch.ones(5, dtype=torch.float64)),
    "metrics that are new": set_item("metrics", "rate", {"a": torch.ones(1), "b": torch.ones(2).half()}),
    "metrics of NumPy": set_item("metrics", "rate", np.ones(3)),
    "metrics with memory of a weight": lambda state: state["metrics"].update(loss=state["others"][0].detach()),
    "metrics of the name of a weight": lambda state: state.update({"weights.weight": torch.ones(2)}),
    "a dtype": set_item("weights", "row", lambda tensor: tensor.double()),
    "a shape": set_item("optimizer", "state", 3, "moment", torch.ones(4, 4)),
    "a shape of as many elements": set_item("optimizer", "state", 3, "moment", lambda tensor: tensor.view(2, 3)),
    "a gradient": set_item("optimizer", "state", 3, "moment", lambda tensor: tensor.requires_grad_()),
    "a parameter": set_item("optimizer", "state", 3, "moment", nn.Parameter),
    "a sparse tensor": set_item("optimizer", "state", 3, "moment", lambda tensor: tensor.to_sparse()),
    "a meta tensor": set_item("optimizer", "state", 3, "moment", lambda tensor: tensor.to("meta")),
    "an empty meta tensor": set_item("bytes", "none", lambda tensor: tensor.to("meta")),
    "a tie of objects to one of memory": set_item("weights", "tied", lambda tensor: tensor.detach()),
    "a tie of memory to one of objects": lambda state: state["weights"].update(view=state["weights"]["weight"]),
    "a tie that ends": set_item("weights", "view", lambda tensor: tensor.clone()),
    "a tie that begins": tie,
    "a tie to the transposed": set_item("others", 1, lambda tensor: tensor.T),
    "a transposed tensor": set_item("others", 0, lambda tensor: tensor.T.clone(memory_format=torch.preserve_format)),
    "a conjugate": set_item("others", 2, lambda tensor: tensor.conj()),
    "a key": rename,
    "the order": reorder,
    "a key of another type": key_of_another_type,
    "a container": set_item("others", lambda items: tuple(items)),
    "fewer items": lambda state: state.pop("metrics"),
    "fewer weights": lambda state: state["weights"].pop("row"),
    "another kind of mapping": set_item("weights", dict),
}  # fmt: skip


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize("change", CHANGES)
def test_a_snapshot_after_a_change_leaves_the_file_of_a_new_one(tmp_path, change, suffix):
    state = make_state()
    first = HostSnapshot(state)
    second = HostSnapshot(state, reuse=first)
    CHANGES[change](state)
    third = HostSnapshot(state, reuse=second)
    fourth = HostSnapshot(state, reuse=third)
    for name, snapshot in {"new": HostSnapshot(state), "third": third, "fourth": fourth}.items():
        io.write_new(snapshot, tmp_path / f"{name}{suffix}")
    expected = (tmp_path / f"new{suffix}").read_bytes()
    assert (tmp_path / f"third{suffix}").read_bytes() == (tmp_path / f"fourth{suffix}").read_bytes() == expected
    assert fourth.document == HostSnapshot(state).document


@pytest.mark.parametrize("suffix", [".safetensors", ".pt"])
@pytest.mark.parametrize(
    ("saved", "changed"), [(0.0, -0.0), (0j, -0j), ((1,), (True,)), ((1, "x"), (1.0, "x"))], ids=repr
)
def test_a_key_that_equals_another_one_is_saved_as_it_is(tmp_path, saved, changed, suffix):
    first = HostSnapshot({"a": {saved: torch.ones(2), "b": torch.ones(3)}})
    state = {"a": {changed: torch.ones(2), "b": torch.ones(3)}}
    for name, snapshot in {"new": HostSnapshot(state), "second": HostSnapshot(state, reuse=first)}.items():
        io.write_new(snapshot, tmp_path / f"{name}{suffix}")
    assert (tmp_path / f"second{suffix}").read_bytes() == (tmp_path / f"new{suffix}").read_bytes()


@pytest.mark.parametrize("change", ["nothing", "contents", "a number", "a rate to NaN", "metrics", "a list"])
def test_a_state_with_the_same_tensors_is_not_flattened_again(change):
    state = make_state()
    first = HostSnapshot(state)
    CHANGES[change](state)
    with mock.patch.object(
        FlattenedState, "_name_tensor", autospec=True, side_effect=FlattenedState._name_tensor
    ) as named:
        second = HostSnapshot(state, reuse=first)
    assert named.call_count <= 1  # that of the metrics
    assert second.tensors["weights.weight"].data_ptr() == first.tensors["weights.weight"].data_ptr()


def test_a_value_that_begins_to_contain_itself_is_refused_as_by_a_new_snapshot():
    state = make_state()
    first = HostSnapshot(state)
    state["counters"]["steps"] = state
    with pytest.raises(ValueError, match=r'value\["counters"\]\["steps"\], a dict, holds itself'):
        HostSnapshot(state, reuse=first)


def test_a_snapshot_does_not_change_with_the_state():
    state = make_state()
    expected = state["weights"]["weight"].clone()
    first = HostSnapshot(state)
    second = HostSnapshot(state, reuse=first)
    update(state)
    state["counters"]["steps"] = 4
    state["optimizer"]["groups"][0]["params"].append(7)
    assert torch.equal(second.tensors["weights.weight"], expected)
    assert second.document == HostSnapshot(make_state()).document
