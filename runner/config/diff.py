"""Differences between the configs of a run: chosen nodes put in, changes described, changes of its identity refused.

Configs are nests of plain values, unresolved or not; a path is a tuple of keys.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from runner.config.errors import ConfigError
from runner.utils.utils import one_line

KeyPath = tuple[Any, ...]
Nest = dict[str, Any]

_ABSENT = object()
_IDENTITY_KEYS: list[KeyPath] = [  # what makes a run the one it is
    ("seed",), ("model",), ("engines",), ("updates",), ("feeder",), ("loss",), ("sampler",), ("pattern",),
    ("optimizer", "_target_"),
    ("data", "target"), ("data", "input"),
    ("data", "train"), ("data", "mix"), ("data", "batch_size"), ("data", "collate"), ("data", "seed_samples"),
    ("trainer", "accumulate"), ("trainer", "precision"),
    ("optimizations",), ("ema",),
]  # fmt: skip
_FREE_KEYS: list[KeyPath] = [  # optimizations that change memory, time or exports, and no number of training
    ("optimizations", "unsloth"), ("optimizations", "checkpointing"), ("optimizations", "device_map"),
    ("optimizations", "lora", "export"),
]  # fmt: skip
_BY_KEY = ("optimizer", "scheduler", "optimizations", "init_from", "init", "metrics")


def replace_nodes(saved: Nest, defaults: Nest, composed: Nest, paths: Sequence[KeyPath]) -> Nest:
    """Returns a run's config with the nodes of newly chosen groups.

    A choice without a node of its own, such as an experiment, sets the keys in which it differs from the defaults.

    Args:
        saved: the run's config.
        defaults: composed without the choices.
        composed: composed with them.
        paths: of the groups' nodes.
    """
    wanted = copy.deepcopy(saved)
    if any(get_value(composed, path, _ABSENT) is _ABSENT for path in paths):
        paths = [*_changed(defaults, composed, ()), *paths]
    for path in paths:
        _copy(composed, wanted, path)
    return wanted


def _changed(before: Any, after: Any, path: KeyPath) -> Iterator[KeyPath]:
    """Yields the paths that differ; a node with another target differs as a whole, so that no argument is kept."""
    both = isinstance(before, dict) and isinstance(after, dict)
    if both and before.get("_target_") == after.get("_target_"):
        for key in dict.fromkeys([*before, *after]):
            yield from _changed(before.get(key, _ABSENT), after.get(key, _ABSENT), (*path, key))
    elif not _is_same(before, after):
        yield path


def find_changes(before: Nest, after: Nest) -> dict[str, Any]:
    """Returns the values of the dotted keys that differ; an Ellipsis stands for a key that is gone."""
    paths = _changed(before, after, ())
    return {".".join(map(str, path)): get_value(after, path, ...) for path in paths}


def _copy(source: Any, goal: Nest, path: Sequence[Any]) -> None:
    """Copies the value at a path; removes it if the source has none."""
    key, *rest = path
    value = get_value(source, [key], _ABSENT)
    if rest and isinstance(goal.get(key), dict):
        _copy(value, goal[key], rest)
    elif value is _ABSENT:
        goal.pop(key, None)
    else:
        goal[key] = copy.deepcopy(value)


def get_value(nest: Any, path: Sequence[Any], default: Any) -> Any:
    """Returns the value at a path of keys; the default if there is none."""
    for key in path:
        nest = nest.get(key, default) if isinstance(nest, dict) else default
    return nest


def _leaves(node: Any, other: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yields the paths and values of the leaves; an empty mapping has none.

    A mapping with a target is one leaf where `other`, the node at the same path, is no mapping: it was switched on or
    off as a whole.
    """
    if not isinstance(node, Mapping) or ("_target_" in node and not isinstance(other, Mapping)):
        yield path, node
        return
    for key, child in node.items():
        yield from _leaves(child, get_value(other, [key], _ABSENT), (*path, key))


def describe_changes(saved: Nest, wanted: Nest) -> list[str]:
    """Returns the differences, a line a key or switch: `optimizer.lr: 0.003 -> 0.001`."""
    return list(_differences(saved, wanted).values())


def check_same_run(saved: Nest, wanted: Nest, new_run: str) -> None:
    """Checks that two resolved configs are of the same run: more steps, another rate and more workers are allowed.

    Args:
        new_run: the command or argument that starts a new run from the weights, for the remedy.
    Raises:
        ConfigError: naming every key that makes it another run, its values, and the remedy.
    """
    changes = [line for path, line in _differences(saved, wanted).items() if _is_fixed(path)]
    if changes:
        head = "resume: these changes would make it another run than the one that was begun"
        begin = f"start a new run from its weights: {new_run}"
        remedy = f"Leave them as they were, accept that with resume_allow_changes=true, or {begin}"
        raise ConfigError("\n".join([head, *(f"  {change}" for change in changes), remedy]))


def _is_fixed(path: KeyPath) -> bool:
    if path[0] == "engines" and path[2:3] and path[2] in _BY_KEY:  # the same rule for an engine's own
        path = path[2:]
    is_free = any(path[: len(free)] == free for free in _FREE_KEYS)
    # A whole optimizer that comes or goes has a shorter path than its fixed `_target_`.
    return not is_free and any(path[: len(fixed)] == fixed[: len(path)] for fixed in _IDENTITY_KEYS)


def _differences(before: Nest, after: Nest) -> dict[KeyPath, str]:
    """Returns a line for each path whose values differ."""
    old, new = dict(_leaves(before, after)), dict(_leaves(after, before))
    lines = {}
    for path in old | new:
        one, other = old.get(path, _ABSENT), new.get(path, _ABSENT)
        if not _is_same(one, other):
            lines[path] = one_line(f"{'.'.join(map(str, path))}: {_show(one)} -> {_show(other)}")
    return lines


def _is_same(one: Any, other: Any) -> bool:
    return repr(one) == repr(other)  # by type too: 1 is no True; and nan is nan


def _show(value: Any) -> str:
    if value is _ABSENT:
        return "(none)"
    if isinstance(value, Mapping):
        return "{" + ", ".join(f"{key}: {_show(child)}" for key, child in value.items()) + "}"
    return value if isinstance(value, str) else json.dumps(value, default=str)
