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
