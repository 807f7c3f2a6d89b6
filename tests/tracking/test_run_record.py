"""`runner.tracking.run_record`: `run.json` is complete at every moment and correct about each session."""

import functools
import json
import os
import signal
import subprocess
import sys
import threading
import time
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import pytest

from runner.config.trust import signature
from runner.tracking import run_record
from runner.tracking.run_record import RunRecord

ROOT = Path(__file__).parents[2]


def read(folder: Path) -> dict[str, Any]:
    content: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return content


def git(folder: Path, *words: str) -> str:
    identity = ["-c", "user.name=a", "-c", "user.email=a@b.c", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *identity, *words], cwd=folder, capture_output=True, text=True, check=True)
    return done.stdout.strip()


@pytest.fixture
def outside(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working directory outside any repository and outside the run's folder."""
    folder = tmp_path_factory.mktemp("work")
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(folder.parent))
    monkeypatch.chdir(folder)
    return folder


def test_the_record_of_a_finished_run_has_its_code_place_and_result(tmp_path: Path, outside: Path) -> None:
    record = RunRecord(tmp_path, lambda directory: True)
    record.start_session(ranks=2, name="byte_gpt")
    running = read(tmp_path)
    record.update(last_step=300, best={"name": "eval/loss", "value": 0.1 + 0.2, "step": 250})
    record.finish("finished")
    found = read(tmp_path)
    assert (running["status"], running["ended"]) == ("running", None)
    assert (found["status"], found["last_step"], found["ranks"], found["name"]) == (
        "finished",
        300,
        2,
        "byte_gpt",
    )
    assert found["best"] == {"name": "eval/loss", "value": 0.1 + 0.2, "step": 250}
    assert (found["pid"], found["host"], found["command"]) == (os.getpid(), os.uname().nodename, sys.argv)
    assert found["python"] == ".".join(map(str, sys.version_info[:3]))
    assert found["packages"]["torch"] == metadata.version("torch")
    assert set(found["packages"]) == {"runner", "torch", "numpy", "hydra-core", "tensorboard", "safetensors"}
    started, ended = (datetime.fromisoformat(found[name]) for name in ("started", "ended"))
    assert started.tzinfo is not None
    assert started <= ended
    assert 0 <= found["duration_s"] < 60
    assert os.listdir(tmp_path).count("run.json") == 1
    assert not list(tmp_path.glob(".run.json*"))


@pytest.mark.parametrize("change", ["none", "edit", "new file"])
def test_the_git_state_is_that_of_the_working_directory(outside: Path, tmp_path: Path, change: str) -> None:
    git(outside, "init", "-q")
    (outside / "a.py").write_text("1")
    git(outside, "add", ".")
    git(outside, "commit", "-qm", "first")
    if change != "none":
        (outside / ("a.py" if change == "edit" else "b.py")).write_text("2")
    record = RunRecord(tmp_path, lambda directory: True)
    record.start_session()
    record.finish("finished")
    expected = {"commit": git(outside, "rev-parse", "HEAD"), "is_dirty": change != "none"}
    assert read(tmp_path)["git"] == expected
    assert read(tmp_path)["sessions"][0]["git"] == expected


def test_a_repository_in_an_untrusted_run_folder_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    git(tmp_path, "init", "-q")
    git(tmp_path, "config", "core.fsmonitor", "touch canary; false")
    (tmp_path / ".hydra").mkdir()
    monkeypatch.chdir(tmp_path)
    record = RunRecord(tmp_path, functools.partial(signature.may_read_git, tmp_path))
    record.start_session()
    record.finish("finished")
    assert read(tmp_path)["git"] is None
    assert not (tmp_path / "canary").exists()


def test_a_repository_without_a_commit_has_none(outside: Path, tmp_path: Path) -> None:
    git(outside, "init", "-q")
    record = RunRecord(tmp_path, lambda directory: True)
    record.start_session()
    record.finish("finished")
    assert read(tmp_path)["git"] == {"commit": None, "is_dirty": False}


def test_outside_a_repository_git_is_null(outside: Path, tmp_path: Path) -> None:
    record = RunRecord(tmp_path, lambda directory: True)
    record.start_session()
    record.finish("finished")
    assert read(tmp_path)["git"] is None


