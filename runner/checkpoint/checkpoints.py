"""A run's state on disk: commit, verify, find the newest whole one, prune.

A checkpoint is one folder, `step_00000300`, with a manifest of its files' sizes and checksums. It is written beside its
final name, flushed, and renamed: a half-written one is never seen under that name. Must not know what is in the files.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from itertools import islice
from pathlib import Path
from typing import Any

from crc32c import crc32c

from runner.utils import io
from runner.utils.files import disk, find_files, make_folder, read_bounded, remove_tree
from runner.utils.files.strict_json import parse_json
from runner.utils.serialization import restore_raw, unpack
from runner.utils.utils import describe, one_line

MANIFEST = "MANIFEST.json"
# A part is a file of tensors under an engine's name; the runner's own files are JSON under these: no name is both.
FACTS = "trainer.json"
STRUCTURE = "structure.json"
SHARDS = "shards"
SUFFIXES = {"sft": ".safetensors", "pt": ".pt"}
_LOADED: dict[str, Callable[[Path], Any]] = {".json": io.read_json} | dict.fromkeys(SUFFIXES.values(), io.load)
_NAME = re.compile(r"step_(\d{8,})")
_FILE = re.compile(rf"({SHARDS}/)?[^/.\\\0][^/\\\0]*")
_LEFTOVER = re.compile(r"\.(step_\d{8,})\.\d+\.(partial|replaced|pruned)")
_FORMAT = 2
_CHUNK_BYTES = 1 << 22
_MAX_MANIFEST_BYTES = 16 << 20
_MAX_FILES = 100_000


class CheckpointError(ValueError):
    """A checkpoint that is not there or not whole: which file of it failed which check."""

    def __init__(self, message: str) -> None:
        super().__init__(one_line(message))  # names and values of a file may hold anything


class Checkpoints:
    """The checkpoints of one run, in one folder that one process writes to.

    Args:
        folder: holds a folder a checkpoint; made when the first is saved, in a folder that must be there.
        format: of the tensors: sft or pt.
        keep_last: newest ones that stay when another is saved; 0 keeps all.
        keep_every: those of every so many steps stay too; 0: none.
        keep_best: number of checkpoints with the lowest rating that stay too.
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
        self.folder, self._rate = folder, rate
        self._suffix = SUFFIXES[format]
        self._keep_last, self._keep_every, self._keep_best = keep_last, keep_every, keep_best
        self._complete: dict[Path, list[tuple[int, ...]]] = {}  # by checkpoint: the stamps of its verified files

    def save(
        self,
        step: int,
        parts: Mapping[str, Any],
        facts: Mapping[str, Any],
        metric: Any = None,
        before_commit: Callable[[], None] | None = None,
        before_prune: Callable[[set[int]], bool] | None = None,
    ) -> Path:
        """Commits a checkpoint and prunes older ones.

        Args:
            parts: values with tensors, or `io.Snapshot`s of them, a file each.
            facts: plain values, stored as JSON.
            metric: what `rate` rates, stored as JSON; None is never best.
            before_commit: called when all but the final name is on disk; what it raises ends the save.
            before_prune: called with the steps to be removed once the checkpoint is committed; False keeps them.
        Raises:
            OSError: with what the disk said; every earlier checkpoint is untouched.
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
        """Makes the folder that `commit` gives its final name; what is in it then is the checkpoint."""
        partial = self._beside(self._final(step), "partial")
        make_folder(self.folder, self.folder.parent)
        remove_tree(partial)
        disk.make_folder(partial)
        return partial

    def commit(
        self,
        partial: Path,
        step: int,
        facts: Mapping[str, Any],
        metric: Any = None,
        before_commit: Callable[[], None] | None = None,
        before_prune: Callable[[set[int]], bool] | None = None,
    ) -> Path:
        """Makes what `begin` began a checkpoint, and prunes older ones; the arguments are those of `save`."""
        io.write_new_json(dict(facts), partial / FACTS)
        files, folders = find_files(partial)
        sums = {str(path.relative_to(partial)): _settle(path) for path in sorted(files)}
        manifest = {"format": _FORMAT, "step": step, "metric": metric, "files": sums}
        io.write_new_json(_sealed(manifest), partial / MANIFEST)
        disk.sync_file(partial / MANIFEST)
        for folder in reversed(folders):
            disk.sync_folder(folder)
        if before_commit is not None:
            before_commit()
        final = self._final(step)
        self._commit(partial, final)
        self._complete[final] = _stamps(final)
        superseded = self._find_superseded(step)
        if before_prune is None or before_prune(set(superseded)):
            self._remove(superseded.values())
        return final

    def _final(self, step: int) -> Path:
        return self.folder / f"step_{step:08d}"

    def _beside(self, final: Path, role: str) -> Path:
        return self.folder / f".{final.name}.{os.getpid()}.{role}"

    def _commit(self, partial: Path, final: Path) -> None:
        replaced = self._beside(final, "replaced")
        if final.exists():
            disk.rename(final, replaced)  # if this is the last thing done, `recover` takes it back
        disk.rename(partial, final)
        disk.sync_folder(self.folder)
        remove_tree(replaced)

    def recover(self) -> None:
        """Removes what a crash left half-written or half-removed; call it while no other process writes here."""
        for path in sorted(self.folder.glob(".step_*")):
            match = _LEFTOVER.fullmatch(path.name)
            if match and match[2] == "replaced" and not (self.folder / match[1]).exists():
                disk.rename(path, self.folder / match[1])
            elif match and path.is_symlink():
                disk.unlink(path)
            elif match:
                remove_tree(path)

    def remove_after(self, step: int) -> None:
        """Removes those of later steps: a run that goes on from this one has left them."""
        self._remove(self.steps_after(step).values())

    def steps_after(self, step: int) -> dict[int, Path]:
        """Returns those of later steps."""
        return {later: path for later, path in self._steps().items() if later > step}

    def _remove(self, paths: Iterable[Path]) -> None:
        own = [path for path in paths if (path / MANIFEST).is_file()]
        pruned = [self._beside(path, "pruned") for path in own]
        for path, other in zip(own, pruned, strict=True):
            disk.rename(path, other)
        if own:
            disk.sync_folder(self.folder)  # from here on they are no checkpoints, however far the rest gets
        for other in pruned:
            remove_tree(other)

    def _find_superseded(self, newest_step: int) -> dict[int, Path]:
        """Returns the checkpoints that are to go; an incomplete one takes the place of no complete one."""
        superseded = self.steps_after(newest_step)
        steps = {step: path for step, path in self._steps().items() if step not in superseded}
        last = self._newest_complete(steps, self._keep_last)
        if not self._keep_last or len(last) < self._keep_last:
            return superseded
        spared = {step for step in steps if self._keep_every and step % self._keep_every == 0}
        spared |= {step for step, _ in self.rank_best(superseded)}
        return superseded | {s: path for s, path in steps.items() if s < last[-1] and s not in spared}

    def _newest_complete(self, steps: Mapping[int, Path], count: int) -> list[int]:
        """Returns the newest complete steps, at most `count` of them, the newest first."""
        found: list[int] = []
        for step in sorted(steps, reverse=True):
            if len(found) == count:
                break
            if self._is_complete(steps[step]):
                found.append(step)
        return found

    def rank_best(
        self, left_out: Container[int] = (), count: int | None = None, below: float = math.inf
    ) -> list[tuple[int, float]]:
        """Returns step and rating of the best complete checkpoints, the best first.

        Args:
            left_out: steps of checkpoints that are not ranked.
            count: of checkpoints; by default `keep_best`.
            below: a rating that theirs must be lower than.
        """
        count = self._keep_best if count is None else count
        steps = {step: path for step, path in self._steps().items() if count and step not in left_out}
        rated = sorted(self._ratings(steps), key=lambda pair: (pair[1], -pair[0]))
        complete = (pair for pair in rated if pair[1] < below and self._is_complete(steps[pair[0]]))
        return list(islice(complete, count))

    def convert_metrics(self, convert: Callable[[float], Any]) -> None:
        """Replaces each metric that is a mere number, as older versions stored it, by what `convert` makes of it."""
        for path in self._steps().values():
            try:
                manifest = _read_manifest(path)
            except CheckpointError:
                continue
            if isinstance(manifest["metric"], (int, float)):
                io.write_json(_sealed(manifest | {"metric": convert(manifest["metric"])}), path / MANIFEST)

    def has(self, step: int) -> bool:
        """Says whether there is a complete checkpoint of a step."""
        return step in self._steps() and self._is_complete(self._final(step))

    def _ratings(self, steps: Mapping[int, Path]) -> Iterator[tuple[int, float]]:
        for step, path in steps.items():
            try:
                metric = _read_manifest(path)["metric"]
            except CheckpointError:
                continue
            rating = None if metric is None else self._rate(metric)
            if rating is not None and math.isfinite(rating):
                yield step, rating

    def _is_complete(self, path: Path) -> bool:
        """Says whether a checkpoint is complete; its content is read once, and again only after a file changed."""
        try:
            stamps = _stamps(path)
            if self._complete.get(path) != stamps:
                verify(path)
                self._complete[path] = stamps
        except (OSError, CheckpointError):
            self._complete.pop(path, None)
            return False
        return True

    def _steps(self) -> dict[int, Path]:
        if not self.folder.is_dir():
            return {}
        matches = (
            (_NAME.fullmatch(path.name), path)
            for path in self.folder.iterdir()
            if path.is_dir() and not path.is_symlink()
        )
        return {int(match[1]): path for match, path in matches if match}

    def newest_first(self) -> list[Path]:
        """Returns all checkpoints, whole or not, the newest first."""
        return [path for _, path in sorted(self._steps().items(), reverse=True)]

    def newest(self) -> tuple[Path | None, list[str]]:
        """Returns the newest whole checkpoint, and why each newer one is not whole."""
        faults = []
        for path in self.newest_first():
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
    manifest = _read_manifest(path)
    for name, expected in manifest["files"].items():
        file = path / name
        if not file.is_file() or file.is_symlink():
            raise CheckpointError(f"{path}: {name} is missing")
        found_bytes = file.stat().st_size
        if found_bytes != expected["bytes"]:
            raise CheckpointError(f"{path}: {name} has {found_bytes} bytes, {MANIFEST} says {expected['bytes']}")
        try:
            found = _measure(file)["crc32c"]
        except OSError as error:
            raise CheckpointError(f"{path}: {name} can't be read ({error.strerror})") from error
        if found != expected["crc32c"]:
            raise CheckpointError(f"{path}: {name} has crc32c {found}, {MANIFEST} says {expected['crc32c']}")
    return manifest


def load(path: Path, is_wanted: Callable[[str], bool] = bool) -> dict[str, Any]:
    """Returns a complete checkpoint's values: the parts that were saved by name and, under `FACTS`, the facts.

    Args:
        is_wanted: says of a name whether its value is read; by default all are.
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
                values[key] = _LOADED[Path(name).suffix](path / name)
        if STRUCTURE in values:
            values |= _assemble(path, values.pop(STRUCTURE), is_wanted)
    except (OSError, ValueError) as error:
        raise CheckpointError(str(error)) from error
    return values


