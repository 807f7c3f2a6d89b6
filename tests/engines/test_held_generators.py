"""Generators of modules, feeders, optimizers and reports draw numbers that depend on the step alone."""

import functools
import random

import numpy as np
import pytest
import torch
from conftest import read_numbers, shared_zygote
from ranks import Ranks, run_ranks
from run_comparison import assert_same_run
from torch import nn

from runner.engines import Engine, Engines
from runner.utils import unsloth
from runner.utils.modules.generators import ObjectGenerators
from runner.utils.train import Loop

KINDS = {
    "torch": (torch.Generator, lambda rng: torch.rand((), generator=rng).item()),
    "random": (lambda: random.Random(0), lambda rng: rng.gauss(0, 1)),
    "numpy": (lambda: np.random.default_rng(0), lambda rng: rng.random()),
    "numpy, legacy": (lambda: np.random.RandomState(0), lambda rng: rng.randn()),
}


class Helper:
    def __init__(self, rng):
        self.rng = rng


class Key:
    pass


class Sub(nn.Module):
    def __init__(self, held):
        super().__init__()
        self.held = held


PLACES = {
    "attribute": lambda rng: rng,
    "list": lambda rng: [1, rng],
    "dict": lambda rng: {"a": {0: rng}},
    "dict by objects": lambda rng: {Key(): rng},
    "module": lambda rng: nn.Sequential(nn.ReLU(), Sub(rng)),
    "helper": Helper,
    "partial": lambda rng: functools.partial(print, rng),
    "closure": lambda rng: lambda: rng,
    "method": lambda rng: rng.seed if isinstance(rng, torch.Generator) else rng.random,
}


def make(kind, place):
    """Returns engines whose module holds a generator, and a function that draws from it."""
    make_rng, draw = KINDS[kind]
    rng = make_rng()
    module = nn.Linear(1, 1)
    module.held = PLACES[place](rng)
    return Engines(model=Engine(module)), functools.partial(draw, rng)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", KINDS)
def test_what_a_held_generator_draws_is_a_function_of_the_seed_in_any_process(kind, place):
    engines, draw = make(kind, place)
    drawn = []
    for seed in (1, 2, 1):
        engines.seed(seed)
        drawn.append([draw() for _ in range(3)])
    assert drawn[0] == drawn[2] != drawn[1]
    others, draw_other = make(kind, place)
    draw_other()
    others.seed(2)
    assert [draw_other() for _ in range(3)] == drawn[1]


class Noisy(nn.Module):
    """A module that multiplies by random numbers, drawn several times from a generator of each kind."""

    def __init__(self, width=4):
        super().__init__()
        self.linear = nn.Linear(width, width)
        self.rngs = {kind: make_rng() for kind, (make_rng, _) in KINDS.items()}
        self.drawn = []

    def forward(self, x):
        self.drawn.append([KINDS[kind][1](rng) for kind, rng in self.rngs.items()])
        return torch.tanh(self.linear(x)) * (1 + sum(self.drawn[-1]))


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([Noisy() for _ in range(3)])

    def forward(self, x):
        for block in self.blocks:
            x = x + block(x)
        return x.square().mean()

    @property
    def drawn(self):
        return [block.drawn for block in self.blocks]


class Batches:
    weight, num_samples_total = 1.0, 0

    def __next__(self):
        return torch.linspace(-1, 1, 8).reshape(2, 4)

    def position(self):
        return None


def make_net(is_recomputed=False, **feeders):
    torch.manual_seed(0)
    module = Net()
    if is_recomputed:
        for block in module.blocks:
            unsloth.wrap(block)
    return Engine(module, torch.optim.SGD(module.parameters(), lr=0.1), accumulate=2, **feeders)


def train(engines, first, last):
    loop = Loop(engines, Batches(), steps=last, accumulate=2, seed=7)
    loop.step = first
    loop.run()
    return engines


