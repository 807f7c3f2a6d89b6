"""Low-rank adapters on the linear layers of an existing model."""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.utils.modules.selection import (
    disable_fast_path,
    match_parameters,
    matches_any,
    name_modules,
    select_modules,
)
from runner.utils.modules.weights import load_weights
from runner.utils.utils import list_nearest
from runner.utils.wrapper.settings import check_lora

_ADAPTER = ("lora_a", "lora_b")
_SETTINGS = ("lora_rank", "lora_scale", "lora_dropout")


class LoRALinear(nn.Linear):
    """A Linear plus scale * lora_b(lora_a(dropout(x))); `add_lora` changes a Linear into one in place.

    Source: https://arxiv.org/abs/2106.09685
    """

    lora_a: nn.Parameter  # [rank, in_features]
    lora_b: nn.Parameter  # [out_features, rank]
    lora_rank: int
    lora_scale: float
    lora_dropout: float

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., out_features] for [..., in_features]."""
        low = F.linear(F.dropout(input, self.lora_dropout, self.training), self.lora_a)
        return F.linear(input, self.weight, self.bias) + self.lora_scale * F.linear(low, self.lora_b)

    def reset_parameters(self) -> None:
        """Draws all weights again; the adapter as add_lora does, so that it changes no output yet."""
        super().reset_parameters()
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initializes lora_a like a Linear's weight and lora_b with zeros."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def extra_repr(self) -> str:
        settings = f"rank={self.lora_rank}, scale={self.lora_scale:g}, dropout={self.lora_dropout:g}"
        return f"{super().extra_repr()}, {settings}"


@dataclass
class Adapted:
    """The adapted layers of a module, their states for an export, and undo.

    Args:
        names: of the adapted layers; all names of a layer that has several.
        skipped: the layers that were left out, by name, with the reason.
        tied: by name of an adapted layer that shares its weight, the other name of the weight: it can't be merged.
        undo: removes the adapters; classes and requires_grad are as they were before.
    """

    names: list[str]
    skipped: dict[str, str]
    tied: dict[str, str]
    undo: Callable[[], None] = field(repr=False)
    _module: nn.Module = field(repr=False)
    _scale: float = field(repr=False)
    _layers: list[list[str]] = field(repr=False)  # all names of each adapted layer
    _also: list[str] = field(repr=False)  # names of the parameters that also_train matches

    def merged(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state of the adapted module as a state of the module before, with the adapters in its weights.

        They are added in float32, or in the weight's dtype where that is wider. A layer with several names stays one
        tensor.

        Raises:
            ValueError: a weight that another module shares, which merging would change; a state without adapters.
        """
        for name, other in self.tied.items():
            raise ValueError(
                f"merged: {name}.weight is {other} too, which merging would change; put {name!r} in exclude"
            )
        _check_has_keys("merged", state, [_key(name, each) for name in self.names for each in ("weight", *_ADAPTER)])
        merged = copy.copy(state) if isinstance(state, dict) else dict(state)  # a copy has torch's _metadata too
        for names in self._layers:
            weight, lora_a, lora_b = (state[_key(names[0], each)].detach() for each in ("weight", *_ADAPTER))
            wide = torch.promote_types(weight.dtype, torch.float32)
            total = (weight.to(wide) + self._scale * (lora_b.to(wide) @ lora_a.to(wide))).to(weight.dtype)
            for name in names:
                merged[_key(name, "weight")] = total
                for each in _ADAPTER:
                    del merged[_key(name, each)]
        return merged

    def adapter(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the trained part of a state of the module: the adapters and the parameters of also_train.

        Raises:
            ValueError: a state without them.
        """
        keys = [*self._also, *(_key(name, each) for name in self.names for each in _ADAPTER)]
        _check_has_keys("adapter", state, keys)
        return {key: state[key] for key in state if key in set(keys)}

    def without_base(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the part of a state that training changes: `adapter`, and buffers such as statistics."""
        return self.adapter(state) | {name: state[name] for name, _ in self._module.named_buffers() if name in state}

    def load_without_base(self, state: Mapping[str, Any]) -> None:
        """Loads what `without_base` returned.

        Raises:
            RuntimeError: names that are not those of the adapted module.
        """
        if wrong := sorted(self.without_base(self._module.state_dict()).keys() ^ state.keys()):
            raise RuntimeError(f"the adapter lacks, or has beside what it should: {', '.join(wrong)}")
        load_weights(self._module, state, strict=False)

    def has_gradient(self, name: str) -> bool:
        """Returns True if an adapter took part in a backward pass."""
        return self._module.get_submodule(name).lora_b.grad is not None


def add_lora(
    module: nn.Module,
    *,
    rank: int,
    alpha: float | None = None,
    dropout: float = 0.0,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    also_train: Sequence[str] = (),
) -> Adapted:
    """Adds a low-rank adapter to linear layers, in place, and freezes all other parameters.

    A layer stays the same object, with its names, hooks and weights; its outputs are the same until the first step.
    Only layers of exactly the class nn.Linear are adapted. A layer that shares its weight, such as a head tied to an
    embedding, is adapted only where include matches it: for its own output, and `merged` refuses it.

    Args:
        rank: of the adapters; their matrices are [rank, in_features] and [out_features, rank].
        alpha: the adapter's output is multiplied by alpha / rank; None is rank, so by 1.
        dropout: share of an adapter's inputs that are zeroed in training.
        include: globs over names of modules, segment by segment; None is every layer.
        exclude: globs over names of layers that are not adapted.
        also_train: globs over whole names of further parameters to train.
    Raises:
        ValueError: a setting out of its range; a glob that matches nothing, or no nn.Linear; a module with adapters.

    Source: https://arxiv.org/abs/2106.09685
    """
    check_lora(rank, alpha, dropout)
    linears, skipped, tied = _select(module, include, exclude)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    also = match_parameters("add_lora: also_train", parameters, also_train)
    trained = {id(parameters[name]) for name in also}
    scale = (rank if alpha is None else alpha) / rank
    with contextlib.ExitStack() as undo:
        for parameter in module.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(id(parameter) in trained)
        for linear, _ in linears:
            _adapt(linear, rank, scale, dropout)
            undo.callback(_remove_adapter, linear)
        disable_fast_path(module, {id(linear) for linear, _ in linears}, undo)
        layers = [names for _, names in linears]
        names = [name for names_of_layer in layers for name in names_of_layer]
        return Adapted(names, skipped, tied, undo.pop_all().close, module, scale, layers, also)


def _adapt(linear: nn.Linear, rank: int, scale: float, dropout: float) -> None:
    weight = linear.weight
    linear.__class__ = LoRALinear
    assert isinstance(linear, LoRALinear)
    linear.lora_rank = rank
    linear.lora_scale = scale
    linear.lora_dropout = dropout
    shapes = {"lora_a": (rank, linear.in_features), "lora_b": (linear.out_features, rank)}
    for name, shape in shapes.items():
        linear.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device)))
    linear.reset_adapter()


