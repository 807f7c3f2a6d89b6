"""Adapters in PEFT's format: a folder with adapter_config.json and adapter_model.safetensors.

Source: https://huggingface.co/docs/peft/main/en/developer_guides/checkpoint
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import nn

from runner.utils.utils import list_nearest
from runner.utils.wrapper.lora.adapt import Adapted, AdaptedWeight
from runner.utils.wrapper.lora.layers import ADAPTER

CONFIG_NAME, WEIGHTS_NAME = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
# Ends of names in PEFT's files, and those of an adapted module.
_SUFFIXES = {
    ".lora_A.weight": ".lora_a",
    ".lora_B.weight": ".lora_b",
    ".lora_embedding_A": ".lora_a",
    ".lora_embedding_B": ".lora_b",
}
_OUT_PROJECTION, _ITS_NAME = ".out_proj", ".base_layer.out_proj"  # within a MultiheadAttention


def read_names(state: Mapping[str, Any]) -> dict[str, Any]:
    """Returns the content of an adapter_model file with the names that it has in an adapted module."""
    named = {}
    for name, value in state.items():
        own = name.removeprefix(_ROOT)
        for theirs, ours in _SUFFIXES.items():
            if own.endswith(theirs):
                own = own.removesuffix(theirs).replace(_ITS_NAME, _OUT_PROJECTION) + ours
                break
        named[own] = value
    return named


class PeftFormat:
    """Writes the adapters of a module in PEFT's format.

    Raises:
        ValueError: PEFT can't represent the trained parameters.
    """

    def __init__(self, module: nn.Module, adapted: Adapted, *, rank: int, alpha: float | None, dropout: float) -> None:
        self._adapted = adapted
        self._modules_to_save = _find_modules_to_save(module, adapted.also)
        for weight in adapted.weights:
            _check_layer(weight.places[0], module.get_submodule(weight.places[0]))
        scale = rank if alpha is None else alpha
        kinds = [weight.kind for weight in adapted.weights]
        self.config: dict[str, Any] = {
            "peft_type": "LORA",
            "task_type": None,
            "base_model_name_or_path": None,
            "inference_mode": True,
            "r": rank,
            "lora_alpha": int(scale) if scale == int(scale) else scale,
            "lora_dropout": dropout,
            "target_modules": _describe_targets(module, [weight.places[0] for weight in adapted.weights]),
            "modules_to_save": self._modules_to_save or None,
            "fan_in_fan_out": any(kind.__name__ == "Conv1D" for kind in kinds),
            "bias": "none",
            "init_lora_weights": True,
        }

    def files(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content of the folder by the names of its files, for an exported state."""
        return {WEIGHTS_NAME: self.weights(state), CONFIG_NAME: self.config}

    def weights(self, state: Mapping[str, Any]) -> dict[str, Any]:
        """Returns the content of the adapter_model file for a state of the adapted module."""
        named = {}
        for weight in self._adapted.weights:
            for ours, theirs in zip(ADAPTER, _their_names(weight), strict=True):
                named[_ROOT + theirs] = state[f"{weight.places[0]}.{ours}"]
        for name in self._adapted.also:
            named[_ROOT + name] = state[name]
        return named


def _their_names(weight: AdaptedWeight) -> tuple[str, str]:
    """Returns PEFT's names of a weight's lora_a and lora_b."""
    place = weight.places[0]
    if weight.kind is nn.Embedding:
        return f"{place}.lora_embedding_A", f"{place}.lora_embedding_B"
    return f"{place}.lora_A.weight", f"{place}.lora_B.weight"


def _describe_targets(module: nn.Module, names: list[str]) -> list[str] | str:
    """Returns the names, or a regular expression where PEFT would find further modules that end like one of them."""
    endings = tuple(f".{name}" for name in names)
    is_exact = not any(name.endswith(endings) for name, _ in module.named_modules())
    return names if is_exact else "|".join(map(re.escape, names))


def _find_modules_to_save(module: nn.Module, also: list[str]) -> list[str]:
    """Returns the modules whose parameters are trained beside the adapters.

    Raises:
        ValueError: only some of a module's parameters are; PEFT saves whole modules.
    """
    owners = list(dict.fromkeys(name.rpartition(".")[0] for name in also))
    for owner in owners:
        own = [f"{owner}.{name}" if owner else name for name, _ in module.get_submodule(owner).named_parameters()]
        if not owner or (left_out := [name for name in own if name not in also]):
            found = "a parameter of the model itself" if not owner else f"{owner} without {list_nearest('', left_out)}"
            raise ValueError(f"lora.export=peft: also_train: expected whole modules, found {found}")
    return owners


def _check_layer(name: str, layer: nn.Module) -> None:
    """Checks that PEFT computes the same with an adapter of this layer.

    Raises:
        ValueError: it does not.
    """
    reason = None
    if isinstance(layer, nn.MultiheadAttention):
        # https://github.com/huggingface/peft/blob/v0.21.2/src/peft/tuners/lora/layer.py#L2074
        reason = "PEFT (0.21) adds the adapter of an attention's out_proj twice"
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and any(step != 1 for step in layer.dilation):
        reason = "PEFT (0.21) ignores the dilation of a convolution"
    elif isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Conv3d)) and layer.padding_mode != "zeros":
        reason = "PEFT (0.21) ignores the padding_mode of a convolution"
    if reason:
        raise ValueError(f"lora.export=peft: {name}: {reason}; put it in exclude, or set lora.export=merged")
