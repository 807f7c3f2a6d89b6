"""Compares two outputs of a block by a few sums, without keeping the outputs.

The sum of absolute values detects a change of magnitude. Sums with random weights also detect values that have changed
their signs or their positions.
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_ROW_SIZE = 1 << 14  # elements; a row is multiplied by random weights, and the sum of each row by another weight
_PIECE_SIZE = 1 << 22  # elements that are converted at a time
_NUM_PROJECTIONS = 3  # a single one misses 3% of changed signs at the tolerance of bfloat16
_BFLOAT16_EPS = torch.finfo(torch.bfloat16).eps


@torch.no_grad()
def sums_of(output: Any) -> list[Tensor]:
    """Returns norms and projections [2 + projections] of each inexact tensor."""
    return [_sums(leaf) for leaf in tensors_of(output) if _is_plain(leaf)]


def tensors_of(output: Any, seen: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """Yields the tensors in a nest of containers and dataclasses."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and id(leaf) not in seen:
            values = [getattr(leaf, field.name, None) for field in dataclasses.fields(leaf)]
            yield from tensors_of(values, seen | {id(leaf)})


def _is_plain(tensor: Tensor) -> bool:
    is_strided = type(tensor) is Tensor and tensor.layout is torch.strided and not tensor.is_meta
    return is_strided and (tensor.is_floating_point() or tensor.is_complex())


def _sums(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(tensor, order, dtype=dtype) for order in (1, 2)]
    return torch.stack([*norms, *_projections(tensor.reshape(-1), dtype)])


def _projections(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the scalar products [projections] of a vector with random vectors.

    The vector is arranged as a matrix. The weight of an element is that of its column times that of its row, so that
    few weights are stored.
    """
    weights = _weights(flat.device, dtype)
    total = torch.zeros(_NUM_PROJECTIONS, dtype=dtype, device=flat.device)
    for index, piece in enumerate(flat.split(_PIECE_SIZE)):
        piece = piece.to(dtype)
        first_row = index * (_PIECE_SIZE // _ROW_SIZE)
        num_rows = len(piece) // _ROW_SIZE
        full_rows, rest = piece[: num_rows * _ROW_SIZE], piece[num_rows * _ROW_SIZE :]
        total += _project(full_rows.view(num_rows, _ROW_SIZE), first_row, weights)
        total += _project(rest.view(1, len(rest)), first_row + num_rows, weights)
    return total


def _project(rows: Tensor, first_row: int, weights: Tensor) -> Tensor:
    """Returns the scalar products [projections] of rows [rows, columns]."""
    row_indices = torch.arange(first_row, first_row + len(rows), device=rows.device) % _ROW_SIZE
    row_sums = torch.stack([(rows * column_weights[: rows.shape[1]]).sum(1) for column_weights in weights])
    return (row_sums * weights.roll(1, 0)[:, row_indices]).sum(1)


@functools.lru_cache(8)
def _weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns random weights [projections, row size], the same at every call."""
    generator = torch.Generator().manual_seed(0)
    weights = torch.randn(_NUM_PROJECTIONS, _ROW_SIZE, generator=generator, dtype=torch.float32, device="cpu")
    return weights.to(device, dtype)


def tolerance_of(tensors: Sequence[Tensor]) -> float:
    """Returns the largest relative difference of projections that rounding can cause.

    It is relative to the 2-norm. A kernel that adds in a varying order rounds each element differently. The error is
    that of the coarsest dtype among the tensors and of autocast. Dtypes with fewer bits than bfloat16 are computed in
    more bits.
    """
    devices = {tensor.device.type for tensor in tensors}
    dtypes = {tensor.dtype for tensor in tensors}
    supported = [device for device in devices if torch.amp.is_autocast_available(device)]
    dtypes |= {torch.get_autocast_dtype(device) for device in supported if torch.is_autocast_enabled(device)}
    inexact = [dtype for dtype in dtypes if dtype.is_floating_point or dtype.is_complex]
    coarsest = max((torch.finfo(dtype).eps for dtype in inexact), default=0.0)
    return max(4 * min(coarsest, _BFLOAT16_EPS), 1e-5 if devices <= {"cpu"} else 1e-4)


def is_close(sums: Tensor, others: Tensor, tolerance: float) -> bool:
    """Returns whether the sums of two outputs differ only by rounding.

    On an accelerator, rounding varies between runs.

    Args:
        tolerance: of the projections, relative to the 2-norm.
    """
    rtol = 1e-6 if sums.device.type == "cpu" else 1e-4
    (size, norm, *projections), (other_size, _, *other_projections) = sums.tolist(), others.tolist()
    if not math.isfinite(size):
        return size == other_size or (math.isnan(size) and math.isnan(other_size))
    if abs(size - other_size) > rtol * abs(other_size) or not math.isfinite(other_size):
        return False
    pairs = zip(projections, other_projections, strict=True)
    # The norm is not finite if the sum of squares overflows.
    return not math.isfinite(norm) or all(abs(one - other) <= tolerance * norm for one, other in pairs)
