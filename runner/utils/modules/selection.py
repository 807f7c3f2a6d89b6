"""Which modules of a model a change may reach: globs and their mistakes, children that are read and never called.

Must not import a model library.
"""

from __future__ import annotations

import difflib
import fnmatch
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import Any

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


_READ = {"MultiheadAttention": "out_proj", "LinearCrossEntropyLoss": "linear"}  # of torch.nn: a class, and its child
_FUSED = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def split_idle(idle: Iterable[str], called: Iterable[str]) -> tuple[list[str], list[str]]:
    """Returns names of modules that were not called: those of which none alike was, and the others.

    Alike are names that differ in numbers alone: a layer that is skipped at random has others beside it that were not.
    """
    alike = {_unnumbered(name) for name in called}
    names = list(idle)
    return [name for name in names if _unnumbered(name) not in alike], [n for n in names if _unnumbered(n) in alike]


def _unnumbered(name: str) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in name.split("."))


def name_modules(module: nn.Module) -> dict[int, tuple[nn.Module, list[str]]]:
    """Returns each module, by its id, with every name that it has."""
    named: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, each in module.named_modules(remove_duplicate=False):
        named.setdefault(id(each), (each, []))[1].append(name)
    return named


def fits(names: Iterable[str], globs: Sequence[str]) -> bool:
    """Says whether a glob fits one of the names that a module has."""
    return any(matches(name, glob) for name in names for glob in globs)


def check_globs(where: str, module: nn.Module, globs: Sequence[str]) -> None:
    """Checks that every glob fits a module.

    Raises:
        ValueError: one string for a list; a glob that fits no module, with the names nearest to it.
    """
    if isinstance(globs, str):
        raise ValueError(f"{where}: expected a list of globs, found the string {globs!r}; write [{globs!r}]")
    names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    for glob in globs:
        if not fits(names, [glob]):
            raise ValueError(f"{where}: {glob!r} matches no module; there are: {list_near(glob, names)}")


def list_near(wanted: str, choices: Iterable[str], limit: int = 8) -> str:
    """Lists a few choices, the nearest ones first."""
    distinct = list(dict.fromkeys(each for each in choices if each))
    listed = sorted(distinct, key=lambda each: -difflib.SequenceMatcher(None, wanted, each).ratio())[:limit]
    more = f" and {len(distinct) - len(listed)} more" if len(distinct) > len(listed) else ""
    return (", ".join(listed) or "none") + more


def find_uncalled(module: nn.Module) -> dict[int, str]:
    """Returns why a change to them would be without effect, by the id of modules that torch reads and never calls."""
    found = {}
    for parent in module.modules():
        for kind, name in _READ.items():
            reader = getattr(nn, kind, None)
            if reader and isinstance(parent, reader) and type(parent).forward is reader.forward:
                found[id(parent._modules[name])] = f"{kind} reads its weight and does not call it"
    return found


def call_within_fused(module: nn.Module, changed: Collection[int]) -> list[tuple[nn.Module, str, Any]]:
    """Has torch's encoder layers call the modules changed within them; returns the attributes set, as they were.

    In eval mode an encoder layer is one fused operation that reads the weights of its children: what a changed child
    does would be left out of evaluation without a word.
    """
    before: list[tuple[nn.Module, str, Any]] = []
    for each in module.modules():
        for kind, name, off in _FUSED:
            if isinstance(each, kind) and any(id(part) in changed for part in each.modules() if part is not each):
                before.append((each, name, getattr(each, name)))
                setattr(each, name, off)
    return before
