"""`runner.utils.wrapper.device_map`: plans as arithmetic, and where tensors go on the CPU with meta beside it."""

import copy
from typing import NamedTuple

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from runner.utils.wrapper.device_map import DevicePlan, plan, spread

WIDTH = 4
BLOCK_BYTES = 4 * (WIDTH * WIDTH + WIDTH)  # of a Linear, in fp32


class Pair(NamedTuple):
    x: torch.Tensor
    note: str


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)
        self.seen = []

    def forward(self, x, extra=None):
        self.seen.append((x.device.type, extra))
        return torch.tanh(self.inner(x))


class Net(nn.Module):
    def __init__(self, num_blocks=4, is_tied=False):
        super().__init__()
        self.scale = nn.Parameter(torch.ones(WIDTH))
        self.register_buffer("shift", torch.zeros(WIDTH))
        self.embed = nn.Linear(WIDTH, WIDTH)
        self.body = nn.Module()
        self.body.gain = nn.Parameter(torch.ones(1))
        self.body.layers = nn.ModuleList([Block() for _ in range(num_blocks)])
        self.body.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, WIDTH)
        if is_tied:
            self.head.weight = self.embed.weight

    def forward(self, x, extra=None):
        x = self.embed(x * self.scale + self.shift) * self.body.gain
        for layer in self.body.layers:
            x = layer(x, extra=extra)
        return self.head(self.body.norm(x))


UNITS = ["", "embed", "body", *(f"body.layers.{i}" for i in range(4)), "body.norm", "head"]


def make(**kwargs):
    torch.manual_seed(0)
    return Net(**kwargs)


def held_bytes(module):
    return sum(t.numel() * t.element_size() for t in (*module.parameters(), *module.buffers()))


def test_units_are_blocks_and_what_stands_around_them_in_the_order_of_the_module():
    found = plan(make(), {"cpu": None})
    assert list(found.devices) == UNITS
    assert found.unit_bytes[""] == 4 * 2 * WIDTH
    assert found.unit_bytes["body.layers.0"] == BLOCK_BYTES
    assert sum(found.unit_bytes.values()) == held_bytes(make())


def test_a_list_that_is_no_list_of_blocks_is_split_as_it_is_never_called():
    module = nn.Module()
    module.parts = nn.ModuleList([nn.Linear(2, 2), nn.LayerNorm(2)])
    module.by_name = nn.ModuleDict({"a": nn.Linear(2, 2)})
    module.scales = nn.ParameterList([nn.Parameter(torch.ones(2))])
    assert list(plan(module, {"cpu": None}).devices) == ["", "parts.0", "parts.1", "by_name.a"]


def test_each_device_is_filled_in_order_and_not_gone_back_to():
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(3)), nn.LayerNorm(WIDTH))
    found = plan(module, {"cuda:0": 2 * BLOCK_BYTES + 40, "cuda:1": BLOCK_BYTES, "cpu": None})
    assert list(found.devices.values()) == ["cuda:0", "cuda:0", "cuda:1", "cpu"]  # the norm would have fit on cuda:0
    assert str(found) == (
        "cuda:0: 0..1; 160 B of 200 B\n"
        "cuda:1: 2; 80 B of 80 B\n"
        "cpu: 3; 32 B of whatever is left"
    )  # fmt: skip


def test_a_factor_reckons_what_training_adds():
    module = nn.Sequential(*(nn.Linear(WIDTH, WIDTH) for _ in range(4)))
    found = plan(module, {"cuda:0": 8 * BLOCK_BYTES, "cpu": None}, bytes_factor=4)
    assert list(found.devices.values()) == ["cuda:0", "cuda:0", "cpu", "cpu"]


def test_units_that_share_a_weight_go_to_one_device_and_count_it_once():
    module = make(is_tied=True)
    found = plan(module, {"cuda:0": 4 * (WIDTH * 2) + BLOCK_BYTES + 4 * WIDTH, "cuda:1": None})
    assert {name for name, device in found.devices.items() if device == "cuda:0"} == {"", "embed", "head"}
    assert found.unit_bytes["head"] == 4 * WIDTH
    assert sum(found.unit_bytes.values()) == held_bytes(module)


