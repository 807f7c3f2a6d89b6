"""The progress bar of a run on stderr, its lines on stdout, and `log.txt`.

Control characters in messages are escaped. tqdm is imported only when a bar is drawn.
"""

import logging
import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from time import perf_counter
from typing import Any, TextIO

from runner.utils.files import disk
from runner.utils.utils import escape_controls, format_number, one_line

_DRAW_EVERY_S = 0.1
_DRAW_NOTEBOOK_EVERY_S = 0.5  # a saved notebook may keep every drawing
_SHOWN = {"train/loss": "loss", "train/tokens_per_s": "tok/s", "train/samples_per_s": "samples/s"}
_DEFAULT_COLUMNS = 80
_NOTEBOOK_COLUMNS = 110


class Console:
    """A progress bar if `stream` is a terminal or this is a notebook, and plain lines otherwise.

    A terminal that is closed ends the bar and the lines, not the run. A notebook has the bar in the stream of the
    lines, so that it stays below them.

    Args:
        first_step: the step that a resumed run starts from.
        stream: of the bar; None is stderr, or stdout in a notebook.
        enabled: shows the bar or not; None shows it on a terminal and in a notebook.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        first_step: int = 0,
        stream: TextIO | None = None,
        enabled: bool | None = None,
    ) -> None:
        is_notebook = stream is None and _is_notebook()
        self._draw_every_s = _DRAW_NOTEBOOK_EVERY_S if is_notebook else _DRAW_EVERY_S
        if stream is None:
            stream = sys.stdout if is_notebook else sys.stderr
        is_terminal = stream is not None and not stream.closed and (is_notebook or stream.isatty())
        is_shown = is_terminal if enabled is None else enabled
        self._step = first_step
        num_columns = _NOTEBOOK_COLUMNS if is_notebook else _DEFAULT_COLUMNS
        self._bar = _make_bar(total_steps, first_step, stream, num_columns) if is_shown else None
        self._next_draw = 0.0

    def update(self, step: int, logged: Mapping[str, Any]) -> None:
        """Moves the bar to `step` if a redraw is due, and shows some of the values that were last logged."""
        self._step = step
        if self._bar is None or perf_counter() < self._next_draw:
            return
        self._next_draw = perf_counter() + self._draw_every_s
        shown = ((label, logged[name]) for name, label in _SHOWN.items() if name in logged)
        values = ", ".join(f"{label}={format_number(float(value))}" for label, value in shown)
        try:
            self._bar.set_postfix_str(values, refresh=False)
            self._bar.update(step - self._bar.n)
        except (OSError, ValueError):
            self._drop_bar()

    def print(self, text: str) -> None:
        """Prints lines on stdout, above the bar."""
        if self._bar is None:
            _write_line(text)
            return
        try:
            with self._bar.get_lock():
                self._bar.clear(nolock=True)
                _write_line(text)
                self._bar.refresh(nolock=True)
        except (OSError, ValueError):
            self._drop_bar()

    def close(self) -> None:
        """Leaves the bar at the last step and moves the cursor below it; closing again does nothing."""
        if self._bar is None:
            return
        with suppress(OSError, ValueError):
            self._bar.update(self._step - self._bar.n)
            self._bar.close()
        self._drop_bar()

    def _drop_bar(self) -> None:
        if self._bar is not None:
            self._bar.disable = True
        self._bar = None


@contextmanager
def open_log(folder: str | Path, console: Console, rank: int = 0) -> Iterator[logging.Logger]:
    """Yields the logger "runner", which writes to `console` and, with time and level, appends to `log.txt`.

    On ranks other than zero, only messages with a traceback are written, and only to the file. The logger is restored
    afterwards, so that a job of a sweep never writes to another job's log.
    """
    logger = logging.getLogger("runner")
    before = logger.level, logger.propagate
    to_file = _LogFile(Path(folder).absolute() / "log.txt")
    prefix = f"rank {rank}: " if rank else ""
    to_file.setFormatter(_Formatter(f"%(asctime)s %(levelname)s {prefix}%(message)s"))
    handlers: list[logging.Handler] = [to_file] if rank else [to_file, _ConsoleHandler(console)]
    if rank:
        to_file.addFilter(lambda record: record.exc_info is not None)
    for handler in handlers:
        logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    logger.propagate = False
    try:
        yield logger
    finally:
        logger.level, logger.propagate = before
        for handler in handlers:
            logger.removeHandler(handler)
            handler.close()


class _Formatter(logging.Formatter):
    """Indents the lines of a message after the first, so that none can be mistaken for another message."""

    def format(self, record: logging.LogRecord) -> str:
        return escape_controls(super().format(record)).replace("\n", "\n    ")


class _LogFile(logging.StreamHandler):
    """Appends to a file; reports an error once, whereas `logging` would print a traceback for each message."""

    has_failed = False

    def __init__(self, path: Path) -> None:
        descriptor = disk.open_unsynced(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        super().__init__(os.fdopen(descriptor, "a", encoding="utf-8", errors="backslashreplace"))
        self._path = path

    def close(self) -> None:
        try:
            self.stream.close()
        finally:
            super().close()

    def handleError(self, record: logging.LogRecord) -> None:  # logging's own name
        if not self.has_failed:
            self.has_failed = True
            _write_line(f"error: {self._path} can't be written: {sys.exc_info()[1]}")


class _ConsoleHandler(logging.Handler):
    def __init__(self, console: Console) -> None:
        super().__init__()
        self._console = console

    def emit(self, record: logging.LogRecord) -> None:
        if getattr(record, "is_for_file", False):
            return
        try:
            level = f"{record.levelname.lower()}: " if record.levelno > logging.INFO else ""
            self._console.print(level + record.getMessage())  # a traceback is for log.txt
        except Exception:
            self.handleError(record)


def describe_numbers(numbers: Mapping[str, float]) -> str:
    """Formats numbers for one short line: the first few of many, and the learning rates of many groups as a range."""
    rates: dict[str, list[float]] = {}
    for name, value in numbers.items():
        if match := _RATE.fullmatch(name):
            rates.setdefault(match.group(1), []).append(value)
    shown: list[str] = []
    ranges: list[str] = []
    for name, value in numbers.items():
        match = _RATE.fullmatch(name)
        group_rates = rates[match.group(1)] if match else []
        if len(group_rates) <= _MAX_RATES:
            shown.append(f"{_shorten(name)} {format_number(value)}")
        elif match and match.group(1) == name:
            lowest, highest = format_number(min(group_rates)), format_number(max(group_rates))
            ranges.append(f"{_shorten(name)} {lowest} to {highest} ({len(group_rates)} groups)")
    if len(shown) + len(ranges) > _MAX_NUMBERS:
        shown = shown[:_MAX_NUMBERS]
        ranges = [*ranges[:_MAX_RATES], f"... ({len(numbers)} in all)"]
    return ", ".join(shown + ranges)


_RATE = re.compile(r"((?:.*/)?lr)(?:_\d+)?", re.DOTALL)  # of an optimizer's groups: lr, lr_1, lr_2, ...
_MAX_RATES = 4
_MAX_NUMBERS = 20
_MAX_NAME = 100  # characters


def _shorten(name: str) -> str:
    return one_line(name if len(name) <= _MAX_NAME else f"{name[:_MAX_NAME]}…")


def _is_notebook() -> bool:
    """Returns whether standard output is the output of a notebook's cell."""
    kernel = sys.modules.get("ipykernel.iostream")
    return kernel is not None and isinstance(sys.stdout, kernel.OutStream)


def _make_bar(total: int, first: int, stream: TextIO, num_columns: int) -> Any:
    from threading import RLock

    from tqdm import tqdm

    class Bar(tqdm):
        monitor_interval = 0  # no thread of tqdm: `update` decides when to draw

    Bar.set_lock(RLock())  # tqdm's own lock is shared between processes, which is slow
    width: dict[str, Any] = {"dynamic_ncols": True} if _num_columns(stream) > 0 else {"ncols": num_columns, "nrows": 24}
    return Bar(total=total, initial=first, file=stream, unit="step", mininterval=0, miniters=0, **width)


def _num_columns(stream: TextIO) -> int:
    """Returns the width of a terminal; 0 if it is unknown, as in a container."""
    try:
        return os.get_terminal_size(stream.fileno()).columns
    except OSError:
        return 0


def _write_line(text: str) -> None:
    stream = sys.stdout
    if stream is None or stream.closed:
        return
    encoding = stream.encoding or "utf-8"
    text = escape_controls(text)
    with suppress(OSError):  # the reader of the pipe has exited
        stream.write(text.encode(encoding, "backslashreplace").decode(encoding) + "\n")
        stream.flush()
