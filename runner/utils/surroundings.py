"""What the recomputation of a block finds as its forward found it, and what it must leave as it is.

Torch's checkpoint replays the default generators and autocast. This adds the attention backend, generators that the
block itself holds, and buffers: a second forward on the same batch must not count in them. Imports torch only.
"""

from __future__ import annotations

import warnings
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

_BACKENDS = (
    (torch.backends.cuda.flash_sdp_enabled, torch.backends.cuda.enable_flash_sdp),
    (torch.backends.cuda.mem_efficient_sdp_enabled, torch.backends.cuda.enable_mem_efficient_sdp),
    (torch.backends.cuda.math_sdp_enabled, torch.backends.cuda.enable_math_sdp),
    (torch.backends.cuda.cudnn_sdp_enabled, torch.backends.cuda.enable_cudnn_sdp),
)


def _attention_backends() -> tuple[bool, ...]:
    return tuple(is_enabled() for is_enabled, _ in _BACKENDS)


def _set_attention_backends(enabled: tuple[bool, ...]) -> None:
    for (_, enable), is_enabled in zip(_BACKENDS, enabled, strict=True):
        enable(is_enabled)


class Replay:
    """The state that one forward of a block began with; entered around each of its recomputations, however many.

    A context that is a generator function could be entered once, and a graph that is retained is recomputed each time.
    """

    __slots__ = ("_backends", "_generators", "_left", "_surroundings", "_values")

    def __init__(self, surroundings: Surroundings) -> None:
        self._surroundings = surroundings
        self._backends = _attention_backends()
        self._generators = [(each, each.get_state()) for each in surroundings.generators]
        self._values = [_held(owner)[name].clone() for owner, name in surroundings.changing]
        self._left: list[tuple[Any, ...]] = []

    def __enter__(self) -> None:
        backends = _attention_backends()
        if backends != self._backends:
            _set_attention_backends(self._backends)
        states = [(each, each.get_state()) for each, _ in self._generators]
        for generator, state in self._generators:
            generator.set_state(state)
        self._left.append((backends, states, self._replace_buffers()))

    def _replace_buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Has copies stand in for buffers, and returns these: a copy back would count as a change to autograd."""
        norms = [norm for norm in self._surroundings.norms if norm.training]
        left: list[tuple[nn.Module, str, Tensor]] = [
            (norm, name, buffer) for norm in norms for name, buffer in _held(norm).items()
        ]
        changing = self._surroundings.changing
        left += [(owner, name, _held(owner)[name]) for owner, name in changing]
        values = [buffer.clone() for *_, buffer in left]
        if self._values:
            values[-len(changing) :] = [value.clone() for value in self._values]
        for (owner, name, _), value in zip(left, values, strict=True):
            owner._buffers[name] = value
        return left

    def __exit__(self, *error: object) -> None:
        backends, states, buffers = self._left.pop()
        if backends != self._backends:
            _set_attention_backends(backends)
        for generator, state in states:
            generator.set_state(state)
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer


def _held(owner: nn.Module) -> dict[str, Tensor]:
    return {name: buffer for name, buffer in owner._buffers.items() if buffer is not None}


class Surroundings:
    """What a block holds that its forward may change: statistics, other buffers, generators."""

    def __init__(self, module: nn.Module, name: str) -> None:
        parts = list(module.modules())
        self._name = name
        self.norms = [part for part in parts if isinstance(part, _NormBase)]
        self.generators = [each for part in parts for each in vars(part).values() if isinstance(each, torch.Generator)]
        self._buffers = [(part, key) for part in parts if not isinstance(part, _NormBase) for key in _held(part)]
        self.changing: list[tuple[nn.Module, str]] = []

    def versions(self) -> list[int]:
        """Returns how often each buffer was changed so far; running statistics are looked after anyway."""
        return [-1 if (held := part._buffers[key]) is None else held._version for part, key in self._buffers]

    def look(self, before: list[int]) -> None:
        """Finds the buffers that a forward has changed; warns of each once, and keeps their values from then on."""
        for (part, key), was, now in zip(self._buffers, before, self.versions(), strict=True):
            if was != now and not any(part is owner and key == name for owner, name in self.changing):
                self.changing.append((part, key))
                warnings.warn(
                    f"{self._name}: its forward changes the buffer {key!r} of {type(part).__name__}. Recomputing it "
                    "leaves the buffer alone, but in this first step has found its later value",
                    stacklevel=2,
                )
