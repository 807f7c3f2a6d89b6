"""Messages about the numbers of a run that were restored or lost, by file and step."""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import pairwise
from statistics import mode

from runner.tracking.repair import Log, Repair, name_damaged


def find_lost(logs: list[Log], num_lost: int | None, last_step: int) -> list[range]:
    """Returns the ranges of steps in which numbers are lost that no file holds.

    Args:
        num_lost: the number of lost calls; None if no checkpoint records it.
        last_step: the last step that had numbers.
    """
    same_kind = [log for log in logs if log.pattern == logs[0].pattern]  # the other kind holds the same after a repair
    num_calls = Counter(record.step for log in same_kind for record in log.records if record.key)
    steps = sorted(num_calls)
    # The usual distance between two steps with numbers; `mode` returns the first of equally frequent ones.
    spacing = mode(sorted(after - before for before, after in pairwise(steps)) or [1])
    open_gaps, restored_gaps = _split_gaps(logs)
    lost = _merge(span for gap in open_gaps for span in _steps_of(gap, spacing))
    if num_lost is None or num_lost <= 0:
        return lost
    last_found = steps[-1] if steps else -1
    tail = range(last_found + 1, last_step + 1)
    lost = _merge([*lost, tail])
    num_explained = len(tail) // spacing
    num_explained += sum(max(len(range(before + 1, after)) // spacing, 1) for before, after in open_gaps)
    max_calls = max(num_calls.values(), default=1)
    if num_lost > num_explained:
        # Complete calls may be missing between files, within one, or between the calls of a step.
        between, ends = _find_between(logs, is_all=not lost)
        holes = [(last, step) for last, step in pairwise(steps) if step - last > spacing]
        lost = _merge([*lost, *between, *(range(last + 1, step) for last, step in holes)])
        if not lost or num_lost > sum(map(len, lost)) * max_calls:
            # Another call may be lost in a gap in which one was restored.
            lost = _merge([*lost, *(range(max(before, 0), after + 1) for before, after in restored_gaps)])
        if lost or any(log.is_damaged for log in logs):
            ends |= {last_found}.union(*open_gaps, *restored_gaps, *holes)
            lost = _merge([*lost, *map(_one_step, (step for step in ends if 0 < num_calls[step] < max_calls))])
        if lost and num_lost > sum(map(len, lost)) * max_calls:
            lost = _merge([*lost, *map(_one_step, (step for step in ends if step >= 0))])
    return lost or _merge([range(last_step + 1)])


def _one_step(step: int) -> range:
    return range(step, step + 1)


def _merge(spans: Iterable[range]) -> list[range]:
    """Returns the same steps as sorted ranges that do not touch; a set of the steps could have any size."""
    merged: list[range] = []
    for span in sorted((span for span in spans if span), key=lambda span: span.start):
        if merged and span.start <= merged[-1].stop:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, span.stop))
        else:
            merged.append(span)
    return merged


def _split_gaps(logs: list[Log]) -> tuple[set[tuple[int, int]], set[tuple[int, int]]]:
    """Returns the gaps without a restored call, and the gaps with one."""
    open_gaps, restored_gaps = set[tuple[int, int]](), set[tuple[int, int]]()
    for log in logs:
        steps = sorted(log.restored)
        for before, after in log.gaps:
            index = bisect_left(steps, before)
            is_open = index == len(steps) or steps[index] > after
            (open_gaps if is_open else restored_gaps).add((before, after))
    return open_gaps, restored_gaps - open_gaps


def _steps_of(gap: tuple[int, int], spacing: int) -> list[range]:
    """Returns the steps in a gap, with the steps beside it if the gap is too narrow to have numbers."""
    before, after = gap
    between = range(before + 1, after)
    return [between] if len(between) >= spacing else [between, _one_step(max(before, 0)), _one_step(after)]


def _find_between(logs: list[Log], is_all: bool) -> tuple[list[range], set[int]]:
    """Returns the steps between consecutive files, and the steps at which a file may be cut off.

    Args:
        is_all: counts step 0 before a first step 1. Otherwise it counts only if the file is damaged before its numbers,
            as a run usually starts with step 1.
    """
    lost, ends = list[range](), set[int]()
    last, pattern = -1, ""
    for log in logs:
        if log.pattern != pattern:
            last, pattern = -1, log.pattern
        for record in log.records[:1]:  # a resumed file starts with a restart of the step after the last
            steps = range(last + 1, record.step)
            if is_all or last >= 0 or record.step > 1 or log.is_begin_damaged:
                lost.append(steps)
            if log.is_begin_damaged and not steps:
                ends.add(record.step)
        for record in log.records[-1:]:
            last = max(last, record.step)
            ends.add(last)
    return lost, ends


def format_steps(steps: Iterable[int]) -> str:
    """Returns steps as text, with consecutive steps as a range."""
    return _format_ranges(_merge(map(_one_step, steps)))


def _format_ranges(spans: list[range]) -> str:
    noun = "step " if sum(map(len, spans)) == 1 else "steps "
    return noun + ", ".join(str(span[0]) if len(span) == 1 else f"{span[0]} to {span[-1]}" for span in spans)


def describe_repair(repair: Repair, lines: Log) -> Iterator[str]:
    """Yields a message for each kind of file in which numbers were restored."""
    if repair.of_events:
        yield (
            f"{repair.damaged}: damaged; the numbers of {format_steps(repair.of_events)} were "
            f"missing and are restored from {lines.pattern}; texts, pictures and sounds of these steps are not"
        )
    if repair.of_times:
        yield (
            f"{lines}: damaged; the times of {format_steps(repair.of_times)} were changed and are "
            "restored from the event files"
        )
    if repair.of_lines:
        yield (
            f"{lines}: damaged; the numbers of {format_steps(repair.of_lines)} were "
            "missing or changed and are restored from the event files, in their float32 precision"
        )


def describe_lost(logs: list[Log], lost: list[range], num_lost: int | None) -> str:
    """Returns a message with the files and steps whose numbers are lost."""
    names = name_damaged([log for log in logs if log.is_damaged], logs)
    if num_lost is not None and num_lost <= 0:
        return f"{names}: damaged; a record of {_format_ranges(lost)} was left out, no numbers are missing"
    return f"{names}: damaged; the numbers of {_format_ranges(lost)} are missing and no file holds them"
