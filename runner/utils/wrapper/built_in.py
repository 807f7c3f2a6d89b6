"""The built-in optimizations, by their settings: each class's `apply` imports the module that does the work.

They are in one module that imports no torch, and not beside their implementations, which all import it: a config is
checked before torch is loaded, and a run without LoRA or float8 loads neither. The defaults are in
`conf/optimization/`, once: a program that makes an instance gives each argument.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from runner.utils.unsloth.settings import check_settings
from runner.utils.utils import check_choice, suggest
from runner.utils.wrapper.protocol import (
    Applied,
    Context,
    Optimization,
    Purpose,
    Stage,
    make_row,
)
from runner.utils.wrapper.settings import RECIPES, check_lora

if TYPE_CHECKING:
    from torch import nn

    from runner.utils.wrapper.lora import Adapted
    from runner.utils.wrapper.lora.peft import PeftFormat
    from runner.utils.wrapper.replace import Rule

FREEZE_MODES = ("eval", "train")
_GPU_KERNELS = "liger_kernel."
_RULE_TYPES: dict[str, tuple[type, ...]] = {
    "match": (str,),
    "with": (str,),
    "include": (list, tuple, type(None)),
    "exclude": (list, tuple),
    "subclasses": (bool,),
    "arguments": (dict,),
}
Kind = TypeVar("Kind", bound=Optimization)


@dataclass
class Freeze:
    """Excludes parameters from training.

    Args:
        patterns: globs over parameter names.
        mode: of modules that are frozen entirely: eval keeps their statistics and drops nothing; train runs them as
            the rest.
    """

    patterns: list[str]
    mode: str
    stage: ClassVar = Stage.FREEZE

    def __post_init__(self) -> None:
        check_choice("mode", self.mode, FREEZE_MODES)

    def apply(self, module: nn.Module, context: Context) -> Applied | None:
        """Freezes parameters, also when weights are written: the state of the optimizer is that of the others."""
        if context.purpose is Purpose.use or not self.patterns:
            return None
        from runner.utils.wrapper.apply import freeze

        flags = [(parameter, parameter.requires_grad) for parameter in module.parameters()]

        def undo() -> None:
            for parameter, flag in flags:
                parameter.requires_grad_(flag)

        names = freeze(module, self.patterns)
        return Applied([make_row("freeze", names)], undo=undo, keeps_in_eval=names if self.mode == "eval" else ())


@dataclass
class Lora:
    """Trains low-rank adapters of layers and freezes the rest; arguments as of `lora.add_lora`.

    Args:
        export: merged exports the user's own weights, adapters merged in; adapter exports the adapters alone; peft
            exports them in PEFT's format, too.
    """

    rank: int
    alpha: float | None
    dropout: float
    include: list[str] | None
    exclude: list[str]
    also_train: list[str]
    export: str
    stage: ClassVar = Stage.ADAPT

    def __post_init__(self) -> None:
        check_lora(self.rank, self.alpha, self.dropout)
        check_choice("export", self.export, ("merged", "adapter", "peft"))

    def apply(self, module: nn.Module, context: Context) -> Applied | None:
        """Adds the adapters; of exported weights that they are merged into, only reserves their layers."""
        from runner.utils.wrapper.lora import add_lora

        is_merged = self.export == "merged"
        adapted = add_lora(
            module,
            rank=self.rank,
            alpha=self.alpha,
            dropout=self.dropout,
            include=self.include,
            exclude=self.exclude,
            also_train=self.also_train,
        )
        if is_merged and context.purpose is Purpose.use:
            adapted.undo()
            return Applied([make_row("lora, merged", adapted.names)], reserved=adapted.names)
        for name, other in adapted.tied.items() if is_merged else ():
            adapted.undo()
            raise ValueError(
                f"lora: {name}.weight is {other} too, and exports would merge the adapter into both; put {name} in "
                "lora.exclude, or set lora.export=adapter"
            )
        form = self._make_peft_format(module, adapted) if self.export == "peft" else None
        return Applied(
            [make_row(f"lora (rank {self.rank})", adapted.names)],
            adapted.skipped,
            adapted.undo,
            expected=adapted.names,
            was_called=adapted.has_gradient,
            export=adapted.merged if is_merged else adapted.without_base,
            load=None if is_merged else adapted.load_without_base,
            files=form.files if form else None,
        )

    def _make_peft_format(self, module: nn.Module, adapted: Adapted) -> PeftFormat:
        from runner.utils.wrapper.lora.peft import PeftFormat

        try:
            return PeftFormat(module, adapted, rank=self.rank, alpha=self.alpha, dropout=self.dropout)
        except ValueError:
            adapted.undo()
            raise


@dataclass
class Replace:
    """Replaces modules by rules.

    Args:
        rules: mappings with `match` and `with`, dotted paths of the class that is replaced and of the class or
            converter that replaces it, and `include`, `exclude`, `subclasses` and `arguments` as of `replace.Rule`.
    """

    rules: list[Any]
    stage: ClassVar = Stage.REPLACE

    def __post_init__(self) -> None:
        for number, rule in enumerate(self.rules):
            _check_rule(f"rules[{number}]", rule)

    def apply(self, module: nn.Module, context: Context) -> Applied | None:
        """Replaces the modules, but for reserved ones."""
        if not self.rules:
            return None
        from runner.utils.wrapper.replace import replace

        rules = [self._make_rule(rule, context) for rule in self.rules]
        report = replace(module, rules)
        rows = [make_row(f"replace {next(iter(replaced.values()), '')}", replaced) for replaced in report.replaced]
        reasons = [item for skipped in report.skipped for item in skipped.items()]
        skipped = {name: why for name, why in reasons if name not in context.reserved}
        names = [name for replaced in report.replaced for name in replaced]
        return Applied(rows, skipped, report.undo, expected=names)

    def _make_rule(self, rule: Mapping[str, Any], context: Context) -> Rule:
        from pkgutil import resolve_name

        from runner.utils.wrapper.replace import Rule

        settings = dict(rule)
        match, make = settings.pop("match"), settings.pop("with")
        if make.startswith(_GPU_KERNELS) and context.device is not None and context.device.type == "cpu":
            raise ValueError(f"replace: {make} is made of kernels for a GPU, and the run is on the CPU")
        exclude = [*settings.pop("exclude", ()), *context.reserved]
        return Rule(resolve_name(match), resolve_name(make), exclude=exclude, **settings)


def _check_rule(key: str, rule: Any) -> None:
    if not isinstance(rule, Mapping) or not isinstance(rule.get("with"), str):
        raise ValueError(f"{key}: expected {{match: class path, with: class or converter path}}; found {rule!r}")
    if not isinstance(rule.get("match"), str):
        raise ValueError(f"{key}.match: expected the path of a class of modules; found {rule.get('match')!r}")
    for name, value in rule.items():
        if name not in _RULE_TYPES:
            raise ValueError(f"{key}.{name}: no such key; {suggest(str(name), list(_RULE_TYPES))}")
        if not isinstance(value, _RULE_TYPES[name]):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in _RULE_TYPES[name])
            raise ValueError(f"{key}.{name}={value!r}: expected {expected}")


@dataclass
class Float8:
    """Multiplies in 8-bit floats by torchao; arguments as of `float8.to_float8`."""

    include: list[str] | None
    exclude: list[str]
    recipe: str
    emulate: bool
    stage: ClassVar = Stage.QUANTIZE

    def __post_init__(self) -> None:
        check_choice("recipe", self.recipe, RECIPES)

    def apply(self, module: nn.Module, context: Context) -> Applied | None:
        """Converts linear layers, but for reserved ones; not for weights that are only exported."""
        if context.purpose is Purpose.write:
            return None
        from runner.utils.wrapper.float8 import to_float8

        converted = to_float8(module, **asdict(self) | {"exclude": [*self.exclude, *context.reserved]})
        if not converted.names:
            why = "; ".join(f"{name}: {reason}" for name, reason in converted.skipped.items())
            raise ValueError(f"fp8: no Linear is converted ({why or 'there is none of that very class'})")
        return Applied([make_row("fp8", converted.names)], converted.skipped, converted.undo, expected=converted.names)


@dataclass
class DeviceMap:
    """Distributes blocks over several devices.

    Args:
        budgets: bytes by device, as of `device_map.plan`.
        bytes_factor: likewise.
    """

    budgets: Any
    bytes_factor: float
    stage: ClassVar = Stage.PLACE

    def __post_init__(self) -> None:
        if not self.bytes_factor > 0:
            raise ValueError(f"bytes_factor={self.bytes_factor}: expected more than 0")
        if not isinstance(self.budgets, Mapping) or not self.budgets:
            raise ValueError(f"budgets={self.budgets}: expected devices with bytes, such as {{cpu: 8GB}}")
        for device in self.budgets:
            if str(device).startswith("meta"):
                raise ValueError(
                    f"budgets.{device}: nothing is computed there; expected devices such as cuda:0 and cpu"
                )

    def apply(self, module: nn.Module, context: Context) -> Applied | None:
        """Moves each block to its device; all to the run's device for weights that are only exported."""
        if context.purpose is Purpose.write:
            module.to(context.device)
            return None
        from runner.utils.wrapper.device_map import plan, spread

        planned = plan(module, self.budgets, bytes_factor=self.bytes_factor)
        rows = [("device_map", line) for line in str(planned).splitlines()]
        return Applied(rows, undo=spread(module, planned))


