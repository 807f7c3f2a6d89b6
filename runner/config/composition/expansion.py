"""Checks the size to which a config's interpolations expand, without resolving them.

A few lines of YAML can expand to a billion values. OmegaConf resolves an interpolation again at every place where it is
used, so resolutions are counted as well as values, and so is their depth.
"""

from __future__ import annotations

import functools
import itertools
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import GrammarParseError
from omegaconf.grammar.gen.OmegaConfGrammarParser import OmegaConfGrammarParser as Grammar
from omegaconf.grammar_parser import parse

from runner.config.errors import ConfigError

MAX_VALUES = 100_000  # values of a resolved config, plus resolutions
MAX_CHARACTERS = 1_000_000
MAX_DEPTH = 60  # of containers and interpolations; OmegaConf exhausts Python's stack at about 70
MAX_TEXT_LENGTH = 10_000  # characters of a text with interpolations
MAX_TOTAL_TEXT_LENGTH = 100_000  # characters of all such texts: parsing takes 10 us a character
MAX_BRACKETS = 20  # nested brackets in such a text
_RESOLVER_CHARACTERS = 1_000  # upper bound of the result of the resolvers that a saved config may call
_SIMPLE_INTERPOLATION = re.compile(r"\$\{(\.*)([A-Za-z_][\w-]*(?:\.[\w-]+)*)\}", re.ASCII)
_KEY_RESOLVERS = ("oc.select", "oc.dict.keys", "oc.dict.values", "oc.deprecated")

KeyPath = tuple[Any, ...]


@dataclass(frozen=True)
class Expansion:
    """The size to which a part of a config expands: values and resolutions, characters, and depth."""

    values: int
    characters: int
    depth: int


@dataclass(frozen=True)
class _Interpolation:
    """An interpolation in a text, which refers to a node or calls a resolver.

    Attributes:
        dots: number of leading dots of a node's relative key.
        keys: parts of a node's key, each a text or an interpolation.
        resolver: name of the resolver; None for a node.
        arguments: interpolations in the arguments of the resolver.
        text: the arguments of the resolver as they are written.
    """

    dots: int = 0
    keys: tuple[str | _Interpolation, ...] = ()
    resolver: str | None = None
    arguments: tuple[_Interpolation, ...] = ()
    text: str = ""


def check_expansion(config: Any, hydra: Any = None, *, is_strict: bool = False) -> None:
    """Checks that a config expands to a bounded size.

    Args:
        config: an unresolved config, of OmegaConf or plain.
        hydra: Hydra's unresolved config, which `${hydra:...}` reads.
        is_strict: rejects a key that depends on the result of a resolver, as in `${a.${now:%S}}`, since it may name
            any node.
    Raises:
        ConfigError: naming the key, the size to which it expands, and the limit.
    """
    plain: Any = OmegaConf.to_container(config, resolve=False) if OmegaConf.is_config(config) else config
    keys = [key for key in plain if key != "hydra"]
    if hydra is not None:
        plain = {**plain, "hydra": hydra}
    _check_texts(plain)
    counter = _ExpansionCounter(plain, is_strict)
    _check_size((), "its interpolations expand to", _combine([counter.expand((key,)) for key in keys], 0))


def check_resolved_size(plain: Any) -> None:
    """Checks that a resolved config has a bounded size, and that its texts can be parsed quickly after escaping.

    Raises:
        ConfigError: naming the key, the size found, and the limit.
    """
    _check_texts(plain)
    characters = [_count_characters(value) for _, value in walk(plain)]
    _check_size((), "has", Expansion(len(characters), sum(characters), 0))


def _check_size(path: KeyPath, has: str, found: Expansion) -> None:
    if found.values > MAX_VALUES or found.characters > MAX_CHARACTERS:
        size = f"{_format_count(found.values)} values and {_format_count(found.characters)} characters"
        limit = f"expected {MAX_VALUES:,} and {MAX_CHARACTERS:,} at most"
        raise ConfigError(f"{_join(path)}: {has} {size}; {limit}")


def _count_characters(value: Any) -> int:
    """Returns the number of characters of a value; of a container, those of its keys alone."""
    if isinstance(value, (Mapping, list, tuple)):
        return sum(len(str(key)) for key in value) if isinstance(value, Mapping) else 0
    return len(value) if isinstance(value, (str, bytes)) else 16


def check_interpolated_text(text: str, key: str) -> None:
    """Checks that a text with interpolations can be parsed quickly and without exhausting Python's stack.

    Raises:
        ConfigError: naming the key, the length or depth found, and the limit.
    """
    if len(text) > MAX_TEXT_LENGTH:
        raise ConfigError(f"{key}: has {len(text):,} characters; one with interpolations may have {MAX_TEXT_LENGTH:,}")
    depth = 0
    for character in text:
        depth = max(depth + (character in "{[(") - (character in "}])"), 0)
        if depth > MAX_BRACKETS:
            raise ConfigError(f"{key}: its brackets are nested over {MAX_BRACKETS} deep")


