"""Where a run's numbers, texts and pictures go: `metrics.jsonl` and a TensorBoard event file in its folder.

Owns the background thread that writes them; what a person sees while it runs is `console`'s. It must not
import torch, Hydra, OmegaConf, `build` or anything above; a tensor is whatever has `.item()`.
"""

import atexit
import json
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from functools import lru_cache
from math import isfinite
from pathlib import Path
from queue import Empty, SimpleQueue
from types import ModuleType
from typing import Any

from runner.utils.files import AppendFile, replace_file

METRICS_NAME = "metrics.jsonl"
_CHUNK = 4096

# What waits for the thread: (step, reading of the clock, numbers of the step or a maker of a record).
_Entry = tuple[int, float, "dict[str, Any] | Callable[[ModuleType, float], bytes]"]
_FLUSH_POLL_S = 0.2


class Tracker:
    """Writes a run's numbers, texts and pictures to its folder, from a background thread.

    A line of `metrics.jsonl` is strict JSON: `step`, `time_s` (seconds that the run has run, over all its
    sessions), then one call's values in order, exact; NaN and infinities, which JSON lacks, are null. The
    event file holds one record a call, NaN included. Each number is on disk within about `flush_s` seconds.

    With `resume_step`, what lies in the folder is first cut back to the steps up to it, so each step stands
    once; `hparams` is then to be called anew, as in a first session. With `is_eval_owed` the evaluation of that very
    step is cut too: it is made again.

    `warn` is then called with what is missing: scalars that the event files lack are restored from `metrics.jsonl`.

    An error of the thread (a full disk) is raised once, by the next call; what is logged after it is dropped.

    Raises: FileExistsError when the folder holds another run's numbers and there is no `resume_step`.
    """

    def __init__(
        self,
        folder: str | Path,
        *,
        tensorboard: bool = True,
        jsonl: bool = True,
        flush_s: float = 1.0,
        resume_step: int | None = None,
        is_eval_owed: bool = False,
        warn: Callable[[str], None] = lambda text: None,
    ) -> None:
        self._warn = warn
        self._folder = Path(folder)
        self._has_events, self._has_lines, self._resume_step = tensorboard, jsonl, resume_step
        self._is_eval_owed = is_eval_owed
        if resume_step is None:
            self._refuse_numbers()
        self._started, self._clock_zero = time.time(), time.perf_counter()
        self._earlier_s = 0.0
        self._flush_s = flush_s
        # A deque and a SimpleQueue take no lock in Python, so a signal handler may log at any moment.
        self._entries: deque[_Entry] = deque()
        self._endings: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._error: BaseException | None = None
        self._is_error_told = self._is_ended = self._is_closed = False
        self._thread = threading.Thread(target=self._work, name="tracker", daemon=True)
        self._thread.start()
        atexit.register(self.close, "interrupted")

    def log(self, step: int, values: Mapping[str, Any]) -> None:
        """The numbers of a step are on their way to disk; a call takes about half a microsecond.

        A value is a number, or a 0-d array or detached tensor, which is read later by the thread: it must not
        be written to afterwards. Calls come in the order of their steps.
        """
        if self._is_ended:
            self._refuse_entry()
        else:
            self._entries.append((step, time.perf_counter(), dict(values)))

    def text(self, step: int, name: str, text: str) -> None:
        """TensorBoard's TEXT tab shows `text` as Markdown (code wants a fence); it goes nowhere else."""
        self._enqueue(step, lambda events, wall_time: events.encode_text(wall_time, step, name, text))

    def image(self, step: int, name: str, picture: Any) -> None:
        """TensorBoard's IMAGES tab shows a Matplotlib figure, or a uint8 array `[height, width, 3]`.

        The caller may close or change it afterwards. A tensor counts as an array.

        Raises: ValueError when an array is of another type or shape.
        """
        if self._has_events:
            from runner.utils.media import read_picture

            image = read_picture(name, picture)
            self._enqueue(step, lambda events, wall_time: events.encode_image(wall_time, step, name, image))

    def audio(self, step: int, name: str, audio: Any) -> None:
        """TensorBoard's AUDIO tab plays an `Audio`, whose wave may be changed afterwards."""
        if self._has_events:
            sound = audio.encode()
            self._enqueue(step, lambda events, wall: events.encode_audio(wall, step, name, sound, audio.sample_rate))

    def hparams(self, values: Mapping[str, bool | float | str], metrics: list[str] | None = None) -> None:
        """TensorBoard's HPARAMS tab shows the run with these values and the last values of `metrics`.

        TensorBoard takes the columns for all runs of a log folder from the first that lists its `metrics`;
        where none does, from all values and all scalars of all runs.

        Raises: TypeError naming a value that is no number, bool or string.
        """
        for name, value in values.items():
            if not isinstance(value, bool | int | float | str):
                found = type(value).__name__
                raise TypeError(f"hparams: {name!r} is a {found}, not a number, bool or string; pass str(value)")
        kept = dict(values)
        self._enqueue(0, lambda events, wall_time: events.encode_hparams(wall_time, kept, metrics))

    def flush(self) -> None:
        """Everything logged so far survives a loss of power; safe to call from any thread.

        Raises:
            OSError: it does not; the error is still told to the next call of another method.
        """
        flushed = threading.Event()
        self._endings.put(flushed)
        while not flushed.wait(_FLUSH_POLL_S) and self._thread.is_alive():
            pass
        if self._error is not None:
            raise OSError(f"the run's numbers can't be written: {self._error}") from self._error

    def close(self, status: str = "finished") -> None:
        """Everything logged is on disk; closing again does nothing.

        `status` is the run's, such as "finished" or "failed"; the HPARAMS tab shows it.
        """
        if not self._is_closed:
            self._is_closed = True
            self._endings.put(status)
        self._thread.join()
        self._is_ended = True
        atexit.unregister(self.close)
        self._raise_error()

    def _enqueue(self, step: int, make_record: Callable[[ModuleType, float], bytes]) -> None:
        if self._is_ended:
            self._refuse_entry()
        elif self._has_events:
            self._entries.append((step, time.perf_counter(), make_record))

    def _refuse_numbers(self) -> None:
        found = list(self._folder.glob("events.out.tfevents.*")) if self._has_events else []
        lines = self._folder / METRICS_NAME
        if self._has_lines and lines.exists() and lines.stat().st_size:
            found.append(lines)
        if found:
            names = ", ".join(path.name for path in found)
            raise FileExistsError(
                f"{self._folder} already holds a run's numbers ({names}): resume it, or use a new folder"
            )

    def _refuse_entry(self) -> None:
        self._raise_error()
        if self._is_closed and self._error is None:
            raise ValueError(f"the tracker of {self._folder} is closed: log before close()")

    def _raise_error(self) -> None:
        if self._error is not None and not self._is_error_told:
            self._is_error_told = True
            self._entries.clear()
            raise self._error

    def _work(self) -> None:
        files: list[AppendFile] = []
        try:
            self._open_files(files)
            self._write_until_closed(files)
            for file in files:
                file.sync()
        except BaseException as error:
            self._error, self._is_ended = error, True
        finally:
            for file in files:
                file.close()

    def _open_files(self, files: list[AppendFile]) -> None:
        self._lines: AppendFile | None = None
        self._records: AppendFile | None = None
        lines: Counter[tuple[int, frozenset[str]]] | None = None
        if self._has_lines:
            path = self._folder / METRICS_NAME
            if self._resume_step is not None and path.exists():
                self._earlier_s, lines = _cut_lines(path, self._resume_step, self._is_eval_owed)
            self._lines = AppendFile(path)
            files.append(self._lines)
        if self._has_events:
            from runner import event_file  # here, since TensorBoard's protos would delay the start of the run

            self._events = event_file
            restored = b""
            if self._resume_step is not None:
                events: Counter[tuple[int, frozenset[str]]] = Counter()
                for path in event_file.find_event_files(self._folder):
                    events += event_file.cut_event_file(path, self._resume_step, self._is_eval_owed)
                if lines is not None:
                    restored = self._compare(lines, events)
            self._records = AppendFile(event_file.name_next_file(self._folder))
            files.append(self._records)
            self._records.append(event_file.encode_header(self._started, None) + restored)
            if self._resume_step is not None:
                self._records.append(event_file.encode_restart(self._started, self._resume_step))

    def _compare(
        self, lines: Counter[tuple[int, frozenset[str]]], events: Counter[tuple[int, frozenset[str]]]
    ) -> bytes:
        """Tells which steps one kind of file lacks; returns the records that restore those of the event files."""
        path = self._folder / METRICS_NAME
        if lost := events - lines:
            self._warn(f"{path} lacks the numbers of {_shown_steps(lost)}: they are in the event files alone")
        missing, records = lines - events, list[bytes]()
        if not missing:
            return b""
        self._warn(
            f"{self._folder}/events.out.tfevents.*: the numbers of {_shown_steps(missing)} are missing, and restored "
            f"from {METRICS_NAME}; texts and pictures that were lost with them are not"
        )
        for line in path.read_bytes().splitlines():
            values = json.loads(line)
            step, time_s = values.pop("step"), values.pop("time_s")
            if missing[step, frozenset(values)]:
                missing[step, frozenset(values)] -= 1
                numbers = {name: float("nan") if value is None else value for name, value in values.items()}
                wall_time = self._started - self._earlier_s + time_s
                records.append(self._events.encode_scalars(wall_time, step, numbers))
        return b"".join(records)

    def _write_until_closed(self, files: list[AppendFile]) -> None:
        status = None
        while not isinstance(status, str):
            try:
                status = self._endings.get(timeout=self._flush_s / 2)
            except Empty:
                status = None
            while self._entries:
                self._write_chunk(min(len(self._entries), _CHUNK))
            if isinstance(status, threading.Event):
                for file in files:
                    file.sync()
                status.set()
        if self._records is not None:
            self._records.append(self._events.encode_hparams_end(time.time(), status))

    def _write_chunk(self, size: int) -> None:
        lines: list[str] = []
        records: list[bytes] = []
        try:
            for _ in range(size):
                self._encode(self._entries.popleft(), lines, records)
        finally:
            if self._lines is not None and lines:
                self._lines.append("".join(lines).encode())
            if self._records is not None and records:
                self._records.append(b"".join(records))

    def _encode(self, entry: _Entry, lines: list[str], records: list[bytes]) -> None:
        step, now, content = entry
        wall_time = self._started + (now - self._clock_zero)
        if callable(content):
            records.append(content(self._events, wall_time))
            return
        numbers = {name: value if type(value) is float else _number(name, value) for name, value in content.items()}
        if self._has_lines:
            time_s = self._earlier_s + (now - self._clock_zero)
            values = [_encode_key(name) + (repr(x) if isfinite(x) else "null") for name, x in numbers.items()]
            lines.append(f'{{"step": {step:d}, "time_s": {time_s:.6f}{"".join(values)}}}\n')
        if self._has_events:
            records.append(self._events.encode_scalars(wall_time, step, numbers))


