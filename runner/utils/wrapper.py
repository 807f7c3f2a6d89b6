"""Changes to a module that is there already. Must not import a model library."""

from __future__ import annotations

import fnmatch
from collections.abc import Sequence

from torch import nn


def freeze(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freezes the parameters whose whole name matches one of the globs, and returns their names.

    Raises:
        ValueError: a pattern that matches nothing, with the names there are.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    frozen: list[str] = []
    for pattern in patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            raise ValueError(f"freeze: {pattern!r} matches no parameter; there are: {', '.join(parameters)}")
        frozen += matched
    for name in frozen:
        parameters[name].requires_grad_(False)
    return list(dict.fromkeys(frozen))
