"""Parameters are assigned to groups by name and depth, and a mistake in the settings names its key."""

import fnmatch
import re

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn

from runner.engines import Engine, Engines
from runner.engines.fsdp import FSDP
from runner.engines.optim.optimizers import muon
from runner.engines.optim.parameter_groups import check_groups, describe_groups, group_parameters, scale_rates
from runner.engines.optim.schedulers import warmup
from runner.engines.strategies import DDP, Strategy
from runner.utils import distributed
from runner.utils.distributed.coordinator import Coordinator


class Net(nn.Module):
    """Embeddings, three blocks and a head, registered in this order."""

    def __init__(self, num_blocks=3):
        super().__init__()
        torch.manual_seed(0)
        self.embed = nn.Linear(5, 6)
        self.blocks = nn.ModuleList([nn.Sequential(nn.Linear(6, 6), nn.LayerNorm(6)) for _ in range(num_blocks)])
        self.norm, self.head = nn.LayerNorm(6), nn.Linear(6, 2)

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = x + torch.tanh(block(x))
        return self.head(self.norm(x)).square().mean()


NAMES = [name for name, _ in Net().named_parameters()]
GLOBS = ["*", "*.bias", "*.weight", "blocks.*", "blocks.1.*", "head.*", "embed.weight", "*.1.*"]
ENTRIES = st.fixed_dictionaries(
    {"match": st.lists(st.sampled_from(GLOBS), min_size=1, max_size=2)},
    optional={
        "weight_decay": st.sampled_from([0, 0.5]),
        "lr_scale": st.sampled_from([0, 0.1, 1, 3]),
        "eps": st.just(1),
    },
).filter(lambda entry: len(entry) > 1)


@settings(max_examples=60, deadline=None)
@given(entries=st.lists(ENTRIES, max_size=4), rate=st.sampled_from([None, 0.5, 1.0]))
def test_each_trained_parameter_is_in_one_group_with_the_settings_of_the_last_entry(entries, rate):
    module = Net()
    module.blocks[0].requires_grad_(False)
    trained = [name for name, parameter in module.named_parameters() if parameter.requires_grad]
    layer_decay = None if rate is None else {"rate": rate, "layers": "blocks.*"}
    groups = group_parameters(module, entries, layer_decay)
    assert sorted(name for group in groups for name, _ in group.named) == sorted(trained)
    parameters = dict(module.named_parameters())
    for group in groups:
        for name, parameter in group.named:
            assert parameter is parameters[name]
            expected = {}
            for entry in entries:
                if any(fnmatch.fnmatch(name, glob) for glob in entry["match"]):
                    expected |= {key: value for key, value in entry.items() if key != "match"}
            depth = 4 if name.startswith("embed") else 3 - int(name[7]) if name.startswith("blocks") else 0
            assert group.lr_scale == expected.pop("lr_scale", 1.0) * (1.0 if rate is None else rate**depth)
            assert group.settings == expected
    assert [group.has_base_lr for group in groups] == sorted((group.has_base_lr for group in groups), reverse=True)


def test_rates_fall_from_the_head_to_the_embeddings_as_in_beit():
    num_layers = 5  # three blocks, embeddings and head
    groups = group_parameters(Net(), [{"match": "*.bias", "weight_decay": 0}], {"rate": 0.75, "layers": "blocks.*"})
    scales = {name: group.lr_scale for group in groups for name, _ in group.named}
    assert scales["head.weight"] == scales["head.bias"] == scales["norm.weight"] == 1
    assert scales["embed.weight"] == 0.75 ** (num_layers - 1)
    for number in range(3):
        assert scales[f"blocks.{number}.0.weight"] == 0.75 ** (num_layers - 1 - (number + 1))
    assert len(groups) == 2 * num_layers
    assert [group.lr_scale for group in groups[:2]] == [1, 1]


def scales_of(module, glob):
    groups = group_parameters(module, [], {"rate": 0.5, "layers": glob})
    return {name: group.lr_scale for group in groups for name, _ in group.named}


def test_layers_of_a_tied_language_model_and_of_nested_stages_are_found():
    tied = Net()
    tied.head = nn.Linear(5, 6)
    tied.head.weight = tied.embed.weight = nn.Parameter(torch.zeros(6, 5))
    scales = scales_of(tied, "blocks.*")
    assert scales["embed.weight"] == 0.5**4
    assert "head.weight" not in scales
    layers = {"stem": nn.Linear(1, 1), "stages": nn.ModuleList([Net(2), Net(1)]), "head": nn.Linear(1, 1)}
    scales = scales_of(nn.ModuleDict(layers), "stages.*.blocks.*")
    blocks = [scales[f"stages.{name}.0.weight"] for name in ("0.blocks.0", "0.blocks.1", "1.blocks.0")]
    assert blocks == [1 / 8, 1 / 4, 1 / 2]
    assert scales["stages.0.head.weight"] == scales["stages.1.embed.weight"] == 1 / 4  # between two layers
    assert scales["stem.weight"] == 1 / 16
    assert scales["head.weight"] == 1


