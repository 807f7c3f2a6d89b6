"""`runner.tracking.repair`: a resume restores numbers that a damaged file lacks, or names the file and steps."""

import json
import re
import shutil
import time
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary
from tensorboard.summary.writer.event_file_writer import EventFileWriter

from runner.tracking.event_file import (
    encode_header,
    encode_hparams,
    encode_scalars,
    find_event_files,
    read_log,
    read_records,
)
from runner.tracking.repair import make_key, read_lines
from runner.tracking.tracker import TrackerThread
from runner.tracking.trackers.jsonl import Jsonl
from runner.tracking.trackers.tensorboard import TensorBoard

LAST = 20
EXAMPLES = 30
KINDS = {
    "both": {},
    "lines": {"trackers": {"jsonl": Jsonl()}},
    "events": {"trackers": {"tensorboard": TensorBoard()}},
}


def log_steps(folder: Path, first: int, last: int, **options: Any) -> dict[str, int]:
    """Logs like a run that evaluates every five steps; returns the counts for its checkpoint."""
    tracker = TrackerThread(folder, **options)
    tracker.hparams({"lr": 0.1})
    for step in range(first, last + 1):
        tracker.log(step, {"train/loss": step + 0.1, "train/lr": -0.5 / step})
        if step % 5 == 0:
            tracker.log(step, {"eval/loss": float("nan") if step == 5 else step + 0.2})
    counts = tracker.counts()
    tracker.close()
    return counts


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, int]]]:
    """Files of two sessions, of both kinds or of one, and the counts at their last step."""
    runs = {}
    for kind, options in KINDS.items():
        folder = tmp_path_factory.mktemp(kind)
        counts = log_steps(folder, 1, 12, **options)
        runs[kind] = folder, log_steps(folder, 13, LAST, resume_step=12, recorded=counts, **options)
    return runs


