"""Low-rank adapters on the linear layers of a model that is there already. Must not import a model library."""

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

from runner.utils.modules.selection import call_within_fused, check_globs, find_uncalled, fits, list_near, name_modules

_ADAPTER = ("lora_a", "lora_b")
_SETTINGS = ("lora_rank", "lora_scale", "lora_dropout")


class LoRALinear(nn.Linear):
    """A Linear whose output has scale * lora_b(lora_a(dropout(x))) added. Made of a Linear in place, by add_lora.

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
        """Draws all weights anew; those of the adapter as add_lora does, so that it changes nothing yet."""
        super().reset_parameters()
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Draws lora_a as a Linear's weight is drawn, and makes lora_b zero."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def extra_repr(self) -> str:
        """Returns what a Linear says, and the adapter's settings."""
        settings = f"rank={self.lora_rank}, scale={self.lora_scale:g}, dropout={self.lora_dropout:g}"
        return f"{super().extra_repr()}, {settings}"


@dataclass
class _Found:
    linears: list[tuple[nn.Linear, list[str]]] = field(default_factory=list)  # each with all its names
    skipped: dict[str, str] = field(default_factory=dict)
    tied: dict[str, str] = field(default_factory=dict)  # by name of a layer, who else holds its weight


@dataclass
class Adapted:
    """What was adapted, its states, and the way back."""

    names: list[str]  # of the linear layers adapted; of one at several names, all
    skipped: dict[str, str]  # why not, by name
    num_trained: int  # elements of the parameters that are trained
    num_frozen: int
    _scale: float = field(repr=False)
    _found: _Found = field(repr=False)
    _also: list[str] = field(repr=False)  # names of the parameters that also_train names
    _flags: list[tuple[nn.Parameter, bool]] = field(repr=False)
    _fused: list[tuple[nn.Module, str, Any]] = field(repr=False)
    _is_undone: bool = field(default=False, repr=False)

    @property
    def tied(self) -> dict[str, str]:
        """The layers adapted whose weight another module holds too, and that one: they can't be merged."""
        return self._found.tied

    def undo(self) -> None:
        """Takes the adapters away; classes and requires_grad are as they were before."""
        if self._is_undone:
            return
        self._is_undone = True
        for linear, _ in self._found.linears:
            for name in (*_ADAPTER, *_SETTINGS):
                delattr(linear, name)
            linear.__class__ = nn.Linear
        for parameter, flag in self._flags:
            parameter.requires_grad_(flag)
        for owner, name, value in self._fused:
            setattr(owner, name, value)

    def merged(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state of the module, or of a copy of it, as a state of the module before, adapters in its weights.

        They are added in float32, or in a wider dtype that the weight has. A layer at several names stays one tensor.

        Raises:
            ValueError: a weight that another module holds too, which merging would change; a state without adapters.
        """
        for name, other in self._found.tied.items():
            raise ValueError(
                f"merged: {name}.weight is {other} too, which merging would change; put {name!r} in exclude"
            )
        _check_whole("merged", state, [_key(name, each) for name in self.names for each in ("weight", *_ADAPTER)])
        merged = copy.copy(state) if isinstance(state, dict) else dict(state)  # a copy has torch's _metadata too
        for _, names in self._found.linears:
            weight, lora_a, lora_b = (state[_key(names[0], each)].detach() for each in ("weight", *_ADAPTER))
            wide = torch.promote_types(weight.dtype, torch.float32)
            total = (weight.to(wide) + self._scale * (lora_b.to(wide) @ lora_a.to(wide))).to(weight.dtype)
            for name in names:
                merged[_key(name, "weight")] = total
                for each in _ADAPTER:
                    del merged[_key(name, each)]
        return merged

    def adapter(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns what is trained, out of a state of the module: the adapters, and what also_train names.

        Raises:
            ValueError: a state without them.
        """
        keys = [*self._also, *(_key(name, each) for name in self.names for each in _ADAPTER)]
        _check_whole("adapter", state, keys)
        return {key: state[key] for key in state if key in set(keys)}


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

    A layer stays the object that it is, with its names, hooks and weights; its outputs are what they were until a step
    is made. Layers are those of the very class nn.Linear. One whose weight another module holds too, such as a head
    tied to an embedding, is adapted only where include fits it: for its own output, and merged refuses.

    Args:
        rank: of the adapters; their matrices are [rank, in_features] and [out_features, rank].
        alpha: what the adapter's output is multiplied with, times rank; None is rank, so 1.
        dropout: share of an adapter's inputs that are zero in training.
        include: globs over names of modules, segment by segment; None is every layer.
        exclude: globs of layers that are left alone.
        also_train: globs over whole names of parameters that are trained too.
    Raises:
        ValueError: a setting out of its range; a glob that fits nothing, or no nn.Linear; adapters that are there.

    Source: https://arxiv.org/abs/2106.09685
    """
    _check_settings(rank, alpha, dropout)
    found = _find(module, include, exclude)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    also = _find_also(also_train, parameters)
    scale = (rank if alpha is None else alpha) / rank
    flags = _train_only(module, [parameters[name] for name in also])
    for linear, _ in found.linears:
        _adapt(linear, rank, scale, dropout)
    fused = call_within_fused(module, {id(linear) for linear, _ in found.linears})
    names = [name for _, its in found.linears for name in its]
    num_trained, num_frozen = (_count(module, is_trained) for is_trained in (True, False))
    return Adapted(names, found.skipped, num_trained, num_frozen, scale, found, also, flags, fused)


def _count(module: nn.Module, is_trained: bool) -> int:
    return sum(each.numel() for each in module.parameters() if each.requires_grad is is_trained)


def _train_only(module: nn.Module, trained: Sequence[nn.Parameter]) -> list[tuple[nn.Parameter, bool]]:
    """Freezes all parameters but some, and returns each with its flag as it was."""
    flags = [(each, each.requires_grad) for each in module.parameters()]
    kept = {id(each) for each in trained}
    for parameter, _ in flags:
        parameter.requires_grad_(id(parameter) in kept)
    return flags


def _adapt(linear: nn.Linear, rank: int, scale: float, dropout: float) -> None:
    weight = linear.weight
    linear.__class__ = LoRALinear
    assert isinstance(linear, LoRALinear)
    linear.lora_rank, linear.lora_scale, linear.lora_dropout = rank, scale, dropout
    for name, shape in (("lora_a", (rank, linear.in_features)), ("lora_b", (linear.out_features, rank))):
        linear.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device)))
    linear.reset_adapter()


def _find(module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str]) -> _Found:
    if any(isinstance(each, LoRALinear) for each in module.modules()):
        raise ValueError("add_lora: the module has adapters already, expected none; undo them first")
    for globs in (include or (), exclude):
        check_globs("add_lora", module, globs)
    named = name_modules(module)
    for glob in include or ():
        _check_linear(glob, named)
    found, holders, uncalled = _Found(), _find_holders(named), find_uncalled(module)
    for key, (each, names) in named.items():
        if not isinstance(each, nn.Linear) or (include is not None and not fits(names, include)):
            continue
        weight = each._parameters.get("weight")
        others = [name for holder, name in holders.get(id(weight), []) if holder != key]
        why = uncalled.get(key) or _find_reason(each, names, exclude)
        if not why and others and include is None:
            why = f"its weight is {others[0]} too; to adapt it, name it in include"
        if why:
            found.skipped |= dict.fromkeys(names, why)
            continue
        found.linears.append((each, names))
        if others:
            found.tied[names[0]] = others[0]
    if not found.linears:
        listed = list_near("", (f"{name}, as {why}" for name, why in found.skipped.items()))
        raise ValueError(f"add_lora: expected an nn.Linear to adapt, found none; skipped: {listed}")
    return found


def _find_reason(linear: nn.Linear, names: Sequence[str], exclude: Sequence[str]) -> str | None:
    if type(linear) is not nn.Linear:
        return f"{type(linear).__name__} is a subclass of Linear"
    weight = linear._parameters.get("weight")
    if weight is None or not weight.is_floating_point():
        return "its weight is no parameter of a floating-point dtype"  # such as one computed by weight_norm
    glob = next((glob for glob in exclude if fits(names, [glob])), None)
    return None if glob is None else f"{glob!r} excludes it"


def _find_holders(named: Mapping[int, tuple[nn.Module, list[str]]]) -> dict[int, list[tuple[int, str]]]:
    """Returns, by a parameter's id, the modules that hold it: their ids, and the name that it has there."""
    holders: dict[int, list[tuple[int, str]]] = {}
    for key, (each, names) in named.items():
        for name, parameter in each._parameters.items():
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
                f"add_lora: also_train: {glob!r} matches no parameter; there are: {list_near(glob, parameters)}"
            )
        found += matched
    return list(dict.fromkeys(found))


