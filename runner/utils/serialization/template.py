"""Flattens a state again that has the keys, types and shapes of an earlier one.

Between two saves of a run, the contents of tensors change, and a few numbers. A template keeps the rest of the
encoding; to compare a state with it takes a tenth of the time of flattening the state.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from itertools import chain, islice
from typing import Any

from torch import Tensor

from runner.utils.serialization.flatten import MAPPINGS, TENSORS, Encoding, FlattenedState, KeyPath

_MAPPINGS = {*MAPPINGS.values()}
_CONTAINERS = {*_MAPPINGS, list, tuple}
_SEARCHED = {*_CONTAINERS, *TENSORS}
_EXACT_KEYS = {str, int, bool, type(None)}  # of one type, equal keys are the same: 0.0 equals -0.0
_LARGE_SHARE = 0.01  # of all tensors


class ChangedError(Exception):
    """A state differs from its template in more than numbers and contents of tensors."""


class _InexactKeyError(Exception):
    """A dict has a key that may equal another one."""


class Template:
    """The encoding of a state, or of the leading items of a dict.

    These are the items up to the last one with a large share of the tensors. The rest, such as the metrics since the
    last log, is flattened each time.

    Attributes:
        names: of the tensors of the leading items, in the order of the value; tied tensors have the same name.
        objects, raw: the entries of the document for these tensors.
    """

    def __init__(self, value: Any, root: _Container, num_items: int | None, objects: list[Any], raw: Any) -> None:
        tensors: list[Tensor] = []
        root.repeat(value, tensors)
        self.names: list[str] = [objects[index]["name"] for index in root.indices]
        self.objects = objects[: max(root.indices) + 1]
        self.raw = {name: raw[name] for name in self.names if name in raw}
        self._root = root
        self._num_items = num_items
        self._facts = [(tensor.shape, tensor.dtype, tensor.requires_grad) for tensor in tensors]
        pointers = [*map(Tensor.data_ptr, tensors)]
        counts = Counter(pointers)
        self._num_pointers = len(counts)
        self._shared = [position for position, pointer in enumerate(pointers) if counts[pointer] > 1]
        self._ties = self._describe_ties(tensors)

    @classmethod
    def record(cls, value: Any, state: FlattenedState) -> Template | None:
        """Returns the template of a value that was flattened to `state`.

        None if it has no tensors, parts that are always flattened, such as shards and sparse tensors, or keys of other
        types than str, int, bool and None.
        """
        if not state.is_picklable or state.dtensors:
            return None
        try:
            root = _record(value, state.document["tree"], ())
        except _InexactKeyError:
            return None
        if not isinstance(root, _Container):
            return None
        num_items = None
        if type(value) is dict:
            num_items = root.count_leading()
            value = dict(islice(value.items(), num_items))
            root = root.leading(value)
        return cls(value, root, num_items, state.document["objects"], state.document["raw"])

    def positions_of(self, names: Sequence[str]) -> list[int]:
        """Returns the position of each name in `names`; of a tie, the last one."""
        positions = {name: position for position, name in enumerate(self.names)}
        return [positions[name] for name in names]

    def _split(self, value: Any) -> tuple[Any, dict[Any, Any]]:
        """Returns the leading items and the rest."""
        if self._num_items is None:
            return value, {}
        if type(value) is not dict:
            raise ChangedError
        items = [*value.items()]
        return dict(items[: self._num_items]), dict(items[self._num_items :])

    def repeat(self, value: Any, leading_tensors: dict[str, Tensor]) -> tuple[FlattenedState, list[Tensor]]:
        """Returns a value flattened again, and the tensors that correspond to `names`.

        Args:
            leading_tensors: by name; they are the first ones of the result.
        Raises:
            ChangedError: the value must be flattened without the template.
        """
        leading, rest = self._split(value)
        tensors: list[Tensor] = []
        tree = self._root.repeat(leading, tensors)
        pointers = self._compare(tensors)
        state = _flatten(rest, (), Encoding(leading_tensors, self.objects, self.raw))
        num_leading = len(leading_tensors)
        is_shared = any(tensor.data_ptr() in pointers for tensor in islice(state.tensors.values(), num_leading, None))
        if state.dtensors or is_shared:
            raise ChangedError
        if rest:
            tree = {"dict": [*tree["dict"], *state.document["tree"]["dict"]]}
        state.document["tree"] = tree
        return state, tensors

    def _compare(self, tensors: Sequence[Tensor]) -> set[int | None]:
        """Returns the addresses of tensors.

        Raises:
            ChangedError: other types, or others of them are the same or share memory.
        """
        pairs = zip(tensors, self._facts, strict=True)
        try:
            # In one pass: most of its time is that to load each tensor into the cache of the processor.
            pointers = [
                tensor.data_ptr()
                if tensor.shape == shape and tensor.dtype is dtype and tensor.requires_grad is requires_grad
                else None
                for tensor, (shape, dtype, requires_grad) in pairs
            ]
        except RuntimeError:  # sparse or nested
            raise ChangedError from None
        distinct = {*pointers}
        # With as many addresses, and the same ties where an address was repeated, all others are still distinct.
        has_meta = 0 in distinct and any(tensor.is_meta for tensor in tensors)
        if (
            None in distinct
            or has_meta
            or len(distinct) != self._num_pointers
            or self._describe_ties(tensors) != self._ties
        ):
            raise ChangedError
        return distinct

    def _describe_ties(self, tensors: Sequence[Tensor]) -> list[tuple[Any, ...]]:
        """Returns for each tensor that shares its address which it is, and which part of its memory it has."""
        shared = [tensors[position] for position in self._shared]
        addresses = _number(map(Tensor.data_ptr, shared))
        objects = _number(map(id, shared))
        views = [(tensor.stride(), tensor.is_conj(), tensor.is_neg()) for tensor in shared]
        return [*zip(addresses, objects, views, strict=True)]


def _number(values: Iterable[int]) -> list[int]:
    """Returns each value's number in the order of their first occurrence."""
    numbers: dict[int, int] = {}
    return [numbers.setdefault(value, len(numbers)) for value in values]


