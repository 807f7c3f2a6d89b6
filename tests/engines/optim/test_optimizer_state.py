"""The state of an optimizer is loaded by parameter names after the model or the groups were reordered."""

import copy

import pytest
import torch
from ranks import run_ranks
from torch import nn

from runner.engines import Engine, Engines
from runner.engines.fsdp import FSDP
from runner.engines.optim.optimizer_state import match_state, names_by_id
from runner.engines.optim.optimizers import TorchaoAdamW8bit, muon
from runner.engines.optim.schedulers import warmup_cosine
from runner.engines.restore import check_group_values, group_values
from runner.engines.strategies import DDP, Strategy
from runner.utils import distributed, io

ORDERS = ["a b head", "b a head", "head a b"]


class Net(nn.Module):
    """A model whose layers are registered in another order than they are called."""

    def __init__(self, order="a b head", tied=False):
        super().__init__()
        torch.manual_seed(0)
        layers = {"a": nn.Linear(4, 4), "b": nn.Linear(4, 4), "head": nn.Linear(4, 1)}
        if tied:
            layers["b"].weight = layers["a"].weight
        for name in order.split():
            self.add_module(name, layers[name])

    def forward(self, x):
        return self.head(torch.tanh(self.b(torch.tanh(self.a(x))))).square().mean()


def one_group(named):
    return torch.optim.AdamW(named, lr=0.1)


def without_names(named):
    return torch.optim.AdamW([parameter for _, parameter in named], lr=0.1)


def two_groups(named, is_reversed=False):
    matrices, vectors = [p for _, p in named if p.ndim == 2], [p for _, p in named if p.ndim == 1]
    groups = [{"params": matrices, "lr": 0.2, "weight_decay": 0.3}, {"params": vectors}, {"params": [], "lr": 0.7}]
    return torch.optim.AdamW(groups[::-1] if is_reversed else groups, lr=0.1)


def reversed_groups(named):
    return two_groups(named, is_reversed=True)


def joined(named):
    return muon(named, lr=0.02, adamw_only=["head.*"])


def momenta(named):
    return torch.optim.SGD(named, lr=0.1, momentum=0.9)


def packed(named):
    return TorchaoAdamW8bit(named, lr=0.1)


def make(order, make_optimizer, make_layout=Strategy, steps=20, **settings):
    module = Net(order, **settings)
    strategy = make_layout()
    strategy.shard(module)
    optimizer = make_optimizer(list(module.named_parameters()))
    schedule = warmup_cosine(optimizer, warmup_steps=2, total_steps=steps)
    return Engines(model=Engine(module, optimizer, schedule, clip_norm=100.0, strategy=strategy))


def train(engines, steps):
    for step in steps:
        x = torch.randn(8, 4, generator=torch.Generator().manual_seed(step))
        engines.micro_step({"x": x})
        engines.step()


def assert_same(engines, others):
    one, other = engines.export_states()["model"], others.export_states()["model"]
    assert one.keys() == other.keys()
    for name, value in one.items():
        assert torch.equal(value, other[name]), name


CHANGES = {
    "one group": (one_group, one_group),
    "momentum": (momenta, momenta),
    "two groups": (two_groups, two_groups),
    "reversed groups": (two_groups, reversed_groups),
    "without names": (one_group, without_names),
    "two optimizers": (joined, joined),
    "moments in 8 bits": (packed, packed),
}


def test_a_state_with_the_name_that_the_class_had_before_it_was_renamed_is_loaded(tmp_path):
    whole, resumed = make("a b head", joined), make("a b head", joined)
    train(whole, range(3))
    state = whole.state_dict()
    kinds = state["model.optimizer"]["configured"]["kinds"]
    assert kinds["optimizer"] == "ChainedOptimizer"
    kinds["optimizer"] = "Joined"  # as runs wrote it before
    io.save(state, tmp_path / "state.safetensors")
    assert resumed.load_state_dict(io.load(tmp_path / "state.safetensors")) == []
    for engines in (whole, resumed):
        train(engines, range(3, 6))
    assert_same(whole, resumed)
    with pytest.raises(ValueError, match="this engine has AdamW, the saved state Joined"):
        make("a b head", one_group).load_state_dict(state)