@dataclass
class Compile:
    """Compiles a module by torch.compile; arguments as of `compile.compile_module`."""

    scope: str
    backend: str
    mode: str | None
    dynamic: bool | None
    stage: ClassVar = Stage.COMPILE

    def __post_init__(self) -> None:
        check_choice("scope", self.scope, ("blocks", "whole"))

    def check(self, others: Mapping[str, Optimization]) -> None:
        """Checks that no block within a compiled whole is recomputed by hooks."""
        checkpointing = _find(others, Checkpointing)
        recomputes = checkpointing is not None and checkpointing.memory_budget is None
        if self.scope == "whole" and (recomputes or _find(others, Unsloth) is not None):
            raise ValueError("scope=whole: recomputed blocks break the graph of the whole; take scope=blocks")

    def apply(self, module: nn.Module, context: Context) -> Applied | None:
        """Has torch compile the module at its first call; not for weights that are only exported."""
        if context.purpose is Purpose.write:
            return None
        from runner.utils.wrapper.compile import compile_module

        checkpointing = _find(context.others, Checkpointing)
        budget = None if checkpointing is None else checkpointing.memory_budget
        names, undo = compile_module(module, memory_budget=budget, **asdict(self))
        remark = "" if budget is None else f", keeping {budget:g} of what backward would be given"
        row = make_row(f"compile ({self.backend})", names if names != [""] else ["the whole"], remark)
        return Applied([row], undo=undo, is_compiled=True)


