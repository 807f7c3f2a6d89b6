"""`runner.tracking.tracker`: JSON readers and TensorBoard read back exactly the logged numbers."""

import json
import os
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import api_pb2, plugin_data_pb2

from runner.tracking.event_file import find_event_files, read_records
from runner.tracking.tracker import TrackerThread
from runner.tracking.trackers.jsonl import Jsonl
from runner.tracking.trackers.tensorboard import TensorBoard

ROOT = Path(__file__).parents[2]


def read_lines(folder: Path) -> list[dict[str, Any]]:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    text = (folder / "metrics.jsonl").read_text()
    assert not text or text.endswith("\n")
    return [json.loads(line, parse_constant=refuse) for line in text.splitlines()]


def read_events(folder: Path) -> EventAccumulator:
    return EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0, "images": 0}).Reload()


def scalars(folder: Path, tag: str) -> list[tuple[int, float]]:
    return [(event.step, event.value) for event in read_events(folder).Scalars(tag)]


def hparams(folder: Path) -> dict[str, plugin_data_pb2.HParamsPluginData]:
    contents = read_events(folder).PluginTagToContent("hparams")
    return {
        tag.removeprefix("_hparams_/"): plugin_data_pb2.HParamsPluginData.FromString(content)
        for tag, content in contents.items()
    }


def run_python(code: str, folder: Path, **options: Any) -> "subprocess.Popen[str]":
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([sys.executable, "-c", code, str(folder)], env=environ, **pipes, **options)


def wait_for(is_so: Any, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not is_so():
        assert time.monotonic() < end, "it never came"
        time.sleep(0.01)


def test_lines_hold_the_exact_values_in_order(tmp_path: Path) -> None:
    values = {"train/loss": 0.1 + 0.2, "train/lr": 1.2345e-05, "train/tokens": 2**60, 'a "b" é': -0.0}
    tracker = TrackerThread(tmp_path)
    tracker.log(7, values)
    tracker.log(7, {"eval/loss": 1 / 3})
    tracker.close()
    first, second = read_lines(tmp_path)
    assert list(first) == ["step", "time_s", *values]
    assert {name: first[name] for name in values} == values
    assert (first["step"], second["step"], second["eval/loss"]) == (7, 7, 1 / 3)
    assert 0 <= first["time_s"] <= second["time_s"] < 60


def test_tensorboard_reads_the_same_scalars_back(tmp_path: Path) -> None:
    rows = [{"train/loss": step / 7, "train/lr": 1e-3 / (step + 1)} for step in range(500)]
    tracker = TrackerThread(tmp_path)
    for step, row in enumerate(rows):
        tracker.log(step, row)
    tracker.close()
    for tag in rows[0]:
        assert scalars(tmp_path, tag) == [(step, np.float32(row[tag])) for step, row in enumerate(rows)]
    begun = read_events(tmp_path).Scalars("train/loss")[0].wall_time
    assert abs(begun - time.time()) < 60


def test_a_call_is_one_record_of_the_event_file(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    for step in range(20):
        tracker.log(step, {f"metric_{i}": float(i) for i in range(8)})
    tracker.close()
    [path] = find_event_files(tmp_path)
    with open(path, "rb") as file:
        assert len(list(read_records(file))) == 1 + 20 + 1  # the header, the steps, the end of the session


def test_numbers_without_json_are_null_in_lines_and_themselves_in_events(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    tracker.log(1, {"nan": float("nan"), "inf": float("inf"), "fine": 2.0})
    tracker.close()
    [line] = read_lines(tmp_path)
    assert (line["nan"], line["inf"], line["fine"]) == (None, None, 2.0)
    assert np.isnan(scalars(tmp_path, "nan")[0][1])
    assert scalars(tmp_path, "inf") == [(1, float("inf"))]


def test_tensors_and_numpy_numbers_and_bools_are_numbers(tmp_path: Path) -> None:
    values = {
        "tensor": torch.tensor(0.1),
        "bf16": torch.tensor(0.5, dtype=torch.bfloat16),
        "float64": np.float64(0.1),
        "float32": np.float32(0.1),
        "int": np.int64(3),
        "bool": True,
    }
    tracker = TrackerThread(tmp_path)
    tracker.log(1, values)
    tracker.close()
    [line] = read_lines(tmp_path)
    expected = [float(np.float32(0.1)), 0.5, 0.1, float(np.float32(0.1)), 3, 1]
    assert [line[name] for name in values] == expected
    assert scalars(tmp_path, "bool") == [(1, 1.0)]


def test_the_callers_dict_may_be_reused(tmp_path: Path) -> None:
    tracker, values = TrackerThread(tmp_path), {"loss": 0.0}
    for step in range(100):
        values["loss"] = float(step)
        tracker.log(step, values)
    tracker.close()
    assert [line["loss"] for line in read_lines(tmp_path)] == [float(step) for step in range(100)]


def test_numbers_reach_the_disk_while_the_run_goes_on(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path, flush_s=0.05)
    tracker.log(1, {"loss": 1.0})
    wait_for(lambda: (tmp_path / "metrics.jsonl").exists() and read_lines(tmp_path))
    wait_for(lambda: find_event_files(tmp_path) and "loss" in read_events(tmp_path).Tags()["scalars"])
    tracker.close()


def test_text_is_shown_by_the_text_plugin(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    tracker.text(3, "eval/sample", "def f(é):\n    pass \udc80")
    tracker.close()
    events = read_events(tmp_path)
    [event] = events.Tensors("eval/sample")
    assert event.step == 3
    assert event.tensor_proto.string_val[0].decode() == "def f(é):\n    pass \\udc80"
    assert events.SummaryMetadata("eval/sample").plugin_data.plugin_name == "text"


@pytest.mark.parametrize("kind", ["numpy", "torch", "figure"])
def test_pictures_come_back_with_their_pixels_and_sizes(tmp_path: Path, kind: str) -> None:
    import io

    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (5, 9, 3), dtype=np.uint8)
    picture: Any = {
        "numpy": pixels.copy(),
        "torch": torch.from_numpy(pixels.copy()),
        "figure": Figure((2, 1), 50),
    }
    picture = picture[kind]
    tracker = TrackerThread(tmp_path)
    tracker.image(4, "eval/picture", picture)
    if kind != "figure":
        picture[:] = 0
    tracker.close()
    [event] = read_events(tmp_path).Images("eval/picture")
    shown = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)))
    assert event.step == 4
    assert (event.height, event.width) == shown.shape[:2] == ((50, 100) if kind == "figure" else (5, 9))
    if kind != "figure":
        np.testing.assert_array_equal(shown, pixels)


