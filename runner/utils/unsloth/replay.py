"""Saves the state a block's forward depends on; restores it for recomputation.

Torch's checkpoint restores torch's default generators and autocast. This module adds the attention backend, the global
generators of Python's `random` and of NumPy, generators that the block or an object that it refers to holds, buffers,
and counts in plain attributes, which a second forward on the same batch must not raise again.
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

from runner.utils.distributed.memory import memory_range
from runner.utils.modules.generators import ObjectGenerators, Unsearched
from runner.utils.unsloth.early_stop import stop_safely
from runner.utils.unsloth.flat_call import FlatCall
from runner.utils.unsloth.rng_state import get_global_states, get_state, set_global_states, set_state

_ENABLE = (
    torch.backends.cuda.enable_flash_sdp,
    torch.backends.cuda.enable_mem_efficient_sdp,
    torch.backends.cuda.enable_math_sdp,
    torch.backends.cuda.enable_cudnn_sdp,
)
_ABSENT: Any = type("_Absent", (), {})()
_SIMPLE = {int, float, bool, str, type(None), type(_ABSENT)}
_Attribute = tuple[dict[str, Any], str, Any]  # the `__dict__` of an object, an attribute's name, and its value
_PARAMETRIZE = "constrain it with torch.nn.utils.parametrize, or after the optimizer's step"
_MAX_SEARCHES = 8  # that find the same generators as the previous one


def _attention_backends() -> tuple[bool, bool, bool, bool]:
    cuda = torch.backends.cuda
    return cuda.flash_sdp_enabled(), cuda.mem_efficient_sdp_enabled(), cuda.math_sdp_enabled(), cuda.cudnn_sdp_enabled()


def _set_attention_backends(enabled: Iterable[bool]) -> None:
    for enable, is_enabled in zip(_ENABLE, enabled, strict=True):
        enable(is_enabled)


class ReplayForwardState:
    """The state in which one forward began, as a context for its recomputations.

    It saves the state when it is created. `__enter__` restores it, and `__exit__` undoes that. A graph that is retained
    is recomputed several times, so the context can be entered several times.

    Args:
        forward_state: the parts of the block that its forward depends on.
        call: the forward.
        is_verifying: also finds attributes that the forward changes, and parameters whose data it replaces.
    """

    __slots__ = (
        "_addresses", "_attributes", "_attributes_before", "_backends", "_buffers", "_call", "_forward_state",
        "_generators", "_global_states", "_modes", "_parameters", "_undo_stacks", "_versions",
    )  # fmt: skip

    def __init__(self, forward_state: ForwardState, call: FlatCall, is_verifying: bool = False) -> None:
        self._forward_state, self._call = forward_state, call
        self._backends = _attention_backends()
        self._global_states: Any = get_global_states()
        generators = forward_state.find_generators() + call.generators
        self._generators = [(generator, get_state(generator)) for generator in generators]
        self._buffers = [(owner, name, buffer.clone()) for owner, name, buffer in forward_state.changing_buffers()]
        self._attributes_before = forward_state.attributes() if is_verifying else None
        self._attributes = [] if is_verifying else forward_state.counts()
        self._parameters = forward_state.parameters()
        self._versions = _versions(self._parameters)
        self._addresses = [None if p is None else memory_range(p) for p in self._parameters] if is_verifying else None
        self._modes: list[bool] = []
        self._undo_stacks: list[list[Callable[[], object]]] = []  # one for each recomputation that has not ended

    def end_forward(self) -> None:
        """Completes the saved state after the forward has ended.

        Raises:
            RuntimeError: the forward has changed a parameter, and a recomputation would change it again.
        """
        if self._global_states == get_global_states():  # the forward has drawn no number from them
            self._global_states = None
        self._modes = self._forward_state.modes()
        if self._attributes_before is not None:
            self._attributes = self._forward_state.find_changed_attributes(self._attributes_before)
            self._attributes_before = None
        self._attributes += self._forward_state.find_new_attributes()
        if self._versions != _versions(self._parameters) or self._addresses is not None:
            self._check_parameters()

    def _check_parameters(self) -> None:
        addresses = [None] * len(self._parameters) if self._addresses is None else self._addresses
        rows = zip(self._forward_state.parameter_names, self._parameters, self._versions, addresses, strict=True)
        for (owner, name), parameter, version, address in rows:
            if parameter is None:
                continue
            if parameter._version != version and not _renormalizes(owner):
                # A functional lookup with `max_norm` can't be told from other changes.
                table = "use torch.nn.Embedding(max_norm=...) where a lookup with max_norm does it, "
                remedy = f"{table if parameter.ndim == 2 else ''}make it a buffer where it is not trained"
                self._refuse_change(owner, name, "by an inplace operation", remedy)
            # An assignment to `data` does not raise the version.
            if address is not None and address != memory_range(parameter):
                self._refuse_change(owner, name, "by an assignment to its data", _PARAMETRIZE)

    def _refuse_change(self, owner: nn.Module, name: str, by: str, remedy: str) -> NoReturn:
        raise RuntimeError(
            f"{self._forward_state.name}: its forward has modified the parameter {name!r} of {type(owner).__name__} "
            f"{by}, and recomputing it would do so again; {remedy}, or leave the block out with exclude"
        )

    def __enter__(self) -> None:
        self._check_modes()
        self._undo_stacks.append([])
        try:
            self._restore(self._undo_stacks[-1])
        except BaseException:
            self.__exit__()
            raise

    def _restore(self, undo_stack: list[Callable[[], object]]) -> None:
        """Restores the saved state; appends functions that undo it in reverse order."""
        backends = _attention_backends()
        if backends != self._backends:
            undo_stack.append(partial(_set_attention_backends, backends))
            _set_attention_backends(self._backends)
        if self._global_states is not None:
            undo_stack.append(partial(set_global_states, get_global_states()))
            set_global_states(self._global_states)
        for generator, state in self._generators:
            undo_stack.append(partial(set_state, generator, get_state(generator)))
            set_state(generator, state)
        for table, key, value in self._attributes:
            undo_stack.append(partial(_set_attribute, table, key, table.get(key, _ABSENT)))
            _set_attribute(table, key, value)
        self._replace_buffers(undo_stack)
        self._replace_parameters(undo_stack)
        for part in self._forward_state.renormalizing:  # the forward has renormalized the rows in place already
            undo_stack.append(partial(setattr, part, "max_norm", part.max_norm))
            part.max_norm = None
        if (remove_hooks := stop_safely(self._call)) is not None:
            undo_stack.append(remove_hooks)

    def _check_modes(self) -> None:
        if self._modes == self._forward_state.modes():
            return
        for (name, part), mode in zip(self._forward_state.parts, self._modes, strict=True):
            if part.training is not mode:
                which = f"its {type(part).__name__} {name}" if name else f"the {type(part).__name__}"
                raise RuntimeError(
                    f"{self._forward_state.name}: {which} was put into {'training' if part.training else 'evaluation'} "
                    "mode between its forward and its backward, which recomputes the forward; call backward first"
                )

    def _replace_parameters(self, undo_stack: list[Callable[[], object]]) -> None:
        """Puts back the parameters of the forward where others were assigned since."""
        if self._versions != _versions(self._parameters):
            self._refuse_later_change()
        current = self._forward_state.parameters()
        if all(map(operator.is_, current, self._parameters)):
            return
        rows = zip(self._forward_state.parameter_names, self._parameters, current, strict=True)
        for (owner, name), parameter, other in rows:
            if parameter is not None and parameter is not other:
                undo_stack.append(partial(owner._parameters.__setitem__, name, owner._parameters[name]))
                owner._parameters[name] = parameter

    def _refuse_later_change(self) -> None:
        rows = zip(self._forward_state.parameter_names, self._parameters, self._versions, strict=True)
        for (owner, name), parameter, version in rows:
            if parameter is not None and parameter._version != version and not _renormalizes(owner):
                raise RuntimeError(
                    "one of the variables needed for gradient computation has been modified by an inplace operation: "
                    f"{name} of {type(owner).__name__} in {self._forward_state.name}, which is recomputed in "
                    "backward, was changed after its forward; call backward before the optimizer's step"
                )

    def _replace_buffers(self, undo_stack: list[Callable[[], object]]) -> None:
        """Replaces buffers by copies for the recomputation.

        Autograd would count a copy back as a change in place.
        """
        if not self._forward_state.norms and not self._forward_state.buffers_that_change:
            return
        training_norms = [norm for norm in self._forward_state.norms if norm.training]
        statistics = [(norm, name, buffer) for norm in training_norms for name, buffer in _buffers_of(norm)]
        current = self._forward_state.changing_buffers()
        # If a buffer occurs twice, the last value counts: the one before the forward.
        for owner, name, value in (*statistics, *current, *self._buffers):
            undo_stack.append(partial(owner._buffers.__setitem__, name, owner._buffers[name]))
            owner._buffers[name] = value.clone()

    def __exit__(self, *error: object) -> None:
        for undo in reversed(self._undo_stacks.pop()):
            undo()


def _renormalizes(part: nn.Module) -> bool:
    """Returns whether a module is an embedding that renormalizes its weight in place.

    In any other module an attribute `max_norm` means something else.
    """
    return isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None


def _versions(tensors: list[Tensor | None]) -> list[int]:
    return [0 if tensor is None else tensor._version for tensor in tensors]


def _set_attribute(table: dict[str, Any], key: str, value: Any) -> None:
    if value is _ABSENT:
        table.pop(key, None)
    else:
        table[key] = value


def _buffers_of(owner: nn.Module) -> list[tuple[str, Tensor]]:
    return [(name, buffer) for name, buffer in owner._buffers.items() if buffer is not None]


class ForwardState(Unsearched):
    """The parts of a block that its forward depends on or may change.

    These are training modes, running statistics, other buffers, counts in plain attributes, and random generators, also
    those of objects that the block refers to. `ReplayForwardState` saves and restores them for one forward.

    Attributes:
        parts: the block's submodules with their names, itself included.
        renormalizing: embeddings that renormalize rows of their weight in place.
        parameter_names: the owner and name of each parameter.
        norms: submodules with running statistics.
        buffers_that_change: the owner and name of each buffer that a forward was found to change.
        counting: the owner and name of each plain attribute that a forward was found to change.
    """

    def __init__(self, module: nn.Module, name: str) -> None:
        self.name, self.parts = name, list(module.named_modules())
        parts = [part for _, part in self.parts]
        self.renormalizing = [part for part in parts if _renormalizes(part)]
        self.parameter_names = [(part, key) for part in parts for key in part._parameters]
        self.norms = [part for part in parts if isinstance(part, _NormBase)]
        self._held: ObjectGenerators | None = None
        self._searches_left = _MAX_SEARCHES
        others = [part for part in parts if not isinstance(part, _NormBase)]
        self._buffer_names = [(part, key) for part in others for key, _ in _buffers_of(part)]
        self.buffers_that_change: list[tuple[nn.Module, str]] = []
        self.counting: list[tuple[nn.Module, str]] = []

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), "_held": None}  # a copy holds other generators

    def find_generators(self) -> list[Any]:
        """Returns the held generators.

        Searches again if one was replaced, or if new ones may have been made.
        """
        held = self._held
        if held is not None and not held.is_replaced() and not (self._searches_left and held.may_have_more()):
            return held.sources
        self._held = ObjectGenerators(block=self.parts[0][1])
        if held is not None and list(map(id, held.sources)) == list(map(id, self._held.sources)):
            self._searches_left -= 1  # an attribute that is None in every forward would cause a search each time
        return self._held.sources

    def find_new_attributes(self) -> list[_Attribute]:
        """Returns attributes that the forward has made, with their values before it."""
        held = self._held
        return held.find_new(_ABSENT) if held and self._searches_left and held.may_have_more() else []

    def parameters(self) -> list[Tensor | None]:
        """Returns the current parameters, in the order of `parameter_names`."""
        return [part._parameters.get(name) for part, name in self.parameter_names]

    def attributes(self) -> list[dict[str, Any]]:
        return [dict(vars(part)) for _, part in self.parts]

    def find_changed_attributes(self, before: list[dict[str, Any]]) -> list[_Attribute]:
        """Finds plain attributes that a forward has changed, such as a count of calls.

        Adds them to `counting`.

        Returns:
            The attributes with their values before the forward.
        """
        changed = []
        for (_, part), old in zip(self.parts, before, strict=True):
            now = vars(part)
            for key in {**old, **now}:
                value = old.get(key, _ABSENT)
                if value is not now.get(key, _ABSENT) and type(value) in _SIMPLE and key != "training":
                    changed.append((now, key, value))
                    if not any(part is owner and key == name for owner, name in self.counting):
                        self.counting.append((part, key))
        return changed

    def counts(self) -> list[_Attribute]:
        """Returns the attributes in `counting` with their current values, without tensors.

        These would stay alive.
        """
        attributes = [(vars(part), key, vars(part).get(key, _ABSENT)) for part, key in self.counting]
        return [(table, key, value) for table, key, value in attributes if type(value) in _SIMPLE]

    def modes(self) -> list[bool]:
        return [part.training for _, part in self.parts]

    def changing_buffers(self) -> list[tuple[nn.Module, str, Tensor]]:
        """Returns owner, name and current value of each of `buffers_that_change`."""
        buffers = [(owner, name, owner._buffers[name]) for owner, name in self.buffers_that_change]
        return [(owner, name, buffer) for owner, name, buffer in buffers if buffer is not None]

    def buffer_versions(self) -> list[tuple[Tensor | None, int]]:
        """Returns each buffer with its version.

        Without running statistics, which are always restored.
        """
        if not self._buffer_names:
            return []
        buffers = [part._buffers.get(key) for part, key in self._buffer_names]
        return [(buffer, 0 if buffer is None else buffer._version) for buffer in buffers]

    def find_changed_buffers(self, before: list[tuple[Tensor | None, int]]) -> bool:
        """Finds buffers that a forward has changed.

        Adds them to `buffers_that_change` with one warning each.

        Args:
            before: the result of `buffer_versions` before the forward.
        Returns:
            True if a buffer was added.
        """
        num_known = len(self.buffers_that_change)
        rows = zip(self._buffer_names, before, self.buffer_versions(), strict=True)
        for (part, key), (old, old_version), (buffer, version) in rows:
            is_changed = old is not buffer or old_version != version
            if is_changed and not any(part is owner and key == name for owner, name in self.buffers_that_change):
                self.buffers_that_change.append((part, key))
                warnings.warn(
                    f"{self.name}: its forward changes the buffer {key!r} of {type(part).__name__}. Recomputing it "
                    "leaves the buffer alone, but in this first step has found its later value",
                    stacklevel=2,
                )
        return len(self.buffers_that_change) > num_known