def numbers_in_lines(folder: Path) -> list[tuple[int, dict[str, float | None]]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [(line.pop("step"), {name: value for name, value in line.items() if name != "time_s"}) for line in lines]


def numbers_in_events(folder: Path) -> list[tuple[int, dict[str, float | None]]]:
    found = []
    for path in find_event_files(folder):
        with open(path, "rb") as file:
            for event in map(Event.FromString, read_records(file)):
                values = {v.tag: v.simple_value for v in event.summary.value if v.HasField("simple_value")}
                if values:
                    found.append((event.step, {k: None if v != v else v for k, v in values.items()}))
    assert [step for step, _ in found] == sorted(step for step, _ in found)
    return sorted(found, key=lambda each: (each[0], "eval/loss" in each[1]))


def wanted(first: int, last: int) -> list[tuple[int, dict[str, float | None]]]:
    found: list[tuple[int, dict[str, Any]]] = []
    for step in range(first, last + 1):
        found.append((step, {"train/loss": pytest.approx(step + 0.1), "train/lr": pytest.approx(-0.5 / step)}))
        if step % 5 == 0:
            found.append((step, {"eval/loss": None if step == 5 else pytest.approx(step + 0.2)}))
    return found


def steps_named(text: str) -> set[int]:
    found = set()
    for first, last in re.findall(r"(\d+)(?: to (\d+))?", re.findall(r"steps? ((?:\d+(?: to \d+)?(?:, )?)+)", text)[0]):
        found |= set(range(int(first), int(last or first) + 1))
    return found


DAMAGES = st.tuples(
    st.sampled_from(["truncated", "flipped", "emptied", "removed", "zeroed"]), st.floats(0, 1), st.integers(0, 7)
)


def damage(path: Path, how: tuple[str, float, int]) -> None:
    kind, share, bit = how
    content = bytearray(path.read_bytes())
    place = int(share * (len(content) - 1))
    if kind == "removed":
        path.unlink()
        return
    if kind == "flipped":
        content[place] ^= 1 << bit
    elif kind == "zeroed":
        content[place : place + 40] = bytes(len(content[place : place + 40]))
    else:
        del content[0 if kind == "emptied" else place :]
    path.write_bytes(content)


def copies(tmp_path: Path, folder: Path) -> Iterator[Path]:
    copy = tmp_path / "copy"
    shutil.rmtree(copy, ignore_errors=True)
    shutil.copytree(folder, copy)
    yield copy


@given(file=st.integers(0, 2), how=DAMAGES)
@settings(max_examples=EXAMPLES, deadline=None)
def test_a_resume_restores_the_numbers_that_a_damaged_file_lacks(
    whole: dict[str, tuple[Path, dict[str, int]]], tmp_path_factory: pytest.TempPathFactory, file: int, how: Any
) -> None:
    source, counts = whole["both"]
    (folder,) = copies(tmp_path_factory.getbasetemp(), source)
    path = sorted(folder.iterdir())[file]
    damage(path, how)
    warned: list[str] = []
    before = wanted(1, LAST)
    is_line = path.suffix == ".jsonl"
    try:
        are_lost = (numbers_in_lines if is_line else numbers_in_events)(folder) != before
    except (ValueError, AttributeError, KeyError, OSError):
        are_lost = True
    log_steps(folder, LAST + 1, 30, resume_step=LAST, recorded=counts, warn=warned.append)
    assert numbers_in_lines(folder) == wanted(1, 30)
    # TensorBoard's server drops points when an earlier step of their curve follows, so their order is the steps'.
    assert numbers_in_events(folder) == wanted(1, 30)
    read = EventAccumulator(str(folder)).Reload()
    assert [event.step for event in read.Scalars("train/loss")] == list(range(1, 31))
    assert [event.step for event in read.Scalars("eval/loss")] == list(range(5, 31, 5))
    if are_lost:
        (said,) = warned
        assert (path.name in said) or (how[0] == "removed" and said.count("or a file beside it that was removed"))
        assert " were missing " in said
    warned.clear()
    log_steps(folder, 31, 31, resume_step=30, warn=warned.append)
    assert warned == []  # whole again


@pytest.mark.parametrize("kind", ["lines", "events"])
@given(file=st.integers(0, 1), how=DAMAGES)
@settings(max_examples=EXAMPLES, deadline=None)
def test_numbers_that_no_file_holds_are_reported_by_file_and_step(
    whole: dict[str, tuple[Path, dict[str, int]]],
    tmp_path_factory: pytest.TempPathFactory,
    kind: str,
    file: int,
    how: Any,
) -> None:
    source, counts = whole[kind]
    (folder,) = copies(tmp_path_factory.getbasetemp(), source)
    paths = sorted(folder.iterdir())
    path = paths[file % len(paths)]
    damage(path, how)
    warned: list[str] = []
    log_steps(folder, LAST + 1, 30, resume_step=LAST, recorded=counts, warn=warned.append, **KINDS[kind])
    found = (numbers_in_lines if kind == "lines" else numbers_in_events)(folder)
    assert [step for step, _ in found] == sorted(step for step, _ in found)
    missing = [each for each in wanted(1, 30) if each not in found]
    if kind == "lines" and len(found) == len(wanted(1, 30)):
        return  # a changed digit, which a line alone does not show
    assert all(each in wanted(1, 30) for each in found) or kind == "lines"
    if missing:
        (said,) = warned
        assert path.parent.name in said
        assert {step for step, _ in missing} <= steps_named(said) | {step for step, _ in found}
        assert {step for step, _ in missing if step not in [s for s, _ in found]} <= steps_named(said)
    warned.clear()
    log_steps(folder, 31, 31, resume_step=30, warn=warned.append, **KINDS[kind])
    assert warned == []


def test_an_empty_call_and_the_events_of_another_writer_are_no_missing_numbers(tmp_path: Path) -> None:
    tracker = TrackerThread(tmp_path)
    tracker.log(1, {"loss": 1.0})
    tracker.log(1, {})
    counts = tracker.counts()
    tracker.close()
    writer = EventFileWriter(str(tmp_path), filename_suffix=".theirs")
    writer.add_event(Event(step=1, summary=Summary(value=[Summary.Value(tag="theirs", simple_value=1.0)])))
    writer.close()
    warned: list[str] = []
    TrackerThread(tmp_path, resume_step=1, recorded=counts, warn=warned.append).close()
    assert warned == []
    assert numbers_in_lines(tmp_path) == [(1, {"loss": 1.0}), (1, {})]
    assert (1, {"theirs": 1.0}) in numbers_in_events(tmp_path)


def test_damage_between_records_is_reported_without_a_count_of_a_checkpoint(
    whole: dict[str, tuple[Path, dict[str, int]]], tmp_path: Path
) -> None:
    (folder,) = copies(tmp_path, whole["lines"][0])
    lines = (folder / "metrics.jsonl").read_text().splitlines(keepends=True)
    lines[3] = lines[3].replace('"step": 4', '"step": 19')  # of numbers whose step goes backwards after it
    lines[8] = lines[8][:20] + "\n"
    (folder / "metrics.jsonl").write_text("".join(lines))
    warned: list[str] = []
    TrackerThread(folder, {"jsonl": Jsonl()}, resume_step=LAST, warn=warned.append).close()
    assert warned == [f"{folder}/metrics.jsonl: damaged; the numbers of steps 4, 8 are missing and no file holds them"]
    assert len(numbers_in_lines(folder)) == len(lines) - 2


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"train/loss": 7.1', '"train/loss": 3.1'),
        ('"step": 7,', '"step": 8,'),
        ('"step": 7,', '"step": 6,'),
        ('"step": 7,', '"step": 17,'),
        ('"train/loss": 7.1', '"train/lors": 7.1'),
        ('"step": 20, "time_s"', '"step": 28, "time_s"'),
    ],
)
def test_a_changed_line_is_replaced_by_the_numbers_of_the_event_file(
    whole: dict[str, tuple[Path, dict[str, int]]], tmp_path: Path, old: str, new: str
) -> None:
    source, counts = whole["both"]
    (folder,) = copies(tmp_path, source)
    text = (folder / "metrics.jsonl").read_text()
    assert old in text
    (folder / "metrics.jsonl").write_text(text.replace(old, new))
    warned: list[str] = []
    TrackerThread(folder, resume_step=LAST, recorded=counts, warn=warned.append).close()
    assert numbers_in_lines(folder) == wanted(1, LAST)
    assert numbers_in_events(folder) == wanted(1, LAST)
    assert [steps_named(said) for said in warned] == [{20 if "20" in old else 7}]
    assert "metrics.jsonl: damaged; the numbers of step" in warned[0]