@dataclass
class Unsloth:
    """Recomputes blocks in backward and keeps their inputs in host memory; arguments as of `unsloth.apply`."""

    include: list[str] | None
    exclude: list[str]
    offload: str
    min_bytes: int
    keep_last: int
    in_flight: int
    prefetch: int
    host_limit: int | None
    stage: ClassVar = Stage.RECOMPUTE

    def __post_init__(self) -> None:
        check_settings(
            self.offload,
            min_bytes=self.min_bytes,
            keep_last=self.keep_last,
            in_flight=self.in_flight,
            prefetch=self.prefetch,
            host_limit=self.host_limit,
        )

    def apply(self, module: nn.Module, context: Context) -> Applied | None:
        """Wraps the blocks of a module that is trained."""
        if context.purpose is not Purpose.train:
            return None
        return _recompute("unsloth", module, **asdict(self))


@dataclass
class Checkpointing:
    """Recomputes blocks in backward.

    Args:
        every: wraps the first of this many blocks.
        memory_budget: of a compiled module instead: the share of the activations that is kept, 0 to 1.
    """

    every: int
    include: list[str] | None
    exclude: list[str]
    memory_budget: float | None
    stage: ClassVar = Stage.RECOMPUTE

    def __post_init__(self) -> None:
        check_settings(every=self.every)

    def check(self, others: Mapping[str, Optimization]) -> None:
        """Checks that the blocks are not recomputed twice, and that a budget has a compiler that follows it."""
        if _find(others, Unsloth) is not None:
            raise ValueError("unsloth recomputes the blocks already; set one of the two")
        budget, compiled = self.memory_budget, _find(others, Compile)
        if budget is not None and not 0 <= budget <= 1:
            raise ValueError(f"memory_budget={budget}: expected 0 to 1")
        if budget is not None and compiled is None:
            raise ValueError(f"memory_budget={budget}: is of compiled blocks; switch compile on too")
        if budget is not None and compiled is not None and compiled.backend == "eager":
            raise ValueError(
                f"memory_budget={budget}: the backend eager compiles nothing that would follow it; take inductor"
            )

    def apply(self, module: nn.Module, context: Context) -> Applied | None:
        """Wraps the blocks of a module that is trained; `Compile` applies a budget."""
        if context.purpose is not Purpose.train or self.memory_budget is not None:
            return None
        return _recompute(
            "checkpointing", module, every=self.every, include=self.include, exclude=self.exclude, offload="never"
        )


def _recompute(name: str, module: nn.Module, **settings: Any) -> Applied:
    from runner.utils import unsloth
    from runner.utils.unsloth.memory_report import StepReport

    report = unsloth.apply(module, **settings)
    remark = ", recomputed in the backward pass"
    if name == "unsloth" and not report.engines:
        why = "never was asked for" if report.offload == "never" else "there is no accelerator to move them from"
        remark += f"; their inputs stay where they are: {why}"
    elif name == "unsloth":
        remark += "; their inputs wait in host memory"
    return Applied([make_row(name, report.modules, remark)], undo=report.undo, monitor=StepReport(module, report))


def _find(others: Mapping[str, Optimization], kind: type[Kind]) -> Kind | None:
    return next((each for each in others.values() if isinstance(each, kind)), None)
