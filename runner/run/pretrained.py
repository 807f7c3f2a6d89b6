"""Exported folders of modules with `save_pretrained`, for `from_pretrained` of transformers and PEFT."""

from __future__ import annotations

import contextlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from runner.config.errors import ConfigError
from runner.config.spec import ExperimentSpec
from runner.engines import Engines
from runner.utils import io
from runner.utils.files import disk, list_tree, make_folder_below, remove_tree

FACTS = "runner.json"  # config, step, metrics and signature of the run, as in the metadata of an exported file
_CONFIG = "config.json"
_DTYPE_NAMES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_REMEDY = "set export.format=sft"


def check_modules(spec: ExperimentSpec, engines: Engines) -> None:
    """Checks that every module can be exported with `save_pretrained`, if the config has them exported so.

    Raises:
        ConfigError: naming the engine and its module.
    """
    if spec.export.format.name != "huggingface":
        return
    for name, engine in engines.items():
        found = f"engine {name}: {engine.kind}"
        if not _takes_state(engine.module):
            expected = "expected a model with save_pretrained(folder, state_dict=...), such as one of transformers"
            raise ConfigError(f"export.format=huggingface: {expected}, found {found}; {_REMEDY}")
        if spec.engines[name].optimizations.get("lora", {}).get("export") in ("adapter", "peft"):
            expected = f"expected whole weights, found the adapter of {found}"
            remedy = f"set optimizations.lora.export=merged, or {_REMEDY.removeprefix('set ')}"
            raise ConfigError(f"export.format=huggingface: {expected}; {remedy}")


def _takes_state(module: nn.Module) -> bool:
    """Returns whether a module's `save_pretrained` writes weights that it is given."""
    if not callable(method := getattr(module, "save_pretrained", None)):
        return False
    return "state_dict" in inspect.signature(method).parameters or hasattr(module, "peft_config")


def write_pretrained(
    module: nn.Module, state: Mapping[str, Any], folder: Path, metadata: Mapping[str, str], dtype: str | None
) -> None:
    """Writes a module's config and weights to a folder, which replaces an earlier one when all files are on disk.

    Args:
        state: the weights, in the form that is exported.
        folder: made if it does not exist, with its parent.
        metadata: written beside them.
        dtype: into which the weights were cast: bf16, fp16 or fp32.
    Raises:
        ValueError: the module refuses to write its weights.
        OSError: the disk refuses.
    """
    parent = folder.parent
    make_folder_below(parent, parent.parent)
    new, old = parent / f".{folder.name}.new", parent / f".{folder.name}.old"
    _restore(old, folder)
    for leftover in (new, old):  # of a run that was killed
        remove_tree(leftover)
    disk.make_folder(new)  # fails if a link has this name: what `save_pretrained` writes stays in here
    try:
        _save(module, state, new, dtype)
        io.write_json(dict(metadata), new / FACTS)
        files, folders = list_tree(new)
        for file in files:
            disk.sync_file(file)
        for subfolder in folders:
            disk.sync_folder(subfolder)
        if disk.is_folder(folder):
            disk.rename(folder, old)
        disk.rename(new, folder)
    except BaseException:
        _restore(old, folder)
        remove_tree(new)
        raise
    disk.sync_folder(parent)
    remove_tree(old)


def _restore(old: Path, folder: Path) -> None:
    """Gives an earlier folder its name again if the one that replaces it was not put in its place."""
    with contextlib.suppress(OSError):
        if disk.is_folder(old) and not disk.is_folder(folder):
            disk.rename(old, folder)


def _save(module: Any, state: Mapping[str, Any], folder: Path, dtype: str | None) -> None:
    try:
        module.save_pretrained(folder, state_dict=dict(state))
    except OSError:
        raise
    except Exception as error:
        raise ValueError(f"{type(module).__name__}.save_pretrained: {error}; {_REMEDY}") from error
    if dtype is None or not (folder / _CONFIG).is_file():
        return
    # Written from the module, which has another dtype; from_pretrained would cast the weights back to it.
    config = json.loads((folder / _CONFIG).read_bytes())
    io.write_json(config | {"dtype": _DTYPE_NAMES[dtype]}, folder / _CONFIG)
