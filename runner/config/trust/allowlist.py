"""Checks every `_target_` of an untrusted config against an allow-list, before anything is imported or called.

A config that came out of a file is untrusted until its user has signed it. Three checks, in this order:
`check_interpolations` (the config reads nothing of this machine), `check_paths` (dotted paths, before any import) and
`check_resolved_objects` (imported objects, before any call). They do not rely on Hydra's list of blocked targets.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.utils import get_object

from runner.config.composition.expansion import KeyPath, walk
from runner.config.composition.interpolation import OTHER_RESOLVERS, calls_other_resolvers
from runner.config.errors import ConfigError, hide_tracebacks, shown, shown_value
from runner.config.targets import find_module, find_rule_paths
from runner.utils.utils import one_line

BUILT_IN = (
    "runner.callbacks",
    "runner.examples",
    "runner.engines",
    "runner.utils.sampler",
    "runner.utils.pattern",
    "runner.utils.wrapper.built_in",
    "runner.tracking.trackers.csv",
    "runner.tracking.trackers.jsonl",
    "runner.tracking.trackers.tensorboard",
    "torch.nn",
    "torch.optim",
)
# Targets of other libraries in conf/.
SHIPPED = ("bitsandbytes.optim.AdamW8bit", "prodigyopt.Prodigy", "schedulefree.AdamWScheduleFree")
# Built-in modules whose functions may be called; of the others, only classes.
_FACTORY_MODULES = ("runner.engines.optim.optimizers", "runner.engines.optim.schedulers")
_ALLOW_HELP = "modules that an untrusted config may name, beside the runner's own and torch.nn's: own,other"
_SIGN_HELP = "the run is yours, though it was moved, modified or never signed; it may name anything from now on"
_DOTTED_PATH = re.compile(r"[A-Za-z]\w*(\.(?!__)[A-Za-z_]\w*)+", re.ASCII)
_MAX_PATH = 1_000  # characters
_MAX_LISTED = 20
_Refusal = tuple[KeyPath, Any, str]  # the path of a value, the value, and the reason
_LIBRARIES = [
    Path(path).resolve() for path in {*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))}
]


@dataclass(frozen=True)
class Allowlist:
    """The targets that one config may name, beside the built-in ones.

    Args:
        source: the file of the config.
        prefixes: modules that the user allows, with everything in them.
        own: configs of the user's, unresolved or not: a target or text that also stands there is allowed.
        reason: why the config isn't known to be the user's own.
        remedy: how more is allowed, with `{}` for the prefixes.
        sign: how the user says that the run is theirs; empty if it can't be signed.
        is_signed: the user has signed the config, which may name anything.
    """

    source: Path
    prefixes: Sequence[str] = ()
    own: Sequence[Mapping[str, Any]] = ()
    reason: str = "nobody has signed it"
    remedy: str = "allow_targets=[{}]"
    sign: str = ""
    is_signed: bool = False

    def is_users_own(self, node: Mapping[str, Any]) -> bool:
        """Returns whether the user's own config names the node's target; a library's, with the same arguments."""
        target = node["_target_"]
        own_nodes = [own_node for config in self.own for _, own_node in _find_nodes(config)]
        if _is_of_a_library(str(target).partition(".")[0]):  # some libraries load or run anything: arguments decide
            return node in own_nodes
        return target in [own_node["_target_"] for own_node in own_nodes]

    def is_users_own_text(self, path: KeyPath, text: str) -> bool:
        """Returns whether the user's own config has that text at that path."""
        return any(pair == (path, text) for config in self.own for pair in walk(config))


def add_trust_arguments(parser: ArgumentParser) -> None:
    """Adds the options of a command by which a user trusts a saved config."""
    parser.add_argument(
        "--allow-targets",
        type=lambda modules: [module for module in modules.split(",") if module],
        default=[],
        metavar="MODULES",
        help=_ALLOW_HELP,
    )
    parser.add_argument("--sign", action="store_true", help=_SIGN_HELP)


def check_interpolations(config: Mapping[str, Any], trust: Allowlist) -> None:
    """Checks that an unresolved config reads only itself: `${oc.env:SECRET}` would reveal this machine's environment.

    Raises:
        ConfigError: naming every key with another resolver.
    """
    if trust.is_signed:
        return
    hide_tracebacks()
    texts = [(path, text) for path, text in walk(config) if isinstance(text, str) and calls_other_resolvers(text)]
    refused = [(path, text, OTHER_RESOLVERS) for path, text in texts if not trust.is_users_own_text(path, text)]
    _raise_if(refused, trust, "Where you want it, set that key on this command line")


def check_paths(config: Mapping[str, Any], trust: Allowlist) -> None:
    """Checks the dotted path of every `_target_`; imports nothing.

    Raises:
        ConfigError: naming every key, target and reason, the file, and the remedy.
    """
    refused = _find_refused(config, trust, _refuse_path)
    never = {*sys.stdlib_module_names, "hydra", "runner", "torch"}
    roots = {target.partition(".")[0] for _, target, _ in refused if isinstance(target, str)}
    modules = sorted(root for root in roots - never if re.fullmatch(r"\w+", root))
    remedy = f"If you trust that file and what is named: {trust.remedy.format(','.join(modules))}" if modules else ""
    _raise_if(refused, trust, remedy)