@pytest.mark.parametrize("change", CHANGES)
@pytest.mark.parametrize("order", ORDERS)
def test_moments_and_settings_follow_their_parameters(order, change, tmp_path):
    before, after = CHANGES[change]
    whole, moved = make("a b head", before), make(order, after)
    train(whole, range(3))
    io.save(whole.state_dict(), tmp_path / "state.safetensors")
    moved.load_state_dict(io.load(tmp_path / "state.safetensors"))
    engine = moved["model"]
    engine.set_lr(engine.optimizer.param_groups[0]["initial_lr"])  # a live rate, in the order of these groups
    again = make(order, after)
    again.load_state_dict(copy.deepcopy(moved.state_dict()))
    for engines in (whole, again):
        train(engines, range(3, 6))
    assert_same(whole, again)


@pytest.mark.parametrize("change", ["one group", "reversed groups"])
def test_a_longer_schedule_takes_effect_though_the_groups_were_reordered(change):
    before, after = CHANGES[change]
    saved, whole, longer = make("a b head", before, steps=4), make("a b head", before), make("b a head", after)
    train(saved, range(2))
    train(whole, range(2))
    longer.load_state_dict(saved.state_dict())
    for engines in (whole, longer):
        train(engines, range(2, 5))
    assert_same(whole, longer)


def forget_names(state):
    for group in state["model.optimizer"]["optimizer"]["param_groups"]:
        group.pop("param_names")
    return state


def test_an_older_state_without_names_is_taken_in_the_same_order_and_refused_in_another():
    whole, same, moved = make("a b head", without_names), make("a b head", without_names), make("b a head", one_group)
    train(whole, range(3))
    state = forget_names(copy.deepcopy(whole.state_dict()))
    same.load_state_dict(copy.deepcopy(state))
    for engines in (whole, same):
        train(engines, range(3, 5))
    assert_same(whole, same)
    with pytest.raises(ValueError, match=r"names no parameters.*expected b.weight, b.bias, a.weight.*found a.weight"):
        moved.load_state_dict(state)


def test_a_tied_weight_is_found_under_each_of_its_names():
    whole, moved = make("a b head", one_group, tied=True), make("b a head", one_group, tied=True)
    train(whole, range(3))
    moved.load_state_dict(copy.deepcopy(whole.state_dict()))
    for engines in (whole, moved):
        train(engines, range(3, 5))
    assert_same(whole, moved)


def test_parameters_that_came_or_went_are_named_and_begin_anew_where_that_is_allowed():
    def only(*names):
        return lambda named: torch.optim.AdamW([(n, p) for n, p in named if n in names], lr=0.1)

    saved, other = make("a b head", only("a.weight", "b.weight")), make("a b head", only("b.weight", "head.weight"))
    train(saved, range(2))
    state = saved.state_dict()
    with pytest.raises(ValueError, match=r"expected the state of head.weight, found that of a.weight.*allow changes"):
        other.load_state_dict(copy.deepcopy(state))
    (note,) = other.load_state_dict(copy.deepcopy(state), allows_changes=True)
    assert note == "model.optimizer: expected the state of head.weight, found that of a.weight: they begin anew"
    kept, weights = other["model"].optimizer.state, dict(other["model"].module.named_parameters())
    assert list(kept) == [weights["b.weight"]]
    train(other, range(2, 4))
    assert [kept[weights[name]]["step"] for name in ("b.weight", "head.weight")] == [4, 2]


def test_a_parameter_that_moved_to_another_group_is_refused_with_both_groupings():
    def grouped(names):
        def build(named):
            one, other = [p for n, p in named if n in names], [p for n, p in named if n not in names]
            return torch.optim.SGD([{"params": one}, {"params": other}], lr=0.1)

        return build

    saved = make("a b head", grouped(["a.weight", "b.weight"]))
    with pytest.raises(ValueError, match=r"grouped anew: expected a.weight \| .*; found a.weight, b.weight \| "):
        make("a b head", grouped(["a.weight"])).load_state_dict(saved.state_dict())


