"""Jobs, sent through files and through both kinds of stores."""

import datetime
import os
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from specs import make_spec

from runner.config.errors import ConfigError
from runner.launch import worker
from runner.launch.environment import ProcessEnvironment
from runner.launch.job import Job, JobChannel, JobError
from runner.utils.files import message

TEXTS = st.text("ab\0é\n\U0001f600\ud83d\ude00", max_size=5)  # lone surrogates too, and two that stand in a row
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | TEXTS | st.binary(),
    lambda children: st.lists(children) | st.dictionaries(TEXTS | st.integers() | st.booleans(), children),
    max_leaves=10,
)


@pytest.fixture(scope="module")
def tcp_store():
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture(params=["file", "tcp"])
def store(request, tmp_path):
    if request.param == "file":
        return dist.FileStore(str(tmp_path / "store"), -1)
    return dist.PrefixStore(str(tmp_path), request.getfixturevalue("tcp_store"))


@settings(max_examples=25, deadline=None)
@given(st.dictionaries(TEXTS, VALUES), st.dictionaries(TEXTS, st.binary()), st.lists(TEXTS), st.booleans())
def test_a_job_is_read_as_it_was_written(values, files, command, flag):
    spec = make_spec(model=values | {"folder": Path("a/b")}, timeout_s=float("inf"))
    job = Job(spec, Path("/a/\udcff run"), files, command, is_restart=flag, is_unclaimed=not flag)
    assert Job.decode(job.encode()) == job


def test_an_object_in_the_config_that_cannot_be_sent_is_reported_by_its_key(tmp_path):
    spec = make_spec(model={"layers": [1, {"since": datetime.date(2020, 1, 2)}]})
    with pytest.raises(ConfigError, match=r"^model\.layers\.1\.since: expected a text, .*; found a datetime\.date; "):
        Job(spec, tmp_path, {}).encode()


class Canary:
    def __reduce__(self):
        return os.mkdir, (os.environ["CANARY"],)


def channels(store):
    return [JobChannel(store, ProcessEnvironment(rank=rank, world_size=2)) for rank in range(2)]


def test_jobs_and_the_end_go_from_the_first_rank_to_the_others(store, tmp_path):
    first, second = channels(store)
    jobs = [Job(make_spec(seed=seed), tmp_path, {"config": b"\xff"}) for seed in range(2)]
    for job in jobs:
        first.send(job)
    assert [second.receive() for _ in jobs] == jobs
    # so that `end` does not wait here until the other has read it
    first._environment = ProcessEnvironment(rank=0, world_size=2, has_external_store=True)
    first.end(75)
    assert second.receive() == 75


@pytest.mark.parametrize("content", ["pickle", b"", b"{}", b"[1]", b"\xff\x00", b"null", b'"2"', b"2.5", b"[" * 99999])
def test_anything_else_in_a_store_is_one_error_and_executes_nothing(store, tmp_path, monkeypatch, content):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    data = pickle.dumps(Canary()) if content == "pickle" else content
    first, second = channels(store)
    first._put(data)
    with pytest.raises(JobError, match=r"job: expected a run as rank 0 composed it, found .*; start all"):
        second.receive()
    assert not (tmp_path / "canary").exists()


@pytest.mark.parametrize(
    "change",
    [
        {"folder": "text"},
        {"files": {"a": "text"}},
        {"command": [1]},
        {"is_restart": 1},
        {"other": 1},
        {"spec": "text"},
        {"spec": {}},
        {"spec": make_spec().plain | {"distributed": {"nnodes": 1, "unknown": 2}}},
    ],
    ids=str,
)
def test_a_job_with_other_fields_or_types_is_refused(tmp_path, change):
    values = message.decode(Job(make_spec(), tmp_path, {}).encode()) | change
    with pytest.raises(JobError, match=r"found .*; start all ranks with the same version"):
        Job.decode(message.encode(values))


def test_a_pickle_beside_the_run_that_is_kept_for_a_restart_executes_nothing(tmp_path, monkeypatch):
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    group = worker.WorkerGroup(str(tmp_path / "store"))
    assert group.find_kept_job() is None
    kept = Job(make_spec(), tmp_path, {})
    group.keep_job(kept)
    assert worker.WorkerGroup(str(tmp_path / "store")).find_kept_job() == kept
    group._store.set("only", pickle.dumps(Canary()))
    with pytest.raises(JobError):
        group.find_kept_job()
    assert not (tmp_path / "canary").exists()


def test_a_worker_reports_what_is_wrong_with_its_job_and_restarts_nothing(tmp_path):
    (tmp_path / "job").write_bytes(pickle.dumps({"settings": {}}))
    command = [sys.executable, "-m", "runner.launch.worker", str(tmp_path), str(os.getpid())]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert (done.returncode, done.stdout) == (0, "")
    assert done.stderr.startswith("job: expected a run as rank 0 composed it, found no message")
    assert done.stderr.count("\n") == 1
    assert (tmp_path / "status").read_text() == "2"
