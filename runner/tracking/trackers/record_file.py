"""A tracker's file of records that are only appended."""

from __future__ import annotations

from pathlib import Path

from runner.utils.files import AppendFile


class RecordFile:
    """Appends the records that a tracker has collected since the last `write`.

    It has the methods `write`, `flush` and `close` of a tracker; a subclass collects `_records`.
    """

    def __init__(self) -> None:
        self._records: list[bytes] = []
        self._file: AppendFile | None = None

    def _open_file(self, path: Path) -> None:
        self._file = AppendFile(path)

    def write(self) -> None:
        if self._records and self._file is not None:
            records, self._records = self._records, []
            self._file.append(b"".join(records))

    def flush(self) -> None:
        if self._file is not None:
            self._file.sync()

    def close(self, status: str | None) -> None:
        if self._file is None:
            return
        try:
            if status is not None:
                self._end(status)
                self.write()
                self._file.sync()
        finally:
            self._file.close()

    def _end(self, status: str) -> None:
        """Collects the last records, for the status of the run."""
