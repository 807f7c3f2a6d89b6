"""How a run ends when something goes wrong, and that nothing is lost by it: real signals, real full disks."""

import contextlib
import json
import os
import pty
import re
import resource
import select
import shutil
import signal
import subprocess
import sys
import time

import pytest
from chaos import find_difference
from conftest import read_metrics
from processes import descendants_of
from run_comparison import assert_same_run
from waiting import wait_for_step

from runner.checkpoint.checkpoints import Checkpoints, load, verify

SLOW = ("+data.train.sleep_s=0.01", "trainer.steps=2000", "trainer.save_every=0", "hydra.run.dir=run")


def record_of(folder):
    return json.loads((folder / "run.json").read_text())


def newest_step(folder):
    path, faults = Checkpoints(folder / "checkpoints").newest()
    assert faults == []
    return int(path.name.removeprefix("step_"))


@pytest.mark.parametrize("name", ["SIGTERM", "SIGUSR1"])
def test_a_schedulers_signal_saves_and_ends_with_75(project, name):
    process = project.start(*SLOW, "data.num_workers=2")
    wait_for_step(project, 2, "run")
    os.killpg(process.pid, signal.Signals[name])  # as a scheduler may: every process of the group gets it
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert "Traceback" not in printed
    record = record_of(project.folder / "run")
    assert (record["status"], record["reason"]) == ("preempted", name)
    assert newest_step(project.folder / "run") == record["last_step"] > 0


def test_a_preempted_run_that_goes_on_is_the_same_run(project):
    project.run("hydra.run.dir=whole")
    process = project.start("hydra.run.dir=cut", "+data.train.sleep_s=0.02")
    wait_for_step(project, 3, "cut")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    project.run("resume=cut")
    assert_same_run(project.folder / "whole", project.folder / "cut", 12)


def test_a_signal_in_an_evaluation_leaves_it_to_the_run_that_goes_on(project):
    slow_eval = "+data.eval.sleep_s=0.2"
    process = project.start("hydra.run.dir=cut", slow_eval)
    time.sleep(0.1)
    wait_for_file(project.folder / "cut" / "run.json")
    time.sleep(1.0)  # in the evaluation before the first step, which takes four seconds
    process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 75, printed
    assert newest_step(project.folder / "cut") == 0
    project.run("resume=cut", "+data.eval.sleep_s=0", "resume_allow_changes=true")
    lines = read_metrics(project.folder / "cut")
    assert [line["step"] for line in lines if "eval/loss" in line] == [0, 6, 12]


def test_an_evaluation_owed_and_then_killed_stands_once(project):
    every = ("trainer.eval_at_start=false", "trainer.save_every=6", "trainer.eval_every=6")
    project.run(*every, "hydra.run.dir=whole", "trainer.keep_last=1", "trainer.keep_best=1")
    slow = "+data.eval.sleep_s=0.15"
    process = project.start(*every, slow, "hydra.run.dir=cut", "trainer.keep_last=1", "trainer.keep_best=1")
    wait_for_step(project, 6, "cut")  # the evaluation after it takes three seconds
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert process.returncode == 75
    process = project.start(
        "resume=cut", "+data.eval.sleep_s=0", "+data.train.sleep_s=0.1", "resume_allow_changes=true"
    )
    wait_for_step(project, 7, "cut")
    process.kill()
    process.communicate()
    project.run("resume=cut", "+data.train.sleep_s=0", "resume_allow_changes=true")
    assert_same_run(project.folder / "whole", project.folder / "cut", 12)
    kept = [sorted(p.name for p in (project.folder / run / "checkpoints").glob("step_*")) for run in ("whole", "cut")]
    assert kept[0] == kept[1]


