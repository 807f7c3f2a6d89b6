"""Optimizations of a module that is there already: in one order, each told, all reversible.

The order is: freeze and adapters, replaced modules, float8, spreading over devices, compiled blocks, recomputed blocks.
What spreads the module over processes comes after, then the optimizer. Nothing is changed but the module given. Must
not import a model library.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from runner.utils.memory import mib
from runner.utils.selection import split_idle

if TYPE_CHECKING:  # each is loaded when it is asked for: a run without any starts sooner
    from runner.utils.lora import Adapted
    from runner.utils.replace import Rule
    from runner.utils.unsloth import Report


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


@dataclass
class Changes:
    """What was done to a module, and the way back."""

    module: nn.Module
    rows: list[tuple[str, str]] = field(default_factory=list)
    adapted: Adapted | None = None
    recomputed: Report | None = None
    exports_adapter: bool = False
    _put_in: dict[str, str] = field(default_factory=dict)  # module names that must be called, and by what they came in
    _called: set[str] = field(default_factory=set)
    _hooks: dict[str, Any] = field(default_factory=dict)
    _undo: list[Callable[[], Any]] = field(default_factory=list)

    def told(self, what: str, names: Iterable[str], remark: str = "") -> None:
        """Adds a row to the table: what was done, to which."""
        listed = list(names)
        self.rows.append((what, f"{len(listed)}: {shorten(listed)}{remark}"))

    def left(self, what: str, skipped: Mapping[str, str]) -> None:
        """Adds what was left out, and why."""
        by_reason: dict[str, list[str]] = {}
        for name, reason in skipped.items():
            by_reason.setdefault(reason, []).append(name)
        self.rows += [(f"{what}, skipped", f"{shorten(names)}: {reason}") for reason, names in by_reason.items()]

    def later(self, undo: Callable[[], Any]) -> None:
        """Adds a step to the way back."""
        self._undo.append(undo)

    def table(self) -> list[str]:
        """Returns what was done, a line each; nothing for a module that was left alone."""
        width = max((len(what) for what, _ in self.rows), default=0)
        return [f"{what.ljust(width)}  {rest}" for what, rest in self.rows]

    def expect_calls(self, what: str, names: Iterable[str]) -> None:
        """Has `check_calls` look for modules that were put in: one that is never called has no effect."""
        for name in names:
            self._put_in[name] = what
            part = self.module.get_submodule(name)
            self._hooks[name] = part.register_forward_hook(lambda *_, name=name: self._called.add(name))

    def check_calls(self, is_last: bool = True) -> list[str]:
        """Checks, after a step, that all that was put in was called by now; returns what was not, and still may be.

        Args:
            is_last: nothing that was not called is waited for; else what others alike were called beside is.
        Raises:
            ValueError: naming what was not.
        """
        self._called |= {name for name in self._put_in if self._has_effect(name)}
        hopeless, waiting = split_idle(self._put_in.keys() - self._called, self._called)
        wrong: dict[str, list[str]] = {}
        for name in sorted([*hopeless, *waiting] if is_last else hopeless):
            wrong.setdefault(self._put_in[name], []).append(name)
        self._put_in = {} if wrong or is_last else {name: self._put_in[name] for name in waiting}
        for name in self._hooks.keys() - self._put_in.keys():
            self._hooks.pop(name).remove()
        if wrong:
            told = "; ".join(f"{what}: {shorten(names)}" for what, names in wrong.items())
            remedy = "what uses their weights without calling them is left without the change; put them in exclude"
            raise ValueError(f"never called so far: {told}; {remedy}")
        return waiting

    def _has_effect(self, name: str) -> bool:
        """Says whether a module's parameters got a gradient: one in a compiled graph is not seen to be called."""
        return any(parameter.grad is not None for parameter in self.module.get_submodule(name).parameters())

    def exported(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state of the module as it is to be exported: adapters merged in, or alone."""
        if self.adapted is None:
            return dict(state)
        return self.adapted.adapter(state) if self.exports_adapter else self.adapted.merged(state)

    def load_exported(self, state: Mapping[str, Tensor]) -> None:
        """Takes back what `exported` gave.

        Raises:
            RuntimeError: names or shapes that are not those of the module.
        """
        if self.adapted is None or not self.exports_adapter:
            self.module.load_state_dict(state)
            return
        expected = set(self.adapted.adapter(self.module.state_dict()))
        if wrong := sorted(expected ^ set(state)):
            raise RuntimeError(f"the adapter lacks, or has beside what it should: {', '.join(wrong)}")
        self.module.load_state_dict(state, strict=False)

    def undo(self) -> None:
        """Makes the module what it was, but for what training has made of its weights."""
        for hook in self._hooks.values():
            hook.remove()
        while self._undo:
            self._undo.pop()()
        self.recomputed = self.adapted = None


def optimize(
    module: nn.Module,
    device: torch.device | None = None,
    *,
    freeze: Sequence[str] = (),
    lora: Mapping[str, Any] | None = None,
    exports_adapter: bool = False,
    replace: Sequence[Rule] = (),
    fp8: Mapping[str, Any] | None = None,
    device_map: Mapping[str, Any] | None = None,
    compile: Mapping[str, Any] | None = None,
    unsloth: Mapping[str, Any] | None = None,
    checkpointing: Mapping[str, Any] | None = None,
) -> Changes:
    """Carries out what is asked for, in the one order that is right; None and an empty sequence are nothing.

    Args:
        device: where the module is to lie; None leaves it where it is.
        freeze: globs over parameter names.
        lora, fp8, compile, unsloth: arguments of `lora.add_lora`, `float8.to_float8`, `compiled.compile_module`,
            `unsloth.apply`.
        exports_adapter: what is exported are the adapters alone.
        device_map: `budgets` and `bytes_factor` of `device_map.plan`.
        checkpointing: include, exclude and every of `unsloth.apply`: blocks are recomputed, nothing is moved.
    Raises:
        ValueError: something matches nothing, or can't be done; what was done before is undone.
    """
    changes = Changes(module, exports_adapter=exports_adapter)
    before = _size(module)
    try:
        if device is not None and device_map is None:
            module.to(device)
        _change_parts(changes, freeze, lora, replace, fp8)
        if device_map is not None:
            _spread(changes, device_map)
        if compile is not None:
            _compile(changes, compile)
        if unsloth is not None or checkpointing is not None:
            _recompute(changes, unsloth, checkpointing)
    except BaseException:
        changes.undo()
        raise
    if changes.rows:
        changes.rows.append(("parameters", f"{before}  ->  {_size(module)}"))
    return changes


def _change_parts(
    changes: Changes, patterns: Sequence[str], lora: Any, rules: Sequence[Rule], fp8: Mapping[str, Any] | None
) -> None:
    module = changes.module
    if patterns:
        flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]
        changes.later(lambda: [parameter.requires_grad_(flag) for parameter, flag in flags])
        changes.told("freeze", freeze(module, patterns))
    if lora is not None:
        from runner.utils.lora import add_lora

        changes.adapted = adapted = add_lora(module, **lora)
        changes.later(adapted.undo)
        changes.told(f"lora (rank {lora['rank']})", adapted.names)
        changes.left("lora", adapted.skipped)
        changes.expect_calls("lora", adapted.names)
    if rules:
        from runner.utils import replace

        replaced = replace.replace(module, rules)
        changes.later(replaced.undo)
        for names, skipped in zip(replaced.replaced, replaced.skipped, strict=True):
            changes.told(f"replace {next(iter(names.values()), '')}", names)
            changes.left("replace", skipped)
            changes.expect_calls("replace", names)
    if fp8 is not None:
        from runner.utils.float8 import from_float8, to_float8

        converted = to_float8(module, **fp8)
        changes.later(lambda: from_float8(module))
        changes.told("fp8", converted.names)
        changes.left("fp8", converted.skipped)
        changes.expect_calls("fp8", converted.names)


def _spread(changes: Changes, device_map: Mapping[str, Any]) -> None:
    from runner.utils.device_map import plan, spread

    planned = plan(changes.module, device_map["budgets"], bytes_factor=device_map.get("bytes_factor", 1.0))
    changes.later(spread(changes.module, planned).undo)
    changes.rows += [("device_map", line) for line in str(planned).splitlines()]


def _compile(changes: Changes, settings: Mapping[str, Any]) -> None:
    from runner.utils.compiled import compile_module

    names, undo = compile_module(changes.module, **settings)
    changes.later(undo)
    changes.told(f"compile ({settings.get('backend', 'inductor')})", names if names != [""] else ["the whole"])


def _recompute(changes: Changes, unsloth: Mapping[str, Any] | None, checkpointing: Mapping[str, Any] | None) -> None:
    from runner.utils.unsloth import apply

    settings = dict(unsloth) if unsloth is not None else {**(checkpointing or {}), "offload": "never"}
    changes.recomputed = report = apply(changes.module, **settings)
    changes.later(report.undo)
    remark = ", recomputed in the backward pass"
    if unsloth is not None and not report.engines:
        why = "never was asked for" if report.offload == "never" else "there is no accelerator to move them from"
        remark += f"; their inputs stay where they are: {why}"
    elif unsloth is not None:
        remark += "; their inputs wait in host memory"
    changes.told("checkpointing" if unsloth is None else "unsloth", report.modules, remark)


def _size(module: nn.Module) -> str:
    sizes = [(p.numel(), p.nbytes, p.requires_grad) for p in module.parameters()]
    total, trained = sum(n for n, _, _ in sizes), sum(n for n, _, is_trained in sizes if is_trained)
    return f"{total:,} ({trained:,} trained), {mib(sum(num_bytes for _, num_bytes, _ in sizes))}"


def shorten(names: Sequence[str], most: int = 3) -> str:
    """Returns some of the names, where there are many the first and the last."""
    return ", ".join(names) if len(names) <= most else f"{', '.join(names[: most - 1])} ... {names[-1]}"