def _assemble(path: Path, documents: Any, is_wanted: Callable[[str], bool]) -> dict[str, Any]:
    """Returns the parts of a checkpoint whose tensors many ranks wrote, each its share."""
    from runner.checkpoint import shards

    if not isinstance(documents, dict):
        raise ValueError(f"{path / STRUCTURE}: expected an object, found {type(documents).__name__}")
    documents = {part: each for part, each in documents.items() if is_wanted(part)}
    tensors = shards.read(path / SHARDS, lambda name: name.partition("/")[0] in documents)
    by_part: dict[str, dict[str, Any]] = {part: {} for part in documents}
    for name, tensor in tensors.items():
        part, _, own = name.partition("/")
        by_part.setdefault(part, {})[own] = tensor
    try:
        for part, found in by_part.items():
            restore_raw(documents[part], found)
        return {part: unpack(documents[part], found) for part, found in by_part.items()}
    except Exception as error:
        raise ValueError(f"{path / STRUCTURE}: does not fit its tensors ({describe(error)})") from error


def _read_manifest(path: Path) -> dict[str, Any]:
    """Returns a checkpoint's manifest, checked: its form, the names in it, and its own checksum.

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
    except OSError as error:
        raise CheckpointError(f"{path}: {MANIFEST} can't be read ({error.strerror})") from error
    except ValueError as error:
        raise CheckpointError(f"{path}: {MANIFEST} can't be read ({error})") from error
    if not isinstance(manifest, dict) or manifest.get("format") != _FORMAT:
        raise CheckpointError(f"{path}: {MANIFEST} is not of format {_FORMAT}")
    own = manifest.pop("crc32c", None)
    if own != _sum_of(manifest):
        raise CheckpointError(f"{path}: {MANIFEST} has crc32c {_sum_of(manifest)}, it says {own!r:.40}")
    if fault := _find_fault(manifest):
        raise CheckpointError(f"{path}: {MANIFEST} {fault}")
    return manifest


def _find_fault(manifest: Mapping[str, Any]) -> str | None:
    """Returns what a manifest has that no checkpoint's has, or lacks."""
    files = manifest.get("files")
    if missing := {"step", "metric", "files"} - manifest.keys():
        return f"lacks {', '.join(sorted(missing))}"
    if type(manifest["step"]) is not int or not isinstance(files, dict):
        return "has no number as its step, or no object as its files"
    if len(files) > _MAX_FILES:
        return f"names {len(files):,} files, {_MAX_FILES:,} at most are read"
    for name, entry in files.items():
        if not _FILE.fullmatch(name) or Path(name).suffix not in _LOADED:
            return f"names {name!r:.100}, which is no file of a checkpoint"
        if not isinstance(entry, dict) or type(entry.get("bytes")) is not int or type(entry.get("crc32c")) is not str:
            return f"has no bytes and crc32c of {name!r:.100}"
    return None


def _stamps(path: Path) -> list[tuple[int, ...]]:
    """Returns what changes when a file of a checkpoint is written to, replaced or removed."""
    stats = [os.stat(file) for file in sorted(path.rglob("*"))]
    return [(stat.st_ino, stat.st_size, stat.st_mtime_ns, stat.st_ctime_ns) for stat in stats]


def _sealed(manifest: dict[str, Any]) -> dict[str, Any]:
    return manifest | {"crc32c": _sum_of(manifest)}


def _sum_of(content: Any) -> str:
    return f"{crc32c(json.dumps(content, sort_keys=True).encode()):08x}"


def _settle(file: Path) -> dict[str, Any]:
    """Flushes a file to disk, and measures it meanwhile."""
    with ThreadPoolExecutor(1) as pool:
        flushed = pool.submit(lambda: disk.sync_file(file))
        measured = _measure(file)
        flushed.result()
    return measured


def _measure(file: Path) -> dict[str, Any]:
    total = 0
    with disk.open_read(file) as stream:
        while chunk := stream.read(_CHUNK_BYTES):
            total = crc32c(chunk, total)
        return {"bytes": stream.tell(), "crc32c": f"{total:08x}"}
