"""The losses and other numbers of the steps since metrics were last taken; they stay on their device until then.

Must not import a config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor


class Gathered:
    """Losses and extra numbers, one each a micro-step, of which those since the last `mark` can be dropped."""

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._extras: list[dict[str, Tensor]] = []
        self._mark = 0, 0

    def add(self, loss: Tensor, extras: Mapping[str, Tensor]) -> None:
        """Takes the numbers of a micro-step, each 0-d."""
        self._losses.append(loss.detach())
        if extras:
            self._extras.append({name: value.detach() for name, value in extras.items()})

    @property
    def unmarked(self) -> list[Tensor]:
        """The losses since the last mark."""
        return self._losses[self._mark[0] :]

    def mark(self) -> None:
        """What is here now stays."""
        self._mark = len(self._losses), len(self._extras)

    def drop_unmarked(self) -> None:
        """What came since the last mark is gone."""
        del self._losses[self._mark[0] :], self._extras[self._mark[1] :]

    def take(self) -> dict[str, float]:
        """Returns the means, and starts anew."""
        values = {"loss": _mean(self._losses)} if self._losses else {}
        for name in self._extras[-1] if self._extras else ():
            values[name] = _mean([extras[name] for extras in self._extras if name in extras])
        self._losses, self._extras, self._mark = [], [], (0, 0)
        return values

    def state_dict(self) -> dict[str, Any]:
        """Returns what is not yet taken."""
        return {"losses": list(self._losses), "extras": list(self._extras)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes it back."""
        self._losses, self._extras = list(state["losses"]), list(state["extras"])
        self.mark()


def _mean(values: Sequence[Tensor]) -> float:
    if len(values) == 1:
        return float(values[0])
    return sum(torch.stack([value.float() for value in values]).tolist()) / len(values)
