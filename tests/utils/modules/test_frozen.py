"""`runner.utils.modules.frozen`: frozen modules stay in eval mode and keep their statistics while the rest trains."""

import copy

import pytest
import torch
from ranks import run_ranks
from torch import nn

from runner.config import optimizations
from runner.engines import Engine
from runner.engines.ema import EMA
from runner.engines.fsdp import FSDP
from runner.engines.strategies import DDP, Strategy
from runner.utils.wrapper import optimize


class Norm(nn.BatchNorm1d):
    """A replacement of BatchNorm."""


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear, self.norm, self.dropout = nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Dropout(0.5)

    def forward(self, x):
        return self.dropout(self.norm(self.linear(x)))


class Net(nn.Module):
    """A backbone, frozen at construction or not, and a head."""

    def __init__(self, freezes=False, in_eval=False):
        super().__init__()
        self.backbone, self.head = nn.Sequential(Block(), Block()), nn.Sequential(nn.Linear(8, 1), nn.Dropout(0.5))
        if freezes:
            self.backbone.requires_grad_(False)
        if in_eval:
            self.backbone.eval()

    def forward(self, x):
        return self.head(self.backbone(x)).square().mean()


def optimized(module, **switches):
    """Applies optimizations as a config switches them on."""
    nodes, _ = optimizations.of_engine(optimizations.expand({"optimizations": switches}), "")
    return optimize(module, {name: optimizations.make_built_in(node) for name, node in nodes.items()})


def engine_of(module, strategy=None, averages=False, **settings):
    """Returns an engine of a module with these optimizations, as `build` makes it."""
    changes = optimized(module, **settings)
    strategy = strategy or Strategy()
    strategy.shard(module)
    parameters = [p for p in module.parameters() if p.requires_grad]
    averaged = EMA(module, 0.9) if averages else None
    optimizer = torch.optim.SGD(parameters, lr=0.01)
    return Engine(module, optimizer, applied=changes, strategy=strategy, ema=averaged)


def trained(engine):
    """Runs three steps with evaluations between; returns the running mean and batch count of the first norm."""
    for _ in range(3):
        engine.micro_step(torch.randn(4, 8))
        engine.step()
        with engine.evaluating():
            engine.forward(torch.randn(4, 8))
    norm = engine.module.backbone[0].norm
    return norm.running_mean.tolist(), norm.num_batches_tracked.item()


def modes(module):
    return {name: part.training for name, part in module.named_modules()}


KEPT, MOVED = ([0.0] * 8, 0), 3
CASES = {
    "frozen and in evaluation mode when built": ({"freezes": True, "in_eval": True}, {}, True),
    "frozen by name": ({}, {"freeze": ["backbone.*"]}, True),
    "frozen by name, to be run as in training": ({}, {"freeze": ["backbone.*"], "freeze_mode": "train"}, False),
    "frozen when built, in training mode": ({"freezes": True}, {}, False),
    "in evaluation mode when built, and trained": ({"in_eval": True}, {}, False),
    "frozen but for a bias": ({}, {"freeze": ["backbone.*weight", "backbone.?.linear.*"]}, False),
    "only the norms": ({}, {"freeze": ["backbone.?.norm.*"]}, True),
    "in evaluation mode when built, then frozen, to be run as in training": (
        {"in_eval": True},
        {"freeze": ["backbone.*"], "freeze_mode": "train"},
        False,
    ),
}
FURTHER = {
    "alone": {},
    "averaged": {"averages": True},
    "compiled": {"compile": {"scope": "blocks", "backend": "eager"}},
    "compiled as a whole": {"compile": {"scope": "whole", "backend": "eager"}},
    "recomputed": {"checkpointing": True},
    "replaced": {"replace": [{"match": "torch.nn.BatchNorm1d", "with": f"{__name__}.Norm"}]},
}


@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")  # torch's own
@pytest.mark.parametrize("further", FURTHER)
@pytest.mark.parametrize("case", CASES)
def test_statistics_of_frozen_modules_stay_and_others_move(case, further):
    built, settings, stays = CASES[case]
    engine = engine_of(Net(**built), **settings, **FURTHER[further])
    found = trained(engine)
    assert found == KEPT if stays else found[1] == MOVED
    assert engine.module.training
    assert engine.module.head.training
    assert engine.module.backbone.training is ("only" in case or not stays)


def _ranks(make_layout, case):
    built, settings, _ = CASES[case]
    return trained(engine_of(Net(**built), make_layout(), **settings))


