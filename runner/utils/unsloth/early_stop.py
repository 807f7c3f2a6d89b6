"""Ends a recomputation early where that is safe. Imports torch and siblings only.

Torch's checkpoint ends it when the last tensor is handed to autograd to keep. An operation may do that before its
kernel fills the tensor, as `rrelu` does with its noise: the gradients would be made of memory that was never written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import checkpoint

from runner.utils.distributed.memory import place_of
from runner.utils.unsloth.flat_call import FlatCall

_autograd: Any = torch._C._autograd
_find_hooks: Any = getattr(_autograd, "_top_saved_tensors_default_hooks", None)
_push_hooks: Any = getattr(
    _autograd, "_push_saved_tensors_default_hooks", None
)  # `saved_tensors_hooks` takes 2 us more
_pop_hooks: Any = getattr(_autograd, "_pop_saved_tensors_default_hooks", None)
_sequence_number: Any = getattr(_autograd, "_get_sequence_nr", None)
_Stop: Any = getattr(checkpoint, "_StopRecomputationError", None)
# Else a recomputation must not end early.
IS_KNOWN = None not in (_find_hooks, _push_hooks, _pop_hooks, _sequence_number, _Stop)


def stop_safely(call: FlatCall) -> Callable[[], object] | None:
    """Passes checkpoint's early stop of a recomputation on only if all kept tensors are filled by then.

    An operation fills no tensor that autograd tracks, nor a parameter, without telling autograd; one that fills an
    input was refused in the forward. Any other tensor is filled for certain once a later operation begins, which has
    another sequence number.

    Args:
        call: that is recomputed; it begins after this.
    Returns:
        What ends it; None where there is nothing to end.
    """
    hooks = _find_hooks(False) if IS_KNOWN else None
    if hooks is None:
        return None
    pack, unpack = hooks[:2]
    unproven = -1  # the sequence number of the last operation that kept a tensor which it may yet fill
    is_complete = False

    def keep(tensor: Tensor) -> Any:
        nonlocal unproven, is_complete
        if is_complete:  # what autograd is to keep of the rest of the forward is not asked for
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

    _push_hooks(keep, unpack)
    return _pop_hooks


def _is_input(tensor: Tensor, inputs: Sequence[Tensor]) -> bool:
    for each in inputs:
        if tensor is each:
            return True
    found = place_of(tensor)  # of a view too
    return found is not None and any(found[0] == (place_of(each) or (None,))[0] for each in inputs)


def _is_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) or isinstance(tensor._base, nn.Parameter)
