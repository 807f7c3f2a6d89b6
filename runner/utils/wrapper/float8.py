"""Linears that multiply in 8-bit floats, by torchao, which is imported when it is needed."""

from __future__ import annotations

import dataclasses
import importlib
import logging
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import torch
from torch import nn

from runner.utils.modules.selection import matches

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
_MULTIPLE = 16  # of both dimensions of a weight: what the matrix units take
_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Converted:
    """Names of the Linears of a module.

    Args:
        names: those that multiply in fp8 now.
        skipped: those that were meant and can't, with the reason.
    """

    names: list[str]
    skipped: dict[str, str]


def to_float8(
    module: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    recipe: str = "tensorwise",
    emulate: bool = False,
) -> Converted:
    """Makes Linears of a module, in place, multiply in fp8; weights stay the same parameters under the same names.

    Forward and both products of backward round their operands to fp8, scaled by what these hold at that moment; what
    comes out has the precision of what went in. Compile the module afterwards: without, it is slower than it was.

    Args:
        include: globs over names of Linears, segment by segment: layers.*.up has layers.1.up and not layers.1.mlp.up.
            None is all. Only `nn.Linear` itself is meant, no class made of it.
        exclude: globs of those that stay as they are, such as a head.
        recipe: tensorwise: one scale a tensor, the fastest; rowwise: one a row, more accurate; rowwise_with_gw_hp: as
            rowwise, and the gradient of the weight in full precision.
        emulate: rounds the same and multiplies in fp32, on any device.
    Raises:
        ImportError: torchao is not installed.
        ValueError: an unknown recipe, a glob that matches no Linear, a module that is itself a Linear, or weights on a
            device without fp8.
    """
    if recipe not in RECIPES:
        raise ValueError(f"float8: recipe={recipe!r}: expected one of {', '.join(RECIPES)}")
    float8 = import_torchao("torchao.float8")
    linears = dict(_find(module, nn.Linear))
    chosen = _choose(linears, include, exclude)
    skipped = {name: reason for name in chosen if (reason := _find_obstacle(linears[name]))}
    names = [name for name in chosen if name not in skipped]
    if not emulate:
        _check_devices({linears[name].weight.device for name in names})
    settings = dataclasses.replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    made: dict[nn.Linear, nn.Module] = {}  # one that stands in two places stays one
    for name in names:
        linear = linears[name]
        if linear not in made:
            made[linear] = float8.convert_to_float8_training(linear, config=settings).train(linear.training)
        _put(module, name, made[linear])
    return Converted(names, skipped)


def from_float8(module: nn.Module) -> list[str]:
    """Makes every Linear that `to_float8` changed an `nn.Linear` again, in place; returns their names."""
    kind = import_torchao("torchao.float8.float8_linear").Float8Linear
    found = dict(_find(module, kind))
    made: dict[nn.Module, nn.Linear] = {}
    for name, converted in found.items():
        if converted not in made:
            made[converted] = linear = nn.Linear(converted.in_features, converted.out_features, device="meta")
            linear.weight, linear.bias = converted.weight, converted.bias
            linear.train(converted.training)
        _put(module, name, made[converted])
    return list(found)


def import_torchao(name: str) -> ModuleType:
    """Returns a module of torchao.

    Raises:
        ImportError: torchao is not installed.
    """
    loggers = [logging.getLogger(each) for each in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:  # it warns of each binary for other hardware, and is warned of what it is to change itself
        logger.setLevel(logging.ERROR)
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        if error.name != "torchao":
            raise
        raise ImportError('torchao is not installed; pip install "exact-runner[torchao]"') from error
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _find(module: nn.Module, kind: type[nn.Module]) -> Iterator[tuple[str, Any]]:
    """Yields the modules of exactly that class under each of their names."""
    for name, each in module.named_modules(remove_duplicate=False):
        if type(each) is kind:
            if not name:
                raise ValueError("float8: the module is itself a Linear, which can't be replaced in place; wrap it")
            yield name, each


def _choose(linears: Mapping[str, nn.Linear], include: Sequence[str] | None, exclude: Sequence[str]) -> list[str]:
    for glob in (*(include or ()), *exclude):
        if not any(matches(name, glob) for name in linears):
            raise ValueError(f"float8: {glob!r} matches no Linear; there are: {', '.join(linears) or 'none'}")
    is_meant = {
        name: include is None or any(matches(name, glob) for glob in include)
        for name in linears
        if not any(matches(name, glob) for glob in exclude)
    }
    return [name for name, is_so in is_meant.items() if is_so]


def _find_obstacle(linear: nn.Linear) -> str | None:
    size = f"{linear.in_features} to {linear.out_features}"
    if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
        return f"{size}: not multiples of {_MULTIPLE}"
    if linear._forward_hooks or linear._forward_pre_hooks or linear._backward_hooks or linear._backward_pre_hooks:
        return "it has hooks, which would be lost"
    return None


def _check_devices(devices: set[torch.device]) -> None:
    for device in devices:
        if device.type != "cuda":
            found = f"the weights are on {device.type}"
        elif (capability := torch.cuda.get_device_capability(device)) < _CAPABILITY:
            found = f"{torch.cuda.get_device_name(device)} has compute capability {'.'.join(map(str, capability))}"
        else:
            continue
        needed = f"a GPU of compute capability {'.'.join(map(str, _CAPABILITY))} or more"
        raise ValueError(f"float8: {found}, and fp8 needs {needed}; set emulate=true to try it, or leave float8 off")


def _put(module: nn.Module, name: str, child: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    module.get_submodule(parent)._modules[own] = child