def test_a_picture_of_another_type_is_an_error_of_the_call(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    with pytest.raises(ValueError, match=r"'p': expected uint8 \[height, width, 3\], found float64 \[4, 4\]"):
        tracker.image(1, "p", np.zeros((4, 4)))
    tracker.close()


def test_hparams_lie_in_the_runs_own_event_file(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    tracker.hparams({"lr": 3e-4, "layers": 4, "model": "gpt", "tied": True}, ["eval/loss"])
    tracker.log(1, {"eval/loss": 2.0})
    tracker.close("failed")
    assert len(find_event_files(tmp_path)) == 1
    found = hparams(tmp_path)
    values = found["session_start_info"].session_start_info.hparams
    assert (values["lr"].number_value, values["layers"].number_value) == (3e-4, 4)
    assert (values["model"].string_value, values["tied"].bool_value) == ("gpt", True)
    experiment = found["experiment"].experiment
    assert [info.name for info in experiment.hparam_infos] == ["lr", "layers", "model", "tied"]
    assert [info.name.tag for info in experiment.metric_infos] == ["eval/loss"]
    assert found["session_end_info"].session_end_info.status == api_pb2.STATUS_FAILURE


def test_without_metrics_tensorboard_is_left_to_gather_the_columns_of_all_runs(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    tracker.hparams({"lr": 3e-4})
    tracker.close()
    assert sorted(hparams(tmp_path)) == ["session_end_info", "session_start_info"]


def test_an_hparam_that_cannot_be_shown_is_named(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    with pytest.raises(TypeError, match="'betas' is a list"):
        tracker.hparams({"betas": [0.9, 0.95]})  # type: ignore[dict-item]
    tracker.close()


@pytest.mark.parametrize("has_events", [True, False])
def test_a_kind_of_file_that_is_switched_off_is_not_written(tmp_path: Path, has_events: bool) -> None:
    tracker = TrackerThread(tmp_path, {"only": TensorBoard() if has_events else Jsonl()})
    tracker.log(1, {"loss": 1.0})
    tracker.text(1, "t", "text")
    tracker.image(1, "i", np.zeros((2, 2, 3), np.uint8))
    tracker.hparams({"lr": 1.0})
    tracker.close()
    assert bool(find_event_files(tmp_path)) == has_events
    assert (tmp_path / "metrics.jsonl").exists() != has_events


def test_another_runs_numbers_are_never_mixed_in(tmp_path: Path) -> None:
    first = TrackerThread(tmp_path)
    first.log(1, {"loss": 1.0})
    first.close()
    before = (tmp_path / "metrics.jsonl").read_bytes()
    with pytest.raises(FileExistsError, match=r"holds a run's numbers \(events.*metrics.jsonl\): resume it"):
        TrackerThread(tmp_path)
    assert (tmp_path / "metrics.jsonl").read_bytes() == before


def test_resume_leaves_each_step_once_and_time_going_on(tmp_path: Path) -> None:
    first = TrackerThread(tmp_path)
    first.hparams({"lr": 1.0}, ["loss"])
    for step in range(1, 11):
        first.log(step, {"loss": float(step)})
        if step % 3 == 0:
            first.log(step, {"eval/loss": float(step)})
            first.text(step, "sample", str(step))
    first.close("interrupted")
    kept_s = read_lines(tmp_path)[7]["time_s"]  # of step 6's evaluation
    second = TrackerThread(tmp_path, resume_step=6)
    second.hparams({"lr": 2.0}, ["loss"])
    for step in range(7, 13):
        second.log(step, {"loss": step + 0.5})
    second.close("finished")
    lines = read_lines(tmp_path)
    assert [line["step"] for line in lines if "loss" in line] == list(range(1, 13))
    assert [line["step"] for line in lines if "eval/loss" in line] == [3, 6]
    assert lines[7]["time_s"] == kept_s < lines[8]["time_s"]
    expected = [(step, float(step)) for step in range(1, 7)] + [(step, step + 0.5) for step in range(7, 13)]
    assert scalars(tmp_path, "loss") == expected
    assert scalars(tmp_path, "eval/loss") == [(3, 3.0), (6, 6.0)]
    assert [event.step for event in read_events(tmp_path).Tensors("sample")] == [3, 6]
    found = hparams(tmp_path)
    assert found["session_start_info"].session_start_info.hparams["lr"].number_value == 2.0
    assert found["session_end_info"].session_end_info.status == api_pb2.STATUS_SUCCESS


def test_resume_in_a_folder_without_numbers_starts_them(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path, resume_step=100)
    tracker.log(101, {"loss": 1.0})
    tracker.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [101]
    assert scalars(tmp_path, "loss") == [(101, 1.0)]


def test_a_tensorboard_that_watches_forgets_the_steps_that_a_resume_repeats(tmp_path: Path) -> None:
    first = TrackerThread(tmp_path)
    for step in range(10):
        first.log(step, {"loss": 0.0})
    first.close()
    watching = read_events(tmp_path)
    second = TrackerThread(tmp_path, resume_step=4)
    second.log(5, {"loss": 1.0})
    second.close()
    found = [(event.step, event.value) for event in watching.Reload().Scalars("loss")]
    assert found == [(0, 0), (1, 0), (2, 0), (3, 0), (4, 0), (5, 1)]


def test_a_killed_run_resumes_without_a_gap_or_a_double(tmp_path: Path) -> None:
    code = """
import itertools, sys, time
from runner.tracking.tracker import TrackerThread
from runner.tracking.trackers.jsonl import Jsonl
from runner.tracking.trackers.tensorboard import TensorBoard
tracker = TrackerThread(sys.argv[1], flush_s=0.02)
for step in itertools.count(1):
    tracker.log(step, {"loss": float(step), "lr": 0.1})
    time.sleep(0.0002)
"""
    path = tmp_path / "metrics.jsonl"
    run = run_python(code, tmp_path)
    wait_for(lambda: path.exists() and path.stat().st_size > 20_000)
    run.send_signal(signal.SIGKILL)
    run.communicate()
    for torn in (path, *find_event_files(tmp_path)):  # as if the kill had met the middle of a write
        os.truncate(torn, torn.stat().st_size - 7)
    tracker = TrackerThread(tmp_path, resume_step=100)
    tracker.log(101, {"loss": -1.0, "lr": 0.2})
    tracker.close()
    assert [line["loss"] for line in read_lines(tmp_path)] == [*map(float, range(1, 101)), -1.0]
    assert scalars(tmp_path, "loss") == [*((step, float(step)) for step in range(1, 101)), (101, -1.0)]


def test_a_line_torn_by_a_kill_goes_even_when_its_step_stays(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "time_s": 2.5, "loss": 1.0}\n{"step": 2, "time_s": 3.0')
    tracker = TrackerThread(tmp_path, resume_step=2)
    tracker.log(3, {"loss": 3.0})
    tracker.close()
    first, last = read_lines(tmp_path)
    assert (first["step"], last["step"]) == (1, 3)
    assert last["time_s"] >= 2.5


def test_a_full_disk_is_raised_once_and_later_numbers_take_no_memory(tmp_path: Path) -> None:
    code = """
import sys, time
from runner.tracking.tracker import TrackerThread
from runner.tracking.trackers.jsonl import Jsonl
from runner.tracking.trackers.tensorboard import TensorBoard
tracker = TrackerThread(sys.argv[1], flush_s=0.01)
told = []
for step in range(200_000):
    try:
        tracker.log(step, {"loss": 1.0, "lr": 2.0})
    except OSError as error:
        told.append(error)
        break
    if step % 100 == 0:
        time.sleep(0.001)
before = sys.getallocatedblocks()
for step in range(20_000):
    tracker.log(step, {"loss": 1.0, "lr": 2.0})
assert sys.getallocatedblocks() - before < 1000
tracker.close()
tracker.close()
print(len(told), told[0].filename, told[0])
"""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, 50_000))

    out, err = run_python(code, tmp_path, preexec_fn=limit).communicate(timeout=60)
    assert out.startswith("1 "), err
    assert str(tmp_path) in out
    assert "File too large" in out
    assert (tmp_path / "metrics.jsonl").stat().st_size <= 50_000


def test_a_full_disk_is_raised_by_close_if_nothing_was_logged_after(tmp_path: Path) -> None:
    code = """
import sys
from runner.tracking.tracker import TrackerThread
from runner.tracking.trackers.jsonl import Jsonl
from runner.tracking.trackers.tensorboard import TensorBoard
tracker = TrackerThread(sys.argv[1], flush_s=60)
for step in range(2000):
    tracker.log(step, {"loss": 1.0})
try:
    tracker.close()
except OSError as error:
    print(error.filename)
tracker.close()
"""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out, err = run_python(code, tmp_path, preexec_fn=limit).communicate(timeout=60)
    assert out.strip() == str(tmp_path / "metrics.jsonl"), err


def test_a_resume_on_a_full_disk_loses_nothing(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    for step in range(2000):
        tracker.log(step, {"loss": 1.0})
    tracker.close()
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    code = """
import sys
from runner.tracking.tracker import TrackerThread
from runner.tracking.trackers.jsonl import Jsonl
from runner.tracking.trackers.tensorboard import TensorBoard
try:
    TrackerThread(sys.argv[1], resume_step=1500).close()
except OSError as error:
    print(error.filename)
"""

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))

    out, err = run_python(code, tmp_path, preexec_fn=limit).communicate(timeout=60)
    assert out.strip() == str(tmp_path / "metrics.jsonl"), err
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("loss", "low", "'loss' is a str, not a number"),
        ("step", 1.0, "'step' is a name of metrics.jsonl's own"),
    ],
)
def test_an_invalid_value_is_named_and_earlier_ones_stay(tmp_path: Path, name: str, value: Any, message: str) -> None:
    tracker = TrackerThread(tmp_path, flush_s=60)
    tracker.log(1, {"loss": 1.0})
    tracker.log(2, {name: value})
    with pytest.raises((TypeError, ValueError), match=message):
        tracker.close()
    assert [line["step"] for line in read_lines(tmp_path)] == [1]
    assert scalars(tmp_path, "loss") == [(1, 1.0)]


