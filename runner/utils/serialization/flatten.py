"""A nest of plain values and tensors taken apart into JSON and named tensors, and put together again.

Imports torch, NumPy and the standard library. What is refused, and with which words, is decided here, for every format
alike.
"""

from __future__ import annotations

import base64
import json
import math
import struct
import threading
from collections import Counter, OrderedDict, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

import numpy as np
import torch
from torch import Tensor
from torch.nn import Parameter

from runner.utils.serialization.composites import describe_scalar, join, of_torch, scalar_of, split

STRUCTURE = "runner.structure"
_VERSION = 2
_MAX_DEPTH = 100
_MAX_PICKLED_BITS = 2039  # torch's weights_only reader knows integers of up to 255 bytes
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
_RAW_DTYPES = {getattr(torch, n) for n in ("complex128", "complex32", "float4_e2m1fn_x2") if hasattr(torch, n)}
_MAPPINGS = {kind.__name__: kind for kind in (dict, OrderedDict, Counter)}
_SEQUENCES: dict[str, Callable[[Any], Any]] = {
    kind.__name__: kind for kind in (list, tuple, torch.Size, set, frozenset)
}
_CONTAINERS = {*_MAPPINGS.values(), *_SEQUENCES.values(), defaultdict}
_FACTORIES: dict[str, Any] = {
    kind.__name__: kind for kind in (bool, int, float, complex, str, bytes, bytearray, *_CONTAINERS)
}
_OF_TORCH = {torch.dtype: "dtype", torch.layout: "layout", torch.qscheme: "qscheme"}
_KEYS = {str, int, float, complex, bool, type(None), bytes, torch.device, *_OF_TORCH}
_STORED = (Tensor, Parameter, torch.UntypedStorage, torch.TypedStorage, np.ndarray)  # by exact type

KeyPath = tuple[Any, ...]


class FlattenedState:
    """A value taken apart: `document`, plain JSON, and `tensors` by name, each tied view once."""

    def __init__(self, value: Any) -> None:
        self.tensors: dict[str, Tensor] = {}
        self.spread: dict[str, Any] = {}  # by the name of this rank's part: a DTensor of which it is
        self.is_picklable = True  # by plain values that torch's weights_only reader takes
        self._objects: list[dict[str, Any]] = []
        self._index_by_id: dict[int, int] = {}
        self._name_by_view: dict[tuple[Any, ...], str] = {}
        self._open: set[int] = set()
        tree = self._encode(value, ())
        whole = {name: self.spread.get(name, tensor) for name, tensor in self.tensors.items()}
        raw = {n: [name_of(t.dtype), [*t.shape]] for n, t in whole.items() if t.dtype in _RAW_DTYPES}
        self.document = {"version": _VERSION, "raw": raw, "objects": self._objects, "tree": tree}

    def _encode(self, value: Any, path: KeyPath) -> Any:
        """Plain JSON that `_decode` reverses; `path` leads to `value` and is named in errors."""
        kind = type(value)
        if value is None or kind in (bool, str):
            return value
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
        if kind in _OF_TORCH:
            return {_OF_TORCH[kind]: str(value).removeprefix("torch.")}
        if kind is torch.device:
            return {"device": str(value)}
        if isinstance(value, np.generic) and (scalar := describe_scalar(value)) is not None:
            self.is_picklable = False
            return {"scalar": scalar}
        if kind in _STORED or is_spread(value):
            return {"tensor": self._object(value, path)}
        if kind not in _CONTAINERS:
            _refuse(value, path)
        return self._encode_container(value, path)

    def _encode_container(self, value: Any, path: KeyPath) -> Any:
        kind = type(value)
        if id(value) in self._open or len(path) >= _MAX_DEPTH:
            found = "holds itself" if id(value) in self._open else f"is nested over {_MAX_DEPTH} deep"
            raise ValueError(f"{where(path)}, a {kind.__name__}, {found}, which is not stored: flatten it first.")
        self._open.add(id(value))
        body: list[Any]
        if isinstance(value, dict):
            self.is_picklable &= STRUCTURE not in value
            body = [[self._encode_key(key, path), self._encode(item, (*path, key))] for key, item in value.items()]
        elif kind in (set, frozenset):
            body = [self._encode_key(item, path) for item in value]
        else:
            body = [self._encode(item, (*path, index)) for index, item in enumerate(value)]
        self._open.remove(id(value))
        self.is_picklable &= kind not in (defaultdict, frozenset)
        if kind is defaultdict:
            return {"defaultdict": [_name_of_factory(value, path), body]}
        return body if kind is list else {kind.__name__: body}

    def _encode_key(self, key: Any, path: KeyPath) -> Any:
        for part in _leaves(key):
            if type(part) not in _KEYS and not isinstance(part, np.generic):
                raise TypeError(f"{where(path)} has a key of {type(part).__qualname__}: {_REMEDY}")
        return self._encode(key, path)

    def _object(self, value: Any, path: KeyPath) -> int:
        """Returns the index of a tensor, or what is made of tensors, among the objects; each object has its own."""
        if id(value) in self._index_by_id:
            return self._index_by_id[id(value)]
        entry: dict[str, Any] = {}
        if is_spread(value) or (composite := split(value)) is None:
            entry = {"name": self._name(value, path)}
        else:
            kind, parts, facts = composite
            names = {role: self._name(part, (*path, role)) for role, part in parts.items()}
            self.is_picklable, entry = False, {"kind": kind, "parts": names, "facts": facts}
        flags = {"parameter": type(value) is Parameter, "requires_grad": getattr(value, "requires_grad", False)}
        self._objects.append(entry | {flag: True for flag, is_set in flags.items() if is_set})
        self._index_by_id[id(value)] = len(self._objects) - 1
        return len(self._objects) - 1

    def _name(self, tensor: Any, path: KeyPath) -> str:
        """Returns the name of a dense tensor; another object with the same view has the same."""
        if not isinstance(tensor, Tensor):
            _refuse(tensor, path)
        _check_dense(tensor, path)
        plain = _own_part(tensor).detach()
        start = plain.untyped_storage().data_ptr() or id(tensor)
        if is_spread(tensor):  # an empty part has no address, and is to be tied where it is on the other ranks
            start = plain.untyped_storage()._cdata
        layout = (plain.storage_offset(), plain.shape, plain.stride(), plain.is_conj(), plain.is_neg())
        name = self._name_by_view.setdefault((plain.device, plain.dtype, start, *layout), self._free_name(path))
        self.tensors.setdefault(name, plain)
        if is_spread(tensor):
            self.spread.setdefault(name, tensor.detach())
        return name

    def _free_name(self, path: KeyPath) -> str:
        name = ".".join(part if isinstance(part, str) else text_of(part) for part in path) if path else "value"
        name = name.encode("utf-8", "replace").decode()
        while name in self.tensors or name in ("__metadata__", STRUCTURE):
            name += "~"
        return name

    def wait_for(self, name: str) -> None:
        """Returns when a tensor holds its content: here, at once."""


