"""What a `_target_` names: found by its dotted path, and held against the arguments it is given.

All mistakes are told at once, before anything is built; nothing is instantiated here.
"""

from __future__ import annotations

import importlib
import inspect
import os
import random
import re
import sys
import sysconfig
import traceback
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

from runner.config.errors import ConfigError, describe_several, shown, suggest
from runner.utils.utils import describe, one_line

# How many arguments each role's target is given by position, beside its YAML.
_ROLES = {
    "model": 0,
    "data.train": 0,
    "data.eval": 0,
    "data.collate": 0,
    "sampler": 1,
    "optimizer": 1,
    "scheduler": 1,
    "feeder": 0,
    "report": 0,
    "distributed.strategy": 0,
}
_CALLED_LATER = ("data.collate", "feeder", "report")  # a plain function here is what is called, not what makes it
_SCHEDULER = re.compile(r"(^|\.)scheduler(\.schedulers\.\d+)*$")
_EXTRAS = {
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigy",
    "bitsandbytes": "adamw8bit",
    "sklearn": "digits",
    "matplotlib": "digits",
    "torchao": "torchao",
    "liger_kernel": "liger",
    "triton": "liger",
    "soundfile": "audio",
}


def check_targets(plain: dict[str, Any]) -> None:
    """Checks that each `_target_` of a resolved config can be imported and takes the arguments it is given.

    Raises:
        ConfigError: with every mistake, a line each.
    """
    mistakes = [m for key, node, num_given in _targets(plain) for m in _mistakes(key, node, num_given)]
    mistakes += [f"{key}={path}: {error}" for key, path in rule_paths(plain) if (error := _find_import_error(path))]
    if mistakes:
        raise ConfigError("\n".join(map(one_line, mistakes)))


