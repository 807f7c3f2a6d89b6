"""Checks each `_target_` of a config: its dotted path can be imported and it accepts its arguments.

All mistakes are reported together, before anything is instantiated.
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

from runner.config.composition.expansion import KeyPath, walk
from runner.config.diff import get_value
from runner.config.errors import ConfigError, describe_multiple_datasets, shown, shown_value, suggest
from runner.config.schema import eval_datasets
from runner.utils.utils import describe, one_line

# Number of positional arguments that the runner passes to each role's target, beside those of the YAML.
_ROLES = {
    "model": 0,
    "data.train": 0,
    "data.eval": 0,
    "data.collate": 0,
    "sampler": 1,
    "optimizer": 1,
    "scheduler": 1,
    "ema": 1,
    "feeder": 0,
    "loss": 0,
    "report": 0,
    "distributed.strategy": 0,
}
_FUNCTION_ROLES = (
    "data.collate",
    "feeder",
    "report",
    "loss",
)  # a plain function is used itself; a class is instantiated
_SCHEDULER = re.compile(r"(^|\.)scheduler(\.schedulers\.\d+)*$")
_OPTIMIZER = re.compile(r"(engines\.[^.]+\.)?optimizer")
_OPTIMIZER_KEYS = ("groups", "layer_decay")  # read by the runner, unless the optimizer has an argument of that name
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
    "wandb": "wandb",
    "mlflow": "mlflow",
    "trackio": "trackio",
}


def check_targets(plain: dict[str, Any]) -> None:
    """Checks that each `_target_` of a resolved config can be imported and accepts its arguments.

    Raises:
        ConfigError: with every mistake, a line each.
    """
    mistakes = [mistake for target in _find_targets(plain) for mistake in _find_mistakes(*target)]
    for key, path in find_rule_paths(plain):
        try:
            locate(path)
        except ImportError as error:
            mistakes.append(f"{'.'.join(map(str, key))}={path}: {error}")
    if mistakes:
        raise ConfigError("\n".join(map(one_line, mistakes)))


def seed_imports(seed: int) -> None:
    """Seeds Python's and NumPy's generators: a module may draw from them while it is imported."""
    import numpy as np  # 0.1 s, which `--help` and `--cfg` don't need

    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


def _find_targets(plain: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Yields key, node and number of positional arguments of everything that will be instantiated."""
    sections = [("", plain), *((f"engines.{name}.", engine) for name, engine in plain["engines"].items())]
    for prefix, section in sections:
        for role, num_positional in _ROLES.items():
            node = get_value(section, role.split("."), None)  # evaluate and export leave some roles out
            named = eval_datasets(node) if role == "data.eval" else {} if node is None else {"": node}
            for name, part in named.items():
                key = f"{prefix}{role}.{name}".removesuffix(".")
                yield key, part, num_positional
                yield from _find_nested_targets(part, key)
    for group in ("callbacks", "trackers"):
        for name, node in (plain.get(group) or {}).items():
            if node is not None:
                yield f"{group}.{name}", node, 0
                yield from _find_nested_targets(node, f"{group}.{name}")
    for prefix, section in sections:
        for name, node in (section.get("metrics") or {}).items():
            if node is not None:
                yield f"{prefix}metrics.{name}", node, 0
                yield from _find_nested_targets(node, f"{prefix}metrics.{name}")
    for prefix, section in sections:
        yield from _find_nested_targets(section.get("optimizations"), f"{prefix}optimizations")
    yield from _find_nested_targets(plain["data"].get("mix"), "data.mix")


def _find_nested_targets(root: Any, key: str) -> list[tuple[str, Any, int]]:
    nodes = [(path, node) for path, node in walk(root, (key,)) if isinstance(node, dict) and "_target_" in node]
    return [(".".join(map(str, path)), node, 0) for path, node in nodes if node is not root]