def test_the_first_signal_after_quit_waits_for_the_save(project):
    process = project.start_afresh(
        "hydra.run.dir=run", "trainer.save_every=0", "trainer.eval_every=0",
        "trainer.eval_at_start=false", "+model.width=400000", stdin=subprocess.PIPE,
    )  # fmt: skip
    process.stdin.write("quit@3\n")
    process.stdin.flush()
    deadline = time.monotonic() + 120
    while not list((project.folder / "run").glob("checkpoints/.step_*")) and time.monotonic() < deadline:
        time.sleep(0.002)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=120)
    assert newest_step(project.folder / "run") == 3


def test_a_second_start_on_a_folder_leaves_what_the_first_is_doing_alone(project):
    first = project.start("hydra.run.dir=run", "model._target_=own.SlowToBuild", "seed=1", "trainer.steps=3")
    wait_for_file(project.folder / "run" / ".lock")
    printed = project.run("hydra.run.dir=run", "seed=2", status=2)
    assert "another process runs there" in printed
    (project.folder / "built").touch()
    first.communicate(timeout=120)
    assert first.returncode == 0
    assert "seed: 1" in (project.folder / "run" / ".hydra" / "config.yaml").read_text()


def wait_for_file(path, seconds=120):
    deadline = time.monotonic() + seconds
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} did not appear"
        time.sleep(0.02)


@pytest.mark.parametrize("first", [signal.SIGTERM, signal.SIGINT])
def test_a_second_signal_ends_at_once_and_loses_only_the_steps_since_the_last_save(project, first):
    stalls = ("data.train._target_=own.Stalls", "+data.train.sleep_s=0.02", "trainer.steps=5000")
    process = project.start(*stalls, "trainer.save_every=1", "hydra.run.dir=run")
    wait_for_file(project.folder / "run" / "checkpoints" / "step_00000001")
    (project.folder / "stall").touch()
    time.sleep(0.5)  # the step that is under way then never ends
    process.send_signal(first)
    deadline = time.monotonic() + 120
    while process.poll() is None:  # a signal that comes before the one before it was seen is no second one
        assert time.monotonic() < deadline
        time.sleep(0.5)
        process.send_signal(signal.SIGTERM)
    printed, _ = process.communicate()
    assert process.returncode == 128 + signal.SIGTERM, printed
    assert record_of(project.folder / "run")["reason"].startswith("SIGTERM")
    assert newest_step(project.folder / "run") >= 1


def test_a_run_whose_process_has_gone_is_told_as_crashed(project):
    process = project.start("+data.train.sleep_s=0.02", "trainer.save_every=1", "hydra.run.dir=run")
    wait_for_file(project.folder / "run" / "checkpoints" / "step_00000002")
    process.kill()
    process.communicate()
    assert record_of(project.folder / "run")["status"] == "running"
    printed = project.run("resume=run")
    assert re.search(rf"warning: The session of process {process.pid} on \S+ crashed", printed)
    assert [session["status"] for session in record_of(project.folder / "run")["sessions"]] == ["crashed", "finished"]


FAILURES = ("feeder={_target_: own.fail_at_call}", "trainer.accumulate=2")


def run_with(project, failure, *overrides, status):
    """`failure` is as OWN_FAILURE is: nan@11 is the first micro-step of step 6."""
    os.environ["OWN_FAILURE"] = failure
    try:
        return project.run(*overrides, status=status)
    finally:
        del os.environ["OWN_FAILURE"]


@pytest.mark.parametrize(
    ("failure", "told"),
    [
        ("nan@12", r"Step 6 \(samples 40 to 47 of the stream\) went wrong\. model: its loss of micro-step 2 is nan; "),
        ("inf@11", r"Step 6 .*its loss of micro-step 1 is inf; largest gradients: \S+ \(\d+ of \d+ not finite\)"),
        ("oom@12", r"Out of memory in step 6: this process had .* a smaller batch"),
    ],
)
def test_a_step_that_went_wrong_is_discarded_whole_and_the_run_that_goes_on_is_the_same_run(project, failure, told):
    project.run(*FAILURES, "hydra.run.dir=whole")
    printed = run_with(project, failure, *FAILURES, "hydra.run.dir=cut", status=1)
    assert re.search(f"error: The run ends: {told}", printed), printed
    assert "Traceback" not in printed
    record = record_of(project.folder / "cut")
    assert (record["status"], record["last_step"]) == ("failed", 5)
    assert re.search(told, record["reason"])
    assert newest_step(project.folder / "cut") == 5
    project.run("resume=cut", "allow_targets=[own]")
    assert_same_run(project.folder / "whole", project.folder / "cut", 12)


