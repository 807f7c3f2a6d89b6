"""What a config that came out of a file may name: the file is a stranger's, until its user says otherwise.

Owns the allow-list: strings are checked before anything of theirs is imported, what they turn out to be before it is
called. It holds whatever Hydra's own list of blocked targets says. Must not import torch at the top.
"""

from __future__ import annotations

import importlib.util
import re
import sys
import sysconfig
from argparse import ArgumentParser
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

from hydra.utils import get_object

from runner.config.composition.interpolation import NOT_FOLLOWED, reads_elsewhere
from runner.config.errors import ConfigError, hide_tracebacks, shown
from runner.config.targets import find_module, rule_paths
from runner.utils.utils import one_line

BUILT_IN = (
    "runner.examples",
    "runner.engines",
    "runner.utils.sampler",
    "runner.utils.pattern",
    "torch.nn",
    "torch.optim",
)
SHIPPED = ("bitsandbytes.optim.AdamW8bit", "prodigyopt.Prodigy", "schedulefree.AdamWScheduleFree")  # what conf/ names
_MAKERS = (
    "runner.engines.optim.optimizers",
    "runner.engines.optim.schedulers",
)  # the built-in modules whose functions may be called
_ALLOW_HELP = "modules that an untrusted config may name, beside the runner's own and torch.nn's: own,other"
_SIGN_HELP = "the run is yours, though it was moved, modified or never signed; it may name anything from now on"
_DOTTED = re.compile(r"[A-Za-z]\w*(\.(?!__)[A-Za-z_]\w*)+", re.ASCII)
_LONGEST_PATH = 1_000  # characters
_MOST_LISTED = 20
_LIBRARIES = [
    Path(path).resolve() for path in {*map(sysconfig.get_path, ("stdlib", "platstdlib", "purelib", "platlib"))}
]


@dataclass(frozen=True)
class Allowlist:
    """What one config may name, beside what the runner brings.

    Args:
        source: the file that the config stands in.
        prefixes: modules that the user trusts, with all that is in them.
        own: the user's own config, unresolved or not: what stands there, letter for letter, is trusted as well.
        reason: why the config isn't known to be the user's own.
        remedy: how more is allowed, with `{}` for the prefixes.
        sign: how the user says that the run is theirs; nothing where it can't be signed.
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
        """Says whether the user's own config names the node's target; if that is a library's, with its arguments."""
        target = node["_target_"]
        owned = [each for config in self.own for _, each in _nodes(config)]
        if _is_of_a_library(str(target).partition(".")[0]):  # there are loaders of anything: arguments decide
            return node in owned
        return any(each["_target_"] == target for each in owned)

    def is_users_own_value(self, key: str, value: str) -> bool:
        """Says whether the user's own config has that value at that key."""
        return any((key, value) in [pair for pair in _walk(config) if isinstance(pair[1], str)] for config in self.own)


def add_trust_arguments(parser: ArgumentParser) -> None:
    """Adds the options by which a user trusts a saved config."""
    parser.add_argument("--allow-targets", default="", metavar="MODULES", help=_ALLOW_HELP)
    parser.add_argument("--sign", action="store_true", help=_SIGN_HELP)


def check_interpolations(config: Mapping[str, Any], trust: Allowlist) -> None:
    """Checks that an unresolved config reads nothing but itself: `${oc.env:SECRET}` would tell what the machine knows.

    Raises:
        ConfigError: naming every key with another resolver.
    """
    if trust.is_signed:
        return
    hide_tracebacks()
    found = [
        f"{shown(key)}={shown(value)}: {NOT_FOLLOWED}"
        for key, value in _walk(config)
        if isinstance(value, str) and reads_elsewhere(value) and not trust.is_users_own_value(key, value)
    ]
    if found:
        raise ConfigError(_format_refusal(trust, found, "Where you want it, set that key on this command line"))


def check_paths(config: Mapping[str, Any], trust: Allowlist) -> None:
    """Checks every `_target_` by its letters; imports nothing.

    Raises:
        ConfigError: naming every key, target and reason, the file, and the remedy.
    """
    if trust.is_signed:
        return
    refused, roots = [], []
    for key, node in _nodes(config):
        if reason := _refuse_name(node, trust):
            refused.append(f"{shown(key)}={shown(str(node['_target_']))}: {reason}")
            roots += [str(node["_target_"]).partition(".")[0]]
    if refused:
        raise ConfigError(_format_refusal(trust, refused, _remedy(trust, roots)))


