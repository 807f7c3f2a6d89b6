"""Compares `metrics.jsonl` with a run's event files, and restores in each the numbers that only the other holds."""

from __future__ import annotations

import json
import os
from array import array
from bisect import bisect_left, bisect_right
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from math import inf, isfinite, nan
from operator import itemgetter
from pathlib import Path
from statistics import median_low
from typing import NamedTuple

from runner.utils.files import iterate_lines, open_regular

# Step, names, and the values as float32, which is what an event holds.
Key = tuple[int, tuple[str, ...], bytes]
EncodeLine = Callable[[int, float, Mapping[str, float]], bytes]
EncodeEvent = Callable[[float, int, Mapping[str, float]], bytes]
_SAME_TIME_S = 2e-6  # more than the times of a line and its event differ by rounding
_CHANGED_TIME_S = 1e-3
_MAX_TIME_S = 1e12  # 30,000 years
_MAX_STEP = 1 << 53
_MAX_LINE_BYTES = 1 << 20
_MAX_NEARBY = 100  # lines that are compared with an event: of one step or instant there are a few
LINE_NAMES = frozenset(("step", "time_s"))  # of a line of `metrics.jsonl`, beside its numbers
_JSON_ERRORS = (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError)


class Record(NamedTuple):
    """A line or an event: its step, its time since the run started, its bytes, and the key of its numbers, if any."""

    step: int
    time_s: float
    content: bytes
    key: Key | None

    @property
    def names(self) -> tuple[str, ...]:
        return self.key[1] if self.key else ()


@dataclass
class Log:
    """The complete records of a file up to a step.

    Args:
        pattern: of the names of such files.
        gaps: the steps before and after each damaged place, except one at the end.
        is_damaged: also set by damage at the end, as left by a kill in the middle of a write.
        is_begin_damaged: before the first record of an event file, where hparams may have been.
        num_pending_evals: evaluations that were left out because they will be repeated.
        restored: steps of the numbers that only the other kind of file held.
        started: wall time of an event file's session.
        clock_zero: wall time at `time_s` = 0, as if there were no pauses between sessions.
        is_clock_known: False if `clock_zero` of an event file is a guess.
        last_step: the last step of a record that was left out because it is after that step; -1 if there is none.
    """

    path: Path
    pattern: str
    records: list[Record] = field(default_factory=list)
    gaps: list[tuple[int, int]] = field(default_factory=list)
    is_damaged: bool = False
    is_begin_damaged: bool = False
    num_pending_evals: int = 0
    restored: list[int] = field(default_factory=list)
    started: float | None = None
    clock_zero: float = 0.0
    is_clock_known: bool = False
    last_step: int = -1

    def __str__(self) -> str:
        return str(self.path) if self.path.exists() else f"{self.path.parent}/{self.pattern} (no such file)"


def make_key(step: int, values: Mapping[str, float | None], names: dict[tuple[str, ...], tuple[str, ...]]) -> Key:
    """Returns the key of a call's numbers.

    Args:
        names: the tuples of names so far, so that equal ones are stored once.
    Raises:
        OverflowError, TypeError: a value is no number.
    """
    numbers = array("f", [nan if value is None else value for value in values.values()])
    if not all(map(isfinite, numbers)):  # a line has null for each of them
        numbers = array("f", [number if isfinite(number) else nan for number in numbers])
    return step, names.setdefault(tuple(values), tuple(values)), numbers.tobytes()


def is_step(step: object) -> bool:
    """Returns whether a value can be a step of a run."""
    return type(step) is int and 0 <= step < _MAX_STEP


def is_time(time_s: object) -> bool:
    """Returns whether a value can be a time in seconds."""
    return type(time_s) in (int, float) and abs(time_s) < _MAX_TIME_S  # type: ignore[arg-type]


def decode_numbers(key: Key) -> dict[str, float]:
    """Returns a call's numbers, in the precision of float32."""
    return dict(zip(key[1], array("f", key[2]), strict=True))