def _find_mistakes(key: str, node: Any, num_positional: int) -> Iterator[str]:
    if message := _find_multiple_datasets(key, node):
        yield message
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
    except (TypeError, ValueError):  # a built-in without a signature: checked when it is instantiated
        return
    for name in [name for name in node if not isinstance(name, str)]:
        yield f"{key}.{name}: expected an argument's name, found {name!r}; put such keys into a mapping of its own"
    for name in [name for name in ("_partial_", "_recursive_") if not isinstance(node.get(name, False), bool)]:
        yield f"{key}.{name}={node[name]}: expected true or false"
    if node.get("_convert_", "all") == "none":
        yield f"{key}._convert_=none: a target is given plain values, never a DictConfig; leave _convert_ out"
    yield from find_wrong_types(key, node, target)
    arguments = {name for name in node if _is_argument(name)}
    accepted = [name for name, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    if _SCHEDULER.search(key) and "optimizer" in accepted:
        accepted.remove("optimizer")  # passed by the runner, also to each of several nested schedulers
    else:
        accepted = accepted[num_positional:]
    if _SCHEDULER.search(key) and "metric" not in accepted:
        arguments.discard("metric")  # read by the runner itself
    if _OPTIMIZER.fullmatch(key):
        arguments.difference_update({*_OPTIMIZER_KEYS}.difference(accepted))
        accepted += [name for name in _OPTIMIZER_KEYS if name not in accepted]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        unknown = sorted(arguments.difference(accepted))
        if message := _find_multiple_datasets(key, node, unknown):
            yield message
            return
        for name in unknown:
            yield f"{key}.{name}: {node['_target_']} takes no such argument; {suggest(name, accepted)}"
    if node.get("_partial_") or node.get("_args_") or is_used_directly(key, target):
        return
    has_no_default = [name for name, p in parameters.items() if p.default is inspect.Parameter.empty]
    required = [name for name in accepted if name in has_no_default]
    missing = [name for name in required if name not in arguments]
    yield from (f"{key}.{name}: {node['_target_']} needs it; set +{key}.{name}=..." for name in missing)


def find_sampler_fault(sampler: Any) -> str | None:
    """Returns why a sampler, or a class of samplers, can't be used, with the remedy; None if it can."""
    bases = sampler.__mro__ if inspect.isclass(sampler) else type(sampler).__mro__
    name = next((base.__name__ for base in bases if base.__module__.startswith("torch.utils.data")), "Sampler")
    missing = [method for method in _SAMPLER_METHODS if not hasattr(sampler, method)]
    has_dynamic_methods = inspect.isclass(sampler) and any("__getattr__" in vars(base) for base in bases)
    if name == "DistributedSampler":
        return f"expected the order of all ranks, found one that takes a rank's share; {_SAMPLER_REMEDIES[name]}"
    if has_dynamic_methods or not missing:
        return None
    methods = ", ".join(f"{method}()" for method in missing)
    return f"expected a sampler that resumes from its position, found one without {methods}; {_SAMPLER_REMEDIES[name]}"


_SAMPLER_METHODS = ("__iter__", "state_dict", "load_state_dict")
_SAMPLER_PACKAGE = "runner.utils.sampler."
_SAMPLER_REMEDIES = {
    "Sampler": "add them (they save and set the position within an epoch), or choose sampler=random, ordered, pool "
    "or batched_ordered",
    "RandomSampler": f"choose sampler=random ({_SAMPLER_PACKAGE}RandomSampler, which takes replacement too)",
    "SequentialSampler": f"choose sampler=ordered ({_SAMPLER_PACKAGE}OrderedSampler)",
    "DistributedSampler": f"choose sampler=random ({_SAMPLER_PACKAGE}RandomSampler): each rank takes "
    "its slice of a batch",
    "BatchSampler": f"choose sampler=random with data.batch_size, or sampler=batched_ordered ({_SAMPLER_PACKAGE}"
    "BatchedOrderedSampler) for batches under a budget",
    "SubsetRandomSampler": f"choose sampler=random ({_SAMPLER_PACKAGE}RandomSampler) and a torch.utils.data.Subset as "
    "data.train",
    "WeightedRandomSampler": "write a sampler of your own that draws by weight and has these methods",
}


def _find_multiple_datasets(key: str, node: Any, names: Iterable[Any] | None = None) -> str | None:
    """Returns the message for several datasets where one is expected; None for any other node.

    Args:
        names: the keys of the node that may hold a dataset; None: all, unless the node has a `_target_` itself.
    """
    if not re.search(r"(^|\.)data\.(train|eval(\.[^.]+)?)$", key) or not isinstance(node, (dict, list)):
        return None
    children = dict(enumerate(node)) if isinstance(node, list) else node
    if names is None:
        names = [] if "_target_" in children else list(children)
    datasets = [str(name) for name in names if isinstance(children[name], dict) and "_target_" in children[name]]
    return describe_multiple_datasets(key, ", ".join(datasets)) if datasets else None


def find_wrong_types(key: str, node: Mapping[str, Any], target: Any) -> Iterator[str]:
    """Yields a message for each text, list or mapping passed to an argument that is annotated as a number."""
    arguments = {name: value for name, value in node.items() if _needs_type_check(name, value)}
    hints = _read_hints(target) if arguments else {}
    parameters = inspect.signature(target).parameters
    for name, value in arguments.items():
        alternatives = _alternatives_of(hints[name]) if name in hints else None
        default = parameters[name].default if name in parameters else None
        if alternatives is None or _is_accepted(value, alternatives, default):
            continue
        found = next((f", found {name}" for kind, name in _KIND_NAMES.items() if isinstance(value, kind)), "")
        remedy = "; ${oc.decode:...} makes it a number" if is_number_text(value) else ""
        text = shown_value(value)
        yield f"{key}.{name}={text}: expected {_describe_alternatives(alternatives)}{found}{remedy}"


_KIND_NAMES: dict[type, str] = {dict: "a mapping", list: "a list", str: "a text"}


def hint_at_text_numbers(node: Mapping[str, Any]) -> str:
    """Returns a hint for each text that was passed to an argument whose default is a number."""
    try:
        parameters = inspect.signature(locate(node["_target_"])).parameters
    except (ImportError, TypeError, ValueError):
        return ""
    defaults = {name: parameter.default for name, parameter in parameters.items()}
    texts = {name: value for name, value in node.items() if isinstance(value, str) and not is_number_text(value)}
    return "".join(
        f"; {name}={shown(value)}: expected a number, as its default {defaults[name]!r}, found a text"
        for name, value in texts.items()
        if type(defaults.get(name)) in (int, float)
    )


def is_number_text(value: Any) -> bool:
    """Returns whether a value is a text that can be parsed as a number."""
    return isinstance(value, str) and re.fullmatch(r"[-+]?\d+(\.\d*)?(e[-+]?\d+)?", value, re.IGNORECASE) is not None


def _needs_type_check(name: Any, value: Any) -> bool:
    is_checked = (
        value is None or isinstance(value, (str, list)) or (isinstance(value, dict) and "_target_" not in value)
    )
    return is_checked and _is_argument(name)


def _is_argument(key: Any) -> bool:
    """Returns whether a key of a node is the name of an argument, and none of Hydra's keys, such as `_target_`."""
    return isinstance(key, str) and not (key.startswith("_") and key.endswith("_"))


def _read_hints(target: Any) -> dict[str, Any]:
    """Returns the annotations of a target's arguments, or an empty dict if they can't be evaluated."""
    try:
        return typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # names that are imported for type checkers only
        return {}


def _alternatives_of(hint: Any) -> list[Any] | None:
    """Returns the alternatives of an annotation if all are numbers, lists or tensors, else None."""
    if isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union:
        members = [_alternatives_of(member) for member in typing.get_args(hint)]
        return None if None in members else [kind for kinds in members for kind in kinds or ()]
    is_known = hint in (bool, int, float, complex, type(None)) or _is_list(hint)
    is_tensor = getattr(hint, "__module__", "") == "torch" and getattr(hint, "__name__", "") == "Tensor"
    return [hint] if is_known or is_tensor else None


def _is_accepted(value: Any, kinds: list[Any], default: Any) -> bool:
    if value is None:  # a default of None accepts null, whatever the annotation says
        return default is None or type(None) in kinds
    lists = [kind for kind in kinds if _is_list(kind)]
    if not isinstance(value, list) or not lists:
        return False
    expects_numbers = all(_has_numeric_elements(kind) for kind in lists)
    return not expects_numbers or not any(isinstance(element, str) for element in value)


def _is_list(kind: Any) -> bool:
    return (typing.get_origin(kind) or kind) in (list, tuple)


def _has_numeric_elements(kind: Any) -> bool:
    """Returns whether an annotation is a list of numbers."""
    elements = [_alternatives_of(element) for element in typing.get_args(kind) if element is not ...]
    return bool(elements) and all(kinds is not None and not any(map(_is_list, kinds)) for kinds in elements)


def _describe_alternatives(kinds: list[Any]) -> str:
    lists = [kind for kind in kinds if _is_list(kind)]
    takes_any_number = float in kinds or complex in kinds
    takes_any_list = not all(map(_has_numeric_elements, lists))
    descriptions = {
        "true or false": bool in kinds,
        "a number": takes_any_number,
        "a whole number": int in kinds and not takes_any_number,
        "a list of numbers": lists and not takes_any_list,
        "a list": takes_any_list,
        "null": type(None) in kinds,
    }
    return " or ".join(text for text, applies in descriptions.items() if applies) or "a tensor"


def parameter_names(path: str) -> list[str]:
    """Returns the parameter names of the class or function at a dotted path."""
    try:
        return list(inspect.signature(locate(path)).parameters)
    except (TypeError, ValueError):  # a built-in without a signature
        return []


def split_optimizer_node(node: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Returns the node of an optimizer without the keys that the runner reads, and these keys."""
    parameters = parameter_names(node["_target_"])
    reserved = {name: node[name] for name in _OPTIMIZER_KEYS if name in node and name not in parameters}
    return {name: value for name, value in node.items() if name not in reserved}, reserved


def find_rule_paths(config: Any) -> Iterator[tuple[KeyPath, str]]:
    """Yields the keys and dotted paths of every rule `{match, with}`, which are imported and called too."""
    for place, rule in walk(config):
        if isinstance(rule, Mapping) and {"match", "with"} <= rule.keys():
            yield from (((*place, name), str(rule[name])) for name in ("match", "with"))


def locate(path: str) -> Any:
    """Returns the class or function at a dotted path.

    Raises:
        ImportError: naming the part that does not exist, and the nearest name that does.
    """
    holder: Any
    holder, attributes = find_module(path)
    name = holder.__name__
    for attribute in attributes:
        try:
            has_attribute = hasattr(holder, attribute)
        except Exception as error:  # from a module that imports its submodules on first access
            raise ImportError(_describe_import(f"{name}.{attribute}", error)) from error
        if not has_attribute:
            public = [key for key in vars(holder) if not key.startswith("_")] if hasattr(holder, "__dict__") else []
            raise ImportError(f"{name} has no {attribute!r}; {suggest(attribute, public)}")
        holder = getattr(holder, attribute)
        name = f"{name}.{attribute}"
    if not callable(holder):
        raise ImportError(f"{name} is a {type(holder).__name__}; expected a class or function")
    return holder


def find_module(path: str) -> tuple[ModuleType, list[str]]:
    """Imports the innermost module of a dotted path; returns it and the attribute names after it.

    Raises:
        ImportError: naming the module that does not exist, or the error that an import raised and its location.
    """
    parts = path.split(".")
    if not all(part.isidentifier() for part in parts):
        raise ImportError(f"expected a dotted path such as own.models.Net, found {shown(path)!r}")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            module = importlib.import_module(name)
        except KeyboardInterrupt:
            raise
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise ImportError(_describe_import(name, error) + _install_hint(error.name)) from error
            continue
        except BaseException as error:  # also SystemExit
            raise ImportError(_describe_import(name, error)) from error
        return module, parts[length:]
    raise ImportError(
        f"there is no module {parts[0]!r}{_install_hint(parts[0])}; check the spelling, or start where Python finds it"
    )


def _describe_import(name: str, error: BaseException) -> str:
    """Returns the error that importing a module raised, and the last line of a user's file in its traceback."""
    frames = [(frame.filename, frame.lineno) for frame in traceback.extract_tb(error.__traceback__)]
    if isinstance(error, SyntaxError) and error.filename:
        frames.append((error.filename, error.lineno))
    files = [frame for frame in frames if not frame[0].startswith("<frozen")]
    parts = name.split(".")
    packages = [".".join(parts[:length]) for length in range(1, len(parts) + 1)]
    name = next((package for package in packages if package not in sys.modules), name)
    user_files = [frame for frame in files if not frame[0].startswith(_LIBRARY_FOLDERS)]
    file, line = (user_files or files or frames)[-1]
    relative = os.path.relpath(file) if os.path.isabs(file) else file
    location = f"{file if relative.startswith('..') else relative}:{line}"
    reason = describe(error)
    if isinstance(error, SyntaxError) and error.filename == file:
        reason = f"SyntaxError: {error.msg}"
    return f"importing {name} failed at {location}: {shown(reason)}"


# The standard library and installed packages, including the runner: anything else is a user's file.
_LIBRARY_FOLDERS = tuple(
    {sysconfig.get_path(name) + os.sep for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    | {str(Path(__file__).resolve().parents[1]) + os.sep}
)


def _install_hint(module: str | None) -> str:
    extra = _EXTRAS.get((module or "").partition(".")[0])
    return f'; pip install "exact-runner[{extra}]"' if extra else ""


def is_used_directly(key: str, target: Any) -> bool:
    """Returns whether a target is a plain function that is used itself, instead of being called to build an object."""
    return key.endswith(_FUNCTION_ROLES) and inspect.isroutine(target)