def test_ties_across_three_units_bind_them_all():
    module = make(num_blocks=3)
    layers = module.body.layers
    layers[2].inner.weight, layers[2].inner.bias = layers[0].inner.weight, layers[1].inner.bias
    found = plan(module, {"cuda:0": 4 * 2 * WIDTH + BLOCK_BYTES + 4, "cuda:1": None})
    assert {found.devices[f"body.layers.{i}"] for i in range(3)} == {"cuda:1"}


def test_a_plan_is_made_without_a_device_and_without_values():
    with torch.device("meta"):
        module = nn.Sequential(*(nn.Linear(10_000, 10_000) for _ in range(100)))
    found = plan(module, {"cuda:0": "24.1GB", "cuda:7": "8 gb", "cpu": None})
    assert [list(found.devices.values()).count(device) for device in found.budgets] == [60, 19, 21]


def test_a_plan_reads_well():
    devices = {"": "cuda:0", "embed": "cuda:0"} | {f"layers.{i}": ("cuda:0" if i < 9 else "cpu") for i in range(12)}
    budgets = {"cuda:0": 8e9, "cuda:1": 5e8, "cpu": float("inf")}
    assert str(DevicePlan(devices, dict.fromkeys(devices, 5e8), budgets)) == (
        "cuda:0: (own), embed, layers.0..layers.8; 5.5 GB of 8 GB\n"
        "cuda:1: nothing; 0 B of 500 MB\n"
        "cpu: layers.9..layers.11; 1.5 GB of whatever is left"
    )


@settings(max_examples=30, deadline=None)
@given(amounts=st.lists(st.integers(0, 900), min_size=1, max_size=4), is_tied=st.booleans())
def test_no_budget_is_exceeded_and_no_unit_left_out(amounts, is_tied):
    module = make(is_tied=is_tied)
    budgets = {f"cuda:{index}": amount for index, amount in enumerate(amounts)} | {"cpu": None}
    found = plan(module, budgets)
    assert list(found.devices) == UNITS
    for device, amount in budgets.items():
        used = sum(found.unit_bytes[name] for name, its in found.devices.items() if its == device)
        assert amount is None or used <= amount


def test_too_little_in_all_is_told_with_what_did_not_fit():
    expected = "548 B needed in all, there are cuda:0 200 B, cpu 200 B; body.layers.3 of 80 B did not fit"
    with pytest.raises(ValueError, match=f"budgets: {expected}"):
        plan(make(), {"cuda:0": 200, "cpu": "0.2KB"})
    with pytest.raises(ValueError, match="embed, head, tied, of 96 B did not fit"):
        plan(make(is_tied=True), {"cpu": 100})


@pytest.mark.parametrize(
    ("budgets", "message"),
    [
        ({}, "none given; expected bytes by device"),
        ({"gpu0": None}, "'gpu0' is no device; expected cpu, cuda:0"),
        ({0: None}, "0 is no device"),
        ({"cpu": "8 gigs"}, "cpu: '8 gigs': expected a number of bytes, one with B, KB, MB, GB, TB, or null"),
        ({"cpu": -1}, "cpu: -1: expected"),
        ({"cpu": True}, "cpu: True: expected"),
        ({"cpu": float("nan")}, "cpu: nan: expected"),
    ],
)
def test_a_budget_that_is_none_is_told(budgets, message):
    with pytest.raises(ValueError, match=f"budgets: {message}"):
        plan(make(), budgets)


@pytest.mark.parametrize(
    ("amount", "expected"), [("8GB", 8e9), ("500MB", 5e8), ("1.5 kb", 1500), ("8e9", 8e9), ("7B", 7), (12.5, 12.5)]
)
def test_a_size_is_read(amount, expected):
    assert plan(nn.Module(), {"cpu": amount}).budgets == {"cpu": expected}


def train_a_step(module):
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    x = torch.randn(3, WIDTH, generator=torch.Generator().manual_seed(2))
    loss = module(x).square().mean()
    loss.backward()
    missing = [name for name, p in module.named_parameters() if p.requires_grad and p.grad is None]
    optimizer.step()
    return loss, missing


