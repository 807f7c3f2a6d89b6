"""Serialization of nested plain values and tensors: JSON plus named tensors, and back."""

from runner.utils.serialization.composites import parse_dtype, torch_name
from runner.utils.serialization.flatten import (
    DTYPE_BY_SFT_CODE,
    MAX_HEADER_BYTES,
    SFT_DTYPES,
    STRUCTURE,
    FlattenedState,
    KeyPath,
    describe_stored,
    encode_sft_header,
    format_key,
    format_path,
    is_dtensor,
    join_sft_header,
    restore_dtypes,
    to_contiguous,
    to_storable,
    unflatten,
)
from runner.utils.serialization.snapshot import HostSnapshot

__all__ = [
    "DTYPE_BY_SFT_CODE",
    "MAX_HEADER_BYTES",
    "SFT_DTYPES",
    "STRUCTURE",
    "FlattenedState",
    "HostSnapshot",
    "KeyPath",
    "describe_stored",
    "encode_sft_header",
    "format_key",
    "format_path",
    "is_dtensor",
    "join_sft_header",
    "parse_dtype",
    "restore_dtypes",
    "to_contiguous",
    "to_storable",
    "torch_name",
    "unflatten",
]
