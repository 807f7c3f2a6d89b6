"""Low-rank adapters on the linear layers of an existing model."""

from __future__ import annotations

import copy
import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runner.utils.modules.selection import (
    check_globs,
    disable_fast_path,
    find_uncalled,
    list_nearest,
    matches_any,
    name_modules,
)
from runner.utils.modules.weights import load_weights
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
        """Returns the settings of the Linear and of the adapter."""
        settings = f"rank={self.lora_rank}, scale={self.lora_scale:g}, dropout={self.lora_dropout:g}"
        return f"{super().extra_repr()}, {settings}"


@dataclass
class _Selection:
    linears: list[tuple[nn.Linear, list[str]]] = field(default_factory=list)  # each with all its names
    skipped: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # by name of a layer, another name of its weight


@dataclass
class Adapted:
    """The adapted layers of a module, their states for an export, and undo."""

    names: list[str]  # of the adapted layers; all names of a layer that has several
    skipped: dict[str, str]  # reason by name
    num_trained: int  # elements of the parameters that are trained
    num_frozen: int
    _module: nn.Module = field(repr=False)
    _scale: float = field(repr=False)
    _selection: _Selection = field(repr=False)
    _also: list[str] = field(repr=False)  # names of the parameters that also_train matches
    _flags: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _fused: list[tuple[nn.Module, str, Any]] = field(repr=False)
    _is_undone: bool = field(default=False, repr=False)

    @property
    def tied(self) -> dict[str, str]:
        """The other name of a weight by the adapted layer that shares it: such a layer can't be merged."""
        return self._selection.tied

    def undo(self) -> None:
        """Removes the adapters; classes and requires_grad are as they were before."""
        if self._is_undone:
            return
        self._is_undone = True
        for linear, _ in self._selection.linears:
            for name in (*_ADAPTER, *_SETTINGS):
                delattr(linear, name)
            linear.__class__ = nn.Linear
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for owner, name, value in self._fused:
            setattr(owner, name, value)

    def merged(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state of the adapted module as a state of the module before, with the adapters in its weights.

        They are added in float32, or in the weight's dtype where that is wider. A layer with several names stays one
        tensor.

        Raises:
            ValueError: a weight that another module shares, which merging would change; a state without adapters.
        """
        for name, other in self._selection.tied.items():
            remedy = f"put {name!r} in exclude"
            raise ValueError(f"merged: {name}.weight is {other} too, which merging would change; {remedy}")
        _check_has_keys("merged", state, [_key(name, each) for name in self.names for each in ("weight", *_ADAPTER)])
        merged = copy.copy(state) if isinstance(state, dict) else dict(state)  # a copy has torch's _metadata too
        for _, names in self._selection.linears:
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
        buffers = {name: state[name] for name, _ in self._module.named_buffers() if name in state}
        return {**self.adapter(state), **buffers}

    def load_without_base(self, state: Mapping[str, Any]) -> None:
        """Loads what `without_base` returned.

        Raises:
            RuntimeError: names that are not those of the adapted module.
        """
        expected = set(self.without_base(self._module.state_dict()))
        if wrong := sorted(expected ^ set(state)):
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
    selection = _select(module, include, exclude)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    also = _find_also(also_train, parameters)
    scale = (rank if alpha is None else alpha) / rank
    flags = _train_only(module, [parameters[name] for name in also])
    for linear, _ in selection.linears:
        _adapt(linear, rank, scale, dropout)
    fused = disable_fast_path(module, {id(linear) for linear, _ in selection.linears})
    names = [name for _, names_of_layer in selection.linears for name in names_of_layer]
    num_trained = _count(module, is_trained=True)
    num_frozen = _count(module, is_trained=False)
    return Adapted(names, selection.skipped, num_trained, num_frozen, module, scale, selection, also, flags, fused)


def _count(module: nn.Module, is_trained: bool) -> int:
    return sum(each.numel() for each in module.parameters() if each.requires_grad is is_trained)


def _train_only(module: nn.Module, trained: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, bool]]:
    """Freezes all parameters but some; returns every parameter with its previous requires_grad."""
    flags = [(each, each.requires_grad) for each in module.parameters()]
    kept = {id(each) for each in trained}
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in kept)
    return flags


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


def _select(module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]) -> _Selection:
    if any(isinstance(each, LoRALinear) for each in module.modules()):
        raise ValueError("add_lora: the module has adapters already, expected none; undo them first")
    for globs in (include or (), exclude):
        check_globs("add_lora", module, globs)
    named = name_modules(module)
    for glob in include or ():
        _check_linear(glob, named)
    selection = _Selection()
    holders = _find_holders(named)
    uncalled = find_uncalled(module)
    for key, (layer, names) in named.items():
        if not isinstance(layer, nn.Linear) or (include is not None and not matches_any(names, include)):
            continue
        weight = layer._parameters.get("weight")
        others = [name for holder, name in holders.get(id(weight), []) if holder != key]
        why = uncalled.get(key) or _find_reason(layer, names, exclude)
        if not why and others and include is None:
            why = f"its weight is {others[0]} too; to adapt it, name it in include"
        if why:
            selection.skipped |= dict.fromkeys(names, why)
            continue
        selection.linears.append((layer, names))
        if others:
            selection.tied[names[0]] = others[0]
    if not selection.linears:
        listed = list_nearest("", (f"{name}, as {why}" for name, why in selection.skipped.items()))
        raise ValueError(f"add_lora: expected an nn.Linear to adapt, found none; skipped: {listed}")
    return selection


def _find_reason(linear: nn.Linear, names: Sequence[str], exclude: Sequence[str]) -> str | None:
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is a subclass of Linear"
    weight = linear._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return "its weight is no parameter of a floating-point dtype"  # such as one computed by weight_norm
    glob = next((glob for glob in exclude if matches_any(names, [glob])), None)
    return None if glob is None else f"{glob!r} excludes it"


def _find_holders(named: Mapping[int, tuple[nn.Module, list[str]]]) -> dict[int, list[tuple[int, str]]]:
    """Returns the modules that have a parameter, by its id: their ids, and its name there."""
    holders: dict[int, list[tuple[int, str]]] = {}
    for key, (module, names) in named.items():
        for name, parameter in module._parameters.items():
            holders.setdefault(id(parameter), []).append((key, _key(names[0], name)))
    return holders


def _find_also(globs: Sequence[str], parameters: Mapping[str, nn.Parameter]) -> list[str]:
    if isinstance(globs, str):
        raise ValueError(f"add_lora: also_train: expected a list of globs, found the string {globs!r}")
    found: list[str] = []
    for glob in globs:
        matched = fnmatch.filter(parameters, glob)
        if not matched:
            raise ValueError(
                f"add_lora: also_train: {glob!r} matches no parameter; there are: {list_nearest(glob, parameters)}"
            )
        found += matched
    return list(dict.fromkeys(found))


def _check_linear(glob: str, named: Mapping[int, tuple[nn.Module, list[str]]]) -> None:
    matched = [(each, names) for each, names in named.values() if matches_any(names, [glob])]
    if not any(type(each) is nn.Linear for each, _ in matched):
        listed = list_nearest("", (f"{names[0]}, a {type(each).__name__}" for each, names in matched))
        linears = (names[0] for each, names in named.values() if type(each) is nn.Linear)
        there_are = list_nearest(glob, linears)
        raise ValueError(f"add_lora: {glob!r} matches no nn.Linear but {listed}; those of that very class: {there_are}")


def _check_has_keys(where: str, state: Mapping[str, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in state]
    if missing:
        remedy = "give a state of the adapted module"
        raise ValueError(f"{where}: the state has no {list_nearest('', missing, limit=4)}; {remedy}")


def _key(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
