"""Two ranks train two engines together or in turns; a failure of one rank ends both at the same step."""

import json

import pytest
from choices import Choices, assert_same_parts

OWN = """
import os

import torch
from own import Data, Normed

calls = {"critic": 0, "generator": 0}


def hurt(name, module, loss):
    # OWN_FAILURE is the engine, the number of its training forward, and the failure, such as critic@3@nan
    calls[name] += module.training
    engine, _, rest = os.environ.get("OWN_FAILURE", "").partition("@")
    number, _, failure = rest.partition("@")
    if not module.training or engine != name or calls[name] != int(number):
        return loss
    if failure == "bug":
        raise KeyError("the feeder's own mistake")
    return loss * float(failure)


def feed_critic(module, batch, engines):
    with torch.no_grad():
        scale = engines["generator"](**batch)["loss"]
    return hurt("critic", module, module(**batch)["loss"] * (1 + scale))


def feed_generator(module, batch, engines):
    return hurt("generator", module, module(**batch)["loss"] + engines["critic"](**batch)["loss"])
"""
ENGINES = """
engines:
  critic: {model: {_target_: own.Normed}, feeder: {_target_: turns.feed_critic}}
  generator: {model: {_target_: own.Normed}, feeder: {_target_: turns.feed_generator}, every: 2}
model: null
report: null
"""
ARGUMENTS = ["--config-dir", "conf", "experiment=mine", "distributed=ddp", "distributed.device=cpu"]
ARGUMENTS += ["trainer.save_every=2", "trainer.eval_every=0", "trainer.steps=6", "data.batch_size=8"]


@pytest.fixture
def turns(tmp_path):
    project = Choices(tmp_path)
    (tmp_path / "turns.py").write_text(OWN)
    experiment = tmp_path / "conf" / "experiment" / "mine.yaml"
    lines = experiment.read_text().splitlines()
    kept = [line for line in lines if not line.startswith(("model:", "report:"))]
    experiment.write_text("\n".join(kept) + ENGINES)
    return project


def fail(turns, updates, failure):
    """Has rank 1 fail; returns the output, the steps that are saved, and the step of run.json."""
    printed = turns.run_on(
        2, *ARGUMENTS, f"updates={updates}", "hydra.run.dir=run", status=1, by_rank={1: {"OWN_FAILURE": failure}}
    )
    saved = sorted(int(path.name[5:]) for path in (turns.folder / "run" / "checkpoints").glob("step_*"))
    return printed, saved, json.loads((turns.folder / "run" / "run.json").read_text())["last_step"]


@pytest.mark.parametrize("updates", [pytest.param("joint", marks=pytest.mark.slow), "alternating"])
def test_a_failure_before_the_first_update_of_a_step_is_discarded_on_both_ranks(turns, updates):
    printed, saved, step = fail(turns, updates, "critic@4@nan")
    assert "critic: on rank 1 its loss is nan" in printed
    assert "the run stands at step 3" in printed
    assert (saved[-1], step) == (3, 3)
    # The saved state is that of a run without the failure.
    turns.run_on(2, *ARGUMENTS, f"updates={updates}", "trainer.save_every=1", "hydra.run.dir=whole")
    assert_same_parts(turns.folder / "run", turns.folder / "whole", 3)


def test_of_joint_engines_the_failure_of_one_that_is_trained_in_some_steps_is_discarded(turns):
    printed, saved, _ = fail(turns, "joint", "generator@2@bug")  # in step 4, the second in which it is trained
    assert "the feeder's own mistake" in printed
    assert saved[-1] == 3


@pytest.mark.parametrize("failure", ["nan", pytest.param("bug", marks=pytest.mark.slow)])
def test_a_failure_after_an_update_of_the_step_ends_the_run_without_a_save(turns, failure):
    printed, saved, step = fail(turns, "alternating", f"generator@2@{failure}")
    assert "Its update was under way: go on from the last checkpoint" in printed
    assert (saved[-1], step) == (2, 3)  # of three completed steps, the first two were saved
