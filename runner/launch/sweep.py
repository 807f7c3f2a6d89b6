"""The outcomes of a sweep's jobs: a message for each that fails, and a table of all at the end."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config.errors import print_message
from runner.config.run_folder import read_record
from runner.utils.utils import escape_controls, one_line

_LONGEST_CELL = 200  # characters
_ENDED = ("finished", "quit")


@dataclass(frozen=True)
class Outcome:
    """The outcome of one job, which the job returns to Hydra.

    Args:
        overrides: of the job, such as optimizer.lr=0.1.
        status: as in run.json, or "refused" for a mistake in the config.
        exit_status: of the job if it were a run of its own.
        result: its best metric, or the reason of its failure.
        metric: the value of its best metric.
    """

    number: int
    overrides: tuple[str, ...]
    status: str
    exit_status: int
    result: str
    metric: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A launcher that runs jobs in other processes returns their outcomes to Hydra's sweeper as pickles: reading one
        # records it here.
        return _record, (self.number, self.overrides, self.status, self.exit_status, self.result, self.metric)


_outcomes: dict[int, Outcome] = {}  # by the job's number
_swept: set[str] = set()  # keys that the sweep varies, if this process began it


def begin(overrides: Sequence[str]) -> None:
    """Begins a sweep in this process; `overrides` are those of the command line."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    _outcomes.clear()
    _swept.clear()
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    _swept.update(override.get_key_element() for override in parsed if override.is_sweep_override())


def record(*facts: Any) -> Outcome:
    """Records the outcome of a job that this process has run; prints it if the job has failed."""
    outcome = _record(*facts)
    if outcome.status not in _ENDED:
        varied = " ".join(o for o in outcome.overrides if not _swept or _key(o) in _swept)
        print_message(f"job {outcome.number} ({one_line(varied)}) {outcome.status}: {one_line(outcome.result)}")
    return outcome


def _record(*facts: Any) -> Outcome:
    outcome = Outcome(*facts)
    _outcomes[outcome.number] = outcome
    return outcome


def describe_end(folder: Path, status: int) -> tuple[str, int, str, float | None]:
    """Returns status, exit status, result and metric of a job that ran in a folder."""
    run_record = read_record(folder)
    recorded, best = run_record.get("status"), run_record.get("best")
    name = recorded if isinstance(recorded, str) and recorded != "running" else "failed" if status else "finished"
    if status == 2:
        return "refused", 2, "a mistake in the config, which was told above", None
    if status:
        reason = run_record.get("reason")
        text = reason if isinstance(reason, str) and reason else f"exit status {status}"
        return name, status, one_line(f"{text}; see {folder / 'log.txt'}"), None
    step = f"step {run_record.get('last_step')}"
    if not isinstance(best, dict) or not isinstance(value := best.get("value"), (int, float)):
        return name, status, step, None
    return name, status, one_line(f"{best.get('name')} {value:.6g} at step {best.get('step') or '?'}"), float(value)


def _cell(text: str) -> str:
    """Returns a text as one line, shortened in the middle: its end may be a path."""
    text = one_line(text)
    return text if len(text) <= _LONGEST_CELL else f"{text[: _LONGEST_CELL // 2]}…{text[-_LONGEST_CELL // 2 :]}"


def _key(override: str) -> str:
    return override.partition("=")[0]


def end() -> int:
    """Prints the table of all jobs; returns the exit status of the sweep."""
    outcomes = [_outcomes[number] for number in sorted(_outcomes)]
    if outcomes:
        print(escape_controls("\n".join(_make_table(outcomes))))
        sys.stdout.flush()
    statuses = [outcome.exit_status for outcome in outcomes if outcome.status not in _ENDED]
    return 0 if not statuses else next((status for status in statuses if status != 2), 2)


def _make_table(outcomes: list[Outcome]) -> list[str]:
    shared = set.intersection(*(set(outcome.overrides) for outcome in outcomes)) if len(outcomes) > 1 else set()
    keys = dict.fromkeys(_key(o) for each in outcomes for o in each.overrides if o not in shared)
    rows = [["job", *keys, "status", "result"]]
    for outcome in outcomes:
        values = {_key(o): o.partition("=")[2] for o in outcome.overrides}
        cells = [_cell(values.get(key, "")) for key in keys]
        rows.append([str(outcome.number), *cells, outcome.status, _cell(outcome.result)])
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    widths[-1] = 0
    return ["  ".join(map(str.ljust, row, widths)).rstrip() for row in rows]
