"""`runner.run.weights.matching`: the names of a file and those of a model."""

import re

import pytest
import torch
from torch import nn

from runner.config.spec import InitSpec
from runner.run.weights.matching import AmbiguousError, match
from runner.run.weights.sources import Source


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(5, 3)
        self.head = nn.Linear(3, 5, bias=False)
        self.head.weight = self.embedding.weight


def make_net():
    return nn.ModuleDict({"body": nn.Linear(2, 3), "head": nn.Linear(3, 1)})


def matched(states, module=None, engine="model", **settings):
    states = states if "" not in states and all(isinstance(each, dict) for each in states.values()) else {"": states}
    spec = InitSpec("init.path", "file.pt", **settings)
    return match(spec, Source(states, False, "file.pt"), engine, module or make_net())


def is_whole(found, state):
    return found.is_complete and all(torch.equal(found.weights[name], state[name]) for name in state)


def prefixed(prefix, state):
    return {prefix + name: value for name, value in state.items()}


@pytest.mark.parametrize("prefix", ["module.", "model.", "net.", "module._orig_mod.", "a.b.c."])
def test_a_prefix_of_the_file_is_removed_if_more_names_match_then(prefix):
    state = make_net().state_dict()
    found = matched({**prefixed(prefix, state)})
    assert is_whole(found, state)
    assert any("removed" in line for line in found.remarks) == (prefix != "_orig_mod.")


def test_a_prefix_of_the_model_is_added_to_names_that_lack_it():
    state = make_net()["body"].state_dict()
    found = matched(state, strict=False)
    assert found.remarks[0].startswith("names: prefix 'body.' added")
    assert set(found.weights) == {"body.weight", "body.bias"}
    assert found.missing == ["head.weight", "head.bias"]


def test_names_that_match_are_never_changed():
    inner = make_net()
    module = nn.ModuleDict({"model": inner, **dict(make_net().items())})  # names with and without the prefix
    found = matched(module.state_dict(), module)
    assert is_whole(found, module.state_dict())
    assert found.remarks == []


def test_names_of_compiled_submodules_lose_the_wrapper():
    state = make_net().state_dict()
    found = matched({name.replace("body.", "body._orig_mod."): value for name, value in state.items()})
    assert is_whole(found, state)


def test_of_several_state_dicts_the_one_that_fits_is_taken():
    state = make_net().state_dict()
    other = nn.ModuleDict({"body": nn.Linear(7, 3), "head": nn.Linear(3, 1)}).state_dict()
    found = matched({"teacher": other, "student": state})
    assert is_whole(found, state)
    assert found.remarks == ["names: those under 'student'"]


def test_two_that_fit_are_an_error_that_names_them_unless_one_has_the_engines_name():
    one, other = make_net().state_dict(), make_net().state_dict()
    with pytest.raises(AmbiguousError, match="found 2: model, ema; save the one that you mean"):
        matched({"model": one, "ema": other})
    assert is_whole(matched({"model": one, "again": one}), one)  # the same tensors
    assert is_whole(matched({"critic": one, "generator": other}, engine="generator"), other)
    both = prefixed("student.", one) | prefixed("teacher.", other)
    with pytest.raises(
        AmbiguousError, match=re.escape(r"found 2: student, teacher; rename its prefix away: init.rename")
    ):
        matched(both)
    found = matched(both, rename={r"^teacher\.": ""}, exclude=["student.*"])
    assert is_whole(found, other)


def test_rename_is_applied_in_order_and_an_idle_rule_is_reported():
    state = make_net().state_dict()
    old = {name.replace("body", "trunk.0"): value for name, value in state.items()}
    found = matched(old, rename={r"^trunk\.(\d+)\.": r"part\1.", "part0": "body", "nothing": "x"})
    assert is_whole(found, state)
    assert found.remarks == ["rename: 'nothing' matches no name"]
    with pytest.raises(ValueError, match=r"both body.weight and head.weight become w"):
        matched(state, rename={r".*weight": "w"})


def test_include_and_exclude_select_names_of_the_model():
    state = make_net().state_dict()
    found = matched(state | {"extra": torch.ones(1)}, include=["body.*"])
    assert set(found.weights) == {"body.weight", "body.bias"}
    assert found.is_complete
    found = matched(state, exclude=["head.*"])
    assert set(found.weights) == {"body.weight", "body.bias"}
    assert found.is_complete
    assert "2 left out" in found.table()[0]
    found = matched(state, include=["body.*", "hed.*"], exclude=["boddy.*"])
    assert found.remarks == ["include: 'hed.*' matches no name", "exclude: 'boddy.*' matches no name"]


def test_what_does_not_fit_is_named_with_its_reason():
    state = make_net().state_dict()
    state["body.weight"] = torch.ones(4, 4)
    state["body.bias"] = torch.ones(3, dtype=torch.int8)
    state["more"] = state.pop("head.bias")
    found = matched(state)
    assert found.table()[1:] == [
        "missing     1: head.bias",
        "unused      1: more",
        "mismatched  2: body.weight (expected [3, 2], found [4, 4]), body.bias (expected float32, found int8)",
    ]
    assert not found.is_complete
    found = matched(make_net().state_dict() | {"body.bias": torch.ones(3).to_sparse()})
    assert found.mismatched == ["body.bias (expected strided, found sparse_coo)"]


def test_dtypes_are_converted_and_the_table_says_so():
    state = {name: value.double() for name, value in make_net().state_dict().items()}
    module = make_net()
    found = matched(state, module)
    found.load(module)
    assert "4 converted from float64 to float32" in found.table()[0]
    assert all(torch.equal(value, state[name].float()) for name, value in module.state_dict().items())


def test_a_tied_weight_may_be_stored_once_and_must_not_have_two_values():
    module = Tied()
    weight = torch.arange(15.0).reshape(5, 3)
    found = matched({"embedding.weight": weight}, module)
    assert found.is_complete
    assert "1 tied to them" in found.table()[0]
    assert matched({"embedding.weight": weight, "head.weight": weight.clone()}, module).is_complete
    found = matched({"embedding.weight": weight, "head.weight": weight + 1}, module)
    assert "is head.weight in the model, which has other values in the file" in found.mismatched[0]


def test_many_prefixes_of_a_hostile_file_take_little_time():
    state = {f"{n}.body.weight": torch.ones(1) for n in range(20_000)}
    assert not matched(state).is_complete
