"""Losses that need less memory than their parts would. Must not import a model library."""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    chunk: int = 1024,
    ignore_index: int = -100,
    reduction: str = "mean",
) -> Tensor:
    """Returns the cross-entropy (0-d, fp32 or fp64) of a linear head, never holding the logits of all positions.

    It is `F.cross_entropy(F.linear(hidden, weight, bias), targets)`. Where gradients are wanted they are computed along
    with the loss, so that backward only scales them: beside them, memory is that of [chunk, vocabulary]. The logits
    are of the dtype that matmul gives (under autocast, that of autocast), the rest is computed in fp32 or fp64, where
    the gradients of weight and bias add up too.

    Args:
        hidden: [..., width].
        weight: [vocabulary, width].
        targets: [...], int64.
        bias: [vocabulary].
        chunk: positions whose logits are held at once.
        ignore_index: a target that does not count.
        reduction: mean or sum, over the targets that count; the mean of none is nan.
    Raises:
        ValueError: shapes that don't fit, targets that aren't int64, or a chunk or reduction that isn't one.
        RuntimeError: a target outside of the vocabulary; gradients of gradients.
    Source: the idea is in https://arxiv.org/abs/2410.10989 (Liger) and https://arxiv.org/abs/2411.09009 (CCE).
    """
    _check(hidden, weight, targets, bias)
    if chunk < 1:
        raise ValueError(f"chunk={chunk}: expected 1 or more positions")
    if reduction not in ("mean", "sum"):
        raise ValueError(f"reduction={reduction!r}: expected mean or sum")
    rows = targets.reshape(-1)
    flat = hidden.reshape(len(rows), hidden.shape[-1])
    total: Tensor = _HeadLoss.apply(flat, weight, bias, rows, chunk, ignore_index, torch.is_grad_enabled())
    if reduction == "sum":
        return total
    count = (rows != ignore_index).sum()
    return (total / count.clamp(min=1)).masked_fill(count == 0, math.nan)  # gradients are then 0, as torch's are


def _check(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
    if weight.dim() != 2 or hidden.dim() < 1 or hidden.shape[-1] != weight.shape[1]:
        found = f"hidden {list(hidden.shape)} and weight {list(weight.shape)}"
        raise ValueError(f"{found}: expected [..., width] and [vocabulary, width]")
    if targets.shape != hidden.shape[:-1]:
        raise ValueError(f"targets {list(targets.shape)}: expected {list(hidden.shape[:-1])}, one for each of hidden")
    if targets.dtype != torch.int64:
        raise ValueError(f"targets are {targets.dtype}: expected torch.int64")
    if bias is not None and bias.shape != weight.shape[:1]:
        raise ValueError(f"bias {list(bias.shape)}: expected {list(weight.shape[:1])}, one for each of the vocabulary")


class _HeadLoss(torch.autograd.Function):
    """The summed loss of hidden [positions, width]; what is saved are the gradients of that sum.

    Those of a mean would be too small for fp16 before a loss scaler's factor reaches them.
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        chunk: int,
        ignore_index: int,
        is_graded: bool,
    ) -> Tensor:
        inputs = (hidden, weight, bias)
        x, w, b = _cast(*inputs)
        exact = torch.promote_types(x.dtype, torch.float32)
        needs = [is_graded and needs for needs in ctx.needs_input_grad[:3]]
        grad_x = torch.empty_like(hidden) if needs[0] else None
        grad_w = torch.zeros_like(weight, dtype=exact) if needs[1] else None
        grad_b = torch.zeros_like(weight[:, 0], dtype=exact) if needs[2] else None
        total = torch.zeros((), dtype=exact, device=x.device)
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(x[part], w, b).to(exact)
            total += _sum_losses(logits, targets[part], ignore_index, any(needs))
            if not any(needs):
                continue
            surplus = logits.to(x.dtype)
            if grad_x is not None:
                grad_x[part] = surplus @ w
            if grad_w is not None:
                _add_product(grad_w, surplus.T, x[part])
            if grad_b is not None:
                grad_b += logits.sum(0)
        ctx.dtypes = [None if each is None else each.dtype for each in inputs]
        ctx.save_for_backward(grad_x, grad_w, grad_b)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # torch's once_differentiable lets a constant `grad` pass: a penalty on gradients would miss this loss silently.
        if torch.is_grad_enabled():
            remedy = "leave out create_graph, or take F.cross_entropy of the logits"
            raise RuntimeError(f"chunked_cross_entropy has no gradients of gradients: {remedy}")
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if each is None else _scale(each, grad, dtype) for each, dtype in pairs]
        return (*scaled, None, None, None, None)


def _cast(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Returns what a linear layer would multiply: autocast changes all but fp64."""
    device = hidden.device.type
    if not torch.amp.is_autocast_available(device) or not torch.is_autocast_enabled(device):
        return hidden, weight, bias
    dtype = torch.get_autocast_dtype(device)
    x, w, b = (
        each if each is None or each.dtype == torch.float64 else each.to(dtype) for each in (hidden, weight, bias)
    )
    assert x is not None
    assert w is not None
    return x, w, b


def _sum_losses(logits: Tensor, targets: Tensor, ignore_index: int, is_graded: bool) -> Tensor:
    """Returns the summed loss of logits [positions, vocabulary]; where graded, they become its gradient."""
    is_ignored = targets == ignore_index
    index = targets.masked_fill(is_ignored, 0)[:, None]
    log_total = logits.logsumexp(1, keepdim=True)
    losses = (log_total - logits.gather(1, index))[:, 0].masked_fill(is_ignored, 0.0)
    if is_graded:
        logits.sub_(log_total).exp_()
        logits.scatter_(1, index, logits.gather(1, index) - 1).masked_fill_(is_ignored[:, None], 0.0)
    return losses.sum()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == torch.float16:  # a sum over positions may be more than it holds
        left, right = left.float(), right.float()
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _scale(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # 1-d, or the factor would be rounded to the tensor's dtype first; anew, as backward may come again.
    return torch.mul(tensor, factor.reshape(1), out=torch.empty_like(tensor, dtype=dtype))
