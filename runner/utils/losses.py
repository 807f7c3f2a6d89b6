"""Fused losses that need less memory than their unfused form."""

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
    """Returns the cross-entropy of a linear head, 0-d, without ever storing the logits of all positions.

    It equals `F.cross_entropy(F.linear(hidden, weight, bias), targets)`. Gradients are computed along with the loss, so
    backward only scales them. Apart from them, the extra memory is [chunk, vocabulary]. Logits have the dtype of the
    matmul (under autocast, autocast's). The softmax, the loss and the sums of the gradients of weight and bias are fp32
    or fp64.

    Args:
        hidden: [..., width].
        weight: [vocabulary, width].
        targets: [...], int64.
        bias: [vocabulary].
        chunk: number of positions whose logits are in memory at once.
        ignore_index: a target to ignore.
        reduction: mean or sum over the targets that are not ignored; the mean of none is nan.
    Raises:
        ValueError: shapes do not fit, targets are not int64, or `chunk` or `reduction` is invalid.
        RuntimeError: a target is outside of the vocabulary, or gradients of gradients are requested.
    Source: the idea is in https://arxiv.org/abs/2410.10989 (Liger) and https://arxiv.org/abs/2411.09009 (CCE).
    """
    _check_shapes(hidden, weight, targets, bias)
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
    return (total / count.clamp(min=1)).masked_fill(count == 0, math.nan)  # the gradients are 0 then, as in torch


def _check_shapes(hidden: Tensor, weight: Tensor, targets: Tensor, bias: Tensor | None) -> None:
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
    """The summed loss of hidden [positions, width]; saves the gradients of the sum for backward.

    Gradients of the mean would underflow in fp16, because the loss scaler's factor arrives only in backward.
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
        is_grad_enabled: bool,
    ) -> Tensor:
        x, w = _autocast(hidden), _autocast(weight)
        b = None if bias is None else _autocast(bias)
        exact = torch.promote_types(x.dtype, torch.float32)
        needs_grad = [is_grad_enabled and needs for needs in ctx.needs_input_grad[:3]]
        grad_x = torch.empty_like(hidden) if needs_grad[0] else None
        grad_w = torch.zeros_like(weight, dtype=exact) if needs_grad[1] else None
        grad_b = torch.zeros_like(weight[:, 0], dtype=exact) if needs_grad[2] else None
        total = torch.zeros((), dtype=exact, device=x.device)
        for start in range(0, len(x), chunk):
            part = slice(start, start + chunk)
            logits = F.linear(x[part], w, b).to(exact)
            total += _sum_losses(logits, targets[part], ignore_index, any(needs_grad))
            if not any(needs_grad):
                continue
            grad_logits = logits.to(x.dtype)  # `_sum_losses` has replaced the logits by their gradient
            if grad_x is not None:
                grad_x[part] = grad_logits @ w
            if grad_w is not None:
                _add_product(grad_w, grad_logits.T, x[part])
            if grad_b is not None:
                grad_b += logits.sum(0)
        ctx.dtypes = [None if tensor is None else tensor.dtype for tensor in (hidden, weight, bias)]
        ctx.save_for_backward(grad_x, grad_w, grad_b)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        # Not torch's once_differentiable: it accepts a constant `grad`, so a gradient penalty would skip this loss.
        if torch.is_grad_enabled():
            remedy = "leave out create_graph, or take F.cross_entropy of the logits"
            raise RuntimeError(f"chunked_cross_entropy has no gradients of gradients: {remedy}")
        pairs = zip(ctx.saved_tensors, ctx.dtypes, strict=True)
        scaled = [None if saved is None else _scale(saved, grad, dtype) for saved, dtype in pairs]
        return (*scaled, None, None, None, None)


def _autocast(tensor: Tensor) -> Tensor:
    """Returns an operand of a linear layer as autocast would cast it: all but fp64."""
    device = tensor.device.type
    is_enabled = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return tensor.to(torch.get_autocast_dtype(device)) if is_enabled and tensor.dtype != torch.float64 else tensor


def _sum_losses(logits: Tensor, targets: Tensor, ignore_index: int, needs_grad: bool) -> Tensor:
    """Returns the summed loss of logits [positions, vocabulary]; with `needs_grad`, overwrites them by its gradient."""
    is_ignored = targets == ignore_index
    index = targets.masked_fill(is_ignored, 0)[:, None]
    log_total = logits.logsumexp(1, keepdim=True)
    losses = (log_total - logits.gather(1, index))[:, 0].masked_fill(is_ignored, 0.0)
    if needs_grad:
        logits.sub_(log_total).exp_()
        logits.scatter_(1, index, logits.gather(1, index) - 1).masked_fill_(is_ignored[:, None], 0.0)
    return losses.sum()


def _add_product(total: Tensor, left: Tensor, right: Tensor) -> None:
    if left.dtype == torch.float16:  # a sum over positions may overflow
        left, right = left.float(), right.float()
    if total.dtype == left.dtype:
        total.addmm_(left, right)
    else:
        total += left @ right


def _scale(tensor: Tensor, factor: Tensor, dtype: torch.dtype) -> Tensor:
    # A 1-d factor: a 0-d one would be rounded to the tensor's dtype first. A new tensor: backward may run again.
    return torch.mul(tensor, factor.reshape(1), out=torch.empty_like(tensor, dtype=dtype))
