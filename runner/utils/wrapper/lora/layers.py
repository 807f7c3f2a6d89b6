"""Layers with low-rank adapters, one class for each kind of layer, with the arithmetic of PEFT.

`add_lora` changes a layer's class in place. Its parameters `lora_a` and `lora_b` stand beside its own.

Source: https://arxiv.org/abs/2106.09685, https://github.com/huggingface/peft (Apache 2.0)
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pkgutil import resolve_name
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ADAPTER = ("lora_a", "lora_b")
SETTINGS = ("lora_rank", "lora_scale", "lora_dropout")
_CONV1D = ("transformers.pytorch_utils", "Conv1D")
_CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.Conv3d)

ComputeDelta = Callable[[Tensor, Tensor], Tensor]


class LoRALayer(nn.Module):
    """Part of each class of adapted layers: the adapter's parameters and settings."""

    lora_a: nn.Parameter
    lora_b: nn.Parameter
    lora_rank: int
    lora_scale: float
    lora_dropout: float

    def reset_parameters(self) -> None:
        """Draws all weights again; the adapter as add_lora does, so that it changes no output yet."""
        super().reset_parameters()  # type: ignore[misc]
        self.reset_adapter()

    def reset_adapter(self) -> None:
        """Initializes lora_a like a Linear's weight and lora_b with zeros."""
        nn.init.kaiming_uniform_(self.lora_a, a=math.sqrt(5))
        nn.init.zeros_(self.lora_b)

    def extra_repr(self) -> str:
        settings = f"rank={self.lora_rank}, scale={self.lora_scale:g}, dropout={self.lora_dropout:g}"
        own = super().extra_repr()
        return f"{own}, {settings}" if own else settings

    def _drop(self, input: Tensor) -> Tensor:
        return F.dropout(input, self.lora_dropout, self.training)


class LoRALinear(LoRALayer, nn.Linear):
    """A Linear plus scale * lora_b(lora_a(dropout(x))): lora_a is [rank, in_features], lora_b [out_features, rank]."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., out_features] for [..., in_features]."""
        low = F.linear(self._drop(input), self.lora_a)
        return F.linear(input, self.weight, self.bias) + self.lora_scale * F.linear(low, self.lora_b)


class LoRAEmbedding(LoRALayer, nn.Embedding):
    """An Embedding plus scale * lora_b(lora_a[:, index]): lora_a is [rank, num_embeddings], lora_b [dim, rank]."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns [..., embedding_dim] for indices [...]."""
        options = (self.padding_idx, self.max_norm, self.norm_type, self.scale_grad_by_freq, self.sparse)
        low = F.embedding(input, self.lora_a.T, *options)
        return super().forward(input) + (low @ self.lora_b.T) * self.lora_scale

    def reset_adapter(self) -> None:
        """Initializes lora_a with zeros and lora_b like an Embedding's weight, as PEFT does."""
        nn.init.zeros_(self.lora_a)
        nn.init.normal_(self.lora_b)


class _LoRAConv(LoRALayer):
    """A convolution plus scale * those by lora_a, [rank, in, *kernel], and by lora_b, [out, rank, 1, ...]."""

    def forward(self, input: Tensor) -> Tensor:
        """Returns [batch, out_channels, ...] for [batch, in_channels, ...]."""
        layer: Any = self
        low = layer._conv_forward(self._drop(input), self.lora_a, None)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[self.lora_b.dim() - 3]
        return super().forward(input) + self.lora_scale * convolve(low, self.lora_b)


class LoRAConv1d(_LoRAConv, nn.Conv1d):
    """A Conv1d with an adapter."""


class LoRAConv2d(_LoRAConv, nn.Conv2d):
    """A Conv2d with an adapter."""


class LoRAConv3d(_LoRAConv, nn.Conv3d):
    """A Conv3d with an adapter."""


class LoRAProjection(LoRALayer, nn.modules.linear.NonDynamicallyQuantizableLinear):
    """The output projection of a MultiheadAttention, which reads its weight and does not call it."""


class LoRAMultiheadAttention(LoRALayer, nn.MultiheadAttention):
    """An attention whose input and output projections are computed with the adapters added to their weights.

    lora_a is [rank, embed_dim], lora_b [3 * embed_dim, rank]; `out_proj` has adapters of its own.
    """

    def forward(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor | None]:
        """Returns output and attention weights, as `nn.MultiheadAttention` does."""
        with _adapted(self, "in_proj_weight"), _adapted(self.out_proj, "weight"):
            return super().forward(*args, **kwargs)

    def reset_parameters(self) -> None:
        """Draws all weights again, and the adapters of both projections."""
        self._reset_parameters()
        self.reset_adapter()
        self.out_proj.reset_adapter()  # type: ignore[operator]


@contextmanager
def _adapted(layer: Any, name: str) -> Iterator[None]:
    """Gives a layer a weight with the adapter added, for the block."""
    weight = layer._parameters[name]
    layer._parameters[name] = weight + layer.lora_scale * (layer.lora_b @ layer.lora_a)
    try:
        yield
    finally:
        layer._parameters[name] = weight


