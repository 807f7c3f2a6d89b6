"""Applies optimizations to a module in the order of their stages."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

import torch
from torch import nn

from runner.utils.distributed.memory import format_mib
from runner.utils.modules.selection import match_parameters
from runner.utils.wrapper.applied import AppliedOptimizations
from runner.utils.wrapper.protocol import Context, Optimization, Purpose, Stage, check_with_others, stage_of


def freeze(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freezes the parameters whose whole name matches one of the globs, and returns their names.

    Raises:
        ValueError: a pattern that matches nothing, with similar names.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    frozen = match_parameters("freeze", parameters, patterns)
    for name in frozen:
        parameters[name].requires_grad_(False)
    return frozen


def optimize(
    module: nn.Module,
    optimizations: Mapping[str, Optimization],
    device: torch.device | None = None,
    purpose: Purpose = Purpose.train,
) -> AppliedOptimizations:
    """Applies optimizations to a module, in place.

    Args:
        optimizations: by name; the names appear in the start-up table and in messages.
        device: where the module runs; None leaves it where it is.
    Raises:
        ValueError: an optimization matches nothing, or can't be applied; those before it are undone.
    """
    for name, optimization in optimizations.items():
        if not callable(getattr(optimization, "apply", None)):
            raise ValueError(
                f"{name}: expected an object with apply(module, context), found {type(optimization).__name__}"
            )
        with _naming(name):
            check_with_others(name, optimizations)
    ordered = sorted(optimizations.items(), key=lambda item: stage_of(item[1]))
    applied = AppliedOptimizations(module)
    before = _describe_size(module)
    try:
        if device is not None and not any(stage_of(each) is Stage.PLACE for _, each in ordered):
            module.to(device)
        for name, optimization in ordered:
            context = Context(device, purpose, optimizations, applied.reserved)
            with _naming(name):
                changes = optimization.apply(module, context)
            if changes is not None:
                applied.add(name, changes, type(optimization).__name__)
    except BaseException:
        applied.undo()
        raise
    applied.add_frozen_rows()
    if applied.rows:
        applied.rows.append(("parameters", f"{before}  ->  {_describe_size(module)}"))
    return applied


@contextmanager
def _naming(name: str) -> Iterator[None]:
    """Has the message of an error begin with the name of the optimization."""
    try:
        yield
    except ValueError as error:
        if str(error).startswith(name):
            raise
        raise ValueError(f"{name}: {error}") from error


def _describe_size(module: nn.Module) -> str:
    parameters = list(module.parameters())
    num_elements = sum(parameter.numel() for parameter in parameters)
    num_trained = sum(parameter.numel() for parameter in parameters if parameter.requires_grad)
    num_bytes = sum(parameter.nbytes for parameter in parameters)
    return f"{num_elements:,} ({num_trained:,} trained), {format_mib(num_bytes)}"
