"""What the recomputation of a block finds as its forward found it, and what it must leave as it is.

Torch's checkpoint replays torch's default generators and autocast. This adds the attention backend, the generators of
Python's `random` and of NumPy, generators that the block or what it refers to holds, buffers, and counts in plain
attributes: a second forward on the same batch must not count in them. Imports torch and siblings only.
"""

from __future__ import annotations

import operator
import warnings
from collections.abc import Callable, Iterable
from functools import partial
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from runner.utils.distributed.memory import place_of
from runner.utils.modules.generators import HeldGenerators, Unsearched
from runner.utils.unsloth.early_stop import stop_safely
from runner.utils.unsloth.flat_call import FlatCall
from runner.utils.unsloth.rng_state import (
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


_ABSENT: Any = type("_Absent", (), {})()
_SIMPLE = {int, float, bool, str, type(None), type(_ABSENT)}
_Attribute = tuple[dict[str, Any], str, Any]  # a table of attributes, the name of one, and its value
_PARAMETRIZE = "constrain it with torch.nn.utils.parametrize, or after the optimizer's step"
_MOST_SEARCHES = 8  # that find no other generators than the one before


def _attention_backends() -> tuple[bool, bool, bool, bool]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()


def _set_attention_backends(enabled: Iterable[bool]) -> None:
    for enable, is_enabled in zip(_ENABLE, enabled, strict=True):
        enable(is_enabled)


class ReplayForwardState:
    """The state that one forward of a block began with; entered around each of its recomputations, however many.

    A context that is a generator function could be entered once, and a graph that is retained is recomputed each time.
    """

    __slots__ = (
        "_attributes", "_backends", "_before", "_call", "_generators", "_global_states", "_modes", "_parameters",
        "_places", "_surroundings", "_undone", "_values", "_versions",
    )  # fmt: skip

    def __init__(self, surroundings: ForwardState, call: FlatCall, is_checked: bool = False) -> None:
        self._surroundings, self._call = surroundings, call
        self._backends = _attention_backends()
        self._global_states: Any = get_global_states()
        generators = surroundings.find_generators() + call.generators
        self._generators = [(each, get_state(each)) for each in generators]
        self._values = [
            (owner, name, held.clone())
            for owner, name in surroundings.changing
            if (held := owner._buffers[name]) is not None
        ]
        self._before = surroundings.attributes() if is_checked else None
        self._attributes = surroundings.counts() if surroundings.counting and not is_checked else []
        self._parameters = surroundings.parameters()
        self._versions = _versions(self._parameters)
        self._places = [None if each is None else place_of(each) for each in self._parameters] if is_checked else None
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
        if self._before is not None:
            self._attributes, self._before = self._surroundings.look_at_attributes(self._before), None
        self._attributes += self._surroundings.find_new()
        if self._versions != _versions(self._parameters) or self._places is not None:
            self._check_parameters()

    def _check_parameters(self) -> None:
        places = [None] * len(self._parameters) if self._places is None else self._places
        named = zip(self._surroundings.parameter_names, self._parameters, self._versions, places, strict=True)
        for (owner, name), parameter, version, place in named:
            if parameter is None:
                continue
            if parameter._version != version and not _renormalizes(owner):
                # A table is looked up with `max_norm` by a function, which torch doesn't tell from other changes.
                table = "use torch.nn.Embedding(max_norm=...) where a lookup with max_norm does it, "
                remedy = f"{table if parameter.ndim == 2 else ''}make it a buffer where it is not trained"
                self._refuse_change(owner, name, "by an inplace operation", remedy)
            if place is not None and place != place_of(parameter):  # an assignment to `data` makes no new version
                self._refuse_change(owner, name, "by an assignment to its data", _PARAMETRIZE)

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
        for table, key, value in self._attributes:
            undone.append(partial(_put, table, key, table.get(key, _ABSENT)))
            _put(table, key, value)
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
        if self._versions != _versions(self._parameters):
            self._refuse_later_change()
        present = self._surroundings.parameters()
        if all(map(operator.is_, present, self._parameters)):
            return
        named = zip(self._surroundings.parameter_names, self._parameters, present, strict=True)
        for (owner, name), parameter, other in named:
            if parameter is not None and parameter is not other:
                undone.append(partial(owner._parameters.__setitem__, name, owner._parameters[name]))
                owner._parameters[name] = parameter

    def _refuse_later_change(self) -> None:
        named = zip(self._surroundings.parameter_names, self._parameters, self._versions, strict=True)
        for (owner, name), parameter, version in named:
            if parameter is not None and parameter._version != version and not _renormalizes(owner):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{name} of {type(owner).__name__} in {self._surroundings.name}, which is recomputed in "
                    "backward, was changed after its forward; call backward before the optimizer's step"
                )

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


