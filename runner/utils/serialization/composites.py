"""Sparse, quantized and nested tensors, storages and NumPy arrays as dense tensors plus plain facts, and back.

`compose` does not trust its arguments: it raises before it reads or allocates memory for facts that do not fit.
"""

from __future__ import annotations

import ast
import base64
import math
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

Parts = tuple[str, dict[str, Tensor], dict[str, Any]]  # the kind, dense tensors by role, plain facts

_COMPRESSED = {
    torch.sparse_csr: ("crow_indices", "col_indices"),
    torch.sparse_bsr: ("crow_indices", "col_indices"),
    torch.sparse_csc: ("ccol_indices", "row_indices"),
    torch.sparse_bsc: ("ccol_indices", "row_indices"),
}
_QUANTIZED = {torch.qint8: torch.int8, torch.quint8: torch.uint8, torch.qint32: torch.int32}
_MAX_DTYPE_LENGTH = 100_000
_SCHEMES = {torch.per_tensor_affine: "per_tensor", torch.per_channel_affine: "per_channel"}


def decompose(value: Any) -> Parts | None:
    """Returns the parts of a value without copying their content; None for a value that has no such parts."""
    if type(value) is np.ndarray:
        return _split_array(value)
    if isinstance(value, (torch.UntypedStorage, torch.TypedStorage)):
        return _split_storage(value)
    if not isinstance(value, Tensor):
        return None
    value = value.detach()
    if value.is_meta:
        return "meta", {}, {"dtype": torch_name(value.dtype), "shape": [*value.shape], "stride": [*value.stride()]}
    if value.is_nested:
        return "nested", {str(index): part for index, part in enumerate(value.unbind())}, {}
    if value.layout is torch.sparse_coo:
        parts = {"indices": value._indices(), "values": value._values()}
        return "sparse_coo", parts, {"shape": [*value.shape], "is_coalesced": value.is_coalesced()}
    if value.layout in _COMPRESSED:
        parts = {name: getattr(value, name)() for name in (*_COMPRESSED[value.layout], "values")}
        return torch_name(value.layout), parts, {"shape": [*value.shape]}
    if value.is_quantized and value.dtype in _QUANTIZED and value.qscheme() in _SCHEMES:
        return _split_quantized(value)
    return None


def _split_quantized(value: Tensor) -> Parts:
    parts = {"values": value.int_repr()}
    if value.qscheme() is torch.per_tensor_affine:
        return "per_tensor", parts, {"scale": value.q_scale(), "zero_point": value.q_zero_point()}
    parts |= {"scales": value.q_per_channel_scales(), "zero_points": value.q_per_channel_zero_points()}
    return "per_channel", parts, {"axis": value.q_per_channel_axis()}


def _split_array(value: np.ndarray) -> Parts | None:
    dtype = _describe_dtype(value.dtype)
    if dtype is None:
        return None
    flat = np.ascontiguousarray(value).reshape(-1).view(np.uint8)
    if not flat.flags.writeable:
        flat = flat.copy()  # torch has no read-only tensors
    return "ndarray", {"bytes": torch.from_numpy(flat)}, {"dtype": dtype, "shape": [*value.shape]}


def _split_storage(value: Any) -> Parts:
    is_typed = isinstance(value, torch.TypedStorage)
    untyped = value._untyped_storage if is_typed else value
    content = torch.empty(0, dtype=torch.uint8, device=untyped.device).set_(untyped)
    return "storage", {"bytes": content}, {"dtype": torch_name(value.dtype)} if is_typed else {}


def compose(kind: str, parts: Mapping[str, Tensor], facts: Mapping[str, Any], copies: dict[int, Any]) -> Any:
    """Returns the value that `decompose` has taken apart.

    Args:
        copies: the arrays and storages composed before, by address: values of the same bytes share their memory.
    Raises:
        KeyError, RuntimeError, TypeError, ValueError: parts and facts do not fit each other.
    """
    if kind == "ndarray":
        return _join_array(parts["bytes"], facts, copies)
    if kind == "storage":
        return _join_storage(parts["bytes"], facts, copies)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that nested, compressed and quantized tensors are prototypes
        return _join_tensor(kind, parts, facts)


