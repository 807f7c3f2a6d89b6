"""`python -m runner distributed=ddp` with workers of its own: deaths, restarts, signals, sweeps."""

import json
import os
import re
import signal
import socket
import stat
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from chaos import TIMES, find_difference
from conftest import Project, read_metrics
from processes import descendants_of, is_running, wait_for_end, workers_of
from sockets import RENAMED, exposed, listening
from specs import make_spec
from waiting import wait_for_content

from runner.checkpoint import checkpoints
from runner.config.errors import ConfigError
from runner.launch import elastic, worker
from runner.launch.environment import ProcessEnvironment
from runner.launch.job import Job

DDP = ("distributed=ddp", "distributed.nproc_per_node=2", "hydra.run.dir=run")
STEPS = 40
LONG = ("+data.train.sleep_s=0.002", f"trainer.steps={STEPS}", "trainer.save_every=10", "trainer.eval_every=20")


@pytest.mark.parametrize(("device", "wanted", "expected"), [("cuda:0", 2, 2), ("cuda", "auto", 1), ("cpu", 3, 3)])
def test_ranks_share_an_accelerator_that_is_named(device, wanted, expected, monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    settings = SimpleNamespace(device=device, nproc_per_node=wanted, strategy={})
    assert elastic.count_workers(settings) == expected


def test_more_ranks_than_accelerators_are_refused_with_the_remedies(monkeypatch):
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: True)
    monkeypatch.setattr(torch.accelerator, "device_count", lambda: 1)
    with pytest.raises(ConfigError, match=r"this machine has 1 accelerators.*device=cuda:0; or.*device=cpu"):
        elastic.count_workers(SimpleNamespace(device="auto", nproc_per_node=2, strategy={}))


def test_ranks_that_share_a_gpu_meet_through_gloo(monkeypatch):
    """nccl refuses two ranks on one GPU."""
    monkeypatch.setattr("runner.utils.distributed.pick_device", lambda name, rank: torch.device("cuda", 0))
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: None)
    place = ProcessEnvironment(world_size=2, local_world_size=2)
    chosen = {}
    for device in ("cuda:0", "cuda", "auto"):
        chosen[device] = worker._pick_backend(SimpleNamespace(device=device, backend="auto"), place)
    assert chosen == {"cuda:0": "gloo", "cuda": "nccl", "auto": "nccl"}


def content(run, step):
    lines = [{k: v for k, v in line.items() if k not in TIMES} for line in read_metrics(run)]
    return checkpoints.load(run / "checkpoints" / f"step_{step:08d}"), lines


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    project = Project(tmp_path_factory.mktemp("whole"))
    project.run(*DDP[:2], *LONG, "hydra.run.dir=whole", forks_workers=True)
    return content(project.folder / "whole", STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "step"), [(0, 25), (1, 5)])
def test_a_killed_worker_starts_all_again_and_the_run_is_the_undisturbed_one(project, whole, rank, step):
    process = project.start(*DDP, *LONG, forks_workers=rank == 1)  # the others are started as a user's
    run = project.folder / "run"
    wait_for_content(run / "metrics.jsonl", b'"step": %d,' % step)
    os.kill(workers_of(process.pid)[rank], signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert find_difference(content(run, STEPS), whole) is None
    assert [session["status"] for session in json.loads((run / "run.json").read_text())["sessions"]][-1] == "finished"
    assert len(list(project.folder.glob("outputs/*"))) == 0


def test_no_restart_is_left_after_max_restarts_and_the_way_on_is_told(project):
    process = project.start(*DDP, *LONG, "distributed.max_restarts=0", forks_workers=True)
    wait_for_content(project.folder / "run" / "metrics.jsonl", b'"step": 15,')
    os.kill(workers_of(process.pid)[1], signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1
    assert re.search(r"rank 1 ended with SIGKILL, after 0 restarts; go on with resume=.*/run", printed)


@pytest.mark.slow
def test_a_run_folder_that_was_deleted_stays_deleted_where_the_workers_start_again(project):
    process = project.start(*DDP, *LONG, "trainer.steps=100000", forks_workers=True)
    run = project.folder / "run"
    wait_for_content(run / "metrics.jsonl", b'"step": 5,')
    workers = workers_of(process.pid)
    for pid in workers:
        os.kill(pid, signal.SIGSTOP)  # none of them finds out, and ends the run, before the other is killed
    run.rename(project.folder / "gone")
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 2, printed
    assert "run: can't be written to (No such file or directory)" in printed
    assert not run.exists()


def test_a_killed_launcher_leaves_no_worker_behind(project):
    process = project.start(*DDP, *LONG, "trainer.steps=100000", forks_workers=True)
    wait_for_content(project.folder / "run" / "metrics.jsonl", b'"step": 15,')
    pids = descendants_of(process.pid)
    assert len(pids) >= 2
    process.kill()
    process.wait()
    wait_for_end(pids)
    last = json.loads((project.folder / "run" / "run.json").read_text())
    assert (project.folder / "run" / "checkpoints" / f"step_{last['last_step']:08d}").is_dir()
    assert last["status"] == "preempted"


def test_a_worker_that_waits_for_the_store_of_a_killed_launcher_ends(tmp_path):
    job = Job(make_spec(rdzv_endpoint="node:29500"), tmp_path, {}, command=["runner"])
    (tmp_path / "job").write_bytes(job.encode())
    with socket.create_server(("127.0.0.1", 0)) as silent:
        names = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "TORCHELASTIC_USE_AGENT_STORE": "True"}
        environment = os.environ | names | {"MASTER_PORT": str(silent.getsockname()[1])}
        command = f'"{sys.executable}" -m runner.launch.worker "{tmp_path}" $$; true'  # a shell that does not become it
        launcher = subprocess.Popen(["sh", "-c", command], env=environment)
        silent.settimeout(60)
        connection, _ = silent.accept()
        (pid,) = descendants_of(launcher.pid)
        launcher.kill()
        launcher.wait()
        wait_for_end([pid], timeout_s=10)
        connection.close()


def test_the_rendezvous_of_a_job_changes_no_variable_for_the_next(tmp_path, monkeypatch):
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "eth7")
    monkeypatch.delenv("NCCL_SOCKET_IFNAME", raising=False)
    before = dict(os.environ)
    with elastic._unchanged_environment():
        elastic._make_file_rendezvous(tmp_path)
        assert os.environ["GLOO_SOCKET_IFNAME"] == "eth7"
        assert os.environ["NCCL_SOCKET_IFNAME"] in dict(socket.if_nameindex()).values()
    assert dict(os.environ) == before


