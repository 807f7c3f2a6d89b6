"""Search for the random generators that objects refer to, at any depth, to reseed them together.

A dataset's own generator would give the same numbers in each loader worker and restart when a run is resumed, so it is
reseeded for each sample. Likewise a module's generator is reseeded for each forward.
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

_MAX_OBJECTS = 20_000
_MAX_ITEMS = 1000
_MAX_WATCHED = 32
_Reference = tuple[dict[Any, Any], Any, Any]  # a dict, a key of it, and the value at the time of the search


class Unsearched:
    """Base of classes of this package that only refer to objects of others: they are not searched."""

    __slots__ = ()


_PLAIN = (str, bytes, bytearray, int, float, complex, types.NoneType, np.ndarray, np.generic, torch.Tensor, Unsearched)
_STABLE_KEYS = (str, bytes, int, float, types.NoneType)  # types of keys whose repr is the same in every process
_CONTAINERS = (dict, list, tuple, set, frozenset, deque)
_BARE = {*_CONTAINERS, OrderedDict, defaultdict}  # containers without attributes
_SIMPLE = {str, bytes, int, float, bool, types.NoneType}
_HOOKS = "_is_full_backward_hook"  # an attribute that is None in every module and never an object
_TENSORS = ("_parameters", "_buffers", "_non_persistent_buffers_set")
_GLOBAL = {id(random._inst), id(np.random.mtrand._rand), id(torch.default_generator)}
_Generator = (torch.Generator, random.Random, np.random.Generator, np.random.RandomState, np.random.BitGenerator)


class ObjectGenerators:
    """The generators of torch, NumPy and `random` that objects refer to, except the global ones.

    The search follows attributes, items, arguments of partials, and the closures, defaults and globals of functions and
    methods; globals only of the user's own modules, not of installed packages. It is limited to 20,000 objects, not
    counting modules, and to the first 1,000 items of each container. Generators created later are not found:
    `is_replaced` and `may_have_more` report that a new search is needed.

    Args:
        roots: the objects to search, by the name with which their paths begin.
    Attributes:
        paths: paths of the generators that `seed` reseeds.
        sources: the generators at `paths`.
        unseeded: paths of generators that can't be reseeded, such as a `SystemRandom`, and of containers with
            generators that have more items than are searched.
    """

    def __init__(self, **roots: Any) -> None:
        self.paths: list[str] = []
        self.unseeded: list[str] = []
        self.sources: list[Any] = []
        self._reseeds: list[tuple[Callable[[int], Any], int]] = []
        self._path_references = list[_Reference]()
        self._namespaces = list[dict[Any, Any]]()
        long_containers: list[str] = []
        known = set(_GLOBAL)
        parents: dict[int, Any] = {}
        none_references = list[_Reference]()
        for path, obj in _walk(roots, long_containers, parents):
            if len(none_references) < _MAX_WATCHED:
                none_references += _find_none_references(obj, self._namespaces)
            if not isinstance(obj, _Generator):
                continue
            source = obj.bit_generator if isinstance(obj, np.random.Generator) else obj
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
                self._path_references += _find_path_references(obj, parents)
        self._path_references, self._none_references = (
            self._path_references[:_MAX_WATCHED],
            none_references[:_MAX_WATCHED],
        )
        self._sizes = list(map(len, self._namespaces))
        all_paths = [*self.paths, *self.unseeded]
        for container in long_containers:
            if any(path.startswith(f"{container}[") for path in all_paths):
                self.unseeded.append(f"{container}[{_MAX_ITEMS}:]")

    def is_replaced(self) -> bool:
        """Returns whether a generator, or an object on the path to it, was replaced in an attribute or item."""
        for namespace, key, value in self._path_references:  # noqa: SIM110  # called for each sample: a loop is twice as fast
            if namespace.get(key) is not value:
                return True
        return False

    def may_have_more(self) -> bool:
        """Returns whether an attribute was added, or set that was None: it may be a new generator."""
        if list(map(len, self._namespaces)) != self._sizes:
            return True
        for namespace, key, value in self._none_references:  # noqa: SIM110
            if namespace.get(key) is not value:
                return True
        return False

    def find_new(self, absent: Any) -> list[_Reference]:
        """Returns references to attributes that were added or set since, with the value before: `absent` or None."""
        added = [
            (namespace, key, absent)
            for namespace, size in zip(self._namespaces, self._sizes, strict=True)
            for key in list(namespace)[size:]
        ]
        return added + [reference for reference in self._none_references if reference[0].get(reference[1]) is not None]

    def seed(self, seed: int) -> None:
        """Reseeds each generator from a seed and its path."""
        for reseed, salt in self._reseeds:
            reseed(derive_seed(seed, salt))


def _find_path_references(obj: Any, parents: dict[int, Any]) -> list[_Reference]:
    """Returns the references on the path from a root to an object: attributes, items of dicts, and globals."""
    references = []
    while (parent := parents.get(id(obj))) is not None:
        namespace = _namespace_of(parent)
        references += [
            (namespace, key, value) for key, value in itertools.islice(namespace.items(), _MAX_ITEMS) if value is obj
        ]
        obj = parent
    return references


def _find_none_references(obj: Any, namespaces: list[dict[Any, Any]]) -> list[_Reference]:
    """Returns the attributes of an object that are None; adds its namespace to `namespaces`."""
    if isinstance(obj, (dict, type, types.ModuleType)):
        return []
    namespace = _namespace_of(obj)
    if isinstance(obj, types.FunctionType):
        names = _names_used(obj.__code__) if _is_user_module(str(obj.__module__)) else []
        return [(namespace, name, None) for name in names if namespace.get(name, obj) is None]
    if namespace and len(namespaces) < _MAX_WATCHED:
        namespaces.append(namespace)
    items = itertools.islice(namespace.items(), _MAX_ITEMS)
    return [(namespace, key, None) for key, value in items if value is None and key != _HOOKS]


def _namespace_of(obj: Any) -> dict[Any, Any]:
    """Returns a dict itself, the globals of a function, or the `__dict__` of another object; empty if it has none."""
    if isinstance(obj, types.FunctionType):
        return obj.__globals__
    if isinstance(obj, dict):
        return obj
    try:
        namespace = object.__getattribute__(obj, "__dict__")
    except AttributeError:
        return {}
    return namespace if isinstance(namespace, dict) else {}


def _find_reseed(source: Any) -> Callable[[int], Any] | None:
    if isinstance(source, torch.Generator):
        return source.manual_seed
    if isinstance(source, random.Random):
        return None if isinstance(source, random.SystemRandom) else source.seed
    is_legacy = isinstance(source, np.random.RandomState)
    bits = source._bit_generator if is_legacy else source
    if type(bits) is np.random.PCG64:  # the default: setting its state takes 1 us, a new one 19 us
        return functools.partial(_reseed_pcg64, bits)
    if is_legacy and type(bits) is np.random.MT19937:
        return lambda seed: source.seed(seed & 0xFFFFFFFF)
    try:
        type(bits)(0)
    except TypeError:
        return None
    return functools.partial(_reseed_bits, source)


def _reseed_pcg64(bits: Any, seed: int) -> None:
    bits.state = {
        "bit_generator": "PCG64",
        "state": {"state": seed << 64 | derive_seed(seed), "inc": 1},
        "has_uint32": 0,
        "uinteger": 0,
    }


def _reseed_bits(source: Any, seed: int) -> None:
    """Seeds a bit generator, or a RandomState, which may also keep a spare normal number."""
    if isinstance(source, np.random.RandomState):
        source.set_state({**type(source._bit_generator)(seed).state, "has_gauss": 0, "gauss": 0.0})
    else:
        source.state = type(source)(seed).state


def _walk(roots: dict[str, Any], long_containers: list[str], parents: dict[int, Any]) -> Iterator[tuple[str, Any]]:
    """Yields the objects that roots refer to with their paths, breadth first, each object once.

    Adds the paths of containers that are not searched completely to `long_containers`, and the parent of each object by
    the object's id to `parents`.
    """
    queue: deque[tuple[str, Any]] = deque()
    seen: dict[int, Any] = {}  # keeps the objects alive, so that ids are unique
    num_left, children = _MAX_OBJECTS, iter(roots.items())
    obj: Any = None
    while True:
        for path, child in children:
            if id(child) in seen or isinstance(child, _PLAIN) or _is_plain(child):
                continue
            if not isinstance(child, nn.Module):  # modules are not limited
                if not num_left:
                    continue
                num_left -= 1
            seen[id(child)] = child
            if obj is not None:
                parents[id(child)] = obj
            queue.append((path, child))
        if not queue:
            return
        path, obj = queue.popleft()
        yield path, obj
        if isinstance(obj, _CONTAINERS) and len(obj) > _MAX_ITEMS:
            long_containers.append(path)
        children = iter(()) if isinstance(obj, _Generator) else _children(path, obj)


def _is_plain(value: Any) -> bool:
    """Returns whether a value surely refers to no object to search; true for most attributes of a module."""
    kind = type(value)
    return (
        kind in _SIMPLE
        or (kind in _BARE and not value)
        or (kind is tuple and len(value) < 9 and _SIMPLE.issuperset(map(type, value)))
    )


def _children(path: str, obj: Any) -> Iterator[tuple[str, Any]]:
    """Yields the objects that an object refers to with their paths; calls none of its methods."""
    if isinstance(obj, dict):
        for number, (key, item) in enumerate(itertools.islice(dict.items(obj), _MAX_ITEMS)):
            yield f"{path}[{key!r}]" if isinstance(key, _STABLE_KEYS) else f"{path}[#{number}]", item
    elif isinstance(obj, (list, tuple, set, frozenset, deque)):
        yield from ((f"{path}[{i}]", item) for i, item in enumerate(itertools.islice(obj, _MAX_ITEMS)))
    elif isinstance(obj, functools.partial):
        yield from ((f"{path}.{name}", getattr(obj, name)) for name in ("func", "args", "keywords"))
    elif isinstance(obj, types.MethodType):
        yield from ((path, obj.__self__), (path, obj.__func__))
    elif isinstance(obj, types.BuiltinMethodType):
        yield path, obj.__self__
    elif isinstance(obj, types.FunctionType):
        yield from _function_references(path, obj)
    elif isinstance(obj, type):
        yield from _class_members(obj)
    if isinstance(obj, (type, types.ModuleType, types.FunctionType)):
        return
    yield from ((f"{path}.{name}", value) for name, value in _attributes(obj))
    yield path, type(obj)


def _attributes(obj: Any) -> Iterator[tuple[str, Any]]:
    """Yields an instance's attributes, including slots; for a module its submodules, and no parameters or buffers."""
    attributes: dict[str, Any] = {}
    with contextlib.suppress(AttributeError):
        attributes.update(object.__getattribute__(obj, "__dict__"))
    if isinstance(obj, nn.Module):
        yield from (attributes.pop("_modules", None) or {}).items()
        attributes = {
            name: value for name, value in attributes.items() if name not in _TENSORS and not _is_plain(value)
        }
    elif isinstance(obj, torch.optim.Optimizer):
        attributes.pop("state", None)
        attributes.pop("param_groups", None)
    yield from attributes.items()
    for name, slot in _slots(type(obj)):
        with contextlib.suppress(AttributeError):  # an empty slot
            yield name, slot.__get__(obj)


