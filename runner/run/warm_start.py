"""Stand-ins for weights files that a run's model was built from, where these are gone or have changed.

A checkpoint holds every weight, yet the function that builds the model may read a file first. A run records the
structure of each such file: names, shapes, dtypes and small values. A saved run then builds its model from a file of
that structure, and loads its own weights over it. Must not import torch at the top, nor know of Hydra.
"""

from __future__ import annotations

import contextlib
import gc
import io as streams
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config import optimizations
from runner.config.errors import ConfigError
from runner.utils.files import disk, read_bounded

if TYPE_CHECKING:
    from torch import nn

RECORD = "weights.json"  # in a run's .hydra/, and `weights` in the metadata of its exports
_METADATA_KEY = "weights"
_FORMAT = 1
_SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")
_MAX_RECORD_BYTES = 16 << 20
_MAX_EXPORTED_BYTES = 1 << 20
_MAX_PATH_LENGTH = 4096
_MAX_NUM_PROBED = 1000  # strings of a model's config that are looked up on disk
_MAX_NUM_ENTRIES = 100  # files and folders in a run's record

Make = Callable[[Any], "nn.Module"]


def models_of(plain: Mapping[str, Any]) -> Iterator[tuple[str, str, Any]]:
    """Yields each engine's name, the key of its model and the model's config, of a resolved config."""
    for name, own in (plain["engines"] or {"model": {}}).items():
        place = f"engines.{name}." if plain["engines"] else ""
        yield name, f"{place}model", own.get("model", plain["model"])


def record(plain: Mapping[str, Any], known: Path | None = None) -> bytes | None:
    """Returns the record of the weights files that a resolved config names under its models; None for none.

    A file that can't be read without running what is in it is left out.

    Args:
        known: an earlier record of a run that begins again, whose entries stay.
    """
    from runner.utils.serialization.structure import describe

    entries = {} if known is None else _read(known)
    texts = {place: text for _, key, node in models_of(plain) for place, text in _strings(node, key)}
    for place, text in list(texts.items())[:_MAX_NUM_PROBED]:
        if len(entries) >= _MAX_NUM_ENTRIES:
            break
        if place not in entries and (files := describe(text)) is not None:
            entries[place] = {"path": text, **files}
            if len(_encode(entries)) > _MAX_RECORD_BYTES:
                del entries[place]
    return _encode(entries) if entries else None


def _encode(entries: Mapping[str, Any]) -> bytes:
    return (json.dumps({"format": _FORMAT, "entries": entries}, separators=(",", ":")) + "\n").encode()


def exported(run: Path) -> dict[str, str]:
    """Returns what an export's metadata holds of its run's record: nothing where that is large or not there."""
    path = run / ".hydra" / RECORD
    text = _read_if_there(path, _MAX_EXPORTED_BYTES)
    return {} if text is None else {_METADATA_KEY: text.decode(errors="replace")}


def join(config: str, metadata: Mapping[str, str]) -> str:
    """Returns what an export's signature covers: its config, and the record in its metadata."""
    return f"{config}\0{metadata.get(_METADATA_KEY, '')}"


def _read(path: Path) -> dict[str, Any]:
    """Returns the entries of a record by the key of the string in the config; none where it can't be read."""
    from runner.utils.serialization.structure import check

    try:
        if path.suffix == ".json":
            text: str | bytes | None = _read_if_there(path, _MAX_RECORD_BYTES)
        else:
            from runner.utils import io

            text = io.read_metadata(path).get(_METADATA_KEY)
        if text is None:
            return {}
        document = json.loads(text)
        if document["format"] != _FORMAT:
            return {}
        entries: dict[str, Any] = dict(islice(document["entries"].items(), _MAX_NUM_ENTRIES))
        for entry in entries.values():
            check(entry)
    except Exception:  # a stranger's: what it is not is of any kind
        return {}
    return entries


