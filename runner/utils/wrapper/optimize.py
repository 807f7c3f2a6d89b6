"""Optimizations of a module that is there already: in one order, each told, all reversible.

The order is: freeze and adapters, replaced modules, float8, spreading over devices, compiled blocks, recomputed blocks.
What spreads the module over processes comes after, then the optimizer. Nothing is changed but the module given. Must
not import a model library.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from runner.utils.distributed.memory import mib
from runner.utils.modules.selection import call_within_fused
from runner.utils.wrapper.applied import AppliedOptimizations

if TYPE_CHECKING:  # each is loaded when it is asked for: a run without any starts sooner
    from runner.utils.wrapper.replace import Rule


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


def optimize(
    module: nn.Module,
    device: torch.device | None = None,
    *,
    freeze: Sequence[str] = (),
    freeze_mode: str = "eval",
    lora: Mapping[str, Any] | None = None,
    exports_adapter: bool = False,
    is_merged: bool = False,
    replace: Sequence[Rule] = (),
    fp8: Mapping[str, Any] | None = None,
    device_map: Mapping[str, Any] | None = None,
    compile: Mapping[str, Any] | None = None,
    unsloth: Mapping[str, Any] | None = None,
    checkpointing: Mapping[str, Any] | None = None,
) -> AppliedOptimizations:
    """Carries out what is asked for, in the one order that is right; None and an empty sequence are nothing.

    Args:
        device: where the module is to lie; None leaves it where it is.
        freeze: globs over parameter names.
        freeze_mode: of modules that are wholly frozen by `freeze`: eval leaves their statistics, and drops nothing;
            train has them run as the rest does.
        lora, fp8, compile, unsloth: arguments of `lora.add_lora`, `float8.to_float8`, `compiled.compile_module`,
            `unsloth.apply`.
        exports_adapter: what is exported are the adapters alone.
        is_merged: the adapters are in the weights already: none are added, and what took them is not replaced.
        device_map: `budgets` and `bytes_factor` of `device_map.plan`.
        checkpointing: include, exclude and every of `unsloth.apply`: blocks are recomputed, nothing is moved.
    Raises:
        ValueError: something matches nothing, or can't be done; what was done before is undone.
    """
    changes = AppliedOptimizations(module, exports_adapter=exports_adapter)
    before = _size(module)
    try:
        if device is not None and device_map is None:
            module.to(device)
        _freeze(changes, freeze, freeze_mode)
        if lora is not None and not is_merged:
            _adapt(changes, lora)
        _replace(changes, replace, fp8, _names_adapted(module, lora) if is_merged and lora is not None else [])
        if device_map is not None:
            _spread(changes, device_map)
        _compile(changes, compile)
        _recompute(changes, unsloth, checkpointing)
    except BaseException:
        changes.undo()
        raise
    _tell_frozen(changes)
    if changes.rows:
        changes.rows.append(("parameters", f"{before}  ->  {_size(module)}"))
    return changes


def _freeze(changes: AppliedOptimizations, patterns: Sequence[str], mode: str) -> None:
    if not patterns:
        return
    flags = [(parameter, parameter.requires_grad) for parameter in changes.module.parameters()]
    changes.on_undo(lambda: [parameter.requires_grad_(flag) for parameter, flag in flags])
    names = freeze(changes.module, patterns)
    changes.add_row("freeze", names)
    if mode == "eval":
        changes.frozen.choose(names)


def _tell_frozen(changes: AppliedOptimizations) -> None:
    for names, why in (
        (changes.frozen.built, "frozen, and in evaluation mode when built"),
        (changes.frozen.chosen, "frozen by freeze; freeze_mode=train would have them run as in training"),
    ):
        if kept := changes.frozen.find(names):
            changes.add_row("evaluation mode", kept, f" ({why})")


def _adapt(changes: AppliedOptimizations, lora: Mapping[str, Any]) -> None:
    from runner.utils.wrapper.lora import add_lora

    module = changes.module
    changes.adapted = adapted = add_lora(module, **lora)
    changes.on_undo(adapted.undo)
    for name, other in {} if changes.exports_adapter else adapted.tied.items():
        remedy = f"put {name} in lora.exclude, or set lora.export=adapter"
        raise ValueError(f"lora: {name}.weight is {other} too, and exports would merge the adapter into both; {remedy}")
    changes.add_row(f"lora (rank {lora['rank']})", adapted.names)
    changes.add_skipped("lora", adapted.skipped)
    changes.expect_calls("lora", adapted.names)


def _names_adapted(module: nn.Module, lora: Mapping[str, Any]) -> list[str]:
    from runner.utils.wrapper.lora import add_lora

    adapted = add_lora(module, **lora)
    adapted.undo()
    return adapted.names


def _replace(
    changes: AppliedOptimizations, rules: Sequence[Rule], fp8: Mapping[str, Any] | None, but: Sequence[str]
) -> None:
    module = changes.module
    if rules:
        from runner.utils.wrapper import replace

        spared = [dataclasses.replace(rule, exclude=(*rule.exclude, *but)) for rule in rules]
        replaced = replace.replace(module, spared)
        changes.on_undo(replaced.undo)
        for names, skipped in zip(replaced.replaced, replaced.skipped, strict=True):
            changes.add_row(f"replace {next(iter(names.values()), '')}", names)
            changes.add_skipped("replace", {name: why for name, why in skipped.items() if name not in but})
            changes.expect_calls("replace", names)
    if fp8 is not None:
        from runner.utils.wrapper.float8 import to_float8

        before = dict(module.named_modules(remove_duplicate=False))
        converted = to_float8(module, **{**fp8, "exclude": [*fp8.get("exclude", ()), *but]})
        if not converted.names:
            why = "; ".join(f"{name}: {reason}" for name, reason in converted.skipped.items())
            raise ValueError(f"fp8: no Linear is converted ({why or 'there is none of that very class'})")
        changes.on_undo(lambda: _put_back(module, {name: before[name] for name in converted.names}))
        for owner, key, value in call_within_fused(module, {id(module.get_submodule(n)) for n in converted.names}):
            changes.on_undo(functools.partial(setattr, owner, key, value))
        changes.add_row("fp8", converted.names)
        changes.add_skipped("fp8", converted.skipped)
        changes.expect_calls("fp8", converted.names)


def _put_back(module: nn.Module, before: Mapping[str, nn.Module]) -> None:
    for name, old in before.items():
        parent, _, own = name.rpartition(".")
        owner = module.get_submodule(parent)
        owner._modules[own] = old.train(owner.get_submodule(own).training)


def _spread(changes: AppliedOptimizations, device_map: Mapping[str, Any]) -> None:
    from runner.utils.wrapper.device_map import plan, spread

    planned = plan(changes.module, device_map["budgets"], bytes_factor=device_map.get("bytes_factor", 1.0))
    changes.on_undo(spread(changes.module, planned).undo)
    changes.rows += [("device_map", line) for line in str(planned).splitlines()]


def _compile(changes: AppliedOptimizations, settings: Mapping[str, Any] | None) -> None:
    if settings is None:
        return
    from runner.utils.wrapper.compile import compile_module

    names, undo = compile_module(changes.module, **settings)
    changes.on_undo(undo)
    changes.is_compiled = True
    budget = settings.get("memory_budget")
    remark = "" if budget is None else f", keeping {budget:g} of what backward would be given"
    what = f"compile ({settings.get('backend', 'inductor')})"
    changes.add_row(what, names if names != [""] else ["the whole"], remark)


def _recompute(
    changes: AppliedOptimizations, unsloth: Mapping[str, Any] | None, checkpointing: Mapping[str, Any] | None
) -> None:
    if unsloth is None and checkpointing is None:
        return
    from runner.utils.unsloth import apply

    settings = dict(unsloth) if unsloth is not None else {**(checkpointing or {}), "offload": "never"}
    changes.recomputed = report = apply(changes.module, **settings)
    changes.on_undo(report.undo)
    remark = ", recomputed in the backward pass"
    if unsloth is not None and not report.engines:
        why = "never was asked for" if report.offload == "never" else "there is no accelerator to move them from"
        remark += f"; their inputs stay where they are: {why}"
    elif unsloth is not None:
        remark += "; their inputs wait in host memory"
    changes.add_row("checkpointing" if unsloth is None else "unsloth", report.modules, remark)


def _size(module: nn.Module) -> str:
    sizes = [(p.numel(), p.nbytes, p.requires_grad) for p in module.parameters()]
    total, trained = sum(n for n, _, _ in sizes), sum(n for n, _, is_trained in sizes if is_trained)
    return f"{total:,} ({trained:,} trained), {mib(sum(num_bytes for _, num_bytes, _ in sizes))}"
