"""Distribution of a module's blocks over several devices and the CPU, by a plan in bytes.

`plan` is arithmetic; only `spread` uses a device.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from runner.utils.modules.selection import find_blocks

_SIZES = {"B": 1.0, "KB": 1e3, "MB": 1e6, "GB": 1e9, "TB": 1e12}
_AMOUNT = re.compile(r"\s*(\d+(?:\.\d*)?(?:e\+?\d+)?)\s*([kmgt]?b)?\s*", re.IGNORECASE)
_NEVER_CALLED = (nn.ModuleList, nn.ModuleDict)
_HELD_BY_PARENT = (nn.ParameterList, nn.ParameterDict)


@dataclass(frozen=True)
class DevicePlan:
    """The device of each unit of a module; as a string, a line for each device.

    Attributes:
        devices: by unit, in the order of the module; "" stands for the module's own parameters.
        unit_bytes: by unit, tied weights counted where they come first.
        budgets: bytes by device, in order of preference; infinite without a limit.
    """

    devices: dict[str, str]
    unit_bytes: dict[str, float]
    budgets: dict[str, float]

    def __str__(self) -> str:
        lines = []
        for device, budget in self.budgets.items():
            names = [name for name, device_of_unit in self.devices.items() if device_of_unit == device]
            used = _format_bytes(sum(self.unit_bytes[name] for name in names))
            lines.append(f"{device}: {_join_names(names) or 'nothing'}; {used} of {_format_bytes(budget)}")
        return "\n".join(lines)


@dataclass(frozen=True)
class _Unit:
    name: str
    module: nn.Module  # whose inputs go to the device
    tensors: tuple[Tensor, ...]


def plan(module: nn.Module, budgets: Mapping[str, float | str | None], *, bytes_factor: float = 1.0) -> DevicePlan:
    """Returns the device of each unit: devices are filled in order, each until the next unit does not fit.

    A unit is a block of `find_blocks`; an outermost child that contains no block; or the own parameters of a module
    around these, before its children. Units that share a weight go to one device, at the first unit's turn.

    Args:
        budgets: by device (cuda:0, cpu), in order of preference: bytes, a size such as 8GB (8e9 bytes) or 500MB, or
            None for no limit.
        bytes_factor: bytes needed for a byte of parameters and buffers: 4 for weights, gradients, two Adam states.
    Raises:
        ValueError: a device or budget that isn't one; too few bytes in all, naming the units that did not fit.
    """
    units, sizes = _units(module), _read_budgets(budgets)
    unit_bytes = _count_bytes(units, bytes_factor)
    chosen: dict[str, str] = {}
    devices = list(sizes)  # that have room left
    left = sizes[devices[0]]
    for bundle in _bind(units):
        needed = sum(unit_bytes[unit.name] for unit in bundle)
        while needed > left:
            del devices[0]
            if not devices:
                raise ValueError(_describe_shortage(bundle, needed, unit_bytes, sizes))
            left = sizes[devices[0]]
        left -= needed
        chosen |= {unit.name: devices[0] for unit in bundle}
    return DevicePlan({unit.name: chosen[unit.name] for unit in units}, unit_bytes, sizes)


def _describe_shortage(
    bundle: Sequence[_Unit], needed: float, unit_bytes: Mapping[str, float], sizes: Mapping[str, float]
) -> str:
    names = _join_names([unit.name for unit in bundle]) + (", tied," if len(bundle) > 1 else "")
    there_are = ", ".join(f"{device} {_format_bytes(size)}" for device, size in sizes.items())
    return (
        f"budgets: {_format_bytes(sum(unit_bytes.values()))} needed in all, there are {there_are}; {names} of "
        f"{_format_bytes(needed)} did not fit"
    )


def _units(module: nn.Module) -> list[_Unit]:
    return list(_split(module, "", find_blocks(module)[""]))


def _split(module: nn.Module, name: str, blocks: Mapping[str, nn.Module]) -> Iterator[_Unit]:
    children = dict(module.named_children())
    own = [module.parameters(recurse=False), module.buffers(recurse=False)]
    own += [child.parameters() for child in children.values() if isinstance(child, _HELD_BY_PARENT)]
    if tensors := tuple(tensor for part in own for tensor in part):
        yield _Unit(name, module, tensors)
    for key, child in children.items():
        path = f"{name}.{key}" if name else key
        holds_blocks = path not in blocks and any(block.startswith(path + ".") for block in blocks)
        if holds_blocks or (path not in blocks and isinstance(child, _NEVER_CALLED)):
            yield from _split(child, path, blocks)
        elif not isinstance(child, _HELD_BY_PARENT):
            yield _Unit(path, child, (*child.parameters(), *child.buffers()))


def _count_bytes(units: Sequence[_Unit], factor: float) -> dict[str, float]:
    counted: set[int] = set()
    found = {}
    for unit in units:
        new = {id(tensor): tensor for tensor in unit.tensors if id(tensor) not in counted}
        counted |= new.keys()
        found[unit.name] = factor * sum(tensor.nbytes for tensor in new.values())
    return found


def _bind(units: Sequence[_Unit]) -> list[list[_Unit]]:
    """Returns the units in order, those that share a tensor together."""
    bundles: list[tuple[list[_Unit], set[int]]] = []
    for unit in units:
        ids = {id(tensor) for tensor in unit.tensors}
        bundles.append(([unit], ids))
        tied = [bundle for bundle in bundles if not ids.isdisjoint(bundle[1])]
        for other in tied[1:]:
            tied[0][0].extend(other[0])
            tied[0][1].update(other[1])
            bundles.remove(other)
    return [bundle for bundle, _ in bundles]


def _read_budgets(budgets: Mapping[str, float | str | None]) -> dict[str, float]:
    if not budgets:
        raise ValueError("budgets: none given; expected bytes by device, such as {'cuda:0': '8GB', 'cpu': None}")
    for device in budgets:
        try:
            torch.device(str(device))
        except RuntimeError:
            raise ValueError(f"budgets: {device!r} is no device; expected cpu, cuda:0 or another of torch") from None
    return {device: _read_bytes(device, amount) for device, amount in budgets.items()}


def _read_bytes(device: str, amount: float | str | None) -> float:
    if amount is None:
        return math.inf
    if isinstance(amount, str) and (parts := _AMOUNT.fullmatch(amount)):
        return float(parts[1]) * _SIZES[(parts[2] or "B").upper()]
    if isinstance(amount, (int, float)) and not isinstance(amount, bool) and amount >= 0:
        return float(amount)
    raise ValueError(
        f"budgets: {device}: {amount!r}: expected a number of bytes, one with {', '.join(_SIZES)}, or null for "
        "whatever is left"
    )


def _format_bytes(amount: float) -> str:
    if amount == math.inf:
        return "whatever is left"
    unit = next((unit for unit, size in reversed(_SIZES.items()) if amount >= size), "B")
    return f"{amount / _SIZES[unit]:.4g} {unit}"


def _join_names(names: Sequence[str]) -> str:
    """Returns names as one text, layers.0, layers.1 and layers.2 as layers.0..layers.2."""
    runs: list[list[str]] = []
    for name in names:
        if runs and _follows(runs[-1][-1], name):
            runs[-1].append(name)
        else:
            runs.append([name])
    return ", ".join((run[0] or "(own)") if len(run) == 1 else f"{run[0]}..{run[-1]}" for run in runs)


def _follows(name: str, after: str) -> bool:
    parent, dot, number = name.rpartition(".")
    return number.isdecimal() and after == f"{parent}{dot}{int(number) + 1}"


def spread(module: nn.Module, device_map: DevicePlan) -> Callable[[], None]:
    """Moves each unit's weights to its device in place, and its inputs before each call; call it before the optimizer.

    Parameters stay the same objects, tied ones tied. Before a unit runs, the tensors in its arguments (nests of dicts,
    lists and tuples) are moved; gradients flow back. The forward around the units is not changed: its output is on the
    device of the last unit, and what it adds to that, such as a residual, targets or a parameter that it uses directly
    (on the device of the first units), must be on that device.

    Returns:
        A function that removes the hooks and moves every tensor, with its present value, to its previous device.
    Raises:
        ValueError: a plan of another module's units, or a device that this machine does not have.
    """
    units = _units(module)
    if differing := sorted({unit.name for unit in units} ^ device_map.devices.keys()):
        raise ValueError(f"the plan is of another module: {_join_names(differing)} only in one of the two")
    for name in dict.fromkeys(device_map.devices.values()):
        _check_device(torch.device(name))
    with contextlib.ExitStack() as undo:  # at once where it fails: a device may be full
        for unit in units:
            device = torch.device(device_map.devices[unit.name])
            for tensor in unit.tensors:
                undo.callback(_put, tensor, tensor.device)
                _put(tensor, device)
            hook = functools.partial(_move_inputs, device)
            undo.callback(unit.module.register_forward_pre_hook(hook, with_kwargs=True).remove)
        return undo.pop_all().close


def _check_device(device: torch.device) -> None:
    if device.type in ("cpu", "meta"):
        return
    count = torch.get_device_module(device).device_count() if torch.accelerator.is_available() else 0
    if torch.accelerator.current_accelerator() != torch.device(device.type) or (device.index or 0) >= count:
        raise ValueError(
            f"device_map: there is no device {device} here; this machine has {count or 'none but the CPU'}"
        )


@torch.no_grad()
def _put(tensor: Tensor, device: torch.device) -> None:
    """Moves a tensor, and its gradient, in place."""
    if tensor.device == device:
        return
    grad = tensor.grad if tensor.is_leaf else None
    moved = tensor.detach().to(device)
    try:
        tensor.data = moved
    except RuntimeError:  # tensors of another implementation, as on the device meta
        moved = nn.Parameter(moved, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else moved
        torch.utils.swap_tensors(tensor, moved)
    if grad is not None:
        tensor.grad = grad.to(device)


def _move_inputs(device: torch.device, module: nn.Module, args: Any, kwargs: Any) -> tuple[Any, Any]:
    return _move(args, device), _move(kwargs, device)


def _move(node: Any, device: torch.device) -> Any:
    """Returns a nest with its tensors on a device; the nest itself where they are on it already."""
    if isinstance(node, Tensor):
        return node if node.device == device else node.to(device)
    if isinstance(node, dict):
        moved = {key: _move(value, device) for key, value in node.items()}
        if all(moved[key] is value for key, value in node.items()):
            return node
        other = copy.copy(node)  # of the same class
        for key, value in moved.items():
            other[key] = value
        return other
    if isinstance(node, (list, tuple)):
        values = [_move(value, device) for value in node]
        if all(value is old for value, old in zip(values, node, strict=True)):
            return node
        return type(node)(*values) if hasattr(node, "_fields") else type(node)(values)
    return node
