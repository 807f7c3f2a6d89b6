"""Hands the numbers, texts, pictures and sounds of a run to its trackers, in a background thread.

Tensors are recognized by their `.item()`, so that torch is not imported.
"""

import atexit
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from queue import Empty, SimpleQueue
from typing import Any

from runner.tracking.isolated import IsolatedTracker
from runner.tracking.protocol import OPTIONAL_METHODS, RunInfo
from runner.tracking.trackers.jsonl import Jsonl
from runner.tracking.trackers.tensorboard import TensorBoard
from runner.tracking.truncation import Truncation, check_lines, find_numbers
from runner.utils.utils import encodable

_CHUNK = 4096

# A call of a tracker's method other than `log`: its name, and its arguments after the step and the time.
_Call = tuple[str, tuple[Any, ...]]
# An entry of the thread's queue: (step, reading of the clock, numbers of the step or another call).
_Entry = tuple[int, float, "dict[str, Any] | _Call"]
_FLUSH_POLL_S = 0.2


class TrackerThread:
    """Passes the numbers and media of a run to its trackers, in a background thread.

    `time_s`, which trackers receive, is seconds of training over all sessions of the run.

    An error of a tracker of the run's own files (`is_required`), such as a full disk, is raised once, by the next call;
    later values are dropped. Any other tracker has a thread of its own, see `IsolatedTracker`.

    Args:
        folder: of the run.
        trackers: by name, see `protocol.Tracker`; None: metrics.jsonl and TensorBoard.
        flush_s: seconds after which a logged number is on disk, about.
        resume_step: existing files are first cut after this step, so that each step is written once. Numbers that one
            of metrics.jsonl and the event files lacks by then, because it was damaged, are restored from the other.
            Call `hparams` again, as in a first session.
        is_eval_pending: the evaluation at `resume_step` is cut too, because it will be repeated.
        recorded: `counts` at `resume_step`, which shows how many numbers are missing.
        warn: called with the file and the steps of numbers that were restored or are missing, and with what ends a
            tracker that is not required.
        name: of the experiment.
        run_id: of the run, the same in all its sessions.
    Raises:
        FileExistsError: the folder holds another run's numbers and there is no `resume_step`.
        OSError: they are no regular file.
    """

    def __init__(
        self,
        folder: str | Path,
        trackers: Mapping[str, Any] | None = None,
        *,
        flush_s: float = 1.0,
        resume_step: int | None = None,
        is_eval_pending: bool = False,
        recorded: Mapping[str, int] | None = None,
        warn: Callable[[str], None] = lambda text: None,
        name: str = "",
        run_id: str = "",
    ) -> None:
        self._folder = Path(folder)
        if trackers is None:
            trackers = {"jsonl": Jsonl(), "tensorboard": TensorBoard()}
        # The lines come first: an invalid number is then in none of the files.
        required = {key: own for key, own in trackers.items() if getattr(own, "is_required", False)}
        self._required = sorted(required.values(), key=lambda tracker: not isinstance(tracker, Jsonl))
        self._isolated = {
            key: IsolatedTracker(key, tracker, warn) for key, tracker in trackers.items() if key not in required
        }
        self._has_lines = any(isinstance(tracker, Jsonl) for tracker in self._required)
        self._has_events = any(isinstance(tracker, TensorBoard) for tracker in self._required)
        self._num_logged = 0
        self._opened = threading.Event()
        self._recorded = dict(recorded or {})
        self._started = time.time()
        if resume_step is None:
            self._check_no_numbers()
            self._recorded = {"lines": 0, "events": 0}
            self._opened.set()
        elif self._has_lines:
            check_lines(self._folder)
        self._run_info = RunInfo(
            self._folder, name, run_id, resume_step, is_eval_pending, started=self._started, warn=warn
        )
        self._last_step = self._recorded.get("step", 0)
        self._clock_zero = time.perf_counter()
        self._earlier_s = 0.0  # of earlier sessions
        self._flush_s = flush_s
        # Both queues work without a lock in Python code, so a signal handler may log at any moment.
        self._entries: deque[_Entry] = deque()
        self._requests: SimpleQueue[str | threading.Event] = SimpleQueue()
        self._calls = _list_calls(self._required, trackers, self._isolated)
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
        """Logs Markdown, for TensorBoard's TEXT tab; code needs a fence."""
        self._enqueue(step, "text", name, text)

    def image(self, step: int, name: str, picture: Any) -> None:
        """Logs a picture, for TensorBoard's IMAGES tab.

        Args:
            picture: a Matplotlib figure, or a uint8 array or tensor `[height, width, 3]`; it may be closed or changed
                afterwards.
        Raises:
            ValueError: an array has another type or shape.
        """
        if self._calls["image"]:
            from runner.tracking.media import read_picture

            self._enqueue(step, "image", name, read_picture(name, picture))

    def audio(self, step: int, name: str, audio: Any) -> None:
        """Logs an `Audio`, for TensorBoard's AUDIO tab; its wave may be changed afterwards."""
        if self._calls["audio"]:
            self._enqueue(step, "audio", name, audio.encode(), audio.sample_rate)

    def histogram(self, step: int, name: str, values: Any) -> None:
        """Logs a histogram, for TensorBoard's HISTOGRAMS tab.

        Args:
            values: a `Histogram`, or an array or tensor of any shape, which may be changed afterwards. Numbers that
                are not finite are left out, and nothing is written if there are no others.
        """
        if self._calls["histogram"]:
            from runner.tracking.media import read_histogram

            if (histogram := read_histogram(name, values)) is not None:
                self._enqueue(step, "histogram", name, histogram)

    def hparams(self, values: Mapping[str, bool | float | str], metrics: list[str] | None = None) -> None:
        """Logs the hyperparameters of the run. TensorBoard's HPARAMS tab shows them with the last values of `metrics`.

        TensorBoard takes the columns for all runs of a log folder from the first run that lists its `metrics`; if none
        does, from all values and scalars of all runs.

        Raises:
            TypeError: a value is no number, bool or string.
        """
        for name, value in values.items():
            if not isinstance(value, bool | int | float | str):
                found = type(value).__name__
                raise TypeError(f"hparams: {name!r} is a {found}, not a number, bool or string; pass str(value)")
        self._enqueue(0, "hparams", dict(values), metrics)

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
        """Hands over everything logged and closes the trackers; closing again does nothing.

        A tracker in a thread of its own is waited for, but not longer than its `timeout_s`.

        Args:
            status: of the run, such as "finished" or "failed".
        """
        if not self._is_closed:
            self._is_closed = True
            self._requests.put(status)
        self._thread.join()
        self._is_ended = True
        atexit.unregister(self.close)
        ends = [(tracker, tracker.close(status)) for tracker in self._isolated.values()]
        self._isolated = {}
        for tracker, end in ends:
            tracker.join(end)
        self._raise_error()

    def _enqueue(self, step: int, method: str, *arguments: Any) -> None:
        if self._is_ended:
            self._raise_closed()
        elif self._calls[method]:
            self._entries.append((step, time.perf_counter(), (method, arguments)))

    def _check_no_numbers(self) -> None:
        if existing := find_numbers(self._folder, self._has_lines, self._has_events):
            raise FileExistsError(
                f"{self._folder} already holds a run's numbers ({', '.join(existing)}): resume it, or use a new folder"
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
        status: str | None = None
        try:
            self._open()
            status = self._write_until_closed()
        except BaseException as error:
            self._error, self._is_ended = error, True
        self._opened.set()
        for tracker in self._required:
            try:
                _call(tracker, "close", status)
            except BaseException as error:
                status = None
                if self._error is None:
                    self._error, self._is_ended = error, True

    def _open(self) -> None:
        info = self._run_info
        if info.resume_step is not None:
            kinds = self._has_lines, self._has_events
            step = info.resume_step
            cut = Truncation(
                self._folder, step, info.is_eval_pending, self._recorded, info.warn, *kinds, started=self._started
            )
            cut.run()
            self._earlier_s = cut.earlier_s
            self._opened.set()
            info = replace(info, repeated=range(step + 1, cut.last_step + 1))
        info = replace(info, clock_zero=self._started - self._earlier_s)
        for tracker in self._required:
            _call(tracker, "open", info)
        for isolated in self._isolated.values():
            isolated.start(info)

    def _write_until_closed(self) -> str:
        """Passes entries to the trackers until `close`; returns the status that was given to it."""
        while True:
            request: str | threading.Event | None = None
            with suppress(Empty):
                request = self._requests.get(timeout=self._flush_s / 2)
            while self._entries:
                self._write_chunk(min(len(self._entries), _CHUNK))
            if isinstance(request, str):
                return request
            if request is not None:
                for tracker in self._required:
                    _call(tracker, "flush")
                request.set()

    def _write_chunk(self, size: int) -> None:
        try:
            for _ in range(size):
                self._hand_over(*self._entries.popleft())
        finally:
            for tracker in self._required:
                _call(tracker, "write")

    def _hand_over(self, step: int, now: float, content: "dict[str, Any] | _Call") -> None:
        time_s = self._earlier_s + (now - self._clock_zero)
        if isinstance(content, tuple):
            method, arguments = content
            if method != "hparams":
                arguments = step, time_s, *arguments
            for call in self._calls[method]:
                call(*arguments)
            return
        names = _encodable(tuple(content))
        numbers = {
            name: value if type(value) is float else _to_number(name, value)
            for name, value in zip(names, content.values(), strict=True)
        }
        for log in self._calls["log"]:
            log(step, time_s, numbers)


def _list_calls(
    required: list[Any], trackers: Mapping[str, Any], isolated: Mapping[str, IsolatedTracker]
) -> dict[str, list[Callable[..., None]]]:
    """Returns the functions to call for each method, of the trackers that have it."""
    calls: dict[str, list[Callable[..., None]]] = {}
    for method in ("log", *OPTIONAL_METHODS):
        calls[method] = [getattr(tracker, method) for tracker in required if hasattr(tracker, method)]
        calls[method] += [partial(own.put, method) for key, own in isolated.items() if hasattr(trackers[key], method)]
    return calls


def _call(tracker: Any, method: str, *arguments: Any) -> None:
    if (call := getattr(tracker, method, None)) is not None:
        call(*arguments)


def _to_number(name: str, value: Any) -> float:
    number = value.item() if hasattr(value, "item") else value
    if isinstance(number, bool):
        return int(number)
    if isinstance(number, int | float):
        return number
    raise TypeError(f"log: {name!r} is a {type(value).__name__}, not a number or a 0-d tensor; log a float")


@lru_cache(maxsize=1024)
def _encodable(names: tuple[str, ...]) -> list[str]:
    """Returns the names that all trackers are given."""
    return [encodable(name) for name in names]