@pytest.mark.parametrize("failure", ["nan@7", "oom@8"])
def test_a_step_that_went_wrong_can_be_left_out(project, failure):
    skip = ("trainer.on_nonfinite=skip", "trainer.on_oom=skip", "hydra.run.dir=run", *FAILURES)
    printed = run_with(project, failure, *skip, status=0)
    assert re.search(r"warning: Step 4 \(samples 24 to 31 of the stream\).* as number 1 of at most 100", printed)
    lines = {line["step"]: line for line in read_metrics(project.folder / "run") if "train/lr" in line}
    assert list(lines) == list(range(1, 13))
    assert "train/loss" not in lines[4]
    assert newest_step(project.folder / "run") == 12


def test_more_steps_gone_wrong_than_may_be_left_out_end_the_run_and_it_can_go_on(project):
    skip = ("trainer.on_nonfinite=skip", "trainer.max_skips=1", "hydra.run.dir=run", *FAILURES)
    printed = run_with(project, "nan@7,11", *skip, status=1)
    assert "More steps went wrong than the 1 that may be left out" in printed
    assert newest_step(project.folder / "run") == 6
    project.run("resume=run", "allow_targets=[own]", "trainer.max_skips=9")
    lines = [line["step"] for line in read_metrics(project.folder / "run") if "train/lr" in line]
    assert lines == list(range(1, 13))


def test_ignoring_what_is_not_finite_trains_on(project):
    run_with(project, "nan@7", *FAILURES, "trainer.on_nonfinite=ignore", "hydra.run.dir=run", status=0)
    assert newest_step(project.folder / "run") == 12


FAILING = """

def fail(place):
    # OWN_FAILURE says what is raised where, such as key@37
    kind, _, where = os.environ.get("OWN_FAILURE", "").partition("@")
    if where == place:
        local = type("Local", (Exception,), {})  # that no pickle can name
        errors = {"key": KeyError("no file"), "exit": SystemExit(0), "stop": KeyboardInterrupt("enough")}
        raise errors.get(kind, local())


class Failing(Normed):
    def forward(self, x, y):
        found = super().forward(x, y)
        if self.training:
            self.calls = getattr(self, "calls", 0) + 1
            fail(f"call {self.calls}")
            found["loss"].register_hook(lambda grad: fail(f"backward {self.calls}"))
        return found


class Files(Data):
    def __getitem__(self, index):
        fail(f"index {index}")
        return super().__getitem__(index)


reports = 0


def reported(module, dataset):
    global reports
    reports += 1
    fail(f"report {reports}")
    return {}
"""


@pytest.mark.parametrize(
    ("failure", "step", "said", "overrides"),
    [
        ("key@call 12", 5, "KeyError('no file')", ()),
        ("exit@backward 12", 5, "SystemExit: 0", ()),
        ("stop@report 2", 6, "KeyboardInterrupt: enough", ()),
        ("key@index 44", 2, "KeyError('no file'); at index 44 of the dataset Files, position 18 ", ()),
        ("local@index 44", 2, "Local(); at index 44 of the dataset Files", ("data.num_workers=2",)),
    ],
)
def test_an_error_in_the_users_code_keeps_the_work_done(project, failure, step, said, overrides, monkeypatch):
    with open(project.folder / "own.py", "a") as file:
        file.write(FAILING)
    own = ("model._target_=own.Failing", "data.train._target_=own.Files", "report._target_=own.reported")
    own += ("trainer.accumulate=2", "trainer.save_every=100")
    project.run(*own, "hydra.run.dir=whole")
    monkeypatch.setenv("OWN_FAILURE", failure)
    printed = project.run(*own, *overrides, "hydra.run.dir=cut", status=1)
    monkeypatch.delenv("OWN_FAILURE")
    assert printed.count("Traceback (most recent call last)") == 1
    assert 'own.py", line' in printed
    record = record_of(project.folder / "cut")
    assert (record["status"], record["last_step"]) == ("failed", step)
    assert said in record["reason"]
    assert newest_step(project.folder / "cut") == step
    project.run("resume=cut", "allow_targets=[own]")
    assert_same_run(project.folder / "whole", project.folder / "cut", 12)


