"""Engines on real gloo ranks against one engine over the whole batch: DDP and FSDP2."""

import copy

import pytest
import torch
import torch.distributed as dist
from ranks import run_ranks
from torch import nn

from runner.engines import Engine, Engines
from runner.engines.fsdp import FSDP
from runner.engines.strategies import DDP, Strategy
from runner.utils import distributed
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.modules.selection import find_blocks
from runner.utils.wrapper import freeze


class Net(nn.Module):
    def __init__(self, scale=1.0, is_tied=False):
        super().__init__()
        self.first = nn.Linear(5, 8)
        self.layers = nn.ModuleList([nn.Linear(8, 8) for _ in range(3)])
        self.last = nn.Linear(8, 8 if is_tied else 1)
        if is_tied:
            self.last.weight = self.layers[0].weight
        self.scale = scale

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return self.scale * self.last(x).square().mean()


class WithUnused(Net):
    def forward(self, x):
        return self.last(self.layers[0](self.first(x))).square().mean()


STEPS, SIZE = 5, 12


def batches(accumulate):
    generator = torch.Generator().manual_seed(4)
    return [torch.randn(SIZE, 5, generator=generator) for _ in range(STEPS * accumulate)]


def train(make_layout, settings):
    """Trains two engines, one with a frozen layer; returns results that are the same on every rank."""
    torch.set_num_threads(1)
    accumulate, rank, count = settings.get("accumulate", 1), distributed.rank(), distributed.world_size()
    coordinator, engines, exchanges = Coordinator(), Engines(), []
    for number, name in enumerate(("one", "two")):
        torch.manual_seed(number)
        module = settings.get("kind", Net)(scale=1.0 + 30 * number)
        if number:
            freeze(module, ["layers.1.*"])
        strategy = make_layout() if count > 1 else Strategy()
        strategy.attach_coordinator(coordinator, name, number == 1)
        strategy.shard(module)
        optimizer = torch.optim.AdamW([p for p in module.parameters() if p.requires_grad], lr=0.01)
        own = {"clip_norm": 0.5, "on_nonfinite": "stop", "accumulate": accumulate}
        own |= {key: value for key, value in settings.items() if key != "kind"}
        engines[name] = Engine(module, optimizer, strategy=strategy, **own)
    found = []
    for step in range(STEPS):
        for batch in batches(accumulate)[step * accumulate : (step + 1) * accumulate]:
            part = batch.chunk(count)[rank]
            engines.micro_step({"x": part})
        assert engines.step(coordinator.poll) == {}
        found.append(engines.take_metrics())
    state = engines.export_states()
    whole = {name: layout_whole(engine) for name, engine in engines.items()}
    return found, state, whole, exchanges


def layout_whole(engine):
    return engine.strategy.to_full(engine.optimizer.state_dict()["state"])


CASES = {
    "plain": {},
    "accumulated": {"accumulate": 3},
    "unclipped": {"clip_norm": 0.0},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},  # its first steps overflow, and are skipped on all ranks
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("count", [2, 3])
@pytest.mark.parametrize("strategy", [DDP, FSDP])
def test_metrics_norms_and_weights_are_those_of_one_process(case, count, strategy):
    expected, weights, optimizers, _ = train(Strategy, CASES[case])
    tolerance = {"rtol": 0.02, "atol": 0.02} if "precision" in CASES[case] else {"rtol": 1e-5, "atol": 1e-5}
    for found, state, whole, _ in run_ranks(count, train, strategy, CASES[case]):
        for one, other in zip(expected, found, strict=True):
            assert one.keys() == other.keys()
            for key in one:
                torch.testing.assert_close(other[key], one[key], equal_nan=True, **tolerance)
        for name in weights:
            for key, value in weights[name].items():
                torch.testing.assert_close(state[name][key], value, **tolerance)
            for index, each in optimizers[name].items():
                torch.testing.assert_close(whole[name][index]["exp_avg"], each["exp_avg"], **tolerance)


def test_a_parameter_that_no_forward_uses_is_found_where_that_is_asked_for():
    _, weights, _, _ = train(Strategy, {"kind": WithUnused})
    (_, state, _, _), _ = run_ranks(2, train, lambda: DDP(find_unused_parameters=True), {"kind": WithUnused})
    for key, value in weights["one"].items():
        torch.testing.assert_close(state["one"][key], value, rtol=1e-5, atol=1e-5)


def _count_collectives(accumulate):
    calls = []
    coordinator = Coordinator()
    strategy = DDP()
    strategy.attach_coordinator(coordinator, "model", True)
    module = Net()
    settings = {"accumulate": accumulate, "clip_norm": 1.0, "on_nonfinite": "stop", "strategy": strategy}
    engine = Engine(module, torch.optim.SGD(module.parameters(), 0.1), **settings)
    engines = Engines(model=engine)
    for _ in range(3):  # the first builds buckets
        for _ in range(accumulate):
            engines.micro_step({"x": torch.ones(4, 5)})
        engines.step(coordinator.poll)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        for _ in range(accumulate):
            engines.micro_step({"x": torch.ones(4, 5)})
        engines.step(coordinator.poll)
    calls = [event.name for event in profile.events() if event.name.startswith("gloo:")]
    return calls


def test_an_undisturbed_step_makes_the_gradient_exchange_and_no_other_collective():
    assert run_ranks(2, _count_collectives, 1) == [["gloo:all_reduce"]] * 2
    assert run_ranks(2, _count_collectives, 4) == [["gloo:all_reduce"]] * 2