def test_recomputed_blocks_train_to_the_bit_what_others_do():
    plain, recomputed = (
        train(Engines(model=make_net(is_recomputed)), 0, 3)["model"] for is_recomputed in (False, True)
    )
    for one, other in zip(plain.module.parameters(), recomputed.module.parameters(), strict=True):
        assert torch.equal(one, other)
    forwards = [drawn[0::2] for drawn in recomputed.module.drawn]
    assert len(forwards[0]) == len(plain.module.drawn[0]) == 6


def train_on_a_rank():
    return train(Engines(model=make_net()), 0, 2)["model"].module.drawn


def test_ranks_draw_alike_as_one_process_does():
    drawn = train_on_a_rank()
    assert run_ranks(2, train_on_a_rank) == [drawn, drawn]
    flat = [number for block in drawn for forward in block for number in forward]
    assert len(set(flat)) == len(flat)


class NoisyStep(torch.optim.SGD):
    """An optimizer that adds noise from the global generators, as stochastic rounding does."""

    def step(self, closure=None):
        super().step(closure)
        with torch.no_grad():
            for group in self.param_groups:
                for parameter in group["params"]:
                    parameter += torch.randn_like(parameter) + random.random() + np.random.rand()


def train_with_noisy_updates():
    net = torch.nn.Linear(4, 1)
    torch.nn.init.ones_(net.weight)
    torch.nn.init.ones_(net.bias)
    optimizer = NoisyStep(net.parameters(), lr=0.1)
    engines = Engines(model=Engine(net, optimizer, feeder=lambda module, batch: module(batch).sum()))
    train(engines, 0, 2)
    return [parameter.tolist() for parameter in net.parameters()]


def test_an_update_that_draws_is_the_same_on_every_rank():
    first, second = run_ranks(2, train_with_noisy_updates)
    assert first == second


def test_an_engine_that_is_added_changes_no_draws_and_draws_others():
    both = train(Engines(a=make_net(), b=make_net()), 0, 2)
    (alone,) = train(Engines(b=make_net()), 0, 2).values()
    assert both["b"].module.drawn == alone.module.drawn != both["a"].module.drawn


def test_evaluations_draw_by_batch_and_leave_training_as_it_is():
    batches = [(0, torch.ones(2, 4), 2), (1, torch.ones(2, 4), 2)]
    plain = Engines(model=make_net())
    evaluated = Engines(model=make_net())
    train(plain, 0, 4)
    evaluated.evaluate(batches, seed=3)
    train(evaluated, 0, 2)
    evaluated.evaluate(batches, seed=3)
    train(evaluated, 2, 4)
    expected = plain["model"].module.blocks[0].drawn
    drawn = evaluated["model"].module.blocks[0].drawn
    assert drawn[:2] == drawn[6:8]
    assert drawn[0] != drawn[1]
    assert drawn[2:6] + drawn[8:] == expected


def test_feeders_and_optimizers_are_looked_through_and_parameters_are_not():
    rngs = [random.Random(number) for number in range(3)]

    def feed(module, batch, rng=rngs[0]):
        return module(batch) * rng.random()

    engine = make_net(feeder=functools.partial(feed, rng=rngs[1]))
    engine.optimizer.rng = rngs[2]
    train(engines := Engines(model=engine), 0, 1)
    before = engines.find_generators().paths
    assert set(before) >= {"model.feeder.keywords['rng']", "model.optimizer.rng"}
    engines.seed(5)
    assert len({rng.random() for rng in rngs}) == 3
    assert engines.find_late_generators() == []
    train(engines, 1, 2)  # the optimizer has a state by now
    assert engines.find_generators().paths == before


def test_a_generator_is_found_behind_any_number_of_modules():
    module = nn.Sequential(*[nn.Sequential(nn.Linear(1, 1), nn.Conv1d(1, 1, 1)) for _ in range(8000)])
    module[-1][-1].rng = random.Random(0)
    assert ObjectGenerators(model=module).paths == ["model.7999.1.rng"]


