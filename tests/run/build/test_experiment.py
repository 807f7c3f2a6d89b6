import contextlib
import random
import sys

import numpy as np
import pytest
import torch
from conftest import read_numbers
from hydra import compose, initialize_config_dir
from ranks import run_ranks
from run_comparison import assert_same_run
from torch import nn

from runner.config import checks
from runner.config.spec import ExperimentSpec
from runner.run import exports, saved_model
from runner.run.build.data import build_batches, build_evaluations
from runner.run.build.engines import build_engines
from runner.run.build.experiment import build_report
from runner.utils.distributed import preserve_rng_state, seed_all

CPU = torch.device("cpu")


def draw():
    return [torch.rand(()).item(), random.random(), np.random.rand(), np.random.permutation(9).tolist()]


DRAWN = {}


class Model(nn.Linear):
    def __init__(self, name):
        super().__init__(1, 1)
        DRAWN[name] = draw()


class Drawing:
    """Draws when it is made: as a dataset, sampler, collate function, feeder or report."""

    def __init__(self, length=5, name=""):
        self.length = length
        DRAWN.setdefault(name, []).append(draw())

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return index

    def __iter__(self):
        return iter(range(self.length))

    def __call__(self, *given):
        return {}

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


def plain_with(seed=3, **changes):
    """The resolved config of an experiment whose every object draws when it is made."""
    checks.register_with_hydra()
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        plain = checks.to_plain(compose("config", [f"seed={seed}"]))
    roles = {name: {"_target_": "test_experiment.Drawing", "name": name} for name in ("sampler", "feeder", "report")}
    parts = {name: {"_target_": "test_experiment.Drawing", "name": name} for name in ("train", "eval", "collate")}
    plain |= roles | {"model": {"_target_": "test_experiment.Model", "name": "model"}}
    plain["data"] |= parts | changes.pop("data", {})
    return plain | changes


def drawn(plain):
    """Returns the draws of each object by its role."""
    DRAWN.clear()
    spec = ExperimentSpec.from_plain(plain)
    build_engines(spec, CPU)
    build_batches(spec, CPU)
    build_evaluations(spec)
    build_report(spec)
    return dict(DRAWN)


def test_every_object_draws_by_the_seed_and_its_key_alone():
    seed_all(1, CPU)
    first = drawn(plain_with())
    seed_all(2, CPU)
    assert drawn(plain_with()) == first
    assert first.keys() == {"model", "train", "eval", "collate", "sampler", "feeder", "report"}
    assert first["collate"][0] == first["collate"][1]  # of training and of evaluation
    for i in range(4):
        assert len({str(values[0][i] if name != "model" else values[i]) for name, values in first.items()}) == 7
    other = drawn(plain_with(seed=4))
    assert all(other[name] != first[name] for name in first)


@pytest.mark.parametrize("left_out", [{"feeder": None}, {"report": None}, {"data": {"eval": None}}])
def test_an_object_that_is_left_out_does_not_change_what_the_others_draw(left_out):
    first, fewer = drawn(plain_with()), drawn(plain_with(**left_out))
    assert len(fewer) == 6
    assert all(values[0] == first[name][0] for name, values in fewer.items())


def test_an_engine_that_is_added_does_not_change_the_others():
    engines = {name: {"model": {"_target_": "test_experiment.Model", "name": name}} for name in ("a", "b")}
    both, one = drawn(plain_with(engines=engines)), drawn(plain_with(engines={"b": engines["b"]}))
    assert both["a"] != both["b"] == one["b"]


def test_the_initial_weights_of_a_seed_are_those_that_torch_gives_for_it():
    torch.manual_seed(3)
    expected = nn.Linear(1, 1)
    made = build_engines(ExperimentSpec.from_plain(plain_with()), CPU)["model"].module
    assert torch.equal(made.weight, expected.weight)
    assert torch.equal(made.bias, expected.bias)


def drawn_on_a_rank():
    seed_all(int(torch.distributed.get_rank()), CPU)
    return drawn(plain_with())


def test_every_rank_draws_the_same():
    first, second = run_ranks(2, drawn_on_a_rank)
    assert first == second == drawn(plain_with())


