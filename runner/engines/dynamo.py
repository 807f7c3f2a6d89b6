"""Optimizers without torch's compiler, which torch loads at the first one (some 0.5 s) only to keep it off them.

It rests on names private to torch: where a release lacks them nothing changes, and the compiler is loaded. Must not
import a config.
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

_KEPT_OFF = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
_COMPILER = "torch._dynamo"


def avoid_dynamo_import() -> None:
    """Optimizers built from here on don't load the compiler; once something else has, torch's own way is taken."""
    for name in _KEPT_OFF:
        kept_off = vars(Optimizer).get(name)
        plain = getattr(kept_off, "__wrapped__", None)
        if kept_off is not None and plain is not None and _COMPILER not in sys.modules:
            plain.__dynamo_disable = _until_loaded(plain, kept_off)


def _until_loaded(plain: Any, kept_off: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plain)
    def call(*args: Any, **kwargs: Any) -> Any:
        if _COMPILER not in sys.modules:
            return plain(*args, **kwargs)
        plain.__dynamo_disable = None  # torch makes its own, and this is called no more
        return kept_off(*args, **kwargs)

    return call


def step_without_dynamo(optimizer: Optimizer | None) -> None:
    """`optimizer.step` does not load the compiler; its hooks, profile and gradient mode are torch's own."""
    if optimizer is None:
        return
    for part in getattr(optimizer, "optimizers", ()):
        step_without_dynamo(part)
    own = type(optimizer).step
    graded = getattr(own, "__wrapped__", None)
    plain = getattr(graded, "__wrapped__", None)
    if graded is None or plain is None or graded.__code__.co_name != "_use_grad":
        return

    @functools.wraps(plain)
    def update(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        with torch.set_grad_enabled(self.defaults["differentiable"]):
            return plain(self, *args, **kwargs)

    light = Optimizer.profile_hook_step(update)

    @functools.wraps(own)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        return (own if torch.compiler.is_compiling() else light)(self, *args, **kwargs)

    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]


def clear_gradients(optimizer: Optimizer, parameters: Iterable[Tensor]) -> None:
    """Forgets the gradients of an optimizer's parameters, as its `zero_grad` does."""
    if type(optimizer).zero_grad is not Optimizer.zero_grad:
        optimizer.zero_grad(set_to_none=True)
        return
    for parameter in parameters:  # what torch's own does, but for 5 us around it
        parameter.grad = None


def reset_dynamo() -> None:
    """Has torch's compiler, where it is loaded, forget what it compiled: a process may run several experiments."""
    if (compiler := sys.modules.get(_COMPILER)) is not None:
        compiler.reset()