def test_generators_made_in_a_forward_or_without_a_seed_are_told_by_name():
    engines = Engines(model=make_net())
    module = engines["model"].module
    module.blocks[0].system = random.SystemRandom()
    (told,) = engines.find_unseeded()
    assert told.startswith("model.blocks.0.system: expected a generator that a seed decides; its numbers depend on")
    engines.seed(1)
    assert engines.find_late_generators() == []
    module.blocks[1].late = random.Random(0)
    module.blocks[2].rngs["random"] = random.Random(0)  # in place of another
    told = engines.find_late_generators()
    places = ["model.blocks.1.late", "model.blocks.2.rngs['random']"]
    assert sorted(text.partition(":")[0] for text in told) == places
    assert engines.find_late_generators() == []
    engines.seed(1)
    drawn = module.blocks[1].late.random()
    engines.seed(1)
    assert module.blocks[1].late.random() == drawn


HOLDING = """


class Holding(Model):
    def __init__(self, is_late=False):
        super().__init__(dropout=0.0)
        self.rngs = [torch.Generator(), random.Random(0), numpy.random.default_rng(), numpy.random.RandomState()]
        self.late = None
        self.is_late = is_late

    def forward(self, x, y):
        if self.is_late and self.late is None:
            self.late = random.Random(0)
        drawn = [torch.rand((), generator=self.rngs[0]), self.rngs[1].random()]
        drawn += [rng.normal() for rng in self.rngs[2:]]
        output = super().forward(x * (1 + drawn[0]) + drawn[1] + drawn[2] + drawn[3], y)
        return output | {f"drawn_{number}": float(value) for number, value in enumerate(drawn)}


class Reports:
    def __init__(self):
        self.rng = random.Random(0)

    def __call__(self, module, dataset):
        return {"reported": self.rng.random()}


SCALES = {"scale": numpy.random.default_rng()}


def feed_scaled(module, batch):
    output = module(**batch)
    return output | {"loss": output["loss"] * SCALES["scale"].random()}
"""
ARGV = ["model._target_=own.Holding", "trainer.steps=6", "trainer.eval_every=2", "trainer.accumulate=2"]
ARGV += ["feeder={_target_: own.feed_scaled}", "report._target_=own.Reports"]


@pytest.fixture
def holding(project):
    with (project.folder / "own.py").open("a") as file:
        file.write(HOLDING)
    return project


@pytest.mark.parametrize("argv", [[], ["data.seed_samples=false", "data.train._target_=own.Plain"]])
def test_a_run_is_the_same_when_it_was_cut(holding, argv):
    printed = holding.run(*ARGV, *argv, "hydra.run.dir=whole")
    assert "warning" not in printed
    holding.run(*ARGV, *argv, "hydra.run.dir=cut", typed="quit@3\n")
    holding.run("resume=cut", "allow_targets=[own]")
    assert_same_run(holding.folder / "whole", holding.folder / "cut", 6)
    numbers = read_numbers(holding.folder / "whole")
    for name in ("train/drawn_0", "eval/drawn_1", "eval/reported"):
        drawn = [line[name] for line in numbers if name in line]
        assert len(set(drawn)) == len(drawn) >= 3


def test_a_generator_made_in_the_first_step_is_told_once(holding):
    printed = holding.run(*ARGV, "+model.is_late=true", "trainer.eval_at_start=false", "hydra.run.dir=run")
    assert printed.count("warning: model.late: expected a generator made in __init__, found one made in a forward") == 1


@pytest.mark.slow
def test_a_run_of_two_ranks_is_the_same_when_it_was_cut(holding):
    ranks = Ranks(shared_zygote())
    argv = [*holding.command[3:], *ARGV, "distributed=ddp", "distributed.device=cpu"]
    ranks.run(holding.folder, 2, *argv, "hydra.run.dir=whole")
    ranks.run(holding.folder, 2, *argv, "hydra.run.dir=cut", typed="quit@3\n")
    ranks.run(holding.folder, 2, *holding.command[3:5], "resume=cut", "allow_targets=[own]")
    assert_same_run(holding.folder / "whole", holding.folder / "cut", 6)
