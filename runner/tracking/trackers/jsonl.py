"""Writes metrics.jsonl: one line of strict JSON for each call."""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import lru_cache
from math import isfinite

from runner.tracking.protocol import RunInfo
from runner.tracking.repair import LINE_NAMES
from runner.tracking.trackers.record_file import RecordFile

METRICS_NAME = "metrics.jsonl"


class Jsonl(RecordFile):
    """Writes `metrics.jsonl`, which `truncation` cuts before it is opened.

    A line has `step`, `time_s`, then the values of one call in order, exact; NaN and infinities, which JSON lacks, are
    null.
    """

    is_required = True

    def open(self, run: RunInfo) -> None:
        self._open_file(run.folder / METRICS_NAME)

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        self._records.append(encode_line(step, time_s, numbers))


def encode_line(step: int, time_s: float, numbers: Mapping[str, float]) -> bytes:
    """Returns a line; a name of the line's own is a ValueError."""
    keys = _encode_keys(tuple(numbers))
    values = [key + (repr(x) if isfinite(x) else "null") for key, x in zip(keys, numbers.values(), strict=True)]
    return f'{{"step": {step:d}, "time_s": {time_s:.6f}{"".join(values)}}}\n'.encode()


@lru_cache(maxsize=1024)
def _encode_keys(names: tuple[str, ...]) -> list[str]:
    for name in names:
        if name in LINE_NAMES:
            raise ValueError(f"log: {name!r} is a name of {METRICS_NAME}'s own; call the value something else")
    return [f", {json.dumps(name)}: " for name in names]