def _check_texts(plain: Any) -> None:
    total = 0
    for path, value in walk(plain):
        if len(path) > 2 * MAX_DEPTH:
            raise ConfigError(f"{_join(path)[:80]}...: nested over {MAX_DEPTH} deep")
        if isinstance(value, str) and "${" in value:
            check_interpolated_text(value, _join(path))
            total += len(value)
    if total > MAX_TOTAL_TEXT_LENGTH:
        raise ConfigError(
            f"the texts with interpolations have {total:,} characters; expected {MAX_TOTAL_TEXT_LENGTH:,} at most"
        )


def walk(value: Any, path: KeyPath = ()) -> Iterator[tuple[KeyPath, Any]]:
    """Yields every value of nested mappings and lists with its path, the outermost first."""
    yield path, value
    is_list = isinstance(value, (list, tuple))
    children = value.items() if isinstance(value, Mapping) else enumerate(value) if is_list else ()
    for key, child in children:
        yield from walk(child, (*path, key))


class _ExpansionCounter:
    """Counts the expansion of the nodes of a config, each once.

    Args:
        plain: the unresolved config.
        is_strict: see `check_expansion`.
    """

    def __init__(self, plain: Any, is_strict: bool) -> None:
        self._plain = plain
        self._is_strict = is_strict
        self._counted: dict[KeyPath, Expansion] = {}
        self._entered: dict[KeyPath, None] = {}  # the nodes being expanded, outermost first

    def expand(self, path: KeyPath) -> Expansion:
        """Returns the expansion of the node at a path.

        Raises:
            ConfigError: the expansion is too large or too deep, or a node refers to itself.
        """
        if path in self._counted:
            return self._counted[path]
        if path in self._entered:
            entered = [*self._entered]
            cycle = [*entered[entered.index(path) :], path]
            steps = " -> ".join(_join(step) for step in cycle[-5:])
            raise ConfigError(f"{_join(path)}: its interpolation leads back to itself ({steps})")
        if len(self._entered) > 2 * MAX_DEPTH:
            raise ConfigError(f"{_join(path)}: its interpolations are nested over {MAX_DEPTH} deep")
        self._entered[path] = None
        expansion = self._expand(_get(self._plain, path), path)
        del self._entered[path]
        _check_size(path, "its interpolations expand to", expansion)
        if expansion.depth > MAX_DEPTH:
            raise ConfigError(f"{_join(path)}: it is nested over {MAX_DEPTH} deep, with its interpolations")
        self._counted[path] = expansion
        return expansion

    def _expand(self, value: Any, path: KeyPath) -> Expansion:
        if isinstance(value, (Mapping, list, tuple)):
            keys = value if isinstance(value, Mapping) else range(len(value))
            parts = [self.expand((*path, key)) for key in keys]
        else:
            pieces = _parse(value) if isinstance(value, str) else ()
            parts = [self._expand_interpolation(piece, path) for piece in pieces if isinstance(piece, _Interpolation)]
        return _combine(parts, _count_characters(value))

    def _expand_interpolation(self, interpolation: _Interpolation, path: KeyPath) -> Expansion:
        inner = [*interpolation.keys, *interpolation.arguments]
        parts = [self._expand_interpolation(piece, path) for piece in inner if isinstance(piece, _Interpolation)]
        target = self._target_of(interpolation, path)
        parts += [] if target is None else [self.expand(target)]
        total = _combine(parts, 0)
        if interpolation.resolver is None:
            # A container within a text is converted to text: about 4 characters more for each value.
            characters = total.characters + 4 * total.values
        else:
            characters = total.characters + _RESOLVER_CHARACTERS + len(interpolation.text)
        return Expansion(total.values, characters, max(total.depth - 1, 0))

    def _target_of(self, interpolation: _Interpolation, path: KeyPath, hops: int = 0) -> KeyPath | None:
        """Returns the path of the node that an interpolation or its resolver reads; None if it is unknown."""
        if hops > MAX_DEPTH:
            raise ConfigError(f"{_join(path)}: its interpolations are nested over {MAX_DEPTH} deep")
        if interpolation.resolver is not None:
            if interpolation.arguments or interpolation.resolver not in ("hydra", *_KEY_RESOLVERS):
                return None
            key = interpolation.text.partition(",")[0].strip().strip("'\"")
            return self._path_of_key(f"hydra.{key}" if interpolation.resolver == "hydra" else key, path, hops)
        keys = [key if isinstance(key, str) else self._text_of(key, path, hops) for key in interpolation.keys]
        known = [key for key in keys if key is not None]
        if len(known) < len(keys):
            return None
        return self._path_of_key("." * interpolation.dots + ".".join(known), path, hops)

    def _path_of_key(self, key: str, path: KeyPath, hops: int) -> KeyPath | None:
        """Returns the path of a dotted key that is read at `path`, following the interpolations that it passes."""
        names = key.lstrip(".")
        dots = len(key) - len(names)
        current: KeyPath = path[: max(len(path) - dots, 0)] if dots else ()
        for name in re.split(r"[.\[\]]+", names.rstrip("]")):
            parent = self._follow(current, hops)
            child = None if parent is None else self._child_path(parent, name)
            if child is None:
                return None
            current = child
        return current

    def _follow(self, path: KeyPath, hops: int) -> KeyPath | None:
        """Returns the path of a node, or of the node that it refers to if it is an interpolation; None if unknown."""
        value = _get(self._plain, path)
        if not isinstance(value, str) or "${" not in value:
            return path
        pieces = _parse(value)
        if len(pieces) != 1 or not isinstance(pieces[0], _Interpolation):
            return None
        target = self._target_of(pieces[0], path, hops + 1)
        return None if target is None else self._follow(target, hops + 1)

    def _child_path(self, path: KeyPath, key: str) -> KeyPath | None:
        parent = _get(self._plain, path)
        if isinstance(parent, (list, tuple)):
            is_index = re.fullmatch(r"-?\d{1,9}", key) is not None and -len(parent) <= int(key) < len(parent)
            return (*path, int(key) % len(parent)) if is_index else None
        if not isinstance(parent, Mapping):
            return None
        return next(((*path, name) for name in _possible_keys(key) if name in parent), None)

    def _text_of(self, interpolation: _Interpolation, path: KeyPath, hops: int) -> str | None:
        """Returns the value of an interpolation within a key, or None if it is unknown.

        Raises:
            ConfigError: it is unknown, and `is_strict`.
        """
        text: str | None = None
        target = self._target_of(interpolation, path, hops + 1)
        if target is not None:
            text = self._text_at(target, hops + 1)
        elif interpolation.resolver == "oc.env" and not interpolation.arguments:
            name, _, default = interpolation.text.partition(",")
            text = os.environ.get(name.strip(), default.strip())
        if text is None and (target is not None or interpolation.resolver is not None) and self._is_strict:
            raise ConfigError(f"{_join(path)}: expected an interpolation whose key other keys tell; write that key out")
        return text

    def _text_at(self, path: KeyPath, hops: int) -> str | None:
        value = _get(self._plain, path)
        if not isinstance(value, str):
            return str(value) if isinstance(value, (int, float)) else None
        pieces = _parse(value)
        texts = [piece if isinstance(piece, str) else self._text_of(piece, path, hops) for piece in pieces]
        known = [text for text in texts if text is not None and "\\" not in text]
        joined = "".join(known)
        return joined if len(known) == len(texts) and len(joined) <= MAX_TEXT_LENGTH else None