def test_an_alias_of_a_tied_parameter_matches_it():
    module = nn.ModuleDict({"a": nn.Linear(2, 2), "b": nn.Linear(2, 2)})
    module["b"].weight = module["a"].weight
    groups = group_parameters(module, [{"match": "b.weight", "lr": 5.0}], None)
    assert [[name for name, _ in group.named] for group in groups] == [["a.bias", "b.bias"], ["a.weight"]]


MISTAKES = {
    "groups={'match': '*'}: expected a list of mappings": ({"match": "*"}, None),
    "groups.0={'match': '*'}: expected match, and settings": ([{"match": "*"}], None),
    "groups.0.match=3: expected a glob over parameter names, or a list": ([{"match": 3, "eps": 1}], None),
    "groups.1.match: 'head.wieght' matches no parameter; there are: head.weight": (
        [{"match": "*", "eps": 1}, {"match": "head.wieght", "eps": 1}],
        None,
    ),
    "groups.0.params: expected no such setting; match selects": ([{"match": "*", "params": 3}], None),
    "groups.0.match: 'embed.*' matches only frozen parameters, embed.bias, embed.weight": (
        [{"match": ["*", "embed.*"], "eps": 1}],
        None,
    ),
    "groups.0.lr_scale: expected lr or lr_scale, found both": ([{"match": "*", "lr": 1, "lr_scale": 1}], None),
    "groups.0.lr_scale=-1: expected a number of 0 or more": ([{"match": "*", "lr_scale": -1}], None),
    "groups.0.weight_decay=nan: expected a number of 0 or more": ([{"match": "*", "weight_decay": float("nan")}], None),
    "groups.0.lr=fast: expected a number of 0 or more": ([{"match": "*", "lr": "fast"}], None),
    "layer_decay=0.5: expected {rate: 0.75, layers": ([], 0.5),
    "layer_decay={'rates': 1}: expected {rate: 0.75, layers": ([], {"rates": 1}),
    "layer_decay.rate=1.5: expected a number above 0, up to 1": ([], {"rate": 1.5, "layers": "blocks.*"}),
    "layer_decay.layers=blocks: expected a glob over layers": ([], {"rate": 0.5, "layers": "blocks"}),
    "layer_decay.layers=block.*: expected two or more numbered layers, found none; there are: blocks.": (
        [],
        {"rate": 0.5, "layers": "block.*"},
    ),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_a_mistake_names_its_key_and_value(message):
    module = Net()
    module.embed.requires_grad_(False)
    entries, layer_decay = MISTAKES[message]
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        group_parameters(module, entries, layer_decay)


def make_optimizer(module, target, entries, layer_decay=None, **arguments):
    groups = group_parameters(module, entries, layer_decay)
    optimizer = target([{"params": group.named, **group.settings} for group in groups], **arguments)
    check_groups(optimizer, groups)
    scale_rates(optimizer, groups)
    return optimizer


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"weigth_decay": 0}, "groups.0.weigth_decay: AdamW has no such setting; did you mean weight_decay?"),
        ({"eps": "small"}, "groups.0.eps=small: expected a value like 1e-08"),
        ({"betas": [0.9]}, r"groups.0.betas=\[0.9\]: expected a value like \(0.9, 0.999\)"),
        ({"amsgrad": 1}, "groups.0.amsgrad=1: expected a value like False"),
    ],
)
def test_a_setting_that_the_optimizer_does_not_have_is_refused(entry, message):
    with pytest.raises(ValueError, match=message):
        make_optimizer(Net(), torch.optim.AdamW, [{"match": "*.bias", **entry}])


def test_an_optimizer_that_regroups_or_drops_settings_is_refused():
    def joins(groups):
        return torch.optim.SGD([pair for group in groups for pair in group["params"]], lr=0.1)

    def drops(groups):
        return torch.optim.SGD([{"params": group["params"]} for group in groups], lr=0.1)

    for target, found in ((joins, "SGD joins several of them"), (drops, "SGD has weight_decay=0, not 0.5")):
        with pytest.raises(ValueError, match=f"groups: expected an optimizer that keeps the groups .* {found}"):
            make_optimizer(Net(), target, [{"match": "*.bias", "weight_decay": 0.5}])


ENTRIES_OF_NO_DECAY = [{"match": ["*.bias", "*norm*"], "weight_decay": 0.0}, {"match": "embed.*", "lr_scale": 0.1}]


def by_hand(module, target, lr, **arguments):
    named = dict(module.named_parameters())
    has_decay = {name: not (name.endswith("bias") or "norm" in name) for name in named}
    groups = []
    for is_scaled, decays in ((False, True), (False, False), (True, True), (True, False)):
        chosen = [p for n, p in named.items() if n.startswith("embed") is is_scaled and has_decay[n] is decays]
        groups.append(
            {"params": chosen, "lr": lr * 0.1 if is_scaled else lr} | ({} if decays else {"weight_decay": 0.0})
        )
    return target(groups, lr=lr, **arguments)