@pytest.mark.parametrize("name", ["metrics.jsonl", "events.out.tfevents.*"])
def test_calls_at_the_same_time_are_restored_in_their_order(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr("runner.tracking.tracker.time.perf_counter", lambda: 1.0)
    names = ["train/loss", "eval/loss", "train/lr", "another"]
    tracker = TrackerThread(tmp_path)
    for step in (1, 2):
        for each in names:
            tracker.log(step, {each: 0.5 * step})
    counts = tracker.counts()
    tracker.close()
    expected = [(step, {each: 0.5 * step}) for step in (1, 2) for each in names]
    (path,) = tmp_path.glob(name)
    content = path.read_bytes()
    place = content.index(b"train/lr")
    path.write_bytes(content[:place] + b"\xff" + content[place + 1 :])
    warned: list[str] = []
    TrackerThread(tmp_path, resume_step=2, recorded=counts, warn=warned.append).close()
    (said,) = warned
    assert "were missing " in said
    assert numbers_in_lines(tmp_path) == expected
    with open(find_event_files(tmp_path)[0], "rb") as file:
        events = [Event.FromString(record) for record in read_records(file)]
    found = [(event.step, {v.tag: v.simple_value}) for event in events for v in event.summary.value]
    assert [each for each in found if "_hparams_" not in str(each)] == expected


Calls = list[tuple[int, dict[str, float]]]


def spread(numbers: Callable[[int], dict[str, float]], eval_every: int) -> Calls:
    """Returns the calls of a run of 20 steps that evaluates every `eval_every` steps."""
    calls: Calls = []
    for step in range(LAST + 1):
        calls.append((step, numbers(step)))
        if step % eval_every == 0:
            calls.append((step, {"eval/loss": float("nan") if step == 5 else 2 / (step + 1), "eval/acc": step / 30}))
    return calls


RUNS: dict[str, Calls] = {
    "plain": spread(lambda step: {"train/loss": 1 / (step + 1), "train/lr": 0.1}, 5),
    "no evaluation": spread(lambda step: {"train/loss": 1 / (step + 1), "train/norm": float("nan")}, 99),
    "two calls a step": spread(lambda step: {"train/loss": 1 / (step + 1), "train/lr": 0.1}, 1),
    "equal names": [(step, {"loss": part / (step + 1)}) for step in range(LAST + 1) for part in (1, 2, 3)],
    "equal numbers": spread(lambda step: {"train/loss": 0.5}, 5),
    "many metrics": spread(lambda step: {f"train/m{place}": place * step / 7 for place in range(40)}, 5),
}


def log_calls(folder: Path, calls: Calls, ends: tuple[int, ...] = (12, 17, LAST), **options: Any) -> dict[str, int]:
    """Logs in sessions with pauses between them, each ending at a given step; returns the last counts."""
    counts: dict[str, int] = {}
    last = -1
    for end in ends:
        resumed = {"resume_step": last, "recorded": counts} if counts else {}
        tracker = TrackerThread(folder, **resumed, **options)
        tracker.hparams({"lr": 0.1})
        names: set[str] = set()
        for step, numbers in calls:
            if last < step <= end:
                if names == set(numbers):
                    time.sleep(1e-4)  # by their times alone are calls of one step and the same names told apart
                tracker.log(step, numbers)
                names = set(numbers)
        counts, last = tracker.counts(), end
        tracker.close()
        time.sleep(0.01)
    return counts


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, dict[str, int]]]:
    folders = {name: tmp_path_factory.mktemp("run") for name in RUNS}
    return {name: (folder, log_calls(folder, RUNS[name])) for name, folder in folders.items()}


