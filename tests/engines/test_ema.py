"""`runner.engines.ema` against torch's AveragedModel, alone and on sharded weights."""

import copy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from runner.engines.ema import EMA
from runner.engines.fsdp import FSDP
from runner.engines.strategies import Strategy
from runner.utils import distributed


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = nn.Linear(3, 5)
        self.layers = nn.ModuleList([nn.Linear(5, 5) for _ in range(2)])
        self.last = nn.Linear(5, 1)

    def forward(self, x):
        x = self.first(x)
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.last(x).square().mean()


def make(dtype=torch.float32):
    torch.manual_seed(0)
    module = Net().to(dtype)
    module.layers[0].weight.requires_grad_(False)
    return module, torch.optim.SGD(module.parameters(), lr=0.1)


def train(module, optimizer, steps, averages=None, seed=1):
    generator = torch.Generator().manual_seed(seed)
    dtype = next(module.parameters()).dtype
    for _ in range(steps):
        optimizer.zero_grad()
        module(torch.randn(4, 3, generator=generator).to(dtype)).backward()
        optimizer.step()
        if averages is not None:
            averages.update()


def weights_of(module):
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def assert_same(one, other):
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, other[name]), name


def test_averages_are_those_of_torch_bit_for_bit():
    module, optimizer = make()
    averages = EMA(module, 0.9)
    reference = AveragedModel(module, multi_avg_fn=get_ema_multi_avg_fn(0.9))
    for step in range(20):
        train(module, optimizer, 1, averages, seed=step)
        reference.update_parameters(module)
    expected = {name: p for name, p in reference.module.named_parameters() if name != "layers.0.weight"}
    assert_same(averages.state_dict()["weights"], expected)
    assert averages.num_updates == 20


def test_a_frozen_parameter_has_no_average_and_is_left_alone():
    module, optimizer = make()
    averages = EMA(module, 0.5)
    frozen = module.layers[0].weight.clone()
    train(module, optimizer, 3, averages)
    assert "layers.0.weight" not in averages.state_dict()["weights"]
    averages.swap()
    assert torch.equal(module.layers[0].weight, frozen)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_swapping_twice_changes_no_bit_and_no_storage(dtype):
    module, optimizer = make(dtype)
    averages = EMA(module, 0.9)
    train(module, optimizer, 5, averages)
    before, places = weights_of(module), [p.data_ptr() for p in module.parameters()]
    kept = {name: tensor.clone() for name, tensor in averages.state_dict()["weights"].items()}
    averages.swap()
    assert averages.is_swapped
    assert_same(averages.state_dict()["weights"], kept)
    shown = weights_of(module)
    assert_same({name: shown[name] for name in kept}, {name: tensor.to(dtype) for name, tensor in kept.items()})
    assert not torch.equal(shown["last.weight"], before["last.weight"])
    averages.swap()
    assert not averages.is_swapped
    assert_same(weights_of(module), before)
    assert_same(averages.state_dict()["weights"], kept)
    assert [p.data_ptr() for p in module.parameters()] == places


def test_before_the_first_update_a_swap_changes_nothing():
    module, optimizer = make()
    averages = EMA(module, 0.9)
    train(module, optimizer, 2)
    before = weights_of(module)
    for is_swapped in (True, False):
        averages.swap()
        assert averages.is_swapped is is_swapped
        assert_same(weights_of(module), before)


@settings(max_examples=10, deadline=None)
@given(split=st.integers(0, 6), warmup=st.booleans(), swaps=st.booleans())
def test_a_state_taken_back_at_any_step_continues_bit_for_bit(split, warmup, swaps):
    module, optimizer = make()
    averages = EMA(module, 0.8, warmup=warmup)
    train(module, optimizer, split, averages)
    if swaps:
        averages.swap()
    state = copy.deepcopy(averages.state_dict())
    if swaps:
        averages.swap()
    resumed = EMA(module, 0.8, warmup=warmup)
    resumed.load_state_dict(state)
    for step in range(3):
        train(module, optimizer, 1, averages, seed=step)
        resumed.update()
    assert resumed.num_updates == averages.num_updates
    assert_same(resumed.state_dict()["weights"], averages.state_dict()["weights"])