def _remove_adapter(linear: nn.Linear) -> None:
    for name in (*_ADAPTER, *_SETTINGS):
        delattr(linear, name)
    linear.__class__ = nn.Linear


def _select(
    module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]
) -> tuple[list[tuple[nn.Linear, list[str]]], dict[str, str], dict[str, str]]:
    """Returns the layers to adapt with all their names, and the skipped and tied ones as in `Adapted`."""
    if any(isinstance(each, LoRALinear) for each in module.modules()):
        raise ValueError("add_lora: the module has adapters already, expected none; undo them first")
    selected = select_modules("add_lora", module, nn.Linear, include, exclude)
    for glob in include or ():
        _check_linear(glob, name_modules(module))
    names_of_weights: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_of_weights.setdefault(id(parameter), []).append(name)
    linears: list[tuple[nn.Linear, list[str]]] = []
    skipped: dict[str, str] = {}
    tied: dict[str, str] = {}
    for linear, names, reason in selected:
        weight = linear._parameters.get("weight")
        others = [name for name in names_of_weights.get(id(weight), []) if name.rpartition(".")[0] not in names]
        if weight is None or not weight.is_floating_point():
            reason = reason or "its weight is no parameter of a floating-point dtype"  # such as one of weight_norm
        elif others and include is None:
            reason = reason or f"its weight is {others[0]} too; to adapt it, name it in include"
        if reason:
            skipped |= dict.fromkeys(names, reason)
            continue
        linears.append((linear, names))
        if others:
            tied[names[0]] = others[0]
    if not linears:
        listed = list_nearest("", (f"{name}, as {why}" for name, why in skipped.items()))
        raise ValueError(f"add_lora: expected an nn.Linear to adapt, found none; skipped: {listed}")
    return linears, skipped, tied


def _check_linear(glob: str, named: Sequence[tuple[nn.Module, list[str]]]) -> None:
    matched = [(each, names) for each, names in named if matches_any(names, [glob])]
    if not any(type(each) is nn.Linear for each, _ in matched):
        listed = list_nearest("", (f"{names[0]}, a {type(each).__name__}" for each, names in matched))
        linears = (names[0] for each, names in named if type(each) is nn.Linear)
        there_are = list_nearest(glob, linears)
        raise ValueError(f"add_lora: {glob!r} matches no nn.Linear but {listed}; those of that very class: {there_are}")


def _check_has_keys(where: str, state: Mapping[str, Any], keys: Sequence[str]) -> None:
    if missing := [key for key in keys if key not in state]:
        listed = list_nearest("", missing, limit=4)
        raise ValueError(f"{where}: the state has no {listed}; give a state of the adapted module")


def _key(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