def test_without_git_or_with_one_that_hangs_the_run_goes_on(
    outside: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run_record, "_GIT_TIMEOUT_S", 0.2)
    tools = tmp_path / "bin"
    tools.mkdir()
    monkeypatch.setenv("PATH", str(tools))
    for script in ("", f"#!{sys.executable}\nimport time; time.sleep(30)\n"):
        if script:
            (tools / "git").write_text(script)
            (tools / "git").chmod(0o755)
        record = RunRecord(tmp_path, lambda directory: True)
        record.start_session()
        record.finish("finished")
        assert read(tmp_path)["git"] is None


def test_a_resumed_run_keeps_its_first_start_and_every_session(tmp_path: Path, outside: Path) -> None:
    first = RunRecord(tmp_path, lambda directory: True)
    first.start_session(ranks=1)
    first.update(last_step=40, best={"name": "eval/loss", "value": 2.0, "step": 40})
    first.finish("interrupted")
    before = read(tmp_path)
    second = RunRecord(tmp_path, lambda directory: True)
    second.start_session(ranks=2)
    running = read(tmp_path)
    assert (running["status"], running["ended"], running["last_step"]) == ("running", None, 40)
    assert running["best"] == before["best"]
    time.sleep(0.01)
    second.update(last_step=90)
    second.finish("finished")
    found = read(tmp_path)
    assert found["started"] == before["started"]
    assert (found["status"], found["ranks"], len(found["sessions"])) == ("finished", 2, 2)
    assert found["sessions"][0] == before["sessions"][0]
    assert [each["last_step"] for each in found["sessions"]] == [40, 90]
    assert [each["status"] for each in found["sessions"]] == ["interrupted", "finished"]
    total_s = sum(each["duration_s"] for each in found["sessions"])
    assert found["duration_s"] == pytest.approx(total_s)
    assert found["duration_s"] > before["duration_s"]


def test_a_killed_session_is_recorded_as_crashed_when_the_run_is_resumed(tmp_path: Path) -> None:
    code = """
import itertools, sys
from runner.tracking.run_record import RunRecord
record = RunRecord(sys.argv[1], lambda directory: True)
record.start_session()
for step in itertools.count():
    record.update(last_step=step)
    print(step, flush=True)
"""
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", code, str(tmp_path)]
    with subprocess.Popen(command, env=environ, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        for line in run.stdout:
            if int(line) == 20:
                break
        run.send_signal(signal.SIGKILL)
    killed = read(tmp_path)
    assert (killed["status"], killed["pid"]) == ("running", run.pid)
    assert killed["last_step"] >= 20
    record = RunRecord(tmp_path, lambda directory: True)
    record.start_session()
    record.finish("finished")
    first, last = read(tmp_path)["sessions"]
    assert (first["status"], first["ended"], first["pid"]) == ("crashed", None, run.pid)
    assert (last["status"], last["pid"]) == ("finished", os.getpid())


def test_a_reader_never_sees_half_a_file(tmp_path: Path, outside: Path) -> None:
    record = RunRecord(tmp_path, lambda directory: True)
    record.start_session()
    done = threading.Event()

    def write() -> None:
        for step in range(200):
            record.update(last_step=step, note="x" * (step * 50))
        done.set()

    writer = threading.Thread(target=write)
    writer.start()
    num_reads = 0
    while not done.is_set():
        assert read(tmp_path)["status"] == "running"
        num_reads += 1
    writer.join()
    record.finish("finished")
    assert num_reads > 0
    assert read(tmp_path)["last_step"] == 199


def test_a_value_without_json_is_null(tmp_path: Path, outside: Path) -> None:
    record = RunRecord(tmp_path, lambda directory: True)
    record.start_session()
    record.update(best={"name": "eval/loss", "value": float("nan"), "step": 1})
    record.finish("failed")
    assert read(tmp_path)["best"] == {"name": "eval/loss", "value": None, "step": 1}


def test_a_record_that_cannot_be_read_is_named_and_kept(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{half")
    with pytest.raises(ValueError, match=r"run.json: not the record of a run .*; move it away"):
        RunRecord(tmp_path, lambda directory: True).start_session()
    assert (tmp_path / "run.json").read_text() == "{half"
