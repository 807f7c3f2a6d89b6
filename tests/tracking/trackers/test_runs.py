"""Runs with trackers: chosen by config, cut and resumed, interrupted, with trackers of the user's own."""

import csv
import json
import signal
import subprocess
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

TIMED = ("time_s", "train/step_time_s", "train/samples_per_s", "train/tokens_per_s", "train/memory_gb")
OWN = """
import json, os, time

class Writer:
    truncates = False
    def __init__(self, path):
        self.path = path
    def log(self, step, time_s, numbers):
        with open(self.path, "a") as file:
            file.write(json.dumps([os.environ.get("RANK", "0"), step, sorted(numbers)]) + chr(10))

class Hanging:
    timeout_s = 0.3
    def log(self, step, time_s, numbers):
        time.sleep(1000)

class Failing:
    remedy = "ask the admin"
    def open(self, run):
        raise ConnectionError("no route to " + run.name)
    def log(self, step, time_s, numbers): ...

class NoTracker:
    pass
"""


@pytest.fixture
def with_trackers(project):
    """A project with trackers of its own."""
    (project.folder / "own_trackers.py").write_text(OWN)
    (project.folder / "conf" / "trackers").mkdir()
    nodes = {"writer": "Writer, path: written.txt", "hanging": "Hanging", "failing": "Failing", "nothing": "NoTracker"}
    for name, node in nodes.items():
        text = f"# @package trackers\n{name}: {{_target_: own_trackers.{node}}}\n"
        (project.folder / "conf" / "trackers" / f"{name}.yaml").write_text(text)
    return project


def read_csv(folder):
    with open(folder / "metrics.csv", newline="") as file:
        return [{name: x for name, x in row.items() if name not in TIMED} for row in csv.DictReader(file)]


def steps_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def has_events(folder):
    return any(folder.glob("events.out.*"))


def test_a_run_cut_and_resumed_leaves_the_csv_of_the_uninterrupted_one(project):
    chosen = "trackers=[jsonl,csv]"
    project.run(chosen, "hydra.run.dir=whole")
    project.run(chosen, "hydra.run.dir=cut", typed="quit@6\n")
    project.run("resume=cut/checkpoints/step_00000004")  # which repeats steps, and the command
    assert [row["step"] for row in read_csv(project.folder / "cut")] == [str(step) for step in range(7)]
    project.run("resume=cut")
    rows = read_csv(project.folder / "whole")
    assert [row["step"] for row in rows] == [str(step) for step in range(13)]
    assert read_csv(project.folder / "cut") == rows
    lines = [json.loads(line) for line in (project.folder / "whole" / "metrics.jsonl").read_text().splitlines()]
    losses = {str(line["step"]): line["train/loss"] for line in lines if "train/loss" in line}
    assert {row["step"]: float(row["train/loss"]) for row in rows if row["train/loss"]} == losses
    assert not has_events(project.folder / "cut")


def test_trackers_of_the_users_own_cost_a_run_nothing_but_a_warning(with_trackers):
    printed = with_trackers.run("trackers=[jsonl,writer,hanging,failing]", "hydra.run.dir=run")
    warnings = [line for line in printed.splitlines() if "trackers." in line]
    assert len(warnings) == 2
    assert any("trackers.hanging: has not ended after 0.3 s" in line for line in warnings)
    assert any(
        "trackers.failing: ConnectionError: no route to mine; the run goes on without it" in line
        and line.endswith("ask the admin")
        for line in warnings
    )
    written = [json.loads(line) for line in (with_trackers.folder / "written.txt").read_text().splitlines()]
    assert [step for _, step, _ in written] == steps_of(with_trackers.folder / "run")
    assert json.loads((with_trackers.folder / "run" / "run.json").read_text())["status"] == "finished"


