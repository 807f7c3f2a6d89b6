"""The jobs of a sweep: how each of them ended, told when it fails, and all of them as a table at the end.

Must not import torch.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from runner.config.errors import tell
from runner.config.run_folder import read_record
from runner.utils.utils import escape_controls, one_line

_LONGEST_CELL = 200  # characters
_ENDED = ("finished", "quit")


@dataclass(frozen=True)
class Outcome:
    """The end of one job, which is what the job returns to Hydra.

    Args:
        overrides: those of the job, such as optimizer.lr=0.1.
        status: that of run.json, or "refused" for a mistake in the config.
        exit_status: of the job as a run of its own.
        result: its best metric, or why it failed.
        metric: the value of its best metric.
    """

    number: int
    overrides: tuple[str, ...]
    status: str
    exit_status: int
    result: str
    metric: float | None = None

    def __reduce__(self) -> tuple[Any, ...]:
        # A launcher that runs jobs in other processes hands back what they return as pickles, to Hydra's sweeper alone.
        return _take, (self.number, self.overrides, self.status, self.exit_status, self.result, self.metric)


_outcomes: dict[int, Outcome] = {}  # by the job's number
_swept: set[str] = set()  # keys that the sweep varies, where this process began it


def begin(overrides: Sequence[str]) -> None:
    """Begins a sweep in this process, of the overrides as typed."""
    from hydra.core.override_parser.overrides_parser import OverridesParser

    _outcomes.clear()
    _swept.clear()
    parsed = OverridesParser.create().parse_overrides(list(overrides))
    _swept.update(override.get_key_element() for override in parsed if override.is_sweep_override())


def note(*facts: Any) -> Outcome:
    """Takes down the end of a job that this process has run, and tells it if the job has failed."""
    outcome = _take(*facts)
    if outcome.status not in _ENDED:
        varied = " ".join(o for o in outcome.overrides if not _swept or _key(o) in _swept)
        tell(f"job {outcome.number} ({one_line(varied)}) {outcome.status}: {one_line(outcome.result)}")
    return outcome


def _take(*facts: Any) -> Outcome:
    outcome = Outcome(*facts)
    _outcomes[outcome.number] = outcome
    return outcome


def describe_end(folder: Path, status: int) -> tuple[str, int, str, float | None]:
    """Returns status, exit status, result and metric of a job that ran in a folder."""
    record = read_record(folder)
    found, best = record.get("status"), record.get("best")
    name = found if isinstance(found, str) and found != "running" else "failed" if status else "finished"
    if status == 2:
        return "refused", 2, "a mistake in the config, which was told above", None
    if status:
        reason = record.get("reason")
        text = reason if isinstance(reason, str) and reason else f"exit status {status}"
        return name, status, one_line(f"{text}; see {folder / 'log.txt'}"), None
    step = f"step {record.get('last_step')}"
    if not isinstance(best, dict) or not isinstance(value := best.get("value"), (int, float)):
        return name, status, step, None
    return name, status, one_line(f"{best.get('name')} {value:.6g} at step {best.get('step') or '?'}"), float(value)


def _cell(text: str) -> str:
    """Returns a text as one line of bounded length; its end, such as a path, stays."""
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
