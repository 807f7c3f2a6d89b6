"""Linear layers that multiply in 8-bit floats, by torchao, which is imported when it is needed."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from types import ModuleType

import torch
from torch import nn

from runner.utils.modules.selection import disable_fast_path, matches_any
from runner.utils.utils import check_choice
from runner.utils.wrapper.settings import RECIPES

_MULTIPLE = 16  # of both dimensions of a weight, for the matrix units
_CAPABILITY = (8, 9)


@dataclass(frozen=True)
class Converted:
    """The converted Linears of a module, and undo.

    Args:
        names: of the Linears that multiply in fp8 now.
        skipped: the Linears that were chosen and can't, by name, with the reason.
        undo: puts the Linears back, in the mode of the modules that replaced them.
    """

    names: list[str]
    skipped: dict[str, str]
    undo: Callable[[], None] = field(repr=False)


def to_float8(
    module: nn.Module,
    *,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    recipe: str = "tensorwise",
    emulate: bool = False,
) -> Converted:
    """Makes Linears of a module, in place, multiply in fp8; weights stay the same parameters under the same names.

    Forward and both products of backward round their operands to fp8, scaled by their present values; the output has
    the precision of the input. Compile the module afterwards: without that it is slower than before.

    Args:
        include: globs over names of Linears, segment by segment: layers.*.up has layers.1.up and not layers.1.mlp.up.
            None is all. Subclasses of `nn.Linear` are not converted.
        exclude: globs over names of Linears that are not converted, such as a head.
        recipe: tensorwise: one scale a tensor, the fastest; rowwise: one a row, more accurate; rowwise_with_gw_hp: as
            rowwise, and the gradient of the weight in full precision.
        emulate: rounds the same and multiplies in fp32, on any device.
    Raises:
        ImportError: torchao is not installed.
        ValueError: an unknown recipe, a glob that matches no Linear, a module that is itself a Linear, or weights on a
            device without fp8.
    """
    check_choice("recipe", recipe, RECIPES)
    float8 = import_torchao("torchao.float8")
    # Under each of their names; subclasses are not converted.
    linears = {name: part for name, part in module.named_modules(remove_duplicate=False) if type(part) is nn.Linear}
    if "" in linears:
        raise ValueError("float8: the module is itself a Linear, which can't be replaced in place; wrap it")
    chosen = _choose(linears, include, exclude)
    skipped = {name: reason for name in chosen if (reason := _find_obstacle(linears[name]))}
    names = [name for name in chosen if name not in skipped]
    if not emulate:
        _check_devices({linears[name].weight.device for name in names})
    settings = dataclasses.replace(float8.Float8LinearConfig.from_recipe_name(recipe), emulate=emulate)
    made: dict[nn.Linear, nn.Module] = {}  # a layer with two names stays one object
    with contextlib.ExitStack() as undo:
        for name in names:
            linear = linears[name]
            if linear not in made:
                made[linear] = float8.convert_to_float8_training(linear, config=settings).train(linear.training)
            module.set_submodule(name, made[linear])
            undo.callback(_put_back, module, name, linear)
        disable_fast_path(module, {id(converted) for converted in made.values()}, undo)
        return Converted(names, skipped, undo.pop_all().close)


def _put_back(module: nn.Module, name: str, linear: nn.Linear) -> None:
    module.set_submodule(name, linear.train(module.get_submodule(name).training))


def import_torchao(name: str) -> ModuleType:
    """Returns a module of torchao.

    Raises:
        ImportError: torchao is not installed.
    """
    loggers = [logging.getLogger(each) for each in ("torchao", "torch.utils._pytree")]
    levels = [logger.level for logger in loggers]
    # torchao warns of each binary for other hardware, and torch of an API that torchao still uses.
    for logger in loggers:
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


def _choose(linears: Mapping[str, nn.Linear], include: Sequence[str] | None, exclude: Sequence[str]) -> list[str]:
    for glob in (*(include or ()), *exclude):
        if not matches_any(linears, [glob]):
            raise ValueError(f"float8: {glob!r} matches no Linear; there are: {', '.join(linears) or 'none'}")
    included = [name for name in linears if include is None or matches_any([name], include)]
    return [name for name in included if not matches_any([name], exclude)]


def _find_obstacle(linear: nn.Linear) -> str | None:
    if linear.in_features % _MULTIPLE or linear.out_features % _MULTIPLE:
        return f"{linear.in_features} to {linear.out_features}: not multiples of {_MULTIPLE}"
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
        raise ValueError(
            f"float8: {found}, and fp8 needs a GPU of compute capability {'.'.join(map(str, _CAPABILITY))} or more; "
            "set emulate=true to try it, or leave float8 off"
        )