@functools.cache
def _make_conv1d(kind: Any) -> type[LoRALayer]:
    """Returns the class of adapted layers of transformers' Conv1D, whose weight is [in_features, out_features]."""

    def forward(self: Any, input: Tensor) -> Tensor:
        low = F.linear(self._drop(input), self.lora_a)
        return kind.forward(self, input) + self.lora_scale * F.linear(low, self.lora_b)

    members = {"__module__": __name__, "__doc__": "A Conv1D of transformers with an adapter.", "forward": forward}
    return type("LoRAConv1D", (LoRALayer, kind), members)


def __getattr__(name: str) -> Any:
    """Returns the class `LoRAConv1D`, as a pickle names it; it is made of a class of transformers."""
    if name != "LoRAConv1D":
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return _make_conv1d(resolve_name(":".join(_CONV1D)))


_CLASSES: dict[type[nn.Module], type[LoRALayer]] = {
    nn.Linear: LoRALinear,
    nn.Embedding: LoRAEmbedding,
    nn.Conv1d: LoRAConv1d,
    nn.Conv2d: LoRAConv2d,
    nn.Conv3d: LoRAConv3d,
    nn.MultiheadAttention: LoRAMultiheadAttention,
    nn.modules.linear.NonDynamicallyQuantizableLinear: LoRAProjection,
}
NAMES = "Linear, transformers' Conv1D, Embedding, Conv1d, Conv2d, Conv3d or MultiheadAttention"


def is_conv1d(layer: nn.Module) -> bool:
    """Returns whether a layer is exactly a Conv1D of transformers, which need not be imported for it."""
    return (type(layer).__module__, type(layer).__name__) == _CONV1D


def can_adapt(layer: nn.Module) -> bool:
    """Returns whether there is a class of adapted layers for exactly the class of a layer."""
    is_projection = type(layer) is nn.modules.linear.NonDynamicallyQuantizableLinear
    return is_conv1d(layer) or (type(layer) in _CLASSES and not is_projection)


def find_obstacle(layer: nn.Module, dropout: float) -> str | None:
    """Returns why a layer of a class that has adapters can't have one; None if it can."""
    if isinstance(layer, _CONVOLUTIONS) and layer.groups > 1:
        return "it has several groups"
    if isinstance(layer, nn.MultiheadAttention):
        if not layer._qkv_same_embed_dim:
            return "its keys or values have a size of their own"
        if type(layer.out_proj) is not nn.modules.linear.NonDynamicallyQuantizableLinear:
            return f"its out_proj is a {type(layer.out_proj).__name__}"
        if dropout:
            return "its projections have no inputs to drop; set dropout to 0"
    weight = layer._parameters.get(weight_name(layer))
    if weight is None or not weight.is_floating_point():  # such as one of weight_norm
        return "its weight is no parameter of a floating-point dtype"
    return None


def weight_name(layer: nn.Module) -> str:
    """Returns the name of the parameter that an adapter is added to."""
    return "in_proj_weight" if isinstance(layer, nn.MultiheadAttention) else "weight"


def adapt(layer: nn.Module, rank: int, scale: float, dropout: float) -> None:
    """Changes a layer into one with an adapter, in place."""
    weight = layer._parameters[weight_name(layer)]
    assert weight is not None
    shapes = _find_shapes(layer, weight, rank)
    kind: Any = type(layer)
    layer.__class__ = _make_conv1d(kind) if is_conv1d(layer) else _CLASSES[kind]
    assert isinstance(layer, LoRALayer)
    layer.lora_rank = rank
    layer.lora_scale = scale
    layer.lora_dropout = dropout
    for name, shape in zip(ADAPTER, shapes, strict=True):
        layer.register_parameter(name, nn.Parameter(torch.empty(shape, dtype=weight.dtype, device=weight.device)))
    layer.reset_adapter()


def _find_shapes(layer: nn.Module, weight: Tensor, rank: int) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Returns the shapes of lora_a and lora_b."""
    if isinstance(layer, _CONVOLUTIONS):
        num_out, *of_each = weight.shape
        return (rank, *of_each), (num_out, rank, *(1 for _ in layer.kernel_size))
    is_transposed = is_conv1d(layer) or isinstance(layer, nn.Embedding)
    num_out, num_in = reversed(weight.shape) if is_transposed else weight.shape
    return (rank, num_in), (num_out, rank)


def remove_adapter(layer: nn.Module) -> None:
    """Restores an adapted layer to its original class and attributes."""
    for name in (*ADAPTER, *SETTINGS):
        delattr(layer, name)
    kinds = [kind for kind in type(layer).__mro__ if issubclass(kind, nn.Module) and not issubclass(kind, LoRALayer)]
    layer.__class__ = kinds[0]


def delta_of(layer: nn.Module) -> ComputeDelta:
    """Returns the function of (lora_a, lora_b) that computes their product in the shape of a layer's weight."""
    if isinstance(layer, _CONVOLUTIONS):
        return _multiply_kernels
    return _multiply_transposed if is_conv1d(layer) or isinstance(layer, nn.Embedding) else _multiply


def _multiply(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return lora_b @ lora_a


def _multiply_transposed(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return (lora_b @ lora_a).T


def _multiply_kernels(lora_a: Tensor, lora_b: Tensor) -> Tensor:
    return torch.einsum("or,r...->o...", lora_b.flatten(1), lora_a)
