"""Counts what a config's interpolations expand to, without resolving them: a few lines can expand to a billion values.

OmegaConf resolves an interpolation anew wherever it stands, so the number of resolutions is counted, and how deep they
nest. Must not import torch.
"""

from __future__ import annotations

import functools
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser as Grammar
from omegaconf.grammar_parser import parse

from runner.config.errors import ConfigError

MAX_VALUES = 100_000  # values of a resolved config, and interpolations resolved on the way
MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 60  # of containers and interpolations; OmegaConf exhausts Python's stack at some 70
MAX_TEXT = 10_000  # characters of a text with interpolations
MAX_TEXTS = 100_000  # characters of all of them: parsing takes 10 us each
MAX_BRACKETS = 20  # open at once in such a text
_OF_RESOLVER = 1_000  # characters, more than the resolvers that a config from a file may call return
_SIMPLE = re.compile(r"\$\{(\.*)([A-Za-z_][\w-]*(?:\.[\w-]+)*)\}", re.ASCII)
_BY_KEY = ("oc.select", "oc.dict.keys", "oc.dict.values", "oc.deprecated")

Path = tuple[Any, ...]


@dataclass(frozen=True)
class Expansion:
    """What a part of a config expands to: values and resolutions, characters, and depth."""

    values: int
    characters: int
    depth: int


@dataclass(frozen=True)
class _Reference:
    """An interpolation in a text: of a node, whose `keys` may be references themselves, or of a resolver.

    `dots` are those before the key of a node; `text` is that of a resolver's arguments.
    """

    dots: int = 0
    keys: tuple[str | _Reference, ...] = ()
    resolver: str | None = None
    arguments: tuple[_Reference, ...] = ()
    text: str = ""


