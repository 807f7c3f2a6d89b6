"""Runs under Slurm, if it is installed (Debian: slurmctld, slurmd, munge), and under submitit's local executor."""

import json
import time

import pytest
import slurm
from conftest import read_metrics

needs_slurm = pytest.mark.skipif(not slurm.is_installed(), reason="needs root, and slurmctld, slurmd and munged")


@pytest.fixture(scope="module")
def cluster():
    started = slurm.Slurm()
    yield started
    started.close()


@pytest.mark.slow
@needs_slurm
def test_srun_starts_the_ranks_of_one_run(project, cluster):
    printed = cluster.run(
        "srun", "-n", "2", *project.command, "distributed=ddp", "hydra.run.dir=run", cwd=project.folder
    )
    record = json.loads((project.folder / "run" / "run.json").read_text())
    assert (record["status"], record["ranks"]) == ("finished", 2), printed
    assert not (project.folder / "outputs").exists()


@pytest.mark.slow
@needs_slurm
def test_a_preempted_job_is_requeued_and_resumes_in_its_folder(project, cluster):
    sweep = [
        "-m", "hydra/launcher=submitit_slurm", "+hydra.launcher.additional_parameters={requeue: true}",
        "hydra.launcher.timeout_min=60", "hydra.sweep.dir=sweep", "distributed=ddp", "distributed.nproc_per_node=2",
        "+data.train.sleep_s=0.02", "trainer.steps=60",
    ]  # fmt: skip
    process = project.start_afresh(*sweep, environment=cluster.environment)
    deadline = time.monotonic() + 120
    while not any(b'"step": 9,' in path.read_bytes() for path in project.folder.glob("sweep/*/metrics.jsonl")):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    job = cluster.run("squeue", "-h", "-o", "%i").split()[0]
    cluster.run("scancel", "--signal=USR2", job)
    process.communicate(timeout=120)
    (run,) = (path for path in (project.folder / "sweep").glob("0-*"))
    sessions = json.loads((run / "run.json").read_text())["sessions"]
    assert [session["status"] for session in sessions] == ["preempted", "finished"]
    assert [line["step"] for line in read_metrics(run) if "train/loss" in line] == list(range(1, 61))


@pytest.mark.slow
def test_the_local_executor_of_submitit_runs_a_sweep(project):
    project.run("-m", "hydra/launcher=submitit_local", "hydra.sweep.dir=sweep", "seed=1,2")
    for job in (project.folder / "sweep").glob("[01]-*"):
        assert json.loads((job / "run.json").read_text())["status"] == "finished"
    assert len(list((project.folder / "sweep").glob("[01]-*"))) == 2


def test_a_requeued_job_resumes(project, monkeypatch):
    project.run("hydra.run.dir=run", typed="quit@6\n")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    printed = project.run("hydra.run.dir=run")
    assert "Going on after step 6" in printed
    assert [line["step"] for line in read_metrics(project.folder / "run") if "train/loss" in line] == list(range(1, 13))


def test_the_same_sweep_in_the_same_folder_resumes_its_jobs(project):
    sweep = ("-m", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=job", "seed=1")
    project.run(*sweep, typed="quit@6\n")
    assert "Going on after step 6" in project.run(*sweep)
    assert "holds another run already" in project.run(*sweep, "optimizer.lr=0.5", status=2)
