"""Allowed values of the settings of optimizations; without torch, so that a config is checked early."""

from __future__ import annotations

import math

from runner.utils.utils import check_fraction

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")


def check_lora(rank: int, alpha: float | None, dropout: float) -> None:
    """Checks the settings of adapters.

    Raises:
        ValueError: one is out of its range.
    """
    if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
        raise ValueError(f"rank={rank}: expected a whole number, 1 or more")
    if alpha is not None and not 0 < alpha < math.inf:
        raise ValueError(f"alpha={alpha}: expected a finite number above 0, or null for the rank")
    check_fraction("dropout", dropout)
