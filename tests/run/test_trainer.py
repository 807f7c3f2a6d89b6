import json

import pytest
from conftest import read_metrics, shared_zygote
from ranks import Ranks

from runner.utils import io


def evaluations(run):
    return [line["step"] for line in read_metrics(run) if "eval/loss" in line]


def test_eval_every_0_leaves_out_every_evaluation_but_a_typed_one(project):
    settings = ["trainer.eval_every=0", "trainer.export_every=6", "trainer.steps=6"]
    project.run("hydra.run.dir=run", *settings, "trainer.eval_at_start=true")
    assert evaluations(project.folder / "run") == []
    assert json.loads((project.folder / "run" / "run.json").read_text())["best"] is None
    facts = io.read_metadata(project.folder / "run" / "exports" / "model.safetensors")
    assert json.loads(facts["metrics"]) == {"best": None, "evaluation": None}
    project.run("hydra.run.dir=typed", *settings, typed="eval@3\n")
    assert evaluations(project.folder / "typed") == [3]
    (numbers,) = [line for line in read_metrics(project.folder / "typed") if "eval/loss" in line]
    assert json.loads((project.folder / "typed" / "run.json").read_text())["best"]["value"] == numbers["eval/loss"]


def test_the_best_of_no_evaluations_is_refused(project):
    printed = project.run("hydra.run.dir=run", "trainer.eval_every=0", "trainer.keep_best=2", status=2)
    assert printed.startswith("trainer.keep_best=2: trainer.eval_every=0 evaluates nothing that could be best; set")
    assert printed.count("\n") == 1
    assert not (project.folder / "run").exists()


@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("key", ["trainer.best_metric", "scheduler.metric"])
def test_a_metric_that_the_evaluation_at_start_lacks_is_told_once_and_nothing_was_done(project, count, key):
    wrong = ["hydra.run.dir=run", f"{key}=eval/nope"]
    if key == "scheduler.metric":
        wrong += ["scheduler=plateau", "~scheduler.warmup_steps"]
    if count == 1:
        printed = project.run(*wrong, status=2)
    else:
        wrong += ["distributed=ddp", "distributed.device=cpu"]
        printed = Ranks(shared_zygote()).run(project.folder, count, *project.command[3:], *wrong, status=2)
    told = {
        "trainer.best_metric": "was not evaluated; there are: eval/loss, eval/error, eval/number",
        "scheduler.metric": "expected one of eval/error, eval/loss, eval/number",
    }[key]
    assert printed.count(f"{key}=eval/nope: {told}") == 1
    assert "Traceback" not in printed
    assert printed.count("error: ") == 0
    assert not (project.folder / "run").exists()


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_best_metric_that_a_later_evaluation_lacks_ends_the_run_with_its_steps_saved(project, count):
    settings = ["trainer.eval_at_start=false", "trainer.save_every=0", "trainer.export_every=0", "trainer.keep_best=1"]
    project.run("hydra.run.dir=whole", *settings)
    wrong = ["hydra.run.dir=run", *settings, "trainer.best_metric=eval/nope"]
    if count == 1:
        printed = project.run(*wrong, status=1)
    else:
        ranks = ["distributed=ddp", "distributed.device=cpu"]
        printed = Ranks(shared_zygote()).run(project.folder, count, *project.command[3:], *wrong, *ranks, status=1)
    assert printed.count("trainer.best_metric=eval/nope: was not evaluated; there are: eval/loss, eval/error") == 1
    assert "Traceback" not in printed
    assert [path.name for path in (project.folder / "run" / "checkpoints").glob("step_*")] == ["step_00000006"]
    project.run("resume=run", "trainer.best_metric=null", *(["distributed=single"] if count == 2 else []))
    whole, resumed = (read_metrics(project.folder / run) for run in ("whole", "run"))
    assert evaluations(project.folder / "run") == evaluations(project.folder / "whole") == [6, 12]
    if count == 1:
        assert [line.get("train/loss") for line in resumed] == [line.get("train/loss") for line in whole]
        assert [line.get("eval/loss") for line in resumed] == [line.get("eval/loss") for line in whole]


def test_an_evaluation_is_printed_with_significant_digits(project):
    own = project.folder / "own.py"
    own.write_text(
        own.read_text() + "\n\ndef tell(module, dataset):\n    return {'a': 3e-6, 'b': 20, 'c': 0.5, 'd': 1e999}\n"
    )
    printed = project.run("report._target_=own.tell", "trainer.steps=1", "trainer.eval_at_start=false")
    assert "eval/a 3e-6, eval/b 20, eval/c 0.5, eval/d inf\n" in printed


RECORDS_STACK = """

import traceback
import runner


class RecordsStack(Model):
    def forward(self, x, y):
        if self.training:
            package = os.path.dirname(runner.__file__) + os.sep
            frames = [frame for frame in traceback.extract_stack() if frame.filename.startswith(package)]
            names = [f"{frame.filename.removeprefix(package)}:{frame.name}" for frame in frames]
            with open(f"stack_{os.environ.get('RANK', 'alone')}.txt", "a") as file:
                print(*names, file=file)
        return super().forward(x, y)
"""


@pytest.mark.parametrize(
    ("overrides", "entry", "files"),
    [
        ((), "__main__.py:main", ["stack_alone.txt"]),
        (
            ("distributed=ddp", "distributed.nproc_per_node=2"),
            "launch/worker.py:run_and_exit",
            ["stack_0.txt", "stack_1.txt"],
        ),
    ],
    ids=["one process", "two ranks"],
)
def test_at_most_12_frames_of_the_runner_are_between_its_entry_and_a_users_module(project, overrides, entry, files):
    with (project.folder / "own.py").open("a") as file:
        file.write(RECORDS_STACK)
    project.run_afresh("model._target_=own.RecordsStack", "trainer.steps=2", "distributed.device=cpu", *overrides)
    assert sorted(path.name for path in project.folder.glob("stack_*.txt")) == files
    for name in files:
        stacks = [line.split() for line in (project.folder / name).read_text().splitlines()]
        assert len(stacks) == 2
        for stack in stacks:
            assert len(stack[stack.index(entry) + 1 :]) <= 12, stack
