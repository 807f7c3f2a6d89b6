"""Learning-rate schedules as factors on the optimizer's learning rate, each a torch `LambdaLR`."""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant(optimizer: Optimizer) -> None:
    """Leaves the learning rate as it is: no scheduler at all."""


def warmup(optimizer: Optimizer, *, warmup_steps: int) -> LambdaLR:
    """Rises linearly over `warmup_steps`, reaching the full rate at the last of them, then stays."""
    return LambdaLR(optimizer, _rise(warmup_steps))


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, total_steps: int, final_factor: float = 0.0) -> LambdaLR:
    """Rises linearly, then falls as half a cosine; the first step after `total_steps` has `final_factor`, and so on.

    Source: SGDR without restarts, https://arxiv.org/abs/1608.03983
    """
    if not 0 <= final_factor <= 1:
        raise ValueError(f"scheduler.final_factor={final_factor}: expected 0 to 1")
    rise = _rise(warmup_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return rise(step)
        part = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * part)) / 2

    return LambdaLR(optimizer, factor)


def noam(optimizer: Optimizer, *, warmup_steps: int) -> LambdaLR:
    """Rises linearly over `warmup_steps` to the optimizer's rate, then falls as 1 / sqrt(step).

    Source: https://arxiv.org/abs/1706.03762, section 5.3, scaled so that its peak is the optimizer's rate.
    """
    rise = _rise(warmup_steps)

    def factor(step: int) -> float:
        return min(rise(step), math.sqrt(max(warmup_steps, 1) / (step + 1)))

    return LambdaLR(optimizer, factor)


def onecycle(
    optimizer: Optimizer,
    *,
    total_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> LambdaLR:
    """Rises as half a cosine from 1 / div_factor of the rate to all of it, then falls to 1 / final_div_factor of that.

    Source: https://arxiv.org/abs/1708.07120, as torch's OneCycleLR has it, but on every group's own rate, without
    cycling the momentum, and staying down after `total_steps`.
    """
    if not 0 < pct_start < 1:
        raise ValueError(f"scheduler.pct_start={pct_start}: expected a number between 0 and 1")
    if div_factor < 1 or final_div_factor < 1:
        raise ValueError(
            f"scheduler: expected div_factor and final_div_factor >= 1, found {div_factor}, {final_div_factor}"
        )
    low, lowest, top = 1 / div_factor, 1 / div_factor / final_div_factor, pct_start * total_steps - 1

    def factor(step: int) -> float:
        if step <= top:
            return _half_cosine(low, 1.0, step / top if top > 0 else 1.0)
        return _half_cosine(1.0, lowest, min((step - top) / max(total_steps - 1 - top, 1), 1.0))

    return LambdaLR(optimizer, factor)


def _half_cosine(start: float, end: float, part: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * part)) / 2


def _rise(warmup_steps: int) -> Callable[[int], float]:
    if warmup_steps < 0:
        raise ValueError(f"scheduler.warmup_steps={warmup_steps}: expected 0 or more")
    return lambda step: min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
