"""Serialization of nested plain values and tensors: JSON plus named tensors, and back."""

from runner.utils.serialization.flatten import (
    SFT_DTYPES,
    STRUCTURE,
    FlattenedState,
    HostSnapshot,
    KeyPath,
    dtype_name,
    format_key,
    format_path,
    is_dtensor,
    layout_name,
    parse_dtype,
    restore_dtypes,
    to_contiguous,
    to_storable,
    unflatten,
)

__all__ = [
    "SFT_DTYPES",
    "STRUCTURE",
    "FlattenedState",
    "HostSnapshot",
    "KeyPath",
    "dtype_name",
    "format_key",
    "format_path",
    "is_dtensor",
    "layout_name",
    "parse_dtype",
    "restore_dtypes",
    "to_contiguous",
    "to_storable",
    "unflatten",
]
