"""`runner.utils.modules.weights`: weights are loaded even if elements share an address."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from runner.engines.gradients import BufferSnapshot
from runner.utils.modules.weights import copy_into, load_weights, may_overlap


class Odd(nn.Module):
    def __init__(self, value):
        super().__init__()
        base = torch.full((6,), value)
        self.layer = nn.Linear(2, 2)
        self.frozen = nn.Parameter(torch.full((1, 3), value).expand(2, 3), requires_grad=False)
        self.register_buffer("wide", torch.full((1, 3), value).expand(4, 3))
        self.register_buffer("windows", torch.arange(5.0).mul(value).unfold(0, 3, 1))
        self.register_buffer("left", base[:4])
        self.register_buffer("right", base[2:])
        self.register_buffer("none", None)


def test_expanded_and_overlapping_tensors_are_loaded_in_place():
    saved, module = Odd(3.0).state_dict(), Odd(1.0)
    before = dict(module.named_buffers()) | {"frozen": module.frozen}
    strides = {name: tensor.stride() for name, tensor in before.items()}
    load_weights(module, saved)
    assert all(torch.equal(module.state_dict()[name], value) for name, value in saved.items())
    after = dict(module.named_buffers()) | {"frozen": module.frozen}
    assert all(after[name] is tensor for name, tensor in before.items())
    assert {name: tensor.stride() for name, tensor in after.items()} == strides
    module.left[3] = 7.0
    assert module.right[1] == 7.0  # they share memory as before


def test_weights_that_do_not_fit_leave_the_module_unchanged():
    module = Odd(1.0)
    before = dict(module.named_buffers())
    saved = Odd(3.0).state_dict()
    del saved["left"]
    with pytest.raises(RuntimeError, match="left"):
        load_weights(module, saved)
    assert all(buffer is before[name] for name, buffer in module.named_buffers())
    with pytest.raises(RuntimeError, match="wide"):
        load_weights(module, saved | {"left": torch.ones(4), "wide": torch.ones(2)})


class Hooked(nn.Module):
    """Modules that change what they load: by a version, an extra state, and hooks."""

    def __init__(self, value=0.0, post_hook=False):
        super().__init__()
        self.norm = nn.BatchNorm1d(2)
        self.layers = nn.ModuleList(nn.Linear(2, 2) for _ in range(3))
        self.tied = self.layers[1]
        self.register_buffer("unsaved", torch.zeros(1), persistent=False)
        self.value = value
        self.calls = []
        self.register_load_state_dict_pre_hook(self.rename)
        self.layers[2].register_load_state_dict_pre_hook(self.note)
        if post_hook:
            self.layers[2].register_load_state_dict_post_hook(lambda module, keys: self.calls.append([*keys[0]]))

    def get_extra_state(self):
        return torch.tensor(self.value)

    def set_extra_state(self, state):
        self.value = float(state)

    @staticmethod
    def rename(module, state, prefix, *_):
        for name in [name for name in state if name.startswith(f"{prefix}old.")]:
            state[name.replace("old.", "layers.0.")] = state.pop(name)

    def note(self, module, state, prefix, metadata, strict, *_):
        self.calls.append((prefix, sorted(state), dict(metadata), strict))


STATES = {
    "as it is": lambda state: state,
    "without metadata": dict,
    "renamed by a hook": lambda state: {name.replace("layers.0.", "old."): value for name, value in state.items()},
    "without the counter of an older version": lambda state: {n: v for n, v in state.items() if "num_batches" not in n},
    "a name too few": lambda state: {name: value for name, value in state.items() if name != "layers.1.bias"},
    "a name too many": lambda state: {**state, "layers.7.bias": torch.ones(2), "norm.other": torch.ones(2)},
    "another shape": lambda state: {**state, "layers.2.weight": torch.ones(3, 3)},
    "several faults": lambda state: {
        **{name: value for name, value in state.items() if name != "layers.1.bias" and "extra" not in name},
        "layers.2.weight": torch.ones(3, 3),
        "layers.0.bias": 1.0,
        "layers.7.bias": torch.ones(2),
        "other": torch.ones(2),
    },
    "no tensor": lambda state: {**state, "layers.2.weight": 1.0},
}


@pytest.mark.parametrize("post_hook", [False, True])
@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("state", STATES)
def test_weights_are_loaded_and_refused_as_by_torch(state, strict, post_hook):
    saved = STATES[state](Hooked(3.0).state_dict())
    modules = [Hooked(post_hook=post_hook) for _ in range(2)]
    nn.Module.load_state_dict(modules[0], modules[1].state_dict())  # they begin alike
    modules[0].calls.clear()
    outcomes = []
    for module, load in zip(modules, (load_weights, nn.Module.load_state_dict), strict=True):
        try:
            outcomes.append(load(module, saved, strict=strict) and None)
        except RuntimeError as error:
            outcomes.append(str(error))
    assert outcomes[0] == outcomes[1]
    assert modules[0].calls == modules[1].calls
    assert modules[0].value == modules[1].value
    loaded = modules[0].state_dict()
    assert all(torch.equal(loaded[name], value) for name, value in modules[1].state_dict().items())


class Growing(nn.Module):
    """A module whose tensor is as large as the last one that was loaded."""

    def __init__(self):
        super().__init__()
        self.register_buffer("seen", torch.zeros(2))

    def _load_from_state_dict(self, state, prefix, *arguments):
        super()._load_from_state_dict(state, prefix, *arguments)
        self.seen = torch.zeros_like(state[prefix + "seen"])


def test_a_module_that_refuses_a_state_is_not_loaded_again():
    with pytest.raises(RuntimeError, match="size mismatch for seen"):
        load_weights(Growing(), {"seen": torch.ones(3)})


def test_a_hook_finds_the_versions_of_the_state():
    module, found = nn.BatchNorm1d(2), []
    module.register_load_state_dict_pre_hook(lambda module, state, *_: found.append(state._metadata))
    state = module.state_dict()
    load_weights(module, state)
    assert found == [state._metadata]


def test_a_state_that_is_no_mapping_is_refused_as_by_torch():
    with pytest.raises(TypeError, match="Expected state_dict to be dict-like, got <class 'NoneType'>"):
        load_weights(nn.Linear(1, 1), None)


def test_a_list_of_layers_is_searched_once():
    """Torch compares each name with the name of each layer."""

    class Name(str):
        __slots__ = ()
        num_searches = 0

        def startswith(self, *arguments):
            Name.num_searches += 1
            return super().startswith(*arguments)

    module = nn.ModuleList(nn.Linear(1, 1, bias=False) for _ in range(200))
    load_weights(module, {Name(name): torch.ones(1, 1) for name in module.state_dict()})
    assert all(torch.equal(layer.weight, torch.ones(1, 1)) for layer in module)
    assert Name.num_searches <= 4 * 200


def test_a_discarded_step_restores_expanded_buffers():
    module = Odd(1.0)
    expected, kept = copy.deepcopy(module.state_dict()), BufferSnapshot(module)
    module.wide.data[0] += 1.0
    module.left += 1.0
    kept.restore()
    for name in ("wide", "windows", "left", "right"):
        assert torch.equal(module.state_dict()[name], expected[name])


@settings(max_examples=200, deadline=None)
@given(
    shape=st.lists(st.integers(0, 3), max_size=3),
    strides=st.lists(st.integers(0, 5), min_size=3, max_size=3),
    offset=st.integers(0, 2),
)
def test_values_are_copied_between_views_of_any_strides(shape, strides, offset):
    view = (shape, strides[: len(shape)], offset)
    source, target = torch.arange(40.0).as_strided(*view), torch.zeros(40).as_strided(*view)
    copy_into(target, source.clone())
    assert torch.equal(target, source)
    num_addresses = len(set(source.reshape(-1).tolist()))
    assert may_overlap(source) or num_addresses == source.numel()