def _read_if_there(path: Path, max_bytes: int) -> bytes | None:
    with contextlib.suppress(OSError):
        return read_bounded(path, max_bytes)
    return None


def _strings(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yields the strings of a config that may be paths, with their dotted keys."""
    if isinstance(node, str) and 0 < len(node) <= _MAX_PATH_LENGTH and "\0" not in node:
        yield key, node
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        if name != "_target_":
            yield from _strings(child, f"{key}.{name}")


def _replaced(node: Any, key: str, paths: Mapping[str, Path]) -> Any:
    """Returns a config with other paths at some dotted keys."""
    if isinstance(node, Mapping):
        return {name: _replaced(child, f"{key}.{name}", paths) for name, child in node.items()}
    if isinstance(node, list):
        return [_replaced(child, f"{key}.{index}", paths) for index, child in enumerate(node)]
    return str(paths[key]) if key in paths else node


@dataclass(frozen=True)
class Lost:
    """A string of a model's config that names a weights file that is gone or has changed, and its recorded entry."""

    place: str
    path: str
    entry: dict[str, Any] | None


class ModelBuilder:
    """Builds models whose weights are those that they are built with."""

    def build(self, engine: str, key: str, node: Any, make: Make) -> nn.Module:
        """Returns what `make` makes of the config `node` of an engine's model, which stands at `key`."""
        return make(node)

    def finish(self, engine: str, module: nn.Module) -> None:
        """Ends what `build` began, once the optimizations of the engine have changed its module."""


class StandIns(ModelBuilder):
    """Builds the models of a saved run without the weights files that they were first built from.

    Args:
        source: the run's folder, or one of its exports.
        weights: the saved parts by name; those of an engine under its name.
        is_signed: the record is the user's own. Another describes no folder, whose texts a loader may execute, and
            takes the place of no file that is there.
    """

    def __init__(self, source: Path, weights: Mapping[str, Any], is_signed: bool) -> None:
        entries = _read(source if source.is_file() else source / ".hydra" / RECORD)
        self._entries = {key: entry for key, entry in entries.items() if is_signed or not entry.get("is_folder")}
        self._is_signed = is_signed
        self._weights = weights
        self._num_bytes = 0  # of all stand-ins so far

    def build(self, engine: str, key: str, node: Any, make: Make) -> nn.Module:
        """Returns what `make` makes of a model's config.

        Raises:
            ConfigError: it needs a file that is gone, beyond the weights that the run has saved.
        """
        strings = dict(_strings(node, key))
        lost = [found for place, text in strings.items() if (found := self._find_lost(place, text))]
        if all(each.entry is None for each in lost):
            try:
                return make(node)
            except ConfigError:
                if not lost:
                    raise
        return self._build_from_stand_ins(engine, key, node, make, lost)

    def _find_lost(self, place: str, text: str) -> Lost | None:
        from runner.utils.serialization.structure import is_same

        entry = self._entries.get(place)
        if entry is None:
            return Lost(place, text, None) if text.endswith(_SUFFIXES) and not os.path.exists(text) else None
        is_compared = self._is_signed and text == entry["path"]
        is_usable = is_same(text, entry) if is_compared else os.path.exists(text)
        return None if is_usable else Lost(place, text, entry)

    def _build_from_stand_ins(self, engine: str, key: str, node: Any, make: Make, lost: list[Lost]) -> Any:
        """Builds a model twice, from other values of the lost files, to find what the checkpoint does not hold."""
        from runner.utils.serialization.structure import find_unsaved

        found = self._weights.get(engine)
        own = found if isinstance(found, Mapping) else {}
        self._check_size(key, lost, own)
        build = _Builds(key, node, make, lost, own)
        other: dict[str, Any] | None = None
        with contextlib.suppress(ConfigError), contextlib.redirect_stdout(streams.StringIO()):
            other = find_unsaved(build(fills_with_ones=True))
        gc.collect()  # the first model is gone before the second is built
        module = build()
        unsaved = find_unsaved(module) if other is not None else {}
        differing = {place for place, digest in unsaved.items() if (other or {}).get(place) != digest}
        if differing:  # what differs from one build to the next anyway does not come from the files
            with contextlib.redirect_stdout(streams.StringIO()):
                module = build()
            again = find_unsaved(module)
            differing = {place for place in differing if again.get(place) == unsaved[place]}
        if differing:
            names = ", ".join(sorted(differing)[:3])
            remedy = f"put {lost[0].path} back, or register them as parameters or persistent buffers"
            raise ConfigError(f"{key}: {names}: read from {lost[0].path}, and no checkpoint holds them; {remedy}")
        return module

    def _check_size(self, key: str, lost: list[Lost], own: Mapping[str, Any]) -> None:
        """Checks that the stand-ins of a run, whose record may be a stranger's, are few and no larger than is right.

        Raises:
            ConfigError: there are too many, or they are too large together.
        """
        from runner.utils.serialization.structure import count_bytes, most_bytes

        remedy = _describe_lost(lost[0])
        if len(lost) > _MAX_NUM_ENTRIES:
            raise ConfigError(f"{key}: expected at most {_MAX_NUM_ENTRIES} weights files, found {len(lost)}; {remedy}")
        self._num_bytes += sum(count_bytes(each.entry, own) for each in lost)
        if self._num_bytes > (limit := most_bytes(self._weights)):
            found = f"the recorded structure of {len(lost)} has over {limit:,} bytes with all before"
            raise ConfigError(f"{key}: weights files: {found}; {remedy}")


def of_saved(
    plain: dict[str, Any], source: Path, weights: Mapping[str, Any], engine: str | None, is_signed: bool
) -> StandIns | None:
    """Returns the stand-ins for what evaluates or exports a saved run; None for an adapter without its base weights.

    Args:
        plain: the resolved config.
        engine: of an export.
        is_signed: the run, or the export, is the user's own.
    """
    lora = {"rank": 0} if engine is None else optimizations.of_engine(plain, engine)["lora"]
    is_adapter = lora["rank"] > 0 and lora["export"] == "adapter"
    return None if is_adapter else StandIns(source, weights, is_signed)


class _Builds:
    """Builds a model from stand-ins in a temporary folder, which is removed each time."""

    def __init__(self, key: str, node: Any, make: Make, lost: list[Lost], own: Mapping[str, Any]) -> None:
        self._key, self._node, self._make, self._lost, self._own = key, node, make, lost, own

    def __call__(self, *, fills_with_ones: bool = False) -> Any:
        from runner.utils.serialization.structure import write

        paths: dict[str, Path] = {}
        with tempfile.TemporaryDirectory(prefix="runner-weights-", ignore_cleanup_errors=True) as folder:
            try:
                for number, each in enumerate(self._lost):
                    place = Path(folder, str(number))
                    disk.make_folder(place)
                    paths[each.place] = write(place, each.path, each.entry, self._own, fills_with_ones=fills_with_ones)
            except OSError as error:
                told = f"{self._key}: {folder}: can't be written to ({error.strerror}); set TMPDIR"
                raise ConfigError(told) from error
            except Exception as error:  # of a record that came from elsewhere
                raise ConfigError(f"{self._key}: {error}; {_describe_lost(self._lost[0])}") from error
            try:
                return self._make(_replaced(self._node, self._key, paths))
            except ConfigError as error:
                message = str(error)
                for each in self._lost:
                    message = message.replace(str(paths[each.place]), each.path)
                raise ConfigError(f"{message}; {_describe_lost(self._lost[0])}") from error


def _describe_lost(lost: Lost) -> str:
    state = "has changed since the run began" if os.path.exists(lost.path) else "is gone"
    return f"{lost.place}={lost.path} {state}, and the run's own weights do not stand for it: put it back"
