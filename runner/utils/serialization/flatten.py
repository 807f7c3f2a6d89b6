"""Flattens nested plain values and tensors into JSON and named tensors, and restores them.

All file formats use it, so they accept the same values and refuse the others with the same messages.
"""

from __future__ import annotations

import base64
import json
import math
import struct
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from runner.utils.serialization.composites import (
    compose,
    decompose,
    describe_scalar,
    parse_dtype,
    parse_scalar,
    torch_attribute,
    torch_name,
)

STRUCTURE = "runner.structure"
_VERSION = 2
_MAX_DEPTH = 100
MAX_HEADER_BYTES = 100_000_000  # the limit of safetensors readers
_MAX_PICKLED_BITS = 2039  # the limit of torch's weights_only reader: 255 bytes and a sign
_REMEDY = "convert it to plain values or tensors first"
SFT_DTYPES = {
    getattr(torch, name): code
    for name, code in {
        **{"float64": "F64", "float32": "F32", "float16": "F16", "bfloat16": "BF16", "complex64": "C64"},
        **{"int64": "I64", "int32": "I32", "int16": "I16", "int8": "I8", "bool": "BOOL"},
        **{"uint64": "U64", "uint32": "U32", "uint16": "U16", "uint8": "U8"},
        **{"float8_e4m3fn": "F8_E4M3", "float8_e4m3fnuz": "F8_E4M3FNUZ", "float8_e8m0fnu": "F8_E8M0"},
        **{"float8_e5m2": "F8_E5M2", "float8_e5m2fnuz": "F8_E5M2FNUZ"},
    }.items()
    if hasattr(torch, name)
}
DTYPE_BY_SFT_CODE = {code: dtype for dtype, code in SFT_DTYPES.items()}
_RAW_DTYPES = {getattr(torch, n) for n in ("complex128", "complex32", "float4_e2m1fn_x2") if hasattr(torch, n)}
_DENSE_DTYPES = {*SFT_DTYPES, *_RAW_DTYPES}  # none of them is quantized
MAPPINGS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    kind.__name__: kind for kind in (list, tuple, torch.Size, set, frozenset)
}
_CONTAINERS = {*MAPPINGS.values(), *_SEQUENCES.values(), defaultdict}
_FACTORIES: dict[str, Any] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, bytearray, *_CONTAINERS)
}
_TORCH_TYPES = {torch.dtype: "dtype", torch.layout: "layout", torch.qscheme: "qscheme"}
_KEYS = {str, int, float, complex, bool, type(None), bytes, torch.device, *_TORCH_TYPES}
TENSORS = (Tensor, Parameter)  # these exact types
_STORED = (torch.UntypedStorage, torch.TypedStorage, np.ndarray)

KeyPath = tuple[Any, ...]


class Encoding(NamedTuple):
    """The flat parts of a flattened state, or of its first items: tensors by name, and entries of the document."""

    tensors: dict[str, Tensor]
    objects: list[dict[str, Any]]
    raw: dict[str, Any]  # dtype and shape of tensors that a format without their dtype stores as bytes

    def document(self, tree: Any) -> dict[str, Any]:
        """Returns the document of a value."""
        return {"version": _VERSION, "raw": self.raw, "objects": self.objects, "tree": tree}


