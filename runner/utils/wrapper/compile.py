"""Modules compiled by torch: each block's forward, or the whole call. Loads the compiler once it is asked for."""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from runner.utils.modules.selection import find_blocks

SCOPES = ("blocks", "whole")


def compile_module(
    module: nn.Module,
    *,
    scope: str = "blocks",
    backend: str = "inductor",
    mode: str | None = None,
    dynamic: bool | None = None,
    memory_budget: float | None = None,
) -> tuple[list[str], Callable[[], None]]:
    """Has torch compile a module, in place, at its first call; names stay the user's own.

    Args:
        scope: blocks compiles each block's forward, and one program serves all of a class; whole the module's call.
        memory_budget: what may be kept for backward, as a share of what would be: 0 recomputes all, 1 nothing.
    Returns:
        The names of what is compiled ("" is the module), and what makes it as it was.
    Raises:
        ValueError: an unknown scope, backend or mode; a module without blocks.
    """
    _check(scope, backend, mode)
    settings: dict[str, Any] = {"backend": backend, "mode": mode, "dynamic": dynamic}
    if scope == "whole":
        module.compile(**settings)
        if memory_budget is not None:
            module._compiled_call_impl = _budgeted(module._compiled_call_impl, memory_budget)
        return [""], functools.partial(_reset, module)
    (blocks,) = find_blocks(module).values()
    if not blocks:
        raise ValueError(
            "compile: no ModuleList or Sequential holds two or more modules of one class; take scope=whole"
        )
    programs: dict[Any, Any] = {}
    before = [(block, block.__dict__.get("forward")) for block in blocks.values()]
    for block, instead in before:
        own = type(block).forward if instead is None else instead
        if own not in programs:
            compiled = torch.compile(own, **settings)
            programs[own] = compiled if memory_budget is None else _budgeted(compiled, memory_budget)
        program = programs[own]  # bound to the block: a copy of it computes with its own weights
        block.__dict__["forward"] = types.MethodType(program, block) if instead is None else program
    return list(blocks), functools.partial(_give_back, before)


def _check(scope: str, backend: str, mode: str | None) -> None:
    if scope not in SCOPES:
        raise ValueError(f"compile: scope={scope!r}: expected one of {', '.join(SCOPES)}")
    from torch._dynamo.backends.registry import list_backends

    known = list_backends(None)
    if backend not in known:
        raise ValueError(f"compile: backend={backend!r}: expected one of {', '.join(sorted(known))}")
    modes = ("default", *torch._inductor.list_mode_options()) if backend == "inductor" else ()
    if mode is not None and mode not in modes:
        raise ValueError(f"compile: mode={mode!r}: {backend} has {', '.join(dict.fromkeys(modes)) or 'none'}")


def _budgeted(compiled: Any, budget: float) -> Any:
    """Returns a compiled function that is compiled with a budget, which torch takes from a setting of its own."""
    import torch._functorch.config as config

    @functools.wraps(compiled, updated=())
    def run(*args: Any, **kwargs: Any) -> Any:
        with config.patch(activation_memory_budget=budget):  # what is compiled already does not read it
            return compiled(*args, **kwargs)

    return run


def _give_back(before: Iterable[tuple[nn.Module, Any]]) -> None:
    for block, forward in before:
        del block.__dict__["forward"]
        if forward is not None:
            block.__dict__["forward"] = forward


def _reset(module: nn.Module) -> None:
    module._compiled_call_impl = None