@pytest.mark.slow
def test_only_rank_zero_has_trackers(with_trackers):
    options = ["distributed=ddp", "distributed.nproc_per_node=2", "distributed.device=cpu", "trainer.steps=4"]
    with_trackers.run("trackers=[jsonl,writer]", "hydra.run.dir=run", *options, forks_workers=True)
    written = [json.loads(line) for line in (with_trackers.folder / "written.txt").read_text().splitlines()]
    assert {rank for rank, _, _ in written} == {"0"}
    assert [step for _, step, _ in written] == steps_of(with_trackers.folder / "run")


def test_an_object_that_is_no_tracker_is_named_before_the_run(with_trackers):
    printed = with_trackers.run("trackers=[jsonl,nothing]", "hydra.run.dir=run", status=2)
    assert "trackers.nothing: expected an object with log(step, time_s, numbers), found NoTracker" in printed
    assert not (with_trackers.folder / "run").exists()
    printed = with_trackers.run("+trackers.wandb={_target_: own_trackers.Writer, pth: x}", status=2)
    assert "trackers.wandb.pth: own_trackers.Writer takes no such argument; did you mean path?" in printed


@pytest.mark.parametrize(
    ("overrides", "kinds"),
    [
        ([], "le"),
        (["tracking=silent"], ""),
        (["tracking=silent", "tracking.jsonl=true"], "l"),
        (["tracking.tensorboard=false"], "l"),
        (["trackers=[]"], ""),
        (["trackers=[tensorboard]", "tracking.jsonl=true"], "e"),
        (["trackers.jsonl=null"], "e"),
    ],
)
def test_switches_and_choices_decide_what_is_written(project, overrides, kinds):
    project.run("hydra.run.dir=run", "trainer.steps=1", "trainer.eval_every=0", *overrides)
    run = project.folder / "run"
    assert ((run / "metrics.jsonl").exists(), has_events(run)) == ("l" in kinds, "e" in kinds)


@pytest.mark.parametrize("has_tensorboard", [True, False])
def test_the_run_of_an_earlier_version_keeps_its_outputs(trained, has_tensorboard):
    run = trained.folder / "run"
    for path in run.glob("events.out.*") if not has_tensorboard else ():
        path.unlink()
    config = OmegaConf.load(run / ".hydra" / "config.yaml")
    del config.trackers
    config.tracking = {"tensorboard": has_tensorboard, "jsonl": True, "progress": False, "stdin": False}
    OmegaConf.save(config, run / ".hydra" / "config.yaml")
    printed = trained.run("resume=run", "sign=true", "trainer.steps=13")
    assert "->" in printed  # the steps
    assert "track" not in printed
    assert steps_of(run)[-1] == 13
    assert has_events(run) == has_tensorboard
    assert trained.run("resume=run", "trackers=[csv]", "trainer.steps=14", status=(0,))
    assert (run / "metrics.csv").exists()
    assert steps_of(run)[-1] == 13


@pytest.mark.slow
def test_ctrl_c_with_wandb_ends_as_without_it_and_leaves_no_process(project):
    pytest.importorskip("wandb")
    quiet = {"WANDB_MODE": "offline", "WANDB_ERROR_REPORTING": "false", "TQDM_DISABLE": "1"}
    process = project.start_afresh(
        "trackers=[jsonl,wandb]", "hydra.run.dir=run", "trainer.steps=100000", "trainer.eval_every=0",
        "trainer.save_every=0", environment=quiet, start_new_session=True,
    )  # fmt: skip
    run, end = project.folder / "run", time.monotonic() + 60
    while not [*run.glob("wandb/offline-run-*/*.wandb")]:
        assert time.monotonic() < end
        assert process.poll() is None, process.communicate()[0]
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130, printed
    record = json.loads((run / "run.json").read_text())
    assert record["status"] == "interrupted"
    (folder,) = run.glob("wandb/offline-run-*")
    assert folder.name.endswith(f"-{record['id']}")
    processes = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True, check=True).stdout
    assert f"--pid {process.pid}" not in processes
    assert Path(run / "checkpoints").exists()