def _possible_keys(key: str) -> list[Any]:
    """Returns the keys that a part of an interpolation's key may mean: a text, a number or a bool."""
    number: list[Any] = [int(key)] if re.fullmatch(r"-?\d{1,18}", key) else []
    return [key, *number, *({"true": [True], "false": [False]}.get(key.lower(), []))]


def _get(nest: Any, path: KeyPath) -> Any:
    for key in path:
        nest = nest[key]
    return nest


def _combine(parts: list[Expansion], characters: int) -> Expansion:
    values = 1 + sum(part.values for part in parts)
    characters += sum(part.characters for part in parts)
    return Expansion(values, characters, max((part.depth for part in parts), default=-1) + 1)


def _join(path: KeyPath) -> str:
    return ".".join(map(str, path))[:200] or "the config"


def _format_count(number: int) -> str:
    return f"{number:,}" if number < 10**12 else "over 10^12"


@functools.lru_cache(4096)
def _parse(text: str) -> tuple[str | _Interpolation, ...]:
    """Returns the outermost interpolations of a text, and the texts between them.

    A text with invalid syntax is returned as one piece: OmegaConf reports the error when it resolves the text.
    """
    if "${" not in text:
        return (text,)
    if simple := _SIMPLE_INTERPOLATION.fullmatch(text):
        return (_Interpolation(len(simple[1]), tuple(simple[2].split("."))),)
    try:
        return tuple(piece for piece in _read_pieces(parse(text)) if piece != "<EOF>")
    except GrammarParseError:
        return (text,)


def _read_pieces(tree: Any) -> list[str | _Interpolation]:
    if isinstance(tree, Grammar.InterpolationNodeContext):
        key = tree.getText().removeprefix("${").strip()
        keys = tuple(itertools.chain.from_iterable(map(_read_pieces, tree.configKey())))
        return [_Interpolation(len(key) - len(key.lstrip(".")), keys)]
    children = getattr(tree, "children", None) or ()
    if isinstance(tree, Grammar.InterpolationResolverContext):
        inner = itertools.chain.from_iterable(map(_read_pieces, children[1:]))
        arguments = tuple(piece for piece in inner if isinstance(piece, _Interpolation))
        text = "".join(child.getText() for child in children[3:-1])
        return [_Interpolation(resolver=tree.resolverName().getText(), arguments=arguments, text=text)]
    return [*itertools.chain.from_iterable(map(_read_pieces, children))] if children else [tree.getText()]
