"""Interpolations such as `${model.width}` and `${oc.env:HOME}`: written, escaped, and searched for resolvers.

Must not import torch.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import GrammarParseError, OmegaConfBaseException
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser
from omegaconf.grammar_parser import parse

_HARMLESS = {"now", "run_label", "hydra"}  # resolvers that tell nothing of this machine but where a run's folder is
_STABLE = {"run_label", "hydra", "python_version"}  # and OmegaConf's own, `oc.`
NOT_FOLLOWED = "a resolver other than hydra, now or run_label"
_BRACES = r"\{[^{}]*\}"
for _ in range(4):  # so deep
    _BRACES = rf"\{{(?:[^{{}}]|{_BRACES})*+\}}"
# A quoted text, or an interpolation that is a whole element of a list, a mapping or a sweep.
_PARTS = re.compile(
    r"""'(?:\\.|[^'\\])*'|"(?:\\.|[^"\\])*"|(?:(?<![^,\[{(:\s]))\$""" + _BRACES + r"(?=\s*(?:[,\]})]|$))"
)


def escape(value: Any) -> Any:
    """Returns a plain value with its texts escaped, so that OmegaConf resolves each to what it was."""
    if isinstance(value, dict):
        return {key: escape(child) for key, child in value.items()}
    if isinstance(value, list):
        return [escape(child) for child in value]
    # Backslashes before an interpolation are read in pairs; an odd one escapes it.
    return re.sub(r"(?<!\\)(\\*)\$\{", r"\1\1\\${", value) if isinstance(value, str) else value


def find_resolvers(text: str) -> set[str]:
    """Returns the names of all resolvers that a text calls, at any depth.

    Raises:
        GrammarParseError: it has an interpolation that can't be read.
    """
    return set(_walk_resolvers(parse(text))) if "${" in text else set()


def _walk_resolvers(tree: Any) -> Iterator[str]:
    if isinstance(tree, OmegaConfGrammarParser.InterpolationResolverContext):
        yield tree.resolverName().getText()
    for child in getattr(tree, "children", None) or ():
        yield from _walk_resolvers(child)


def reads_elsewhere(text: str) -> bool:
    """Says whether a text interpolates more than plain nodes, `hydra:`, `now:` and `run_label:`."""
    try:
        return not find_resolvers(text) <= _HARMLESS
    except GrammarParseError:
        return True


def fix_values(cfg: DictConfig, before: Mapping[str, Any] | None = None) -> None:
    """Puts values in the place of texts that another composition may resolve to another value.

    Such texts call `now` or a resolver that is not OmegaConf's, Hydra's or the runner's own. One that interpolates
    nodes follows these nodes on resume, as long as it resolves to the same value twice. An error is left to whoever
    resolves the config.

    Args:
        before: a config that was stored with these values, unresolved.
    """
    for path, text in _find_unstable(OmegaConf.to_container(cfg, resolve=False)):
        value = _select(before or {}, path)
        with contextlib.suppress(OmegaConfBaseException):
            value = escape(_resolve(cfg, path)) if value is None else value
            if _is_fixed(text) or value != escape(_resolve(_without_cache(cfg), path)):
                node = _select(cfg, path[:-1])
                with read_write(node):
                    node[path[-1]] = value


def fill_cache(cfg: DictConfig) -> None:
    """Resolves the texts that call `now`: what Hydra composes of this config for a sweep's jobs then has one moment."""
    for path, text in _find_unstable(OmegaConf.to_container(cfg, resolve=False)):
        if "now" in find_resolvers(text):
            with contextlib.suppress(OmegaConfBaseException):
                _resolve(cfg, path)


def _find_unstable(plain: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], str]]:
    if path == ("hydra", "overrides"):  # what was typed, which Hydra's grammar reads again
        return
    children = plain.items() if isinstance(plain, dict) else enumerate(plain) if isinstance(plain, list) else ()
    for key, child in children:
        yield from _find_unstable(child, (*path, key))
    if isinstance(plain, str) and "${" in plain and ":" in plain:
        with contextlib.suppress(GrammarParseError):
            if any(not name.startswith("oc.") and name not in _STABLE for name in find_resolvers(plain)):
                yield path, plain


def _is_fixed(text: str) -> bool:
    """Says whether a text's value is the run's for good: `now`, and what no node of the config can change."""
    return "now" in find_resolvers(text) or not _has_node(parse(text))


def _has_node(tree: Any) -> bool:
    if isinstance(tree, OmegaConfGrammarParser.InterpolationNodeContext):
        return True
    return any(_has_node(child) for child in getattr(tree, "children", None) or ())


def _select(nest: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        try:
            nest = nest[key]
        except (KeyError, IndexError, TypeError):
            return None
    return nest


def _resolve(cfg: DictConfig, path: tuple[Any, ...]) -> Any:
    value = _select(cfg, path)
    return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value


def _without_cache(cfg: DictConfig) -> DictConfig:
    other = copy.deepcopy(cfg)
    OmegaConf.clear_cache(other)
    return other


def without_elsewhere(config: Any) -> Any:
    """Returns a plain config with a missing value in the place of each text that reads elsewhere."""
    if isinstance(config, Mapping):
        return {key: without_elsewhere(value) for key, value in config.items()}
    if isinstance(config, list):
        return [without_elsewhere(value) for value in config]
    return "???" if isinstance(config, str) and reads_elsewhere(config) else config


def quote_nested(override: str) -> str:
    """Returns an override with quotes around each interpolation that has braces inside.

    Hydra's grammar ends an interpolation without quotes at its first closing brace.
    """
    key, equals, value = override.partition("=")
    return override if override.startswith("-") else f"{key}{equals}{_PARTS.sub(_quote, value)}"


def _quote(part: re.Match[str]) -> str:
    text = part.group()
    if not text.startswith("$") or "}" not in text[:-1]:
        return text
    # A backslash before a quote is doubled, and the quote gets one of its own.
    return '"' + re.sub(r'(?<!\\)(\\*)"', r'\1\1\\"', text) + '"'


def quote(text: str) -> str:
    """Returns a text in quotes, as Hydra's grammar and OmegaConf read it back."""
    # Backslashes before a quote, and at the end, are read in pairs.
    quoted = re.sub(r"(\\*)('|$)", lambda part: part[1] * 2 + ("\\'" if part[2] else ""), escape(text))
    return f"'{quoted}'"


class _HydraConfig:
    """Stands in for the config that Hydra keeps of a job; it is made when an interpolation asks for it."""

    def __init__(self, cfg: DictConfig, read: Callable[[], Any], folder: Path) -> None:
        self._cfg, self._read, self._folder = cfg, read, folder

    @functools.cached_property
    def hydra(self) -> Any:
        """Hydra's own config."""
        root = copy.deepcopy(self._cfg)
        with read_write(root), open_dict(root):
            root["hydra"] = copy.deepcopy(self._read())
            OmegaConf.update(root, "hydra.runtime.output_dir", str(self._folder.absolute()), force_add=True)
        return root["hydra"]


@contextlib.contextmanager
def told_by_hydra(cfg: DictConfig, read: Callable[[], Any], folder: Path) -> Iterator[None]:
    """Has `${hydra:...}` read another config of Hydra's than that of the job it runs now, which may be none.

    Args:
        cfg: the run's config, which Hydra's own interpolates too.
        read: returns Hydra's own config; called when an interpolation asks for it.
        folder: of the run; `${hydra:runtime.output_dir}` is its path.
    """
    holder: Any = HydraConfig.instance()
    before, holder.cfg = holder.cfg, _HydraConfig(cfg, read, folder)
    try:
        yield
    finally:
        holder.cfg = before
