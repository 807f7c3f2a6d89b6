"""Runs one tracker in a separate thread, so that it can neither slow nor end a run."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from queue import Empty, SimpleQueue
from typing import Any

from runner.tracking.protocol import RunInfo
from runner.utils.utils import describe, one_line

_MAX_WAITING = 10_000  # calls
_MAX_MEDIA_WAITING = 100  # texts, pictures, sounds and histograms
_CHUNK = 100  # calls between two writes
_TIMEOUT_S = 30.0
_WRITE_S = 0.5

_Call = tuple[str, tuple[Any, ...]]  # a method and its arguments


class IsolatedTracker:
    """A tracker that is called in a separate thread.

    If it raises an error, one warning names it and it gets no more calls. If it can't show a picture, a text or
    another medium, it gets no more of that kind. If it is so slow that thousands of calls wait for it, it loses the
    next ones.

    Args:
        name: of the tracker in the config.
        warn: called with one line, in that thread.
    """

    def __init__(self, name: str, tracker: Any, warn: Callable[[str], None]) -> None:
        self._name = name
        self._tracker = tracker
        self._warn = warn
        self._timeout_s = float(getattr(tracker, "timeout_s", _TIMEOUT_S))
        self._queue: SimpleQueue[_Call] = SimpleQueue()
        self._has_lost = False
        self._is_over = False  # it failed, or nobody waits for it
        self._unshown: set[str] = set()  # media that it can't show
        self._thread = threading.Thread(target=self._run, name=f"tracker {name}", daemon=True)

    def start(self, run: RunInfo) -> None:
        """Opens the tracker, without waiting for it."""
        self._queue.put(("open", (run,)))
        self._thread.start()

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        self.put("log", step, time_s, numbers)

    def put(self, method: str, *arguments: Any) -> None:
        """Queues a call of a method of the tracker."""
        limit = _MAX_WAITING if method in ("log", "hparams") else _MAX_MEDIA_WAITING
        if self._is_over:
            return
        if self._queue.qsize() < limit:
            self._queue.put((method, arguments))
        elif not self._has_lost:
            self._has_lost = True
            self._warn(f"{self._label}: is too slow: it misses what is logged at step {arguments[0]} and later")

    def close(self, status: str) -> float:
        """Asks the tracker to end; returns the time, by `time.monotonic`, until which to wait for it."""
        self._queue.put(("close", (status,)))
        return time.monotonic() + self._timeout_s

    def join(self, end: float) -> None:
        """Waits for the tracker to end, until a time; then goes on without it."""
        if not self._thread.ident:  # it was never opened
            return
        self._thread.join(max(end - time.monotonic(), 0.0))
        if self._thread.is_alive():
            self._warn(f"{self._label}: has not ended after {self._timeout_s:g} s; {self._loss}")
            self._is_over = True

    @property
    def _label(self) -> str:
        return f"trackers.{self._name}"

    @property
    def _loss(self) -> str:
        remedy = getattr(self._tracker, "remedy", "")
        return "its last numbers may be missing" + (f"; {remedy}" if remedy else "")

    def _run(self) -> None:
        try:
            is_closed = False
            while not is_closed and not self._is_over:
                is_closed = self._make_calls()
        except BaseException as error:
            if not self._is_over:
                self._is_over = True
                self._warn(one_line(f"{self._label}: {describe(error)}; the run goes on without it; {self._loss}"))
            with suppress(BaseException):
                self._call("close", None)

    def _make_calls(self) -> bool:
        """Waits for a call, makes it and those that wait by then; returns whether the tracker is closed."""
        calls: list[_Call] = []
        with suppress(Empty):
            calls.append(self._queue.get(timeout=_WRITE_S))
            while len(calls) < _CHUNK:
                calls.append(self._queue.get_nowait())
        for method, arguments in calls:
            if method == "close":
                self._call("write")
                self._call("close", *arguments)
                return True
            self._make_call(method, arguments)
        self._call("write")
        return False

    def _make_call(self, method: str, arguments: tuple[Any, ...]) -> None:
        if method in ("open", "log", "hparams"):
            self._call(method, *arguments)
            if method == "open":
                self._warn_of_repeated(*arguments)
        elif method not in self._unshown:
            try:
                self._call(method, *arguments)
            except Exception as error:
                self._unshown.add(method)
                self._warn(one_line(f"{self._label}.{method}: {describe(error)}; it gets no more of these"))

    def _warn_of_repeated(self, run: RunInfo) -> None:
        """Warns of steps that the tracker keeps from an earlier session although they are repeated now."""
        steps = run.repeated
        if steps and not getattr(self._tracker, "truncates", False):
            span = f"step {steps[0]}" if len(steps) == 1 else f"steps {steps[0]} to {steps[-1]}"
            self._warn(f"{self._label}: keeps what an earlier session logged of {span}, which this one repeats")

    def _call(self, method: str, *arguments: Any) -> None:
        if (call := getattr(self._tracker, method, None)) is not None:
            call(*arguments)
