"""Random generators that objects hold, at any depth: found once, then reseeded all at once.

A dataset with a generator of its own draws alike in each loader worker, and begins again where a run goes on, unless
the generator is reseeded for each sample. A module's begins again too, unless it is reseeded for each forward.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import random
import sys
import types
import zlib
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from runner.utils.utils import derive_seed

_MOST_OBJECTS = 20_000
_MOST_ITEMS = 1000
_MOST_WATCHED = 32
_Place = tuple[dict[Any, Any], Any, Any]  # a table, its key, and what stood there


class Unsearched:
    """An object of this package that only refers to what other objects hold; no generator is looked for in it."""

    __slots__ = ()


_PLAIN = (str, bytes, bytearray, int, float, complex, types.NoneType, np.ndarray, np.generic, torch.Tensor, Unsearched)
_NAMING = (str, bytes, int, float, types.NoneType)  # keys whose repr is the same in every process
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_BARE = {*_CONTAINERS, OrderedDict, defaultdict}  # that hold nothing beside their items
_SIMPLE = {str, bytes, int, float, bool, types.NoneType}
_HOOKS = "_is_full_backward_hook"  # None in every module; it never holds an object
_TENSORS = ("_parameters", "_buffers", "_non_persistent_buffers_set")
_GLOBAL = {id(random._inst), id(np.random.mtrand._rand), id(torch.default_generator)}
_Generator = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


class HeldGenerators:
    """The generators of torch, NumPy and `random` that objects hold, the global ones aside.

    Searched are attributes, items, arguments of partials, and what functions and methods refer to by a closure, a
    default or a global name: some 20,000 objects at most beside modules, and of each container the first 1,000 items. A
    function of an installed package is not searched for globals. A generator that is made later is not found:
    `is_replaced` and `may_have_more` tell when to search again.

    Attributes:
        paths: where each generator is that `seed` reseeds.
        unseeded: where each generator is that can't be reseeded, such as a `SystemRandom`, or may be past the limit.
        sources: the generators at `paths`.
    """

    def __init__(self, **roots: Any) -> None:
        self.paths: list[str] = []
        self.unseeded: list[str] = []
        self.sources: list[Any] = []
        self._reseeds: list[tuple[Callable[[int], Any], int]] = []
        self._links = list[_Place]()
        self._tables = list[dict[Any, Any]]()  # of attributes
        long_containers: list[str] = []
        known = set(_GLOBAL)
        parents: dict[int, Any] = {}
        blanks = list[_Place]()
        for path, held in _walk(roots, long_containers, parents):
            if len(blanks) < _MOST_WATCHED:
                blanks += _find_blanks(held, self._tables)
            if not isinstance(held, _Generator):
                continue
            source = held.bit_generator if isinstance(held, np.random.Generator) else held
            if id(source) in known:
                continue
            known.add(id(source))
            reseed = _find_reseed(source)
            if reseed is None:
                self.unseeded.append(path)
            else:
                self.paths.append(path)
                self.sources.append(source)
                self._reseeds.append((reseed, zlib.crc32(path.encode())))
                self._links += _find_links(held, parents)
        self._links, self._blanks = self._links[:_MOST_WATCHED], blanks[:_MOST_WATCHED]
        self._sizes = list(map(len, self._tables))
        found = [*self.paths, *self.unseeded]
        self.unseeded += [
            f"{container}[{_MOST_ITEMS}:]"
            for container in long_containers
            if any(path.startswith(f"{container}[") for path in found)
        ]

    def is_replaced(self) -> bool:
        """Says whether another object stands where a generator, or what holds it, stood; of attributes and items."""
        for table, key, value in self._links:  # noqa: SIM110  # called for each sample: a loop is twice as fast
            if table.get(key) is not value:
                return True
        return False

    def may_have_more(self) -> bool:
        """Says whether an attribute was added, or set that was None: a generator may have been made since."""
        if list(map(len, self._tables)) != self._sizes:
            return True
        for table, key, value in self._blanks:  # noqa: SIM110
            if table.get(key) is not value:
                return True
        return False

    def find_new(self, absent: Any) -> list[_Place]:
        """Returns the places of attributes that were added or set, each with None, or else `absent` if it was added."""
        added = [
            (table, key, absent)
            for table, size in zip(self._tables, self._sizes, strict=True)
            for key in list(table)[size:]
        ]
        return added + [place for place in self._blanks if place[0].get(place[1]) is not None]

    def seed(self, seed: int) -> None:
        """Reseeds each generator from a seed and its own path."""
        for reseed, salt in self._reseeds:
            reseed(derive_seed(seed, salt))


def _find_links(held: Any, parents: dict[int, Any]) -> list[_Place]:
    """Returns the places that lead from the roots to an object, as far as they are attributes, items or globals."""
    links = []
    while (parent := parents.get(id(held))) is not None:
        table = _table_of(parent)
        links += [(table, key, value) for key, value in itertools.islice(table.items(), _MOST_ITEMS) if value is held]
        held = parent
    return links


def _find_blanks(held: Any, tables: list[dict[Any, Any]]) -> list[_Place]:
    """Returns the places of an object that hold None; notes the table of its attributes."""
    if isinstance(held, (dict, type, types.ModuleType)):
        return []
    table = _table_of(held)
    if isinstance(held, types.FunctionType):
        names = _names(held.__code__) if _is_own(str(held.__module__)) else []
        return [(table, name, None) for name in names if table.get(name, held) is None]
    if table and len(tables) < _MOST_WATCHED:
        tables.append(table)
    items = itertools.islice(table.items(), _MOST_ITEMS)
    return [(table, key, None) for key, value in items if value is None and key != _HOOKS]


def _table_of(held: Any) -> dict[Any, Any]:
    """Returns where an object has its items, globals or attributes by name; empty where it has no such."""
    if isinstance(held, types.FunctionType):
        return held.__globals__
    if isinstance(held, dict):
        return held
    try:
        table = object.__getattribute__(held, "__dict__")
    except AttributeError:
        return {}
    return table if isinstance(table, dict) else {}


def _find_reseed(source: Any) -> Callable[[int], Any] | None:
    """Returns a function that seeds a generator, or None if no seed decides what it draws."""
    if isinstance(source, torch.Generator):
        return source.manual_seed
    if isinstance(source, random.Random):
        return None if isinstance(source, random.SystemRandom) else source.seed
    is_legacy = isinstance(source, np.random.RandomState)
    bits = source._bit_generator if is_legacy else source
    if type(bits) is np.random.PCG64:  # the default one: built anew it takes 19 us, so 1 us
        return functools.partial(_reseed_pcg64, bits)
    if is_legacy and type(bits) is np.random.MT19937:
        return lambda seed: source.seed(seed & 0xFFFFFFFF)
    try:
        type(bits)(0)
    except TypeError:
        return None
    return functools.partial(_reseed_bits, source)


def _reseed_pcg64(bits: Any, seed: int) -> None:
    state = {"state": seed << 64 | derive_seed(seed), "inc": 1}
    bits.state = {"bit_generator": "PCG64", "state": state, "has_uint32": 0, "uinteger": 0}


def _reseed_bits(source: Any, seed: int) -> None:
    """Seeds a bit generator, or a RandomState around one that keeps half of a pair of normal numbers."""
    if isinstance(source, np.random.RandomState):
        source.set_state({**type(source._bit_generator)(seed).state, "has_gauss": 0, "gauss": 0.0})
    else:
        source.state = type(source)(seed).state


def _walk(roots: dict[str, Any], long_containers: list[str], parents: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    """Yields what roots hold with its path, the nearest first, each object once.

    Notes containers that are cut short, and by the id of each object what holds it.
    """
    queue: deque[tuple[str, Any]] = deque()
    seen: dict[int, Any] = {}  # holds the objects, so that no id comes again
    num_left, children = _MOST_OBJECTS, iter(roots.items())
    held: Any = None
    while True:
        for path, child in children:
            if id(child) in seen or isinstance(child, _PLAIN) or _has_nothing(child):
                continue
            if not isinstance(child, nn.Module):  # a model may have any number
                if not num_left:
                    continue
                num_left -= 1
            seen[id(child)] = child
            if held is not None:
                parents[id(child)] = held
            queue.append((path, child))
        if not queue:
            return
        path, held = queue.popleft()
        yield path, held
        if isinstance(held, _CONTAINERS) and len(held) > _MOST_ITEMS:
            long_containers.append(path)
        children = iter(()) if isinstance(held, _Generator) else _children(path, held)


def _has_nothing(value: Any) -> bool:
    """Says at once of most attributes of a module that they hold no object."""
    kind = type(value)
    if kind in _SIMPLE or (kind in _BARE and not value):
        return True
    return kind is tuple and len(value) < 9 and _SIMPLE.issuperset(map(type, value))


def _children(path: str, held: Any) -> Iterator[tuple[str, Any]]:
    """Yields what an object holds with its path; calls nothing of the object's own."""
    if isinstance(held, dict):
        for number, (key, item) in enumerate(itertools.islice(dict.items(held), _MOST_ITEMS)):
            yield f"{path}[{key!r}]" if isinstance(key, _NAMING) else f"{path}[#{number}]", item
    elif isinstance(held, (list, tuple, set, frozenset, deque)):
        yield from ((f"{path}[{i}]", item) for i, item in enumerate(itertools.islice(held, _MOST_ITEMS)))
    elif isinstance(held, functools.partial):
        yield from ((f"{path}.{name}", getattr(held, name)) for name in ("func", "args", "keywords"))
    elif isinstance(held, types.MethodType):
        yield from ((path, held.__self__), (path, held.__func__))
    elif isinstance(held, types.BuiltinMethodType):
        yield path, held.__self__
    elif isinstance(held, types.FunctionType):
        yield from _of_function(path, held)
    elif isinstance(held, type):
        yield from _of_class(held)
    if isinstance(held, (type, types.ModuleType, types.FunctionType)):
        return
    yield from ((f"{path}.{name}", value) for name, value in _attributes(held))
    yield path, type(held)


