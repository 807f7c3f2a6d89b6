"""Comparison of a block's outputs by a few sums, without keeping the outputs.

The sum of the absolute values sees any change of size. Sums with random weights also see values that have changed their
signs or their places. Imports torch only.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

_ROW_SIZE = 1 << 14  # elements that have weights of their own; each row of so many has another weight
_PIECE_SIZE = 1 << 22  # elements that are converted at a time
_NUM_PROJECTIONS = 3  # one alone misses 3 changes of signs in 100 at bfloat16's tolerance


@torch.no_grad()
def sums_of(output: Any) -> list[Tensor]:
    """Returns of each floating-point or complex tensor of an output its norms and projections [2 + projections]."""
    return [_sums(leaf) for leaf in tensors_of(output) if _is_plain(leaf)]


def tensors_of(output: Any, seen: frozenset[int] = frozenset()) -> Iterator[Tensor]:
    """Yields the tensors of a nest; dataclasses are opened too."""
    for leaf in tree_leaves(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif dataclasses.is_dataclass(leaf) and not isinstance(leaf, type) and id(leaf) not in seen:
            values = [getattr(leaf, each.name, None) for each in dataclasses.fields(leaf)]
            yield from tensors_of(values, seen | {id(leaf)})


def _is_plain(tensor: Tensor) -> bool:
    if type(tensor) is not Tensor or tensor.layout is not torch.strided or tensor.is_meta:
        return False
    return tensor.is_floating_point() or tensor.is_complex()


def _sums(tensor: Tensor) -> Tensor:
    if tensor.is_complex():
        tensor = torch.view_as_real(tensor.resolve_conj())
    dtype = torch.promote_types(tensor.dtype, torch.float32)
    norms = [torch.linalg.vector_norm(tensor, order, dtype=dtype) for order in (1, 2)]
    return torch.stack([*norms, *_projections(tensor.reshape(-1), dtype)])


def _projections(flat: Tensor, dtype: torch.dtype) -> Tensor:
    """Returns the scalar products [projections] of a vector with random vectors of unit variance.

    The weight of an element is that of its column times that of its row of a matrix, so few weights are kept.
    """
    weights = _weights(flat.device, dtype)
    total = torch.zeros(_NUM_PROJECTIONS, dtype=dtype, device=flat.device)
    for index, piece in enumerate(flat.split(_PIECE_SIZE)):
        piece = piece.to(dtype)
        first_row = index * (_PIECE_SIZE // _ROW_SIZE)
        num_rows = len(piece) // _ROW_SIZE
        whole, rest = piece[: num_rows * _ROW_SIZE], piece[num_rows * _ROW_SIZE :]
        total += _project(whole.view(num_rows, _ROW_SIZE), first_row, weights)
        total += _project(rest.view(1, len(rest)), first_row + num_rows, weights)
    return total


def _project(rows: Tensor, first_row: int, weights: Tensor) -> Tensor:
    numbers = torch.arange(first_row, first_row + len(rows), device=rows.device) % _ROW_SIZE
    sums = torch.stack([(rows * each[: rows.shape[1]]).sum(1) for each in weights])
    return (sums * weights.roll(1, 0)[:, numbers]).sum(1)


@functools.lru_cache(8)
def _weights(device: torch.device, dtype: torch.dtype) -> Tensor:
    """Returns random numbers [projections, elements of a row], the same ones on every call."""
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(_NUM_PROJECTIONS, _ROW_SIZE, generator=generator, dtype=torch.float32, device="cpu")
    return drawn.to(device, dtype)


def tolerance_of(tensors: Iterable[Tensor]) -> float:
    """Returns how far projections may differ by rounding, as a share of the 2-norm.

    A kernel that adds in any order rounds each element otherwise. The errors are those of the coarsest dtype that
    takes part: of the tensors or of autocast.
    """
    devices, dtypes = set[str](), set[torch.dtype]()
    for tensor in tensors:
        devices.add(tensor.device.type)
        dtypes.add(tensor.dtype)
    able = [device for device in devices if torch.amp.is_autocast_available(device)]
    dtypes |= {torch.get_autocast_dtype(device) for device in able if torch.is_autocast_enabled(device)}
    coarsest = max((torch.finfo(each).eps for each in dtypes if each.is_floating_point or each.is_complex), default=0.0)
    return max(4 * min(coarsest, _BFLOAT16_EPS), 1e-5 if devices <= {"cpu"} else 1e-4)


_BFLOAT16_EPS = torch.finfo(torch.bfloat16).eps  # what is kept in fewer bits is computed in more


def is_close(sums: Tensor, others: Tensor, tolerance: float) -> bool:
    """Says whether sums of two outputs differ by rounding alone, which on an accelerator may differ from run to run.

    Args:
        tolerance: of the projections, as a share of the 2-norm.
    """
    rtol = 1e-6 if sums.device.type == "cpu" else 1e-4
    (size, norm, *projections), (other_size, _, *other_projections) = sums.tolist(), others.tolist()
    if not math.isfinite(size):
        return size == other_size or (math.isnan(size) and math.isnan(other_size))
    if abs(size - other_size) > rtol * abs(other_size) or not math.isfinite(other_size):
        return False
    if not math.isfinite(norm):  # the squares are too large for the dtype
        return True
    pairs = zip(projections, other_projections, strict=True)
    return all(abs(one - other) <= tolerance * norm for one, other in pairs)