@pytest.mark.parametrize(
    ("strategy", "host_name"), [("ddp", "192.0.2.7"), ("fsdp", "192.0.2.7"), ("ddp", "no-such-host.invalid")]
)
def test_no_process_listens_where_others_can_reach_it(project, strategy, host_name):
    with open(project.folder / "own.py", "a") as file:
        file.write(RENAMED.format(name=host_name))
    settings = [f"distributed={strategy}", *DDP[1:], *LONG, "trainer.steps=100000", "distributed.max_restarts=0"]
    process = project.start(*settings, forks_workers=True)
    wait_for_content(project.folder / "run" / "metrics.jsonl", b'"step": 2,')
    workers = workers_of(process.pid)
    pids = [process.pid, *descendants_of(process.pid)]
    assert len(workers) == 2
    assert {*workers} < {*pids}
    assert all(listening(pid) for pid in workers)  # gloo
    assert exposed(pids) == []
    # A killed run leaves its folder, which may have the number of one of these processes.
    folders = Path(tempfile.gettempdir()).glob("runner-*")
    (shared,) = [folder for folder in folders if all((folder / f"pid.0.{pid}").exists() for pid in workers)]
    assert (shared / "store").exists()
    assert stat.S_IMODE(shared.stat().st_mode) == 0o700
    for pid in workers:
        os.kill(pid, signal.SIGKILL)
    process.communicate(timeout=120)
    assert not shared.exists()
    with socket.create_server(("", 0)) as server:
        assert (os.getpid(), "0.0.0.0", server.getsockname()[1]) in exposed([os.getpid()])


@pytest.mark.parametrize(
    ("number", "to_group", "status"),
    [(signal.SIGINT, True, 130), (signal.SIGTERM, False, 75)],
)
def test_one_signal_saves_on_all_ranks_and_ends(project, number, to_group, status):
    process = project.start(*DDP, *LONG, "trainer.steps=100000", forks_workers=True)
    wait_for_content(project.folder / "run" / "metrics.jsonl", b'"step": 15,')
    (os.killpg if to_group else os.kill)(process.pid, number)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == status, printed
    record = json.loads((project.folder / "run" / "run.json").read_text())
    assert (project.folder / "run" / "checkpoints" / f"step_{record['last_step']:08d}").is_dir()
    assert record["reason"] == number.name


def test_a_second_signal_ends_all_at_once(project):
    process = project.start(
        *DDP, *LONG, "trainer.steps=100000", "+data.eval.sleep_s=1", "trainer.eval_at_start=false", forks_workers=True
    )
    wait_for_content(project.folder / "run" / "metrics.jsonl", b'"step": 20,')
    pids = descendants_of(process.pid)
    process.send_signal(signal.SIGINT)
    time.sleep(0.3)
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert not any(map(is_running, pids))