def call_of(step: int, numbers: dict[str, float | None]) -> str:
    values = array("f", [float("nan") if value is None else value for value in numbers.values()])
    return repr((step, [*numbers], [*values]))


def calls_in_lines(folder: Path) -> Counter[str]:
    """Returns the calls of the undamaged lines, in the precision of the events."""
    found: Counter[str] = Counter()
    path = folder / "metrics.jsonl"
    for line in path.read_bytes().splitlines(keepends=True) if path.exists() else []:
        try:
            numbers = json.loads(line)
            step, _ = numbers.pop("step"), numbers.pop("time_s")
            found[call_of(step, numbers)] += line.endswith(b"\n")
        except (ValueError, TypeError, KeyError, AttributeError):
            continue
    return found


def calls_in_events(folder: Path) -> Counter[str]:
    return Counter(call_of(step, numbers) for step, numbers in numbers_in_events(folder))


@pytest.mark.parametrize("name", RUNS)
@given(of_lines=DAMAGES, of_events=DAMAGES, file=st.integers(0, 2))
@settings(max_examples=EXAMPLES, deadline=None)
def test_numbers_that_one_of_two_damaged_files_holds_are_in_both_afterwards(
    runs: dict[str, tuple[Path, dict[str, int]]],
    tmp_path_factory: pytest.TempPathFactory,
    name: str,
    of_lines: Any,
    of_events: Any,
    file: int,
) -> None:
    source, counts = runs[name]
    (folder,) = copies(tmp_path_factory.getbasetemp(), source)
    logged = Counter(call_of(step, numbers) for step, numbers in RUNS[name])
    damage(folder / "metrics.jsonl", of_lines)
    damage(find_event_files(folder)[file], of_events)
    whole = (calls_in_lines(folder) & logged) | (calls_in_events(folder) & logged)
    warned: list[str] = []
    TrackerThread(folder, resume_step=LAST, recorded=counts, warn=warned.append).close()
    assert calls_in_lines(folder) & logged == whole
    assert calls_in_events(folder) & logged == whole
    if whole == logged:
        assert calls_in_lines(folder) == calls_in_events(folder) == logged
        assert "no file holds them" not in str(warned)
    elif calls_in_lines(folder) == whole:  # else a line has changed and its event is lost
        lost = {step for step, numbers in RUNS[name] if call_of(step, numbers) not in whole}
        assert "no file holds them" in warned[-1]
        assert lost <= steps_named(warned[-1])