def check_resolved_objects(config: Mapping[str, Any], trust: Allowlist) -> None:
    """Checks that each target, imported now, is really one of an allowed module's; calls nothing.

    Run it after `check_names`, on what is to be built. A target that can't be imported is told elsewhere.

    Raises:
        ConfigError: naming every key, target and reason, and the file.
    """
    if trust.is_signed:
        return
    nodes = [(key, node) for key, node in _nodes(config) if not trust.is_users_own(node)]
    reasons = [(key, node["_target_"], _refuse_object(node["_target_"], trust.prefixes)) for key, node in nodes]
    refused = [f"{shown(key)}={shown(target)}: {reason}" for key, target, reason in reasons if reason]
    if refused:
        raise ConfigError(_format_refusal(trust, refused, None))


def _refuse_name(node: Mapping[str, Any], trust: Allowlist) -> str | None:
    target = node["_target_"]
    if not isinstance(target, str):
        return "expected the dotted path of a class or function"
    if trust.is_users_own(node) or target in SHIPPED:
        return None
    if len(target) > _LONGEST_PATH or not _DOTTED.fullmatch(target):
        return "expected the dotted path of a class or function"
    return None if is_under(target, (*BUILT_IN, *trust.prefixes)) else "its module is not on the allow-list"


def _refuse_object(target: str, prefixes: Sequence[str]) -> str | None:
    if target in prefixes:
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
        found = get_object(target)  # what Hydra will call
    except Exception as error:
        return f"Hydra refuses it: {str(error).splitlines()[0]}"
    module = getattr(found, "__module__", None)
    if isinstance(module, str) and is_under(module, prefixes):
        return None
    if target not in SHIPPED and not (isinstance(module, str) and is_under(module, BUILT_IN)):
        return f"what it names is defined in {module}, which is not on the allow-list"
    if not _is_harmless(found, str(module)):
        return "expected a class: a module, an optimizer, a schedule, or one of the runner's examples and samplers"
    return None


def _is_harmless(found: Any, module: str) -> bool:
    if is_under(module, ["runner"]):
        return isinstance(found, type) or (module in _MAKERS and vars(sys.modules[module]).get(found.__name__) is found)
    from torch import nn, optim

    return isinstance(found, type) and issubclass(found, (nn.Module, optim.Optimizer, optim.lr_scheduler.LRScheduler))


def _is_of_a_library(root: str) -> bool:
    """Says whether a top-level module is installed, and not the user's own code; imports nothing."""
    if root in sys.stdlib_module_names:
        return True
    try:
        spec = importlib.util.find_spec(root)
    except (ImportError, ValueError):
        return True
    places = [] if spec is None else [*(spec.submodule_search_locations or []), *([spec.origin] if spec.origin else [])]
    paths = [Path(place).resolve() for place in places]
    return not paths or any(path.is_relative_to(library) for path in paths for library in _LIBRARIES)


def is_under(path: str, prefixes: Sequence[str]) -> bool:
    """Says whether a dotted path is a prefix or lies under one: `own` has `own` and `own.a`, not `owner.a`."""
    return any(path == prefix or path.startswith(f"{prefix}.") for prefix in prefixes)


def _nodes(config: Any) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yields all that names something to be called: nodes with `_target_`, and what rules {match, with} name."""
    for key, value in _walk(config):
        if isinstance(value, Mapping) and "_target_" in value:
            yield f"{key}._target_", value
    for key, path in rule_paths(config):
        yield key, {"_target_": path}


def _walk(value: Any, key: str = "") -> Iterator[tuple[str, Any]]:
    """Yields every value of a nest with its dotted key, the nest itself first."""
    yield key, value
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, list) else ()
    for name, child in children:
        yield from _walk(child, f"{key}.{name}".lstrip("."))


def _remedy(trust: Allowlist, roots: list[str]) -> str | None:
    never = {*sys.stdlib_module_names, "hydra", "runner", "torch"}
    trusted = sorted({root for root in roots if re.fullmatch(r"\w+", root)} - never)
    return f"If you trust that file and what is named: {trust.remedy.format(','.join(trusted))}" if trusted else None


def _format_refusal(trust: Allowlist, refused: list[str], remedy: str | None) -> str:
    head = f"{trust.source}: a config from a file is data, and this one names what may not be used here"
    why = f"It isn't known to be yours: {one_line(trust.reason)}."
    why += f" If it is: {trust.sign} signs it as it is" if trust.sign else ""
    lines = [f"  {one_line(line)}" for line in refused[:_MOST_LISTED]]
    lines += [f"  ... ({len(refused)} in all)"] if len(refused) > _MOST_LISTED else []
    return "\n".join([head, *lines, why, *([remedy] if remedy else [])])
