"""Compares `metrics.jsonl` with the event files of a run, and restores in each the numbers that only the other has."""

from __future__ import annotations

import json
from array import array
from bisect import bisect_left
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from pathlib import Path
from typing import NamedTuple

# Step, names, and the values as float32, which is what an event holds.
Key = tuple[int, tuple[str, ...], bytes]
_SAME_TIME_S = 1e-4  # more than the times of a line and its event differ by rounding
_JSON_ERRORS = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


class Record(NamedTuple):
    """A line or an event: its step, its time since the run began, its bytes, and the key of its numbers, if any."""

    step: int
    time_s: float
    content: bytes
    key: Key | None


@dataclass
class Log:
    """The whole records of a file up to a step.

    `gaps` has the steps before and after each damaged place that such records follow. `is_damaged` also counts
    damage at the end, such as a kill in the middle of a write leaves. `num_owed` evaluations were left out.
    """

    path: Path
    pattern: str  # of the names of such files
    records: list[Record] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    is_damaged: bool = False
    num_owed: int = 0
    started: float | None = None  # wall time of an event file's session
    clock_zero: float = 0.0  # wall time at time_s = 0, were there no pauses between sessions

    def __str__(self) -> str:
        """Returns the path as a message names it."""
        return str(self.path) if self.path.exists() else f"{self.path.parent}/{self.pattern} (no such file)"

    def num_numbers(self) -> int:
        """Returns how many records hold numbers."""
        return sum(record.key is not None for record in self.records)


def make_key(step: int, values: Mapping[str, float | None], names: dict[tuple[str, ...], tuple[str, ...]]) -> Key:
    """Returns the key of a call's numbers; `names` has one copy of each tuple of names.

    Raises: OverflowError, TypeError when a value is no number.
    """
    found, numbers = tuple(values), array("f", [nan if value is None else value for value in values.values()])
    if not all(map(isfinite, numbers)):  # a line has null for each of them
        numbers = array("f", [number if isfinite(number) else nan for number in numbers])
    return step, names.setdefault(found, found), numbers.tobytes()


def numbers_of(key: Key) -> dict[str, float]:
    """Returns a call's numbers, in the precision of float32."""
    return dict(zip(key[1], array("f", key[2]), strict=True))


def read_lines(path: Path, step: int, is_eval_owed: bool) -> Log:
    """Reads `metrics.jsonl` up to a step.

    With `is_eval_owed`, evaluations of that very step are left out. A line that is no JSON of numbers counts as
    damaged, as does one whose step is not between those of its neighbours.
    """
    log, names = Log(path, path.name), dict[tuple[str, ...], tuple[str, ...]]()
    content = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    records = [_parse_line(line, names) for line in content]
    steps = [record.step for record in records if record is not None]
    steps = [-1, *steps, inf]  # type: ignore[list-item]
    last, place, is_gap = -1, 0, False
    for record in records:
        if record is not None:
            place += 1
            # One changed step is found by its neighbours, which follow each other.
            before, after = steps[place - 1], steps[place + 1]
            if before <= after and not before <= record.step <= after:
                record = None
        if record is None:
            is_gap = log.is_damaged = True
        elif record.step <= step:
            if is_gap:
                log.gaps.append((last, record.step))
            last, is_gap = record.step, False
            names_found = record.key[1] if record.key else ()
            if is_eval_owed and record.step == step and any(name.startswith("eval/") for name in names_found):
                log.num_owed += 1
            else:
                log.records.append(record)
    return log


def _parse_line(line: bytes, names: dict[tuple[str, ...], tuple[str, ...]]) -> Record | None:
    try:
        values = json.loads(line)
        step, time_s = values.pop("step"), values.pop("time_s")
        if type(step) is not int or not isfinite(time_s) or not line.endswith(b"\n"):
            return None
        return Record(step, float(time_s), line, make_key(step, values, names) if values else None)
    except _JSON_ERRORS:
        return None


@dataclass
class Repair:
    """The result of a comparison: keys of records that were put into the lines and into the event files."""

    of_lines: list[Key] = field(default_factory=list)
    of_events: list[Key] = field(default_factory=list)
    damaged: str = ""  # names of event files


def restore(
    lines: Log,
    events: list[Log],
    encode_line: Callable[[int, float, Mapping[str, float]], bytes],
    encode_event: Callable[[float, int, Mapping[str, float]], bytes],
) -> Repair:
    """Puts what only one kind of file holds into the other, in the order of the steps.

    TensorBoard drops points of a curve when an earlier step follows them, so an event goes into the file of its
    session. A line whose numbers differ from those of the event of that time is replaced: events have checksums.

    Args:
        events: at least one.
    """
    in_lines = Counter(record.key for record in lines.records if record.key)
    in_events = Counter(record.key for log in events for record in log.records if record.key)
    lost_lines = list(_take((record for log in events for record in log.records), in_events - in_lines))
    lost_events = list(_take(lines.records, in_lines - in_events))
    times = sorted(record.time_s for record in lost_lines)
    calls = {record.key[:2] for record in lost_lines if record.key}
    # A changed line has kept its time, or its step and names.
    changed = {
        id(record)
        for record in lost_events
        if _has_near(times, record.time_s) or (record.key and record.key[:2] in calls)
    }
    lost_events = [record for record in lost_events if id(record) not in changed]
    repair = Repair([key for *_, key in lost_lines if key], [key for *_, key in lost_events if key])
    if lost_lines:
        kept = [record for record in lines.records if id(record) not in changed]
        restored = [
            record._replace(content=encode_line(record.step, record.time_s, numbers_of(record.key)))
            for record in lost_lines
            if record.key
        ]
        lines.records = _sort(kept + restored, [record for log in events for record in log.records])
    if lost_events:
        repair.damaged = _put_events(lost_events, events, encode_event, lines.records)
    return repair


