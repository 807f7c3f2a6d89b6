"""What a `_target_` names: found by its dotted path, and held against the arguments it is given.

All mistakes are told at once, before anything is built; nothing is instantiated here.
"""

from __future__ import annotations

import importlib
import inspect
import random
import re
import traceback
from collections.abc import Iterator
from types import ModuleType
from typing import Any

from runner.mistakes import ConfigError, nearest
from runner.utils.utils import describe

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
        raise ConfigError("\n".join(mistakes))


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
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        yield f"{key}: expected a mapping with _target_, the dotted path of a class or function; found {node!r}"
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
        for name in sorted(given.difference(taken)):
            yield f"{key}.{name}: {node['_target_']} takes no such argument; {nearest(name, taken)}"
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
        ImportError: saying which part is not there.
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise ImportError(f"importing {name} failed: {error}{_extra(error.name)}") from error
            continue
        except ImportError:
            raise
        except (Exception, SystemExit) as error:
            line = traceback.extract_tb(error.__traceback__)[-1]
            raise ImportError(f"importing {name} failed at {line.filename}:{line.lineno}: {describe(error)}") from error
        return found, parts[length:]
    raise ImportError(
        f"there is no module {parts[0]!r}{_extra(parts[0])}; check the spelling, or start where Python finds it"
    )


def _descend(found: Any, name: str, attributes: list[str]) -> Any:
    for attribute in attributes:
        if not hasattr(found, attribute):
            public = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            raise ImportError(f"{name} has no {attribute!r}; {nearest(attribute, public)}")
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