def read_lines(path: Path, step: int, is_eval_pending: bool) -> Log:
    """Reads `metrics.jsonl` up to a step.

    A line counts as damaged if it is no JSON of numbers, or if its step is not between those of its neighbours.

    Args:
        is_eval_pending: leaves out evaluations of that very step.
    Raises:
        OSError: it is no regular file, or the disk refuses.
    """
    log, names = Log(path, path.name), dict[tuple[str, ...], tuple[str, ...]]()
    records = []
    if os.path.lexists(path):
        with open_regular(path) as file:
            records = [_parse_line(line, names) for line in iterate_lines(file, _MAX_LINE_BYTES)]
    parsed = [record for record in records if record is not None]
    num_same = Counter((record.step, record.names) for record in parsed)
    repeated = [num_same[record.step, record.names] > 1 for record in parsed]
    steps = [-1, -1, *(record.step for record in parsed), inf, inf]
    last, index, is_gap = -1, -1, False  # `index` counts the parsed records
    for record in records:
        if record is not None:
            index += 1
            if _is_out_of_order(steps[index : index + 5], repeated, index):
                record = None
        if record is None:
            is_gap = log.is_damaged = True
        elif record.step <= step:
            if is_gap:
                log.gaps.append((last, record.step))
            last, is_gap = record.step, False
            if is_eval_pending and record.step == step and any(name.startswith("eval/") for name in record.names):
                log.num_pending_evals += 1
            else:
                log.records.append(record)
        else:
            log.last_step = max(log.last_step, record.step)
    return log


def _is_out_of_order(steps: list[float], repeated: list[bool], index: int) -> bool:
    """Returns whether a line's step was changed: it is not between its neighbours, and these are in order.

    The neighbour may be the changed one instead: the line that has the step and names of another line was changed,
    else the earlier of the two.

    Args:
        steps: of the two lines before, of the line, and of the two lines after it.
        repeated: for each line, whether another has its step and names.
    """
    before_last, before, step, after, after_next = steps
    if not before <= after or before <= step <= after:
        return False
    if repeated[index]:
        return True
    is_next_changed = step > after and repeated[index + 1] and step <= after_next
    is_last_changed = before_last <= step < before
    return not (is_next_changed or is_last_changed)


def _parse_line(line: bytes | None, names: dict[tuple[str, ...], tuple[str, ...]]) -> Record | None:
    """Returns the record of a line, or None if the line is damaged or written by another program."""
    try:
        values = json.loads(line or b"")
        step, time_s = values.pop("step"), values.pop("time_s")
        if line is None or not line.endswith(b"\n") or not is_step(step) or not is_time(time_s):
            return None
        "".join(values).encode()  # a lone surrogate is a ValueError, and no event has one
        return Record(step, float(time_s), line, make_key(step, values, names) if values else None)
    except _JSON_ERRORS:
        return None


class Repair(NamedTuple):
    """The steps of the restored records.

    Args:
        of_lines: inserted into the lines.
        of_times: of lines whose time differed from their event's.
        of_events: inserted into the event files.
        damaged: the names of the event files that lacked them.
    """

    of_lines: list[int]
    of_times: list[int]
    of_events: list[int]
    damaged: str


def restore_missing(
    lines: Log, events: list[Log], encode_line: EncodeLine, encode_event: EncodeEvent, num_recorded: int | None
) -> Repair:
    """Inserts into each kind of file the records that only the other holds, in the order of the steps.

    TensorBoard drops points of a curve when an earlier step follows them, so an event is inserted into the file of its
    session. A line that damage has changed is replaced by its event, because events have checksums.

    Args:
        events: the event files, at least one.
        num_recorded: the number of calls that the event files should hold; None if no checkpoint records it.
    """
    in_lines = Counter(record.key for record in lines.records if record.key)
    in_events = Counter(record.key for log in events for record in log.records if record.key)
    shared = {key for key, number in in_lines.items() if number == in_events[key] == 1}
    of_times = _restore_times(lines, events, shared, encode_line)
    recorded = [record for log in events for record in log.records]
    lost_lines = list(_select(recorded, in_events - in_lines, lines.records))
    lost_events = list(_select(lines.records, in_lines - in_events, recorded))
    num_extra = None
    if num_recorded is not None:
        num_pending = sum(log.num_pending_evals for log in events)
        num_extra = sum(in_events.values()) + num_pending + len(lost_events) - num_recorded
    untimed = {id(record) for log in events if not log.is_clock_known for record in log.records}
    empty = [record for record in lines.records if not record.key]
    changed = _find_changed(lost_lines, lost_events + empty, untimed, num_extra)
    lost_events = [record for record in lost_events if id(record) not in changed]
    of_lines = [record.step for record in lost_lines]
    of_events = [record.step for record in lost_events]
    lines.restored = of_lines
    for log in events:
        log.restored = of_events
    if lost_lines:
        kept = [record for record in lines.records if id(record) not in changed]
        restored = [
            record._replace(content=encode_line(record.step, record.time_s, decode_numbers(record.key)))
            for record in lost_lines
            if record.key
        ]
        lines.records = _sort(kept + restored, recorded)
    damaged = _insert_events(lost_events, events, encode_event, lines.records) if lost_events else ""
    return Repair(of_lines, of_times, of_events, damaged)


