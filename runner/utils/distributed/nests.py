"""Nests of tensors sent between ranks: the structure as a message, the tensors as bytes, and no pickle."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from runner.utils.distributed.process_group import (
    broadcast_bytes,
    is_rank_zero,
    receive_on_rank_zero,
    run_on_all_ranks,
)

_MESSAGE_TYPES = (bool, int, float, str, bytes, type(None))


def pack(nest: Any) -> tuple[Any, list[Tensor]]:
    """Returns the structure of a nest as plain values, and its tensors, detached.

    Raises:
        TypeError: the nest holds something else than tensors, arrays, numbers and texts.
    """
    tensors: list[Tensor] = []

    def visit(node: Any) -> Any:
        if isinstance(node, Tensor):
            tensors.append(node.detach())
            return "tensor", str(node.dtype).removeprefix("torch."), [*node.shape]
        if isinstance(node, np.ndarray):
            tensors.append(torch.from_numpy(node.copy()))
            return "array", str(tensors[-1].dtype).removeprefix("torch."), [*node.shape]
        if isinstance(node, _MESSAGE_TYPES):
            return "value", node
        if isinstance(node, Mapping):
            return "dict", [(key, visit(child)) for key, child in node.items()]
        if isinstance(node, (tuple, list)):
            return ("list" if isinstance(node, list) else "tuple"), [visit(child) for child in node]
        raise TypeError(
            f"expected tensors, arrays, numbers and texts, in mappings, tuples and lists; found {node!r:.80}"
        )

    return visit(nest), tensors


def unpack(structure: Any, tensors: Iterator[Tensor]) -> Any:
    """Returns the nest of a structure of `pack`."""
    kind, content = structure[0], structure[1]
    if kind == "tensor":
        return next(tensors)
    if kind == "array":
        return next(tensors).numpy()
    if kind == "value":
        return content
    if kind == "dict":
        return {key: unpack(child, tensors) for key, child in content}
    children = [unpack(child, tensors) for child in content]
    return children if kind == "list" else tuple(children)


def exchange(structures: list[Any], tensors: list[Tensor]) -> Iterator[Any]:
    """Yields the nests of all ranks on rank zero, in the order of the ranks; yields nothing on the others.

    Every rank must call it. Rank zero holds the nest of one rank at a time, and must take all of them.

    Args:
        structures: of the nests of all ranks, as `pack` has returned them on each.
        tensors: of this rank's nest.
    """
    shapes = [list(_tensor_shapes(structure)) for structure in structures]
    received_by_rank = receive_on_rank_zero(_to_bytes(tensors), [*map(_total_bytes, shapes)])
    for structure, rank_shapes, received in zip(structures, shapes, received_by_rank, strict=False):
        yield unpack(structure, _split(received, rank_shapes))


def broadcast(nest: Any) -> Any:
    """Returns rank zero's nest on every rank; every rank calls it."""
    packed: list[list[Tensor]] = []

    def describe() -> Any:
        structure, tensors = pack(nest)
        packed.append(tensors)
        return structure if is_rank_zero() else None

    structure = run_on_all_ranks(describe)[0]
    shapes = list(_tensor_shapes(structure))
    data = _to_bytes(packed[0]) if is_rank_zero() else torch.empty(_total_bytes(shapes), dtype=torch.uint8)
    return unpack(structure, _split(broadcast_bytes(data), shapes))


def _to_bytes(tensors: list[Tensor]) -> Tensor:
    parts = [tensor.cpu().contiguous().reshape(-1).view(torch.uint8) for tensor in tensors]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.uint8)


def _total_bytes(shapes: list[tuple[torch.dtype, list[int]]]) -> int:
    return sum(_num_bytes(dtype, shape) for dtype, shape in shapes)


def _split(data: Tensor, shapes: list[tuple[torch.dtype, list[int]]]) -> Iterator[Tensor]:
    start = 0
    for dtype, shape in shapes:
        end = start + _num_bytes(dtype, shape)
        yield data[start:end].clone().view(dtype).reshape(shape)  # a copy, whose memory is aligned for the dtype
        start = end


def _tensor_shapes(structure: Any) -> Iterator[tuple[torch.dtype, list[int]]]:
    kind, content = structure[0], structure[1]
    if kind in ("tensor", "array"):
        yield getattr(torch, content), structure[2]
    elif kind != "value":
        for child in content:
            yield from _tensor_shapes(child[1] if kind == "dict" else child)


def _num_bytes(dtype: torch.dtype, shape: list[int]) -> int:
    count = dtype.itemsize
    for size in shape:
        count *= size
    return count
