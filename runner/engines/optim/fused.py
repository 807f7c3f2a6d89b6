"""Fused kernels of torch's optimizers, in groups where they compute what torch's default computes, in less time.

A fused kernel updates a group in one call, where torch's default makes several calls for each parameter. A saved state
records which of the two has updated each group, and a run that resumes goes on with that: they round differently.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, Adagrad, Adam, AdamW, Optimizer

from runner.engines.optim.optimizer_state import chained_optimizers, groups_of
from runner.utils.serialization import is_dtensor

_log = logging.getLogger(__name__)
# Of exactly these classes: a subclass may read its groups otherwise.
_OPERATORS = {Adam: "_fused_adam_", AdamW: "_fused_adamw_", SGD: "_fused_sgd_", Adagrad: "_fused_adagrad_"}
_DEVICES = {Adam: ("cpu", "cuda"), AdamW: ("cpu", "cuda"), SGD: ("cpu", "cuda"), Adagrad: ("cpu",)}
_DTYPES = (torch.float32, torch.float64)
_HALF_DTYPES = (torch.bfloat16, torch.float16)
_UPDATED = {"step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq", "momentum_buffer", "sum"}  # names of a state's tensors
_RULE_TABLES = ("op_single_dim_strategy_funcs", "op_strategy_funcs", "op_to_rules")  # of torch's releases


def use_fused_kernels(optimizer: Optimizer, module: nn.Module) -> None:
    """Has torch's Adam, AdamW, SGD and Adagrad use fused kernels in each group where these are right and faster.

    Call it before the first update, and after the hyperparameters were read: the choice is none of the user's. A group
    whose `fused` or `foreach` is set stays as it is. A copied or unpickled optimizer keeps `fused=True` and loses the
    checks of its updates: set `fused=None` in its groups, and call this again.
    """
    layers = [layer for layer in module.modules() if getattr(layer, "sparse", False) is True]
    sparse_ids = {id(parameter) for layer in layers for parameter in layer.parameters(recurse=False)}
    for part in chained_optimizers(optimizer):
        if type(part) not in _OPERATORS:
            continue
        for group in part.param_groups:
            is_chosen_by_user = group.get("fused") is not None or group.get("foreach") is not None
            if not is_chosen_by_user and _is_fused_right(part, group, sparse_ids):
                group["fused"] = True
        if any(group.get("fused") for group in part.param_groups):
            # Torch's GradScaler would have the kernel skip an update. SGD's then keeps momentum that nobody has set.
            part._step_supports_amp_scaling = False
            _guard_fused_updates(part)


def _is_fused_right(optimizer: Optimizer, group: Mapping[str, Any], sparse_ids: set[int]) -> bool:
    """Returns whether a group's fused kernel computes what torch's default computes, and is faster."""
    if not hasattr(optimizer, "_init_group") or group.get("capturable") or group.get("differentiable"):
        return False
    if any(isinstance(value, Tensor) for value in (group["lr"], group["weight_decay"], *group.get("betas", ()))):
        return False
    if type(optimizer) is SGD and not group["momentum"] and not group["weight_decay"]:
        return False  # one operation on each parameter: the kernel is as slow, and slower for large ones
    steps = [optimizer.state[p]["step"] for p in group["params"]] if type(optimizer) is Adagrad else ()
    if any(step.dtype is not torch.float32 for step in steps):  # of another default dtype
        return False
    return all(id(p) not in sparse_ids and _has_kernel(type(optimizer), p) for p in group["params"])


def _has_kernel(kind: type, parameter: Any) -> bool:
    """Returns whether the fused kernel of an optimizer's class updates a parameter rightly."""
    local = parameter
    if is_dtensor(parameter):
        local = parameter._local_tensor
        if local.device.type != parameter.device_mesh.device_type or not _has_sharding_rule(_OPERATORS[kind]):
            return False
    # On the CPU the kernels read memory in its order, whatever the strides, and SGD's is wrong for 16 bits.
    dtypes = _DTYPES if kind is Adagrad or (kind is SGD and local.device.type == "cpu") else _DTYPES + _HALF_DTYPES
    return (
        type(local) in (Tensor, nn.Parameter)
        and local.device.type in _DEVICES[kind]
        and local.dtype in dtypes
        and local.layout is torch.strided
        and local.is_contiguous()
        and getattr(parameter, "grad_dtype", parameter.dtype) is parameter.dtype
    )


def _has_sharding_rule(operator: str) -> bool:
    """Returns whether torch can run an operator on sharded tensors; False in a release with other private names."""
    from torch.distributed.tensor import DTensor

    propagator = getattr(getattr(DTensor, "_op_dispatcher", None), "sharding_propagator", None)
    overload = getattr(torch.ops.aten, operator).default
    return any(overload in getattr(propagator, table, ()) for table in _RULE_TABLES)


