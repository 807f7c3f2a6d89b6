"""Ends a recomputation early where that is safe. Imports torch only.

Torch's checkpoint ends it when the last tensor is handed to autograd to keep. An operation may do that before its
kernel fills the tensor, as `rrelu` does with its noise: the gradients would be made of memory that was never written.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils import checkpoint

_find_hooks: Any = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
_sequence_number: Any = getattr(torch._C._autograd, "_get_sequence_nr", None)
_Stop: Any = getattr(checkpoint, "_StopRecomputationError", None)
IS_KNOWN = None not in (_find_hooks, _sequence_number, _Stop)  # else a recomputation must not end early


class SafeStop:
    """A context inside a recomputation: passes checkpoint's early stop on only if all kept tensors are filled by then.

    An operation fills no tensor that autograd tracks, nor a parameter, without telling autograd. Any other tensor is
    filled for certain once a later operation begins, which has another sequence number.
    """

    def __init__(self) -> None:
        self._pack: Any = None
        self._unproven = -1  # the sequence number of the last operation that kept a tensor which it may yet fill
        self._is_complete = False
        self._hooks: Any = None

    def __enter__(self) -> None:
        hooks = _find_hooks(False) if IS_KNOWN else None
        if hooks is None:
            return
        self._pack, unpack = hooks[:2]
        self._hooks = saved_tensors_hooks(self._keep, unpack)
        self._hooks.__enter__()

    def _keep(self, tensor: Tensor) -> Any:
        if self._is_complete:  # what autograd is to keep of the rest of the forward is not asked for
            return tensor
        if not tensor.requires_grad and not isinstance(tensor, nn.Parameter) and not _is_view_of_parameter(tensor):
            self._unproven = _sequence_number()
        try:
            return self._pack(tensor)
        except _Stop:
            if self._unproven != _sequence_number():
                raise
            self._is_complete = True
            return tensor

    def __exit__(self, *error: object) -> None:
        if self._hooks is not None:
            self._hooks.__exit__(*error)
            self._hooks = None  # it holds this


def _is_view_of_parameter(tensor: Tensor) -> bool:
    return isinstance(tensor._base, nn.Parameter)
