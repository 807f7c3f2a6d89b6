import json

import pytest
from conftest import read_metrics
from own_callbacks import add_callbacks
from run_comparison import assert_same_run

from runner.callbacks.early_stopping import EarlyStopping
from runner.callbacks.group import CallbackGroup
from runner.utils.train.failures import SetupError, TrainingStopped


class View:
    """The part of a `RunView` that early stopping reads."""

    def __init__(self):
        self.step = 0
        self.reasons = []

    def enter(self, name, hook):
        pass

    def request_stop(self, reason):
        self.reasons.append(reason)


def evaluations_until_stop(callback, values):
    """Returns the number of evaluations after which the callback requests a stop, or None."""
    view = View()
    callback.on_start(view)
    for number, value in enumerate(values, 1):
        view.step = number
        callback.on_evaluate(view, {"eval/loss": value})
        if view.reasons:
            return number
    return None


NAN = float("nan")


@pytest.mark.parametrize(
    ("arguments", "values", "stops_after"),
    [
        ({"patience": 2}, [5, 4, 4, 3, 3, 3], 6),  # equal is no improvement, and 3 resets the count
        ({"patience": 2}, [5, 4, 3, 2, 1], None),
        ({"patience": 1}, [5, 6], 2),
        ({"patience": 2, "min_delta": 0.5}, [5, 4.6, 4.4, 4.1, 4.0], 5),  # 4.4 improves on 5, 4.0 does not on 4.4
        ({"patience": 2, "min_delta": 0.5}, [5, 4.5, 4.5], 3),  # a difference of min_delta is not enough
        ({"patience": 2, "mode": "max"}, [1, 2, 3, 3, 2], 5),
        ({"patience": 2}, [NAN, NAN], 2),
        ({"patience": 2}, [NAN, 5, NAN, NAN], 4),
        ({"patience": 2}, [5, NAN, 4, 3], None),
        ({"patience": 2, "mode": "max"}, [float("-inf"), 1, 2], None),
    ],
)
def test_the_run_stops_after_patience_evaluations_without_an_improvement(arguments, values, stops_after):
    assert evaluations_until_stop(EarlyStopping(**arguments), values) == stops_after


@pytest.mark.parametrize("cut", range(1, 6))
def test_a_state_in_the_middle_continues_the_count(cut):
    values = [5, 4, 4, 3, 3, 3]
    first, second = EarlyStopping(patience=2), EarlyStopping(patience=2)
    assert evaluations_until_stop(first, values[:cut]) is None
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    view = View()
    view.step = cut
    second.on_evaluate(view, {"eval/loss": values[cut - 1]})  # repeated after an interruption: not counted again
    for number in range(cut, len(values)):
        assert view.reasons == []
        view.step = number + 1
        second.on_evaluate(view, {"eval/loss": values[number]})
    assert view.reasons == ["eval/loss has not improved in 2 evaluations; its best is 3 at step 4"]


def test_a_state_of_another_metric_starts_anew():
    stopped = EarlyStopping(patience=1)
    assert evaluations_until_stop(stopped, [1, 2]) == 2
    for other in (EarlyStopping("eval/error", patience=1), EarlyStopping(mode="max", patience=1)):
        other.load_state_dict(stopped.state_dict())
        view = View()
        other.on_start(view)
        assert view.reasons == []


@pytest.mark.parametrize(
    "arguments", [{"metric": None}, {"patience": 0}, {"mode": "best"}, {"min_delta": -1}, {"min_delta": NAN}]
)
def test_an_argument_out_of_its_range_is_an_error(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        EarlyStopping(**arguments)


def test_a_metric_that_is_not_evaluated_is_named_with_the_nearest_one():
    view, group = View(), CallbackGroup({"early_stopping": EarlyStopping("eval/los")})
    group.call("on_start", view)
    with pytest.raises(SetupError, match=r"callbacks.early_stopping: metric=eval/los: .*did you mean eval/loss\?"):
        group.call("on_evaluate", view, {"eval/loss": 1.0})
    view.step, group = 1, CallbackGroup({"early_stopping": EarlyStopping("eval/los")})
    with pytest.raises(TrainingStopped, match="resume with the right name"):
        group.call("on_evaluate", view, {"eval/loss": 1.0})


STOPS = ["callbacks=[early_stopping]", "callbacks.early_stopping.metric=eval/score"]
STOPS += ["callbacks.early_stopping.mode=max", "callbacks.early_stopping.patience=2", "model={_target_: own.Peaks}"]
STOPS += ["trainer.eval_every=2", "trainer.export_every=100", "trainer.steps=40"]


def record_of(run):
    return json.loads((run / "run.json").read_text())


def steps_of(run):
    return [line["step"] for line in read_metrics(run) if "train/loss" in line]


def test_a_stopped_run_is_finished_with_the_last_steps_actions_and_goes_on_with_more_patience_alone(project):
    add_callbacks(project)
    printed = project.run(*STOPS, "hydra.run.dir=run")
    run = project.folder / "run"
    reason = "callbacks.early_stopping: eval/score has not improved in 2 evaluations; its best is 0 at step 6"
    assert (record_of(run)["status"], record_of(run)["reason"]) == ("finished", reason)
    assert reason in printed
    assert steps_of(run) == [*range(1, 11)]
    assert (run / "checkpoints" / "step_00000010").is_dir()
    assert (run / "exports" / "model.safetensors").is_file()
    before = (run / "metrics.jsonl").read_bytes()
    assert reason in project.run("resume=run")
    assert (run / "metrics.jsonl").read_bytes() == before
    project.run("resume=run", "callbacks.early_stopping.patience=3")
    project.run(*STOPS, "callbacks.early_stopping.patience=3", "hydra.run.dir=patient")
    assert steps_of(run) == [*range(1, 13)]
    assert_same_run(run, project.folder / "patient", 12)


@pytest.mark.parametrize("step", [pytest.param(7, marks=pytest.mark.slow), 8, pytest.param(9, marks=pytest.mark.slow)])
def test_an_interrupted_run_stops_at_the_same_step_with_the_same_bits(project, step):
    add_callbacks(project)
    project.run(*STOPS, "hydra.run.dir=whole")
    project.run(*STOPS, "tracking.stdin=true", "hydra.run.dir=cut", typed=f"quit@{step}\n")
    project.run("resume=cut", "tracking.stdin=false")
    assert_same_run(project.folder / "cut", project.folder / "whole", 10)


def test_two_ranks_stop_at_the_step_of_one_process(project):
    add_callbacks(project)
    project.run(*STOPS, "distributed=ddp", "distributed.nproc_per_node=2", "hydra.run.dir=run", forks_workers=True)
    assert steps_of(project.folder / "run") == [*range(1, 11)]
    assert record_of(project.folder / "run")["status"] == "finished"