class HostSnapshot(FlattenedState):
    """A copy of a value, taken apart, its tensors on the CPU: what the value becomes does not reach it.

    With `at_once=False` the copy is made by `copy`; meanwhile another thread may wait for the tensors one by one.
    An earlier snapshot that nobody needs any more can be written over: its memory is there already, which makes the
    copy two to three times faster.
    """

    def __init__(self, value: Any, at_once: bool = True, over: HostSnapshot | None = None) -> None:
        super().__init__(value)
        self._sources = self.tensors
        old = {} if over is None else over.tensors
        self.tensors = {
            name: old[name]
            if name in old and (old[name].shape, old[name].dtype) == (t.shape, t.dtype)
            else torch.empty(t.shape, dtype=t.dtype)
            for name, t in self._sources.items()
        }
        self._is_copied = {name: threading.Event() for name in self._sources}
        self._error: BaseException | None = None
        if at_once:
            self.copy()

    def copy(self) -> None:
        """Copies the value; whatever is raised is raised to who waits too."""
        try:
            for name, tensor in self._sources.items():
                self.tensors[name].copy_(tensor)
                self._is_copied[name].set()
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._sources = {}
            for copied in self._is_copied.values():
                copied.set()

    def wait_for(self, name: str) -> None:
        """Returns when a tensor is copied."""
        if name in self._is_copied:
            self._is_copied[name].wait()
        if self._error is not None:
            raise RuntimeError(f"the copy was not made: {self._error}")


def as_stored(tensor: Tensor) -> Tensor:
    """Returns a tensor in a dtype that SafeTensors have, of the same bytes; `restore_raw` gives it its own back."""
    if tensor.dtype in SFT_DTYPES:
        return tensor
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor.view(torch.uint8)


