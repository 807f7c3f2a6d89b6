"""Checks the values of an optimizer's groups, as a state gave them, by those that it was built with.

A state may be a stranger's, and torch takes what it holds: an update would fail on it. Must not import a config.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_RATES = ("lr", "initial_lr", "max_lr", "min_lr")  # a compiled update has them as tensors
_LEFT_OUT = ("params", "param_names")
_MOST = torch.finfo(torch.float32).max

Groups = Sequence[Sequence[Mapping[str, Any]]]  # of each optimizer of several that are stepped as one


def values_of(optimizer: Optimizer) -> Groups:
    """Returns the values of each group as they stand."""
    return [
        [{key: value for key, value in group.items() if key not in _LEFT_OUT} for group in part.param_groups]
        for part in _parts_of(optimizer)
    ]


def check_values(optimizer: Optimizer, built: Groups) -> None:
    """Checks that each value is of the kind of the one that its group was built with.

    `capturable`, which compiling sets on an accelerator, is set back where a group's parameters are on a CPU.

    Args:
        built: what `values_of` returned before the state was taken.
    Raises:
        TypeError: naming the group and key.
    """
    number = 0
    for part, groups in zip(_parts_of(optimizer), built, strict=True):
        is_torchs = type(part).__module__.startswith("torch.optim.")
        for group, own in zip(part.param_groups, groups, strict=True):
            on_cpu = any(parameter.device.type == "cpu" for parameter in group["params"])
            if is_torchs and on_cpu and type(group.get("capturable")) is bool and "capturable" in own:
                group["capturable"] = own["capturable"]
            for key, expected in own.items():
                if key in group and not _is_like(group[key], expected, is_torchs and key not in _RATES, is_torchs):
                    raise TypeError(f"group {number}: {key}: expected {_kind(expected)}, found {_kind(group[key])}")
            number += 1


def _parts_of(optimizer: Any) -> Sequence[Optimizer]:
    return getattr(optimizer, "optimizers", None) or [optimizer]


def _is_like(found: Any, expected: Any, is_strict: bool, is_torchs: bool) -> bool:
    """Says whether a value is of the kind of another.

    Args:
        is_strict: a number is no tensor.
        is_torchs: texts, booleans and null stay what they were built as; other optimizers may change them as they go.
    """
    if _is_number(expected) or (isinstance(expected, Tensor) and expected.numel() == 1):
        if isinstance(found, Tensor):
            return found.numel() == 1 and not found.is_complex() and (isinstance(expected, Tensor) or not is_strict)
        return _is_number(found) and not (math.isfinite(found) and abs(found) > _MOST)
    if isinstance(expected, (list, tuple)):
        is_list = isinstance(found, (list, tuple)) and len(found) == len(expected)
        return is_list and all(
            _is_like(one, other, is_strict, is_torchs) for one, other in zip(found, expected, strict=True)
        )
    if expected is None or isinstance(expected, (bool, str)):
        if is_torchs and not (expected is None and isinstance(found, bool)):
            return type(found) is type(expected) and bool(found == expected)
        return expected is None or isinstance(found, type(expected))
    return True  # of another kind: the optimizer's own


def _is_number(value: Any) -> bool:
    if type(value) is int:
        return abs(value) < 1 << 127
    return type(value) is float


def _kind(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return f"a list of {len(value)}: {', '.join(_kind(each) for each in value[:4])}"
    if isinstance(value, Tensor):
        return f"a tensor {[*value.shape]}"
    return f"{value!r:.60}" if value is None or isinstance(value, (bool, int, float, str)) else type(value).__name__
