"""Packs a batch in a loader worker for its way to this process: small tensors are part of the message itself.

Torch moves each tensor into shared memory of its own, whose file descriptor this process asks of the worker over a
socket: about 100 us per tensor, whatever its size. Copying a small tensor through the pipe takes a few microseconds.
"""

import ctypes
import io
import pickle
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch
from torch import Tensor

MAX_BYTES = 256 * 1024  # of all small tensors of a batch; for larger ones shared memory is faster
_MAX_ARRAY_BYTES = 1024 * 1024  # of an array of NumPy; a larger one is not copied into the pickled batch


class PackedBatch:
    """A pickled batch; unpickling this object gives the batch."""

    def __init__(self, batch: Any) -> None:
        file = io.BytesIO()
        self._arrays: list[bytes] = []  # copies: the dataset may write to an array before the batch is sent
        _Pickler(file, pickle.HIGHEST_PROTOCOL, True, self._take_large).dump(batch)
        self._message = file.getvalue()

    def _take_large(self, buffer: pickle.PickleBuffer) -> bool:
        """Keeps the memory of a large array beside the message; returns True for a small one, to be pickled in it."""
        if (memory := buffer.raw()).nbytes <= _MAX_ARRAY_BYTES:
            return True
        self._arrays.append(memory.tobytes())
        return False

    def __reduce__(self) -> tuple[Any, ...]:
        return _load, (self._message, self._arrays)


def _load(message: bytes, arrays: list[bytes]) -> Any:
    return pickle.loads(message, buffers=map(_as_array, arrays))


def _as_array(data: bytes) -> np.ndarray[Any, Any]:
    """Returns an array of `data` that can be written to, as NumPy unpickles one: without a copy."""
    array = np.empty(0, np.uint8)
    array.__setstate__((1, (len(data),), array.dtype, False, data))  # type: ignore[arg-type]
    return array


class _Pickler(ForkingPickler):
    """Pickles small tensors by their bytes and all else as torch does. Tensors go on sharing their storages."""

    def __init__(self, *args: Any) -> None:
        super().__init__(*args)
        self._num_bytes_left = MAX_BYTES
        # Addresses and sizes of the storages that are pickled by their bytes; others may begin at the same address.
        self._chosen = set[tuple[int, int]]()

    def reducer_override(self, obj: Any) -> Any:
        if type(obj) is Tensor and _is_plain(obj) and self._choose(obj.untyped_storage()):
            place = obj.storage_offset(), obj.size(), obj.stride()
            return _make_tensor, (obj.untyped_storage(), obj.dtype, *place)
        if type(obj) is torch.UntypedStorage and (obj.data_ptr(), obj.nbytes()) in self._chosen:
            return _make_storage, (bytearray(ctypes.string_at(obj.data_ptr(), obj.nbytes())),)
        return NotImplemented

    def _choose(self, storage: torch.UntypedStorage) -> bool:
        if (storage.data_ptr(), storage.nbytes()) not in self._chosen:
            if not 0 < storage.nbytes() <= self._num_bytes_left:
                return False
            self._num_bytes_left -= storage.nbytes()
            self._chosen.add((storage.data_ptr(), storage.nbytes()))
        return True


def _is_plain(tensor: Tensor) -> bool:
    is_strided = tensor.device.type == "cpu" and tensor.layout is torch.strided and not tensor.is_nested
    return is_strided and not (tensor.requires_grad or tensor.is_quantized or tensor.is_conj() or tensor.is_neg())


def _make_storage(data: bytearray) -> torch.UntypedStorage:
    # Copied into memory of torch's own, which is aligned like that of a batch made in this process.
    return torch.frombuffer(data, dtype=torch.uint8).clone().untyped_storage()


def _make_tensor(
    storage: torch.UntypedStorage, dtype: torch.dtype, offset: int, size: tuple[int, ...], stride: tuple[int, ...]
) -> Tensor:
    return torch.empty(0, dtype=dtype).set_(storage, offset, size, stride)
