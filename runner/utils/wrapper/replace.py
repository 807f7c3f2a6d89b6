"""Replaces modules of a model by rules; the new modules keep the weights."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from runner.utils.modules.selection import (
    disable_fast_path,
    select_modules,
)
from runner.utils.utils import list_nearest
from runner.utils.wrapper.transfer import transfer_back, transfer_state

_REMEDY = "give it in arguments, or make is a converter"


@dataclass(frozen=True)
class Rule:
    """A class of modules and its replacement. Globs are over names of modules, segment by segment.

    A module with several names is one: include must match one of them, exclude none.
    """

    match: type[nn.Module]
    make: Callable[..., nn.Module]  # a class, or a converter: called with the old module, returns the new one
    include: Sequence[str] | None = None  # None: everywhere
    exclude: Sequence[str] = ()
    subclasses: bool = False  # also replace subclasses, which may be used in another way than their parent
    arguments: Mapping[str, Any] = field(default_factory=dict)  # further keywords for make

    def __post_init__(self) -> None:
        if not (isinstance(self.match, type) and issubclass(self.match, nn.Module)):
            raise ValueError(f"Rule.match: expected a class of modules, found {self.match!r}")
        if not callable(self.make) or (isinstance(self.make, type) and not issubclass(self.make, nn.Module)):
            raise ValueError(f"Rule.make: expected a class of modules or a converter, found {self.make!r}")


@dataclass
class Replaced:
    """The replaced modules, and undo."""

    replaced: list[dict[str, str]] = field(default_factory=list)  # for each rule: "Old -> New" by name
    skipped: list[dict[str, str]] = field(default_factory=list)  # for each rule: why not, by name
    left_out: list[str] = field(default_factory=list)  # tensors of old modules that a converter did not use
    _new_ids: set[int] = field(default_factory=set, repr=False)  # of the new modules, which `_undo` keeps alive
    _undo: contextlib.ExitStack = field(default_factory=contextlib.ExitStack, repr=False)

    def undo(self) -> None:
        """Puts every old module back, with its present tensors and in the mode of its replacement."""
        self._undo.close()


def replace(module: nn.Module, rules: Sequence[Rule]) -> Replaced:
    """Replaces modules within a module, rule by rule; each rule sees the result of those before.

    A new module has the parameters and buffers of the old one, its mode and its hooks. A class is called with the
    attributes of the old module that have the names of its arguments, on the meta device: it takes no memory and no
    random number. A class with a method from_module is a converter. The result of a converter keeps tensors without a
    match in the old module by name, kind, shape and class. Of two matching modules, one inside the other, the outer one
    is replaced. On an error nothing is.

    Raises:
        ValueError: a glob or a rule that matches nothing; the module itself, which has no parent; an argument that the
            old module lacks; tensors that are not in both; hooks on a child that is gone; an old module that an
            attribute would still refer to.
    """
    report = Replaced()
    try:
        for number, rule in enumerate(rules):
            made_by = getattr(rule.make, "__name__", repr(rule.make))
            _apply(module, rule, report, f"replace: rule {number} ({rule.match.__name__} -> {made_by})")
    except BaseException:
        report.undo()
        raise
    disable_fast_path(module, report._new_ids, report._undo)
    return report


def _apply(module: nn.Module, rule: Rule, report: Replaced, where: str) -> None:
    found, skipped = _find(module, rule, where)
    held = _find_held(module)
    replaced: dict[str, str] = {}
    for old, names in found:
        place = f"{where}: {names[0]}"
        if id(old) in held:
            raise ValueError(f"{place}: the attribute {held[id(old)]} would still hold the old module; exclude it")
        new, is_built = _make(old, rule, place)
        keys, left_out = transfer_state(old, new, place, is_strict=is_built)
        report._undo.callback(transfer_back, old, new, keys)
        for name in names:
            report._undo.callback(module.set_submodule, name, old)
            module.set_submodule(name, new)
        report._new_ids.add(id(new))
        replaced |= dict.fromkeys(names, f"{type(old).__name__} -> {type(new).__name__}")
        report.left_out += [f"{names[0]}.{each}" for each in left_out]
    report.replaced.append(replaced)
    report.skipped.append(skipped)


def _find(module: nn.Module, rule: Rule, where: str) -> tuple[list[tuple[nn.Module, list[str]]], dict[str, str]]:
    """Returns the modules to replace with their names, and the reasons why other matches are not."""
    found: list[tuple[nn.Module, list[str]]] = []
    skipped: dict[str, str] = {}
    outer: set[str] = set()
    selected = select_modules(where, module, rule.match, rule.include, rule.exclude, subclasses=rule.subclasses)
    for part, names, reason in selected:
        parents = (name[:end] for name in names for end, letter in enumerate(name) if letter == ".")
        within = next((parent for parent in parents if parent in outer), None)
        if within is not None:
            reason = reason or f"it stands within {within}, which is replaced"
        if reason:
            skipped |= dict.fromkeys(names, reason)
        elif part is module:
            raise ValueError(f"{where}: the root module can't be replaced, as nothing here holds it; put '' in exclude")
        else:
            found.append((part, names))
            outer.update(names)
    if not found:
        raise ValueError(f"{where}: fits no module; {_describe_candidates(module, rule, skipped)}")
    return found, skipped


def _describe_candidates(module: nn.Module, rule: Rule, skipped: Mapping[str, str]) -> str:
    if skipped:
        return "skipped: " + list_nearest("", (f"{name}, as {why}" for name, why in skipped.items()))
    if own := [name for name, each in module.named_modules() if isinstance(each, rule.match)]:
        return f"modules of that class are: {list_nearest((rule.include or [''])[0], own)}"
    return f"classes are: {list_nearest(rule.match.__name__, (type(each).__name__ for each in module.modules()))}"


def _find_held(module: nn.Module) -> dict[int, str]:
    """Returns plain attributes that refer to a module, by its id: a call through one would run the old module."""
    held = {}
    for name, parent in module.named_modules():
        for attribute, value in vars(parent).items():
            if attribute == "_modules":
                continue
            values = (
                value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else [value]
            )
            holder = f"{name}.{attribute}" if name else attribute
            held.update({id(each): holder for each in values if isinstance(each, nn.Module)})
    return held


def _make(old: nn.Module, rule: Rule, where: str) -> tuple[nn.Module, bool]:
    """Returns the new module, and True if it is built of a class, without tensors yet."""
    if isinstance(rule.make, type) and not hasattr(rule.make, "from_module"):
        return _build(rule.make, old, rule.arguments, where), True
    try:
        new = getattr(rule.make, "from_module", rule.make)(old, **rule.arguments)
    except Exception as error:
        raise ValueError(f"{where}: the converter failed: {type(error).__name__}: {error}") from error
    if not isinstance(new, nn.Module):
        raise ValueError(f"{where}: the converter returned {new!r}, expected a module")
    if new is old:
        raise ValueError(
            f"{where}: the converter returned the old module, which undo could not put back; return another"
        )
    return new, False


def _build(kind: type[nn.Module], old: nn.Module, given: Mapping[str, Any], where: str) -> nn.Module:
    arguments = dict(given)
    missing = []
    for name, parameter in _read_signature(kind).items():
        value = given[name] if name in given else _read_argument(old, parameter)
        if value is not parameter.empty:
            arguments[name] = value
        elif parameter.default is parameter.empty:
            missing.append(name)
    if missing:
        raise ValueError(f"{where}: a {type(old).__name__} does not tell the argument {', '.join(missing)}; {_REMEDY}")
    try:
        with torch.random.fork_rng(devices=[]), torch.device("meta"):
            return kind(**arguments)
    except Exception as error:
        raise ValueError(f"{where}: not built of {arguments}: {type(error).__name__}: {error}; {_REMEDY}") from error


def _read_signature(kind: type[nn.Module]) -> dict[str, inspect.Parameter]:
    """Returns the parameters of a class, with those that it passes on to its parents as further keywords."""
    found: dict[str, inspect.Parameter] = {}
    for each in kind.__mro__:
        if each is nn.Module or "__init__" not in vars(each):
            continue
        parameters = list(inspect.signature(vars(each)["__init__"]).parameters.values())[1:]
        named = (p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))
        found = {parameter.name: parameter for parameter in named} | found
        if not any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters):
            break
    return found


def _read_argument(old: nn.Module, parameter: inspect.Parameter) -> Any:
    """Returns an argument read from an attribute of the old module, or empty."""
    name = parameter.name
    if name in ("device", "dtype") or hasattr(nn.Module, name):  # weights are transferred; a method is no setting
        return parameter.empty
    if name in old._parameters:
        is_flag = name == "bias" or isinstance(parameter.default, bool)
        return old._parameters[name] is not None if is_flag else parameter.empty
    return getattr(old, name, parameter.empty)
