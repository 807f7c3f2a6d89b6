"""The losses and other numbers of the steps since metrics were last taken; they stay on their device until then.

Must not import a config.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runner.utils.distributed import gather

_MOST_APART = 1024  # micro-steps whose numbers are kept one by one


class Gathered:
    """Losses and extra numbers, one each a micro-step, of which those since the last `mark` can be dropped.

    Many are added up, in float64, so that a run that logs seldom or never does not grow.
    """

    def __init__(self) -> None:
        self._losses: list[Tensor] = []
        self._extras: list[dict[str, Tensor]] = []
        self._sums: dict[str, tuple[Tensor, int]] = {}
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
        if max(len(self._losses), len(self._extras)) > _MOST_APART:
            self._sums = {name: _add(self._sums.get(name), values) for name, values in self._apart().items()}
            self._losses, self._extras = [], []
        self._mark = len(self._losses), len(self._extras)

    def drop_unmarked(self) -> None:
        """What came since the last mark is gone."""
        del self._losses[self._mark[0] :], self._extras[self._mark[1] :]

    def take(self) -> dict[str, float]:
        """Returns the means, and starts anew."""
        values = {name: _mean(self._sums.get(name), found) for name, found in self._apart().items()}
        self._losses, self._extras, self._sums, self._mark = [], [], {}, (0, 0)
        return values

    def _apart(self) -> dict[str, list[Tensor]]:
        """The numbers kept one by one, by name; a name that is only in the sums has none."""
        found: dict[str, list[Tensor]] = {name: [] for name in self._sums}
        if self._losses:
            found["loss"] = self._losses
        for extras in self._extras:
            for name, value in extras.items():
                found.setdefault(name, []).append(value)
        return found

    def share(self) -> None:
        """Makes the numbers the means over the ranks, micro-step by micro-step: to share them again changes nothing."""
        own = {n: ([float(v) for v in values], *_plain(self._sums.get(n))) for n, values in self._apart().items()}
        said = gather(own)
        device = next((each.device for each in self._losses), torch.device("cpu"))
        apart, sums = dict[str, list[Tensor]](), dict[str, tuple[Tensor, int]]()
        for name in dict.fromkeys(name for values in said for name in values):
            found = [values[name] for values in said if name in values]
            lists = [each[0] for each in found]
            if len({len(each) for each in lists}) > 1:  # a number that not every forward returned on every rank
                lists = [[sum(each) / len(each)] for each in lists if each]
            means = [sum(together) / len(together) for together in zip(*lists, strict=True)]
            apart[name] = list(torch.tensor(means, dtype=torch.float32, device=device).unbind())
            if count := found[0][2]:
                total = sum(each[1] for each in found) / len(found)
                sums[name] = torch.tensor(total, dtype=torch.float64, device=device), count
        self._set(apart, sums)

    def state_dict(self) -> dict[str, Any]:
        """Returns what is not yet taken, a tensor or two a name."""
        apart = {name: torch.stack(values) if values else None for name, values in self._apart().items()}
        return {"apart": apart, "sums": dict(self._sums)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes it back."""
        apart = {name: [] if values is None else list(values.unbind()) for name, values in state["apart"].items()}
        self._set(apart, dict(state["sums"]))

    def _set(self, apart: dict[str, list[Tensor]], sums: dict[str, tuple[Tensor, int]]) -> None:
        self._sums = sums
        self._losses = apart.pop("loss", [])
        longest = max((len(values) for values in apart.values()), default=0)
        self._extras = [{n: v[index] for n, v in apart.items() if index < len(v)} for index in range(longest)]
        self.mark()


def _plain(summed: tuple[Tensor, int] | None) -> tuple[float, int]:
    return (0.0, 0) if summed is None else (float(summed[0]), summed[1])


def _add(before: tuple[Tensor, int] | None, values: Sequence[Tensor]) -> tuple[Tensor, int]:
    total = torch.stack(list(values)).double().sum() if values else torch.zeros((), dtype=torch.float64)
    return (total, len(values)) if before is None else (before[0] + total, before[1] + len(values))


def _mean(summed: tuple[Tensor, int] | None, values: Sequence[Tensor]) -> float:
    if summed is None and len(values) == 1:
        return float(values[0])
    apart = sum(torch.stack([value.float() for value in values]).tolist()) if values else 0.0
    total, count = (0.0, 0) if summed is None else (float(summed[0]), summed[1])
    return (apart + total) / (len(values) + count)
