"""The Protocol of trackers: objects that receive a run's numbers, and optionally texts, pictures and sounds."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol


@dataclass(frozen=True)
class RunInfo:
    """The session of a run, for a tracker that opens.

    Args:
        folder: of the run.
        name: of the experiment.
        id: of the run, the same in all its sessions; letters and digits.
        resume_step: the step that the session goes on after; None for a new run.
        is_eval_pending: the evaluation at `resume_step` will be repeated.
        repeated: steps after `resume_step` that an earlier session has logged, as far as the run's files show.
        clock_zero: wall time at `time_s` = 0, as if there were no pauses between sessions.
        started: wall time of the session's start.
        warn: logs a warning.
    """

    folder: Path
    name: str = ""
    id: str = ""
    resume_step: int | None = None
    is_eval_pending: bool = False
    repeated: range = range(0)
    clock_zero: float = 0.0
    started: float = 0.0
    warn: Callable[[str], None] = lambda text: None


class Tracker(Protocol):
    """Receives the numbers and media of a run; only `log` is required. Rank zero alone has trackers.

    All methods are called in one background thread, in order. A tracker with `is_required = True` is part of the run's
    own files: its error ends the run. Any other tracker has a thread of its own: its error is one warning, and training
    goes on. These may also have the attributes `remedy`, the end of that warning; `timeout_s`, which the end of a run
    waits for it; and `truncates = True`, if it removes the numbers after `resume_step`.

    `step` is the step of the run. `time_s` is seconds of training over all sessions.
    """

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        """Receives the numbers of one call. A step may have several calls, such as training and evaluation."""

    # Optional:
    # def open(self, run: RunInfo) -> None: called once, before all others.
    # def hparams(self, values: Mapping[str, bool | float | str], metrics: list[str] | None) -> None
    # def text(self, step: int, time_s: float, name: str, text: str) -> None: Markdown.
    # def image(self, step: int, time_s: float, name: str, picture: bytes | ndarray) -> None: a PNG, or uint8
    #     [height, width, 3].
    # def audio(self, step: int, time_s: float, name: str, wav: bytes, sample_rate: int) -> None
    # def histogram(self, step: int, time_s: float, name: str, histogram: media.Histogram) -> None
    # def write(self) -> None: called after a batch of calls, within a second of the first.
    # def flush(self) -> None: of a required tracker: waits until everything would survive a loss of power.
    # def close(self, status: str | None) -> None: called once. The status of the run, such as "finished"; None after
    #     an error of this tracker.


OPTIONAL_METHODS = ("open", "hparams", "text", "image", "audio", "histogram", "write", "flush", "close")


def require_package(package: str, extra: str) -> None:
    """Checks that a package is installed, without importing it; raises ImportError that names the extra otherwise."""
    if find_spec(package) is None:
        raise ImportError(f'{package} is not installed; pip install "exact-runner[{extra}]"')


def find_fault(tracker: Any) -> str | None:
    """Returns why an object can't be a tracker; None if it can."""
    if not callable(getattr(tracker, "log", None)):
        return f"expected an object with log(step, time_s, numbers), found {type(tracker).__name__}"
    wrong = [name for name in OPTIONAL_METHODS if not callable(getattr(tracker, name, find_fault))]
    return f"{type(tracker).__name__}.{wrong[0]}: expected a method" if wrong else None