def _restore_times(lines: Log, events: list[Log], shared: set[Key], encode_line: EncodeLine) -> list[int]:
    """Sets each event file's clock by the lines, then restores changed times of lines from the events.

    Args:
        shared: keys that the lines and the events hold exactly once.

    Returns:
        The steps of the restored lines.
    """
    restored = list[int]()
    shift = 0.0
    indices = {record.key: index for index, record in enumerate(lines.records) if record.key in shared}
    for log in events:
        in_both = [record.key for record in log.records if record.key in indices]
        shift = _set_clock(log, {key: lines.records[indices[key]].time_s for key in in_both}, shift)
        for record in log.records if log.is_clock_known else ():
            if record.key not in indices:
                continue
            line = lines.records[indices[record.key]]
            if abs(line.time_s - record.time_s) > _CHANGED_TIME_S:
                values = json.loads(line.content).items()
                numbers = {name: nan if value is None else value for name, value in values if name not in LINE_NAMES}
                content = encode_line(record.step, record.time_s, numbers)
                lines.records[indices[record.key]] = line._replace(time_s=record.time_s, content=content)
                restored.append(record.step)
    return restored


def _set_clock(log: Log, times: Mapping[Key | None, float], last_shift: float) -> float:
    """Sets the zero of an event file's clock by the times of the matching lines; most lines are undamaged.

    The file holds the start of its session, but not the duration of earlier sessions, whose files may be missing.

    Args:
        times: of the lines by key.
        last_shift: the correction of the file before.
    Returns:
        The correction in seconds.
    """
    shifts = [record.time_s - times[record.key] for record in log.records if record.key in times]
    is_agreed = len(shifts) > 1 and max(shifts) - min(shifts) <= _SAME_TIME_S
    if len(shifts) < 3 and log.is_clock_known:
        return 0.0
    shift = median_low(shifts) if shifts else last_shift
    log.is_clock_known = len(shifts) >= 3 or is_agreed
    if abs(shift) > _SAME_TIME_S:
        log.clock_zero += shift
        log.records = [record._replace(time_s=record.time_s - shift) for record in log.records]
    return shift


def _find_changed(
    lost_lines: list[Record], unmatched: list[Record], untimed: set[int], num_extra: int | None
) -> set[int]:
    """Returns the ids of lines that damage has changed, at most one for each lost line.

    Damage changes one place of a line, so the line differs from its event in the step, or in a name, or in a value.
    Damage to a line and to another call's event looks similar, but these two calls differ in more than one place.

    Args:
        lost_lines: events that have no line.
        unmatched: lines that have no event.
        untimed: ids of records whose times are guessed.
        num_extra: the least number of changed lines, by the count of a checkpoint; None if none records it.
    """
    steps, order = defaultdict[int, list[Record]](list), sorted(unmatched, key=lambda record: record.time_s)
    for record in unmatched:
        steps[record.step].append(record)
    times = [record.time_s for record in order]
    pairs = list[tuple[tuple[bool, int, float], Record, Record]]()
    for event in lost_lines:
        nearby = {id(line): line for line in steps.get(event.step, [])[:_MAX_NEARBY]}
        if id(event) not in untimed:
            first = bisect_left(times, event.time_s - _SAME_TIME_S)
            last = bisect_right(times, event.time_s + _SAME_TIME_S)
            nearby |= {id(line): line for line in order[first : min(last, first + _MAX_NEARBY)]}
        for line in nearby.values():
            difference = _compare(event, line, id(event) not in untimed, num_extra is not None)
            if difference is not None:
                pairs.append((difference, event, line))
    changed, replaced = set[int](), set[int]()
    for (is_unsure, *_), event, line in sorted(pairs, key=itemgetter(0)):
        is_free = id(event) not in replaced and id(line) not in changed
        if is_free and (not is_unsure or len(changed) < (num_extra or 0)):
            changed.add(id(line))
            replaced.add(id(event))
    return changed