def _attributes(held: Any) -> Iterator[tuple[str, Any]]:
    """Yields an instance's attributes, those in slots too; of a module its parts by their names, and no parameters."""
    attributes: dict[str, Any] = {}
    with contextlib.suppress(AttributeError):
        attributes.update(object.__getattribute__(held, "__dict__"))
    if isinstance(held, nn.Module):
        for name in _TENSORS:
            attributes.pop(name, None)
        yield from (attributes.pop("_modules", None) or {}).items()
        attributes = {name: value for name, value in attributes.items() if not _has_nothing(value)}
    elif isinstance(held, torch.optim.Optimizer):
        attributes.pop("state", None)
        attributes.pop("param_groups", None)
    yield from attributes.items()
    for name, slot in _slots(type(held)):
        try:
            yield name, slot.__get__(held)
        except AttributeError:
            continue  # it holds nothing


def _slots(kind: type) -> list[tuple[str, Any]]:
    members = [item for each in kind.__mro__ if "__slots__" in vars(each) for item in vars(each).items()]
    return [(name, member) for name, member in members if isinstance(member, types.MemberDescriptorType)]


@functools.cache
def _is_own(module: str) -> bool:
    """Says whether a module is neither Python's nor an installed one: whose globals are the user's."""
    root = module.partition(".")[0]
    found = sys.modules.get(root)
    paths = [getattr(found, "__file__", None) or "", *getattr(found, "__path__", [])]
    is_installed = any("site-packages" in path or "dist-packages" in path for path in paths)
    return not is_installed and root not in sys.stdlib_module_names


def _of_class(kind: type) -> Iterator[tuple[str, Any]]:
    for each in kind.__mro__:
        if _is_own(str(each.__module__)):
            for name, member in vars(each).items():
                function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                yield f"{each.__qualname__}.{name}", function


def _of_function(path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields what a function refers to: its closure, defaults, and globals by the names that its code uses."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            yield f"{path}.{name}", cell.cell_contents
        except ValueError:
            continue  # not bound yet
    yield from ((path, each) for each in function.__defaults__ or ())
    yield from ((f"{path}.{name}", each) for name, each in (function.__kwdefaults__ or {}).items())
    names = _names(function.__code__) if _is_own(str(function.__module__)) else []
    for name in names:
        held = function.__globals__.get(name)
        if not isinstance(held, types.ModuleType):
            yield f"{function.__module__}.{name}", held
        elif _is_own(held.__name__):
            yield from ((f"{held.__name__}.{each}", vars(held).get(each)) for each in names)


def _names(code: types.CodeType) -> list[str]:
    """Returns the names that a function's code uses, and that of functions inside of it."""
    names = list(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names += _names(constant)
    return names
