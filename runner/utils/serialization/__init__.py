"""A nest of plain values and tensors taken apart into JSON and named tensors, and put together again."""

from runner.utils.serialization.flatten import (
    SFT_DTYPES,
    STRUCTURE,
    FlattenedState,
    HostSnapshot,
    KeyPath,
    as_stored,
    compact,
    dtype_of,
    is_spread,
    name_of,
    name_of_layout,
    restore_raw,
    text_of,
    unpack,
    where,
)

__all__ = [
    "SFT_DTYPES",
    "STRUCTURE",
    "FlattenedState",
    "HostSnapshot",
    "KeyPath",
    "as_stored",
    "compact",
    "dtype_of",
    "is_spread",
    "name_of",
    "name_of_layout",
    "restore_raw",
    "text_of",
    "unpack",
    "where",
]
