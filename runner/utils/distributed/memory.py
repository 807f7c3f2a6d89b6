"""What memory a run has used and what is left, and whether an error says that there was too little of it."""

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
    """Returns the peak so far: the device's own, or on the CPU the process's resident set, in 1e9 bytes."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * _PEAK_UNIT_BYTES / 1e9


class Peak:
    """The peak so far, looked up at most twice a second: a kernel may take 10 us to tell it."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._gb, self._next_look = 0.0, -math.inf

    def read_gb(self) -> float:
        """Returns `peak_gb` of at most half a second ago."""
        now = time.perf_counter()
        if now >= self._next_look:
            self._gb, self._next_look = peak_gb(self._device), now + 0.5
        return self._gb


def mib(num_bytes: float) -> str:
    """Returns a number of bytes in 2^20 bytes."""
    return f"{num_bytes / 2**20:.2f} MiB"


def place_of(tensor: torch.Tensor) -> tuple[int, int] | None:
    """Returns where a tensor's numbers lie and their bytes; None for one that has no memory of its own to tell of."""
    try:
        return tensor.untyped_storage().data_ptr(), tensor.nbytes
    except (RuntimeError, NotImplementedError):  # sparse, nested, or of a transform of functions
        return None


def is_out_of_memory(error: BaseException) -> bool:
    """Says whether an error is of a device's or the machine's memory having run out."""
    if isinstance(error, (torch.OutOfMemoryError, MemoryError)):
        return True
    return isinstance(error, RuntimeError) and any(part in str(error) for part in _CPU_MESSAGES)


def describe(device: torch.device) -> str:
    """Says what is used and what is free, in 1e9 bytes."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        used, held = torch.cuda.memory_allocated(device), torch.cuda.memory_reserved(device)
        return (
            f"on {device} {free / 1e9:.2f} of {total / 1e9:.2f} GB are free; this process uses {used / 1e9:.2f} GB, "
            f"holds {held / 1e9:.2f} GB, and had {peak_gb(device):.2f} GB in use at its peak"
        )
    total = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return f"this process had {peak_gb(device):.2f} GB at its peak; the machine has {total / 1e9:.2f} GB"


@contextlib.contextmanager
def lasting() -> Iterator[None]:
    """What was built so far stays to the end: the garbage collector, off until here, does not look through it."""
    gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.unfreeze()