DELETING = """

class Deletes(Data):
    def __getitem__(self, index):
        if index == 44:
            for path in Path("cut").glob(os.environ.get("OWN_DELETES", "none")):
                path.unlink()
        return super().__getitem__(index)
"""


@pytest.mark.parametrize("log_every", [1, 100])
@pytest.mark.parametrize("files", ["metrics.jsonl", "events.out.*"])
def test_numbers_that_can_not_be_written_cost_no_checkpoint(project, files, log_every, monkeypatch):
    with open(project.folder / "own.py", "a") as file:
        file.write(f"\nfrom pathlib import Path\n{DELETING}")
    own = ("data.train._target_=own.Deletes", f"trainer.log_every={log_every}", "trainer.save_every=100")
    project.run(*own, "hydra.run.dir=whole", "trainer.save_every=1", "trainer.keep_last=0")
    monkeypatch.setenv("OWN_DELETES", files)
    printed = project.run(*own, "hydra.run.dir=cut", status=1)
    monkeypatch.delenv("OWN_DELETES")
    assert "Traceback" not in printed
    assert re.search(r"error: The run ends: the run's numbers can't be written: .* it was deleted while", printed)
    assert "; what was saved before is whole: leave the files of a run in place, then resume" in printed
    step = newest_step(project.folder / "cut")
    assert record_of(project.folder / "cut")["last_step"] == step >= 5
    one, other = (load(project.folder / name / "checkpoints" / f"step_{step:08d}") for name in ("whole", "cut"))
    assert find_difference(one["model"], other["model"]) is None
    project.run("resume=cut", "trainer.steps=14", "allow_targets=[own]")
    assert newest_step(project.folder / "cut") == 14


LATE = """

class Late(torch.optim.AdamW):
    num_steps = 0

    def step(self, closure=None):
        super().step(closure)
        self.num_steps += 1
        if self.num_steps == 3:
            self.param_groups[0]["own"] = object()
"""


def test_a_state_that_can_not_be_saved_any_more_is_told_in_one_message_with_the_steps_it_costs(project):
    with open(project.folder / "own.py", "a") as file:
        file.write(LATE)
    printed = project.run("hydra.run.dir=run", "optimizer._target_=own.Late", "trainer.save_every=2", status=1)
    named = 'model.optimizer: its state can\'t be saved: value["optimizer"]["param_groups"][0]["own"] is a'
    assert printed.count(named) == 1
    assert "Traceback" not in printed
    assert newest_step(project.folder / "run") == 2
    told = f"error: Steps 3 to 4 are not saved; go on from {project.folder / 'run' / 'checkpoints' / 'step_00000002'}"
    assert told in printed


HANGING = """

class Hangs(Data):
    def __getitem__(self, index):
        if index == 44 and self.sleep_s:
            while True:
                time.sleep(100)
        if index == 44:
            import ctypes

            mutex = ctypes.create_string_buffer(64)
            while True:
                ctypes.CDLL(None).pthread_mutex_lock(mutex)
        return super().__getitem__(index)
"""