HANGING = """

class Hangs(Model):
    count = 0

    def forward(self, x, y):
        self.count += self.training
        if self.count == 6 and os.environ["RANK"] == "1":
            (Path("run") / "hangs").touch()
            while True:
                time.sleep(100)
        return super().forward(x, y)
"""


def test_a_second_signal_ends_ranks_that_wait_for_one_that_hangs_and_the_agent_says_nothing(project):
    with open(project.folder / "own.py", "a") as file:
        file.write(f"\nfrom pathlib import Path\n{HANGING}")
    process = project.start(*DDP, *LONG, "model._target_=own.Hangs", "trainer.eval_every=0", forks_workers=True)
    deadline = time.monotonic() + 120
    while not (project.folder / "run" / "hangs").exists():
        assert time.monotonic() < deadline
        time.sleep(0.05)
    pids = descendants_of(process.pid)
    process.send_signal(signal.SIGTERM)
    wait_for_content(project.folder / "run" / "log.txt", b"a second signal ends it at once")
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert "exitcode" not in printed
    assert "Traceback" not in printed
    assert not any(map(is_running, pids))
    record = json.loads((project.folder / "run" / "run.json").read_text())
    assert (record["status"], record["reason"]) == ("preempted", "SIGTERM, which did not wait for a save")


def test_a_sweep_leaves_a_folder_a_job_and_nothing_of_one_in_the_next(project):
    project.run("-m", *DDP[:2], "seed=1,2", "trainer.save_every=12", "hydra.sweep.dir=sweep", forks_workers=True)
    jobs = sorted(path for path in (project.folder / "sweep").iterdir() if path.is_dir())
    assert len(jobs) == 2
    for job in jobs:
        record = json.loads((job / "run.json").read_text())
        assert (record["status"], record["ranks"], len(record["sessions"])) == ("finished", 2, 1)
        assert (job / "checkpoints" / "step_00000012").is_dir()
        assert len(list(job.glob("events.out.tfevents.*"))) == 1
    assert not list((project.folder / "outputs").glob("*")) if (project.folder / "outputs").exists() else True


def test_a_wrong_return_value_is_told_once_by_all_ranks_and_leaves_no_folder(project):
    printed = project.run(*DDP, "feeder={_target_: operator.is_}", status=2, forks_workers=True)
    assert printed.count("Model.forward returned bool: expected a scalar loss") == 1
    assert "Traceback" not in printed
    assert not (project.folder / "run").exists()


def test_typed_commands_reach_the_leader_through_the_launcher(project):
    printed = project.run(*DDP, typed="save@5\nquit@7\n", forks_workers=True)
    assert "Quit at step 7" in printed
    assert (project.folder / "run" / "checkpoints" / "step_00000005").is_dir()


def test_a_mistake_is_told_before_any_worker_starts(project):
    printed = project.run(*DDP, "distributed.nproc_per_nod=2", status=2)
    assert "distributed.nproc_per_nod: no such key" in printed
    assert not (project.folder / "run").exists()


@pytest.mark.slow
def test_torchrun_makes_the_same_run(project, whole):
    command = ["torchrun", "--nproc-per-node", "2", *project.command[1:], "distributed=ddp", "hydra.run.dir=run", *LONG]
    done = subprocess.run(command, cwd=project.folder, capture_output=True, text=True, timeout=90)
    assert done.returncode == 0, done.stderr
    assert find_difference(content(project.folder / "run", STEPS), whole) is None


@pytest.mark.slow
def test_two_agents_that_meet_make_one_run(project, whole):
    port = 20000 + os.getpid() % 20000
    nodes = ["distributed.nnodes=2", f"distributed.rdzv_endpoint=localhost:{port}", "distributed.nproc_per_node=1"]
    both = [project.start("distributed=ddp", *nodes, *LONG, "hydra.run.dir=run") for _ in range(2)]
    printed = [process.communicate(timeout=120)[0] for process in both]
    assert [process.returncode for process in both] == [0, 0], printed
    assert find_difference(content(project.folder / "run", STEPS), whole) is None
    assert json.loads((project.folder / "run" / "run.json").read_text())["ranks"] == 2


def test_a_death_before_an_earlier_checkpoint_is_resumed_does_not_go_on_from_a_later_one(project):
    project.run("hydra.run.dir=run")
    text = (project.folder / "own.py").read_text()
    dies = """

def build_or_die(**settings):
    if int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) == 0 and os.environ.get("RANK") == "1":
        os._exit(3)  # while all build
    return Model(**settings)
"""
    (project.folder / "own.py").write_text(text + dies)
    model = ["model._target_=own.build_or_die", "resume_allow_changes=true"]
    printed = project.run(*DDP[:2], "resume=run/checkpoints/step_00000004", *model, forks_workers=True)
    assert "Going on after step 4" in printed
    assert "Going on after step 12" not in printed
