"""Reads weights of runs, exports and other programs' files. Nothing of them is executed.

A pickle is read by torch's `weights_only` reader, which loads tensors and plain values. A file of another program may
hold several nested state dicts, such as a model and its EMA: each is returned, by its keys in the file.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path, PurePath
from typing import Any

from torch import Tensor

from runner.checkpoint import checkpoints
from runner.config import run_folder
from runner.config.errors import ConfigError
from runner.utils import io
from runner.utils.utils import list_nearest

_SFT_SUFFIXES = (".safetensors", ".sft")
_PICKLE_SUFFIXES = (".pt", ".pth", ".bin", ".ckpt")
_INDEX_SUFFIX = ".index.json"
# The files of a folder that `save_pretrained` or Hugging Face's Trainer has written, the first that exists.
_MODEL_FILES = ("model", "pytorch_model", "diffusion_pytorch_model", "adapter_model")
_ADAPTER_CONFIG = "adapter_config.json"
_OWN_ENTRIES = (checkpoints.MANIFEST, "checkpoints", ".hydra", "run.json")
_EXPECTED = (
    "expected a run's folder, one of its checkpoints/step_*, an export, a .safetensors, .pt, .pth, .bin or .ckpt file, "
    "or a folder that save_pretrained has written"
)
_MAX_NESTING = 2  # keys above a state dict
_EXTRA_STATE = "_extra_state"  # torch's name of a module's state that is no tensor

State = Mapping[str, Any]


@dataclass(frozen=True)
class Source:
    """The weights of a file or folder.

    Attributes:
        states: state dicts by the name of their engine, or by their dotted keys in another program's file.
        has_engines: the keys of `states` are names of engines.
        description: for the log.
        notes: for the log, too.
    """

    states: Mapping[str, State]
    has_engines: bool
    description: str
    notes: list[str] = field(default_factory=list)


def find_source(key: str, text: str) -> Path:
    """Returns the file or folder of weights at a path of the config; for a run, its newest complete checkpoint.

    Raises:
        ConfigError: there is none.
    """
    path = Path(text)
    if path.is_file():
        if not path.name.endswith((*_SFT_SUFFIXES, *_PICKLE_SUFFIXES, _INDEX_SUFFIX)):
            raise ConfigError(f"{key}={text}: {_EXPECTED}; found another file")
        return path
    is_own = any((path / name).exists() for name in _OWN_ENTRIES)
    if path.is_dir() and not is_own:
        if _find_model_file(path) is not None:
            return path
        if saved := sorted(each.name for each in path.glob("checkpoint-*") if each.is_dir()):
            raise ConfigError(f"{key}={text}: holds several checkpoints; name one: {list_nearest('', saved)}")
    try:
        run_folder.find_run(path)
    except ConfigError as error:
        raise ConfigError(f"{key}={error}; {_EXPECTED}") from None
    if not (path / "checkpoints").is_dir():
        return path.resolve()
    newest, faults = checkpoints.Checkpoints(path / "checkpoints").newest()
    if newest is None:
        raise ConfigError(f"{key}={text}: has no whole checkpoint. {' '.join(faults)}")
    for fault in faults:
        print(f"Passed over: {fault}")
    return newest


def read_source(path: Path) -> Source:
    """Returns the weights of a source that `find_source` has found.

    Raises:
        ValueError: the source is incomplete, damaged, or would have to execute code.
        OSError: it can't be read.
    """
    if (path / checkpoints.MANIFEST).exists():
        states = checkpoints.load(path, lambda part: "." not in part)
        return Source(states, True, f"step {int(path.name.partition('_')[2])} of {path.parent.parent}")
    if path.is_dir():
        file = _find_model_file(path)
        if file is None:
            raise ValueError(f"{path}: {_EXPECTED}; found none of them")
        return _read_adapters(file) if file.name.startswith("adapter_model") else _read_file(file)
    return _read_file(path)


def _find_model_file(folder: Path) -> Path | None:
    names = [
        f"{name}{suffix}{index}"
        for name in _MODEL_FILES
        for suffix in (".safetensors", ".bin")
        for index in ("", _INDEX_SUFFIX)
    ]
    return next((folder / name for name in names if (folder / name).is_file()), None)


def _read_file(path: Path) -> Source:
    if path.name.endswith(_INDEX_SUFFIX):
        return Source({"": _read_shards(path)}, False, str(path.parent))
    if path.suffix in _PICKLE_SUFFIXES:
        return Source(_find_states(_read_pickle(path)), False, str(path))
    metadata, value = io.read_metadata(path), io.load(path)
    if "engine" not in metadata:
        return Source(_find_states(value), False, str(path))
    if not isinstance(value, Mapping):
        raise ValueError(f"{path}: expected weights by name, found {type(value).__name__}")
    step_text = metadata.get("step", "")
    of_step = f"step {step_text} of " if re.fullmatch(r"\d{1,18}", step_text, re.ASCII) else ""
    return Source({metadata["engine"]: value}, True, f"{of_step}{path}")


def _read_pickle(path: Path) -> Any:
    try:
        return io.load_pickle(path)
    except ValueError as error:
        called = re.search(r"GLOBAL ([\w.]+)", str(error.__cause__))
        if called is None:  # damaged, or of another format
            raise
        reason = f"{path}: would run {called[1][:200]} to be read"
        convert = f"torch.save(torch.load({path.name!r}, weights_only=False)['state_dict'], 'weights.pt')"
        remedy = f"if you trust its origin to run code here, convert it once in Python: {convert}"
        raise ValueError(f"{reason}; {remedy}") from error


def _read_shards(index: Path) -> dict[str, Any]:
    """Returns the tensors that an index assigns to the files beside it.

    Raises:
        ValueError: the index is malformed, names a file elsewhere, or a tensor that its file lacks.
    """
    document = io.read_json(index)
    files = document.get("weight_map") if isinstance(document, dict) else None
    if not isinstance(files, dict) or not files or not all(isinstance(file, str) for file in files.values()):
        raise ValueError(f"{index}: expected weight_map, a mapping of tensors to files")
    tensors: dict[str, Any] = {}
    for file in dict.fromkeys(files.values()):
        is_beside = PurePath(file).name == file and "\\" not in file and "\0" not in file
        if not is_beside or not file.endswith((*_SFT_SUFFIXES, *_PICKLE_SUFFIXES)):
            raise ValueError(f"{index}: expected files of weights beside it, found {file!r:.200}")
        path = index.parent / file
        shard = _read_pickle(path) if path.suffix in _PICKLE_SUFFIXES else io.load(path)
        names = [name for name, its_file in files.items() if its_file == file]
        if not isinstance(shard, Mapping) or (absent := [name for name in names if name not in shard]):
            listed = list_nearest("", absent) if isinstance(shard, Mapping) else "all of its tensors"
            raise ValueError(f"{path}: lacks {listed}, which {index.name} says it has")
        tensors |= {name: shard[name] for name in names}
    return tensors


def _read_adapters(path: Path) -> Source:
    """Returns the adapters of a folder in PEFT's format, with the names that they have in an adapted module."""
    from runner.utils.wrapper.lora.peft import read_names

    file = _read_file(path)
    (state,) = file.states.values()
    config = io.read_json(path.parent / _ADAPTER_CONFIG)
    rank, alpha = (config.get(name) if isinstance(config, dict) else None for name in ("r", "lora_alpha"))
    settings = f"optimizations.lora.rank={rank!s:.20} optimizations.lora.alpha={alpha!s:.20}"
    return Source({"": read_names(state)}, False, str(path.parent), [f"its adapters were trained with {settings}"])


def _find_states(value: Any) -> dict[str, State]:
    """Returns the state dicts in a nested value, by their dotted keys; "" for the value itself.

    A state dict has texts as keys, and tensors; what else it holds is left out.
    """
    states: dict[str, State] = {}
    for place, mapping in _walk(value, "", _MAX_NESTING):
        state = {name: each for name, each in mapping.items() if _is_state(name, each)}
        if any(isinstance(each, Tensor) for each in state.values()):
            states[place] = state
    return states


def _is_state(name: str, value: Any) -> bool:
    return isinstance(value, Tensor) or name.rpartition(".")[2] == _EXTRA_STATE


def _walk(value: Any, place: str, depth: int) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields the mappings whose keys are texts, down to a depth, with their dotted keys."""
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        return
    yield place, value
    for key, child in value.items() if depth else ():
        yield from _walk(child, f"{place}.{key}".lstrip("."), depth - 1)
