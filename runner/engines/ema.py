"""Averages of the weights an engine trains: exponential moving ones, and equal ones.

Each rank averages its own part of the weights.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_multi_avg_fn, get_swa_multi_avg_fn

from runner.utils.utils import check_fraction

_COARSE = (torch.bfloat16, torch.float16)  # a small step of an average would be rounded away


class EqualAverages:
    """Keeps the mean of each parameter that requires a gradient when it is made, over all updates.

    The first update copies the weights; update n, counted from 0, sets average += (weight - average) / (n + 1), to
    the bit as torch's `AveragedModel` does with `get_swa_multi_avg_fn()`. Averages have the weights' dtype, or fp32
    for bf16 and fp16.

    Args:
        module: its parameters may be DTensors, whose averages are sharded likewise.
    """

    def __init__(self, module: nn.Module) -> None:
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
        self._trained: list[Tensor] | None = None  # while swapped, a copy of the weights: exact in any dtype

    @torch.no_grad()
    def update(self) -> None:
        """Updates the averages with the weights, after a step that the optimizer has made.

        Raises:
            RuntimeError: the weights are the averages now.
        """
        self._refuse_swapped("update")
        n = self.num_updates
        average = self._averaging_function()
        for (_, dtype), names in self._groups.items():
            averages, weights = _locals(self._averages, names), _locals(self._weights, names)
            if n == 0:
                torch._foreach_copy_(averages, weights)
            elif dtype not in _COARSE:
                average(averages, weights, n)
            else:
                for mean, weight in zip(averages, weights, strict=True):  # one at a time: each is cast
                    average([mean], [weight.to(mean.dtype)], n)
        self.num_updates += 1

    def _averaging_function(self) -> Callable[..., None]:
        """Returns a function of averages, weights and the number of updates so far, which changes the averages."""
        average = get_swa_multi_avg_fn()
        # As `AveragedModel` does: of a Python number, the share would be rounded differently.
        return lambda averages, weights, number: average(averages, weights, torch.tensor(number))

    @torch.no_grad()
    def swap(self) -> None:
        """Replaces the weights by the averages, or the averages by the weights; nothing before the first update.

        Values are copied, storages stay; changes of the weights in between are lost. On sharded weights all ranks call
        it.
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
        """Frees weights that an evaluation has gathered: the next forward would use those of before the swap."""
        if any(hasattr(weight, "to_local") for weight in self._weights.values()):
            from torch.distributed.fsdp import FSDPModule  # takes long to load, and only ranks that shard need it

            for part in self._module.modules():
                if isinstance(part, FSDPModule):
                    part.reshard()

    def state_dict(self) -> dict[str, Any]:
        """Returns the number of updates, and the averages by name, swapped or not."""
        return {"num_updates": self.num_updates, "weights": dict(self._averages)}

    @torch.no_grad()
    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Copies averages, sharded like the own ones.

        Raises:
            ValueError: names or shapes that differ from the own averages, which then stay the same.
            RuntimeError: the weights are the averages now.
        """
        self._refuse_swapped("load_state_dict")
        weights: Mapping[str, Tensor] = state["weights"]
        missing, unexpected = self._averages.keys() - weights.keys(), weights.keys() - self._averages.keys()
        if missing or unexpected:
            raise ValueError(
                f"averages: missing {', '.join(sorted(missing)) or 'none'}; "
                f"unexpected {', '.join(sorted(unexpected)) or 'none'}"
            )
        averages, saved = _locals(self._averages), _locals(weights, self._averages)
        for name, average, value in zip(self._averages, averages, saved, strict=True):
            if average.shape != value.shape:
                raise ValueError(f"averages: {name} is {list(value.shape)}, expected {list(average.shape)}")
        for average, value in zip(averages, saved, strict=True):
            average.copy_(value)
        self.num_updates = int(state["num_updates"])

    def _refuse_swapped(self, what: str) -> None:
        if self.is_swapped:
            raise RuntimeError(f"{what}: the weights are the averages now; call swap() first")


class EMA(EqualAverages):
    """Keeps an exponential moving average of each parameter that requires a gradient when it is made.

    The first update copies the weights; each later one sets average = decay * average + (1 - decay) * weight.

    Args:
        module: as of `EqualAverages`.
        decay: at least 0 and less than 1.
        warmup: the decay of update n, counted from 0, is at most (1 + n) / (10 + n).
    Raises:
        ValueError: a decay out of its range.
    """

    def __init__(self, module: nn.Module, decay: float, *, warmup: bool = False) -> None:
        check_fraction("decay", decay)
        super().__init__(module)
        self.decay = decay
        self.warmup = warmup

    def _averaging_function(self) -> Callable[..., None]:
        n = self.num_updates
        return get_ema_multi_avg_fn(min(self.decay, (1 + n) / (10 + n)) if self.warmup else self.decay)


def _locals(tensors: Mapping[str, Tensor], names: Iterable[str] | None = None) -> list[Tensor]:
    """Returns this rank's part of each tensor. DTensor is recognized by its method: its module takes long to load."""
    chosen = tensors.values() if names is None else map(tensors.__getitem__, names)
    return [tensor.to_local() if hasattr(tensor, "to_local") else tensor.detach() for tensor in chosen]