def _make_up():
    coordinator, strategy, module = Coordinator(), DDP(), nn.Sequential(nn.Linear(3, 3), nn.BatchNorm1d(3))
    strategy.attach_coordinator(coordinator, "model", True)
    engine = Engine(module, torch.optim.SGD(module.parameters(), 0.1), feeder=feed, strategy=strategy)
    engines = Engines(model=engine)
    heard = []
    for step in range(4):
        before = copy.deepcopy(module.state_dict())
        if step == 2 and distributed.rank() == 1:
            coordinator.post("error", "mine")
            engines.shadow_step()
            heard.append(coordinator.poll())
            engines.discard()
        else:
            engines.micro_step(torch.ones(4, 3) * (step + 1))
            engine.prepare()
            heard.append(coordinator.poll())
            if heard[-1]:
                engines.discard()
            else:
                engine.update()
        if step == 2:
            assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())
    weights = [each.tolist() for each in module.parameters()]
    return [[tuple(word) for word in words] for words in heard], weights


def feed(module, batch):
    return module(batch).square().mean()


def test_a_rank_that_can_not_make_a_step_releases_the_others_and_training_goes_on():
    one, other = run_ranks(2, _make_up)
    assert one == other
    assert one[0] == [[], [], [(1, "error", "mine")], []]


def _tie():
    FSDP().shard(Net(is_tied=True))


def test_a_weight_shared_between_blocks_is_refused_by_name():
    with pytest.raises(AssertionError, match=r"layers.0.weight and last.weight are one weight, in two blocks"):
        run_ranks(2, _tie)


def _renormalize(make_layout):
    make_layout().shard(nn.ModuleDict({"tokens": nn.Embedding(4, 8, max_norm=1.0)}))


@pytest.mark.parametrize("make_layout", [DDP, FSDP])
def test_an_embedding_that_each_rank_would_renormalize_for_itself_is_refused_by_name(make_layout):
    with pytest.raises(AssertionError, match=r"tokens: max_norm=1.0 shortens the rows of a rank's own samples alone"):
        run_ranks(2, _renormalize, make_layout)


def test_settings_that_are_not_there_are_refused():
    with pytest.raises(ValueError, match=r"param_dtype='fp8': expected one of fp32, bf16, fp16"):
        FSDP(param_dtype="fp8")
    with pytest.raises(ValueError, match=r"blocks.layers.\*.dtype: no such key; there are: param_dtype"):
        FSDP(blocks={"layers.*": {"dtype": "fp32"}})


def test_blocks_are_the_children_of_outermost_lists_or_what_globs_name_segment_by_segment():
    module = nn.Module()
    module.encoder = nn.ModuleList([nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1)) for _ in range(11)])
    module.decoder = nn.Sequential(nn.Linear(1, 1), nn.Linear(1, 1))
    module.head = nn.Sequential(nn.Linear(1, 1), nn.Tanh())
    (found,) = find_blocks(module).values()
    assert list(found) == [*(f"encoder.{i}" for i in range(11)), "decoder.0", "decoder.1"]
    assert list(find_blocks(module, ["encoder.1"])["encoder.1"]) == ["encoder.1"]
    by_glob = find_blocks(module, ["encoder.1?", "encoder.*", "encoder.*.0"])
    assert list(by_glob["encoder.1?"]) == ["encoder.10"]
    assert "encoder.10" not in by_glob["encoder.*"]
    assert by_glob["encoder.*.0"] == {}
    with pytest.raises(ValueError, match=r"'layers.\*' matches no module; blocks are: encoder.0"):
        find_blocks(module, ["layers.*"])


def _say_without_samples():
    coordinator, strategy, module = Coordinator(), DDP(), Net()
    strategy.attach_coordinator(coordinator, "model", True)
    engine = Engine(module, torch.optim.SGD(module.parameters(), 0.1), strategy=strategy)
    is_empty = distributed.rank() == 1
    if is_empty:
        coordinator.post("stop", "mine")
    engine.micro_step({"x": torch.ones(2, 5)}, 0.0 if is_empty else 2.0)
    engine.prepare()
    return [tuple(word) for word in coordinator.poll()]


def test_a_rank_whose_sample_counts_for_nothing_is_heard_all_the_same():
    assert run_ranks(2, _say_without_samples) == [[(1, "stop", "mine")]] * 2


def _be_alone():
    module, strategy = Net(), DDP()
    strategy.shard(module)
    engine = Engine(module, torch.optim.SGD(module.parameters(), 0.1), strategy=strategy)
    engine.micro_step({"x": torch.ones(2, 5)})
    engine.step()
    return dist.is_initialized(), list(module.state_dict())


def test_one_process_is_not_wrapped():
    assert run_ranks(1, _be_alone) == [(False, list(Net().state_dict()))]


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 3, (torch.float32, torch.float64, torch.float32), ()])
@pytest.mark.parametrize("max_norm", [0.5, 1e6])
@pytest.mark.parametrize("value", [1.0, float("nan"), float("inf")])
def test_gradients_are_clipped_to_the_same_bits_as_by_torch(dtypes, max_norm, value):
    torch.manual_seed(0)
    parameters = [nn.Parameter(torch.zeros(5, 3, dtype=dtype)) for dtype in dtypes]
    gradients = [torch.randn(5, 3, dtype=dtype) * value for dtype in dtypes]
    found = []
    for clip in (lambda: nn.utils.clip_grad_norm_(parameters, max_norm), lambda: _clip(parameters, max_norm)):
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        found.append([clip(), *(parameter.grad for parameter in parameters)])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0, equal_nan=True)


def _clip(parameters, max_norm):
    strategy = Strategy()
    norm = strategy.norm(parameters)
    strategy.clip(parameters, max_norm, norm)
    return norm