@pytest.mark.parametrize("target", [torch.optim.AdamW, torch.optim.SGD, torch.optim.RMSprop])
def test_steps_equal_those_of_torchs_optimizer_built_by_hand(target):
    module, other = Net(), Net()
    optimizer = make_optimizer(module, target, ENTRIES_OF_NO_DECAY, lr=0.1, weight_decay=0.2)
    expected = by_hand(other, target, lr=0.1, weight_decay=0.2)
    schedules = [warmup(optimizer, warmup_steps=4), warmup(expected, warmup_steps=4)]
    for step in range(6):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        for net, each, schedule in ((module, optimizer, schedules[0]), (other, expected, schedules[1])):
            net(x).backward()
            each.step()
            each.zero_grad()
            schedule.step()
        assert all(map(torch.equal, module.parameters(), other.parameters()))


def test_muon_takes_groups_and_each_part_the_settings_that_it_has():
    module, other = Net(), Net()
    entries = [{"match": "*", "momentum": 0.5, "betas": [0.8, 0.9]}, {"match": "blocks.0.*", "lr_scale": 0.5}]
    optimizer = make_optimizer(module, muon, entries, lr=0.02, adamw_lr=0.004, weight_decay=0.1, adamw_only=["head.*"])
    named = dict(other.named_parameters())
    hidden = [n for n, p in named.items() if p.ndim == 2 and not n.startswith("head")]
    kinds = ((torch.optim.Muon, 0.02, {"momentum": 0.5}), (torch.optim.AdamW, 0.004, {"betas": (0.8, 0.9)}))
    expected = []
    for kind, lr, arguments in kinds:
        names = [name for name in named if (name in hidden) is (kind is torch.optim.Muon)]
        first = [named[name] for name in names if name.startswith("blocks.0.")]
        rest = [named[name] for name in names if not name.startswith("blocks.0.")]
        groups = [{"params": rest}, {"params": first, "lr": lr * 0.5}]
        expected.append(kind(groups, lr=lr, weight_decay=0.1, **arguments))
    for step in range(3):
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        module(x).backward()
        optimizer.step()
        optimizer.zero_grad()
        other(x).backward()
        for each in expected:
            each.step()
            each.zero_grad()
    assert all(map(torch.equal, module.parameters(), other.parameters()))
    with pytest.raises(ValueError, match=r"groups.0.momentum: AdamW has no such setting"):
        make_optimizer(Net(), muon, [{"match": "*.bias", "momentum": 0.5}], lr=0.02)


def make_engines(layout):
    module, strategy = Net(), layout()
    strategy.attach_coordinator(Coordinator(), "model", True)
    strategy.shard(module)
    layer_decay = {"rate": 0.5, "layers": "blocks.*"}
    optimizer = make_optimizer(module, torch.optim.AdamW, ENTRIES_OF_NO_DECAY, layer_decay, lr=0.1, weight_decay=0.2)
    return Engines(model=Engine(module, optimizer, warmup(optimizer, warmup_steps=3), strategy=strategy, clip_norm=1.0))


def train(layout, resumes):
    engines = make_engines(layout)
    for step in range(4):
        if resumes and step == 2:
            state = engines["model"].strategy.to_full(engines.state_dict())
            engines = make_engines(layout)
            engines.load_state_dict(state)
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        engines.micro_step({"x": x.chunk(distributed.world_size())[distributed.rank()]})
        assert engines.step(engines["model"].strategy.coordinator.poll) == {}
    return engines.export_states()["model"], engines["model"].take_metrics()


@pytest.mark.parametrize("layout", [DDP, FSDP])
def test_two_ranks_train_groups_as_one_process_and_resume_to_the_bit(layout):
    expected, _ = train(Strategy, False)
    whole, cut = run_ranks(2, train, layout, False), run_ranks(2, train, layout, True)
    for (weights, numbers), (other, other_numbers) in zip(whole, cut, strict=True):
        torch.testing.assert_close(weights, expected, rtol=1e-5, atol=1e-6)
        assert all(torch.equal(weights[name], other[name]) for name in weights)
        assert {n: v for n, v in numbers.items() if "lr" in n} == {n: v for n, v in other_numbers.items() if "lr" in n}


def test_the_lr_command_scales_all_groups_and_the_table_shows_them():
    engine = make_engines(Strategy)["model"]
    before = [group["initial_lr"] for group in engine.optimizer.param_groups]
    assert before[0] == 0.1
    engine.set_lr(0.3)
    after = [group["initial_lr"] for group in engine.optimizer.param_groups]
    assert after == pytest.approx([3 * lr for lr in before], rel=1e-12)
    table = describe_groups(engine.optimizer, engine.module)
    assert table[0].split() == ["metric", "lr", "decay", "tensors", "parameters"]
    assert table[1].split() == ["lr", "0.3", "0.2", "1", "12", "head.weight"]
    assert len(table) == 1 + len(after)
    plain = torch.optim.AdamW(Net().parameters())
    assert describe_groups(plain, Net()) == []