@pytest.mark.parametrize(
    ("overrides", "source"),
    [(("data.num_workers=2", "+data.train.sleep_s=0.001"), "2 loader workers"), ((), "this process")],
)
def test_a_dataset_that_hangs_is_told_at_the_first_ctrl_c_and_ended_by_the_second(project, overrides, source):
    with open(project.folder / "own.py", "a") as file:
        file.write(HANGING)
    own = ("data.train._target_=own.Hangs", "hydra.run.dir=run", "trainer.save_every=1", *overrides)
    process = project.start(*own)
    wait_for_file(project.folder / "run" / "checkpoints" / "step_00000002")
    log = project.folder / "run" / "log.txt"
    time.sleep(0.5)
    os.killpg(process.pid, signal.SIGINT)
    wait_for_text(log, f"It waits for a batch of data.train for step 3, from {source}; a second signal ends it at once")
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=10)  # a worker that is asked to end is waited for longer
    assert process.returncode == 130, printed
    assert "Traceback" not in printed
    record = record_of(project.folder / "run")
    assert (record["status"], record["reason"]) == ("interrupted", "SIGINT, which did not wait for a save")
    assert newest_step(project.folder / "run") == 2


def wait_for_text(path, text, seconds=120):
    deadline = time.monotonic() + seconds
    while text not in path.read_text():
        assert time.monotonic() < deadline, f"{path} never had {text!r}: {path.read_text()[-2000:]}"
        time.sleep(0.02)


PRINTING = """

class Prints(Model):
    def forward(self, x, y):
        print("in forward", flush=True)
        return super().forward(x, y)
"""


@pytest.mark.parametrize("overrides", [("data.num_workers=2",), ("distributed=ddp", "distributed.nproc_per_node=2")])
def test_a_closed_terminal_saves_and_ends_though_the_model_prints(project, overrides):
    with open(project.folder / "own.py", "a") as file:
        file.write(PRINTING)
    pid, terminal = pty.fork()
    if not pid:
        os.chdir(project.folder)
        os.execv(sys.executable, [*project.command, *SLOW, "model._target_=own.Prints", *overrides])
    deadline = time.monotonic() + 120
    metrics = project.folder / "run" / "metrics.jsonl"
    while not metrics.exists() or '"step": 2,' not in metrics.read_text():
        assert time.monotonic() < deadline
        if select.select([terminal], [], [], 0.05)[0]:
            os.read(terminal, 65536)
    os.close(terminal)
    _, status = os.waitpid(pid, 0)
    assert os.waitstatus_to_exitcode(status) == 75, (project.folder / "run" / "log.txt").read_text()
    record = record_of(project.folder / "run")
    assert (record["status"], record["reason"]) == ("preempted", "SIGHUP")
    assert newest_step(project.folder / "run") == record["last_step"] > 1


def test_a_killed_loader_worker_is_named_and_the_run_saved(project):
    project.run("hydra.run.dir=whole", "trainer.steps=40", "trainer.eval_every=0", "trainer.save_every=40")
    process = project.start(
        "hydra.run.dir=cut", "trainer.steps=40", "trainer.eval_every=0", "trainer.save_every=40",
        "data.num_workers=2", "+data.train.sleep_s=0.01",
    )  # fmt: skip
    wait_for_file(project.folder / "cut" / "metrics.jsonl")
    deadline = time.monotonic() + 120
    while (
        not (project.folder / "cut" / "metrics.jsonl").exists()
        or "train/" not in (project.folder / "cut" / "metrics.jsonl").read_text()
    ):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    workers = [pid for pid in descendants_of(process.pid) if "python" in os.readlink(f"/proc/{pid}/exe")]
    os.kill(workers[0], signal.SIGKILL)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    assert re.search(rf"error: The run ends: A loader worker died .*{workers[0]}\b", printed), printed
    assert "Traceback" not in printed
    assert newest_step(project.folder / "cut") == record_of(project.folder / "cut")["last_step"] > 0
    project.run("resume=cut", "data.num_workers=0")
    assert_same_run(project.folder / "whole", project.folder / "cut", 40)