def _guard_fused_updates(optimizer: Any) -> None:
    """Has a group use torch's default from the first update on that its fused kernel would refuse or make wrongly.

    Only the update itself shows it. `_init_group` collects its tensors, before the optimizer reads `fused`.
    """
    init_group = optimizer._init_group
    has_momentum = type(optimizer) is SGD

    def init(group: dict[str, Any], parameters: list[Tensor], gradients: list[Tensor], *states: list[Any]) -> Any:
        found = init_group(group, parameters, gradients, *states)
        if group["fused"]:
            has_sparse = found[0] if isinstance(found, tuple) else found
            if reason := _find_fault(has_sparse, gradients, states[0] if has_momentum else ()):
                group["fused"] = None
                kind = type(optimizer).__name__
                _log.warning("%s: %s; torch's default updates its group from here on", kind, reason)
        return found

    optimizer._init_group = init


def _find_fault(has_sparse: bool, gradients: Sequence[Tensor], momentum: Sequence[Tensor | None]) -> str | None:
    """Returns why an update can't be made by a fused kernel, or None."""
    if has_sparse:
        return "a gradient is sparse"
    if not all(map(Tensor.is_contiguous, gradients)):
        return "a gradient is not contiguous"
    if len(set(map(type, momentum))) > 1:  # None, of a parameter without a gradient until now, and tensors
        return "a parameter has its first gradient after others"
    return None


def keep_saved_kernels(
    state: Mapping[str, Any], optimizer: Optimizer, configured: Mapping[str, Any], saved: Mapping[str, Any]
) -> Mapping[str, Any]:
    """Returns a saved state to load, whose groups keep the kernel that has written them, except where it is wrong here.

    Args:
        state: in the order of the optimizer's groups, which are copies.
        configured: the hyperparameters as configured now.
        saved: the hyperparameters as they were configured when the state was saved.
    """
    built_groups = [(type(part), group) for part in chained_optimizers(optimizer) for group in part.param_groups]
    saved_groups = groups_of(state)
    if len(saved_groups) != len(built_groups):  # an optimizer of another library, whose state has another layout
        return state
    settings = zip(configured["groups"], saved["groups"], strict=True)
    for (kind, built_group), group, (now, before) in zip(built_groups, saved_groups, settings, strict=True):
        is_changed_by_user = now.get("fused") != before.get("fused")
        is_wrong_here = group.get("fused") and not built_group.get("fused")
        if is_changed_by_user or (is_wrong_here and kind in _OPERATORS):
            group["fused"] = built_group.get("fused")
    return state


def check_fused_state(optimizer: Optimizer) -> None:
    """Checks loaded tensors that a fused kernel updates: it would write outside of those of another shape.

    Raises:
        ValueError: naming the tensor, with the expected and the found shape.
    """
    for part in chained_optimizers(optimizer):
        fused_groups = [
            group for group in part.param_groups if isinstance(part, (Adam, SGD, Adagrad)) and group["fused"]
        ]
        for parameter in itertools.chain.from_iterable(group["params"] for group in fused_groups):
            values = part.state.get(parameter, {})
            for name in values.keys() & _UPDATED:
                shape = torch.Size() if name == "step" else parameter.shape
                if isinstance(value := values[name], Tensor) and value.shape != shape:
                    raise ValueError(f"{name}: expected the shape {[*shape]}, found {[*value.shape]}")
                if isinstance(value, Tensor) and name != "step" and value.stride() != parameter.stride():
                    values[name] = torch.empty_like(parameter, requires_grad=False).copy_(value)


def describe_kernels(optimizer: Optimizer) -> str:
    """Returns the class of each optimizer, and the implementation that updates its groups."""
    return "; ".join(
        f"{type(part).__name__}{_describe_groups(part.param_groups)}" for part in chained_optimizers(optimizer)
    )


def _describe_groups(groups: Sequence[Mapping[str, Any]]) -> str:
    labels = [_label(group) for group in groups if "foreach" in group]
    counts = {label: labels.count(label) for label in labels}
    if len(counts) < 2:
        return "".join(f", {label}" for label in counts)
    return ", " + ", ".join(f"{label} ({count} of {len(labels)} groups)" for label, count in counts.items())


def _label(group: Mapping[str, Any]) -> str:
    if group.get("fused"):
        return "fused"
    if group["foreach"] is None:
        return "torch's default"
    return "foreach" if group["foreach"] else "one parameter at a time"