def check_resolved_objects(config: Mapping[str, Any], trust: Allowlist) -> None:
    """Checks that each target, which is imported for it, is defined in an allowed module; calls nothing.

    Call it after `check_paths`. A target that can't be imported is reported by `check_targets`.

    Raises:
        ConfigError: naming every key, target and reason, and the file.
    """
    _raise_if(_find_refused(config, trust, _refuse_object), trust)


def _find_refused(
    config: Any, trust: Allowlist, refuse: Callable[[Mapping[str, Any], Allowlist], str | None]
) -> list[_Refusal]:
    nodes = () if trust.is_signed else _find_nodes(config)
    return [(path, node["_target_"], reason) for path, node in nodes if (reason := refuse(node, trust))]


def _refuse_path(node: Mapping[str, Any], trust: Allowlist) -> str | None:
    """Returns why a node's path is not allowed; None if it is."""
    target = node["_target_"]
    expected = "expected the dotted path of a class or function"
    if not isinstance(target, str):
        return expected
    if trust.is_users_own(node) or target in SHIPPED:
        return None
    if len(target) > _MAX_PATH or not _DOTTED_PATH.fullmatch(target):
        return expected
    return None if is_under(target, (*BUILT_IN, *trust.prefixes)) else "its module is not on the allow-list"


def _refuse_object(node: Mapping[str, Any], trust: Allowlist) -> str | None:
    """Returns why the object at a node's path is not allowed; None if it is, or can't be imported."""
    target = node["_target_"]
    if trust.is_users_own(node) or target in trust.prefixes:
        return None
    try:
        found, attributes = find_module(target)
    except ImportError:
        return None
    for attribute in attributes:
        if not hasattr(found, attribute):
            return None
        found = getattr(found, attribute)
        if isinstance(found, ModuleType):
            return f"it goes through the module {found.__name__}"
    try:
        found = get_object(target)  # the object that Hydra will call
    except Exception as error:
        return f"Hydra refuses it: {str(error).splitlines()[0]}"
    module = getattr(found, "__module__", None)
    if isinstance(module, str) and is_under(module, trust.prefixes):
        return None
    if target not in SHIPPED and not (isinstance(module, str) and is_under(module, BUILT_IN)):
        return f"what it names is defined in {module}, which is not on the allow-list"
    if not _is_harmless(found, str(module)):
        return "expected a class: a module, an optimizer, a schedule, or one of the runner's examples and samplers"
    return None


def _is_harmless(found: Any, module: str) -> bool:
    """Returns whether calling a built-in object with any arguments only builds a module, optimizer, sampler, ..."""
    if is_under(module, ["runner"]):
        is_factory = module in _FACTORY_MODULES and vars(sys.modules[module]).get(found.__name__) is found
        return isinstance(found, type) or is_factory
    from torch import nn, optim

    return isinstance(found, type) and issubclass(found, (nn.Module, optim.Optimizer, optim.lr_scheduler.LRScheduler))


def _is_of_a_library(root: str) -> bool:
    """Returns whether a top-level module is installed, and not the user's own code; imports nothing."""
    if root in sys.stdlib_module_names:
        return True
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):
        return True
    if spec is None:
        return True
    locations = [*(spec.submodule_search_locations or ()), spec.origin]
    paths = [Path(location).resolve() for location in locations if location]
    return not paths or any(path.is_relative_to(library) for path in paths for library in _LIBRARIES)


def is_under(path: str, prefixes: Sequence[str]) -> bool:
    """Returns whether a dotted path is a prefix or under one: `own` and `own.a` are under `own`, `owner.a` is not."""
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def _find_nodes(config: Any) -> Iterator[tuple[KeyPath, Mapping[str, Any]]]:
    """Yields the path and node of each target: nodes with `_target_`, and the paths in rules {match, with}."""
    for path, value in walk(config):
        if isinstance(value, Mapping) and "_target_" in value:
            yield (*path, "_target_"), value
    for path, target in find_rule_paths(config):
        yield path, {"_target_": target}


def _raise_if(refused: list[_Refusal], trust: Allowlist, remedy: str = "") -> None:
    if not refused:
        return
    head = f"{trust.source}: a config from a file is data, and this one names what may not be used here"
    lines = [
        one_line(f"  {shown('.'.join(map(str, path)))}={shown_value(value)}: {reason}")
        for path, value, reason in refused[:_MAX_LISTED]
    ]
    if len(refused) > _MAX_LISTED:
        lines.append(f"  ... ({len(refused)} in all)")
    reason = f"It isn't known to be yours: {one_line(trust.reason)}."
    if trust.sign:
        reason += f" If it is: {trust.sign} signs it as it is"
    raise ConfigError("\n".join(filter(None, [head, *lines, reason, remedy])))
