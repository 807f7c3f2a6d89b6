"""Checks a `.pt` file before torch reads it, and the value after: neither may take more memory than the file has bytes.

Torch's `weights_only` reader runs no code, but it inflates compressed members, and a few bytes of its pickle may ask
for any amount of memory. Imports torch and the standard library.

Source: the layout of the end of a zip archive, APPNOTE 4.3.14 to 4.3.16,
https://pkware.cachefly.net/webdocs/casestudies/APPNOTE.TXT
"""

from __future__ import annotations

import os
import pickletools
import struct
import zipfile
from collections.abc import Iterator, Mapping
from typing import Any, BinaryIO

import torch
from torch import Tensor

_END = struct.Struct("<4s4H2LH")  # signature, 2 disks, 2 counts, size and place of the directory, length of a comment
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END_NAME, _END_64_NAME, _LOCATOR_NAME = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_MAX_MEMBERS = 1_000_000
_MAX_DEPTH = 200
_SPARE_BYTES = 64 << 20
_MOST_SHARED = 16  # times that the bytes of a file, or its values, may be referred to
_SPARE_VALUES = 1_000_000
_NUM_LEGACY_PICKLES = 5
_BYTES = ("bytes",)  # stands for what a call of `_codecs.encode` returns
_TEXT_CODECS = ("latin1", "latin-1")


def check_archive(file: BinaryIO) -> None:
    """Checks that reading the members of a `.pt` file takes no more memory than the file has bytes.

    Torch wrote another format before 1.6, a few pickles one after the other; of it the pickles are checked.

    Raises:
        ValueError: what of it is not as torch writes it.
        OSError: the disk refuses.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if not is_zip:
        _check_pickles(file, _NUM_LEGACY_PICKLES)
        return
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        _check_members(archive.infolist(), size)
        for name in archive.namelist():
            if name.endswith("data.pkl") and _has_calls(content := archive.read(name)):
                _check_calls(pickletools.genops(content))


def _check_directory(file: BinaryIO, size: int) -> None:
    """Checks that every reader of the archive finds the same directory, and that it is not too long.

    Raises:
        ValueError: naming the fault.
    """
    end = _read(file, _END, size - _END.size)
    if end is None or end[0] != _END_NAME or end[7]:
        raise ValueError("its archive does not end as torch ends it")
    count, length, place, after = end[4], end[5], end[6], size - _END.size
    locator = _read(file, _LOCATOR, after - _LOCATOR.size)
    if locator is not None and locator[0] == _LOCATOR_NAME:
        after = locator[2]
        end_64 = _read(file, _END_64, after)
        if end_64 is None or end_64[0] != _END_64_NAME or after + _END_64.size != size - _END.size - _LOCATOR.size:
            raise ValueError("its archive does not end as torch ends it")
        count, length, place = end_64[7], end_64[8], end_64[9]
    if place + length != after or count > _MAX_MEMBERS:
        raise ValueError(f"the directory of its archive, of {count:,} members, is not where it should be")


def _read(file: BinaryIO, layout: struct.Struct, place: int) -> tuple[Any, ...] | None:
    if place < 0:
        return None
    file.seek(place)
    content = file.read(layout.size)
    return layout.unpack(content) if len(content) == layout.size else None


def _check_members(members: list[zipfile.ZipInfo], size: int) -> None:
    names = {member.filename for member in members}
    if len(names) < len(members):
        raise ValueError("its archive has a member twice")
    for member in members:
        if member.compress_type != zipfile.ZIP_STORED or member.compress_size != member.file_size:
            raise ValueError(f"its member {member.filename!r:.100} is compressed, which torch never does")
    total = sum(member.file_size for member in members)
    if total > size:
        raise ValueError(f"its members have {total:,} bytes, the file has {size:,}")


def _check_pickles(file: BinaryIO, count: int) -> None:
    for _ in range(count):
        _check_calls(pickletools.genops(file))


def _has_calls(content: bytes) -> bool:
    return b"bytearray" in content or b"_codecs" in content


def _check_calls(operations: Iterator[tuple[Any, Any, int | None]]) -> None:
    """Checks the calls in a pickle whose cost is not that of their arguments' length: `bytearray(10**12)`, and codecs.

    Follows the pickle with names and texts in the place of their values, and None for all other values.

    Raises:
        ValueError: such a call has other arguments than Python's pickle of a bytes or bytearray.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    mark = object()
    try:
        for operation, argument, _ in operations:
            name = operation.name
            if name == "GLOBAL":
                stack.append(str(argument))
            elif name in ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE"):
                stack.append(("text", argument))
            elif name in ("BINPUT", "LONG_BINPUT", "PUT"):
                memo[argument] = stack[-1]
            elif name == "MEMOIZE":
                memo[len(memo)] = stack[-1]
            elif name in ("BINGET", "LONG_BINGET", "GET"):
                stack.append(memo.get(argument))
            elif name in ("TUPLE1", "TUPLE2", "TUPLE3"):
                number = int(name[-1])
                stack[-number:] = [("tuple", *stack[-number:])]
            elif name == "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                _check_call(function, arguments)
                stack.append(_BYTES if function == "_codecs encode" else None)
            else:
                _apply(operation, stack, mark)
    except (IndexError, TypeError, KeyError) as error:
        raise ValueError(f"its pickle is broken ({error!r})") from None