def check_expansion(config: Any, hydra: Any = None, *, is_strict: bool = False) -> None:
    """Checks that a config expands to a bounded size.

    Args:
        config: a config of OmegaConf's or a plain one, unresolved.
        hydra: what `${hydra:...}` reads, unresolved.
        is_strict: refuses a key that only a resolver tells, as in `${a.${now:%S}}`: it may be that of anything.
    Raises:
        ConfigError: naming the key, what it expands to, and the limit.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    keys = [key for key in plain if key != "hydra"]
    if hydra is not None:
        plain = {**plain, "hydra": hydra}
    _check_texts(plain)
    counter = _Counter(plain, is_strict)
    whole = _sum_of([counter.expand((key,)) for key in keys], 0)
    if whole.values > MAX_VALUES or whole.characters > MAX_CHARACTERS:
        raise counter.refuse((), whole)


def check_plain(plain: Any) -> None:
    """Checks that a resolved config has a bounded size, and that its texts, once they are escaped, are parsed quickly.

    Raises:
        ConfigError: naming the key, what was found, and the limit.
    """
    _check_texts(plain)
    whole = _count(plain)
    if whole.values > MAX_VALUES or whole.characters > MAX_CHARACTERS:
        size = f"{whole.values:,} values and {whole.characters:,} characters"
        raise ConfigError(f"the config has {size}; expected {MAX_VALUES:,} and {MAX_CHARACTERS:,} at most")


def _count(value: Any) -> Expansion:
    if isinstance(value, Mapping):
        return _sum_of([_count(child) for child in value.values()], sum(len(str(key)) for key in value))
    if isinstance(value, (list, tuple)):
        return _sum_of([_count(child) for child in value], 0)
    return Expansion(1, len(value) if isinstance(value, (str, bytes)) else 16, 0)


def check_text(text: str, key: str) -> None:
    """Checks that parsing a text takes little time, and does not exhaust Python's stack.

    Raises:
        ConfigError: naming the key, what was found, and the limit.
    """
    if len(text) > MAX_TEXT:
        raise ConfigError(f"{key}: has {len(text):,} characters; one with interpolations may have {MAX_TEXT:,}")
    depth = 0
    for character in text:
        depth = max(depth + (character in "{[(") - (character in "}])"), 0)
        if depth > MAX_BRACKETS:
            raise ConfigError(f"{key}: its brackets are nested over {MAX_BRACKETS} deep")


def _check_texts(plain: Any) -> None:
    total, waiting = 0, [(plain, "")]
    while waiting:
        value, key = waiting.pop()
        if isinstance(value, str) and "${" in value:
            check_text(value, key)
            total += len(value)
        elif isinstance(value, Mapping):
            waiting += [(child, f"{key}.{name}".lstrip(".")) for name, child in value.items()]
        elif isinstance(value, (list, tuple)):
            waiting += [(child, f"{key}.{index}".lstrip(".")) for index, child in enumerate(value)]
        if key.count(".") > 2 * MAX_DEPTH:
            raise ConfigError(f"{key[:80]}...: nested over {MAX_DEPTH} deep")
    if total > MAX_TEXTS:
        raise ConfigError(f"the texts with interpolations have {total:,} characters; expected {MAX_TEXTS:,} at most")


class _Counter:
    """Counts the expansion of the nodes of one config, each once.

    Args:
        plain: the unresolved config.
        is_strict: as in `check_expansion`.
    """

    def __init__(self, plain: Any, is_strict: bool) -> None:
        self._plain, self._is_strict = plain, is_strict
        self._known: dict[Path, Expansion] = {}
        self._open: dict[Path, None] = {}  # in the order of being entered

    def refuse(self, path: Path, found: Expansion) -> ConfigError:
        """Returns the error for a node that expands to too much."""
        size = f"{_shown(found.values)} values and {_shown(found.characters)} characters"
        limit = f"expected {MAX_VALUES:,} and {MAX_CHARACTERS:,} at most"
        return ConfigError(f"{_join(path)}: its interpolations expand to {size}; {limit}")

    def expand(self, path: Path) -> Expansion:
        """Returns what the node at a path expands to.

        Raises:
            ConfigError: it is too large or too deep, or leads back to itself.
        """
        if path in self._known:
            return self._known[path]
        if path in self._open:
            chain = [*self._open]
            shown = " -> ".join(_join(each) for each in [*chain[chain.index(path) :], path][-5:])
            raise ConfigError(f"{_join(path)}: its interpolation leads back to itself ({shown})")
        if len(self._open) > 2 * MAX_DEPTH:
            raise ConfigError(f"{_join(path)}: its interpolations are nested over {MAX_DEPTH} deep")
        self._open[path] = None
        found = self._expand(_get(self._plain, path), path)
        del self._open[path]
        if found.values > MAX_VALUES or found.characters > MAX_CHARACTERS:
            raise self.refuse(path, found)
        if found.depth > MAX_DEPTH:
            raise ConfigError(f"{_join(path)}: it is nested over {MAX_DEPTH} deep, with its interpolations")
        self._known[path] = found
        return found

    def _expand(self, value: Any, path: Path) -> Expansion:
        if isinstance(value, Mapping):
            children = [self.expand((*path, key)) for key in value]
            return _sum_of(children, sum(len(str(key)) for key in value))
        if isinstance(value, (list, tuple)):
            return _sum_of([self.expand((*path, index)) for index in range(len(value))], 0)
        if not isinstance(value, str):
            return Expansion(1, 16, 0)
        references = [piece for piece in _parse(value) if isinstance(piece, _Reference)]
        return _sum_of([self._expand_reference(each, path) for each in references], len(value))

    def _expand_reference(self, reference: _Reference, path: Path) -> Expansion:
        if reference.resolver is not None:
            return self._expand_resolver(reference, path)
        inner = [self._expand_reference(key, path) for key in reference.keys if isinstance(key, _Reference)]
        target = self._find(reference, path)
        found = [] if target is None else [self.expand(target)]
        total = _sum_of([*inner, *found], 0)
        # In the midst of a text, a container becomes a text of its own.
        return Expansion(total.values, total.characters + 4 * total.values, max(total.depth - 1, 0))

    def _expand_resolver(self, reference: _Reference, path: Path) -> Expansion:
        parts = [self._expand_reference(each, path) for each in reference.arguments]
        target = self._find_by_resolver(reference, path)
        parts += [] if target is None else [self.expand(target)]
        total = _sum_of(parts, _OF_RESOLVER + len(reference.text))
        return Expansion(total.values, total.characters, max(total.depth - 1, 0))

    def _find_by_resolver(self, reference: _Reference, path: Path) -> Path | None:
        """Returns the node that a resolver reads whose argument is a key; None where there is none."""
        key = reference.text.partition(",")[0].strip().strip("'\"")
        if reference.arguments or reference.resolver not in ("hydra", *_BY_KEY):
            return None
        return self._find_key(f"hydra.{key}" if reference.resolver == "hydra" else key, path, 0)

    def _find(self, reference: _Reference, path: Path, hops: int = 0) -> Path | None:
        """Returns the path that a reference leads to, or None where there is nothing."""
        if reference.resolver is not None:
            return self._find_by_resolver(reference, path)
        keys = [key if isinstance(key, str) else self._text_of(key, path, hops) for key in reference.keys]
        known = [key for key in keys if key is not None]
        return None if len(known) < len(keys) else self._find_key("." * reference.dots + ".".join(known), path, hops)

    def _find_key(self, key: str, path: Path, hops: int) -> Path | None:
        """Returns the path of a dotted key, as it is read at a path; interpolations on the way are followed."""
        names = key.lstrip(".")
        dots = len(key) - len(names)
        found: Path = path[: max(len(path) - dots, 0)] if dots else ()
        for name in re.split(r"[.\[\]]+", names.rstrip("]")):
            followed = self._follow(found, hops)
            step = None if followed is None else self._step(followed, name)
            if step is None:
                return None
            found = step
        return found

    def _follow(self, path: Path, hops: int) -> Path | None:
        """Returns where a node leads if it is one interpolation of another; None where that is not known."""
        value = _get(self._plain, path)
        if not isinstance(value, str) or "${" not in value:
            return path
        if hops > MAX_DEPTH:
            raise ConfigError(f"{_join(path)}: its interpolations are nested over {MAX_DEPTH} deep")
        pieces = _parse(value)
        if len(pieces) != 1 or not isinstance(pieces[0], _Reference):
            return None
        target = self._find(pieces[0], path, hops + 1)
        return None if target is None else self._follow(target, hops + 1)

    def _step(self, path: Path, key: str | None) -> Path | None:
        parent = _get(self._plain, path)
        if key is None:
            return None
        if isinstance(parent, (list, tuple)):
            is_index = re.fullmatch(r"-?\d{1,9}", key) is not None and -len(parent) <= int(key) < len(parent)
            return (*path, int(key) % len(parent)) if is_index else None
        if not isinstance(parent, Mapping):
            return None
        return next(((*path, each) for each in _readings(key) if each in parent), None)

    def _text_of(self, reference: _Reference, path: Path, hops: int) -> str | None:
        """Returns the text that a reference in a key stands for, or None where it is not known.

        Raises:
            ConfigError: it is not known, and all is to be.
        """
        if hops > MAX_DEPTH:
            raise ConfigError(f"{_join(path)}: its interpolations are nested over {MAX_DEPTH} deep")
        text: str | None = None
        target = self._find(reference, path, hops + 1)
        if target is not None:
            text = self._text_at(target, hops + 1)
        elif reference.resolver == "oc.env" and not reference.arguments:
            name, _, default = reference.text.partition(",")
            text = os.environ.get(name.strip(), default.strip())
        if text is None and (target is not None or reference.resolver is not None) and self._is_strict:
            raise ConfigError(f"{_join(path)}: expected an interpolation whose key other keys tell; write that key out")
        return text

    def _text_at(self, path: Path, hops: int) -> str | None:
        value = _get(self._plain, path)
        if not isinstance(value, str):
            return str(value) if isinstance(value, (int, float)) else None
        texts = [each if isinstance(each, str) else self._text_of(each, path, hops) for each in _parse(value)]
        known = [text for text in texts if text is not None and "\\" not in text]
        joined = "".join(known)
        return joined if len(known) == len(texts) and len(joined) <= MAX_TEXT else None


def _readings(key: str) -> list[Any]:
    """Returns the keys that a part of an interpolation may stand for."""
    number: list[Any] = [int(key)] if re.fullmatch(r"-?\d{1,18}", key) else []
    return [key, *number, *({"true": [True], "false": [False]}.get(key.lower(), []))]


def _get(nest: Any, path: Path) -> Any:
    for key in path:
        nest = nest[key]
    return nest


def _sum_of(parts: list[Expansion], characters: int) -> Expansion:
    values = 1 + sum(part.values for part in parts)
    characters += sum(part.characters for part in parts)
    return Expansion(values, characters, max((part.depth for part in parts), default=-1) + 1)


def _join(path: Path) -> str:
    return ".".join(map(str, path))[:200] or "the config"


def _shown(number: int) -> str:
    return f"{number:,}" if number < 10**12 else "over 10^12"


@functools.lru_cache(4096)
def _parse(text: str) -> tuple[str | _Reference, ...]:
    """Returns the outermost interpolations of a text, and what is between them.

    A text that can't be read has none: OmegaConf tells the fault when it resolves it.
    """
    if "${" not in text:
        return (text,)
    if simple := _SIMPLE.fullmatch(text):
        return (_Reference(len(simple[1]), tuple(simple[2].split("."))),)
    try:
        pieces = _pieces(parse(text))
    except GrammarParseError:
        return (text,)
    return tuple(piece for piece in pieces if piece != "<EOF>")


def _pieces(tree: Any) -> list[str | _Reference]:
    children = getattr(tree, "children", None) or ()
    if isinstance(tree, Grammar.InterpolationNodeContext):
        return [_read_node(tree)]
    if isinstance(tree, Grammar.InterpolationResolverContext):
        inner = [piece for child in children[1:] for piece in _pieces(child)]
        text = "".join(child.getText() for child in children[3:-1])
        arguments = tuple(piece for piece in inner if isinstance(piece, _Reference))
        return [_Reference(resolver=tree.resolverName().getText(), arguments=arguments, text=text)]
    return [piece for child in children for piece in _pieces(child)] if children else [tree.getText()]


def _read_node(tree: Any) -> _Reference:
    dots, keys = 0, list[str | _Reference]()
    for child in tree.children[1:-1]:
        if isinstance(child, Grammar.ConfigKeyContext):
            keys += _pieces(child)
        elif child.getText() == "." and not keys:
            dots += 1
    return _Reference(dots, tuple(keys))
