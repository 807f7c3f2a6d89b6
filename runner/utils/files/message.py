"""Messages between the processes of a run: plain values encoded as JSON.

Decoding gives equal values of the same types and, unlike unpickling, executes nothing.
"""

from __future__ import annotations

import json
from array import array
from base64 import b64decode, b64encode
from contextlib import suppress
from pathlib import Path
from typing import Any

# Keys of JSON objects that encode the types that JSON lacks. Lists of floats are encoded as bytes, which is shorter.
_TUPLE, _BYTES, _PATH, _ITEMS, _FLOATS = "_tuple_", "_bytes_", "_path_", "_items_", "_floats_"
_MARKS = frozenset((_TUPLE, _BYTES, _PATH, _ITEMS, _FLOATS))
_SCALARS = frozenset((bool, int, float, str, type(None)))


def encode(value: Any) -> bytes:
    """Encodes nested dicts, lists and tuples of None, bool, int, float, str, bytes and Path.

    A NumPy scalar or a tensor with one element becomes a Python number; a named tuple becomes a tuple.

    Raises:
        TypeError: the value contains another type.
        ValueError: the value is nested too deeply, or an integer has thousands of digits.
    """
    try:
        text = _ENCODER.encode(_mark(value))
    except RecursionError:
        raise ValueError("the message is nested too deeply") from None
    # Escaped as JSON, two lone surrogates in a row would be decoded as one character.
    return text.encode("utf-8", "surrogatepass")


_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"))


def _mark(value: Any) -> Any:
    if type(value) in _SCALARS:
        return value
    match value:
        case list():
            return _mark_list(value)
        case dict() if all(type(key) is str for key in value) and _MARKS.isdisjoint(value):
            return {key: _mark(child) for key, child in value.items()}
        case dict():
            return {_ITEMS: [[_mark(key), _mark(child)] for key, child in value.items()]}
        case tuple():
            return {_TUPLE: [_mark(child) for child in value]}
        case bytes():
            return {_BYTES: b64encode(value).decode()}
        case Path():
            return {_PATH: str(value)}
    with suppress(AttributeError, ValueError, RuntimeError):  # not a scalar, or several elements
        if type(plain := value.item()) in _SCALARS:
            return plain
    raise TypeError(f"a message can't hold a {type(value).__module__}.{type(value).__qualname__}")


def _mark_list(values: list[Any]) -> Any:
    types = set(map(type, values))
    if types == {float}:
        return {_FLOATS: b64encode(array("d", values)).decode()}
    return values if types <= _SCALARS else [_mark(child) for child in values]


def decode(data: bytes) -> Any:
    """Decodes a message of `encode`.

    Raises:
        ValueError: `encode` did not write the message.
    """
    try:
        return _DECODER.decode(data.decode("utf-8", "surrogatepass"))
    except RecursionError:
        raise ValueError("the message is nested too deeply") from None
    except TypeError as error:
        raise ValueError(f"a mark in the message has content of another type: {error}") from error


def _unmark(value: dict[str, Any]) -> Any:
    """Returns the value that a JSON object encodes; its children are already decoded."""
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