def test_a_number_after_close_is_an_error(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    tracker.close()
    with pytest.raises(ValueError, match="is closed"):
        tracker.log(1, {"loss": 1.0})


def test_a_run_that_ends_without_close_still_leaves_every_number(tmp_path: Path) -> None:
    code = """
import sys
from runner.tracking.tracker import TrackerThread
from runner.tracking.trackers.jsonl import Jsonl
from runner.tracking.trackers.tensorboard import TensorBoard
tracker = TrackerThread(sys.argv[1], flush_s=60)
for step in range(1000):
    tracker.log(step, {"loss": float(step)})
raise SystemExit(3)
"""
    run = run_python(code, tmp_path)
    run.communicate(timeout=60)
    assert run.returncode == 3
    assert [line["step"] for line in read_lines(tmp_path)] == list(range(1000))


def test_a_signal_handler_may_log_at_any_moment(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path, flush_s=0.001)
    num_signals = 0

    def handle(number: int, frame: Any) -> None:
        nonlocal num_signals
        num_signals += 1
        tracker.log(-1, {"signal": 1.0})

    before = signal.signal(signal.SIGALRM, handle)
    signal.setitimer(signal.ITIMER_REAL, 0.0005, 0.0005)
    try:
        for step in range(30_000):
            tracker.log(step, {"loss": 1.0})
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    tracker.close()
    steps = [line["step"] for line in read_lines(tmp_path)]
    assert num_signals > 0
    assert steps.count(-1) == num_signals
    assert [step for step in steps if step >= 0] == list(range(30_000))


def test_the_modules_import_neither_torch_nor_tensorboard_nor_hydra(tmp_path: Path) -> None:
    code = """
import sys
import runner.tracking.console, runner.tracking.run_record, runner.tracking.tracker
print(sorted({"torch", "tensorboard", "hydra", "omegaconf", "numpy", "tqdm"} & set(sys.modules)))
"""
    out, err = run_python(code, tmp_path).communicate(timeout=60)
    assert out.strip() == "[]", err


def test_after_a_flush_the_numbers_are_on_disk_and_more_may_follow(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path, flush_s=60.0)
    for step in range(500):
        tracker.log(step, {"loss": float(step)})
        if step % 100 == 99:
            tracker.flush()
            assert [line["step"] for line in read_lines(tmp_path)] == list(range(step + 1))
    tracker.close()


def test_a_failed_flush_raises_and_the_next_call_raises_too(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    tracker.flush()
    (tmp_path / "metrics.jsonl").unlink()
    tracker.log(1, {"loss": 1.0})
    for _ in range(2):
        with pytest.raises(OSError, match=r"the run's numbers can't be written: .*deleted"):
            tracker.flush()
    with pytest.raises(FileNotFoundError, match="deleted"):
        tracker.log(2, {"loss": 1.0})
    tracker.close()


def test_a_name_with_a_lone_surrogate_is_the_same_in_both_files_and_each_line_is_one(tmp_path):
    name = "a\ud800\n\x1b[31m"
    tracker = TrackerThread(tmp_path)
    tracker.log(1, {name: 1.0})
    tracker.text(1, name, name)
    tracker.hparams({name: name}, [name])
    tracker.close()
    (line,) = (tmp_path / "metrics.jsonl").read_bytes().splitlines()
    assert json.loads(line)["a\\ud800\n\x1b[31m"] == 1.0
    assert all(32 <= byte < 127 for byte in line)
    warnings = []
    TrackerThread(tmp_path, resume_step=1, recorded={"lines": 1, "events": 1, "step": 1}, warn=warnings.append).close()
    assert warnings == []
