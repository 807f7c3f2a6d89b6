"""Checks the values of an optimizer's groups after a saved state was loaded.

A saved state may be damaged or come from somebody else. Torch loads it unchecked, and the next update would fail.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from runner.engines.optim.optimizer_state import chained_optimizers

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # tensors if the update is compiled
_NOT_COMPARED = {"params", "param_names"}
_MAX_FLOAT = torch.finfo(torch.float32).max

Groups = Sequence[Mapping[str, Any]]  # the values of each group


def group_values(optimizer: Optimizer) -> Groups:
    """Returns the current values of each group."""
    return [dict(group) for _, group in _groups(optimizer)]


def _groups(optimizer: Optimizer) -> list[tuple[Any, dict[str, Any]]]:
    """Returns each group, and the optimizer of a chain that it belongs to."""
    return [(part, group) for part in chained_optimizers(optimizer) for group in part.param_groups]


def check_group_values(optimizer: Optimizer, built: Groups) -> None:
    """Checks that each value has the type of the value that its group was built with.

    `capturable`, which compilation sets on an accelerator, is reset if the group's parameters are on a CPU.

    Args:
        built: the result of `group_values` before the state was loaded.
    Raises:
        TypeError: naming the group and key.
    """
    for number, ((part, group), built_group) in enumerate(zip(_groups(optimizer), built, strict=True)):
        is_torchs = type(part).__module__.startswith("torch.optim.")
        on_cpu = any(parameter.device.type == "cpu" for parameter in group["params"])
        if is_torchs and on_cpu and type(group.get("capturable")) is bool and "capturable" in built_group:
            group["capturable"] = built_group["capturable"]
        compared_keys = [key for key in built_group if key in group and key not in _NOT_COMPARED]
        for key in compared_keys:
            is_strict = is_torchs and key not in _RATES
            if not _is_compatible(group[key], built_group[key], is_strict, is_torchs):
                expected, found = _describe_value(built_group[key]), _describe_value(group[key])
                raise TypeError(f"group {number}: {key}: expected {expected}, found {found}")


def _is_compatible(found: Any, expected: Any, is_strict: bool, is_torchs: bool) -> bool:
    """Returns whether a value can replace another of its type.

    Args:
        is_strict: a tensor can't replace a number.
        is_torchs: of an optimizer of torch, whose strings, booleans and None never change; other optimizers may change
            theirs while training.
    """
    if _is_number(expected) or (isinstance(expected, Tensor) and expected.numel() == 1):
        if isinstance(found, Tensor):
            return found.numel() == 1 and not found.is_complex() and (isinstance(expected, Tensor) or not is_strict)
        return _is_number(found) and not (math.isfinite(found) and abs(found) > _MAX_FLOAT)
    if isinstance(expected, (list, tuple)):
        is_list = isinstance(found, (list, tuple)) and len(found) == len(expected)
        return is_list and all(
            _is_compatible(item, expected_item, is_strict, is_torchs)
            for item, expected_item in zip(found, expected, strict=True)
        )
    if expected is None or isinstance(expected, (bool, str)):
        if is_torchs and not (expected is None and isinstance(found, bool)):
            return type(found) is type(expected) and bool(found == expected)
        return expected is None or isinstance(found, type(expected))
    return True  # of a type that only the optimizer knows


def _is_number(value: Any) -> bool:
    return abs(value) < 1 << 127 if type(value) is int else type(value) is float


def _describe_value(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}: {', '.join(_describe_value(item) for item in value[:4])}"
    if isinstance(value, Tensor):
        return f"a tensor {[*value.shape]}"
    return f"{value!r:.60}" if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
