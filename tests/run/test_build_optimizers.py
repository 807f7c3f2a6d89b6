"""Optimizers and schedules of other libraries, composed from YAML alone: they train and resume, or are refused."""

import pytest
from conftest import read_metrics

OPTIMIZERS = '''

class Walks(torch.optim.SGD):
    """Looks at its parameters before it hands them on."""

    def __init__(self, params, lr=0.01):
        params = list(params)
        self.num_elements = sum(p.numel() for p in params)
        super().__init__(params, lr=lr)


class Keeps(torch.optim.SGD):
    """Keeps its parameters for its steps."""

    def __init__(self, params, lr=0.01):
        self.kept = list(params)
        super().__init__(self.kept, lr=lr)

    def step(self, closure=None):
        for parameter in self.kept:
            parameter.data.sub_(parameter.grad, alpha=self.param_groups[0]["lr"])


class Named(torch.optim.SGD):
    """Wants names."""

    def __init__(self, named, lr=0.01):
        super().__init__([p for name, p in named if name.endswith(("weight", "bias"))], lr=lr)


def by_kind(named, lr=0.01):
    named = list(named)
    matrices, vectors = [p for _, p in named if p.ndim > 1], [p for _, p in named if p.ndim < 2]
    return torch.optim.AdamW([{"params": matrices}, {"params": vectors, "weight_decay": 0.0}], lr=lr)


def walks(params, lr=0.01):
    params = list(params)
    assert sum(p.numel() for p in params)
    return torch.optim.SGD(params, lr=lr)


class Broken(torch.optim.SGD):
    def __init__(self, params, lr=0.01):
        raise ValueError(f"it can't be: {type(list(params)[0]).__name__}")
'''
PLATEAU = """
_target_: torch.optim.lr_scheduler.ReduceLROnPlateau
factor: 0.5
patience: 0
threshold: 0.5
metric: eval/loss
"""
CHAINED = """
_target_: torch.optim.lr_scheduler.ChainedScheduler
schedulers:
- {_target_: torch.optim.lr_scheduler.LinearLR, start_factor: 0.5, total_iters: 4}
- _target_: torch.optim.lr_scheduler.SequentialLR
  schedulers:
  - {_target_: torch.optim.lr_scheduler.ConstantLR, factor: 1.0}
  - {_target_: torch.optim.lr_scheduler.CosineAnnealingLR, T_max: "${trainer.steps}"}
  milestones: [2]
"""


@pytest.fixture
def own(project):
    """A project with optimizers and schedules of its own."""
    with (project.folder / "own.py").open("a") as file:
        file.write(OPTIMIZERS)
    for group, choices in {
        "optimizer": {name: f"_target_: own.{name}\nlr: 0.01\n" for name in ("Walks", "Keeps", "Named", "by_kind")},
        "scheduler": {"own_plateau": PLATEAU, "chained": CHAINED},
    }.items():
        (project.folder / "conf" / group).mkdir()
        for name, text in choices.items():
            (project.folder / "conf" / group / f"{name}.yaml").write_text(text)
    for name in ("walks", "Broken"):
        (project.folder / "conf" / "optimizer" / f"{name}.yaml").write_text(f"_target_: own.{name}\n")
    experiment = project.folder / "conf" / "experiment" / "mine.yaml"
    experiment.write_text(experiment.read_text().replace("optimizer: {lr: 1.0e-2}\nscheduler: {warmup_steps: 3}\n", ""))
    return project


def rates(project, name):
    return {line["step"]: line["train/lr"] for line in read_metrics(project.folder / name) if "train/lr" in line}


@pytest.mark.parametrize("choice", ["Walks", "Keeps", "Named", "by_kind", "walks"])
def test_an_optimizer_is_given_its_parameters_in_the_form_that_it_takes(own, choice):
    own.run(f"optimizer={choice}", "scheduler=constant", "trainer.steps=2", "trainer.eval_every=0")


def test_an_optimizer_that_takes_neither_form_is_refused_with_both_mistakes(own):
    printed = own.run("optimizer=Broken", "scheduler=constant", status=2)
    expected = ["it can't be: tuple, given (name, parameter) pairs", "it can't be: Parameter, given parameters"]
    assert printed.splitlines()[-2:] == [f"optimizer: {each}" for each in expected]


@pytest.mark.slow
def test_schedules_made_of_others_are_composed_and_take_a_longer_run(own):
    own.run("scheduler=chained", "hydra.run.dir=whole")
    own.run("scheduler=chained", "hydra.run.dir=cut", "trainer.steps=5")
    own.run("resume=cut", "trainer.steps=12")
    assert rates(own, "cut").keys() == rates(own, "whole").keys()
    found = {step: rate for step, rate in rates(own, "cut").items() if step > 5}
    assert found == {step: rate for step, rate in rates(own, "whole").items() if step > 5}


@pytest.mark.slow
def test_a_plateau_follows_the_evaluations_through_a_resume_and_a_misspelt_metric_loses_no_step(own):
    chosen = ["scheduler=own_plateau", "trainer.eval_every=2", "trainer.eval_at_start=false"]
    own.run(*chosen, "hydra.run.dir=whole")
    printed = own.run(*chosen, "hydra.run.dir=cut", "scheduler.metric=eval/acc", status=1)
    assert "scheduler.metric=eval/acc: expected one of eval/error, eval/loss, eval/number" in printed
    printed = own.run("resume=cut", "scheduler.metric=eval/loss", "trainer.steps=5", typed="eval@3\n")
    assert "Going on after step 2" in printed
    own.run("resume=cut", "trainer.steps=12", typed="quit@7\n")
    own.run("resume=cut")
    assert rates(own, "cut") == rates(own, "whole")
    assert len(set(rates(own, "whole").values())) > 3


def test_a_schedule_that_needs_a_metric_of_evaluations_that_are_switched_off_is_refused(own):
    printed = own.run("scheduler=own_plateau", "trainer.eval_every=0", status=2)
    assert "scheduler.metric=eval/loss: expected evaluations that measure it, found none; set trainer.eval" in printed
    printed = own.run("scheduler=own_plateau", "scheduler.metric=null", status=2)
    assert "scheduler: ReduceLROnPlateau.step needs metrics: " in printed


def test_an_optimizer_that_averages_refuses_a_rate_that_falls(own):
    printed = own.run("optimizer=schedulefree", "trainer.steps=60", status=2)
    assert "scheduler: expected a rate that doesn't fall, as AdamWScheduleFree averages" in printed
    assert "found LambdaLR, whose rate has fallen by step " in printed


NO_DECAY = '''

class NoDecay(torch.optim.AdamW):
    """Finds by name the parameters that are not to decay."""

    def __init__(self, params, lr=0.01):
        super().__init__(params, lr=lr)
        names = [name for group in self.param_groups for name in group["param_names"]]
        assert any(name.endswith("bias") for name in names)
'''


def test_an_optimizer_class_is_given_the_names_of_its_parameters(own):
    with (own.folder / "own.py").open("a") as file:
        file.write(NO_DECAY)
    (own.folder / "conf" / "optimizer" / "no_decay.yaml").write_text("_target_: own.NoDecay\n")
    own.run("optimizer=no_decay", "scheduler=constant", "trainer.steps=2", "trainer.eval_every=0")
