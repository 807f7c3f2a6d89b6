"""Checks of a `.pt` file before torch reads it and of the value afterwards, to bound the memory by the file's size.

Torch's `weights_only` reader runs no code. But it inflates compressed members, and a few bytes of the pickle can
allocate any amount of memory.

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

_END = struct.Struct("<4s4H2LH")  # signature, 2 disks, 2 counts, size and offset of the directory, length of a comment
_END_64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_END_SIGNATURE, _END_64_SIGNATURE, _LOCATOR_SIGNATURE = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_MAX_MEMBERS = 1_000_000
_MAX_DEPTH = 200
_SPARE_BYTES = 64 << 20
_MAX_SHARED = 16  # average number of references to each byte of the file, or to each container
_SPARE_VALUES = 1_000_000
_NUM_LEGACY_PICKLES = 5
_BYTES = ("bytes",)  # stands for the result of a call of `_codecs.encode`
_TEXT_CODECS = ("latin1", "latin-1")


def check_archive(file: BinaryIO) -> None:
    """Checks that reading the members of a `.pt` file takes no more memory than the file has bytes.

    In the format of torch before 1.6, a few pickles one after the other, the pickles are checked.

    Raises:
        ValueError: the file is not as torch writes it.
        OSError: the disk refuses.
    """
    size = file.seek(0, os.SEEK_END)
    file.seek(0)
    is_zip = file.read(4) == b"PK\x03\x04"
    file.seek(0)
    if not is_zip:
        for _ in range(_NUM_LEGACY_PICKLES):
            _check_calls(pickletools.genops(file))
        return
    _check_directory(file, size)
    with zipfile.ZipFile(file) as archive:
        _check_members(archive.infolist(), size)
        for name in archive.namelist():
            content = archive.read(name) if name.endswith("data.pkl") else b""
            if b"bytearray" in content or b"_codecs" in content:
                _check_calls(pickletools.genops(content))


def _check_directory(file: BinaryIO, size: int) -> None:
    """Checks that every zip reader finds the same directory in the archive, and that it is not too long.

    Raises:
        ValueError: the directory is ambiguous or too long.
    """
    end = _read_struct(file, _END, size - _END.size)
    if end is None or end[0] != _END_SIGNATURE or end[7]:
        raise ValueError("its archive does not end as torch ends it")
    count, length, offset = end[4:7]
    directory_end = size - _END.size
    locator = _read_struct(file, _LOCATOR, directory_end - _LOCATOR.size)
    if locator is not None and locator[0] == _LOCATOR_SIGNATURE:
        directory_end = locator[2]
        end_64 = _read_struct(file, _END_64, directory_end)
        end_64_end = size - _END.size - _LOCATOR.size
        if end_64 is None or end_64[0] != _END_64_SIGNATURE or directory_end + _END_64.size != end_64_end:
            raise ValueError("its archive does not end as torch ends it")
        count, length, offset = end_64[7:10]
    if offset + length != directory_end or count > _MAX_MEMBERS:
        raise ValueError(f"the directory of its archive, of {count:,} members, is not where it should be")


def _read_struct(file: BinaryIO, layout: struct.Struct, offset: int) -> tuple[Any, ...] | None:
    if offset < 0:
        return None
    file.seek(offset)
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


def _check_calls(operations: Iterator[tuple[Any, Any, int | None]]) -> None:
    """Checks calls in a pickle that may allocate more than the length of their arguments: `bytearray(10**12)`, codecs.

    It interprets the pickle with names and texts on the stack, and None in place of any other value.

    Raises:
        ValueError: such a call has other arguments than Python's pickle of a bytes or bytearray.
    """
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    mark = object()
    try:
        for operation, argument, _ in operations:
            match operation.name:
                case "GLOBAL":
                    stack.append(str(argument))
                case "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE":
                    stack.append(("text", argument))
                case "BINPUT" | "LONG_BINPUT" | "PUT":
                    memo[argument] = stack[-1]
                case "MEMOIZE":
                    memo[len(memo)] = stack[-1]
                case "BINGET" | "LONG_BINGET" | "GET":
                    stack.append(memo.get(argument))
                case "TUPLE1" | "TUPLE2" | "TUPLE3":
                    number = int(operation.name[-1])
                    stack[-number:] = [("tuple", *stack[-number:])]
                case "REDUCE":
                    arguments, function = stack.pop(), stack.pop()
                    _check_call(function, arguments)
                    stack.append(_BYTES if function == "_codecs encode" else None)
                case "MARK":
                    stack.append(mark)
                case _:
                    _apply(operation, stack, mark)
    except (IndexError, TypeError, KeyError) as error:
        raise ValueError(f"its pickle is broken ({error!r})") from None


def _apply(operation: Any, stack: list[Any], mark: object) -> None:
    """Applies any other operation to the stack: it pushes None for each result."""
    before = operation.stack_before
    if pickletools.markobject in before:
        while stack.pop() is not mark:
            pass
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        stack.pop()
    stack.extend(None for _ in operation.stack_after)


def _check_call(function: Any, arguments: Any) -> None:
    is_bytearray = function in ("builtins bytearray", "__builtin__ bytearray")
    if not is_bytearray and function != "_codecs encode":
        return
    content, codec = None, None
    if isinstance(arguments, tuple) and len(arguments) == 3 and arguments[0] == "tuple":
        _, content, codec = arguments
    is_text = isinstance(content, tuple) and content[0] == "text" and codec in [("text", name) for name in _TEXT_CODECS]
    if not is_text and not (is_bytearray and arguments == ("tuple", _BYTES)):
        raise ValueError(f"its pickle calls {function.replace(' ', '.')} with other arguments than Python writes")


def check_value(value: Any, size: int) -> None:
    """Checks that a value read from a file refers to each of the file's bytes and containers a few times at most.

    A pickle may contain a container that contains itself, or one container a million times. A tensor with one element
    may have the shape [1_000_000, 1_000_000].

    Args:
        size: size of the file in bytes.
    Raises:
        ValueError: the value is larger than the file permits, or contains itself.
    """
    counter = _ValueCounter(size)
    num_values = counter.count(value, 0)
    if num_values > _MAX_SHARED * len(counter.num_values) + _SPARE_VALUES:
        raise ValueError(f"its {len(counter.num_values):,} containers are nested to {num_values:,} values")


class _ValueCounter:
    """Counts nested values, once for each reference to them, and the bytes of their tensors."""

    def __init__(self, size: int) -> None:
        self.num_values: dict[int, int] = {}  # by the id of a container
        self._ancestors: set[int] = set()
        self._size = size
        self._num_bytes = 0

    def count(self, value: Any, depth: int) -> int:
        match value:
            case Tensor():
                if not value.is_meta and value.layout is torch.strided and not value.is_nested:
                    self._add(value.numel() * value.element_size(), value.untyped_storage().nbytes())
                return 1
            case torch.UntypedStorage() | torch.TypedStorage():
                self._add(value.nbytes(), value.nbytes())
                return 1
            case Mapping():
                children = [*value.keys(), *value.values()]
            case list() | tuple() | set() | frozenset():
                children = list(value)
            case _:
                return 1
        if id(value) in self._ancestors:
            raise ValueError("it holds a container that holds itself")
        if depth > _MAX_DEPTH:
            raise ValueError(f"it is nested over {_MAX_DEPTH} deep")
        if id(value) not in self.num_values:
            self._ancestors.add(id(value))
            self.num_values[id(value)] = 1 + sum([self.count(child, depth + 1) for child in children])
            self._ancestors.discard(id(value))
        return self.num_values[id(value)]

    def _add(self, num_bytes: int, num_stored: int) -> None:
        self._num_bytes += num_bytes
        if num_stored > self._size or self._num_bytes > _MAX_SHARED * self._size + _SPARE_BYTES:
            raise ValueError(f"its tensors have more bytes than the file, which has {self._size:,}")