class FlattenedState:
    """A value flattened into `document`, plain JSON, and `tensors` by name; views of the same memory have one name.

    Args:
        path: the key path of the value, if it is a part of another value.
        leading: the encoding of the parts before it, none of whose tensors it has.
    Attributes:
        dtensors: by the name of a local shard in `tensors`: the DTensor to which it belongs.
        is_picklable: torch's weights_only reader accepts the value, so it needs no flattening in a `.pt` file.
    """

    def __init__(self, value: Any, path: KeyPath = (), leading: Encoding | None = None) -> None:
        tensors, objects, raw = leading or ({}, [], {})
        self.encoding = Encoding({**tensors}, [*objects], {**raw})
        self.tensors = self.encoding.tensors
        self.dtensors: dict[str, Any] = {}
        self.is_picklable = True
        self._index_by_id: dict[int, int] = {}
        self._name_by_view: dict[tuple[Any, ...], str] = {}
        self._ancestors: set[int] = set()
        self.document = self.encoding.document(self._encode(value, path))

    def _encode(self, value: Any, path: KeyPath) -> Any:
        """Returns plain JSON that `_decode` reverses; `path` is the key path of `value`, for errors."""
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
        if kind in TENSORS:
            return {"tensor": self._index_object(value, path)}
        if kind is int:
            self.is_picklable &= value.bit_length() <= _MAX_PICKLED_BITS
            return value if value.bit_length() < 64 else {"int": hex(value)}
        if kind is float:
            return value if math.isfinite(value) else {"float": struct.pack(">d", value).hex()}
        if kind is complex:
            return {"complex": [self._encode(value.real, path), self._encode(value.imag, path)]}
        if kind in (bytes, bytearray):
            self.is_picklable &= len(value) > 0
            return {kind.__name__: base64.b64encode(value).decode()}
        if kind in _TORCH_TYPES:
            return {_TORCH_TYPES[kind]: torch_name(value)}
        if kind is torch.device:
            return {"device": str(value)}
        if isinstance(value, np.generic) and (scalar := describe_scalar(value)) is not None:
            self.is_picklable = False
            return {"scalar": scalar}
        if kind in _STORED or is_dtensor(value):
            return {"tensor": self._index_object(value, path)}
        if kind not in _CONTAINERS:
            _refuse(value, path)
        return self._encode_container(value, path)

    def _encode_container(self, value: Any, path: KeyPath) -> Any:
        kind = type(value)
        if id(value) in self._ancestors or len(path) >= _MAX_DEPTH:
            fault = "holds itself" if id(value) in self._ancestors else f"is nested over {_MAX_DEPTH} deep"
            raise ValueError(f"{format_path(path)}, a {kind.__name__}, {fault}, which is not stored: flatten it first.")
        self._ancestors.add(id(value))
        body: list[Any]
        if isinstance(value, dict):
            self.is_picklable &= STRUCTURE not in value
            body = [[self._encode_key(key, path), self._encode(item, (*path, key))] for key, item in value.items()]
        elif kind in (set, frozenset):
            body = [self._encode_key(item, path) for item in value]
        elif _is_own_json(value):
            body = [*value]
        else:
            body = [self._encode(item, (*path, index)) for index, item in enumerate(value)]
        self._ancestors.remove(id(value))
        self.is_picklable &= kind not in (defaultdict, frozenset)
        if kind is defaultdict:
            return {"defaultdict": [_name_of_factory(value, path), body]}
        return body if kind is list else {kind.__name__: body}

    def _encode_key(self, key: Any, path: KeyPath) -> Any:
        _check_key(key, path)
        return self._encode(key, path)

    def _index_object(self, value: Any, path: KeyPath) -> int:
        """Returns the index of a tensor or composite value among the document's objects, adding it once."""
        index = self._index_by_id.get(id(value))
        if index is not None:
            return index
        if _is_plain(value) or is_dtensor(value) or (composite := decompose(value)) is None:
            entry: dict[str, Any] = {"name": self._name_tensor(value, path)}
        else:
            kind, parts, facts = composite
            names = {role: self._name_tensor(part, (*path, role)) for role, part in parts.items()}
            entry = {"kind": kind, "parts": names, "facts": facts}
            self.is_picklable = False
        if type(value) is Parameter:
            entry["parameter"] = True
        if getattr(value, "requires_grad", False):
            entry["requires_grad"] = True
        index = self._index_by_id[id(value)] = len(self.encoding.objects)
        self.encoding.objects.append(entry)
        return index

    def _name_tensor(self, tensor: Any, path: KeyPath) -> str:
        """Returns the name of a dense tensor, adding it once; other objects of the same view have the same name."""
        if not isinstance(tensor, Tensor):
            _refuse(tensor, path)
        if not _is_plain(tensor):
            _check_dense(tensor, path)
        is_shard = is_dtensor(tensor)
        plain = tensor.to_local().detach() if is_shard else tensor.detach()  # type: ignore[attr-defined]
        storage = plain.untyped_storage()
        # An empty shard has no address, but must be tied as on the other ranks.
        start = storage._cdata if is_shard else storage.data_ptr() or id(tensor)
        layout = (plain.storage_offset(), plain.shape, plain.stride(), plain.is_conj(), plain.is_neg())
        view = (plain.device, plain.dtype, start, *layout)
        name = self._name_by_view.get(view)
        if name is None:
            name = self._name_by_view[view] = self._free_name(path)
            self.tensors[name] = plain
            if tensor.dtype in _RAW_DTYPES:
                self.encoding.raw[name] = [torch_name(tensor.dtype), [*tensor.shape]]
            if is_shard:
                self.dtensors[name] = tensor.detach()
        return name

    def _free_name(self, path: KeyPath) -> str:
        name = ".".join([part if isinstance(part, str) else format_key(part) for part in path]) if path else "value"
        if not name.isascii():
            name = name.encode("utf-8", "replace").decode()
        while name in self.tensors or name in ("__metadata__", STRUCTURE):
            name += "~"
        return name

    def find_ties(self, value: Any) -> dict[str, str]:
        """Returns the keys of a flat dict whose tensors are stored under other names, with these names.

        Args:
            value: that was flattened.
        """
        ties: dict[str, str] = {}
        for key, tensor in value.items() if isinstance(value, dict) else ():
            if not isinstance(key, str) or not isinstance(tensor, Tensor) or key in self.tensors:
                continue
            stored_name = self.encoding.objects[self._index_by_id[id(tensor)]].get("name")
            if stored_name is not None and key not in ("__metadata__", STRUCTURE):
                ties[key] = stored_name
        return ties

    def wait_for_copy(self, name: str) -> None:
        """Waits until a tensor has its content; here it always has."""

    def stored_tensor(self, name: str) -> Tensor:
        """Returns a tensor with its content, contiguous and with a storage to itself."""
        return to_contiguous(self.tensors[name])