@pytest.mark.parametrize("make_layout", [DDP, FSDP])
@pytest.mark.parametrize("case", ["frozen and in evaluation mode when built", "frozen by name"])
def test_on_ranks_too(case, make_layout):
    assert run_ranks(2, _ranks, make_layout, case) == [KEPT] * 2


def test_a_module_that_was_loaded_in_evaluation_mode_is_trained_in_training_mode():
    module = Net().eval()
    engine = engine_of(module)
    assert all(modes(module).values())
    with engine.evaluating():
        assert not any(modes(module).values())
    assert all(modes(module).values())


def test_dropout_in_a_frozen_module_is_inactive():
    module = Net(freezes=True, in_eval=True)
    twin = copy.deepcopy(module).eval()
    engine = engine_of(module)
    x = torch.randn(64, 8)
    assert torch.equal(engine.module.backbone(x), twin.backbone(x))
    assert not torch.equal(engine.module.head(x), twin.head(x))


def test_modes_are_the_same_after_a_resume():
    engine = engine_of(Net(), freeze=["backbone.*"])
    before = modes(engine.module)
    engine.load_state_dict(engine.state_dict())
    assert modes(engine.module) == before
    assert not before["backbone.1.dropout"]


@pytest.mark.parametrize("settings", [{"freeze": ["backbone.*"]}, {}])
def test_a_module_with_adapters_is_not_frozen(settings):
    module = Net(freezes=not settings, in_eval=not settings)
    engine = engine_of(module, **settings, lora={"rank": 2, "include": ["backbone.0.linear"]})
    found = modes(engine.module)
    assert found["backbone"]
    assert found["backbone.0.dropout"]
    assert found["backbone.0.linear"]
    assert not found["backbone.0.norm"]
    assert not found["backbone.1"]


def test_modules_frozen_only_by_adapters_stay_in_training_mode():
    engine = engine_of(Net(in_eval=True), lora={"rank": 2, "include": ["head.0"]})
    assert all(modes(engine.module).values())


def test_submodules_of_a_frozen_module_stay_in_training_mode():
    module = Net(freezes=True, in_eval=True)
    module.backbone[1].dropout.train()
    found = modes(engine_of(module).module)
    assert {name for name in found if name.startswith("backbone") and found[name]} == {"backbone.1.dropout"}


class Overriding(Net):
    """A module that sets one part to eval mode whenever the rest is set to training mode."""

    def train(self, mode=True):
        super().train(mode)
        self.backbone[0].norm.eval()
        self.calls = [*getattr(self, "calls", []), mode]
        return self


class Always(nn.Sequential):
    """A module that never leaves training mode, such as one that also samples in evaluations."""

    def train(self, mode=True):
        return super().train(True)


def test_a_users_own_train_method_is_called_and_respected():
    engine = engine_of(Overriding())
    assert [name for name, training in modes(engine.module).items() if not training] == ["backbone.0.norm"]
    with engine.evaluating():
        pass
    assert engine.module.calls == [True, False, True]
    module = Net()
    module.backbone[1] = Always(nn.Linear(8, 8), nn.Dropout(0.5))
    found = modes(engine_of(module, freeze=["backbone.*"]).module)
    assert [name for name in found if "backbone" in name and found[name]] == [
        "backbone.1", "backbone.1.0", "backbone.1.1",
    ]  # fmt: skip


def test_the_table_lists_both():
    module = Net()
    module.backbone[0].eval().requires_grad_(False)
    table = optimized(module, freeze=["backbone.1.*"]).table()
    rows = [line for line in table if line.startswith("evaluation mode")]
    assert [row.split(":")[1].split("(")[0].strip() for row in rows] == ["backbone.0", "backbone.1"]
    assert "when built" in rows[0]
    assert "freeze_mode=train" in rows[1]
    assert not optimized(Net(freezes=True)).table()


def test_a_partly_frozen_module_stays_in_training_mode():
    module = Net()
    module.backbone[0].requires_grad_(False)
    found = modes(engine_of(module, freeze=["backbone.1.*"]).module)
    assert found["backbone"]
    assert found["backbone.0.norm"]
    assert not found["backbone.1"]


def test_a_submodule_made_trainable_later_is_trained():
    engine = engine_of(Net(freezes=True, in_eval=True))
    engine.module.backbone.requires_grad_(True)
    engine.train()
    assert all(modes(engine.module).values())


def test_a_submodule_without_parameters_is_not_frozen():
    module = Net()
    module.backbone[0].dropout.eval()
    assert all(modes(engine_of(module).module).values())
