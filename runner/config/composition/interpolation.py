"""Interpolations such as `${model.width}` and `${oc.env:HOME}`: escaping, quoting, and listing their resolvers."""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

from runner.config.composition.expansion import KeyPath, walk

_SAFE_RESOLVERS = {"now", "run_label", "hydra"}  # reveal only the run folder's path
_STABLE_RESOLVERS = {"run_label", "hydra", "python_version"}  # and those of OmegaConf, `oc.*`
OTHER_RESOLVERS = "a resolver other than hydra, now or run_label"
_BRACES = r"\{[^{}]*\}"
for _ in range(4):  # levels of nested braces
    _BRACES = rf"\{{(?:[^{{}}]|{_BRACES})*+\}}"
# A quoted text, or an interpolation that is a complete element of a list, a mapping or a sweep.
_QUOTED_OR_INTERPOLATION = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?:(?<![^,\[{(:\s]))\$""" + _BRACES + r"(?=\s*(?:[,\]})]|$))"
)


def escape(value: Any) -> Any:
    """Returns a plain value with its texts escaped, so that OmegaConf resolves each to the same text."""
    if isinstance(value, dict):
        return {key: escape(child) for key, child in value.items()}
    if isinstance(value, list):
        return [escape(child) for child in value]
    # OmegaConf reads backslashes before an interpolation in pairs; an odd one escapes the interpolation.
    return re.sub(r"(?<!\\)(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def find_resolvers(text: str) -> set[str]:
    """Returns the names of all resolvers that a text calls, at any depth.

    Raises:
        GrammarParseError: the text has an interpolation with invalid syntax.
    """
    nodes = _walk_syntax_tree(parse(text)) if "${" in text else ()
    resolvers = [node for node in nodes if isinstance(node, OmegaConfGrammarParser.InterpolationResolverContext)]
    return {resolver.resolverName().getText() for resolver in resolvers}


def _walk_syntax_tree(tree: Any) -> Iterator[Any]:
    yield tree
    for child in getattr(tree, "children", None) or ():
        yield from _walk_syntax_tree(child)


def calls_other_resolvers(text: str) -> bool:
    """Returns whether a text calls a resolver other than `hydra`, `now` and `run_label`, or has invalid syntax."""
    try:
        return not find_resolvers(text) <= _SAFE_RESOLVERS
    except GrammarParseError:
        return True


def pin_unstable_values(cfg: DictConfig, before: Mapping[str, Any] | None = None) -> None:
    """Replaces texts by their values where resolving them later may give another value.

    Such a text calls `now`, or a resolver that is not one of OmegaConf, Hydra or the runner. A text that also reads
    nodes stays an interpolation, and so follows these nodes on resume, if it resolves to the same value twice. A text
    that can't be resolved is left as it is.

    Args:
        before: an unresolved config that was stored with these values.
    """
    for path, text in _find_unstable(cfg):
        value = _select(before or {}, path)
        with contextlib.suppress(OmegaConfBaseException):
            value = escape(_resolve(cfg, path)) if value is None else value
            if _is_constant(text) or value != escape(_resolve(_without_cache(cfg), path)):
                node = _select(cfg, path[:-1])
                with read_write(node):
                    node[path[-1]] = value


def cache_now(cfg: DictConfig) -> None:
    """Resolves the texts that call `now`, so that all jobs of a sweep have the same time."""
    for path, text in _find_unstable(cfg):
        if "now" in find_resolvers(text):
            with contextlib.suppress(OmegaConfBaseException):
                _resolve(cfg, path)


def _find_unstable(cfg: DictConfig) -> Iterator[tuple[KeyPath, str]]:
    for path, value in walk(OmegaConf.to_container(cfg, resolve=False)):
        is_parsed_later = path[:2] == ("hydra", "overrides")
        if isinstance(value, str) and ":" in value and not is_parsed_later:
            with contextlib.suppress(GrammarParseError):
                if any(not name.startswith("oc.") and name not in _STABLE_RESOLVERS for name in find_resolvers(value)):
                    yield path, value


def _is_constant(text: str) -> bool:
    """Returns whether a text's value is fixed when the run starts: it calls `now`, or reads no node of the config."""
    node_context = OmegaConfGrammarParser.InterpolationNodeContext
    reads_node = any(isinstance(node, node_context) for node in _walk_syntax_tree(parse(text)))
    return "now" in find_resolvers(text) or not reads_node


def _select(nest: Any, path: KeyPath) -> Any:
    for key in path:
        try:
            nest = nest[key]
        except (KeyError, IndexError, TypeError):
            return None
    return nest


def _resolve(cfg: DictConfig, path: KeyPath) -> Any:
    value = _select(cfg, path)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _without_cache(cfg: DictConfig) -> DictConfig:
    uncached = copy.deepcopy(cfg)
    OmegaConf.clear_cache(uncached)
    return uncached


def mask_other_resolvers(config: Any) -> Any:
    """Returns a plain config with `???` in place of each text that calls other resolvers."""
    if isinstance(config, Mapping):
        return {key: mask_other_resolvers(value) for key, value in config.items()}
    if isinstance(config, list):
        return [mask_other_resolvers(value) for value in config]
    return "???" if isinstance(config, str) and calls_other_resolvers(config) else config


def quote_nested(override: str) -> str:
    """Returns an override with quotes around each interpolation that contains braces.

    Hydra's grammar ends an unquoted interpolation at its first closing brace.
    """
    key, equals, value = override.partition("=")
    return override if override.startswith("-") else f"{key}{equals}{_QUOTED_OR_INTERPOLATION.sub(_quote, value)}"


def _quote(part: re.Match[str]) -> str:
    text = part.group()
    if not text.startswith("$") or "}" not in text[:-1]:
        return text
    # Backslashes before a quote are doubled, and the quote is escaped by one more.
    return '"' + re.sub(r'(?<!\\)(\\*)"', r'\1\1\\"', text) + '"'


def quote(text: str) -> str:
    """Returns a text in quotes that Hydra's grammar and OmegaConf read as the same text."""
    # Backslashes before a quote and at the end are read in pairs.
    quoted = re.sub(r"(\\*)('|$)", lambda part: part[1] * 2 + ("\\'" if part[2] else ""), escape(text))
    return f"'{quoted}'"


@dataclass
class _LazyHydraConfig:
    """Replaces the config that Hydra keeps of a job, and is composed when an interpolation reads it."""

    cfg: DictConfig
    read: Callable[[], Any]
    folder: Path

    @functools.cached_property
    def hydra(self) -> Any:
        """Hydra's section of the config."""
        root = copy.deepcopy(self.cfg)
        with read_write(root), open_dict(root):
            root["hydra"] = copy.deepcopy(self.read())
            OmegaConf.update(root, "hydra.runtime.output_dir", str(self.folder.absolute()), force_add=True)
        return root["hydra"]


@contextlib.contextmanager
def use_hydra_config(cfg: DictConfig, read: Callable[[], Any], folder: Path) -> Iterator[None]:
    """Makes `${hydra:...}` read another section than that of the job that Hydra runs now, if any.

    Args:
        cfg: the run's config, which interpolations in Hydra's section read too.
        read: returns Hydra's section; called when an interpolation reads it.
        folder: the run folder, which becomes `${hydra:runtime.output_dir}`.
    """
    singleton: Any = HydraConfig.instance()
    previous = singleton.cfg
    singleton.cfg = _LazyHydraConfig(cfg, read, folder)
    try:
        yield
    finally:
        singleton.cfg = previous
