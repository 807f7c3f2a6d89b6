"""Writes metrics, texts, pictures and sounds of a run to `metrics.jsonl` and a TensorBoard event file.

Tensors are recognized by their `.item()`, so that torch is not imported.
"""

import atexit
import json
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from functools import lru_cache
from math import isfinite
from pathlib import Path
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any

from runner.tracking.repair import LINE_NAMES, Log, read_lines, restore_missing
from runner.tracking.repair_report import describe_lost, describe_repair, find_lost
from runner.utils.files import AppendFile, UnreadableError, check_regular, replace_file
from runner.utils.utils import encodable

METRICS_NAME = "metrics.jsonl"
_CHUNK = 4096

# An entry of the thread's queue: (step, reading of the clock, numbers of the step or an encoder of another record).
_Entry = tuple[int, float, "dict[str, Any] | Callable[[ModuleType, float], bytes]"]
_FLUSH_POLL_S = 0.2


class Tracker:
    """Writes a run's numbers, texts and pictures to its folder, in a background thread.

    A line of `metrics.jsonl` is strict JSON: `step`, `time_s` (seconds of training over all sessions of the run), then
    the values of one call in order, exact; NaN and infinities, which JSON lacks, are null. The event file holds one
    record per call, NaN included.

    An error of the thread, such as a full disk, is raised once, by the next call; later values are dropped.

    Args:
        folder: of the run.
        tensorboard: writes an event file.
        jsonl: writes `metrics.jsonl`.
        flush_s: seconds after which a logged number is on disk, about.
        resume_step: existing files are first cut after this step, so that each step is written once. Numbers that one
            kind of file lacks by then, because it was damaged, are restored from the other. Call `hparams` again, as
            in a first session.
        is_eval_pending: the evaluation at `resume_step` is cut too, because it will be repeated.
        recorded: `counts` at `resume_step`, which shows how many numbers are missing.
        warn: called with the file and the steps of numbers that were restored or are missing.
    Raises:
        FileExistsError: the folder holds another run's numbers and there is no `resume_step`.
        OSError: they are no regular file.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool = True,
        jsonl: bool = True,
        flush_s: float = 1.0,
        resume_step: int | None = None,
        is_eval_pending: bool = False,
        recorded: Mapping[str, int] | None = None,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._folder = Path(folder)
        self._has_events = tensorboard
        self._has_lines = jsonl
        self._resume_step = resume_step
        self._is_eval_pending = is_eval_pending
        self._recorded = dict(recorded or {})
        self._warn = warn
        self._num_logged = 0
        self._opened = threading.Event()
        if resume_step is None:
            self._check_no_numbers()
            self._recorded = {"lines": 0, "events": 0}
            self._opened.set()
        elif jsonl and os.path.lexists(self._folder / METRICS_NAME):
            check_regular(self._folder / METRICS_NAME)
        self._last_step = self._recorded.get("step", 0)
        self._started = time.time()
        self._clock_zero = time.perf_counter()
        self._earlier_s = 0.0  # of earlier sessions
        self._flush_s = flush_s
        # Both queues work without a lock in Python code, so a signal handler may log at any moment.
        self._files: dict[str, AppendFile] = {}  # by kind: lines and events
        self._entries: deque[_Entry] = deque()
        self._requests: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._error: BaseException | None = None
        self._is_error_raised = self._is_ended = self._is_closed = False
        self._thread = threading.Thread(target=self._run, name="tracker", daemon=True)
        self._thread.start()
        atexit.register(self.close, "interrupted")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """Queues the numbers of a step to be written; a call takes about half a microsecond.

        Args:
            step: not below that of an earlier call.
            values: numbers, or 0-d arrays or detached tensors, which the thread reads later: do not write to them.
        """
        if self._is_ended:
            self._raise_closed()
        else:
            self._entries.append((step, time.perf_counter(), dict(values)))
            self._num_logged += bool(values)
            self._last_step = step

    def counts(self) -> dict[str, int]:
        """Returns the number of `log` calls that each kind of file holds, and the last step, for a checkpoint."""
        self._opened.wait()
        is_on = {"lines": self._has_lines, "events": self._has_events}
        known = {kind: self._recorded[kind] for kind in is_on if kind in self._recorded}
        return {kind: number + self._num_logged * is_on[kind] for kind, number in known.items()} | {
            "step": self._last_step
        }

    def text(self, step: int, name: str, text: str) -> None:
        """Writes Markdown for TensorBoard's TEXT tab, and nowhere else; code needs a fence."""
        self._enqueue(step, lambda events, wall_time: events.encode_text(wall_time, step, name, text))

    def image(self, step: int, name: str, picture: Any) -> None:
        """Writes a picture for TensorBoard's IMAGES tab.

        Args:
            picture: a Matplotlib figure, or a uint8 array or tensor `[height, width, 3]`; it may be closed or changed
                afterwards.
        Raises:
            ValueError: an array has another type or shape.
        """
        if self._has_events:
            from runner.tracking.media import read_picture

            image = read_picture(name, picture)
            self._enqueue(step, lambda events, wall_time: events.encode_image(wall_time, step, name, image))

    def audio(self, step: int, name: str, audio: Any) -> None:
        """Writes an `Audio` for TensorBoard's AUDIO tab; its wave may be changed afterwards."""
        if self._has_events:
            sound = audio.encode()
            self._enqueue(step, lambda events, wall: events.encode_audio(wall, step, name, sound, audio.sample_rate))

    def histogram(self, step: int, name: str, values: Any) -> None:
        """Writes a histogram for TensorBoard's HISTOGRAMS tab.

        Args:
            values: a `Histogram`, or an array or tensor of any shape, which may be changed afterwards. Numbers that
                are not finite are left out, and nothing is written if there are no others.
        """
        if self._has_events:
            from runner.tracking.media import read_histogram

            if (histogram := read_histogram(name, values)) is not None:
                self._enqueue(step, lambda events, wall: events.encode_histogram(wall, step, name, histogram))

    def hparams(self, values: Mapping[str, bool | float | str], metrics: list[str] | None = None) -> None:
        """Enters the run in TensorBoard's HPARAMS tab, with these values and the last values of `metrics`.

        TensorBoard takes the columns for all runs of a log folder from the first run that lists its `metrics`; if none
        does, from all values and scalars of all runs.

        Raises:
            TypeError: a value is no number, bool or string.
        """
        for name, value in values.items():
            if not isinstance(value, bool | int | float | str):
                found = type(value).__name__
                raise TypeError(f"hparams: {name!r} is a {found}, not a number, bool or string; pass str(value)")
        kept = dict(values)
        self._enqueue(0, lambda events, wall_time: events.encode_hparams(wall_time, kept, metrics))

    def flush(self) -> None:
        """Waits until everything logged so far would survive a loss of power; safe to call from any thread.

        Raises:
            OSError: it can't be written; the next call of another method raises the error too.
        """
        flushed = threading.Event()
        self._requests.put(flushed)
        while not flushed.wait(_FLUSH_POLL_S) and self._thread.is_alive():
            pass
        if self._error is not None:
            raise OSError(f"the run's numbers can't be written: {self._error}") from self._error

    def close(self, status: str = "finished") -> None:
        """Writes everything logged and closes the files; closing again does nothing.

        Args:
            status: of the run, such as "finished" or "failed", for the HPARAMS tab.
        """
        if not self._is_closed:
            self._is_closed = True
            self._requests.put(status)
        self._thread.join()
        self._is_ended = True
        atexit.unregister(self.close)
        self._raise_error()

    def _enqueue(self, step: int, make_record: Callable[[ModuleType, float], bytes]) -> None:
        if self._is_ended:
            self._raise_closed()
        elif self._has_events:
            self._entries.append((step, time.perf_counter(), make_record))

    def _check_no_numbers(self) -> None:
        existing = list(self._folder.glob("events.out.tfevents.*")) if self._has_events else []
        lines = self._folder / METRICS_NAME
        if self._has_lines and lines.exists() and lines.stat().st_size:
            existing.append(lines)
        if existing:
            names = ", ".join(path.name for path in existing)
            raise FileExistsError(
                f"{self._folder} already holds a run's numbers ({names}): resume it, or use a new folder"
            )

    def _raise_closed(self) -> None:
        self._raise_error()
        if self._is_closed and self._error is None:
            raise ValueError(f"the tracker of {self._folder} is closed: log before close()")

    def _raise_error(self) -> None:
        if self._error is not None and not self._is_error_raised:
            self._is_error_raised = True
            self._entries.clear()
            raise self._error

    def _run(self) -> None:
        try:
            self._open_files()
            self._write_until_closed()
            for file in self._files.values():
                file.sync()
        except BaseException as error:
            self._error, self._is_ended = error, True
        finally:
            self._opened.set()
            for file in self._files.values():
                file.close()

    def _open_files(self) -> None:
        if self._has_events:
            from runner.tracking import event_file  # imported in this thread: TensorBoard's protos would delay the run

            self._events = event_file
        if self._resume_step is not None:
            self._truncate_files(self._resume_step)
            self._opened.set()
        if self._has_lines:
            self._files["lines"] = AppendFile(self._folder / METRICS_NAME)
        if self._has_events:
            self._files["events"] = AppendFile(self._events.name_next_file(self._folder))
            self._files["events"].append(self._events.encode_header(self._started, self._resume_step))

    def _truncate_files(self, step: int) -> None:
        """Cuts the files after a step, restores what one kind of file lacks, and warns of what both lack."""
        path = self._folder / METRICS_NAME
        lines = read_lines(path, step, self._is_eval_pending) if self._has_lines else Log(path, METRICS_NAME)
        events = self._read_events(step) if self._has_events else []
        if self._has_lines and self._has_events:
            num_recorded = self._recorded.get("events")
            repair = restore_missing(lines, events, _encode_line, self._events.encode_scalars, num_recorded)
            for text in describe_repair(repair, lines):
                self._warn(text)
        self._warn_of_lost(lines, events)
        # The lines come first: if the process is killed in between, the event files still hold the restored numbers.
        if self._has_lines and (lines.records or path.exists()):
            replace_file(path, [record.content for record in lines.records])
            self._earlier_s = lines.records[-1].time_s if lines.records else 0.0
        for log in events:
            if log.records or log.path.exists():
                self._events.write_log(log)

    def _read_events(self, step: int) -> list[Log]:
        logs = list[Log]()
        earlier_s = 0.0
        paths = [path for path in self._events.find_event_files(self._folder) if self._is_readable(path)]
        for path in paths or [self._events.name_next_file(self._folder)]:
            log = self._events.read_log(path, step, self._is_eval_pending, earlier_s)
            if log.started is None:
                log.started = self._started
                log.clock_zero = self._started - earlier_s
            log.is_clock_known &= not logs  # an earlier file may lack its last events
            earlier_s = max([earlier_s, *(record.time_s for record in log.records if record.key)])
            logs.append(log)
        return logs

    def _is_readable(self, path: Path) -> bool:
        try:
            check_regular(path)
        except UnreadableError as error:
            self._warn(f"{error}; it is left as it is")
            return False
        return True

    def _warn_of_lost(self, lines: Log, events: list[Log]) -> None:
        """Warns of numbers that no file holds, and records how many each kind of file holds."""
        kinds = {"lines": [lines] if self._has_lines else [], "events": events}
        num_lost: list[int] = []
        for kind, logs in kinds.items():
            if logs:
                num_found = sum(record.key is not None for log in logs for record in log.records)
                num_pending = sum(log.num_pending_evals for log in logs)
                if kind in self._recorded:
                    num_lost.append(self._recorded[kind] - num_found - num_pending)
                self._recorded[kind] = num_found
        logs = [log for of_kind in kinds.values() for log in of_kind]
        max_lost = max(num_lost, default=None)
        if lost := find_lost(logs, max_lost, self._recorded.get("step", 0)):
            self._warn(describe_lost(logs, lost, max_lost))

    def _write_until_closed(self) -> None:
        status: str | threading.Event | None = None
        while not isinstance(status, str):
            status = None
            with suppress(Empty):
                status = self._requests.get(timeout=self._flush_s / 2)
            while self._entries:
                self._write_chunk(min(len(self._entries), _CHUNK))
            if isinstance(status, threading.Event):
                for file in self._files.values():
                    file.sync()
                status.set()
        if self._has_events:
            self._files["events"].append(self._events.encode_hparams_end(time.time(), status))

    def _write_chunk(self, size: int) -> None:
        encoded: dict[str, list[bytes]] = {"lines": [], "events": []}
        try:
            for _ in range(size):
                self._encode(self._entries.popleft(), encoded["lines"], encoded["events"])
        finally:
            for kind, parts in encoded.items():
                if parts:
                    self._files[kind].append(b"".join(parts))

    def _encode(self, entry: _Entry, lines: list[bytes], records: list[bytes]) -> None:
        step, now, content = entry
        wall_time = self._started + (now - self._clock_zero)
        if callable(content):
            records.append(content(self._events, wall_time))
            return
        numbers = {
            _encodable(name): value if type(value) is float else _to_number(name, value)
            for name, value in content.items()
        }
        if self._has_lines:
            time_s = self._earlier_s + (now - self._clock_zero)
            lines.append(_encode_line(step, time_s, numbers))
        if self._has_events:
            records.append(self._events.encode_scalars(wall_time, step, numbers))


def _to_number(name: str, value: Any) -> float:
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool):
        return int(number)
    if isinstance(number, int | float):
        return number
    raise TypeError(f"log: {name!r} is a {type(value).__name__}, not a number or a 0-d tensor; log a float")


def _encode_line(step: int, time_s: float, numbers: Mapping[str, float]) -> bytes:
    values = [_encode_key(name) + (repr(x) if isfinite(x) else "null") for name, x in numbers.items()]
    return f'{{"step": {step:d}, "time_s": {time_s:.6f}{"".join(values)}}}\n'.encode()


_encodable = lru_cache(maxsize=4096)(encodable)  # so that JSON and the event file have the same names


@lru_cache(maxsize=4096)
def _encode_key(name: str) -> str:
    if name in LINE_NAMES:
        raise ValueError(f"log: {name!r} is a name of {METRICS_NAME}'s own; call the value something else")
    return f", {json.dumps(name)}: "