@pytest.mark.parametrize(("line", "event"), [(21, 20), (20, 21), (20, 22), (20, 24)])
def test_two_calls_are_both_kept_if_each_file_lacks_another_one(
    runs: dict[str, tuple[Path, dict[str, int]]], tmp_path: Path, line: int, event: int
) -> None:
    source, counts = runs["two calls a step"]
    (folder,) = copies(tmp_path, source)
    logged = calls_in_events(folder)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    step = json.loads(lines[event])["step"]
    lines[line] = b"#" + lines[line][1:]
    path.write_bytes(b"".join(lines))
    path = find_event_files(folder)[0]
    (record,) = [each for each in read_log(path, LAST).records if each.key == read_key(lines[event])]
    path.write_bytes(path.read_bytes().replace(record.content, record.content[:-1] + bytes([record.content[-1] ^ 1])))
    assert sum(calls_in_events(folder).values()) == len(RUNS["two calls a step"]) - 1
    warned: list[str] = []
    TrackerThread(folder, resume_step=LAST, recorded=counts, warn=warned.append).close()
    assert calls_in_lines(folder) == calls_in_events(folder) == logged
    assert [steps_named(said) for said in warned] == [{step}, {10}]


def read_key(line: bytes) -> Any:
    numbers = json.loads(line)
    step, _ = numbers.pop("step"), numbers.pop("time_s")
    return make_key(step, numbers, {})


@pytest.mark.parametrize("step", [4, 14, 19])
def test_a_changed_name_is_distinguished_from_lines_of_a_removed_event_file(
    runs: dict[str, tuple[Path, dict[str, int]]], tmp_path: Path, step: int
) -> None:
    source, counts = runs["no evaluation"]
    (folder,) = copies(tmp_path, source)
    logged = calls_in_events(folder)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[step + 1] = lines[step + 1].replace(b"train/loss", b"tsain/loss")  # step 0 has two
    path.write_bytes(b"".join(lines))
    find_event_files(folder)[0 if step > 12 else 1].unlink()
    TrackerThread(folder, resume_step=LAST, recorded=counts).close()
    assert calls_in_lines(folder) == calls_in_events(folder) == logged


@pytest.mark.parametrize("is_first_removed", [False, True])
@pytest.mark.parametrize("step", [3, 15, 20])
def test_a_changed_time_is_reported_and_restored_from_the_event(
    runs: dict[str, tuple[Path, dict[str, int]]], tmp_path: Path, step: int, is_first_removed: bool
) -> None:
    source, counts = runs["two calls a step"]
    (folder,) = copies(tmp_path, source)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    before = [json.loads(line)["time_s"] for line in lines]
    place = 2 * step + 1
    lines[place] = lines[place].replace(b'"time_s": ', b'"time_s": 8')
    path.write_bytes(b"".join(lines))
    if is_first_removed:
        find_event_files(folder)[0 if step > 12 else 1].unlink()
    warned: list[str] = []
    tracker = TrackerThread(folder, resume_step=LAST, recorded=counts, warn=warned.append)
    tracker.log(LAST + 1, {"train/loss": 1.0})
    tracker.close()
    *found, last = [json.loads(line) for line in path.read_bytes().splitlines()]
    assert [line["time_s"] for line in found] == pytest.approx(before, abs=1e-5)
    assert calls_in_lines(folder) == calls_in_events(folder)
    assert last["step"] == LAST + 1
    assert before[-1] <= last["time_s"] < 80
    assert f"the times of step {step} were changed and are restored from the event files" in str(warned)
    assert len(warned) == 1 + is_first_removed