@pytest.mark.parametrize("is_tied", [False, True])
def test_a_step_of_a_spread_module_is_that_of_the_untouched_one_bit_for_bit(is_tied):
    untouched, module = make(is_tied=is_tied), make(is_tied=is_tied)
    parameters = list(module.parameters())
    undo = spread(module, plan(module, {"cpu": None}))
    loss, missing = train_a_step(module)
    assert missing == []
    assert torch.equal(loss, train_a_step(untouched)[0])
    undo()
    assert all(one is other for one, other in zip(parameters, module.parameters(), strict=True))
    for (name, found), expected in zip(module.named_parameters(), untouched.parameters(), strict=True):
        assert torch.equal(found, expected), name
        assert torch.equal(found.grad, expected.grad), name
    assert not any(each._forward_pre_hooks for each in module.modules())


def spread_on_meta(module, first_bytes):
    device_map = plan(module, {"cpu": first_bytes, "meta": None})
    spread(module, device_map)
    return device_map


def test_weights_buffers_and_gradients_lie_where_they_are_planned_and_stay_what_they_are():
    module = make(is_tied=True)
    module.body.norm.register_buffer("count", torch.zeros(2, dtype=torch.int64))
    for parameter in module.parameters():
        parameter.grad = torch.ones_like(parameter)
    before = dict(module.named_parameters())
    device_map = spread_on_meta(module, 300)
    assert set(device_map.devices.values()) == {"cpu", "meta"}
    assert module.head.weight is module.embed.weight
    for name, parameter in module.named_parameters():
        assert parameter is before[name]
        assert isinstance(parameter, nn.Parameter)
        unit = max((unit for unit in device_map.devices if f"{name}.".startswith(unit and unit + ".")), key=len)
        assert parameter.device.type == parameter.grad.device.type == device_map.devices[unit], name
    assert module.body.norm.count.device.type == device_map.devices["body.norm"] == "meta"
    assert module.shift.device.type == "cpu"


def test_inputs_follow_the_units_and_the_output_stays_where_the_last_one_put_it():
    module = make()
    device_map = spread_on_meta(module, 300)
    tensor = torch.ones(2)
    extra = {"a": [tensor, (tensor, 3)], "pair": Pair(tensor, "note"), "kept": {"x": None}}
    assert module(torch.ones(3, WIDTH), extra=extra).device.type == device_map.devices["head"] == "meta"
    devices = [device_map.devices[f"body.layers.{index}"] for index in range(4)]
    assert devices == ["cpu", "cpu", "meta", "meta"]
    for device, layer in zip(devices, module.body.layers, strict=True):
        ((of_x, seen),) = layer.seen
        assert of_x == device
        assert [t.device.type for t in (seen["a"][0], seen["a"][1][0], seen["pair"].x)] == [device] * 3
        assert (seen["a"][1][1], seen["pair"].note) == (3, "note")
        assert seen["kept"] is extra["kept"]
        assert (seen is extra) is (device == "cpu")  # what is there already is passed as it is
    assert extra["a"][0] is tensor


def test_a_device_that_fails_leaves_all_as_it_was(monkeypatch):
    module = make()
    untouched = copy.deepcopy(module)
    device_map = plan(module, {"cpu": None})
    calls = []

    def fail(*args, **kwargs):
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("full")
        return original(*args, **kwargs)

    original = nn.Module.register_forward_pre_hook
    monkeypatch.setattr(nn.Module, "register_forward_pre_hook", fail)
    with pytest.raises(torch.OutOfMemoryError, match="full"):
        spread(module, device_map)
    assert not any(each._forward_pre_hooks for each in module.modules())
    assert all(torch.equal(a, b) for a, b in zip(module.parameters(), untouched.parameters(), strict=True))


def test_a_plan_of_another_module_is_refused():
    with pytest.raises(ValueError, match=r"another module: body\.layers\.4 only in one of the two"):
        spread(make(), plan(make(num_blocks=5), {"cpu": None}))
