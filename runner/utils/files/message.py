"""Encodes plain values as JSON, and decodes them to equal values of the same types.

The processes of a run send such messages to each other. Unlike a pickle, a message executes nothing when it is decoded.
"""

from __future__ import annotations

import json
from array import array
from base64 import b64decode, b64encode
from pathlib import Path
from typing import Any

# Keys of the objects that stand for what JSON lacks, or writes at length.
_TUPLE, _BYTES, _PATH, _ITEMS, _FLOATS = "_tuple_", "_bytes_", "_path_", "_items_", "_floats_"
_MARKS = frozenset((_TUPLE, _BYTES, _PATH, _ITEMS, _FLOATS))
_SCALARS = frozenset((bool, int, float, str, type(None)))


def encode(value: Any) -> bytes:
    """Returns a nest of None, bools, numbers, texts, bytes, paths, lists, tuples and dicts as a message.

    A number of NumPy and a tensor with one element become Python's; a named tuple becomes a tuple.

    Raises:
        TypeError: something in it is of another type.
        ValueError: it is nested too deeply, or a number has thousands of digits.
    """
    try:
        text = _ENCODER.encode(_mark(value))
    except RecursionError:
        raise ValueError("the message is nested too deeply") from None
    # A lone surrogate is a character of Python's that JSON's own escapes could join to its neighbour.
    return text.encode("utf-8", "surrogatepass")


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _mark(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    if isinstance(value, list):
        return _mark_list(value)
    if isinstance(value, dict):
        if all(type(key) is str for key in value) and _MARKS.isdisjoint(value):
            return {key: _mark(child) for key, child in value.items()}
        return {_ITEMS: [[_mark(key), _mark(child)] for key, child in value.items()]}
    if isinstance(value, tuple):
        return {_TUPLE: [_mark(child) for child in value]}
    if isinstance(value, bytes):
        return {_BYTES: b64encode(value).decode()}
    if isinstance(value, Path):
        return {_PATH: str(value)}
    plain = _to_python(value)
    if type(plain) not in _SCALARS:
        raise TypeError(f"a message can't hold a {type(value).__module__}.{type(value).__qualname__}")
    return plain


def _to_python(value: Any) -> Any:
    try:
        return value.item()
    except (AttributeError, ValueError, RuntimeError):  # it has none, or many elements
        return value


def _mark_list(values: list[Any]) -> Any:
    types = set(map(type, values))
    if types == {float}:
        return {_FLOATS: b64encode(array("d", values)).decode()}
    return values if types <= _SCALARS else [_mark(child) for child in values]


def decode(data: bytes) -> Any:
    """Returns the value of which `encode` made a message.

    Raises:
        ValueError: `encode` did not make it.
    """
    try:
        return _DECODER.decode(data.decode("utf-8", "surrogatepass"))
    except RecursionError:
        raise ValueError("the message is nested too deeply") from None
    except TypeError as error:
        raise ValueError(f"a mark in the message has content of another type: {error}") from error


def _unmark(value: dict[str, Any]) -> Any:
    """Returns what an object of JSON stands for; its children have been unmarked."""
    if len(value) != 1 or _MARKS.isdisjoint(value):
        return value
    ((mark, content),) = value.items()
    if mark == _TUPLE:
        return tuple(content)
    if mark == _PATH:
        return Path(content)
    if mark == _ITEMS:
        return dict(content)
    data = b64decode(content, validate=True)
    return data if mark == _BYTES else array("d", data).tolist()


_DECODER = json.JSONDecoder(object_hook=_unmark)