def _apply(operation: Any, stack: list[Any], mark: object) -> None:
    """Applies another operation to the stack: all that it leaves there is None, but for marks."""
    before, after = operation.stack_before, operation.stack_after
    if operation.name == "MARK":
        stack.append(mark)
        return
    if pickletools.markobject in before:
        while stack.pop() is not mark:
            pass
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        stack.pop()
    stack.extend(None for _ in after)


def _check_call(function: Any, arguments: Any) -> None:
    is_bytearray = function in ("builtins bytearray", "__builtin__ bytearray")
    if not is_bytearray and function != "_codecs encode":
        return
    content, codec = None, None
    if isinstance(arguments, tuple) and len(arguments) == 3 and arguments[0] == "tuple":
        _, content, codec = arguments
    is_text = isinstance(content, tuple) and content[0] == "text" and codec in [("text", each) for each in _TEXT_CODECS]
    if not is_text and not (is_bytearray and arguments == ("tuple", _BYTES)):
        raise ValueError(f"its pickle calls {function.replace(' ', '.')} with other arguments than Python writes")


def check_value(value: Any, size: int) -> None:
    """Checks that what torch has read of a file refers to its bytes and values a few times at most.

    A pickle may hold a container that holds itself, or one container a million times; and a tensor of one element may
    say that its shape is a million by a million.

    Args:
        size: of the file, in bytes.
    Raises:
        ValueError: naming the fault.
    """
    walk = _Walk(size)
    num_values = walk.count(value, 0)
    if num_values > _MOST_SHARED * len(walk.known) + _SPARE_VALUES:
        raise ValueError(f"its {len(walk.known):,} containers are nested to {num_values:,} values")


class _Walk:
    """Counts the values of a nest, each time that they are referred to, and the bytes of its tensors."""

    def __init__(self, size: int) -> None:
        self.known: dict[int, int] = {}  # by container: the number of values in it
        self._open: set[int] = set()
        self._size, self._num_bytes = size, 0

    def count(self, value: Any, depth: int) -> int:
        if isinstance(value, Tensor):
            self._count_bytes(value)
            return 1
        if isinstance(value, (torch.UntypedStorage, torch.TypedStorage)):
            self._add(value.nbytes(), value.nbytes())
            return 1
        if isinstance(value, Mapping):
            children = [*value.keys(), *value.values()]
        elif isinstance(value, (list, tuple, set, frozenset)):
            children = list(value)
        else:
            return 1
        if id(value) in self._open:
            raise ValueError("it holds a container that holds itself")
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested over {_MAX_DEPTH} deep")
        if id(value) not in self.known:
            self._open.add(id(value))
            self.known[id(value)] = 1 + sum([self.count(child, depth + 1) for child in children])
            self._open.discard(id(value))
        return self.known[id(value)]

    def _count_bytes(self, tensor: Tensor) -> None:
        if tensor.is_meta or tensor.layout is not torch.strided or tensor.is_nested:
            return
        self._add(tensor.numel() * tensor.element_size(), tensor.untyped_storage().nbytes())

    def _add(self, num_bytes: int, num_stored: int) -> None:
        self._num_bytes += num_bytes
        if num_stored > self._size or self._num_bytes > _MOST_SHARED * self._size + _SPARE_BYTES:
            raise ValueError(f"its tensors have more bytes than the file, which has {self._size:,}")
