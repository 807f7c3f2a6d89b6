"""Placeholders for weights files that are missing when a saved run is opened.

A checkpoint holds every weight, but the function that builds the model may still read such a file, which may be gone or
changed. A run therefore records the structure of each file: names, shapes, dtypes and small values. A saved run builds
its model from a placeholder file of that structure, and then loads its own weights into the model.
"""

from __future__ import annotations

import contextlib
import functools
import gc
import json
import os
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from io import StringIO
from itertools import islice
from pathlib import Path
from typing import Any

from torch import nn

from runner.config.errors import ConfigError
from runner.utils import io
from runner.utils.files import disk, read_bounded
from runner.utils.serialization import structure

RECORD_NAME = "weights.json"  # in a run's .hydra/, and `weights` in the metadata of its exports
_METADATA_KEY = "weights"
_FORMAT = 1
_SUFFIXES = (".safetensors", ".sft", ".pt", ".pth", ".bin", ".ckpt")
_MAX_RECORD_BYTES = 16 << 20
_MAX_EXPORTED_BYTES = 1 << 20
_MAX_PATH_LENGTH = 4096
_MAX_NUM_PROBED = 1000  # strings of a model's config that are tried as paths
_MAX_NUM_ENTRIES = 100  # files and folders in a run's record

BuildModel = Callable[[Any], nn.Module]


def record_weights_files(plain: Mapping[str, Any], earlier: Path | None = None) -> bytes | None:
    """Returns the record of the weights files that a resolved config names under its models, or None for none.

    A file that can't be read without executing its content is left out.

    Args:
        earlier: an earlier record of the same run, whose entries are kept.
    """
    entries = {} if earlier is None else _read_entries(earlier)
    strings = dict[str, str]()
    for name, engine in (plain["engines"] or {"model": {}}).items():
        model_key = f"engines.{name}.model" if plain["engines"] else "model"
        strings |= _find_strings(engine.get("model", plain["model"]), model_key)
    for key, text in islice(strings.items(), _MAX_NUM_PROBED):
        if len(entries) >= _MAX_NUM_ENTRIES:
            break
        if key not in entries and (files := structure.describe_weights_files(text)) is not None:
            entries[key] = {"path": text, **files}
            if len(_encode(entries)) > _MAX_RECORD_BYTES:
                del entries[key]
    return _encode(entries) if entries else None


def _encode(entries: Mapping[str, Any]) -> bytes:
    return (json.dumps({"format": _FORMAT, "entries": entries}, separators=(",", ":")) + "\n").encode()


def export_metadata(run: Path) -> dict[str, str]:
    """Returns the run's record as metadata of an export, or an empty dict if it is large or missing."""
    with contextlib.suppress(OSError):
        text = read_bounded(run / ".hydra" / RECORD_NAME, _MAX_EXPORTED_BYTES)
        return {_METADATA_KEY: text.decode(errors="replace")}
    return {}


def signed_text(config: str, metadata: Mapping[str, str]) -> str:
    """Returns the text that an export's signature covers: its config and the record in its metadata."""
    return f"{config}\0{metadata.get(_METADATA_KEY, '')}"


def _read_entries(path: Path) -> dict[str, Any]:
    """Returns the entries of a record by config key, or an empty dict if it can't be read."""
    try:
        is_export = path.suffix != ".json"
        text = io.read_metadata(path)[_METADATA_KEY] if is_export else read_bounded(path, _MAX_RECORD_BYTES)
        document = json.loads(text)
        entries: dict[str, Any] = dict(islice(document["entries"].items(), _MAX_NUM_ENTRIES))
        for entry in entries.values():
            structure.check_description(entry)
    except Exception:  # there is no record, or an untrusted one is malformed in any way
        return {}
    return entries if document["format"] == _FORMAT else {}


def _find_strings(node: Any, key: str) -> Iterator[tuple[str, str]]:
    """Yields the dotted keys and values of the strings of a config that may be paths."""
    if isinstance(node, str) and 0 < len(node) <= _MAX_PATH_LENGTH and "\0" not in node:
        yield key, node
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        if name != "_target_":
            yield from _find_strings(child, f"{key}.{name}")


def _replace_paths(node: Any, key: str, paths: Mapping[str, Path]) -> Any:
    """Returns a config with the values at some dotted keys replaced by other paths."""
    if isinstance(node, Mapping):
        return {name: _replace_paths(child, f"{key}.{name}", paths) for name, child in node.items()}
    if isinstance(node, list):
        return [_replace_paths(child, f"{key}.{index}", paths) for index, child in enumerate(node)]
    return str(paths[key]) if key in paths else node


@dataclass(frozen=True)
class MissingFile:
    """A weights file in a model's config that is gone or has changed.

    Attributes:
        key: dotted key of the path in the config.
        entry: the recorded structure of the file; None if none was recorded.
    """

    key: str
    path: str
    entry: dict[str, Any] | None


class ModelBuilder:
    """Builds models, which keep the weights that they are built with."""

    def build(self, engine: str, key: str, node: Any, make: BuildModel) -> nn.Module:
        """Builds the model of an engine with `make` from its config `node`, found at `key`."""
        return make(node)

    def finish(self, engine: str, module: nn.Module) -> None:
        """Called after the engine's optimizations were applied to its module."""