def test_weights_that_do_not_fit_are_named_with_their_shapes_and_the_remedy():
    saved, other = make("a b head", one_group), make("a b", one_group)
    state = saved.state_dict()
    expected = (
        r"its saved weights do not fit: expected no others, found head.weight\[1, 4\], head.bias\[1\]; resume with"
    )
    with pytest.raises(ValueError, match=expected):
        other.load_state_dict(state)


def _move(make_layout, make_optimizer, order):
    whole, moved = make("a b head", make_optimizer, make_layout), make(order, make_optimizer, make_layout)
    train(whole, range(3))
    strategy = whole["model"].strategy
    moved.load_state_dict(copy.deepcopy(strategy.to_full(whole.state_dict())))
    for engines in (whole, moved):
        train(engines, range(3, 5))
    assert_same(whole, moved)
    return distributed.rank()


@pytest.mark.parametrize("make_optimizer", [one_group, two_groups, joined])
@pytest.mark.parametrize("strategy", [DDP, FSDP])
def test_moments_follow_their_parameters_on_ranks(strategy, make_optimizer):
    assert run_ranks(2, _move, strategy, make_optimizer, "b a head") == [0, 1]


class Counting(torch.optim.SGD):
    """An optimizer with a number and a generator as attributes, as some published optimizers have."""

    def __init__(self, params, lr, floor=0.0):
        super().__init__(params, lr=lr)
        self.count, self.floor, self.generator = 0, floor, torch.Generator().manual_seed(3)

    def step(self, closure=None):
        self.count += 1
        for group in self.param_groups:
            for parameter in group["params"]:
                noise = torch.rand(parameter.shape, generator=self.generator)
                parameter.data.sub_(noise * parameter.grad, alpha=group["lr"] / self.count + self.floor)


def test_numbers_and_generators_beside_the_state_go_on_and_settings_are_those_of_the_config():
    def counting(floor=0.0):
        return lambda named: Counting([parameter for _, parameter in named], 0.1, floor)

    whole, cut, other = make("a b head", counting()), make("a b head", counting()), make("a b head", counting(0.5))
    train(whole, range(3))
    for engines in (cut, other):
        engines.load_state_dict(copy.deepcopy(whole.state_dict()))
    assert (other["model"].optimizer.count, other["model"].optimizer.floor) == (3, 0.5)
    for engines in (whole, cut):
        train(engines, range(3, 6))
    assert_same(whole, cut)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("eps", "x"), ("eps", 1e300), ("betas", (0.9,)), ("betas", (0.9, None)), ("weight_decay", torch.zeros(2)),
        ("weight_decay", torch.zeros(())), ("lr", None), ("foreach", "yes"), ("maximize", {}), ("amsgrad", True),
    ],
)  # fmt: skip
def test_a_value_of_another_kind_than_the_group_was_built_with_is_told(key, value):
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))])
    built = group_values(optimizer)
    check_group_values(optimizer, built)
    optimizer.param_groups[0][key] = value
    with pytest.raises(TypeError, match=f"group 0: {key}: expected .*, found "):
        check_group_values(optimizer, built)


def test_values_that_a_schedule_or_compiling_changes_are_taken():
    optimizer = torch.optim.AdamW([nn.Parameter(torch.zeros(2))], weight_decay=0)
    built = group_values(optimizer)
    optimizer.param_groups[0] |= {"lr": torch.tensor(1.0), "betas": [0.5, 0.5], "weight_decay": 0.1, "added": "text"}
    optimizer.param_groups[0]["capturable"] = True  # on an accelerator; here it would fail
    check_group_values(optimizer, built)
    assert optimizer.param_groups[0]["capturable"] is False


@pytest.mark.parametrize("has_hook", [False, True])
def test_a_hook_before_loading_finds_the_parameters_of_a_group_in_a_list(has_hook):
    module = Net()
    optimizer = one_group([*module.named_parameters()])
    module(torch.ones(1, 4)).backward()
    optimizer.step()
    found = []
    if has_hook:
        optimizer.register_load_state_dict_pre_hook(lambda optimizer, state: found.append(state["param_groups"]))
    matched = match_state(optimizer.state_dict(), optimizer, names_by_id(module), ())
    optimizer.load_state_dict(matched.state)
    assert [group["params"] for groups in found for group in groups] == ([[*range(6)]] if has_hook else [])
