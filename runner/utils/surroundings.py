"""What the recomputation of a block finds as its forward found it, and what it must leave as it is.

Torch's checkpoint replays torch's default generators and autocast. This adds the attention backend, the generators of
Python's `random` and of NumPy, generators that the block itself holds, and buffers: a second forward on the same batch
must not count in them. Imports torch and siblings only.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from runner.utils.early_stop import SafeStop
from runner.utils.rng_state import (
    Generator,
    find_generators,
    get_global_states,
    get_state,
    set_global_states,
    set_state,
)

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

    def __init__(self, surroundings: Surroundings, generators: Sequence[Generator] = ()) -> None:
        self._surroundings = surroundings
        self._backends = _attention_backends()
        self._global_states: Any = get_global_states()
        self._generators = [(each, get_state(each)) for each in (*surroundings.generators, *generators)]
        self._values = [
            (owner, name, held.clone())
            for owner, name in surroundings.changing
            if (held := owner._buffers[name]) is not None
        ]
        self._parameters = surroundings.parameters()
        self._modes = surroundings.modes()
        self._left: list[ExitStack] = []

    def end_forward(self) -> None:
        """Notes what the forward has left, when it has ended.

        Raises:
            RuntimeError: the forward has changed a parameter, and a recomputation would change it again.
        """
        if self._global_states == get_global_states():  # it has drawn from neither
            self._global_states = None
        self._modes = self._surroundings.modes()
        for owner, name, parameter, version in self._parameters:
            if parameter._version != version and not _renormalizes(owner):
                # A table is looked up with `max_norm` by a function, which torch doesn't tell from other changes.
                table = "use torch.nn.Embedding(max_norm=...) where a lookup with max_norm does it, "
                raise RuntimeError(
                    f"{self._surroundings.name}: its forward has modified the parameter {name!r} of "
                    f"{type(owner).__name__} by an inplace operation, and recomputing it would do so again; "
                    f"{table if parameter.ndim == 2 else ''}make it a buffer where it is not trained, or leave the "
                    "block out with exclude"
                )

    def __enter__(self) -> None:
        self._check_modes()
        stack = ExitStack()
        self._left.append(stack)
        try:
            self._restore(stack)
        except BaseException:
            self._left.pop().close()
            raise

    def _restore(self, stack: ExitStack) -> None:
        """Makes all as the forward found it; the stack makes it as it is now."""
        backends = _attention_backends()
        if backends != self._backends:
            stack.callback(_set_attention_backends, backends)
            _set_attention_backends(self._backends)
        if self._global_states is not None:
            stack.callback(set_global_states, get_global_states())
            set_global_states(self._global_states)
        for generator, state in self._generators:
            stack.callback(set_state, generator, get_state(generator))
            set_state(generator, state)
        self._replace_buffers(stack)
        self._replace_parameters(stack)
        for part in self._surroundings.renormalizing:  # the forward has renormalized the rows already, in place
            stack.callback(setattr, part, "max_norm", part.max_norm)
            part.max_norm = None
        stack.enter_context(SafeStop())

    def _check_modes(self) -> None:
        for (name, part), mode in zip(self._surroundings.parts, self._modes, strict=True):
            if part.training is not mode:
                which = f"its {type(part).__name__} {name}" if name else f"the {type(part).__name__}"
                raise RuntimeError(
                    f"{self._surroundings.name}: {which} was put into {'training' if part.training else 'evaluation'} "
                    "mode between its forward and its backward, which recomputes the forward; call backward first"
                )

    def _replace_parameters(self, stack: ExitStack) -> None:
        """Has the parameters of the forward stand in where there are others by now."""
        for owner, name, parameter, version in self._parameters:
            if parameter._version != version and not _renormalizes(owner):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{name} of {type(owner).__name__} in {self._surroundings.name}, which is recomputed in "
                    "backward, was changed after its forward; call backward before the optimizer's step"
                )
            if owner._parameters[name] is not parameter:
                stack.callback(owner._parameters.__setitem__, name, owner._parameters[name])
                owner._parameters[name] = parameter  # type: ignore[assignment]

    def _replace_buffers(self, stack: ExitStack) -> None:
        """Has copies stand in for buffers: a copy back would count as a change to autograd."""
        norms = [(norm, name, held) for norm in self._surroundings.norms if norm.training for name, held in _held(norm)]
        now = [
            (owner, name, held)
            for owner, name in self._surroundings.changing
            if (held := owner._buffers[name]) is not None
        ]
        for owner, name, value in (*norms, *now, *self._values):  # the last one counts: the value before the forward
            stack.callback(owner._buffers.__setitem__, name, owner._buffers[name])
            owner._buffers[name] = value.clone()

    def __exit__(self, *error: Any) -> None:
        self._left.pop().__exit__(*error)


def _renormalizes(part: nn.Module) -> bool:
    """Says whether a module's forward shortens rows of its weight in place, as an embedding with `max_norm` does."""
    return vars(part).get("max_norm") is not None


def _held(owner: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in owner._buffers.items() if buffer is not None]


class Surroundings:
    """The parts of a block that its forward depends on or may change: modes, statistics, other buffers, generators."""

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name, self.parts = name, list(module.named_modules())
        parts = [part for _, part in self.parts]
        self.renormalizing = [part for part in parts if _renormalizes(part)]
        self._parameters = [(part, key) for part in parts for key in part._parameters]
        self.norms = [part for part in parts if isinstance(part, _NormBase)]
        self.generators = find_generators(value for part in parts for value in vars(part).values())
        self._buffers = [(part, key) for part in parts if not isinstance(part, _NormBase) for key, _ in _held(part)]
        self.changing: list[tuple[nn.Module, str]] = []

    def parameters(self) -> list[tuple[nn.Module, str, Tensor, int]]:
        """Returns the parameters as they are, and how often each was changed so far."""
        found = [(part, name, part._parameters.get(name)) for part, name in self._parameters]
        return [(part, name, held, held._version) for part, name, held in found if held is not None]

    def modes(self) -> list[bool]:
        """Returns for each part whether it is in training mode."""
        return [part.training for _, part in self.parts]

    def versions(self) -> list[tuple[Tensor | None, int]]:
        """Returns buffers, and how often each was changed so far; running statistics are looked after anyway."""
        found = [part._buffers.get(key) for part, key in self._buffers]
        return [(held, 0 if held is None else held._version) for held in found]

    def look(self, before: list[tuple[Tensor | None, int]]) -> bool:
        """Finds the buffers that a forward has changed; warns of each once, and keeps their values from then on.

        Returns:
            Whether there is one that was not known of.
        """
        num_known = len(self.changing)
        for (part, key), (was, version), (now, newer) in zip(self._buffers, before, self.versions(), strict=True):
            is_changed = was is not now or version != newer
            if is_changed and not any(part is owner and key == name for owner, name in self.changing):
                self.changing.append((part, key))
                warnings.warn(
                    f"{self.name}: its forward changes the buffer {key!r} of {type(part).__name__}. Recomputing it "
                    "leaves the buffer alone, but in this first step has found its later value",
                    stacklevel=2,
                )
        return len(self.changing) > num_known
