"""What a command line changes of a run's own config: found between two compositions, applied, told, or refused.

Owns nests of plain values, unresolved or not; a path is a tuple of keys. Must not import torch, nor read a file.
"""

from __future__ import annotations

import copy
import json
import re
import shlex
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser

from runner.config.errors import ConfigError
from runner.utils.utils import one_line

KeyPath = tuple[Any, ...]
Nest = dict[str, Any]

_ABSENT = object()
_IDENTITY_KEYS: list[KeyPath] = [  # what makes a run the one it is
    ("seed",), ("model",), ("engines",), ("feeder",), ("sampler",), ("pattern",), ("optimizer", "_target_"),
    ("data", "train"), ("data", "batch_size"), ("data", "collate"), ("data", "seed_samples"),
    ("trainer", "accumulate"), ("trainer", "precision"),
    *(("optimizations", key) for key in ("freeze", "freeze_mode", "replace", "fp8", "compile", "ema")),
    *(("optimizations", "lora", key) for key in ("rank", "alpha", "dropout", "include", "exclude", "also_train")),
]  # fmt: skip
_BY_KEY = ("optimizer", "scheduler", "optimizations", "init_from")


def apply(saved: Nest, without: Nest, beside: Nest, typed: list[str]) -> Nest:
    """Returns a run's config with what a command line changes of it.

    Args:
        saved: the run's config.
        without: composed from the run's own overrides alone.
        beside: composed from the same with the command line's.
        typed: the command line's overrides: a value given in one counts even where it is what is composed anyway.
    """
    wanted = copy.deepcopy(saved)
    for path in [*_changed(without, beside, ()), *_set_by(typed, saved, beside)]:
        _copy(beside, wanted, path)
    return wanted


def _changed(before: Any, after: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Yields the paths that differ; a node of another target counts whole: no argument of the old one is kept."""
    both = isinstance(before, dict) and isinstance(after, dict)
    if both and before.get("_target_") == after.get("_target_"):
        for key in [*before, *(key for key in after if key not in before)]:
            yield from _changed(before.get(key, _ABSENT), after.get(key, _ABSENT), (*path, key))
    elif not _is_same(before, after):
        yield path


def _set_by(typed: list[str], saved: Nest, beside: Nest) -> Iterator[KeyPath]:
    parser = OverridesParser.create()
    for override in parser.parse_overrides(typed):
        path, value = tuple(override.key_or_group.split(".")), override.value()
        composed = _get(beside, path)
        if override.is_delete() or len(path) > 1 or isinstance(value, dict) or _is_same(composed, value):
            leaves = [leaf for leaf, _ in _leaves(value, path)]
            yield from [path] if override.is_delete() else leaves
        elif isinstance(composed, dict) and composed.get("_target_") != _get(saved, (*path, "_target_")):
            yield path  # a choice of a group that the run did not make


def _copy(source: Nest, goal: Nest, path: KeyPath) -> None:
    """Makes the goal hold at a path what the source does, or nothing where it has nothing."""
    for depth, key in enumerate(path[:-1], 1):
        if not isinstance(goal.get(key), dict):
            path = path[:depth]
            break
        goal, source = goal[key], source.get(key, {})
    value = source.get(path[-1], _ABSENT) if isinstance(source, dict) else _ABSENT
    if value is _ABSENT:
        goal.pop(path[-1], None)
    else:
        goal[path[-1]] = copy.deepcopy(value)


def _get(nest: Any, path: KeyPath) -> Any:
    for key in path:
        nest = nest.get(key, _ABSENT) if isinstance(nest, dict) else _ABSENT
    return nest


def _leaves(node: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yields the paths and values of all that is no mapping with keys."""
    if not isinstance(node, Mapping):
        yield path, node
    for key, child in node.items() if isinstance(node, Mapping) else ():
        yield from _leaves(child, (*path, key))


def describe(saved: Nest, wanted: Nest) -> list[str]:
    """Returns what differs, a line a key: `optimizer.lr: 0.003 -> 0.001`."""
    return [one_line(f"{_join(path)}: {_show(old)} -> {_show(new)}") for path, old, new in _differences(saved, wanted)]


def check_same_run(saved: Nest, wanted: Nest, source: Path | None = None, new_run: str = "") -> None:
    """Checks that two resolved configs are of the same run: more steps, another rate, more workers are.

    Args:
        source: the run or checkpoint that was to go on, for the remedy.
        new_run: the command that starts a new run from it, for the remedy.
    Raises:
        ConfigError: naming every key that makes it another run, its values, and the remedy.
    """
    fixed = [(path, old, new) for path, old, new in _differences(saved, wanted) if _is_fixed(path)]
    if fixed:
        lines = [one_line(f"  {_join(path)}: {_show(old)} -> {_show(new)}") for path, old, new in fixed]
        head = "resume: these changes would make it another run than the one that was begun"
        short = f"{_show_init_from(source)} (without resume=) with the same overrides"
        begin = f"start a new run from its weights: {new_run or short}"
        remedy = f"Leave them as they were, accept that with resume_allow_changes=true, or {begin}"
        raise ConfigError("\n".join([head, *lines, remedy]))


def _show_init_from(source: Path | None) -> str:
    """Returns the override that starts from a run's weights, quoted for Hydra and the shell where it must be."""
    text = "<run>" if source is None else str(source)
    if source is None or re.fullmatch(r"[\w./:+-]+", text, re.ASCII):
        return f"init_from={text}"
    escaped = text.replace("'", "\\'")
    return shlex.quote(f"init_from='{escaped}'")


def _join(path: KeyPath) -> str:
    return ".".join(map(str, path))


def _is_fixed(path: KeyPath) -> bool:
    if path[0] == "engines" and path[2:3] and path[2] in _BY_KEY:  # an engine's own: by the same rule
        path = path[2:]
    return any(path[: len(fixed)] == fixed for fixed in _IDENTITY_KEYS)


def _differences(before: Nest, after: Nest) -> Iterator[tuple[KeyPath, Any, Any]]:
    old, new = dict(_leaves(before)), dict(_leaves(after))
    for path in dict.fromkeys([*old, *new]):
        values = old.get(path, _ABSENT), new.get(path, _ABSENT)
        if not _is_same(*values):
            yield path, *values


def _is_same(one: Any, other: Any) -> bool:
    return one is other or repr(one) == repr(other)  # by type too: 1 is no True; and nan is nan


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    return value if isinstance(value, str) else json.dumps(value, default=str)
