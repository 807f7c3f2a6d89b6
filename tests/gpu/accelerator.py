"""The device that the GPU tests run on: a CUDA GPU where there is one, else the suite's simulated device on the CPU."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence
from typing import Any

os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read once, when CUDA starts: results then repeat

import pytest
import torch
from torch import Tensor, nn

from runner.utils import unsloth
from runner.utils.offload import Offloader
from runner.utils.streams import Streams
from tests.lazy_device import LazyDevice

HAS_GPU = torch.cuda.is_available()
DEVICE = torch.device("cuda", 0) if HAS_GPU else torch.device("cpu")
DELAY_CYCLES = 400_000  # some 0.2 ms on an H100: a copy that is used too early, or whose source is freed, shows

needs_gpu = pytest.mark.skipif(not HAS_GPU, reason="needs a CUDA GPU")


class LateStreams(Streams):
    """Streams whose copies begin late, so that a missing wait gives wrong numbers instead of luck."""

    def __init__(self, device: torch.device, is_timed: bool = False) -> None:
        super().__init__(device, is_timed)
        self.num_sent = self.num_brought = 0

    def send(self, source: Tensor, buffer: Tensor, after: Sequence[Any]) -> tuple[Any, Any]:
        """Copies to the host, late."""
        self.num_sent += 1
        self._delay(self._out)
        return super().send(source, buffer, after)

    def bring(self, buffer: Tensor, target: Tensor, after: Sequence[Any]) -> Any:
        """Copies to the device, late."""
        self.num_brought += 1
        self._delay(self._back)
        return super().bring(buffer, target, after)

    def _delay(self, stream: Any) -> None:
        with torch.cuda.stream(stream):
            torch.cuda._sleep(DELAY_CYCLES)


class Accelerator:
    """Wraps blocks so that their inputs are offloaded from the device, with late copies."""

    def __init__(self) -> None:
        self.device = DEVICE
        self.transports: list[Any] = []

    def offloader(self, **settings: Any) -> Offloader:
        """Returns an offloader of the device; `is_auto` and the other settings are those of `Offloader`."""
        is_auto = settings.get("is_auto", False)
        transport = LateStreams(self.device, is_timed=is_auto) if HAS_GPU else LazyDevice()
        self.transports.append(transport)
        return Offloader(transport, **{"min_bytes": 0, **settings})

    def wrap(self, model: nn.Module, **settings: Any) -> Any:
        """Wraps every block of a model to be offloaded; returns the transport, which counts copies."""
        offloader = self.offloader(**settings)
        for name, block in model.blocks.named_children():  # type: ignore[union-attr]
            unsloth.wrap(block, offloader, f"blocks.{name}")
        return offloader.transport

    def check(self) -> None:
        """Checks that no copy lost its source or target; on a GPU such a mistake gives wrong numbers instead."""
        if HAS_GPU:
            torch.cuda.synchronize()
        for transport in self.transports:
            assert not getattr(transport, "mistakes", []), transport.mistakes

    def new_stream(self) -> Any:
        """Returns a context that runs the work inside it on a stream of the user's, after all work before it."""
        return _on_new_stream() if HAS_GPU else contextlib.nullcontext()


@contextlib.contextmanager
def _on_new_stream() -> Iterator[None]:
    stream, current = torch.cuda.Stream(), torch.cuda.current_stream()
    stream.wait_stream(current)
    with torch.cuda.stream(stream):
        yield
    current.wait_stream(stream)


@pytest.fixture
def accelerator() -> Iterator[Accelerator]:
    """The device, with deterministic algorithms: results can then be compared to the bit."""
    torch.use_deterministic_algorithms(True)
    made = Accelerator()
    try:
        yield made
        made.check()
    finally:
        torch.use_deterministic_algorithms(False)


def overwrite_freed_memory(like: Tensor) -> None:
    """Takes memory of a tensor's size that was freed just now, and fills it with NaN: here and on other streams."""
    _fill_with_nan(like)
    if like.is_cuda:
        for _ in range(2):
            with torch.cuda.stream(torch.cuda.Stream()):
                _fill_with_nan(like)


def _fill_with_nan(like: Tensor) -> None:
    taken = [torch.full_like(like, float("nan"), requires_grad=False) for _ in range(6)]  # all at once: 6 places
    del taken
