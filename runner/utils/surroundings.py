"""What the recomputation of a block finds as its forward found it, and what it must leave as it is.

Torch's checkpoint replays torch's default generators and autocast. This adds the attention backend, the generators of
Python's `random` and of NumPy, generators that the block itself holds, and buffers: a second forward on the same batch
must not count in them. Imports torch and siblings only.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from runner.utils.early_stop import stop_safely
from runner.utils.memory import place_of
from runner.utils.positional import Call
from runner.utils.rng_state import (
    find_generators,
    get_global_states,
    get_state,
    set_global_states,
    set_state,
)

_ENABLE = (
    torch.backends.cuda.enable_flash_sdp,
    torch.backends.cuda.enable_mem_efficient_sdp,
    torch.backends.cuda.enable_math_sdp,
    torch.backends.cuda.enable_cudnn_sdp,
)


def _attention_backends() -> tuple[bool, bool, bool, bool]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()


def _set_attention_backends(enabled: Iterable[bool]) -> None:
    for enable, is_enabled in zip(_ENABLE, enabled, strict=True):
        enable(is_enabled)


class Replay:
    """The state that one forward of a block began with; entered around each of its recomputations, however many.

    A context that is a generator function could be entered once, and a graph that is retained is recomputed each time.
    """

    __slots__ = (
        "_backends", "_call", "_generators", "_global_states", "_modes", "_parameters", "_places", "_surroundings",
        "_undone", "_values",
    )  # fmt: skip

    def __init__(self, surroundings: Surroundings, call: Call, is_checked: bool = False) -> None:
        self._surroundings, self._call = surroundings, call
        self._backends = _attention_backends()
        self._global_states: Any = get_global_states()
        generators = surroundings.generators + call.generators
        self._generators = [(each, get_state(each)) for each in generators]
        self._values = [
            (owner, name, held.clone())
            for owner, name in surroundings.changing
            if (held := owner._buffers[name]) is not None
        ]
        self._parameters = surroundings.parameters()
        self._places = [place_of(parameter) for _, _, parameter, _ in self._parameters] if is_checked else []
        self._modes: list[bool] = []
        self._undone: list[list[Callable[[], object]]] = []  # at the end of each that is under way

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
                remedy = f"{table if parameter.ndim == 2 else ''}make it a buffer where it is not trained"
                self._refuse_change(owner, name, "by an inplace operation", remedy)
        if not self._places:
            return
        for (owner, name, parameter, _), place in zip(self._parameters, self._places, strict=True):
            if place_of(parameter) != place:  # an assignment to `data` makes no new version
                self._refuse_change(owner, name, "by an assignment to its data", "change it outside of the forward")

    def _refuse_change(self, owner: nn.Module, name: str, by: str, remedy: str) -> NoReturn:
        raise RuntimeError(
            f"{self._surroundings.name}: its forward has modified the parameter {name!r} of {type(owner).__name__} "
            f"{by}, and recomputing it would do so again; {remedy}, or leave the block out with exclude"
        )

    def __enter__(self) -> None:
        self._check_modes()
        self._undone.append([])
        try:
            self._restore(self._undone[-1])
        except BaseException:
            self.__exit__()
            raise

    def _restore(self, undone: list[Callable[[], object]]) -> None:
        """Makes all as the forward found it; what is to be undone in reverse order is added to a list."""
        backends = _attention_backends()
        if backends != self._backends:
            undone.append(partial(_set_attention_backends, backends))
            _set_attention_backends(self._backends)
        if self._global_states is not None:
            undone.append(partial(set_global_states, get_global_states()))
            set_global_states(self._global_states)
        for generator, state in self._generators:
            undone.append(partial(set_state, generator, get_state(generator)))
            set_state(generator, state)
        self._replace_buffers(undone)
        self._replace_parameters(undone)
        for part in self._surroundings.renormalizing:  # the forward has renormalized the rows already, in place
            undone.append(partial(setattr, part, "max_norm", part.max_norm))
            part.max_norm = None
        if (end := stop_safely(self._call)) is not None:
            undone.append(end)

    def _check_modes(self) -> None:
        if self._modes == self._surroundings.modes():
            return
        for (name, part), mode in zip(self._surroundings.parts, self._modes, strict=True):
            if part.training is not mode:
                which = f"its {type(part).__name__} {name}" if name else f"the {type(part).__name__}"
                raise RuntimeError(
                    f"{self._surroundings.name}: {which} was put into {'training' if part.training else 'evaluation'} "
                    "mode between its forward and its backward, which recomputes the forward; call backward first"
                )

    def _replace_parameters(self, undone: list[Callable[[], object]]) -> None:
        """Has the parameters of the forward stand in where there are others by now."""
        for owner, name, parameter, version in self._parameters:
            if parameter._version != version and not _renormalizes(owner):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{name} of {type(owner).__name__} in {self._surroundings.name}, which is recomputed in "
                    "backward, was changed after its forward; call backward before the optimizer's step"
                )
            if owner._parameters[name] is not parameter:
                undone.append(partial(owner._parameters.__setitem__, name, owner._parameters[name]))
                owner._parameters[name] = parameter  # type: ignore[assignment]

    def _replace_buffers(self, undone: list[Callable[[], object]]) -> None:
        """Has copies stand in for buffers: a copy back would count as a change to autograd."""
        if not self._surroundings.norms and not self._surroundings.changing:
            return
        norms = [(norm, name, held) for norm in self._surroundings.norms if norm.training for name, held in _held(norm)]
        now = [
            (owner, name, held)
            for owner, name in self._surroundings.changing
            if (held := owner._buffers[name]) is not None
        ]
        for owner, name, value in (*norms, *now, *self._values):  # the last one counts: the value before the forward
            undone.append(partial(owner._buffers.__setitem__, name, owner._buffers[name]))
            owner._buffers[name] = value.clone()

    def __exit__(self, *error: object) -> None:
        for undo in reversed(self._undone.pop()):
            undo()


def _renormalizes(part: nn.Module) -> bool:
    """Says whether a module is an embedding whose forward shortens rows of its weight in place.

    An attribute called `max_norm` means something else in any other module.
    """
    return isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None


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
        return [
            (part, name, held, held._version)
            for part, name in self._parameters
            if (held := part._parameters.get(name)) is not None
        ]

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