def _check_linear(glob: str, named: Mapping[int, tuple[nn.Module, list[str]]]) -> None:
    matched = [(each, names) for each, names in named.values() if fits(names, [glob])]
    if not any(type(each) is nn.Linear for each, _ in matched):
        listed = list_near("", (f"{names[0]}, a {type(each).__name__}" for each, names in matched))
        linears = (names[0] for each, names in named.values() if type(each) is nn.Linear)
        there_are = list_near(glob, linears)
        raise ValueError(f"add_lora: {glob!r} matches no nn.Linear but {listed}; those of that very class: {there_are}")


def _check_settings(rank: int, alpha: float | None, dropout: float) -> None:
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"add_lora: rank: expected an integer >= 1, found {rank!r}")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"add_lora: alpha: expected a finite number > 0, or None for rank, found {alpha!r}")
    if not 0 <= dropout < 1:
        raise ValueError(f"add_lora: dropout: expected 0 <= dropout < 1, found {dropout!r}")


def _check_whole(where: str, state: Mapping[str, Any], keys: Sequence[str]) -> None:
    missing = [key for key in keys if key not in state]
    if missing:
        remedy = "give a state of the adapted module"
        raise ValueError(f"{where}: the state has no {list_near('', missing, limit=4)}; {remedy}")


def _key(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
