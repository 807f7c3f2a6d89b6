"""Cuts metrics.jsonl and the event files of a run after a step, and restores in each what only the other holds."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.tracking.repair import Log, read_lines, restore_missing
from runner.tracking.repair_report import describe_lost, describe_repair, find_lost
from runner.tracking.trackers.jsonl import METRICS_NAME, encode_line
from runner.tracking.trackers.tensorboard import import_event_file
from runner.utils.files import UnreadableError, check_regular, replace_file


@dataclass
class Truncation:
    """The truncation of a run's files, for a session that goes on after a step.

    Args:
        recorded: the number of calls that each kind of file held at `step`, and the last step; `run` replaces the
            numbers by those that it finds.
        started: wall time of the new session's start.
    Attributes:
        earlier_s: seconds of training before the new session.
        last_step: the last step that the files held before they were cut; -1 if there was none after `step`.
    """

    folder: Path
    step: int
    is_eval_pending: bool
    recorded: dict[str, int]
    warn: Callable[[str], None]
    has_lines: bool
    has_events: bool
    started: float
    earlier_s: float = 0.0
    last_step: int = -1

    def run(self) -> None:
        """Cuts the files after the step, restores what one kind of file lacks, and warns of what both lack."""
        path = self.folder / METRICS_NAME
        lines = read_lines(path, self.step, self.is_eval_pending) if self.has_lines else Log(path, METRICS_NAME)
        event_file: Any = import_event_file() if self.has_events else None
        events = self._read_events(event_file) if event_file else []
        self.last_step = max(log.last_step for log in [lines, *events])
        if self.has_lines and event_file:
            num_recorded = self.recorded.get("events")
            repair = restore_missing(lines, events, encode_line, event_file.encode_scalars, num_recorded)
            for text in describe_repair(repair, lines):
                self.warn(text)
        self._warn_of_lost(lines, events)
        # The lines come first: if the process is killed in between, the event files still hold the restored numbers.
        if self.has_lines and (lines.records or path.exists()):
            replace_file(path, [record.content for record in lines.records])
            self.earlier_s = lines.records[-1].time_s if lines.records else 0.0
        for log in events:
            if log.records or log.path.exists():
                event_file.write_log(log)

    def _read_events(self, event_file: Any) -> list[Log]:
        logs = list[Log]()
        earlier_s = 0.0
        paths = [path for path in event_file.find_event_files(self.folder) if self._is_readable(path)]
        for path in paths or [event_file.name_next_file(self.folder)]:
            log = event_file.read_log(path, self.step, self.is_eval_pending, earlier_s)
            if log.started is None:
                log.started = self.started
                log.clock_zero = self.started - earlier_s
            log.is_clock_known &= not logs  # an earlier file may lack its last events
            earlier_s = max([earlier_s, *(record.time_s for record in log.records if record.key)])
            logs.append(log)
        return logs

    def _is_readable(self, path: Path) -> bool:
        try:
            check_regular(path)
        except UnreadableError as error:
            self.warn(f"{error}; it is left as it is")
            return False
        return True

    def _warn_of_lost(self, lines: Log, events: list[Log]) -> None:
        """Warns of numbers that no file holds, and records how many each kind of file holds."""
        kinds = {"lines": [lines] if self.has_lines else [], "events": events}
        num_lost: list[int] = []
        for kind, logs in kinds.items():
            if logs:
                num_found = sum(record.key is not None for log in logs for record in log.records)
                num_pending = sum(log.num_pending_evals for log in logs)
                if kind in self.recorded:
                    num_lost.append(self.recorded[kind] - num_found - num_pending)
                self.recorded[kind] = num_found
        logs = [log for of_kind in kinds.values() for log in of_kind]
        max_lost = max(num_lost, default=None)
        if lost := find_lost(logs, max_lost, self.recorded.get("step", 0)):
            self.warn(describe_lost(logs, lost, max_lost))


def find_numbers(folder: Path, has_lines: bool, has_events: bool) -> list[str]:
    """Returns the names of files in a folder that hold a run's numbers already."""
    existing = list(folder.glob("events.out.tfevents.*")) if has_events else []
    lines = folder / METRICS_NAME
    if has_lines and lines.exists() and lines.stat().st_size:
        existing.append(lines)
    return [path.name for path in existing]


def check_lines(folder: Path) -> None:
    """Checks that metrics.jsonl, if there is one, is a regular file; raises OSError otherwise."""
    if os.path.lexists(folder / METRICS_NAME):
        check_regular(folder / METRICS_NAME)
