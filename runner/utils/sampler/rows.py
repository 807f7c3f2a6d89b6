"""Fetches a batch of a `TensorDataset` by indexing its tensors once, instead of collating samples."""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Subset, TensorDataset, default_collate, get_worker_info
from torch.utils.data._utils import collate as torch_collate

from runner.utils.sampler.packing import MAX_BYTES

_DTYPES = {
    torch.bool, torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, torch.float16, torch.bfloat16,
    torch.float32, torch.float64, torch.complex64, torch.complex128,
}  # fmt: skip
MOST_IDENTIFIED_BYTES = 4 << 20  # are read in less time than loader workers need to start
RowsIdentity = tuple[Any, ...]


def has_rows(dataset: Any, collate: Any) -> bool:
    """Returns whether `fetch_rows` may fetch the batches of a dataset: it is a `TensorDataset` or a subset of one.

    A subclass may return other samples, and a changed `default_collate_fn_map` other batches.
    """
    while type(dataset) is Subset:
        dataset = dataset.dataset
    functions = getattr(torch_collate, "default_collate_fn_map", {})
    is_torchs = Tensor in functions and functions[Tensor] is getattr(torch_collate, "collate_tensor_fn", None)
    is_torchs = is_torchs and not any(issubclass(tuple, kind) for kind in functions)
    return type(dataset) is TensorDataset and collate is default_collate and is_torchs


def fetch_rows(dataset: Any, indices: list[Any]) -> list[Tensor] | None:
    """Returns the batch that torch collates of the samples, bit for bit; None if it can't be indexed.

    No sample draws random numbers, so none is seeded.

    Args:
        dataset: one that `has_rows`.
    """
    try:
        while type(dataset) is Subset:
            indices = [dataset.indices[index] for index in indices]
            dataset = dataset.dataset
        if set(map(type, indices)) != {int} or not all(map(_is_plain, dataset.tensors)) or _is_large(dataset, indices):
            return None
        rows = torch.from_numpy(np.array(indices, np.int64))
        return [tensor.index_select(0, rows) for tensor in dataset.tensors]
    except Exception:  # fetching the samples raises it, too, and names the index
        return None


def identify_rows(dataset: Any, collate: Any) -> RowsIdentity | None:
    """Returns a value that changes if any row of a dataset does; None if it isn't one that `has_rows`, or is large.

    A tensor's own counter of changes misses those by NumPy and `tensor.data`, so the bytes are read.
    """
    if not has_rows(dataset, default_collate if collate is None else collate):
        return None
    num_bytes = 0
    indices = []
    while type(dataset) is Subset:
        if type(dataset.indices) not in {list, range}:
            return None
        num_bytes += 8 * len(dataset.indices)
        if num_bytes > MOST_IDENTIFIED_BYTES or set(map(type, dataset.indices)) - {int}:
            return None
        indices.append(tuple(dataset.indices))
        dataset = dataset.dataset
    if not all(map(_is_plain, dataset.tensors)):
        return None
    if num_bytes + sum(tensor.nbytes for tensor in dataset.tensors) > MOST_IDENTIFIED_BYTES:
        return None
    contents = [hashlib.sha256(tensor.reshape(-1).view(torch.uint8).numpy()).digest() for tensor in dataset.tensors]
    kinds = [(tensor.shape, tensor.dtype) for tensor in dataset.tensors]
    return indices, kinds, contents


def _is_large(dataset: TensorDataset, indices: list[int]) -> bool:
    """Returns whether this is a worker with a batch that is better collated in shared memory than copied there."""
    if get_worker_info() is None:
        return False
    return sum(tensor.nbytes for tensor in dataset.tensors) * len(indices) > MAX_BYTES * len(dataset)


def _is_plain(tensor: Any) -> bool:
    return (
        type(tensor) is Tensor
        and tensor.dtype in _DTYPES
        and tensor.device.type == "cpu"
        and tensor.is_contiguous()
        and not (tensor.requires_grad or tensor.is_conj() or tensor.is_neg())
    )
