"""What the recomputation of a block finds as its forward found it, and what it must leave as it is.

Torch's checkpoint replays the default generators and autocast. This adds the attention backend, generators that the
block itself holds, and buffers: a second forward on the same batch must not count in them. Imports torch only.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
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

    __slots__ = ("_backends", "_generators", "_left", "_parameters", "_surroundings", "_values")

    def __init__(self, surroundings: Surroundings, generators: Sequence[torch.Generator] = ()) -> None:
        self._surroundings = surroundings
        self._backends = _attention_backends()
        self._generators = [(each, each.get_state()) for each in (*surroundings.generators, *generators)]
        self._values = [
            (owner, name, held.clone())
            for owner, name in surroundings.changing
            if (held := owner._buffers[name]) is not None
        ]
        self._parameters = surroundings.parameters()
        self._left: list[tuple[Any, ...]] = []

    def __enter__(self) -> None:
        backends = _attention_backends()
        if backends != self._backends:
            _set_attention_backends(self._backends)
        states = [(each, each.get_state()) for each, _ in self._generators]
        for generator, state in self._generators:
            generator.set_state(state)
        self._left.append((backends, states, self._replace_buffers(), self._replace_parameters()))

    def _replace_parameters(self) -> list[tuple[nn.Module, str, Any]]:
        """Has the parameters of the forward stand in where there are others by now, and returns these."""
        left = []
        for owner, name, parameter, version in self._parameters:
            if parameter._version != version:
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{name} of {type(owner).__name__} in {self._surroundings.name}, which is recomputed in "
                    "backward, was changed after its forward; call backward before the optimizer's step"
                )
            if owner._parameters[name] is not parameter:
                left.append((owner, name, owner._parameters[name]))
                owner._parameters[name] = parameter  # type: ignore[assignment]
        return left

    def _replace_buffers(self) -> list[tuple[nn.Module, str, Tensor | None]]:
        """Has copies stand in for buffers, and returns these: a copy back would count as a change to autograd."""
        left: list[tuple[nn.Module, str, Tensor | None]] = []
        norms = [(norm, name, held) for norm in self._surroundings.norms if norm.training for name, held in _held(norm)]
        now = [
            (owner, name, held)
            for owner, name in self._surroundings.changing
            if (held := owner._buffers[name]) is not None
        ]
        for owner, name, value in (*norms, *now, *self._values):  # the last one counts: the value before the forward
            if not any(owner is other and name == key for other, key, _ in left):
                left.append((owner, name, owner._buffers[name]))
            owner._buffers[name] = value.clone()
        return left

    def __exit__(self, *error: object) -> None:
        backends, states, buffers, parameters = self._left.pop()
        if backends != self._backends:
            _set_attention_backends(backends)
        for generator, state in states:
            generator.set_state(state)
        for owner, name, buffer in buffers:
            owner._buffers[name] = buffer
        for owner, name, parameter in parameters:
            owner._parameters[name] = parameter


def _held(owner: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in owner._buffers.items() if buffer is not None]


class Surroundings:
    """What a block holds that its forward may change: statistics, other buffers, generators."""

    def __init__(self, module: nn.Module, name: str) -> None:
        parts = list(module.modules())
        self.name = name
        self._parameters = [(part, key) for part in parts for key in part._parameters]
        self.norms = [part for part in parts if isinstance(part, _NormBase)]
        self.generators = [each for part in parts for each in vars(part).values() if isinstance(each, torch.Generator)]
        self._buffers = [(part, key) for part in parts if not isinstance(part, _NormBase) for key, _ in _held(part)]
        self.changing: list[tuple[nn.Module, str]] = []

    def parameters(self) -> list[tuple[nn.Module, str, Tensor, int]]:
        """Returns the parameters as they are, and how often each was changed so far."""
        found = [(part, name, part._parameters.get(name)) for part, name in self._parameters]
        return [(part, name, held, held._version) for part, name, held in found if held is not None]

    def versions(self) -> list[tuple[Tensor | None, int]]:
        """Returns buffers, and how often each was changed so far; running statistics are looked after anyway."""
        found = [part._buffers.get(key) for part, key in self._buffers]
        return [(held, 0 if held is None else held._version) for held in found]

    def look(self, before: list[tuple[Tensor | None, int]]) -> None:
        """Finds the buffers that a forward has changed; warns of each once, and keeps their values from then on."""
        for (part, key), (was, version), (now, newer) in zip(self._buffers, before, self.versions(), strict=True):
            is_changed = was is not now or version != newer
            if is_changed and not any(part is owner and key == name for owner, name in self.changing):
                self.changing.append((part, key))
                warnings.warn(
                    f"{self.name}: its forward changes the buffer {key!r} of {type(part).__name__}. Recomputing it "
                    "leaves the buffer alone, but in this first step has found its later value",
                    stacklevel=2,
                )
