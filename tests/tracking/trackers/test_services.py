"""W&B offline, MLflow on SQLite and trackio's local database hold what a run has logged, through a resume too."""

import importlib.util
import json
import signal
import struct
import subprocess
import sys
import threading

import numpy as np
import pytest

from runner.tracking.tracker import TrackerThread
from runner.tracking.trackers.jsonl import Jsonl
from runner.tracking.trackers.mlflow import Mlflow
from runner.tracking.trackers.trackio import Trackio
from runner.tracking.trackers.wandb import Wandb


def log_session(folder, tracker, first, last, **options):
    """Logs one session with numbers of every kind; returns the warnings."""
    warned = []
    thread = TrackerThread(
        folder, {"jsonl": Jsonl(), "mine": tracker}, warn=warned.append, name="digits", run_id="abc123", **options
    )
    thread.hparams({"optimizer.lr": 0.1, "name": "é", "is_tied": True})
    for step in range(first, last + 1):
        thread.log(step, {"train/loss": step / 7, "train/lr": 1e-3})
        if step % 2 == 0:
            thread.log(step, {"eval/loss": step / 3, "eval/nan": float("nan")})
            thread.text(step, "eval/sample", "a <b>")
            thread.image(step, "eval/picture", np.full((4, 5, 3), step, np.uint8))
            thread.histogram(step, "weights", np.arange(step + 2.0))
    thread.close("finished")
    return warned


REPEATED = "trackers.mine: keeps what an earlier session logged of steps 5 to 6, which this one repeats"


@pytest.fixture
def process_state():
    """Checks that a tracker leaves handlers, hooks and streams as they were."""

    def read():
        handlers = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
        return [*handlers, sys.exit, sys.excepthook, sys.stdout, sys.stderr]

    before = read()
    yield
    assert read() == before


@pytest.fixture
def wandb_environment(monkeypatch, tmp_path):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_ERROR_REPORTING", "false")
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path / "wandb-config"))
    monkeypatch.setenv("WANDB_CACHE_DIR", str(tmp_path / "wandb-cache"))
    monkeypatch.delenv("WANDB_API_KEY", raising=False)


def scan_records(data):
    """Yields the records of a .wandb file, which has the format of LevelDB's log after 7 bytes."""
    at, parts = 7, []
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the end of a block is padded
            at += 32768 - at % 32768
            continue
        length, kind = struct.unpack_from("<HB", data, at + 4)
        parts.append(data[at + 7 : at + 7 + length])
        at += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            yield b"".join(parts)
            parts = []


def read_wandb(folder):
    """Returns the history of each session's file by step, and its config."""
    from wandb.proto.wandb_internal_pb2 import Record

    def read_items(items):
        return {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}

    sessions = []
    for path in sorted(folder.glob("wandb/offline-run-*/*.wandb")):
        rows, config = {}, {}
        for data in scan_records(path.read_bytes()):
            record = Record.FromString(data)
            kind = record.WhichOneof("record_type")
            if kind == "history":
                rows.setdefault(record.history.step.num, {}).update(read_items(record.history.item))
            elif kind == "config":
                config |= read_items(record.config.update)
            elif kind == "run":
                config |= read_items(record.run.config.update) | {"id": record.run.run_id}
        sessions.append((rows, config))
    return sessions


@pytest.mark.usefixtures("wandb_environment", "process_state")
def test_wandb_offline_holds_the_numbers_of_both_sessions(tmp_path):
    threads = threading.active_count()
    assert log_session(tmp_path, Wandb("p", mode="offline"), 1, 6) == []
    assert log_session(tmp_path, Wandb("p", mode="offline"), 5, 8, resume_step=4) == [REPEATED]
    first, second = read_wandb(tmp_path)
    for (rows, config), steps in ((first, range(1, 7)), (second, range(5, 9))):
        assert {step: row["train/loss"] for step, row in rows.items() if step in steps} == {s: s / 7 for s in steps}
        assert {step: row["eval/loss"] for step, row in rows.items() if "eval/loss" in row} == {
            s: s / 3 for s in steps if s % 2 == 0
        }
        assert config["id"] == "abc123"
        assert config["optimizer.lr"] == 0.1
        kinds = {name: value for name, value in rows[6].items() if name.endswith("_type")}
        assert kinds == {
            "eval/picture/_type": "image-file",
            "eval/sample/_type": "html-file",
            "weights/_type": "histogram",
        }
    assert threading.active_count() == threads