class PlaceholderBuilder(ModelBuilder):
    """Builds the models of a saved run without the weights files that they were first built from.

    Args:
        source: the run folder, or one of its exports.
        weights: the parts of the checkpoint by name; an engine's weights under the engine's name.
        is_signed: the record is the user's own. Of any other record, entries of folders are ignored, because a loader
            may execute their texts, and no existing file is replaced by a placeholder.
    """

    def __init__(self, source: Path, weights: Mapping[str, Any], is_signed: bool) -> None:
        entries = _read_entries(source if source.is_file() else source / ".hydra" / RECORD_NAME)
        self._entries = {key: entry for key, entry in entries.items() if is_signed or not entry.get("is_folder")}
        self._is_signed = is_signed
        self._weights = weights
        self._num_bytes = 0  # of all placeholders so far

    def build(self, engine: str, key: str, node: Any, make: BuildModel) -> nn.Module:
        """Builds a model with `make`, from placeholders if files are missing.

        Raises:
            ConfigError: the model needs values of a missing file that the run has not saved.
        """
        strings = dict(_find_strings(node, key))
        missing = [file for text_key, text in strings.items() if (file := self._find_missing(text_key, text))]
        if all(file.entry is None for file in missing):
            try:
                return make(node)
            except ConfigError:
                if not missing:
                    raise
        return self._build_from_placeholders(engine, key, node, make, missing)

    def _find_missing(self, key: str, text: str) -> MissingFile | None:
        entry = self._entries.get(key)
        if entry is None:
            return MissingFile(key, text, None) if text.endswith(_SUFFIXES) and not os.path.exists(text) else None
        is_compared = self._is_signed and text == entry["path"]
        is_usable = structure.matches_description(text, entry) if is_compared else os.path.exists(text)
        return None if is_usable else MissingFile(key, text, entry)

    def _build_from_placeholders(
        self, engine: str, key: str, node: Any, make: BuildModel, missing: list[MissingFile]
    ) -> Any:
        """Builds a model from placeholders, and checks that it holds no value of a missing file that was not saved.

        The model is built twice, from placeholders with different values. A value outside its state that differs was
        read from a file, and no checkpoint has it.
        """
        part = self._weights.get(engine)
        saved = part if isinstance(part, Mapping) else {}
        self._check_size(key, missing, saved)
        build = functools.partial(_build_once, key, node, make, missing, saved)
        of_ones: dict[str, Any] | None = None
        with contextlib.suppress(ConfigError), contextlib.redirect_stdout(StringIO()):
            of_ones = structure.find_unsaved(build(fills_with_ones=True))
        gc.collect()  # frees the first model before the second is built
        module = build()
        unsaved = structure.find_unsaved(module) if of_ones is not None else {}
        differing = {name for name, digest in unsaved.items() if (of_ones or {}).get(name) != digest}
        if differing:  # a value that also differs between two equal builds does not come from the files
            with contextlib.redirect_stdout(StringIO()):
                module = build()
            rebuilt = structure.find_unsaved(module)
            differing = {name for name in differing if rebuilt.get(name) == unsaved[name]}
        if differing:
            names = ", ".join(sorted(differing)[:3])
            remedy = f"put {missing[0].path} back, or register them as parameters or persistent buffers"
            raise ConfigError(f"{key}: {names}: read from {missing[0].path}, and no checkpoint holds them; {remedy}")
        return module

    def _check_size(self, key: str, missing: list[MissingFile], saved: Mapping[str, Any]) -> None:
        """Checks the number and total size of placeholders, since the record may be untrusted.

        Raises:
            ConfigError: there are too many, or they are too large together.
        """
        count = len(missing)
        remedy = _describe_missing(missing[0])
        if count > _MAX_NUM_ENTRIES:
            raise ConfigError(f"{key}: expected at most {_MAX_NUM_ENTRIES} weights files, found {count}; {remedy}")
        self._num_bytes += sum(structure.count_bytes(file.entry, saved) for file in missing)
        if self._num_bytes > (limit := structure.max_placeholder_bytes(self._weights)):
            found = f"the recorded structure of {count} has over {limit:,} bytes with all before"
            raise ConfigError(f"{key}: weights files: {found}; {remedy}")


def _build_once(
    key: str,
    node: Any,
    make: BuildModel,
    missing: list[MissingFile],
    saved: Mapping[str, Any],
    *,
    fills_with_ones: bool = False,
) -> Any:
    """Builds a model from placeholder files in a temporary folder, which is removed afterwards."""
    paths: dict[str, Path] = {}
    with tempfile.TemporaryDirectory(prefix="runner-weights-", ignore_cleanup_errors=True) as folder:
        try:
            for number, file in enumerate(missing):
                target = Path(folder, str(number))
                disk.make_folder(target)
                paths[file.key] = structure.write_placeholder(
                    target, file.path, file.entry, saved, fills_with_ones=fills_with_ones
                )
        except OSError as error:
            raise ConfigError(f"{key}: {folder}: can't be written to ({error.strerror}); set TMPDIR") from error
        except Exception as error:  # an untrusted record may be malformed in any way
            raise ConfigError(f"{key}: {error}; {_describe_missing(missing[0])}") from error
        try:
            return make(_replace_paths(node, key, paths))
        except ConfigError as error:
            message = str(error)
            for file in missing:
                message = message.replace(str(paths[file.key]), file.path)
            raise ConfigError(f"{message}; {_describe_missing(missing[0])}") from error


def _describe_missing(file: MissingFile) -> str:
    state = "has changed since the run began" if os.path.exists(file.path) else "is gone"
    return f"{file.key}={file.path} {state}, and the run's own weights can't replace it; put it back"