def restore_raw(document: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    """Gives tensors their dtype back, those that a format without it holds as others of as many bytes."""
    for name, (dtype, shape) in document["raw"].items():
        tensors[name] = tensors[name].clone().view(dtype_of(dtype)).reshape(shape)


def unpack(document: dict[str, Any], tensors: dict[str, Tensor]) -> Any:
    """The value of a packed `document`; `tensors` are those it names, all of them, no other."""
    if document["version"] > _VERSION:
        raise ValueError("written by a newer version of this program")
    objects, named, copies = [], set[str](), dict[int, Any]()
    for entry in document["objects"]:
        names = entry["parts"] if "kind" in entry else {"": entry["name"]}
        named.update(names.values())
        parts = {role: tensors[name].detach() for role, name in names.items()}
        value = join(entry["kind"], parts, entry["facts"], copies) if "kind" in entry else parts[""]
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
    if kind in _SEQUENCES:
        items = [_decode(item, objects, depth + 1) for item in body]
        return _whole(_SEQUENCES[kind](items), body)
    if kind == "defaultdict":
        name, pairs = body
        factory = None if name is None else _FACTORIES[name]
        return defaultdict(factory, _decode_pairs(pairs, objects, depth))
    if kind in _MAPPINGS:
        return _MAPPINGS[kind](_decode_pairs(body, objects, depth))
    if kind == "complex":
        return complex(*(_decode(part, objects, depth) for part in body))
    return objects[body] if kind == "tensor" else _ATOMS[kind](body)


def _decode_pairs(pairs: list[Any], objects: list[Any], depth: int) -> dict[Any, Any]:
    decoded = ((_decode(key, objects, depth), _decode(value, objects, depth + 1)) for key, value in pairs)
    return _whole(dict(decoded), pairs)


def _whole(filled: Any, body: list[Any]) -> Any:
    """Returns a container, unless two of its entries have become one."""
    if len(filled) < len(body):
        raise ValueError(f"a key twice in one {type(filled).__name__}")
    return filled


_ATOMS: dict[str, Callable[[Any], Any]] = {
    "int": lambda text: int(text, 16),
    "float": lambda text: struct.unpack(">d", bytes.fromhex(text))[0],
    "bytes": base64.b64decode,
    "bytearray": lambda text: bytearray(base64.b64decode(text)),
    "dtype": lambda name: dtype_of(name),
    "layout": lambda name: of_torch(name, torch.layout),
    "qscheme": lambda name: of_torch(name, torch.qscheme),
    "device": torch.device,
    "scalar": scalar_of,
}


def where(path: KeyPath) -> str:
    """Returns the place of a key path as Python writes it."""
    return "value" + "".join(f"[{json.dumps(part) if type(part) is str else text_of(part)}]" for part in path)


def text_of(part: Any) -> str:
    """Returns a key as `repr` does, but an integer that is too long for it in hexadecimal, also inside a tuple."""
    if type(part) is frozenset:
        return f"frozenset({', '.join(sorted(map(text_of, part)))})"  # the same in every process
    if type(part) is tuple:
        inner = ", ".join(map(text_of, part))
        return f"({inner},)" if len(part) == 1 else f"({inner})"
    return hex(part) if type(part) is int and part.bit_length() > 4096 else repr(part)


def name_of(dtype: torch.dtype) -> str:
    """Returns "float32" of torch.float32."""
    return str(dtype).removeprefix("torch.")


def dtype_of(name: str) -> torch.dtype:
    """Returns torch.float32 of "float32"."""
    found: torch.dtype = of_torch(name, torch.dtype)
    return found


def compact(tensor: Tensor) -> Tensor:
    """Returns the tensor, or a contiguous copy where it is a view of something else."""
    plain = tensor.detach().resolve_conj().resolve_neg()
    is_compact = plain.stride() == torch.empty(plain.shape, device="meta").stride()
    is_whole = plain.untyped_storage().nbytes() == plain.nbytes
    return plain if is_compact and is_whole else plain.clone(memory_format=torch.contiguous_format)


def _own_part(tensor: Tensor) -> Tensor:
    part: Tensor = tensor.to_local() if is_spread(tensor) else tensor  # type: ignore[attr-defined]
    return part


def is_spread(value: Any) -> bool:
    """Says whether a value is a tensor of which each rank has a part: torch's DTensor, which is not imported for it."""
    return type(value).__name__ == "DTensor" and isinstance(value, Tensor)


def _refuse(value: Any, path: KeyPath) -> NoReturn:
    kind = type(value)
    raise TypeError(f"{where(path)} is a {kind.__module__}.{kind.__qualname__}, which is not stored: {_REMEDY}")


def _name_of_factory(value: defaultdict[Any, Any], path: KeyPath) -> str | None:
    factory: Any = value.default_factory
    name = getattr(factory, "__name__", None)
    if factory is not None and _FACTORIES.get(str(name)) is not factory:
        kinds = ", ".join(sorted(_FACTORIES))
        raise TypeError(f"{where(path)} is a defaultdict of {name or factory}, expected None, {kinds}; {_REMEDY}")
    return name


def _leaves(key: Any) -> Iterator[Any]:
    if type(key) not in (tuple, torch.Size, frozenset):
        yield key
        return
    for part in key:
        yield from _leaves(part)


def _check_dense(tensor: Tensor, path: KeyPath) -> None:
    faults = {
        "nested": tensor.is_nested,
        name_of_layout(tensor): tensor.layout is not torch.strided,
        "quantized": tensor.is_quantized,
        "meta": tensor.is_meta,
        name_of(tensor.dtype): tensor.dtype not in SFT_DTYPES and tensor.dtype not in _RAW_DTYPES,
    }
    for fault, is_so in faults.items():
        if is_so:
            raise TypeError(f"{where(path)} is a tensor that is {fault}, which is not stored: {_REMEDY}")


def name_of_layout(tensor: Tensor) -> str:
    """Returns "sparse_coo" of torch.sparse_coo."""
    return str(tensor.layout).removeprefix("torch.")
