"""Ends a recomputation early where that is safe.

Torch's checkpoint ends a recomputation when the last tensor is passed to autograd's pack hook. An operation may pass a
tensor before its kernel fills it, as `rrelu` does with its noise: backward would then read uninitialized memory.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from runner.utils.distributed.memory import memory_range
from runner.utils.unsloth.flat_call import FlatCall

_autograd: Any = torch._C._autograd
_top_hooks: Any = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
# 2 us faster than `saved_tensors_hooks`.
_push_hooks: Any = getattr(_autograd, "_push_saved_tensors_default_hooks", None)
_pop_hooks: Any = getattr(_autograd, "_pop_saved_tensors_default_hooks", None)
_sequence_number: Any = getattr(_autograd, "_get_sequence_nr", None)
_Stop: Any = getattr(checkpoint, "_StopRecomputationError", None)
# False in a release of torch without these private names; a recomputation must then not end early.
IS_KNOWN = None not in (_top_hooks, _push_hooks, _pop_hooks, _sequence_number, _Stop)


def current_hooks() -> tuple[Any, Any] | None:
    """Returns the innermost pack and unpack hooks of saved tensors.

    None if there are none or torch hides them.
    """
    hooks = _top_hooks(False) if _top_hooks is not None else None
    return None if hooks is None else hooks[:2]


def stop_safely(call: FlatCall) -> Callable[[], object] | None:
    """Delays checkpoint's early stop until every saved tensor is filled.

    Tensors that autograd tracks, and parameters, are filled when they are saved. An operation that fills an input in
    place was refused in the forward. Any other tensor may be filled by the same operation after it was saved: it is
    certainly filled once a later operation begins, which has another sequence number.

    Args:
        call: the call that is recomputed; it begins after this function returns.
    Returns:
        A function that removes the hooks; None if no hooks were added.
    """
    hooks = current_hooks() if IS_KNOWN else None
    if hooks is None:
        return None
    pack, unpack = hooks
    unproven = -1  # sequence number of the last operation that saved a tensor which it may fill later
    is_complete = False

    def save(tensor: Tensor) -> Any:
        nonlocal unproven, is_complete
        if is_complete:  # the rest of the forward is not needed
            return tensor
        if not tensor.requires_grad and not _is_input(tensor, call.tensors) and not _is_parameter(tensor):
            unproven = _sequence_number()
        try:
            return pack(tensor)
        except _Stop:
            if unproven != _sequence_number():
                raise
            is_complete = True
            return tensor

    _push_hooks(save, unpack)
    return _pop_hooks


def _is_input(tensor: Tensor, inputs: Sequence[Tensor]) -> bool:
    if any(tensor is other for other in inputs):
        return True
    found = memory_range(tensor)  # a view has the address of its base
    return found is not None and any(found[0] == (memory_range(other) or (None,))[0] for other in inputs)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
