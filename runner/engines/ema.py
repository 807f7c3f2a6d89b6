"""Exponential moving averages of the weights an engine trains.

They are made of the weights as placed, and each rank averages what it holds. Must not import a config.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn

_COARSE = (torch.bfloat16, torch.float16)  # a small step of an average would be rounded away


class EMA:
    """Keeps an exponential moving average of each parameter that requires a gradient when it is made.

    The first update copies the weights; each later one takes an average to decay * average + (1 - decay) * weight.
    Averages are of the weights' dtype, or fp32 for bf16 and fp16.

    Args:
        module: its parameters may be DTensors, whose averages are spread as they are.
        decay: at least 0 and less than 1.
        warmup: the decay of update n, counted from 0, is at most (1 + n) / (10 + n).
    Raises:
        ValueError: a decay that is not in its range.
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = False) -> None:
        if not 0 <= decay < 1:
            raise ValueError(f"decay={decay!r}: expected at least 0 and less than 1")
        self.decay, self.warmup = decay, warmup
        self.num_updates = 0
        self.is_swapped = False
        self._module = module
        self._weights = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._averages = {
            name: p.detach().to(torch.float32 if p.dtype in _COARSE else p.dtype, copy=True)
            for name, p in self._weights.items()
        }
        self._groups: dict[tuple[torch.device, torch.dtype], list[str]] = {}
        for name, parameter in self._weights.items():
            self._groups.setdefault((parameter.device, parameter.dtype), []).append(name)
        self._trained: list[Tensor] | None = None  # while swapped, the weights as they were: exact in any dtype

    @torch.no_grad()
    def update(self) -> None:
        """Takes the weights into the averages: after each optimizer step that was taken.

        Raises:
            RuntimeError: the weights are the averages now.
        """
        self._refuse_swapped("update")
        n = self.num_updates
        decay = min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay
        average = get_ema_multi_avg_fn(decay)
        for (_, dtype), names in self._groups.items():
            averages, weights = _locals(self._averages, names), _locals(self._weights, names)
            if n == 0:
                torch._foreach_copy_(averages, weights)
            elif dtype not in _COARSE:
                average(averages, weights, n)
            else:
                for own, weight in zip(averages, weights, strict=True):  # one at a time: each is cast
                    average([own], [weight.to(own.dtype)], n)
        self.num_updates += 1

    @torch.no_grad()
    def swap(self) -> None:
        """Puts the averages in place of the weights, or the weights back; before the first update nothing moves.

        Values are copied, storages stay; what training does to the weights meanwhile is lost. On sharded weights all
        ranks call it.
        """
        weights = _locals(self._weights)
        if self._trained is not None:
            torch._foreach_copy_(weights, self._trained)
            self._trained = None
        elif self.num_updates and not self.is_swapped and weights:
            self._trained = [weight.clone() for weight in weights]
            torch._foreach_copy_(weights, _locals(self._averages))
        self.is_swapped = not self.is_swapped
        self._reshard()

    def _reshard(self) -> None:
        """Gives up what an evaluation left gathered: the next forward would run on weights of before the swap."""
        if any(hasattr(weight, "to_local") for weight in self._weights.values()):
            from torch.distributed.fsdp import FSDPModule  # takes long to load, and only ranks that shard need it

            for part in self._module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of updates, and the averages themselves by name, swapped or not."""
        return {"num_updates": self.num_updates, "weights": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies averages in, spread as the own ones are.

        Raises:
            ValueError: names or shapes that are not those of the own averages, which then stay as they were.
            RuntimeError: the weights are the averages now.
        """
        self._refuse_swapped("load_state_dict")
        weights: Mapping[str, Tensor] = state["weights"]
        missing, unexpected = self._averages.keys() - weights.keys(), weights.keys() - self._averages.keys()
        if missing or unexpected:
            found = (
                f"missing {', '.join(sorted(missing)) or 'none'}; unexpected {', '.join(sorted(unexpected)) or 'none'}"
            )
            raise ValueError(f"averages: {found}")
        own, given = _locals(self._averages), _locals(weights, self._averages)
        for name, mine, other in zip(self._averages, own, given, strict=True):
            if mine.shape != other.shape:
                raise ValueError(f"averages: {name} is {list(other.shape)}, expected {list(mine.shape)}")
        for mine, other in zip(own, given, strict=True):
            mine.copy_(other)
        self.num_updates = int(state["num_updates"])

    def _refuse_swapped(self, what: str) -> None:
        if self.is_swapped:
            raise RuntimeError(f"{what}: the weights are the averages now; call swap() first")


def _locals(tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> list[Tensor]:
    """Returns what this rank holds of each tensor. DTensor is told by its method: its module takes long to load."""
    chosen = [tensors[name] for name in (tensors if names is None else names)]
    return [each.to_local() if hasattr(each, "to_local") else each.detach() for each in chosen]