def test_a_second_run_on_one_folder_is_refused_and_the_first_goes_on(project):
    process = project.start("+data.train.sleep_s=0.05", "trainer.save_every=1", "hydra.run.dir=run")
    wait_for_file(project.folder / "run" / "checkpoints" / "step_00000001")
    before = (project.folder / "run" / ".hydra" / "overrides.yaml").read_text()
    printed = project.run("resume=run", "trainer.steps=99", status=2)
    assert re.search(rf"/run: another process runs there; process {process.pid} on .*\n", printed)
    assert (project.folder / "run" / ".hydra" / "overrides.yaml").read_text() == before
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert newest_step(project.folder / "run") == 12


@contextlib.contextmanager
def small_disk(folder, megabytes):
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", f"size={megabytes}m", "tmpfs", folder]
    if os.geteuid() or subprocess.run(command, capture_output=True).returncode:
        pytest.skip("a disk can't be mounted here; the limit on a file's size stands in for it")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", folder], check=True)


def test_a_full_disk_ends_the_run_with_a_message_and_the_last_checkpoint_whole(project):
    with small_disk(project.folder / "disk", 4) as disk:
        process = project.start(
            "hydra.run.dir=disk/run", "+data.train.sleep_s=0.02", "trainer.steps=500", "trainer.save_every=2"
        )
        wait_for_file(disk / "run" / "checkpoints" / "step_00000004")
        with open(disk / "filler", "wb", buffering=0) as filler, contextlib.suppress(OSError):
            while True:
                filler.write(b"\0" * 4096)
        printed, _ = process.communicate(timeout=120)
        assert process.returncode == 1, printed
        assert "Traceback" not in printed
        assert re.search(
            r"error: The run ends: (the run's numbers|run.json) can't be written: .*No space left", printed
        ), printed
        assert newest_step(disk / "run") >= 4
        (disk / "filler").unlink()
        project.run("resume=disk/run", "trainer.steps=60", "trainer.log_every=20")
        assert newest_step(disk / "run") == 60


def test_a_save_that_fails_is_told_tried_again_and_ends_the_run_with_1_if_it_is_the_last(project):
    limit = 20_000  # bytes a file: metrics fit, a model of width 9000 does not

    def limit_files():
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    process = project.start_afresh(
        "hydra.run.dir=run", "+model.width=9000", "tracking.tensorboard=false", preexec_fn=limit_files
    )
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    assert "Traceback" not in printed
    assert [int(n) for n in re.findall(r"error: The checkpoint of step (\d+) could not be written", printed)] == [
        4,
        8,
        12,
    ]
    assert "File too large" in printed
    assert list((project.folder / "run" / "checkpoints").glob("step_*")) == []
    assert record_of(project.folder / "run")["status"] == "failed"


def test_a_save_that_failed_once_is_made_up_for_by_the_next(project):
    process = project.start("hydra.run.dir=run", "+data.train.sleep_s=0.02", "trainer.save_every=3")
    wait_for_file(project.folder / "run" / "checkpoints" / "step_00000003")
    checkpoints = project.folder / "run" / "checkpoints"
    checkpoints.rename(project.folder / "aside")
    checkpoints.write_text("in the way")
    deadline = time.monotonic() + 120
    while "could not be written" not in (project.folder / "run" / "log.txt").read_text():
        assert time.monotonic() < deadline
        time.sleep(0.02)
    checkpoints.unlink()
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 0, printed
    assert newest_step(project.folder / "run") == 12


def test_a_run_folder_that_was_deleted_ends_the_run_and_stays_deleted(project):
    process = project.start(*SLOW, "trainer.eval_every=0")  # nothing but the numbers is written
    wait_for_step(project, 2, "run")
    (project.folder / "run").rename(project.folder / "gone")  # at once: it puts files there all the while
    shutil.rmtree(project.folder / "gone")
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 1, printed
    assert "Traceback" not in printed
    assert "error: The run ends: the run's numbers can't be written" in printed
    assert not (project.folder / "run").exists()


