"""Devices: selection by name, random generators, and the transfer of batches."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import random
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

_CPU = torch.device("cpu")
_PYTHON_GENERATOR: Any = random.seed.__self__  # type: ignore[attr-defined]  # of the module `random`
# The same as `random.seed` for an integer, without the checks of its type, which take 0.5 us.
_seed_python = super(random.Random, _PYTHON_GENERATOR).seed


def pick_device(name: str = "auto", local_rank: int | None = None) -> torch.device:
    """Returns the device with a name; `auto` is the accelerator if there is one, otherwise the CPU.

    Args:
        name: auto, cpu, cuda, cuda:1, mps or another name of torch.
        local_rank: the rank of this process on its machine: for auto and cuda it selects the accelerator's index.
    Raises:
        ValueError: the name is unknown to torch, or this machine lacks the device.
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
    """Returns the global generator of a device. Seeding it takes 1 us; `torch.manual_seed` takes 80 us."""
    if device.type == "cuda":
        torch.cuda.init()
        return torch.cuda.default_generators[device.index or 0]
    if device.type == "mps":
        return torch.mps._get_default_mps_generator()
    return torch.default_generator


def seed_all(seed: int, device: torch.device) -> None:
    """Seeds the global generators of the device, the CPU, Python and NumPy.

    It takes 6 us; `torch.manual_seed` alone takes 80 us or more, since it seeds every device.
    """
    torch.default_generator.manual_seed(seed)
    if device.type != "cpu":
        default_generator(device).manual_seed(seed)
    _seed_python(seed)
    _PYTHON_GENERATOR.gauss_next = None
    np.random.seed(seed & 0xFFFFFFFF)


@contextlib.contextmanager
def preserve_rng_state(device: torch.device = _CPU) -> Iterator[None]:
    """Restores the global generators of `device`, CPU, Python and NumPy after a block."""
    python_state = random.getstate()
    numpy_state = np.random.get_state()
    generators = (torch.default_generator, default_generator(device))
    torch_states = [generator.get_state() for generator in generators]
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        for generator, state in zip(generators, torch_states, strict=True):
            generator.set_state(state)


def has_streams(device: torch.device) -> bool:
    """Returns whether a device can copy to and from the host beside its computing."""
    if device.type in ("cpu", "meta"):
        return False
    try:
        return hasattr(torch.get_device_module(device), "Stream")
    except RuntimeError:  # torch has no module for this device, such as xla
        return False


def move(batch: Any, device: torch.device) -> Any:
    """Returns a batch with its tensors on the device; for the CPU, the batch itself.

    Mappings, tuples, lists and dataclasses keep their types at any depth. An object with a method `to`, such as a
    BatchEncoding of transformers, moves itself. NumPy arrays, texts and other objects stay as they are.
    """
    if device.type == "cpu":
        return batch
    return map_parts(batch, partial(_move_part, device=device))


def pin(batch: Any) -> Any:
    """Returns a batch with its tensors in pinned memory, nested as in `move`.

    An object with a method `pin_memory` pins itself.
    """
    return map_parts(batch, _pin_part)


def _move_part(part: Any, device: torch.device) -> Any:
    """Returns a tensor or an object on the device; None if it is neither a tensor nor moves itself."""
    if isinstance(part, Tensor):
        return part.to(device, non_blocking=True)
    if isinstance(part, type) or not callable(getattr(part, "to", None)):
        return None
    try:
        moved = part.to(device, non_blocking=True)
    except TypeError:  # its `to` has the device alone
        moved = part.to(device)
    return part if moved is None else moved  # some move in place and return nothing


def _pin_part(part: Any) -> Any:
    if isinstance(part, type) or not callable(getattr(part, "pin_memory", None)):
        return None
    return part.pin_memory()


def map_parts(batch: Any, change: Callable[[Any], Any]) -> Any:
    """Returns a nest with its parts changed; where `change` returns None, containers are entered, the rest is kept."""
    if (changed := change(batch)) is not None:
        return changed
    match batch:
        case dict() if type(batch) is dict:
            return {key: map_parts(value, change) for key, value in batch.items()}
        case Mapping():
            return _map_mapping(batch, change)
        case tuple() if hasattr(batch, "_fields"):
            return type(batch)(*(map_parts(value, change) for value in batch))
        case tuple() | list():
            return type(batch)(map_parts(value, change) for value in batch)
        case _ if dataclasses.is_dataclass(batch) and not isinstance(batch, type):
            changed = copy.copy(batch)
            for field in dataclasses.fields(batch):
                if hasattr(batch, field.name):
                    object.__setattr__(changed, field.name, map_parts(getattr(batch, field.name), change))
            return changed
        case _:
            return batch


def _map_mapping(batch: Mapping[Any, Any], change: Callable[[Any], Any]) -> Any:
    """Returns a copy of the same type, with its attributes, where the type can be copied and set; else a dict."""
    values = {key: map_parts(value, change) for key, value in batch.items()}
    if isinstance(batch, MutableMapping):
        with contextlib.suppress(Exception):
            changed = copy.copy(batch)
            for key, value in values.items():
                changed[key] = value
            return changed
    return values
