"""Keeps optimizers from importing torch's compiler, which takes about 0.5 s.

Torch imports the compiler with the first optimizer, only to exclude optimizers from compilation. This module relies on
private names of torch: in a release that lacks them nothing changes, and the compiler is imported.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

_UNCOMPILED_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
_DYNAMO = "torch._dynamo"


def avoid_dynamo_import() -> None:
    """Keeps optimizers that are built from here on from importing dynamo.

    Once it is imported, nothing changes.
    """
    for name in _UNCOMPILED_METHODS:
        disabled = vars(Optimizer).get(name)
        plain = getattr(disabled, "__wrapped__", None)
        if disabled is not None and plain is not None and _DYNAMO not in sys.modules:
            plain.__dynamo_disable = _plain_until_import(plain, disabled)


def _plain_until_import(plain: Any, disabled: Callable[..., Any]) -> Callable[..., Any]:
    """Returns a function that calls `plain` until dynamo is imported, then `disabled`."""

    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _DYNAMO not in sys.modules:
            return plain(*args, **kwargs)
        plain.__dynamo_disable = None  # torch then makes its own, and does not call this function again
        return disabled(*args, **kwargs)

    return call


def step_without_dynamo(optimizer: Optimizer | None) -> None:
    """Replaces `optimizer.step` by a function that does not import dynamo.

    Hooks, profiling and gradient mode stay torch's.
    """
    if optimizer is None:
        return
    for part in getattr(optimizer, "optimizers", ()):
        step_without_dynamo(part)
    original = type(optimizer).step
    with_grad_mode = getattr(original, "__wrapped__", None)
    plain = getattr(with_grad_mode, "__wrapped__", None)
    if with_grad_mode is None or plain is None or with_grad_mode.__code__.co_name != "_use_grad":
        return

    @functools.wraps(plain)
    def update(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *args, **kwargs)

    step_without_import = Optimizer.profile_hook_step(update)

    @functools.wraps(original)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return (original if torch.compiler.is_compiling() else step_without_import)(self, *args, **kwargs)

    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]


def clear_gradients(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Sets the gradients of an optimizer's parameters to None, like its `zero_grad`."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad(set_to_none=True)
        return
    # The same as torch's `zero_grad`, without 5 us of overhead.
    for parameter in parameters:
        parameter.grad = None


def reset_dynamo() -> None:
    """Clears the cache of torch's compiler, if it is imported.

    A process may run several experiments.
    """
    if (compiler := sys.modules.get(_DYNAMO)) is not None:
        compiler.reset()
