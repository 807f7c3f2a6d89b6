"""Low-rank adapters on the layers of an existing model: which layers, and their exported states."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from runner.utils.modules.selection import (
    disable_fast_path,
    match_parameters,
    matches_any,
    name_modules,
    select_modules,
)
from runner.utils.modules.weights import load_weights
from runner.utils.utils import list_nearest
from runner.utils.wrapper.lora import layers
from runner.utils.wrapper.lora.layers import ADAPTER, ComputeDelta, LoRALayer
from runner.utils.wrapper.settings import check_lora

_PARTLY_ADAPTED = (nn.Linear, nn.Embedding, nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.MultiheadAttention)


@dataclass(frozen=True)
class AdaptedWeight:
    """A weight with an adapter.

    Args:
        places: all names of its layer.
        name: of the weight in the layer.
        kind: of the layer.
        compute_delta: returns what (lora_a, lora_b) add to the weight, but for the scale.
    """

    places: list[str]
    name: str
    kind: type[nn.Module]
    compute_delta: ComputeDelta = field(repr=False)

    def keys(self, layer: str) -> list[str]:
        """Returns the keys of the weight and its adapter in a state, by the layer's name."""
        return [_key(layer, each) for each in (self.name, *ADAPTER)]


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
    weights: list[AdaptedWeight] = field(repr=False)
    also: list[str] = field(repr=False)  # names of the parameters that also_train matches

    def merged(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns a state of the adapted module as a state of the module before, with the adapters in its weights.

        They are added in float32, or in the weight's dtype where that is wider. A layer with several names stays one
        tensor.

        Raises:
            ValueError: a weight that another module shares, which merging would change; a state without adapters; an
                adapter that makes a weight infinite or NaN.
        """
        for name, other in self.tied.items():
            raise ValueError(
                f"merged: {name}.weight is {other} too, which merging would change; put {name!r} in exclude"
            )
        _check_has_keys("merged", state, [key for _, key in self._keys()])
        merged = copy.copy(state) if isinstance(state, dict) else dict(state)  # a copy has torch's _metadata too
        for adapted in self.weights:
            weight, lora_a, lora_b = (state[key].detach() for key in adapted.keys(adapted.places[0]))
            wide = torch.promote_types(weight.dtype, torch.float32)
            delta = self._scale * adapted.compute_delta(lora_a.to(wide), lora_b.to(wide))
            total = (weight.to(wide) + delta).to(weight.dtype)
            if not total.to(wide).isfinite().all() and weight.to(wide).isfinite().all():
                raise ValueError(
                    f"merged: {adapted.places[0]}: its adapter would make the weight infinite or NaN; expected finite "
                    "numbers; take an earlier checkpoint, or lora.export=adapter"
                )
            for layer in adapted.places:
                weight_key, *adapter_keys = adapted.keys(layer)
                merged[weight_key] = total
                for key in adapter_keys:
                    del merged[key]
        return merged

    def adapter(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the trained part of a state of the module: the adapters and the parameters of also_train.

        Raises:
            ValueError: a state without them.
        """
        keys = [*self.also, *(key for name, key in self._keys() if name in ADAPTER)]
        _check_has_keys("adapter", state, keys)
        return {key: state[key] for key in state if key in set(keys)}

    def without_base(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the part of a state that training changes: `adapter`, and buffers such as statistics."""
        return self.adapter(state) | {name: state[name] for name, _ in self._module.named_buffers() if name in state}

    def load_without_base(self, state: Mapping[str, Any]) -> None:
        """Loads the result of `without_base`.

        Raises:
            RuntimeError: names that are not those of the adapted module.
        """
        if wrong := sorted(self.without_base(self._module.state_dict()).keys() ^ state.keys()):
            raise RuntimeError(f"the adapter lacks, or has beside what it should: {', '.join(wrong)}")
        load_weights(self._module, state, strict=False)

    def _keys(self) -> list[tuple[str, str]]:
        """Returns the names within their layer, and the keys in a state, of adapted weights and their adapters."""
        found: list[tuple[str, str]] = []
        for weight in self.weights:
            for layer in weight.places:
                found += zip((weight.name, *ADAPTER), weight.keys(layer), strict=True)
        return found

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
    """Adds low-rank adapters to layers, in place, and freezes all other parameters.

    A layer stays the same object, with its names, hooks and weights; its outputs are the same until the first step.
    By default each nn.Linear and each Conv1D of transformers is adapted. `include` may name embeddings, convolutions
    and nn.MultiheadAttention, too. Subclasses are left alone. A layer that shares its weight, such as a head tied to
    an embedding, is adapted only where include matches it: for its own output, and `merged` refuses it.

    Args:
        rank: of the adapters; their matrices are [rank, in_features] and [out_features, rank].
        alpha: the adapter's output is multiplied by alpha / rank; None is rank, so by 1.
        dropout: share of an adapter's inputs that are zeroed in training.
        include: globs over names of modules, segment by segment; None is every Linear and Conv1D.
        exclude: globs over names of layers that are not adapted.
        also_train: globs over whole names of further parameters to train.
    Raises:
        ValueError: a setting out of its range; a glob that matches nothing, or no such layer; a module with adapters.

    Source: https://arxiv.org/abs/2106.09685
    """
    check_lora(rank, alpha, dropout)
    selected, skipped, tied = _select(module, include, exclude, dropout)
    parameters = dict(module.named_parameters(remove_duplicate=False))
    also = match_parameters("add_lora: also_train", parameters, also_train)
    trained = {id(parameters[name]) for name in also}
    scale = (rank if alpha is None else alpha) / rank
    with contextlib.ExitStack() as undo:
        for parameter in module.parameters():
            undo.callback(parameter.requires_grad_, parameter.requires_grad)
            parameter.requires_grad_(id(parameter) in trained)
        weights = []
        for layer, names in selected:
            parts = {"": layer, **({".out_proj": layer.out_proj} if isinstance(layer, nn.MultiheadAttention) else {})}
            for suffix, part in parts.items():
                kind, compute_delta = type(part), layers.delta_of(part)
                layers.adapt(part, rank, scale, dropout)
                undo.callback(layers.remove_adapter, part)
                places = [_key(name, suffix[1:]) if suffix else name for name in names]
                weights.append(AdaptedWeight(places, layers.weight_name(part), kind, compute_delta))
        disable_fast_path(module, {id(layer) for layer, _ in selected}, undo)
        names = [name for _, names_of_layer in selected for name in names_of_layer]
        adapted_parts = {name for weight in weights for name in weight.places}
        skipped = {name: reason for name, reason in skipped.items() if name not in adapted_parts}
        return Adapted(names, skipped, tied, undo.pop_all().close, module, scale, weights, also)


def _select(
    module: nn.Module, include: Sequence[str] | None, exclude: Sequence[str], dropout: float
) -> tuple[list[tuple[nn.Module, list[str]]], dict[str, str], dict[str, str]]:
    """Returns the layers to adapt with all their names, and the skipped and tied ones as in `Adapted`."""
    if any(isinstance(each, LoRALayer) for each in module.modules()):
        raise ValueError("add_lora: the module has adapters already, expected none; undo them first")
    matched = select_modules("add_lora", module, nn.Module, include, exclude, subclasses=True)
    for glob in include or ():
        _check_adaptable(glob, name_modules(module))
    names_of_weights: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names_of_weights.setdefault(id(parameter), []).append(name)
    selected: list[tuple[nn.Module, list[str]]] = []
    skipped: dict[str, str] = {}
    tied: dict[str, str] = {}
    for layer, names, reason in matched:
        is_candidate = isinstance(layer, _PARTLY_ADAPTED if include is not None else nn.Linear)
        if not is_candidate and not layers.is_conv1d(layer):
            continue
        weight = layer._parameters.get(layers.weight_name(layer))
        others = [name for name in names_of_weights.get(id(weight), []) if name.rpartition(".")[0] not in names]
        if not layers.can_adapt(layer):
            reason = reason or f"{type(layer).__name__} is a subclass of {type(layer).__mro__[1].__name__}"
        reason = reason or layers.find_obstacle(layer, dropout)
        if others and include is None:
            reason = reason or f"its weight is {others[0]} too; to adapt it, name it in include"
        if reason:
            skipped |= dict.fromkeys(names, reason)
            continue
        selected.append((layer, names))
        if others:
            tied[names[0]] = others[0]
    if not selected:
        listed = list_nearest("", (f"{name}, as {why}" for name, why in skipped.items()))
        raise ValueError(f"add_lora: expected an nn.Linear or Conv1D to adapt, found none; skipped: {listed}")
    return selected, skipped, tied


def _check_adaptable(glob: str, named: Sequence[tuple[nn.Module, list[str]]]) -> None:
    matched = [(each, names) for each, names in named if matches_any(names, [glob])]
    if not any(layers.can_adapt(each) for each, _ in matched):
        listed = list_nearest("", (f"{names[0]}, a {type(each).__name__}" for each, names in matched))
        there_are = list_nearest(glob, (names[0] for each, names in named if layers.can_adapt(each)))
        expected = f"{layers.NAMES} of that very class: {there_are}"
        raise ValueError(f"add_lora: {glob!r} matches no layer that can be adapted but {listed}; expected a {expected}")


def _check_has_keys(where: str, state: Mapping[str, Any], keys: Sequence[str]) -> None:
    if missing := [key for key in keys if key not in state]:
        listed = list_nearest("", missing, limit=4)
        raise ValueError(f"{where}: the state has no {listed}; give a state of the adapted module")


def _key(module: str, name: str) -> str:
    return f"{module}.{name}" if module else name
