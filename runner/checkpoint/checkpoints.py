"""Commits, verifies, loads and prunes the checkpoints of a run.

A checkpoint is one folder, `step_00000300`, with a manifest of its files' sizes and checksums. It is written under a
temporary name beside its final one, flushed to disk, and renamed: a half-written checkpoint never has the final name.
This module does not depend on the content of the files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from itertools import islice
from pathlib import Path
from typing import Any

from crc32c import crc32c

from runner.utils import io
from runner.utils.files import disk, list_tree, make_folder_below, read_bounded, remove_tree
from runner.utils.files.strict_json import parse_json
from runner.utils.serialization import restore_dtypes, unflatten
from runner.utils.utils import describe, one_line

MANIFEST = "MANIFEST.json"
# A part is a file of tensors with an engine's name. The runner's own files are JSON: the names can't clash.
FACTS = "trainer.json"
STRUCTURE = "structure.json"
SHARDS = "shards"
SUFFIXES = {"sft": ".safetensors", "pt": ".pt"}
_LOADERS: dict[str, Callable[[Path], Any]] = {".json": io.read_json} | dict.fromkeys(SUFFIXES.values(), io.load)
_NAME = re.compile(r"step_(\d{8,})")
_FILE = re.compile(rf"({SHARDS}/)?[^/.\\\0][^/\\\0]*")
_LEFTOVER = re.compile(r"\.(step_\d{8,})\.\d+\.(partial|replaced|pruned)")
_FORMAT = 2
_CHUNK_BYTES = 1 << 22
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_FILES = 100_000


class CheckpointError(ValueError):
    """A checkpoint is missing or incomplete.

    The message names the file and the check that failed.
    """

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # names and values come from files, and may contain line breaks


class Checkpoints:
    """The checkpoints of one run, in one folder that only one process writes to.

    `save` is `begin`, one file for each part, and `commit`. A commit ends with pruning.

    Args:
        folder: contains one folder for each checkpoint; created by the first save. Its parent must exist.
        format: of files with tensors: sft or pt.
        keep_last: number of newest checkpoints that pruning keeps; 0 keeps all.
        keep_every: pruning also keeps checkpoints whose step is a multiple of this; 0 keeps none of these.
        keep_best: pruning also keeps this number of checkpoints with the lowest rating.
        rate: returns the rating of a checkpoint's metric; None is never best.
    """

    def __init__(
        self,
        folder: Path,
        *,
        format: str = "sft",
        keep_last: int = 3,
        keep_every: int = 0,
        keep_best: int = 0,
        rate: Callable[[Any], float | None] = float,
    ) -> None:
        self.folder = folder
        self._rate = rate
        self._suffix = SUFFIXES[format]
        self._keep_last, self._keep_every, self._keep_best = keep_last, keep_every, keep_best
        self._verified_stamps: dict[Path, list[tuple[int, ...]]] = {}  # file stamps at the last verification

    def save(
        self,
        step: int,
        parts: Mapping[str, Any],
        facts: Mapping[str, Any],
        metric: Any = None,
        before_commit: Callable[[], None] = lambda: None,
        before_prune: Callable[[set[int]], bool] = lambda steps: True,
    ) -> Path:
        """Commits a checkpoint and prunes older ones.

        Args:
            parts: values with tensors, or `HostSnapshot`s of them, one file each.
            facts: plain values, stored as JSON.
            metric: argument of `rate`, stored as JSON; None is never best.
            before_commit: called when all files are on disk, before the rename; an error it raises ends the save.
            before_prune: called after the commit with the steps to be pruned; False keeps them.
        Raises:
            OSError: the error of the disk; every earlier checkpoint is untouched.
        """
        partial = self.begin(step)
        try:
            for name, value in parts.items():
                io.write_new(value, partial / f"{name}{self._suffix}")
            return self.commit(partial, step, facts, metric, before_commit, before_prune)
        except BaseException:
            remove_tree(partial)
            raise

    def begin(self, step: int) -> Path:
        """Creates the temporary folder for a checkpoint's files, which `commit` renames."""
        partial = self._temporary_path(self._path_of(step), "partial")
        make_folder_below(self.folder, self.folder.parent)
        remove_tree(partial)
        disk.make_folder(partial)
        return partial

    def commit(
        self,
        partial: Path,
        step: int,
        facts: Mapping[str, Any],
        metric: Any = None,
        before_commit: Callable[[], None] = lambda: None,
        before_prune: Callable[[set[int]], bool] = lambda steps: True,
    ) -> Path:
        """Commits the folder that `begin` created, and prunes older checkpoints.

        For the arguments see `save`.
        """
        io.write_new_json(dict(facts), partial / FACTS)
        files, folders = list_tree(partial)
        checksums = {str(path.relative_to(partial)): _flush_and_measure(path) for path in sorted(files)}
        manifest = {"format": _FORMAT, "step": step, "metric": metric, "files": checksums}
        io.write_new_json(_with_checksum(manifest), partial / MANIFEST)
        disk.sync_file(partial / MANIFEST)
        for folder in reversed(folders):
            disk.sync_folder(folder)
        before_commit()
        final = self._path_of(step)
        replaced = self._temporary_path(final, "replaced")
        if final.exists():
            disk.rename(final, replaced)  # after a crash at this point, `recover` restores the old one
        disk.rename(partial, final)
        disk.sync_folder(self.folder)
        remove_tree(replaced)
        self._verified_stamps[final] = _stamps(final)
        superseded = self._find_superseded(step)
        if before_prune(set(superseded)):
            self._prune(superseded.values())
        return final

    def _path_of(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _temporary_path(self, final: Path, role: str) -> Path:
        return self.folder / f".{final.name}.{os.getpid()}.{role}"

    def recover(self) -> None:
        """Deletes checkpoints that a crash left half-written or half-pruned.

        No other process may write meanwhile.
        """
        for path in sorted(self.folder.glob(".step_*")):
            match = _LEFTOVER.fullmatch(path.name)
            if match and match[2] == "replaced" and not (self.folder / match[1]).exists():
                disk.rename(path, self.folder / match[1])
            elif match and path.is_symlink():
                disk.unlink(path)
            elif match:
                remove_tree(path)

    def remove_after(self, step: int) -> None:
        """Deletes the checkpoints of later steps, before a run resumes from this step."""
        self._prune(self.steps_after(step).values())

    def steps_after(self, step: int) -> dict[int, Path]:
        """Returns the checkpoints of later steps."""
        return {later: path for later, path in self._steps().items() if later > step}

    def _prune(self, paths: Iterable[Path]) -> None:
        """Renames all checkpoints before deleting any: a crash leaves no half-deleted one under its final name."""
        checkpoints = [path for path in paths if (path / MANIFEST).is_file()]
        renamed = [self._temporary_path(path, "pruned") for path in checkpoints]
        for path, temporary in zip(checkpoints, renamed, strict=True):
            disk.rename(path, temporary)
        if checkpoints:
            disk.sync_folder(self.folder)
        for temporary in renamed:
            remove_tree(temporary)

    def _find_superseded(self, newest_step: int) -> dict[int, Path]:
        """Returns the checkpoints to prune. An incomplete one does not count for `keep_last`."""
        superseded = self.steps_after(newest_step)
        steps = {step: path for step, path in self._steps().items() if step not in superseded}
        complete = (step for step in sorted(steps, reverse=True) if self._is_complete(steps[step]))
        newest = list(islice(complete, self._keep_last))
        if not self._keep_last or len(newest) < self._keep_last:
            return superseded
        kept = {step for step in steps if self._keep_every and step % self._keep_every == 0}
        kept |= {step for step, _ in self.rank_best(superseded)}
        return superseded | {s: path for s, path in steps.items() if s < newest[-1] and s not in kept}

    def rank_best(
        self, left_out: Container[int] = (), count: int | None = None, below: float = math.inf
    ) -> list[tuple[int, float]]:
        """Returns step and rating of the best complete checkpoints, the best first.

        Args:
            left_out: steps of checkpoints that are not ranked.
            count: maximum number of checkpoints; by default `keep_best`.
            below: only ratings below this one.
        """
        count = self._keep_best if count is None else count
        steps = {step: path for step, path in self._steps().items() if count and step not in left_out}
        ratings = {}
        for step, manifest in _readable_manifests(steps):
            rating = None if manifest["metric"] is None else self._rate(manifest["metric"])
            if rating is not None and math.isfinite(rating) and rating < below:
                ratings[step] = rating
        rated = sorted(ratings.items(), key=lambda pair: (pair[1], -pair[0]))
        return list(islice((pair for pair in rated if self._is_complete(steps[pair[0]])), count))

    def convert_metrics(self, convert: Callable[[float], Any]) -> None:
        """Replaces each metric that is a plain number by `convert(number)`.

        Older versions stored plain numbers.
        """
        steps = self._steps()
        for step, manifest in _readable_manifests(steps):
            if isinstance(manifest["metric"], (int, float)):
                converted = manifest | {"metric": convert(manifest["metric"])}
                io.write_json(_with_checksum(converted), steps[step] / MANIFEST)

    def has(self, step: int) -> bool:
        """Returns whether there is a complete checkpoint of a step."""
        return step in self._steps() and self._is_complete(self._path_of(step))

    def _is_complete(self, path: Path) -> bool:
        """Returns whether a checkpoint passes `verify`.

        Files are read again only if their stamps changed.
        """
        try:
            stamps = _stamps(path)
            if self._verified_stamps.get(path) != stamps:
                verify(path)
                self._verified_stamps[path] = stamps
        except (OSError, CheckpointError):
            self._verified_stamps.pop(path, None)
            return False
        return True

    def _steps(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        folders = [path for path in self.folder.iterdir() if path.is_dir() and not path.is_symlink()]
        return {int(match[1]): path for path in folders if (match := _NAME.fullmatch(path.name))}

    def newest_first(self) -> list[Path]:
        """Returns all checkpoints, complete or not, the newest first."""
        return [path for _, path in sorted(self._steps().items(), reverse=True)]

    def newest(self) -> tuple[Path | None, list[str]]:
        """Returns the newest complete checkpoint, and a message for each newer one."""
        faults = []
        for path in self.newest_first():
            try:
                verify(path)
            except CheckpointError as error:
                faults.append(str(error))
            else:
                return path, faults
        return None, faults


def verify(path: Path, *, reads_content: bool = True) -> dict[str, Any]:
    """Verifies the size and checksum of every file of a checkpoint.

    Returns its manifest.

    Args:
        reads_content: False compares sizes only, which takes no time.
    Raises:
        CheckpointError: naming the file and the check that failed.
    """
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.is_symlink():
            raise CheckpointError(f"{path}: {name} is missing")
        found_bytes = file.stat().st_size
        if found_bytes != expected["bytes"]:
            raise CheckpointError(f"{path}: {name} has {found_bytes} bytes, {MANIFEST} says {expected['bytes']}")
        if not reads_content:
            continue
        try:
            found = _measure(file)["crc32c"]
        except OSError as error:
            raise CheckpointError(f"{path}: {name} can't be read ({error.strerror})") from error
        if found != expected["crc32c"]:
            raise CheckpointError(f"{path}: {name} has crc32c {found}, {MANIFEST} says {expected['crc32c']}")
    return manifest


def load(path: Path, is_wanted: Callable[[str], bool] = bool) -> dict[str, Any]:
    """Verifies and loads a checkpoint.

    Returns its parts by name and, under `FACTS`, its facts.

    Args:
        is_wanted: called with a name; returns whether its value is loaded. By default all are.
    Raises:
        CheckpointError: naming the file and the check that failed.
    """
    values: dict[str, Any] = {}
    manifest = verify(path)
    try:
        for name in manifest["files"]:
            if "/" not in name:
                key = name if Path(name).suffix == ".json" else Path(name).stem
                if key != STRUCTURE and not is_wanted(key):
                    continue
                if key in values:
                    raise ValueError(f"{path}: {MANIFEST} names two files of {key!r}")
                values[key] = _LOADERS[Path(name).suffix](path / name)
        if STRUCTURE in values:
            values |= _assemble(path, values.pop(STRUCTURE), is_wanted)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    return values


def _assemble(path: Path, documents: Any, is_wanted: Callable[[str], bool]) -> dict[str, Any]:
    """Returns the parts of a checkpoint whose tensors were written by many ranks."""
    from runner.checkpoint import shards

    if not isinstance(documents, dict):
        raise ValueError(f"{path / STRUCTURE}: expected an object, found {type(documents).__name__}")
    documents = {part: document for part, document in documents.items() if is_wanted(part)}
    tensors = shards.read(path / SHARDS, lambda name: name.partition("/")[0] in documents)
    by_part: dict[str, dict[str, Any]] = {part: {} for part in documents}
    for name, tensor in tensors.items():
        part, _, name_in_part = name.partition("/")
        by_part.setdefault(part, {})[name_in_part] = tensor
    try:
        for part, part_tensors in by_part.items():
            restore_dtypes(documents[part], part_tensors)
        return {part: unflatten(documents[part], part_tensors) for part, part_tensors in by_part.items()}
    except Exception as error:
        raise ValueError(f"{path / STRUCTURE}: does not fit its tensors ({describe(error)})") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    """Reads a checkpoint's manifest and checks its form and checksum.

    Raises:
        CheckpointError: naming the fault.
    """
    try:
        content = read_bounded(path / MANIFEST, _MAX_MANIFEST_BYTES)
        manifest = parse_json(content)
        if not content.endswith(b"}\n"):
            raise ValueError("cut short by its last character")
    except FileNotFoundError:
        raise CheckpointError(f"{path}: {MANIFEST} is missing") from None
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else error
        raise CheckpointError(f"{path}: {MANIFEST} can't be read ({reason})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: {MANIFEST} is not of format {_FORMAT}")
    stored, computed = manifest.pop("crc32c", None), _checksum(manifest)
    if stored != computed:
        raise CheckpointError(f"{path}: {MANIFEST} has crc32c {computed}, it says {stored!r:.40}")
    if fault := _find_fault(manifest):
        raise CheckpointError(f"{path}: {MANIFEST} {fault}")
    return manifest


def _readable_manifests(steps: Mapping[int, Path]) -> Iterator[tuple[int, dict[str, Any]]]:
    for step, path in steps.items():
        with suppress(CheckpointError):
            yield step, _read_manifest(path)


def _find_fault(manifest: Mapping[str, Any]) -> str | None:
    files = manifest.get("files")
    if missing := {"step", "metric", "files"} - manifest.keys():
        return f"lacks {', '.join(sorted(missing))}"
    if type(manifest["step"]) is not int or not isinstance(files, dict):
        return "has no number as its step, or no object as its files"
    if len(files) > _MAX_FILES:
        return f"names {len(files):,} files, {_MAX_FILES:,} at most are read"
    for name, entry in files.items():
        if not _FILE.fullmatch(name) or Path(name).suffix not in _LOADERS:
            return f"names {name!r:.100}, which is no file of a checkpoint"
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("crc32c")) is not str:
            return f"has no bytes and crc32c of {name!r:.100}"
    return None


def _stamps(path: Path) -> list[tuple[int, ...]]:
    """Returns attributes of a checkpoint's files that change with their content."""
    stats = [os.stat(file) for file in sorted(path.rglob("*"))]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]


def _with_checksum(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"crc32c": _checksum(manifest)}


def _checksum(content: Any) -> str:
    return f"{crc32c(json.dumps(content, sort_keys=True).encode()):08x}"


def _flush_and_measure(file: Path) -> dict[str, Any]:
    """Flushes a file to disk in a thread, and measures it meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(disk.sync_file, file)
        measured = _measure(file)
        flushed.result()
    return measured


def _measure(file: Path) -> dict[str, Any]:
    """Returns the size and checksum of a file, as a manifest stores them."""
    total = 0
    with disk.open_read(file) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            total = crc32c(chunk, total)
        return {"bytes": stream.tell(), "crc32c": f"{total:08x}"}