def _slots(kind: type) -> list[tuple[str, Any]]:
    members = [item for base in kind.__mro__ if "__slots__" in vars(base) for item in vars(base).items()]
    return [(name, member) for name, member in members if isinstance(member, types.MemberDescriptorType)]


@functools.cache
def _is_user_module(module: str) -> bool:
    """Returns whether a Python module is the user's: neither of the standard library nor an installed package."""
    root = module.partition(".")[0]
    package = sys.modules.get(root)
    paths = [getattr(package, "__file__", None) or "", *getattr(package, "__path__", [])]
    is_installed = any("site-packages" in path or "dist-packages" in path for path in paths)
    return not is_installed and root not in sys.stdlib_module_names


def _class_members(kind: type) -> Iterator[tuple[str, Any]]:
    for base in kind.__mro__:
        if _is_user_module(str(base.__module__)):
            for name, member in vars(base).items():
                function = member.__func__ if isinstance(member, (classmethod, staticmethod)) else member
                yield f"{base.__qualname__}.{name}", function


def _function_references(path: str, function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    """Yields the closure and defaults of a function, and the globals that its code uses by name."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        with contextlib.suppress(ValueError):  # an unbound cell
            yield f"{path}.{name}", cell.cell_contents
    yield from ((path, default) for default in function.__defaults__ or ())
    yield from ((f"{path}.{name}", default) for name, default in (function.__kwdefaults__ or {}).items())
    names = _names_used(function.__code__) if _is_user_module(str(function.__module__)) else []
    for name in names:
        obj = function.__globals__.get(name)
        if not isinstance(obj, types.ModuleType):
            yield f"{function.__module__}.{name}", obj
        elif _is_user_module(obj.__name__):
            yield from ((f"{obj.__name__}.{used}", vars(obj).get(used)) for used in names)


def _names_used(code: types.CodeType) -> list[str]:
    inner_functions = [constant for constant in code.co_consts if isinstance(constant, types.CodeType)]
    return [*code.co_names, *itertools.chain.from_iterable(map(_names_used, inner_functions))]
