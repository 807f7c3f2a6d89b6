"""`data.eval` with several named datasets."""

import re
import subprocess
import sys

import pytest
from conftest import read_metrics

ONE, OTHER = "{_target_: own.Data, length: 20}", "{_target_: own.Data, length: 13}"
NAMED = f"{{near: {ONE}, far: {OTHER}}}"


def name_datasets(project, value=NAMED):
    """Replaces the one dataset of the experiment, and has the model draw in its forward."""
    path = project.folder / "conf" / "experiment" / "mine.yaml"
    text = re.sub(r"  eval: .*", f"  eval: {value}", path.read_text())
    path.write_text(text.replace("own.Model", "own.Drawing"))


def evaluations(folder):
    return [line for line in read_metrics(folder) if any(name.startswith("eval/") for name in line)]


def numbers_of(line, dataset):
    prefix = f"eval/{dataset}/"
    return {name.removeprefix(prefix): value for name, value in line.items() if name.startswith(prefix)}


def test_each_dataset_has_its_numbers_and_report_and_the_first_loss_is_the_metric_of_the_best(project):
    name_datasets(project)
    project.run("hydra.run.dir=run", "trainer.keep_best=1")
    for line in evaluations(project.folder / "run"):
        assert numbers_of(line, "near").keys() == numbers_of(line, "far").keys() == {"loss", "error", "number"}
        assert (numbers_of(line, "near")["number"], numbers_of(line, "far")["number"]) == (20, 13)
    assert '"eval/near/loss"' in (project.folder / "run" / "run.json").read_text()
    printed = project.run("trainer.best_metric=eval/for/loss", status=2)
    assert "trainer.best_metric=eval/for/loss: was not evaluated; there are: eval/near/loss" in printed


def test_the_numbers_of_a_dataset_do_not_depend_on_the_other_datasets(project):
    name_datasets(project)
    project.run("hydra.run.dir=both")
    project.run("data.eval.near=null", "hydra.run.dir=far")
    both, far = evaluations(project.folder / "both"), evaluations(project.folder / "far")
    assert [numbers_of(line, "far") for line in both] == [numbers_of(line, "far") for line in far]


def test_runner_evaluate_gives_the_numbers_of_the_run(project):
    name_datasets(project)
    project.run("hydra.run.dir=run")
    command = [sys.executable, "-m", "runner.evaluate", "run", "--allow-targets", "own"]
    done = subprocess.run(command, cwd=project.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split() for line in done.stdout.splitlines() if line.startswith("eval/") and " " in line)
    last = evaluations(project.folder / "run")[-1]
    assert {name: float(value) for name, value in printed.items()} == {
        name: value for name, value in last.items() if name.startswith("eval/")
    }


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        ("{}", "data.eval={}: expected one dataset with _target_, or datasets by name"),
        ("{near: null}", "data.eval={}: expected one dataset with _target_, or datasets by name"),
        ("{near: 3}", "data.eval.near=3: expected one dataset with _target_, or datasets by name"),
        ("{a/b: {_target_: own.Data}}", "data.eval.a/b: expected a name of letters, digits"),
        ("{near: {length: 3}}", "data.eval.near: expected a mapping with _target_"),
        ("{near: {_target_: own.Data, size: 3}}", "data.eval.near.size: own.Data takes no such argument"),
        ("{_target_: own.Data, far: {_target_: own.Data}}", "data.eval: expected one dataset, found far; join them"),
        ("{near: {far: {_target_: own.Data}}}", "data.eval.near: expected one dataset, found far; join them"),
    ],
)
def test_a_mistake_in_the_datasets_is_told_before_the_run(project, value, expected):
    name_datasets(project, value)
    assert expected in project.run(status=2)


def test_a_null_target_removes_the_one_dataset_that_the_names_are_merged_with(project):
    named = ["data.eval._target_=null", "data.eval.length=null", f"+data.eval.far={OTHER}"]
    project.run(*named, "hydra.run.dir=run")
    assert numbers_of(evaluations(project.folder / "run")[0], "far").keys() == {"loss", "error", "number"}
