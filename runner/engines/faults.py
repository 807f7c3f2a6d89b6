"""Steps that go wrong: gradients that are not finite, and buffers taken back from a step that is discarded.

Must not import a config.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase


class FiniteCheck:
    """Says whether all gradients of some parameters are finite, in one pass over them and a read of one number."""

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        self._groups = [
            (group, torch.zeros(1, device=device), torch.ones(1, device=device))
            for (device, _), group in groups.items()
        ]

    def __call__(self) -> bool:
        is_finite = True
        for group, found, one in self._groups:
            grads = [_values(grad) for parameter in group if (grad := parameter.grad) is not None]
            if grads:
                # The loss scaler's own check, times 1: a fifth of what a norm costs where many gradients are small.
                torch._amp_foreach_non_finite_check_and_unscale_(grads, found, one)
            if found.item():
                found.zero_()
                is_finite = False
        return is_finite


def _values(grad: Tensor) -> Tensor:
    return grad._values() if grad.is_sparse else grad


def describe_gradients(named: Iterable[tuple[str, Tensor]], count: int = 3) -> str:
    """Names the parameters whose gradients are largest, those that are not finite first."""
    found = []
    for name, parameter in named:
        if parameter.grad is not None:
            grad = parameter.grad.detach()
            num_bad = int((~torch.isfinite(grad)).sum())
            largest = float(torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).abs().max())
            found.append((num_bad, largest, name, grad.numel()))
    found.sort(key=lambda each: (each[0] == 0, -each[1]))
    return ", ".join(
        f"{name} ({num_bad} of {total} not finite)" if num_bad else f"{name} (up to {largest:.3g})"
        for num_bad, largest, name, total in found[:count]
    )


class KeptBuffers:
    """What a module's buffers were at the last `keep`, so that a step that is discarded leaves no statistics behind.

    A buffer is copied when it has changed since the keep before, which its version tells at no cost; but for running
    statistics, which torch writes to without telling.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (owner._buffers, name, isinstance(owner, _NormBase))
            for owner in module.modules()
            for name, buffer in owner._buffers.items()
            if buffer is not None
        ]
        self._seen: list[tuple[Tensor, int] | None] = [None] * len(self._places)
        self._copies: list[Tensor | None] = [None] * len(self._places)
        self.keep()

    def keep(self) -> None:
        """Notes what the buffers are now."""
        for index, (buffers, name, is_silent) in enumerate(self._places):
            buffer = buffers[name]
            if buffer is None:
                continue
            now = buffer, buffer._version
            seen = self._seen[index]
            if is_silent or seen is None or seen[0] is not buffer or seen[1] != now[1]:
                self._seen[index] = now
                self._copies[index] = buffer.detach().clone()

    @torch.no_grad()
    def restore(self) -> None:
        """Makes the buffers what they were."""
        for (buffers, name, _), copy in zip(self._places, self._copies, strict=True):
            buffer = buffers[name]
            if buffer is not None and copy is not None:
                buffer.copy_(copy)
        self.keep()