def _number(name: str, value: Any) -> float:
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool):
        return int(number)
    if isinstance(number, int | float):
        return number
    raise TypeError(f"log: {name!r} is a {type(value).__name__}, not a number or a 0-d tensor; log a float")


@lru_cache(maxsize=4096)
def _encode_key(name: str) -> str:
    if name in ("step", "time_s"):
        raise ValueError(f"log: {name!r} is a name of {METRICS_NAME}'s own; call the value something else")
    return f", {json.dumps(name)}: "


def _shown_steps(found: Counter[tuple[int, frozenset[str]]]) -> str:
    """Returns steps as text, neighbours as one range."""
    ranges: list[list[int]] = []
    for step in sorted({step for step, _ in found}):
        if ranges and step == ranges[-1][1] + 1:
            ranges[-1][1] = step
        else:
            ranges.append([step, step])
    return "steps " + ", ".join(str(first) if first == last else f"{first} to {last}" for first, last in ranges)


def _cut_lines(path: Path, step: int, is_eval_owed: bool) -> tuple[float, Counter[tuple[int, frozenset[str]]]]:
    """The file holds its whole lines up to `step`.

    Returns:
        The last one's `time_s`, and how often each step has values of which names.
    """
    last_s = 0.0
    found: Counter[tuple[int, frozenset[str]]] = Counter()

    def keep(lines: Iterator[bytes]) -> Iterator[bytes]:
        nonlocal last_s
        for line in lines:
            try:
                values = json.loads(line)
                time_s = float(values["time_s"])
                is_kept = values["step"] <= step and line.endswith(b"\n")
                if is_eval_owed and values["step"] == step:
                    is_kept &= not any(name.startswith("eval/") for name in values)
            except (ValueError, TypeError, KeyError):
                continue  # torn by a kill in the middle of a write
            if is_kept:
                last_s = time_s
                found[values["step"], frozenset(values) - {"step", "time_s"}] += 1
                yield line

    with open(path, "rb") as file:
        replace_file(path, keep(file))
    return last_s, found