def _flatten(value: Any, path: KeyPath, leading: Encoding | None = None) -> FlattenedState:
    """Returns a flattened value; errors are those of the whole state, which is then flattened."""
    try:
        return FlattenedState(value, path, leading)
    except (TypeError, ValueError):
        raise ChangedError from None


class _Plain:
    """A value without tensors, which is encoded each time."""

    indices: Sequence[int] = ()

    def __init__(self, node: Any, path: KeyPath) -> None:
        self.node = node
        self._path = path

    def repeat(self, value: Any, tensors: list[Tensor]) -> Any:
        """Returns the value as plain JSON."""
        kind = type(value)
        if kind is str or kind is bool or value is None or (kind is float and math.isfinite(value)):
            return value
        state = _flatten(value, self._path)
        if state.tensors or not state.is_picklable:
            raise ChangedError
        return state.document["tree"]


class _Tensor:
    """A tensor of a container."""

    def __init__(self, node: Any) -> None:
        self.node = node
        self.indices: Sequence[int] = (node["tensor"],)

    def repeat(self, value: Any, tensors: list[Tensor]) -> Any:
        """Adds the tensor to a list."""
        tensors.append(value)
        return self.node


class _Container:
    """The encoding of a container with tensors, by the keys and the types of its items.

    Args:
        node: the encoding.
        parts: those of the items.
    Attributes:
        indices: of the tensors among the document's objects, in the order of the container.
    """

    def __init__(self, value: Any, node: Any, parts: Sequence[_Part]) -> None:
        self.node = node
        self.indices: Sequence[int] = [*chain.from_iterable(part.indices for part in parts)]
        self._kind = type(value)
        self._is_mapping = self._kind in _MAPPINGS
        self._keys = list(value) if self._is_mapping else []
        self._key_types = list(map(type, self._keys))
        self._types = list(map(type, _items_of(value)))
        self._parts = parts
        self._has_only_tensors = all(isinstance(part, _Tensor) for part in parts)

    def count_leading(self) -> int:
        """Returns the number of items up to the last one with a large share of the tensors; all, if none has one."""
        least = max(2, len(self.indices) * _LARGE_SHARE)
        large = [number for number, part in enumerate(self._parts, 1) if len(part.indices) >= least]
        return large[-1] if large else len(self._parts)

    def leading(self, value: dict[Any, Any]) -> _Container:
        """Returns the encoding of `value`, which is the first items of the dict."""
        return _Container(value, {"dict": self.node["dict"][: len(value)]}, self._parts[: len(value)])

    def repeat(self, value: Any, tensors: list[Tensor]) -> Any:
        """Returns the encoding of a value, `node` itself if it is the same, and adds its tensors to a list.

        Raises:
            ChangedError: its keys or types differ.
        """
        if type(value) is not self._kind:
            raise ChangedError
        if self._is_mapping and (list(value) != self._keys or list(map(type, value)) != self._key_types):
            raise ChangedError
        items = _items_of(value)
        if list(map(type, items)) != self._types:
            raise ChangedError
        if self._has_only_tensors:
            tensors += items
            return self.node
        changed: dict[int, Any] = {}
        for index, (part, item) in enumerate(zip(self._parts, items, strict=True)):
            if (node := part.repeat(item, tensors)) is not part.node:
                changed[index] = node
        return self._replace(changed) if changed else self.node

    def _replace(self, changed: dict[int, Any]) -> Any:
        """Returns the encoding with other encodings of some items."""
        body = [*_body_of(self.node, self._kind)]
        for index, node in changed.items():
            body[index] = [body[index][0], node] if self._is_mapping else node
        return body if self._kind is list else {self._kind.__name__: body}


_Part = _Plain | _Tensor | _Container


def _record(value: Any, node: Any, path: KeyPath) -> _Part:
    """Returns the encoding of a value without composite values.

    Raises:
        _InexactKeyError: a dict with tensors or containers has keys whose equality does not make them the same.
    """
    kind = type(value)
    if kind in TENSORS:
        return _Tensor(node)
    items = _items_of(value) if kind in _CONTAINERS else ()
    if not _SEARCHED.isdisjoint(map(type, items)):
        is_mapping = kind in _MAPPINGS
        body = _body_of(node, kind)
        keys = list(value) if is_mapping else range(len(items))
        if not _EXACT_KEYS.issuperset(map(type, keys)):
            raise _InexactKeyError
        nodes = [pair[1] for pair in body] if is_mapping else body
        entries = zip(keys, items, nodes, strict=True)
        parts = [_record(item, item_node, (*path, key)) for key, item, item_node in entries]
        if any(part.indices for part in parts):
            return _Container(value, node, parts)
    return _Plain(node, path)


def _items_of(container: Any) -> Sequence[Any]:
    return list(container.values()) if type(container) in _MAPPINGS else container


def _body_of(node: Any, kind: type) -> list[Any]:
    body: list[Any] = node if kind is list else node[kind.__name__]
    return body
