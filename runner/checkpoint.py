"""A run's state on disk: commit, verify, find the newest whole one, prune.

A checkpoint is one folder, `step_00000300`, with a manifest of its files' sizes and checksums. It is written beside its
final name, flushed, and renamed: a half-written one is never seen under that name. Must not know what is in the files.
"""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from runner.utils import io

MANIFEST = "MANIFEST.json"
_NAME = re.compile(r"step_(\d{8,})")
_FORMAT = 1


class CheckpointError(ValueError):
    """A checkpoint that is not there or not whole: which file of it failed which check."""


class Checkpoints:
    """The checkpoints of one run, in one folder.

    Args:
        folder: holds a folder a checkpoint; made when the first is saved.
        keep_last: newest ones that stay when another is saved; 0 keeps all.
    """

    def __init__(self, folder: Path, keep_last: int = 3) -> None:
        self.folder = folder
        self.keep_last = keep_last

    def save(self, step: int, files: Mapping[str, Any]) -> Path:
        """Commits a checkpoint and prunes older ones.

        Args:
            files: by file name; the suffix decides how the value is stored.
        Raises:
            OSError: with what the disk said; every earlier checkpoint is untouched.
        """
        final = self.folder / f"step_{step:08d}"
        partial = self.folder / f".{final.name}.{os.getpid()}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            for name, value in files.items():
                write = io.write_json if name.endswith(".json") else io.save
                write(value, partial / name)
            sums = {name: _measure(partial / name) for name in files}
            io.write_json({"format": _FORMAT, "step": step, "files": sums}, partial / MANIFEST)
            self._commit(partial, final)
        except BaseException:
            shutil.rmtree(partial, ignore_errors=True)
            raise
        self._prune(step)
        return final

    def _commit(self, partial: Path, final: Path) -> None:
        replaced = self.folder / f".{final.name}.{os.getpid()}.replaced"
        if final.exists():
            os.rename(final, replaced)
        os.rename(partial, final)
        _sync_folder(self.folder)
        shutil.rmtree(replaced, ignore_errors=True)

    def _prune(self, newest_step: int) -> None:
        steps = sorted(self._steps())
        superseded = [step for step in steps if step > newest_step]  # of a future that a resume has left
        kept = [step for step in steps if step <= newest_step]
        for step in superseded + (kept[: -self.keep_last] if self.keep_last else []):
            folder = self._steps()[step]
            (folder / MANIFEST).unlink(missing_ok=True)  # from here on it is no checkpoint, however far the rest gets
            shutil.rmtree(folder, ignore_errors=True)

    def _steps(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        matches = ((_NAME.fullmatch(path.name), path) for path in self.folder.iterdir() if (path / MANIFEST).is_file())
        return {int(match[1]): path for match, path in matches if match}

    def newest(self) -> tuple[Path | None, list[str]]:
        """Returns the newest whole checkpoint, and why each newer one is not whole."""
        faults = []
        for _, path in sorted(self._steps().items(), reverse=True):
            try:
                verify(path)
            except CheckpointError as error:
                faults.append(str(error))
            else:
                return path, faults
        return None, faults


def verify(path: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest after checking every file against it.

    Raises:
        CheckpointError: naming the file and the check that failed.
    """
    try:
        manifest = io.read_json(path / MANIFEST)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: {MANIFEST} can't be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT or not manifest.get("files"):
        raise CheckpointError(f"{path}: {MANIFEST} is not of format {_FORMAT}")
    for name, expected in manifest["files"].items():
        if not name or Path(name).name != name or name.startswith("."):
            raise CheckpointError(f"{path}: {MANIFEST} names {name!r}, which is no file of this folder")
        file = path / name
        if not file.is_file() or file.is_symlink():
            raise CheckpointError(f"{path}: {name} is missing")
        found = _measure(file)
        for check in ("bytes", "sha256"):
            if found[check] != expected.get(check):
                raise CheckpointError(f"{path}: {name} has {check} {found[check]}, the manifest {expected.get(check)}")
    return manifest


def load(path: Path) -> dict[str, Any]:
    """Returns a whole checkpoint's values by file name.

    Raises:
        CheckpointError: naming the file and the check that failed.
    """
    names = verify(path)["files"]
    return {name: (io.read_json if name.endswith(".json") else io.load)(path / name) for name in names}


def _measure(file: Path) -> dict[str, Any]:
    with file.open("rb") as stream:
        digest = hashlib.file_digest(stream, "sha256").hexdigest()
    return {"bytes": file.stat().st_size, "sha256": digest}


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