@pytest.mark.parametrize("decay", [0.0, 0.3, 0.999])
def test_warmup_raises_the_decay_to_its_value(decay):
    module = nn.Linear(1, 1, bias=False).double()
    averages = EMA(module, decay, warmup=True)
    expected = None
    for n in range(6):
        with torch.no_grad():
            module.weight.fill_(n**2)
        averages.update()
        own = min(decay, (1 + n) / (10 + n))
        expected = float(n**2) if expected is None else own * expected + (1 - own) * n**2
    assert averages.state_dict()["weights"]["weight"].item() == pytest.approx(expected, rel=1e-12)


def test_averages_of_bf16_move_by_steps_that_bf16_would_round_away():
    module = nn.Linear(1, 1, bias=False).bfloat16()
    averages = EMA(module, 0.999)
    for value in (1.0, *[2.0] * 100):
        with torch.no_grad():
            module.weight.fill_(value)
        averages.update()
    average = averages.state_dict()["weights"]["weight"]
    assert average.dtype == torch.float32
    assert average.item() == pytest.approx(2 - 0.999**100, rel=1e-5)


def test_while_swapped_neither_an_update_nor_a_state_is_taken():
    module, optimizer = make()
    averages = EMA(module, 0.9)
    train(module, optimizer, 1, averages)
    averages.swap()
    with pytest.raises(RuntimeError, match=r"update: .* call swap\(\) first"):
        averages.update()
    with pytest.raises(RuntimeError, match=r"load_state_dict: .* call swap\(\) first"):
        averages.load_state_dict(averages.state_dict())


@pytest.mark.parametrize("decay", [-0.1, 1.0, float("nan")])
def test_a_decay_out_of_range_is_an_error(decay):
    with pytest.raises(ValueError, match="expected at least 0 and less than 1"):
        EMA(nn.Linear(1, 1), decay)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bias": None}, "missing bias; unexpected none"),
        ({"scale": torch.zeros(1)}, "missing none; unexpected scale"),
        ({"bias": torch.zeros(1)}, r"bias is \[1\], expected \[2\]"),
    ],
)
def test_a_state_of_other_weights_is_refused_whole(change, message):
    averages = EMA(nn.Linear(2, 2), 0.9)
    before = {name: tensor.clone() for name, tensor in averages.state_dict()["weights"].items()}
    weights = {"weight": torch.zeros(2, 2), "bias": torch.zeros(2)} | change
    weights = {name: tensor for name, tensor in weights.items() if tensor is not None}
    with pytest.raises(ValueError, match=message):
        averages.load_state_dict({"num_updates": 3, "weights": weights})
    assert averages.num_updates == 0
    assert_same(averages.state_dict()["weights"], before)


def average_on_ranks():
    """Trains alone or sharded; returns the averages whole, and losses before, while and after they are swapped in."""
    torch.manual_seed(0)
    module, strategy = Net(), FSDP() if distributed.is_distributed() else Strategy()
    strategy.shard(module)
    averages = EMA(module, 0.5)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    generator = torch.Generator().manual_seed(3)
    batch = torch.randn(4, 3, generator=generator)

    def evaluate():
        with torch.no_grad():
            return module(batch).item()

    for _ in range(3):
        module(batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        averages.update()
    losses = [evaluate()]
    for _ in range(2):
        averages.swap()
        losses.append(evaluate())
    state = averages.state_dict()
    whole = {name: tensor.clone() for name, tensor in strategy.to_full(state["weights"]).items()}
    averages.load_state_dict({**state, "weights": strategy.to_local(whole, module)})
    return whole, strategy.to_full(averages.state_dict()["weights"]), losses


def test_averages_of_sharded_weights_are_those_of_whole_ones():
    expected, _, losses = average_on_ranks()
    assert losses[0] == losses[2] != losses[1]
    for found, loaded, own_losses in run_ranks(2, average_on_ranks):
        assert_same(loaded, found)
        assert own_losses[0] == own_losses[2]
        torch.testing.assert_close(found, expected)
        assert own_losses == pytest.approx(losses, rel=1e-5)