DELETES_ITS_FOLDER = """
import logging, re, shutil, sys, threading
from pathlib import Path

RUN = Path("run").resolve()


def name_of(event, args):
    # the kind of a file operation in the run's folder, such as "saver: make_folder checkpoints", or None
    if event != "runner.disk" or args[0] not in ("create", "open_append", "open_unsynced", "make_folder"):
        return None
    path = Path(args[1]).absolute()
    if not path.is_relative_to(RUN):
        return None
    place = re.sub(r"[0-9a-f]{16}|[0-9]+", "N", str(path.relative_to(RUN)))
    return f"{threading.current_thread().name}: {args[0]} {place}"


class DeletesItsFolder(Model):
    def __init__(self):
        super().__init__()
        seen, chosen = set(), os.environ.get("OWN_DELETES_BEFORE")

        def watch(event, args):
            name = name_of(event, args)
            if name is None or name in seen:
                return
            seen.add(name)
            if chosen is None:
                with open("operations", "a") as file:
                    file.write(name + chr(10))
            elif name == chosen:
                os.rename(RUN, "gone")
                shutil.rmtree("gone")

        # The first number is logged when the tracker's thread has found the folder gone.
        logging.getLogger("runner").addFilter(lambda said: " steps" not in said.msg or time.sleep(0.1) or True)
        sys.addaudithook(watch)


def sounds(module, dataset):
    from runner.tracking.media import Audio

    return {"loud/tone": Audio(torch.zeros(100), 8000)}
"""


@pytest.mark.slow
def test_no_file_operation_brings_a_deleted_run_folder_back(project, monkeypatch):
    with open(project.folder / "own.py", "a") as file:
        file.write(DELETES_ITS_FOLDER)
    every = [f"trainer.{name}_every=2" for name in ("save", "eval", "export")]
    overrides = ["hydra.run.dir=run", "model._target_=own.DeletesItsFolder", "report._target_=own.sounds"]
    overrides += [*every, "trainer.steps=2"]
    project.run(*overrides)
    shutil.rmtree(project.folder / "run")
    operations = (project.folder / "operations").read_text().splitlines()
    assert {
        "MainThread: make_folder .hydra", "MainThread: make_folder audio", "MainThread: make_folder exports",
        "saver: make_folder checkpoints", "run record: create .N.tmp", "tracker: open_append metrics.jsonl",
    } <= {*operations}  # fmt: skip
    assert not [name for name in operations if name.endswith("make_folder .")]
    for name in operations:
        monkeypatch.setenv("OWN_DELETES_BEFORE", name)
        # run.json is written once more by a thread of its own, at any time: all else may be done by then
        printed = project.run(*overrides, status=(0, 1) if name.startswith("run record") else (1, 2))
        assert "Traceback" not in printed, name
        assert "can't be written" in printed, name
        assert not (project.folder / "run").exists(), name


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_built(project):
    with small_disk(project.folder / "disk", 1) as disk:
        subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
        printed = project.run("hydra.run.dir=disk/run", status=2)
        assert printed == "hydra.run.dir=disk/run: can't be made (Read-only file system)\n"


def test_a_checkpoint_of_pickles_is_read_without_executing_any(project):
    project.run("hydra.run.dir=run", "checkpoint.format=pt", typed="quit@5\n")
    assert verify(project.folder / "run" / "checkpoints" / "step_00000005")["files"].keys() == {
        "model.pt", "model.optimizer.pt", "trainer.json",
    }  # fmt: skip
    project.run("resume=run")
    project.run("hydra.run.dir=whole", "checkpoint.format=pt")
    one, other = project.folder / "run", project.folder / "whole"
    names = [path.name for path in (other / "checkpoints" / "step_00000012").glob("*.pt")]
    assert len(names) == 2
    from runner.checkpoint import checkpoints as checkpoint

    states = [checkpoint.load(each / "checkpoints" / "step_00000012") for each in (one, other)]
    assert find_difference(*states) is None
