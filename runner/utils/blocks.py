"""The blocks of a module, and globs over the names of modules. Must not import a model library."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterator, Sequence

from torch import nn


def find_blocks(module: nn.Module, globs: Sequence[str] | None = None) -> dict[str, dict[str, nn.Module]]:
    """Returns a module's blocks by name, for each glob; none stands in another.

    Args:
        globs: over names of modules, segment by segment: layers.* matches layers.1 and not layers.1.norm. None is one
            glob, "": every outermost ModuleList or Sequential of two or more children of one class gives its children.
    Raises:
        ValueError: a glob that matches no module, with the blocks there would be without one.
    """
    if globs is None:
        return {"": dict(_listed_blocks(module, ""))}
    found: dict[str, dict[str, nn.Module]] = {}
    taken: list[str] = []
    for glob in globs:
        matched = {name: each for name, each in module.named_modules() if name and matches(name, glob)}
        if not matched:
            there_are = ", ".join(name for name, _ in _listed_blocks(module, "")) or "none that stand in a list"
            raise ValueError(f"blocks: {glob!r} matches no module; blocks are: {there_are}")
        found[glob] = {name: each for name, each in matched.items() if not _is_within(name, taken)}
        taken += found[glob]
    return found


def _listed_blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1
    if is_list and len({type(child) for _, child in children}) == 1:
        yield from ((prefix + name, child) for name, child in children)
        return
    for name, child in children:
        yield from _listed_blocks(child, f"{prefix}{name}.")


def matches(name: str, glob: str) -> bool:
    """Says whether a glob fits a module's name, segment by segment: layers.? fits layers.1 and not layers.10."""
    names, globs = name.split("."), glob.split(".")
    return len(names) == len(globs) and all(map(fnmatch.fnmatchcase, names, globs))


def _is_within(name: str, outer: Sequence[str]) -> bool:
    return any(name == each or name.startswith(each + ".") for each in outer)
