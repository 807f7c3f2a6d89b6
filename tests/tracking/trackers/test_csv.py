"""`runner.tracking.trackers.csv`: pandas reads one row for each step, also after any interruption."""

import csv
import math
import os

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.tracking.protocol import RunInfo
from runner.tracking.trackers.csv import Csv


def read_rows(folder):
    with open(folder / "metrics.csv", newline="") as file:
        rows = list(csv.reader(file))
    assert {len(row) for row in rows} <= {len(rows[0])}
    return [{name: value for name, value in zip(rows[0], row, strict=True) if value} for row in rows[1:]]


def open_csv(folder, **facts):
    warned = []
    tracker = Csv()
    tracker.open(RunInfo(folder, warn=warned.append, **facts))
    return tracker, warned


def log_run(folder, first, last, evaluates=2, **facts):
    """Logs like a run that evaluates and saves every two steps."""
    tracker, warned = open_csv(folder, **facts)
    for step in range(first, last + 1):
        tracker.log(step, step * 0.5, {"train/loss": step / 7, "train/lr": 1e-3})
        if step % evaluates == 0:
            tracker.log(step, step * 0.5 + 0.1, {"eval/loss": step / 3})
            tracker.flush()
        tracker.write()
    tracker.close("finished")
    return warned


def test_a_step_is_one_row_with_the_exact_numbers_of_all_its_calls(tmp_path):
    log_run(tmp_path, 1, 4)
    rows = read_rows(tmp_path)
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"]
    assert [*rows[1]] == ["step", "time_s", "train/loss", "train/lr", "eval/loss"]
    assert [float(row["train/loss"]) for row in rows] == [step / 7 for step in range(1, 5)]
    assert [float(row["eval/loss"]) for row in rows if "eval/loss" in row] == [2 / 3, 4 / 3]


def test_pandas_reads_it(tmp_path):
    pandas = pytest.importorskip("pandas")
    tracker, _ = open_csv(tmp_path)
    tracker.log(1, 0.5, {"loss": math.nan, "big": math.inf, "n": 2**60})
    tracker.log(2, 1.0, {'a "b", c\n': 0.1 + 0.2})
    tracker.close("finished")
    frame = pandas.read_csv(tmp_path / "metrics.csv")
    assert [*frame.columns] == ["step", "time_s", "loss", "big", "n", 'a "b", c\\n']
    assert frame["step"].tolist() == [1, 2]
    assert frame['a "b", c\\n'][1] == pytest.approx(0.3)
    assert frame["big"][0] == math.inf
    assert frame["n"][0] == 2**60
    assert frame["loss"].isna().all()


def test_numbers_after_a_flush_are_added_to_the_row_of_their_step(tmp_path):
    tracker, _ = open_csv(tmp_path)
    tracker.log(1, 0.0, {"a": 1.0})
    tracker.flush()
    assert read_rows(tmp_path) == [{"step": "1", "time_s": "0.000000", "a": "1.0"}]
    tracker.flush()
    tracker.log(1, 0.5, {"b": 2.0})
    tracker.write()
    tracker.log(2, 1.0, {"a": 3.0})
    tracker.write()
    assert [row["step"] for row in read_rows(tmp_path)] == ["1"]
    tracker.close("finished")
    assert [(row["step"], row.get("a"), row.get("b")) for row in read_rows(tmp_path)] == [
        ("1", "1.0", "2.0"),
        ("2", "3.0", None),
    ]


@settings(deadline=None, max_examples=20)
@given(end=st.integers(1, 9), resume=st.integers(0, 9), torn=st.integers(0, 40), pending=st.booleans())
def test_a_killed_and_resumed_run_leaves_the_file_of_the_uninterrupted_one(
    tmp_path_factory, end, resume, torn, pending
):
    resume = min(resume, end) // 2 * 2  # a checkpoint
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    log_run(whole, 1, 9)
    log_run(cut, 1, end)
    if end > resume:  # a kill in the middle of a write, after the checkpoint
        rows = (cut / "metrics.csv").read_bytes().split(b"\r\n")
        size = sum(len(row) + 2 for row in rows[: resume + 1])
        os.truncate(cut / "metrics.csv", max(size, (cut / "metrics.csv").stat().st_size - torn))
    tracker, _ = open_csv(cut, resume_step=resume, is_eval_pending=pending)
    if pending and resume:
        tracker.log(resume, resume * 0.5 + 0.1, {"eval/loss": resume / 3})
    tracker.close("interrupted")
    log_run(cut, resume + 1, 9, resume_step=resume)
    assert sorted(read_rows(cut), key=lambda row: int(row["step"])) == read_rows(whole)


def test_a_resume_keeps_what_the_file_had_and_a_kill_after_it_loses_nothing(tmp_path):
    log_run(tmp_path, 1, 4)
    kept = (tmp_path / "metrics.csv").read_bytes()
    open_csv(tmp_path, resume_step=4)  # killed before it logs
    assert (tmp_path / "metrics.csv").read_bytes() == kept


def test_damaged_rows_are_left_out_and_reported(tmp_path):
    log_run(tmp_path, 1, 6)
    path = tmp_path / "metrics.csv"
    path.write_bytes(path.read_bytes().replace(b"\r\n3,", b"\r\n\xff,"))
    assert log_run(tmp_path, 7, 8, resume_step=6) == [f"{path}: damaged; 1 of its rows were left out"]
    assert [row["step"] for row in read_rows(tmp_path)] == ["1", "2", "4", "5", "6", "7", "8"]
    path.write_bytes(b"something else\r\n1,2\r\n")
    assert log_run(tmp_path, 9, 9, resume_step=8) == [f"{path}: damaged; its rows were left out, as it has no header"]
    assert [row["step"] for row in read_rows(tmp_path)] == ["9"]


def test_a_run_without_a_csv_starts_one_when_it_is_resumed(tmp_path):
    log_run(tmp_path, 5, 6, resume_step=4)
    assert [row["step"] for row in read_rows(tmp_path)] == ["5", "6"]


def test_another_runs_file_is_not_overwritten(tmp_path):
    log_run(tmp_path, 1, 2)
    with pytest.raises(FileExistsError, match="holds a run's numbers already"):
        open_csv(tmp_path)


def test_columns_are_bounded(tmp_path):
    tracker, warned = open_csv(tmp_path)
    for step in range(1, 1202):
        tracker.log(step, 0.0, {f"name {step}": 1.0})
    tracker.close("finished")
    (warning,) = warned
    assert "1000 columns are the most: name 1001" in warning
    assert len(read_rows(tmp_path)) == 1201


def test_a_name_of_the_files_own_is_named(tmp_path):
    tracker, _ = open_csv(tmp_path)
    with pytest.raises(ValueError, match=r"'step' is a name of metrics\.csv's own"):
        tracker.log(1, 0.0, {"step": 1.0})
    tracker.close(None)