def _join_tensor(kind: str, parts: Mapping[str, Tensor], facts: Mapping[str, Any]) -> Tensor:
    match kind:
        case "meta":
            dtype = parse_dtype(facts["dtype"])
            return torch.empty_strided(facts["shape"], facts["stride"], dtype=dtype, device="meta")
        case "nested":
            return torch.nested.as_nested_tensor([parts[str(index)] for index in range(len(parts))])
        case "sparse_coo":
            is_coalesced = bool(facts["is_coalesced"])
            arguments = parts["indices"], parts["values"], facts["shape"]
            return torch.sparse_coo_tensor(*arguments, is_coalesced=is_coalesced, check_invariants=True)
        case "sparse_csr" | "sparse_bsr" | "sparse_csc" | "sparse_bsc":
            layout = torch_attribute(kind, torch.layout)
            indices = [parts[name] for name in _COMPRESSED[layout]]
            arguments = *indices, parts["values"], facts["shape"]
            return torch.sparse_compressed_tensor(*arguments, layout=layout, check_invariants=True)
        case "per_tensor":
            return torch._make_per_tensor_quantized_tensor(parts["values"], facts["scale"], facts["zero_point"])
        case "per_channel":
            values, scales, zero_points, axis = parts["values"], parts["scales"], parts["zero_points"], facts["axis"]
            expected = values.shape[axis : axis + 1]
            if axis < 0 or not scales.shape == zero_points.shape == expected:  # torch does not check this
                raise ValueError(f"axis {axis} of {[*values.shape]} has not {[*scales.shape]} scales")
            return torch._make_per_channel_quantized_tensor(values, scales, zero_points, axis)
        case _:
            raise ValueError(f"{kind!r} is no kind of value")


def _join_storage(content: Tensor, facts: Mapping[str, Any], copies: dict[int, Any]) -> Any:
    address = content.data_ptr()
    if not isinstance(copies.get(address), torch.UntypedStorage):
        copies[address] = content.clone().untyped_storage()
    if "dtype" not in facts:
        return copies[address]
    return torch.TypedStorage(wrap_storage=copies[address], dtype=parse_dtype(facts["dtype"]), _internal=True)


def _join_array(content: Tensor, facts: Mapping[str, Any], copies: dict[int, Any]) -> np.ndarray:
    dtype, shape = _parse_numpy_dtype(facts["dtype"]), facts["shape"]
    if math.prod(shape) * dtype.itemsize != content.nbytes:
        raise ValueError(f"{content.nbytes} bytes are no array of {dtype} and shape {shape}")
    address = content.data_ptr()
    if address and isinstance(copies.get(address), np.ndarray):
        return copies[address].view(dtype).reshape(shape)
    array = np.empty(shape, dtype)
    copies[address] = array.reshape(-1).view(np.uint8)
    copies[address][:] = content.cpu().numpy()
    return array


def describe_scalar(value: np.generic) -> dict[str, str] | None:
    """Returns a NumPy scalar as plain values; None if `parse_scalar` would change it."""
    if isinstance(value, (np.str_, np.bytes_)) and not value.dtype.itemsize:
        return {"dtype": repr(value.dtype.kind), "bytes": ""}
    dtype = _describe_dtype(value.dtype)
    if dtype is None:
        return None
    parsed = np.zeros(1, _parse_numpy_dtype(dtype)).dtype
    if parsed.type is not type(value):  # one of two integer types of the same size
        dtype = repr(value.dtype.char)
    return {"dtype": dtype, "bytes": base64.b64encode(value.tobytes()).decode()}


def parse_scalar(facts: Mapping[str, str]) -> Any:
    """Returns the NumPy scalar of a description by `describe_scalar`."""
    if not facts["bytes"]:
        return {"'U'": np.str_, "'S'": np.bytes_}[facts["dtype"]]()
    return np.frombuffer(base64.b64decode(facts["bytes"]), _parse_numpy_dtype(facts["dtype"]))[0]


def _describe_dtype(dtype: np.dtype) -> str | None:
    """Returns a dtype as in the header of a .npy file; None for objects and for dtypes that the header would change."""
    if dtype.hasobject or not dtype.itemsize:
        return None
    text = repr(np.lib.format.dtype_to_descr(dtype))
    return text if _parse_numpy_dtype(text) == dtype else None


def _parse_numpy_dtype(text: str) -> np.dtype:
    if len(text) > _MAX_DTYPE_LENGTH:
        raise ValueError(f"the text of a dtype has {len(text):,} characters, {_MAX_DTYPE_LENGTH:,} at most are read")
    dtype = np.lib.format.descr_to_dtype(ast.literal_eval(text))
    if dtype.hasobject or not dtype.itemsize:
        raise ValueError(f"{text} is no dtype of numbers or text")
    return dtype


def parse_dtype(name: str) -> torch.dtype:
    """Returns the dtype of a name: torch.float32 for "float32"."""
    return torch_attribute(name, torch.dtype)


def torch_name(value: torch.dtype | torch.layout | torch.qscheme) -> str:
    """Returns the name of torch's attribute: "float32" for torch.float32. `torch_attribute` reverses it."""
    return str(value).removeprefix("torch.")


def torch_attribute(name: str, kind: type) -> Any:
    """Returns torch's attribute of a name, such as a dtype, after checking its type."""
    value = getattr(torch, name, None)
    if not isinstance(value, kind):
        raise ValueError(f"torch has no {kind.__name__} {name!r}")
    return value
