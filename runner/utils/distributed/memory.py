"""Memory of a device or process: peak use, free memory, and out-of-memory errors."""

from __future__ import annotations

import contextlib
import gc
import math
import os
import resource
import sys
import time
from collections.abc import Iterator

import torch

_PEAK_UNIT_BYTES = 1 if sys.platform == "darwin" else 1024
_CPU_MESSAGES = ("can't allocate memory", "not enough memory")


def peak_gb(device: torch.device) -> float:
    """Returns the peak of allocated device memory, or for the CPU of the resident set, in units of 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT_BYTES / 1e9


class PeakMemory:
    """The peak memory use, read at most twice a second: the system call may take 10 us."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gb = 0.0
        self._next_read_s = -math.inf

    def read_gb(self) -> float:
        """Returns `peak_gb`, at most half a second old."""
        now = time.perf_counter()
        if now >= self._next_read_s:
            self._gb, self._next_read_s = peak_gb(self._device), now + 0.5
        return self._gb


def format_mib(num_bytes: float) -> str:
    """Returns a number of bytes in units of 2^20 bytes, as text."""
    return f"{num_bytes / 2**20:.2f} MiB"


def memory_range(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Returns the address and size in bytes of a tensor's memory; None for a tensor without a storage."""
    try:
        return tensor.untyped_storage().data_ptr(), tensor.nbytes
    except (RuntimeError, NotImplementedError):  # sparse, nested, or a functorch wrapper
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Returns whether an error means that the device or the machine ran out of memory."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _CPU_MESSAGES)


def describe_memory(device: torch.device) -> str:
    """Returns a sentence on used and free memory, in units of 1e9 bytes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used, reserved = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return (
            f"on {device} {free / 1e9:.2f} of {total / 1e9:.2f} GB are free; this process uses {used / 1e9:.2f} GB, "
            f"holds {reserved / 1e9:.2f} GB, and had {peak_gb(device):.2f} GB in use at its peak"
        )
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"this process had {peak_gb(device):.2f} GB at its peak; the machine has {total / 1e9:.2f} GB"


@contextlib.contextmanager
def freeze_gc() -> Iterator[None]:
    """Enables garbage collection for a block, and exempts the objects that exist before.

    The collector must be disabled before. The objects of the set-up live as long as the run, so it need not scan them.
    Where torch's objects are exempt for good, as in a command, only these are: the modules of the user's are finalized
    at the program's end as in any program.
    """
    if gc.get_freeze_count():
        gc.enable()
        yield
        return
    gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.unfreeze()
