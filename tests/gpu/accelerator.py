"""The device of the GPU tests: a CUDA GPU if there is one, else the suite's simulated device on the CPU."""

from __future__ import annotations

import contextlib
import itertools
import os
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts: results then repeat

import pytest
import torch
from torch import Tensor, nn

from runner.utils import unsloth
from runner.utils.unsloth.offload import Offloader
from runner.utils.unsloth.streams import CopyStreams
from tests.lazy_device import LazyDevice

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
DELAY_CYCLES = 200_000  # about 0.1 ms on an H100
LONG_DELAY_CYCLES = 4_000_000  # about 2 ms: longer than the program takes to free and overwrite a source

# torch takes streams from a pool for each priority: those of another priority are never an offloader's.
OTHER_STREAMS = [torch.cuda.Stream(DEVICE, priority=-1) for _ in range(2)] if HAS_GPU else []

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")


class CountingStreams(CopyStreams):
    """Streams that count and delay copies, so that a missing wait for a copy gives wrong numbers."""

    def __init__(self, device: torch.device, is_timed: bool, delay_cycles: int) -> None:
        super().__init__(device, is_timed)
        self.num_sent = self.num_brought = 0
        self._delay_cycles = delay_cycles

    def copy_to_host(self, source: Tensor, buffer: Tensor, after: Sequence[Any]) -> tuple[Any, Any]:
        """Copies to the host."""
        self.num_sent += 1
        self._delay(self._to_host_stream)
        return super().copy_to_host(source, buffer, after)

    def copy_to_device(self, buffer: Tensor, target: Tensor, after: Sequence[Any]) -> Any:
        """Copies to the device."""
        self.num_brought += 1
        self._delay(self._to_device_stream)
        return super().copy_to_device(buffer, target, after)

    def _delay(self, stream: Any) -> None:
        if self._delay_cycles:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(self._delay_cycles)


class Accelerator:
    """Wraps blocks so that their inputs are offloaded from the device.

    Either the copies are delayed or, with `computing_is_late`, the work before them, so that a missing wait for one of
    them gives wrong numbers. The simulated device finds both without delays.
    """

    def __init__(self) -> None:
        self.transports: list[Any] = []
        self._streams: Iterator[Any] = itertools.cycle(OTHER_STREAMS)
        self.computing_is_late, self.delay_cycles = False, DELAY_CYCLES

    def offloader(self, **settings: Any) -> Offloader:
        """Returns an offloader for the device, with the settings of `Offloader`."""
        is_auto = settings.get("is_auto", False)
        delay_cycles = 0 if self.computing_is_late else self.delay_cycles
        transport = CountingStreams(DEVICE, is_auto, delay_cycles) if HAS_GPU else LazyDevice()
        self.transports.append(transport)
        return Offloader(transport, **{"min_bytes": 0, **settings})

    def wrap(self, model: nn.Module, **settings: Any) -> Any:
        """Wraps every block of a model to be offloaded; returns the transport, which counts copies."""
        offloader = self.offloader(**settings)
        for name, block in model.blocks.named_children():  # type: ignore[union-attr]
            unsloth.wrap(block, offloader, f"blocks.{name}")
        return offloader.streams

    def delay_computing(self) -> None:
        """Delays the next work on the device, if computing is late."""
        if self.computing_is_late and HAS_GPU:
            torch.cuda._sleep(self.delay_cycles)

    def check(self) -> None:
        """Checks that no copy lost its source or target; on a GPU, such an error gives wrong numbers instead."""
        if HAS_GPU:
            torch.cuda.synchronize()
        for transport in self.transports:
            assert not getattr(transport, "mistakes", []), transport.mistakes

    def other_stream(self) -> Any:
        """Returns a context that runs its work on one of two streams in turn, after all earlier work."""
        return _on_stream(next(self._streams)) if HAS_GPU else contextlib.nullcontext()


@contextlib.contextmanager
def _on_stream(stream: Any) -> Iterator[None]:
    current = torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """The device, with deterministic algorithms, so that results can be compared bit for bit."""
    torch.use_deterministic_algorithms(True)
    made = Accelerator()
    try:
        yield made
        made.check()
    finally:
        torch.use_deterministic_algorithms(False)


def overwrite_freed_memory(like: Tensor) -> None:
    """Allocates recently freed memory of a tensor's size and fills it with NaN, on this and other streams."""
    _fill_with_nan(like)
    if like.is_cuda:
        for stream in OTHER_STREAMS:
            with torch.cuda.stream(stream):
                _fill_with_nan(like)


def _fill_with_nan(like: Tensor) -> None:
    taken = [torch.full_like(like, float("nan"), requires_grad=False) for _ in range(6)]  # all at once: 6 places
    del taken