def seed_imports(seed: int) -> None:
    """Seeds the generators of Python and NumPy, from which a module may draw while it is imported."""
    import numpy as np  # here: `--help` and `--cfg` need none, and it takes 0.1 s

    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def _targets(plain: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Yields key, node and number of positional arguments of all that will be instantiated."""
    roles = [(role, role, plain) for role in _ROLES]
    for name, engine in plain["engines"].items():
        roles += [(f"engines.{name}.{role}", role, engine) for role in _ROLES if engine.get(role) is not None]
    for key, role, place in roles:
        node: Any = place
        for part in role.split("."):
            node = None if node is None else node[part]  # a role that is left out by who evaluates
        if node is not None:
            yield key, node, _ROLES[role]
            yield from ((k, n, 0) for k, n in _nested_targets(node, key))


def _nested_targets(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        if isinstance(child, dict) and "_target_" in child:
            yield f"{key}.{name}", child
        yield from _nested_targets(child, f"{key}.{name}")


def _mistakes(key: str, node: Any, num_given: int) -> Iterator[str]:
    if several := _several_datasets(key, node):
        yield several
        return
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        found = shown(repr(node))
        yield f"{key}: expected a mapping with _target_, the dotted path of a class or function; found {found}"
        return
    try:
        target = locate(node["_target_"])
    except ImportError as error:
        yield f"{key}._target_={node['_target_']}: {error}"
        return
    if key == "sampler" and inspect.isclass(target) and (fault := find_sampler_fault(target)):
        yield f"{key}._target_={node['_target_']}: {fault}"
        return
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a built-in without a signature: instantiating it will tell
        return
    for name in node:
        if not isinstance(name, str):
            yield f"{key}.{name}: expected an argument's name, found {name!r}; put such keys into a mapping of its own"
    for name, value in ((name, node[name]) for name in ("_partial_", "_recursive_") if name in node):
        if not isinstance(value, bool):
            yield f"{key}.{name}={value}: expected true or false"
    if node.get("_convert_", "all") == "none":
        yield f"{key}._convert_=none: a target is given plain values, never a DictConfig; leave _convert_ out"
    yield from find_mistyped(key, node, target)
    names = [name for name in node if isinstance(name, str)]
    given = {name for name in names if not (name.startswith("_") and name.endswith("_"))}
    taken = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if _SCHEDULER.search(key) and "optimizer" in taken:
        taken.remove("optimizer")  # the runner gives it, to each of several schedulers, too
    else:
        taken = taken[num_given:]
    if _SCHEDULER.search(key) and "metric" not in taken:
        given.discard("metric")  # the runner's own
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unknown = sorted(given.difference(taken))
        if several := _several_datasets(key, node, unknown):
            yield several
            return
        for name in unknown:
            yield f"{key}.{name}: {node['_target_']} takes no such argument; {suggest(name, taken)}"
    if node.get("_partial_") or node.get("_args_") or is_called_later(key, target):
        return
    for name in taken:
        if parameters[name].default is inspect.Parameter.empty and name not in given:
            yield f"{key}.{name}: {node['_target_']} needs it; set +{key}.{name}=..."


def find_sampler_fault(sampler: Any) -> str | None:
    """Returns why a sampler, or a class of samplers, can't be used, and the remedy; None if nothing is missing."""
    kinds = sampler.__mro__ if inspect.isclass(sampler) else type(sampler).__mro__
    name = next((each.__name__ for each in kinds if each.__module__.startswith("torch.utils.data")), "Sampler")
    missing = [method for method in _SAMPLER_METHODS if not hasattr(sampler, method)]
    if inspect.isclass(sampler) and any("__getattr__" in vars(each) for each in kinds):
        missing = []
    if name == "DistributedSampler":
        return f"expected the order of all ranks, found one that takes a rank's share; {_SAMPLERS[name]}"
    if not missing:
        return None
    methods = ", ".join(f"{method}()" for method in missing)
    return f"expected a sampler that resumes from its position, found one without {methods}; {_SAMPLERS[name]}"


_SAMPLER_METHODS = ("__iter__", "state_dict", "load_state_dict")
_OWN_SAMPLERS = "runner.utils.sampler."
_SAMPLERS = {
    "Sampler": "add them (they save and set the position within an epoch), or choose sampler=random, ordered, pool "
    "or batched_ordered",
    "RandomSampler": f"choose sampler=random ({_OWN_SAMPLERS}RandomSampler, which takes replacement too)",
    "SequentialSampler": f"choose sampler=ordered ({_OWN_SAMPLERS}OrderedSampler)",
    "DistributedSampler": f"choose sampler=random ({_OWN_SAMPLERS}RandomSampler): each rank takes its slice of a batch",
    "BatchSampler": f"choose sampler=random with data.batch_size, or sampler=batched_ordered ({_OWN_SAMPLERS}"
    "BatchedOrderedSampler) for batches under a budget",
    "SubsetRandomSampler": f"choose sampler=random ({_OWN_SAMPLERS}RandomSampler) and a torch.utils.data.Subset as "
    "data.train",
    "WeightedRandomSampler": "write a sampler of your own that draws by weight and has these methods",
}


_ONE_DATASET = ("data.train", "data.eval")


def _several_datasets(key: str, node: Any, names: Iterable[Any] | None = None) -> str | None:
    """Returns the mistake of a key of one dataset that holds several, by name or as a list; None for any other node.

    Args:
        names: those that may be datasets; None stands for all, where the node has no `_target_` itself.
    """
    if not key.endswith(_ONE_DATASET) or not isinstance(node, (dict, list)):
        return None
    children = dict(enumerate(node)) if isinstance(node, list) else node
    if names is None:
        names = [] if "_target_" in children else list(children)
    found = [str(name) for name in names if isinstance(children[name], dict) and "_target_" in children[name]]
    return describe_several(key, ", ".join(found)) if found else None


def find_mistyped(key: str, node: Mapping[str, Any], target: Any) -> Iterator[str]:
    """Yields the mistakes of texts, lists and mappings for arguments that are annotated as numbers."""
    given = {name: value for name, value in node.items() if _may_be_mistyped(name, value)}
    hints = _read_hints(target) if given else {}
    for name, value in given.items():
        kinds = _kinds_of(hints[name]) if name in hints else None
        if kinds is None or _fits(value, kinds, _default_of(target, name)):
            continue
        found = next((f", found {name}" for kind, name in _FOUND.items() if isinstance(value, kind)), "")
        remedy = "; ${oc.decode:...} makes it a number" if is_number_text(value) else ""
        text = "null" if value is None else shown(str(value))
        yield f"{key}.{name}={text}: expected {_describe_kinds(kinds)}{found}{remedy}"


_FOUND: dict[type, str] = {dict: "a mapping", list: "a list", str: "a text"}


def _default_of(target: Any, name: str) -> Any:
    parameter = inspect.signature(target).parameters.get(name)
    return None if parameter is None else parameter.default


def find_untyped(node: Mapping[str, Any]) -> str:
    """Returns a hint at texts that were given for arguments whose default is a number."""
    try:
        parameters = inspect.signature(locate(node["_target_"])).parameters
    except (ImportError, TypeError, ValueError):
        return ""
    hints = []
    for name, value in node.items():
        default = parameters[name].default if name in parameters else None
        if isinstance(value, str) and type(default) in (int, float) and not is_number_text(value):
            hints.append(f"; {name}={shown(value)}: expected a number, as its default {default!r}, found a text")
    return "".join(hints)


def is_number_text(value: Any) -> bool:
    """Says whether a value is a text that reads as a number."""
    return isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", value, re.IGNORECASE) is not None


def _may_be_mistyped(name: Any, value: Any) -> bool:
    if not isinstance(name, str) or (name.startswith("_") and name.endswith("_")):
        return False
    return value is None or isinstance(value, (str, list)) or (isinstance(value, dict) and "_target_" not in value)


def _read_hints(target: Any) -> dict[str, Any]:
    """Returns the annotations of a target's arguments; none where they can't be evaluated."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # names that are imported for a type checker alone
        return {}


_SCALARS = (bool, int, float, complex, type(None))


def _kinds_of(hint: Any) -> list[Any] | None:
    """Returns the alternatives of an annotation if numbers and lists are all, else None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        found = [_kinds_of(each) for each in typing.get_args(hint)]
        return None if None in found else [kind for kinds in found for kind in kinds or ()]
    is_known = hint in _SCALARS or _is_list(hint)
    is_tensor = getattr(hint, "__module__", "") == "torch" and getattr(hint, "__name__", "") == "Tensor"
    return [hint] if is_known or is_tensor else None


def _fits(value: Any, kinds: list[Any], default: Any) -> bool:
    if value is None:  # an argument whose default is None takes it, whatever its annotation says
        return default is None or type(None) in kinds
    lists = [kind for kind in kinds if _is_list(kind)]
    if not isinstance(value, list) or not lists:
        return False
    is_of_numbers = all(_is_of_numbers(kind) for kind in lists)
    return not is_of_numbers or not any(isinstance(each, str) for each in value)


def _is_list(kind: Any) -> bool:
    return (typing.get_origin(kind) or kind) in (list, tuple)


def _is_of_numbers(kind: Any) -> bool:
    """Says whether the annotation of a list has numbers as its elements."""
    elements = [_kinds_of(each) for each in typing.get_args(kind) if each is not ...]
    return bool(elements) and all(kinds is not None and not any(map(_is_list, kinds)) for kinds in elements)


def _describe_kinds(kinds: list[Any]) -> str:
    described = []
    if bool in kinds:
        described.append("true or false")
    if float in kinds or complex in kinds:
        described.append("a number")
    elif int in kinds:
        described.append("a whole number")
    if lists := [kind for kind in kinds if _is_list(kind)]:
        described.append("a list of numbers" if all(map(_is_of_numbers, lists)) else "a list")
    if type(None) in kinds:
        described.append("null")
    return " or ".join(described) or "a tensor"


def find_parameters(path: str) -> list[str]:
    """Returns the names of the parameters of what a dotted path names."""
    try:
        return list(inspect.signature(locate(path)).parameters)
    except (TypeError, ValueError):  # a built-in without a signature
        return []


def rule_paths(value: Any, key: str = "") -> Iterator[tuple[str, str]]:
    """Yields keys and dotted paths of every rule {match, with} of a nest: what it names is imported and called, too."""
    if isinstance(value, dict) and {"match", "with"} <= value.keys():
        yield from ((f"{key}.{name}", str(value[name])) for name in ("match", "with"))
    children = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from rule_paths(child, f"{key}.{name}".lstrip("."))


def _find_import_error(path: str) -> str | None:
    try:
        locate(path)
    except ImportError as error:
        return str(error)
    return None


def locate(path: str) -> Any:
    """Returns the object of a dotted path.

    Raises:
        ImportError: saying which part is not there, and what is.
    """
    found, attributes = find_module(path)
    return _descend(found, found.__name__, attributes)


def find_module(path: str) -> tuple[ModuleType, list[str]]:
    """Returns the innermost module of a dotted path, imported, and the attributes that lead on from it.

    Raises:
        ImportError: saying which part is not there, or what an import raised and where.
    """
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ImportError(f"expected a dotted path such as own.models.Net, found {shown(path)!r}")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            found = importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise ImportError(_describe_import(name, error) + _extra(error.name)) from error
            continue
        except BaseException as error:  # SystemExit, too
            raise ImportError(_describe_import(name, error)) from error
        return found, parts[length:]
    raise ImportError(
        f"there is no module {parts[0]!r}{_extra(parts[0])}; check the spelling, or start where Python finds it"
    )


def _describe_import(name: str, error: BaseException) -> str:
    """Returns what importing a module raised, and the last line of the user's own files that led there."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    files = [frame for frame in frames if not frame[0].startswith("<frozen")]
    parts = name.split(".")
    places = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    name = next((place for place in places if place not in sys.modules), name)
    own = [frame for frame in files if not frame[0].startswith(_LIBRARIES)]
    file, line = (own or files or frames)[-1]
    relative = os.path.relpath(file) if os.path.isabs(file) else file
    where = f"{file if relative.startswith('..') else relative}:{line}"
    told = f"SyntaxError: {error.msg}" if isinstance(error, SyntaxError) and error.filename == file else describe(error)
    return f"importing {name} failed at {where}: {shown(told)}"


# The standard library and installed packages, this one too: a user's files lie elsewhere.
_LIBRARIES = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).resolve().parents[1]) + os.sep}
)


def _descend(found: Any, name: str, attributes: list[str]) -> Any:
    for attribute in attributes:
        try:
            has_it = hasattr(found, attribute)
        except Exception as error:  # of a module that imports its parts when they are asked for
            raise ImportError(_describe_import(f"{name}.{attribute}", error)) from error
        if not has_it:
            public = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            raise ImportError(f"{name} has no {attribute!r}; {suggest(attribute, public)}")
        found, name = getattr(found, attribute), f"{name}.{attribute}"
    if not callable(found):
        raise ImportError(f"{name} is a {type(found).__name__}; expected a class or function")
    return found


def _extra(module: str | None) -> str:
    extra = _EXTRAS.get((module or "").partition(".")[0])
    return f'; pip install "exact-runner[{extra}]"' if extra else ""


def is_called_later(key: str, target: Any) -> bool:
    """Says whether a target is itself what is called, a plain function, and no maker of it."""
    return key.endswith(_CALLED_LATER) and inspect.isroutine(target)
