"""Writes an event file for TensorBoard."""

from __future__ import annotations

import time
from collections.abc import Mapping
from types import ModuleType
from typing import Any

from runner.tracking.protocol import RunInfo
from runner.tracking.trackers.record_file import RecordFile


class TensorBoard(RecordFile):
    """Writes an event file for each session, with one record for each call; NaN included.

    `truncation` cuts the files of earlier sessions before this one is opened.
    """

    is_required = True

    def __init__(self) -> None:
        super().__init__()
        self._clock_zero = 0.0
        self._events: Any = None
        self._scalars: Any = None

    def open(self, run: RunInfo) -> None:
        self._events = import_event_file()
        self._scalars = self._events.ScalarEncoder()
        self._clock_zero = run.clock_zero
        self._open_file(self._events.name_next_file(run.folder))
        self._records.insert(0, self._events.encode_header(run.started, run.resume_step))
        self.write()

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        self._records.append(self._scalars.encode(self._clock_zero + time_s, step, numbers))

    def hparams(self, values: Mapping[str, bool | float | str], metrics: list[str] | None) -> None:
        self._records.append(self._events.encode_hparams(time.time(), values, metrics))

    def text(self, step: int, time_s: float, name: str, text: str) -> None:
        self._records.append(self._events.encode_text(self._clock_zero + time_s, step, name, text))

    def image(self, step: int, time_s: float, name: str, picture: Any) -> None:
        self._records.append(self._events.encode_image(self._clock_zero + time_s, step, name, picture))

    def audio(self, step: int, time_s: float, name: str, wav: bytes, sample_rate: int) -> None:
        self._records.append(self._events.encode_audio(self._clock_zero + time_s, step, name, wav, sample_rate))

    def histogram(self, step: int, time_s: float, name: str, histogram: Any) -> None:
        self._records.append(self._events.encode_histogram(self._clock_zero + time_s, step, name, histogram))

    def _end(self, status: str) -> None:
        self._records.append(self._events.encode_hparams_end(time.time(), status))


def import_event_file() -> ModuleType:
    """Returns the module that encodes and reads events; TensorBoard's protos would delay the start of a run."""
    from runner.tracking import event_file

    return event_file
