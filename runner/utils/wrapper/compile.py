"""Compiles a module by torch: each block's forward, or the module's call. Loads the compiler only when called."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from runner.utils.modules.selection import find_blocks


def compile_module(
    module: nn.Module,
    *,
    scope: str = "blocks",
    backend: str = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    memory_budget: float | None = None,
) -> tuple[list[str], Callable[[], None]]:
    """Has torch compile a module, in place, at its first call; names in the module stay the same.

    Args:
        scope: blocks compiles each block's forward, one program for all blocks of a class; whole the module's call.
        memory_budget: share of the activations that is kept for backward: 0 recomputes all, 1 none.
    Returns:
        The names of the compiled modules ("" is the module itself), and a function that undoes it.
    Raises:
        ValueError: an unknown backend or mode; a module without blocks.
    """
    _check(backend, mode)
    settings: dict[str, Any] = {"backend": backend, "mode": mode, "dynamic": dynamic}
    if scope == "whole":
        module.compile(**settings)
        if memory_budget is not None:
            module._compiled_call_impl = _budgeted(module._compiled_call_impl, memory_budget)
        return [""], functools.partial(setattr, module, "_compiled_call_impl", None)
    (blocks,) = find_blocks(module).values()
    if not blocks:
        raise ValueError(
            "compile: no ModuleList or Sequential holds two or more modules of one class; take scope=whole"
        )

    @functools.cache
    def compiled(forward: Any) -> Any:
        program = torch.compile(forward, **settings)
        return program if memory_budget is None else _budgeted(program, memory_budget)

    before = [(block, block.__dict__.get("forward")) for block in blocks.values()]
    for block, instance_forward in before:
        forward = type(block).forward if instance_forward is None else instance_forward
        program = compiled(forward)
        # Bound to the block, so that a copy of the block computes with the copy's weights.
        block.__dict__["forward"] = types.MethodType(program, block) if instance_forward is None else program
    return list(blocks), functools.partial(_restore, before)


def _check(backend: str, mode: str | None) -> None:
    from torch._dynamo.backends.registry import list_backends

    known = list_backends(None)
    if backend not in known:
        raise ValueError(f"compile: backend={backend!r}: expected one of {', '.join(sorted(known))}")
    modes = ("default", *torch._inductor.list_mode_options()) if backend == "inductor" else ()
    if mode is not None and mode not in modes:
        raise ValueError(f"compile: mode={mode!r}: {backend} has {', '.join(dict.fromkeys(modes)) or 'none'}")


def _budgeted(compiled: Any, budget: float) -> Any:
    """Returns a compiled function that sets torch's global memory budget while it is compiled."""
    import torch._functorch.config as config

    @functools.wraps(compiled, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with config.patch(activation_memory_budget=budget):  # read at the first call, which compiles
            return compiled(*args, **kwargs)

    return run


def _restore(before: Iterable[tuple[nn.Module, Any]]) -> None:
    for block, forward in before:
        del block.__dict__["forward"]
        if forward is not None:
            block.__dict__["forward"] = forward