def to_storable(tensor: Tensor) -> Tensor:
    """Returns a tensor of the same bytes in a dtype of safetensors; `restore_dtypes` reverses it."""
    if tensor.dtype in SFT_DTYPES:
        return tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor.view(torch.uint8)


def order_in_file(dtypes: Mapping[str, torch.dtype]) -> list[str]:
    """Returns the names of tensors in the order of their contents in a SafeTensors file.

    The dtypes with the largest elements come first, so that every tensor is aligned.
    """
    return sorted(dtypes, key=lambda name: -dtypes[name].itemsize)


def to_stored_dtype(dtype: torch.dtype) -> torch.dtype:
    """Returns the dtype with which SafeTensors files hold a tensor: bytes, if they lack its own."""
    return dtype if dtype in SFT_DTYPES else torch.uint8


def describe_stored(tensor: Tensor) -> tuple[torch.dtype, Sequence[int]]:
    """Returns dtype and shape with which SafeTensors files hold a tensor."""
    return (tensor.dtype, tensor.shape) if tensor.dtype in SFT_DTYPES else (torch.uint8, [tensor.nbytes])


def encode_sft_header(
    path: Path, tensors: Mapping[str, tuple[torch.dtype, Sequence[int]]], metadata: Mapping[str, str], remedy: str = ""
) -> tuple[bytes, list[str]]:
    """Returns the first bytes of a SafeTensors file, and the names of its tensors in the order of their contents.

    Args:
        path: of the file, for the message of the error, which ends with `remedy`.
        tensors: dtype and shape by name.
    Raises:
        ValueError: the header is longer than readers accept.
    """
    ordered = order_in_file({name: dtype for name, (dtype, _) in tensors.items()})
    entries = encode_sft_entries((name, *tensors[name]) for name in ordered)
    return join_sft_header(path, entries, metadata, remedy), ordered


