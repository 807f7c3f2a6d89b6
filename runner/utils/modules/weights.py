"""Loading of weights into a module, including expanded tensors, whose elements share memory."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

_POST_HOOKS = "_load_state_dict_post_hooks"
_Faults = tuple[list[str], list[str], list[str]]  # missing and unexpected names, and messages


def load_weights(module: nn.Module, state: Mapping[str, Any], strict: bool = True) -> None:
    """Loads a state dict into a module like `load_state_dict`, which alone refuses expanded tensors.

    Args:
        strict: requires exactly the names of the module.
    Raises:
        RuntimeError: names or shapes do not fit the module.
        TypeError: the state is no mapping.
    """
    replaced: list[tuple[dict[str, Any], str, Tensor]] = []  # expanded tensors, each replaced by a copy meanwhile
    for owner in module.modules():
        tables: list[dict[str, Any]] = [owner._parameters, owner._buffers]
        for tensors in tables:
            for name, tensor in tensors.items():
                if tensor is not None and may_overlap(tensor):
                    replaced.append((tensors, name, tensor))
                    tensors[name] = tensor.detach().clone(memory_format=torch.contiguous_format)
    try:
        _load(module, state, strict)
        for tensors, name, tensor in replaced:
            copy_into(tensor, tensors[name])
    finally:
        for tensors, name, tensor in replaced:
            tensors[name] = tensor


def _load(module: nn.Module, state: Mapping[str, Any], strict: bool) -> None:
    """Loads a state dict like `module.load_state_dict`, in a time proportional to the number of tensors.

    Torch searches all names again for each child: for 5,000 layers in one list, that takes a hundred times as long.
    """
    is_torchs = getattr(module.load_state_dict, "__func__", None) is nn.Module.load_state_dict
    has_post_hooks = any(getattr(owner, _POST_HOOKS, True) for owner in module.modules())
    if not is_torchs or has_post_hooks or not isinstance(state, Mapping):
        module.load_state_dict(state, strict=strict)
        return
    copied: Any = OrderedDict(state)
    metadata = getattr(state, "_metadata", None)
    if metadata is not None:
        copied._metadata = metadata
    faults: _Faults = ([], [], [])
    _load_children(module, copied, "", metadata, faults)
    _check_faults(module, faults, strict)


def _load_children(
    module: nn.Module, state: dict[str, Any], prefix: str, metadata: Mapping[str, Any] | None, faults: _Faults
) -> None:
    """Loads the entries of a state whose names begin with `prefix` into a module and its children."""
    module._load_from_state_dict(state, prefix, dict((metadata or {}).get(prefix[:-1], {})), True, *faults)
    if not module._modules:
        return
    states: dict[str, dict[str, Any]] = {}
    for name, value in state.items():  # also those that the module's own hooks have changed
        child, is_inside, _ = name.removeprefix(prefix).partition(".")
        if is_inside and name.startswith(prefix):
            states.setdefault(child, {})[name] = value
    for child, submodule in module._modules.items():
        if submodule is not None:
            _load_children(submodule, states.get(child, {}), f"{prefix}{child}.", metadata, faults)


def _check_faults(module: nn.Module, faults: _Faults, strict: bool) -> None:
    """Raises the error that torch raises for these faults, with the same text."""
    missing, unexpected, errors = faults
    if strict:
        for kind, names in (("Unexpected", unexpected), ("Missing", missing)):
            if names:
                quoted = ", ".join(f'"{name}"' for name in names)
                errors.insert(0, f"{kind} key(s) in state_dict: {quoted}. ")
    if errors:
        messages = "\n\t".join(errors)
        raise RuntimeError(f"Error(s) in loading state_dict for {type(module).__name__}:\n\t{messages}")


def may_overlap(tensor: Tensor) -> bool:
    """Returns whether two elements of a dense tensor may share an address, as in an expanded tensor."""
    if tensor.layout is not torch.strided or tensor.is_nested or not tensor.numel():
        return False
    last = 0  # the largest offset within the dimensions so far
    for stride, size in sorted(zip(tensor.stride(), tensor.shape, strict=True)):
        if size > 1 and stride <= last:
            return True
        last += (size - 1) * stride
    return False


@torch.no_grad()
def copy_into(target: Tensor, source: Tensor) -> None:
    """Copies `source` to `target`, of equal shape; elements that share an address must get equal values."""
    if not may_overlap(target):
        target.copy_(source)
        return
    offsets = torch.zeros((), dtype=torch.int64, device=target.device)
    for dim, (size, stride) in enumerate(zip(target.shape, target.stride(), strict=True)):
        steps = torch.arange(size, device=target.device) * stride
        offsets = offsets + steps.reshape([-1 if other == dim else 1 for other in range(target.dim())])
    memory = target.detach().as_strided((int(offsets.max()) + 1,), (1,), target.storage_offset())
    memory[offsets.reshape(-1)] = source.to(memory).reshape(-1)
