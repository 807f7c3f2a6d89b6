"""Does torch's backward, step and `zero_grad` without the overhead of its wrappers around them.

Torch imports its compiler with the first optimizer, which takes about 0.5 s, only to exclude optimizers from
compilation. Its wrappers take about 25 us a step on a CPU: checks of arguments, a profiler's record, and hooks that
nobody has registered. This module relies on private names of torch: in a release that lacks them nothing changes.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.optim.optimizer as _all_optimizers
from torch import Tensor
from torch.optim import Optimizer
from torch.overrides import has_torch_function_unary

_UNCOMPILED_METHODS = ("add_param_group", "zero_grad", "state_dict", "load_state_dict")
_DYNAMO = "torch._dynamo"
_set_grad_enabled: Callable[[bool], Any] = getattr(torch._C, "_set_grad_enabled", torch.set_grad_enabled)
_run_backward: Callable[..., Any] | None = getattr(torch.autograd.graph, "_engine_run_backward", None)
_is_profiling: Callable[[], bool] = getattr(torch.autograd, "_profiler_enabled", lambda: True)


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

    Hooks and gradient mode stay torch's, and so does the profiler's record while a profiler of this thread is on. A
    step without hook and profiler calls the update alone.
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
        was_enabled = torch.is_grad_enabled()
        _set_grad_enabled(self.defaults["differentiable"])
        try:
            return plain(self, *args, **kwargs)
        finally:
            _set_grad_enabled(was_enabled)

    observed_update = Optimizer.profile_hook_step(update)

    @functools.wraps(original)
    def step(self: Optimizer, *args: Any, **kwargs: Any) -> Any:
        if _DYNAMO in sys.modules and torch.compiler.is_compiling():
            return original(self, *args, **kwargs)
        return (observed_update if _is_observed(self) else update)(self, *args, **kwargs)

    optimizer.step = types.MethodType(step, optimizer)  # type: ignore[method-assign]


def _is_observed(optimizer: Optimizer) -> bool:
    """Returns whether a profiler is on or the step has a hook; True where torch lacks the names that tell."""
    try:
        return bool(
            _is_profiling()
            or optimizer._optimizer_step_pre_hooks
            or optimizer._optimizer_step_post_hooks
            or _all_optimizers._global_optimizer_pre_hooks
            or _all_optimizers._global_optimizer_post_hooks
        )
    except AttributeError:
        return True


def backward(loss: Tensor) -> None:
    """Calls `loss.backward()`, for a loss with one number."""
    if _run_backward is None or type(loss) is not Tensor or loss.is_complex() or has_torch_function_unary(loss):
        loss.backward()
        return
    # The same as torch's `backward`, without 7 us of checks of arguments that are not given.
    ones = torch.ones_like(loss)
    _run_backward((loss,), (ones,), False, False, (), allow_unreachable=True, accumulate_grad=True)


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