DRAWS = """

import random as python_random

TOP = [numpy.random.rand(), python_random.random()]  # when the module is imported


class DrawingModel(Model):
    def __init__(self):
        super().__init__(dropout=0.0)
        with torch.no_grad():
            self.first.weight.mul_(float(numpy.random.rand() + python_random.random() + sum(TOP)))


class DrawingData(Data):
    def __init__(self, length=50):
        super().__init__(length)
        self.x = self.x[numpy.random.permutation(length)][python_random.sample(range(length), length)] + sum(TOP)
"""


def test_a_run_whose_objects_draw_while_they_are_made_is_the_same_when_it_was_cut(project):
    with (project.folder / "own.py").open("a") as file:
        file.write(DRAWS)
    argv = ["model._target_=own.DrawingModel", "trainer.steps=6", "trainer.eval_every=2", "data.eval.length=50"]
    argv += [f"data.{each}._target_=own.DrawingData" for each in ("train", "eval")]
    project.run(*argv, "hydra.run.dir=whole")
    project.run(*argv, "hydra.run.dir=cut", typed="quit@3\n")
    project.run("resume=cut", "allow_targets=[own]")
    assert_same_run(project.folder / "whole", project.folder / "cut", 6)


def test_generators_of_a_program_are_as_they_were_after_a_block():
    seed_all(5, CPU)
    expected = draw()
    seed_all(5, CPU)
    with contextlib.suppress(KeyError), preserve_rng_state(CPU):
        seed_all(6, CPU)
        draw()
        raise KeyError
    assert draw() == expected


def test_an_export_leaves_the_generators_of_its_program_alone(at_home):
    seed_all(5, CPU)
    expected = draw()
    seed_all(5, CPU)
    exports.export(saved_model.open_checkpoint(at_home.folder / "run", (), ["own"]), at_home.folder / "after")
    assert "own" in sys.modules
    assert draw() == expected


OWN = """

class Own(Data):
    def __init__(self, length=50, kind="numpy"):
        super().__init__(length)
        self.rng = {"numpy": numpy.random.default_rng(0), "system": python_random.SystemRandom()}[kind]

    def __getitem__(self, index):
        sample = super().__getitem__(index)
        return {**sample, "x": sample["x"] + self.rng.random()}


def split(length=50, kind="numpy"):
    return torch.utils.data.Subset(Own(length + 5, kind), range(5, 5 + length))


def show(module, dataset):
    return {"first": dataset[0]["x"][0]}
"""
SPLIT = ["data.train._target_=own.split", "data.eval._target_=own.split", "report._target_=own.show"]


@pytest.fixture
def own_generators(project):
    with (project.folder / "own.py").open("a") as file:
        file.write("import random as python_random\n" + OWN)
    return project


def test_a_run_whose_dataset_draws_by_a_generator_of_its_own_is_the_same_when_it_was_cut(own_generators):
    project = own_generators
    argv = [*SPLIT, "trainer.steps=6", "trainer.eval_every=2", "+model.dropout=0.0"]
    printed = project.run(*argv, "hydra.run.dir=whole")
    assert "warning" not in printed
    project.run(*argv, "hydra.run.dir=cut", typed="quit@3\n")
    project.run("resume=cut", "allow_targets=[own]", "data.num_workers=2")
    assert_same_run(project.folder / "whole", project.folder / "cut", 6)
    project.run(*argv, "hydra.run.dir=parts", "trainer.accumulate=4")
    expected, found = (
        [line["eval/first"] for line in read_numbers(project.folder / name) if "eval/first" in line]
        for name in ("whole", "parts")
    )
    assert len(set(expected)) == 4
    assert found == expected


@pytest.mark.parametrize(
    ("overrides", "told"),
    [
        (["+data.train.kind=system"], "data.train.dataset.rng: expected a generator that a seed decides;"),
        (["data.seed_samples=false"], "data.train.dataset.rng: each loader worker and each resume starts a generator"),
    ],
)
def test_a_generator_that_is_not_reseeded_is_told_once(own_generators, overrides, told):
    printed = own_generators.run(*SPLIT, *overrides, "trainer.steps=4", "hydra.run.dir=run")
    assert printed.count(f"warning: {told}") == 1
    assert (own_generators.folder / "run" / "log.txt").read_text().count(told) == 1