def _compare(event: Record, line: Record, is_timed: bool, is_counted: bool) -> tuple[bool, int, float] | None:
    """Returns the difference of a line from an event, or None if no single damage explains it.

    Returns:
        Whether the match is unsure because two different calls may differ so, the number of differences, and the
        distance in seconds.
    """
    assert event.key
    _, names, values = event.key
    _, line_names, line_values = line.key or (line.step, (), b"")
    distance_s = abs(event.time_s - line.time_s) if is_timed else 0.0
    is_near = distance_s <= _SAME_TIME_S
    is_same_names, is_same_values = names == line_names, values == line_values
    num_differences = [is_near, is_same_names, is_same_values].count(False)
    if event.step != line.step:
        # Two calls may have equal numbers, so the match is unsure if the number of changed lines is known.
        return (is_counted, 1, distance_s) if num_differences == 0 else None
    if not line.key:  # a line that lacks all numbers
        return False, num_differences, distance_s
    is_alike = (
        is_same_names
        or (is_same_values and _is_one_name_changed(names, line_names))
        or not decode_numbers(event.key).items().isdisjoint(decode_numbers(line.key).items())
    )
    return not (is_timed and is_near and is_alike), num_differences, distance_s


def _is_one_name_changed(names: tuple[str, ...], others: tuple[str, ...]) -> bool:
    """Returns whether all names are equal except for one character of one name."""
    pairs = [(name, other) for name, other in zip(names, others, strict=True) if name != other]
    if len(pairs) != 1 or len(pairs[0][0]) != len(pairs[0][1]):
        return False
    return sum(a != b for a, b in zip(*pairs[0], strict=True)) == 1


def _sort(records: list[Record], order: list[Record]) -> list[Record]:
    """Returns records sorted by step, then as in `order`, or by time if `order` lacks them.

    Their own times are not enough: rounding makes those of a line and its event differ by more than the time between
    two calls.
    """
    known: dict[Key | None, tuple[float, int]]
    known = {record.key: (record.time_s, index) for index, record in enumerate(order) if record.key}

    def sort_key(record: Record) -> tuple[int, float, int]:
        return record.step, *known.get(record.key, (record.time_s, 0))

    return sorted(records, key=sort_key)


def _insert_events(lost: list[Record], events: list[Log], encode_event: EncodeEvent, order: list[Record]) -> str:
    """Inserts records into the event files of their sessions; returns the names of the files that lacked them."""
    starts = []
    for log in events:
        if log.records:
            starts.append((min(record.step for record in log.records), log))
    chosen: dict[int, Log] = {}
    for record in lost:
        earlier = [log for first, log in starts if first <= record.step]
        log = earlier[-1] if earlier else starts[0][1] if starts else events[0]
        chosen[id(log)] = log
        assert record.key is not None
        event = encode_event(log.clock_zero + record.time_s, record.step, decode_numbers(record.key))
        log.records.append(record._replace(content=event))
    for log in chosen.values():
        log.records = _sort(log.records, order)
    return name_damaged([log for log in events if log.is_damaged], list(chosen.values()))


def name_damaged(damaged: list[Log], others: list[Log]) -> str:
    """Returns the names of the damaged files for a message; if none shows damage, one may have been removed."""
    names = ", ".join(map(str, damaged or others))
    return f"{names}, or a file beside it that was removed" if others and not damaged else names


def _select(records: list[Record], wanted: Counter[Key], others: list[Record]) -> Iterator[Record]:
    """Yields the wanted number of records of each key; of several, those farthest in time from records of `others`."""
    times = defaultdict[Key | None, list[float]](list)
    for record in sorted(others, key=lambda record: record.time_s) if wanted else ():
        if record.key in wanted:
            times[record.key].append(record.time_s)

    def distance_s(record: Record) -> float:
        known = times.get(record.key, [])
        index = bisect_left(known, record.time_s)
        nearest = known[max(index - 1, 0) : index + 1]
        return min((abs(record.time_s - time_s) for time_s in nearest), default=inf)

    for record in sorted(records, key=distance_s, reverse=True) if wanted else ():
        if record.key and wanted[record.key] > 0:
            wanted[record.key] -= 1
            yield record
