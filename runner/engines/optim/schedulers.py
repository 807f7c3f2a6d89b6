"""Learning-rate schedules, each a torch `LambdaLR`.

Its factor multiplies the optimizer's learning rate.
"""

from __future__ import annotations

import math
from collections.abc import Callable

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR


def constant(optimizer: Optimizer) -> None:
    """Keeps the learning rate constant: returns no scheduler."""


def warmup(optimizer: Optimizer, *, warmup_steps: int) -> LambdaLR:
    """Rises linearly to the full rate over `warmup_steps`, then stays constant."""
    return LambdaLR(optimizer, _warmup_factor(warmup_steps))


def warmup_cosine(optimizer: Optimizer, *, warmup_steps: int, total_steps: int, final_factor: float = 0.0) -> LambdaLR:
    """Rises linearly, then falls as half a cosine to `final_factor`.

    It stays constant after `total_steps`.

    Source: SGDR without restarts, https://arxiv.org/abs/1608.03983
    """
    if not 0 <= final_factor <= 1:
        raise ValueError(f"scheduler.final_factor={final_factor}: expected 0 to 1")
    warmup_factor = _warmup_factor(warmup_steps)

    def factor(step: int) -> float:
        if step < warmup_steps:
            return warmup_factor(step)
        progress = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return _half_cosine(1.0, final_factor, progress)

    return LambdaLR(optimizer, factor)


def noam(optimizer: Optimizer, *, warmup_steps: int) -> LambdaLR:
    """Rises linearly over `warmup_steps`, then falls as 1 / sqrt(step).

    Source: https://arxiv.org/abs/1706.03762, section 5.3, scaled so that its maximum is the optimizer's rate.
    """
    warmup_factor = _warmup_factor(warmup_steps)

    def factor(step: int) -> float:
        return min(warmup_factor(step), math.sqrt(max(warmup_steps, 1) / (step + 1)))

    return LambdaLR(optimizer, factor)


def onecycle(
    optimizer: Optimizer,
    *,
    total_steps: int,
    pct_start: float = 0.3,
    div_factor: float = 25.0,
    final_div_factor: float = 1e4,
) -> LambdaLR:
    """Rises as half a cosine from rate / div_factor to the rate, then falls.

    The final rate is rate / div_factor / final_div_factor.

    Source: https://arxiv.org/abs/1708.07120, as in torch's OneCycleLR, but with every group's own rate, without cycling
    the momentum, and constant after `total_steps`.
    """
    if not 0 < pct_start < 1:
        raise ValueError(f"scheduler.pct_start={pct_start}: expected a number between 0 and 1")
    if div_factor < 1 or final_div_factor < 1:
        raise ValueError(
            f"scheduler: expected div_factor and final_div_factor >= 1, found {div_factor}, {final_div_factor}"
        )
    initial_factor = 1 / div_factor
    final_factor = 1 / div_factor / final_div_factor
    peak_step = pct_start * total_steps - 1

    def factor(step: int) -> float:
        if step <= peak_step:
            return _half_cosine(initial_factor, 1.0, step / peak_step if peak_step > 0 else 1.0)
        return _half_cosine(1.0, final_factor, min((step - peak_step) / max(total_steps - 1 - peak_step, 1), 1.0))

    return LambdaLR(optimizer, factor)


def _half_cosine(start: float, end: float, progress: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * progress)) / 2


def _warmup_factor(warmup_steps: int) -> Callable[[int], float]:
    if warmup_steps < 0:
        raise ValueError(f"scheduler.warmup_steps={warmup_steps}: expected 0 or more")
    return lambda step: min((step + 1) / warmup_steps, 1.0) if warmup_steps else 1.0
