"""Optimizers that torch has only in parts."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class Joined(Optimizer):
    """Several optimizers over different parameters, stepped as one; their groups stand in one list."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([{"params": group["params"]} for o in self.optimizers for group in o.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for o in self.optimizers for group in o.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps each optimizer; a closure runs once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of each, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()


def muon(
    params: Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    adamw_lr: float = 3e-3,
    adamw_betas: Sequence[float] = (0.9, 0.95),
    adamw_only: Sequence[str] = (),
) -> Optimizer:
    """Gives matrices to torch's Muon and all else to AdamW.

    Args:
        params: (name, parameter) pairs.
        adamw_only: globs over names: matrices, such as embeddings and heads, that AdamW takes all the same.
    Source: https://kellerjordan.github.io/posts/muon
    """
    matrices: list[tuple[str, Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    for name, parameter in params:
        is_hidden = parameter.ndim == 2 and not any(fnmatch.fnmatch(name, glob) for glob in adamw_only)
        (matrices if is_hidden else rest).append((name, parameter))
    optimizers: list[Optimizer] = []
    if matrices:
        optimizers.append(torch.optim.Muon(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay))
    if rest:
        first, second = adamw_betas
        optimizers.append(torch.optim.AdamW(rest, lr=adamw_lr, betas=(first, second), weight_decay=weight_decay))
    return optimizers[0] if len(optimizers) == 1 else Joined(optimizers)