@pytest.mark.parametrize(
    ("place", "step"),
    [(34, 15), (30, 17), (40, 29), (41, 2)],  # of the line of another step, of one after the last, of one before
)
def test_a_changed_step_takes_no_whole_line_beside_it_along(
    runs: dict[str, tuple[Path, dict[str, int]]], tmp_path: Path, place: int, step: int
) -> None:
    source, _ = runs["two calls a step"]
    (folder,) = copies(tmp_path, source)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    lines[place] = re.sub(rb'"step": \d+', b'"step": %d' % step, lines[place])
    path.write_bytes(b"".join(lines))
    log = read_lines(path, LAST, is_eval_pending=False)
    assert [record.content for record in log.records] == lines[:place] + lines[place + 1 :]


def test_the_step_at_which_both_files_are_cut_between_two_calls_is_reported(
    runs: dict[str, tuple[Path, dict[str, int]]], tmp_path: Path
) -> None:
    source, counts = runs["two calls a step"]
    (folder,) = copies(tmp_path, source)
    path = folder / "metrics.jsonl"
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join(lines[:31]))
    _, cut, removed = find_event_files(folder)
    removed.unlink()
    (record,) = [each for each in read_log(cut, LAST).records if each.key == read_key(lines[31])]
    cut.write_bytes(cut.read_bytes().partition(record.content)[0])
    warned: list[str] = []
    TrackerThread(folder, resume_step=LAST, recorded=counts, warn=warned.append).close()
    assert [steps_named(said) for said in warned] == [set(range(15, LAST + 1))]


@pytest.mark.parametrize("how", ["emptied", "removed"])
def test_all_steps_of_an_emptied_event_file_beside_a_damaged_one_are_reported(tmp_path: Path, how: str) -> None:
    counts = log_calls(tmp_path, RUNS["plain"], trackers={"tensorboard": TensorBoard()})
    first, second, _ = find_event_files(tmp_path)
    damage(first, (how, 0, 0))
    (record,) = [each for each in read_log(second, LAST).records if each.key and each.step == 16]
    damaged = record.content[:-1] + bytes([record.content[-1] ^ 1])
    second.write_bytes(second.read_bytes().replace(record.content, damaged))
    warned: list[str] = []
    TrackerThread(
        tmp_path, {"tensorboard": TensorBoard()}, resume_step=LAST, recorded=counts, warn=warned.append
    ).close()
    (said,) = warned
    # Step 17 has one call, as a step does that lacks its evaluation.
    assert {*range(13), 16} <= steps_named(said) <= {*range(13), 16, 17}


def test_a_damaged_call_behind_whole_hparams_is_a_gap(tmp_path: Path) -> None:
    path = tmp_path / "events"
    header, hparams = encode_header(1.0, None), encode_hparams(1.0, {"lr": 0.1}, None)
    calls = [encode_scalars(1.0, step, {"loss": 1.0}) for step in range(3)]
    path.write_bytes(header + hparams + calls[0][:-1] + b"#" + calls[1] + calls[2])
    assert read_log(path, 2).gaps == [(-1, 1)]
    path.write_bytes(header + hparams[:-1] + b"#" + calls[1] + calls[2])
    assert read_log(path, 2).gaps == []