@pytest.mark.usefixtures("wandb_environment", "process_state")
def test_wandb_without_a_key_is_a_warning_that_says_what_to_do(tmp_path, monkeypatch):
    monkeypatch.setenv("WANDB_BASE_URL", "http://127.0.0.1:9")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    (warning,) = log_session(tmp_path, Wandb("p", mode="online"), 1, 2)
    assert "there is no API key: run `wandb login`, or set WANDB_API_KEY; the run goes on without it" in warning
    assert "trackers.wandb.mode=offline" in warning
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3


@pytest.mark.slow  # MLflow makes its database
@pytest.mark.filterwarnings("ignore")  # of SQLAlchemy, in MLflow
@pytest.mark.usefixtures("process_state")
def test_mlflow_on_sqlite_holds_the_numbers_of_both_sessions(tmp_path, monkeypatch):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_DISABLE_TELEMETRY", "true")
    monkeypatch.chdir(tmp_path)
    uri = f"sqlite:///{tmp_path}/mlflow.db"
    assert log_session(tmp_path, Mlflow("digits", uri), 1, 6) == []
    assert log_session(tmp_path, Mlflow("digits", uri), 5, 8, resume_step=4) == [REPEATED]
    client = mlflow.MlflowClient(uri)
    (run,) = client.search_runs([client.get_experiment_by_name("digits").experiment_id])
    assert run.info.status == "FINISHED"
    assert run.data.params == {"optimizer.lr": "0.1", "name": "é", "is_tied": "True"}
    history = client.get_metric_history(run.info.run_id, "train/loss")
    assert sorted((metric.step, metric.value) for metric in history) == [
        (step, step / 7) for step in (1, 2, 3, 4, 5, 5, 6, 6, 7, 8)
    ]
    times = [metric.timestamp for metric in history]
    assert times == sorted(times)
    assert run.data.metrics["eval/loss"] == 8 / 3
    assert {path.path for path in client.list_artifacts(run.info.run_id, "eval/sample")} >= {"eval/sample/00000008.txt"}


@pytest.mark.filterwarnings("ignore")  # of trackio's dependencies
@pytest.mark.usefixtures("process_state")
def test_trackios_local_database_holds_the_numbers_of_both_sessions(tmp_path, monkeypatch):
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    pytest.importorskip("trackio")
    assert log_session(tmp_path, Trackio("digits"), 1, 6) == []
    assert log_session(tmp_path, Trackio("digits"), 5, 8, resume_step=4) == [REPEATED]
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("digits")
    rows = SQLiteStorage.get_logs("digits", name)
    losses = sorted((row["step"], row["train/loss"]) for row in rows if "train/loss" in row)
    assert losses == [(step, step / 7) for step in (1, 2, 3, 4, 5, 5, 6, 6, 7, 8)]
    assert SQLiteStorage.get_run_config("digits", name)["optimizer.lr"] == 0.1


@pytest.mark.parametrize(
    ("kind", "arguments", "extra"), [(Wandb, (), "wandb"), (Mlflow, ("p",), "mlflow"), (Trackio, ("p",), "trackio")]
)
def test_a_missing_library_is_named_with_its_extra(monkeypatch, kind, arguments, extra):
    monkeypatch.setattr("runner.tracking.protocol.find_spec", lambda name: None)
    with pytest.raises(ImportError, match=rf'{extra} is not installed; pip install "exact-runner\[{extra}\]"'):
        kind(*arguments)


def test_an_unknown_mode_of_wandb_is_named():
    if importlib.util.find_spec("wandb"):
        with pytest.raises(ValueError, match="mode=offlin: expected online, offline, disabled or null"):
            Wandb(mode="offlin")


def test_no_library_is_imported_before_a_run_opens_its_tracker():
    code = """
import sys
from runner.tracking.trackers import csv, jsonl, mlflow, tensorboard, trackio, wandb
wandb.Wandb(), mlflow.Mlflow("p"), trackio.Trackio("p"), tensorboard.TensorBoard()
print(sorted({"wandb", "mlflow", "trackio", "tensorboard", "torch", "PIL"} & set(sys.modules)))
"""
    for library in ("wandb", "mlflow", "trackio"):
        pytest.importorskip(library)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