def _sort(records: list[Record], order: list[Record]) -> list[Record]:
    """Returns records in the order of their steps, and in one step in that of `order`, by time where it lacks them.

    The times of a line and of its event differ by rounding, which is more than may lie between two calls.
    """
    places: dict[Key | None, tuple[float, int]]
    places = {record.key: (record.time_s, place) for place, record in enumerate(order) if record.key}

    def place_of(record: Record) -> tuple[int, float, int]:
        time_s, place = places.get(record.key, (record.time_s, 0))
        return record.step, time_s, place

    return sorted(records, key=place_of)


def _put_events(
    lost: list[Record],
    events: list[Log],
    encode_event: Callable[[float, int, Mapping[str, float]], bytes],
    order: list[Record],
) -> str:
    """Puts records into the event files; returns the names of those they are missing in."""
    starts = [(min(record.step for record in log.records), log) for log in events if log.records]
    chosen: dict[int, Log] = {}
    for record in lost:
        earlier = [log for first, log in starts if first <= record.step]
        log = earlier[-1] if earlier else starts[0][1] if starts else events[0]
        chosen[id(log)] = log
        assert record.key is not None
        event = encode_event(log.clock_zero + record.time_s, record.step, numbers_of(record.key))
        log.records.append(record._replace(content=event))
    for log in chosen.values():
        log.records = _sort(log.records, order)
    return _name([log for log in events if log.is_damaged], list(chosen.values()))


def _name(damaged: list[Log], others: list[Log]) -> str:
    """Returns the damaged files as a message names them; where none shows damage, one may have been removed."""
    if damaged:
        return ", ".join(str(log) for log in damaged)
    return ", ".join(str(log) for log in others) + (", or a file beside it that was removed" if others else "")


def _take(records: Iterable[Record], wanted: Counter[Key]) -> Iterator[Record]:
    for record in records if wanted else ():
        if record.key and wanted[record.key] > 0:
            wanted[record.key] -= 1
            yield record


def _has_near(times: list[float], time_s: float) -> bool:
    place = bisect_left(times, time_s - _SAME_TIME_S)
    return place < len(times) and times[place] <= time_s + _SAME_TIME_S


def find_lost(logs: list[Log], restored: Iterable[Key], num_lost: int | None, last_step: int) -> set[int]:
    """Returns the steps among which numbers are lost that no other file holds.

    Args:
        restored: the keys that were found in another file.
        num_lost: how many calls' numbers are lost; None where no checkpoint tells.
        last_step: the last step that had numbers.
    """
    known = sorted({key[0] for key in restored})
    lost: set[int] = set()
    for log in logs:
        for before, after in log.gaps:
            place = bisect_left(known, before)
            if place == len(known) or known[place] > after:
                lost |= set(range(before + 1, after)) or {before, after}
    if num_lost is not None and num_lost > 0:
        last_found = max((record.step for log in logs for record in log.records if record.key), default=-1)
        lost |= set(range(last_found + 1, last_step + 1))
        lost = lost or _find_between(logs) or set(range(last_step + 1))
    return lost


def _find_between(logs: list[Log]) -> set[int]:
    """Returns the steps between the files, one of which was cut between two records, or is gone."""
    lost, last = set[int](), -1
    for log in logs:
        for record in log.records[:1]:  # that of a restart names the step after the last
            lost |= set(range(last + 1, record.step))
        last = max([last, *(record.step for record in log.records[-1:])])
    return lost


def shown_steps(steps: Iterable[int]) -> str:
    """Returns steps as text, neighbours as one range."""
    ranges: list[list[int]] = []
    for step in sorted(set(steps)):
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    noun = "step " if len(ranges) == 1 and ranges[0][0] == ranges[0][1] else "steps "
    return noun + ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in ranges)


def describe_repair(repair: Repair, lines: Log) -> Iterator[str]:
    """Says in which file which steps were missing."""
    if repair.of_events:
        yield (
            f"{repair.damaged}: damaged; the numbers of {shown_steps(key[0] for key in repair.of_events)} were "
            f"missing and are restored from {lines.pattern}; texts, pictures and sounds of these steps are not"
        )
    if repair.of_lines:
        yield (
            f"{lines}: damaged; the numbers of {shown_steps(key[0] for key in repair.of_lines)} were "
            "missing or changed and are restored from the event files, in their float32 precision"
        )


def describe_lost(logs: list[Log], lost: set[int], num_lost: int | None) -> str:
    """Says in which files which steps stay missing."""
    names = _name([log for log in logs if log.is_damaged], logs)
    if num_lost is not None and num_lost <= 0:
        return f"{names}: damaged; a record of {shown_steps(lost)} was left out, no numbers are missing"
    return f"{names}: damaged; the numbers of {shown_steps(lost)} are missing and no file holds them"