def encode_sft_entries(tensors: Iterable[tuple[str, torch.dtype, Sequence[int]]]) -> str:
    """Returns the part of a header that describes tensors, as JSON; their contents follow each other."""
    entries: dict[str, Any] = {}
    end = 0
    for name, dtype, shape in tensors:
        start, end = end, end + math.prod(shape) * dtype.itemsize
        entries[name] = {"dtype": SFT_DTYPES[dtype], "shape": [*shape], "data_offsets": [start, end]}
    return json.dumps(entries, ensure_ascii=False)


def join_sft_header(path: Path, entries: str, metadata: Mapping[str, str], remedy: str = "") -> bytes:
    """Returns the first bytes of a SafeTensors file; see `encode_sft_header`."""
    if metadata:
        text = json.dumps({"__metadata__": dict(metadata)}, ensure_ascii=False)
        entries = text if entries == "{}" else f"{text[:-1]}, {entries[1:]}"
    encoded = entries.encode()
    encoded += b" " * (-len(encoded) % 8)
    if len(encoded) > MAX_HEADER_BYTES:
        raise ValueError(f"{path}: its header is {len(encoded):,} bytes, readers take {MAX_HEADER_BYTES:,}{remedy}")
    return struct.pack("<Q", len(encoded)) + encoded