def _versions(tensors: list[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor._version for tensor in tensors]


def _put(table: dict[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        table.pop(key, None)
    else:
        table[key] = value


def _held(owner: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in owner._buffers.items() if buffer is not None]


class ForwardState(Unsearched):
    """The parts of a block that its forward depends on or may change.

    These are modes, statistics, other buffers, counts in plain attributes, and generators, those too that are held by
    what the block refers to.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name, self.parts = name, list(module.named_modules())
        parts = [part for _, part in self.parts]
        self.renormalizing = [part for part in parts if _renormalizes(part)]
        self.parameter_names = [(part, key) for part in parts for key in part._parameters]
        self.norms = [part for part in parts if isinstance(part, _NormBase)]
        self._held: HeldGenerators | None = None
        self._searches_left = _MOST_SEARCHES
        self._buffers = [(part, key) for part in parts if not isinstance(part, _NormBase) for key, _ in _held(part)]
        self.changing: list[tuple[nn.Module, str]] = []
        self.counting: list[tuple[nn.Module, str]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": None}  # a copy holds other generators

    def find_generators(self) -> list[Any]:
        """Returns the generators, looked for again where one was put in the place of another or may have been made."""
        held = self._held
        if held is not None and not held.is_replaced() and not (self._searches_left and held.may_have_more()):
            return held.sources
        self._held = HeldGenerators(block=self.parts[0][1])
        if held is not None and list(map(id, held.sources)) == list(map(id, self._held.sources)):
            self._searches_left -= 1  # an attribute may be None again and again
        return self._held.sources

    def find_new(self) -> list[_Attribute]:
        """Returns attributes that a forward has made, such as a generator, and what they were before it."""
        held = self._held
        if held is None or not self._searches_left or not held.may_have_more():
            return []
        return held.find_new(_ABSENT)

    def parameters(self) -> list[Tensor | None]:
        """Returns the parameters as they are, in the order of `parameter_names`."""
        return [part._parameters.get(name) for part, name in self.parameter_names]

    def attributes(self) -> list[dict[str, Any]]:
        """Returns the attributes of each part as they are."""
        return [dict(vars(part)) for _, part in self.parts]

    def look_at_attributes(self, before: list[dict[str, Any]]) -> list[_Attribute]:
        """Finds the plain attributes that a forward has changed, such as a count of its calls.

        Returns:
            What they were before it.
        """
        found = []
        for (_, part), old in zip(self.parts, before, strict=True):
            now = vars(part)
            for key in {**old, **now}:
                value = old.get(key, _ABSENT)
                if value is now.get(key, _ABSENT) or type(value) not in _SIMPLE or key == "training":
                    continue
                found.append((now, key, value))
                if not any(part is owner and key == name for owner, name in self.counting):
                    self.counting.append((part, key))
        return found

    def counts(self) -> list[_Attribute]:
        """Returns the attributes that forwards have changed so far, as they are; tensors would be kept alive."""
        found = [(vars(part), key, vars(part).get(key, _ABSENT)) for part, key in self.counting]
        return [(table, key, value) for table, key, value in found if type(value) in _SIMPLE]

    def modes(self) -> list[bool]:
        """Returns for each part whether it is in training mode."""
        return [part.training for _, part in self.parts]

    def versions(self) -> list[tuple[Tensor | None, int]]:
        """Returns buffers, and how often each was changed so far; running statistics are looked after anyway."""
        if not self._buffers:
            return []
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
