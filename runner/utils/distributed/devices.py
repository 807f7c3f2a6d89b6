"""Devices: picked by name, their random generators, and batches moved to them."""

from __future__ import annotations

import contextlib
import random
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CPU = torch.device("cpu")


def pick_device(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """Returns the device of that name; `auto` is the accelerator where there is one, else the CPU.

    Args:
        local_rank: of several processes on one machine each gets the accelerator of its number.
    Raises:
        ValueError: a name torch doesn't know, or a device this machine lacks.
    """
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if local_rank is not None and name in ("auto", "cuda") and accelerator is not None:
        name = f"{accelerator.type}:{local_rank}"
    if name == "auto":
        return accelerator or torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"device={name!r}: expected auto, cpu, cuda, cuda:1 or mps") from None
    count = torch.accelerator.device_count() if accelerator is not None and accelerator.type == device.type else 0
    if device.type != "cpu" and (device.index or 0) >= count:
        raise ValueError(f"device={name!r}: this machine has {count} of that kind; expected cpu or auto")
    return device


def default_generator(device: torch.device) -> torch.Generator:
    """Returns the global generator of a device; seeding it costs 1 us, where `torch.manual_seed` costs 80."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


def seed_all(seed: int, device: torch.device) -> None:
    """Seeds every global generator that a forward may draw from: the device's and the CPU's, Python's and NumPy's.

    It takes 6 us; `torch.manual_seed` alone takes 80 and more, since it visits every device.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        default_generator(device).manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed & 0xFFFFFFFF)


@contextlib.contextmanager
def preserve_rng_state(device: torch.device = _CPU) -> Iterator[None]:
    """Leaves the global generators of a program as they were before a block that seeds them."""
    python, numpy = random.getstate(), np.random.get_state()
    states = [(each, each.get_state()) for each in (torch.default_generator, default_generator(device))]
    try:
        yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy)
        for generator, state in states:
            generator.set_state(state)


def move(batch: Any, device: torch.device) -> Any:
    """Returns a nest of mappings, tuples and lists with its tensors on the device; on the CPU, the batch itself."""
    if device.type == "cpu":
        return batch
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: move(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(move(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(move(value, device) for value in batch)
    return batch