def restore_dtypes(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Restores in place the dtype and shape of tensors that were stored as bytes."""
    for name, (dtype, shape) in document["raw"].items():
        tensors[name] = tensors[name].clone().view(parse_dtype(dtype)).reshape(shape)


def unflatten(document: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """Returns the value of a document; `tensors` are exactly those that it names.

    Raises:
        KeyError, RuntimeError, TypeError, ValueError: the document is broken or does not fit the tensors.
    """
    if document["version"] > _VERSION:
        raise ValueError("written by a newer version of this program")
    objects, named, copies = [], set[str](), dict[int, Any]()
    for entry in document["objects"]:
        names = entry["parts"] if "kind" in entry else {"": entry["name"]}
        named.update(names.values())
        parts = {role: tensors[name].detach() for role, name in names.items()}
        value = compose(entry["kind"], parts, entry["facts"], copies) if "kind" in entry else parts[""]
        is_leaf = entry.get("requires_grad", False)
        if isinstance(value, Tensor):
            value = Parameter(value, is_leaf) if "parameter" in entry else value.requires_grad_(is_leaf)
        objects.append(value)
    if unnamed := tensors.keys() - named:
        raise ValueError(f"tensors that it does not name: {sorted(unnamed)[:5]}")
    return _decode(document["tree"], objects, 0)


def _decode(node: Any, objects: list[Any], depth: int) -> Any:
    if depth > _MAX_DEPTH:
        raise ValueError(f"nested over {_MAX_DEPTH} deep")
    if type(node) is list:
        return [_decode(item, objects, depth + 1) for item in node]
    if type(node) is not dict:
        return node
    ((kind, body),) = node.items()
    match kind:
        case "tensor":
            return objects[body]
        case "complex":
            return complex(*(_decode(part, objects, depth) for part in body))
        case "defaultdict":
            name, pairs = body
            return defaultdict(None if name is None else _FACTORIES[name], _decode_pairs(pairs, objects, depth))
        case _ if kind in MAPPINGS:
            return MAPPINGS[kind](_decode_pairs(body, objects, depth))
        case _ if kind in _SEQUENCES:
            items = [_decode(item, objects, depth + 1) for item in body]
            return _check_no_duplicates(_SEQUENCES[kind](items), body)
        case _:
            return _ATOMS[kind](body)


def _decode_pairs(pairs: list[Any], objects: list[Any], depth: int) -> dict[Any, Any]:
    decoded = ((_decode(key, objects, depth), _decode(value, objects, depth + 1)) for key, value in pairs)
    return _check_no_duplicates(dict(decoded), pairs)


def _check_no_duplicates(container: Any, body: list[Any]) -> Any:
    """Returns the container, after checking that no two entries of its JSON are equal."""
    if len(container) < len(body):
        raise ValueError(f"a key twice in one {type(container).__name__}")
    return container


_ATOMS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    "bytes": base64.b64decode,
    "bytearray": lambda text: bytearray(base64.b64decode(text)),
    "dtype": parse_dtype,
    "layout": lambda name: torch_attribute(name, torch.layout),
    "qscheme": lambda name: torch_attribute(name, torch.qscheme),
    "device": torch.device,
    "scalar": parse_scalar,
}


def format_path(path: KeyPath) -> str:
    """Returns a key path as Python writes it: value["model"][0]."""
    return "value" + "".join(f"[{json.dumps(part) if type(part) is str else format_key(part)}]" for part in path)


def format_key(part: Any) -> str:
    """Returns the `repr` of a key, except for integers beyond its limit, which are hexadecimal, also inside a tuple."""
    if type(part) is frozenset:
        return f"frozenset({', '.join(sorted(map(format_key, part)))})"  # sorted: the same in every process
    if type(part) is tuple:
        inner = ", ".join(map(format_key, part))
        return f"({inner},)" if len(part) == 1 else f"({inner})"
    return hex(part) if type(part) is int and part.bit_length() > 4096 else repr(part)


def to_contiguous(tensor: Tensor) -> Tensor:
    """Returns the tensor if it is contiguous and has its storage to itself, otherwise a contiguous copy."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    is_contiguous = plain.stride() == torch.empty(plain.shape, device="meta").stride()
    fills_storage = plain.untyped_storage().nbytes() == plain.nbytes
    return plain if is_contiguous and fills_storage else plain.clone(memory_format=torch.contiguous_format)


def is_dtensor(value: Any) -> bool:
    """Returns whether a value is a DTensor (a tensor in shards over the ranks), without the slow import."""
    return type(value).__name__ == "DTensor" and isinstance(value, Tensor)


def _refuse(value: Any, path: KeyPath) -> NoReturn:
    kind = type(value)
    raise TypeError(f"{format_path(path)} is a {kind.__module__}.{kind.__qualname__}, which is not stored: {_REMEDY}")


def _name_of_factory(value: defaultdict[Any, Any], path: KeyPath) -> str | None:
    factory: Any = value.default_factory
    name = getattr(factory, "__name__", None)
    if factory is not None and _FACTORIES.get(str(name)) is not factory:
        kinds = ", ".join(sorted(_FACTORIES))
        raise TypeError(f"{format_path(path)} is a defaultdict of {name or factory}, expected None, {kinds}; {_REMEDY}")
    return name


def _check_key(key: Any, path: KeyPath) -> None:
    if type(key) in (tuple, torch.Size, frozenset):
        for part in key:
            _check_key(part, path)
    elif type(key) not in _KEYS and not isinstance(key, np.generic):
        raise TypeError(f"{format_path(path)} has a key of {type(key).__qualname__}: {_REMEDY}")


def _is_own_json(items: Sequence[Any]) -> bool:
    """Returns whether all items are texts, or all are integers, that JSON represents as they are."""
    kinds = set(map(type, items))
    return kinds == {str} or (kinds == {int} and max(items).bit_length() < 64 and min(items).bit_length() < 64)


def _is_plain(value: Any) -> bool:
    """Returns whether a value is an ordinary dense tensor with content, which needs no closer look."""
    return (
        type(value) in TENSORS
        and value.layout is torch.strided
        and value.dtype in _DENSE_DTYPES
        and not (value.is_meta or value.is_nested)
    )


def _check_dense(tensor: Tensor, path: KeyPath) -> None:
    faults = {
        "nested": tensor.is_nested,
        torch_name(tensor.layout): tensor.layout is not torch.strided,
        "quantized": tensor.is_quantized,
        "meta": tensor.is_meta,
        torch_name(tensor.dtype): tensor.dtype not in _DENSE_DTYPES,
    }
    for fault, is_so in faults.items():
        if is_so:
            raise TypeError(f"{format_path(path)} is a tensor that is {fault}, which is not stored: {_REMEDY}")
