"""Selection of modules: blocks, globs over module names, and modules that torch reads without calling them."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Collection, Iterable, Iterator, Sequence
from typing import TypeVar

from torch import nn

from runner.utils.utils import list_nearest

_Kind = TypeVar("_Kind", bound=nn.Module)


def find_blocks(module: nn.Module, globs: Sequence[str] | None = None) -> dict[str, dict[str, nn.Module]]:
    """Returns the blocks of a module by name, for each glob; no block is inside of another.

    Args:
        globs: globs over module names, matched segment by segment: layers.* matches layers.1 but not layers.1.norm.
            None selects, under the key "", the children of every outermost ModuleList or Sequential with two or more
            children of one class.
    Raises:
        ValueError: a glob matches no module; the message lists the blocks for None.
    """
    if globs is None:
        return {"": dict(_find_listed_blocks(module, ""))}
    blocks: dict[str, dict[str, nn.Module]] = {}
    taken: list[str] = []
    for glob in globs:
        matched = {name: block for name, block in module.named_modules() if name and matches_glob(name, glob)}
        if not matched:
            listed = ", ".join(name for name, _ in _find_listed_blocks(module, "")) or "none that stand in a list"
            raise ValueError(f"blocks: {glob!r} matches no module; blocks are: {listed}")
        prefixes = tuple(f"{name}." for name in taken)
        blocks[glob] = {
            name: block for name, block in matched.items() if name not in taken and not name.startswith(prefixes)
        }
        taken += blocks[glob]
    return blocks


def _find_listed_blocks(module: nn.Module, prefix: str) -> Iterator[tuple[str, nn.Module]]:
    children = list(module.named_children())
    is_list = isinstance(module, (nn.ModuleList, nn.Sequential)) and len(children) > 1
    if is_list and len({type(child) for _, child in children}) == 1:
        yield from ((prefix + name, child) for name, child in children)
        return
    for name, child in children:
        yield from _find_listed_blocks(child, f"{prefix}{name}.")


def matches_glob(name: str, glob: str) -> bool:
    """Returns whether a glob matches a module name, segment by segment: layers.? matches layers.1, not layers.10."""
    names, globs = name.split("."), glob.split(".")
    return len(names) == len(globs) and all(map(fnmatch.fnmatchcase, names, globs))


# Classes of torch.nn, each with the child whose weight it reads without calling it.
_READ_WITHOUT_CALL = {"MultiheadAttention": "out_proj", "LinearCrossEntropyLoss": "linear"}
# Classes of torch.nn with a fast path: the attribute that disables it, and its value.
_FAST_PATHS = (
    (nn.TransformerEncoderLayer, "activation_relu_or_gelu", 0),
    (nn.TransformerEncoder, "use_nested_tensor", False),
)


def split_uncalled(uncalled: Iterable[str], called: Iterable[str]) -> tuple[list[str], list[str]]:
    """Splits the names of uncalled modules: those without a similar called module, and the others.

    Names are similar if they differ only in numbers: a layer that is skipped at random has siblings that were called.
    """
    called_forms = {_without_numbers(name) for name in called}
    has_similar = {name: _without_numbers(name) in called_forms for name in uncalled}
    with_similar = [name for name, is_similar in has_similar.items() if is_similar]
    return [name for name, is_similar in has_similar.items() if not is_similar], with_similar


def _without_numbers(name: str) -> tuple[str, ...]:
    return tuple("*" if part.isdigit() else part for part in name.split("."))


def name_modules(module: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Returns each module with all of its names."""
    named: dict[int, tuple[nn.Module, list[str]]] = {}
    for name, submodule in module.named_modules(remove_duplicate=False):
        named.setdefault(id(submodule), (submodule, []))[1].append(name)
    return list(named.values())


def select_modules(
    where: str,
    module: nn.Module,
    kind: type[_Kind],
    include: Sequence[str] | None,
    exclude: Sequence[str],
    *,
    subclasses: bool = False,
) -> list[tuple[_Kind, list[str], str | None]]:
    """Returns the modules of a class that `include` matches: each with all names and a reason to skip it, or None.

    Args:
        where: the caller, for messages.
        include: globs over module names, segment by segment; None selects every module.
        exclude: globs likewise; a module that one of them matches has a reason.
        subclasses: modules of a subclass have no reason.
    Raises:
        ValueError: `include` or `exclude` is a string, or a glob matches no module; the message lists similar names.
    """
    all_names = [name for name, _ in module.named_modules(remove_duplicate=False)]
    for globs in (include or (), exclude):
        _check_is_list(where, globs)
        for glob in globs:
            if not matches_any(all_names, [glob]):
                raise ValueError(f"{where}: {glob!r} matches no module; there are: {list_nearest(glob, all_names)}")
    uncalled = _find_uncalled(module)
    selected: list[tuple[_Kind, list[str], str | None]] = []
    for part, names in name_modules(module):
        if not isinstance(part, kind) or (include is not None and not matches_any(names, include)):
            continue
        reason = uncalled.get(id(part))
        if reason is None and type(part) is not kind and not subclasses:
            reason = f"{type(part).__name__} is a subclass of {kind.__name__}"
        exclusions = (f"{glob!r} excludes it" for glob in exclude if matches_any(names, [glob]))
        selected.append((part, names, reason or next(exclusions, None)))
    return selected


def matches_any(names: Iterable[str], globs: Sequence[str]) -> bool:
    """Returns whether one of the globs matches one of a module's names."""
    return any(matches_glob(name, glob) for name in names for glob in globs)


def match_parameters(where: str, names: Collection[str], globs: Sequence[str]) -> list[str]:
    """Returns the names of parameters that match one of the globs, which are over whole names.

    Args:
        where: the argument's name, for the message.
    Raises:
        ValueError: `globs` is a string, or a glob matches no name; the message lists similar names.
    """
    _check_is_list(where, globs)
    matched: list[str] = []
    for glob in globs:
        matched_by_glob = fnmatch.filter(names, glob)
        if not matched_by_glob:
            raise ValueError(f"{where}: {glob!r} matches no parameter; there are: {list_nearest(glob, names)}")
        matched += matched_by_glob
    return list(dict.fromkeys(matched))


def _check_is_list(where: str, globs: Sequence[str]) -> None:
    if isinstance(globs, str):
        raise ValueError(f"{where}: expected a list of globs, found the string {globs!r}; write [{globs!r}]")


def _find_uncalled(module: nn.Module) -> dict[int, str]:
    """Returns the modules whose weights torch reads without calling them: by id, the reason a change has no effect."""
    reasons = {}
    for parent in module.modules():
        for kind, name in _READ_WITHOUT_CALL.items():
            reader = getattr(nn, kind, None)
            if reader and isinstance(parent, reader) and type(parent).forward is reader.forward:
                reasons[id(parent._modules[name])] = f"{kind} reads its weight and does not call it"
    return reasons


def disable_fast_path(module: nn.Module, changed: Collection[int], undo: contextlib.ExitStack) -> None:
    """Disables the fast path of torch's encoder layers that contain a changed module.

    In eval mode an encoder layer is one fused operation that reads the weights of its children, so the forward of a
    changed child would be silently skipped.

    Args:
        changed: ids of the changed modules.
        undo: gets the callbacks that enable the fast path again.
    """
    for layer in module.modules():
        for kind, name, off in _FAST_PATHS:
            if isinstance(layer, kind) and any(id(part) in changed for part in layer.modules() if part is not layer):
                undo.callback(setattr, layer, name, getattr(layer, name))
                setattr(layer, name, off)
