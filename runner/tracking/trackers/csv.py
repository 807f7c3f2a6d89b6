"""Writes metrics.csv: one row for each step that has numbers, one column for each name."""

from __future__ import annotations

import csv
import io
import os
from collections.abc import Iterator, Mapping
from functools import lru_cache
from pathlib import Path

from runner.tracking.protocol import RunInfo
from runner.tracking.repair import LINE_NAMES
from runner.tracking.trackers.record_file import RecordFile
from runner.utils.files import iterate_lines, open_regular, replace_file
from runner.utils.utils import one_line

CSV_NAME = "metrics.csv"
_MAX_COLUMNS = 1000
_MAX_LINE_BYTES = 1 << 20
_COPIED_BYTES = 1 << 20
_END = b"\r\n"  # as RFC 4180 has it; pandas and spreadsheets read it as one line end


class Csv(RecordFile):
    """Writes `metrics.csv`, which a resume cuts after its step.

    The numbers of all calls of a step are one row: `step`, `time_s` of the first call, then a column for each name, in
    the order in which they first appeared. A number that a step lacks is empty. The row of the current step is written
    when the next step has numbers, or before a checkpoint.

    A new name adds a column, for which the file is written anew. Names beyond 1000 are left out, with a warning.
    """

    is_required = True
    truncates = True

    def __init__(self) -> None:
        super().__init__()
        self._path = Path()
        self._columns: dict[str, None] = {}
        self._num_written_columns = 0  # in the header of the file
        self._rows: list[tuple[int, float, dict[str, float]]] = []  # of the last one, more numbers may come
        self._row_start: int | None = None  # of the first of these rows in the file, if it is there already
        self._is_stale = False  # that first row has got numbers since it was written
        self._has_too_many = False
        self._run = RunInfo(Path())

    def open(self, run: RunInfo) -> None:
        self._run = run
        self._path = run.folder / CSV_NAME
        if run.resume_step is not None:
            self._truncate(run.resume_step)
        elif self._path.exists() and self._path.stat().st_size:
            raise FileExistsError(17, "holds a run's numbers already: resume it, or use a new folder", str(self._path))
        self._open_file(self._path)

    def log(self, step: int, time_s: float, numbers: Mapping[str, float]) -> None:
        if not numbers:
            return
        if not self._rows or self._rows[-1][0] != step:
            self._rows.append((step, time_s, {}))
        row = self._rows[-1][2]
        for name, number in numbers.items():
            name = _one_line(name)
            if name in self._columns or self._add_column(name):
                row[name] = number
        self._is_stale |= len(self._rows) == 1

    def write(self) -> None:
        self._write_rows(is_whole=False)

    def flush(self) -> None:
        self._write_rows(is_whole=True)
        super().flush()

    def _end(self, status: str) -> None:
        self._write_rows(is_whole=True)

    def _add_column(self, name: str) -> bool:
        """Adds a column, unless there are too many; returns whether there is one now."""
        if name in LINE_NAMES:
            raise ValueError(f"log: {name!r} is a name of {CSV_NAME}'s own; call the value something else")
        is_free = len(self._columns) < _MAX_COLUMNS
        if is_free:
            self._columns[name] = None
        elif not self._has_too_many:
            self._has_too_many = True
            self._run.warn(f"{self._path}: {_MAX_COLUMNS} columns are the most: {name} and later names are left out")
        return is_free

    def _write_rows(self, is_whole: bool) -> None:
        """Writes the rows, and with `is_whole` the last one, which a later call may change."""
        rows = self._rows if is_whole else self._rows[:-1]
        if not rows or self._file is None:
            return
        is_replaced = False
        if self._row_start is not None:
            is_replaced = self._is_stale
            if is_replaced:
                self._file.truncate(self._row_start)
            else:
                rows = rows[1:]
        if len(self._columns) > self._num_written_columns:
            self._widen()
        parts = [self._encode(*row) for row in rows]
        if rows:
            self._row_start = self._file.size() + sum(map(len, parts[:-1]))
            self._file.append(b"".join(parts))
        if is_replaced:  # a checkpoint may rely on the row that was cut off
            self._file.sync()
        if not is_whole:  # the last row is not in the file
            self._row_start = None
        self._is_stale = False
        self._rows = self._rows[-1:]

    def _widen(self) -> None:
        """Writes the file anew with all columns; the rows that it has are empty there."""
        assert self._file is not None
        self._file.close()
        num_new = len(self._columns) - self._num_written_columns
        replace_file(self._path, self._widened(num_new))
        self._num_written_columns = len(self._columns)
        self._open_file(self._path)

    def _widened(self, num_new: int) -> Iterator[bytes]:
        yield self._encode_header()
        with open_regular(self._path) as file:
            file.readline(_MAX_LINE_BYTES)  # the header, whose names have no line ends
            while lines := file.readlines(_COPIED_BYTES):
                yield b"".join(lines).replace(_END, b"," * num_new + _END)

    def _encode_header(self) -> bytes:
        text = io.StringIO()
        csv.writer(text).writerow(["step", "time_s", *self._columns])
        return text.getvalue().encode()

    def _encode(self, step: int, time_s: float, row: Mapping[str, float]) -> bytes:
        values = [repr(row[name]) if name in row else "" for name in self._columns]
        return ",".join([str(step), f"{time_s:.6f}", *values]).encode() + _END

    def _truncate(self, step: int) -> None:
        """Cuts the file after a step; later numbers of that very step are added to its row."""
        if not os.path.lexists(self._path):
            return
        kept: list[bytes] = []
        last_step, num_damaged = -1, 0
        with open_regular(self._path) as file:
            lines = iterate_lines(file, _MAX_LINE_BYTES)
            header = next(lines, b"")
            self._columns = _read_header(header)
            for line in lines if self._columns else ():
                row = self._parse(line)
                if row is None or row[0] <= last_step:
                    num_damaged += 1
                elif row[0] <= step:
                    last_step = row[0]
                    kept.append(self._encode(*row))
                    self._rows = [row]
        self._drop_pending(step, kept)
        if num_damaged:
            self._run.warn(f"{self._path}: damaged; {num_damaged} of its rows were left out")
        elif header and not self._columns:
            self._run.warn(f"{self._path}: damaged; its rows were left out, as it has no header")
        self._num_written_columns = len(self._columns)
        content = [self._encode_header(), *kept] if self._columns else []
        replace_file(self._path, content)
        if self._rows:
            self._row_start = sum(map(len, content[:-1]))

    def _drop_pending(self, step: int, kept: list[bytes]) -> None:
        """Removes the evaluation of the step that is resumed if it will be repeated."""
        if not self._run.is_eval_pending or not self._rows or self._rows[-1][0] != step:
            return
        _, time_s, numbers = self._rows[-1]
        numbers = {name: number for name, number in numbers.items() if not name.startswith("eval/")}
        self._rows = [(step, time_s, numbers)] if numbers else []
        kept[-1:] = [self._encode(*row) for row in self._rows]

    def _parse(self, line: bytes | None) -> tuple[int, float, dict[str, float]] | None:
        """Returns the row of a line; None if it is damaged or no row of this file."""
        if line is None or not line.endswith(_END):
            return None
        try:
            first, time_s, *values = line.decode().removesuffix("\r\n").split(",")
            pairs = zip(self._columns, values, strict=True)
            return int(first), float(time_s), {name: _parse_number(value) for name, value in pairs if value}
        except ValueError:
            return None


_one_line = lru_cache(maxsize=4096)(one_line)  # a name is part of the header, which is one line


def _parse_number(text: str) -> float:
    return int(text) if text.lstrip("-").isdigit() else float(text)


def _read_header(line: bytes | None) -> dict[str, None]:
    """Returns the columns after the first two; none if it is no header of this file."""
    try:
        names = next(csv.reader([(line or b"").decode()], strict=True), [])
    except (UnicodeDecodeError, csv.Error):
        return {}
    is_header = names[:2] == ["step", "time_s"] and len({*names}) == len(names) <= _MAX_COLUMNS + 2
    return dict.fromkeys(names[2:]) if is_header else {}
