"""`runner.tracking.isolated`: a tracker that fails, hangs or is slow costs its own numbers and nothing else."""

import json
import threading
import time

import pytest

from runner.tracking.protocol import RunInfo, find_fault
from runner.tracking.tracker import TrackerThread
from runner.tracking.trackers.jsonl import Jsonl


class Recorder:
    """Remembers its calls."""

    def __init__(self):
        self.calls = []

    def __getattr__(self, name):
        if name in ("open", "log", "hparams", "text", "image", "audio", "histogram", "write", "close"):
            return lambda *arguments: self.calls.append((name, *arguments))
        raise AttributeError(name)


class Minimal:
    """The smallest tracker."""

    def __init__(self):
        self.numbers = []

    def log(self, step, time_s, numbers):
        self.numbers.append((step, dict(numbers)))


class Failing(Minimal):
    remedy = "look at the server"

    def __init__(self, method, error=RuntimeError):
        super().__init__()
        self.closed = []

        def fail(*arguments):
            raise error("no\nserver")

        setattr(self, method, fail)
        if method != "close":
            self.close = self.closed.append


class Hanging(Minimal):
    timeout_s = 0.2

    def __init__(self):
        super().__init__()
        self.released = threading.Event()

    def log(self, step, time_s, numbers):
        self.released.wait()
        super().log(step, time_s, numbers)


def lines_of(folder):
    return [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()]


def log_steps(folder, tracker, last=5, **options):
    """Logs steps beside metrics.jsonl; returns the warnings and the seconds that this took."""
    warned = []
    began = time.monotonic()
    thread = TrackerThread(folder, {"jsonl": Jsonl(), "mine": tracker}, warn=warned.append, flush_s=0.02, **options)
    for step in range(1, last + 1):
        thread.log(step, {"loss": float(step)})
        thread.flush()
    thread.close("finished")
    assert lines_of(folder) == [*range(1, last + 1)]
    return warned, time.monotonic() - began


def test_a_tracker_receives_every_call_in_order_in_one_thread(tmp_path):
    tracker = Recorder()
    thread = TrackerThread(tmp_path, {"mine": tracker}, name="digits", run_id="abc")
    thread.hparams({"lr": 0.1})
    thread.log(1, {"loss": 1.0})
    thread.text(1, "sample", "text")
    thread.log(2, {"loss": float("nan")})
    thread.close("interrupted")
    calls = [call for call in tracker.calls if call[0] != "write"]
    assert [call[0] for call in calls] == ["open", "hparams", "log", "text", "log", "close"]
    info = calls[0][1]
    assert isinstance(info, RunInfo)
    assert (info.folder, info.name, info.id, info.resume_step) == (tmp_path, "digits", "abc", None)
    assert calls[1][1:] == ({"lr": 0.1}, None)
    assert calls[2][1] == 1
    assert calls[2][3] == {"loss": 1.0}
    assert calls[3][1:2] + calls[3][3:] == (1, "sample", "text")
    assert calls[-1][1:] == ("interrupted",)


def test_only_log_is_required(tmp_path):
    tracker = Minimal()
    thread = TrackerThread(tmp_path, {"mine": tracker})
    thread.hparams({"lr": 0.1})
    thread.text(1, "sample", "text")
    thread.log(1, {"loss": 1.0})
    thread.close()
    assert tracker.numbers == [(1, {"loss": 1.0})]
    assert find_fault(tracker) is None
    assert find_fault(object()) == "expected an object with log(step, time_s, numbers), found object"


@pytest.mark.parametrize("error", [RuntimeError, SystemExit, KeyboardInterrupt])
@pytest.mark.parametrize("method", ["open", "log", "write", "close"])
def test_a_failing_tracker_is_one_warning_and_the_run_goes_on(tmp_path, method, error):
    tracker = Failing(method, error)
    warned, _ = log_steps(tmp_path, tracker)
    (warning,) = warned
    assert warning.startswith(f"trackers.mine: {error.__name__}: no")
    assert "the run goes on without it" in warning
    assert warning.endswith("look at the server")
    assert "\n" not in warning
    assert tracker.closed == ([] if method == "close" else [None])


def test_a_hanging_tracker_delays_neither_flushes_nor_the_end(tmp_path):
    tracker = Hanging()
    warned, seconds = log_steps(tmp_path, tracker, last=50)
    assert warned == ["trackers.mine: has not ended after 0.2 s; its last numbers may be missing"]
    assert seconds < 10
    tracker.released.set()


def test_a_slow_tracker_loses_what_exceeds_its_queue(tmp_path, monkeypatch):
    monkeypatch.setattr("runner.tracking.isolated._MAX_WAITING", 10)
    tracker = Hanging()
    tracker.timeout_s = 30.0
    warned = []
    thread = TrackerThread(tmp_path, {"jsonl": Jsonl(), "mine": tracker}, warn=warned.append, flush_s=0.02)
    for step in range(1, 31):
        thread.log(step, {"loss": 1.0})
        thread.flush()
    tracker.released.set()
    thread.close()
    (warning,) = warned
    step = int(warning.removeprefix("trackers.mine: is too slow: it misses what is logged at step ").split()[0])
    assert [step for step, _ in tracker.numbers] == [*range(1, step)]
    assert 10 <= step <= 13
    assert lines_of(tmp_path) == [*range(1, 31)]


def test_a_medium_that_a_tracker_cannot_show_costs_this_medium_alone(tmp_path):
    tracker = Minimal()

    def fail(*arguments):
        raise ImportError("there is no PIL")

    tracker.text = fail
    warned = []
    thread = TrackerThread(tmp_path, {"mine": tracker}, warn=warned.append)
    for step in range(3):
        thread.text(step, "sample", "text")
        thread.log(step, {"loss": 1.0})
    thread.close()
    assert warned == ["trackers.mine.text: ImportError: there is no PIL; it gets no more of these"]
    assert len(tracker.numbers) == 3


def test_a_resume_names_the_steps_that_a_tracker_cannot_forget(tmp_path):
    log_steps(tmp_path, Minimal(), last=5)
    for truncates in (False, True):
        tracker, warned = Minimal(), []
        tracker.truncates = truncates
        TrackerThread(tmp_path, {"jsonl": Jsonl(), "mine": tracker}, resume_step=3, warn=warned.append).close()
        said = "trackers.mine: keeps what an earlier session logged of steps 4 to 5, which this one repeats"
        assert warned == ([] if truncates else [said])
        log_steps_again = TrackerThread(tmp_path, {"jsonl": Jsonl()}, resume_step=3)
        log_steps_again.log(4, {"loss": 4.0})
        log_steps_again.log(5, {"loss": 5.0})
        log_steps_again.close()


def test_a_resume_that_repeats_nothing_warns_of_nothing(tmp_path):
    log_steps(tmp_path, Minimal(), last=5)
    warned = []
    TrackerThread(tmp_path, {"jsonl": Jsonl(), "mine": Minimal()}, resume_step=5, warn=warned.append).close()
    assert warned == []


def test_no_thread_is_left(tmp_path):
    before = threading.active_count()
    log_steps(tmp_path, Minimal())
    assert threading.active_count() == before
