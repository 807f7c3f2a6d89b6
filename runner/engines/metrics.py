"""The losses and other numbers of the steps since metrics were last taken; they stay on their device until then.

Must not import a config.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runner.engines.forward import Number, is_readable
from runner.utils.distributed import all_gather_object

_MOST_APART = 1024  # micro-steps whose numbers are kept one by one

Series = tuple[list[float], list[float]]  # values, and the weight of each


class MetricAccumulator:
    """Numbers of micro-steps, each with its weight, of which those since the last `mark` can be dropped.

    Many are added up, in float64, so that a run that logs seldom or never does not grow.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._parts: list[tuple[Mapping[str, Number], Number]] = []
        self._shared: dict[str, Series] = {}  # as they were shared or loaded, before those of the parts
        self._num_shared = 0  # micro-steps of these
        self._sums: dict[str, tuple[Number, Number]] = {}  # of weight times value, and of the weights
        self._mark = 0

    def add(self, numbers: Mapping[str, Number], weight: Number = 1.0) -> None:
        """Takes the numbers of a micro-step, which must not change afterwards."""
        self._parts.append((numbers, weight))

    @property
    def uncommitted(self) -> list[Number]:
        """The losses since the last mark."""
        return [numbers["loss"] for numbers, _ in self._parts[self._mark :]]

    def commit(self) -> None:
        """What is here now stays."""
        if len(self._parts) + self._num_shared > _MOST_APART:
            self._add_up()
        self._mark = len(self._parts)

    def rollback(self) -> None:
        """What came since the last mark is gone."""
        del self._parts[self._mark :]

    def take(self) -> dict[str, float]:
        """Returns the weighted means, and starts anew; of a name whose weights add up to 0 there is none."""
        if len(self._parts) == 1 and not self._shared and not self._sums:
            numbers, weight = self._parts[0]
            means = {name: float(value) for name, value in numbers.items()} if weight else {}
        else:
            means = {}
            series = self._series()
            for name in dict.fromkeys([*series, *self._sums]):
                values, weights = series.get(name, ([], []))
                total, divisor = (float(each) for each in self._sums.get(name, (0.0, 0.0)))
                divisor += sum(weights)
                if divisor:
                    means[name] = (sum(map(_times, values, weights)) + total) / divisor
        self._clear()
        return means

    def _series(self) -> dict[str, Series]:
        """Returns the numbers kept one by one, read, by name."""
        found = {name: (list(values), list(weights)) for name, (values, weights) in self._shared.items()}
        numbers: list[Number] = []
        for part, weight in self._parts:
            numbers += [weight, *part.values()]
        read = iter(read_all(numbers))
        for part, _ in self._parts:
            weight = next(read)
            for name in part:
                values, weights = found.setdefault(name, ([], []))
                values.append(next(read))
                weights.append(weight)
        return found

    def _add_up(self) -> None:
        """Makes all numbers sums, without waiting for a device."""
        products: dict[str, list[Number]] = {}
        divisors: dict[str, list[Number]] = {}
        for name, (values, weights) in self._shared.items():
            products[name], divisors[name] = list(map(_times, values, weights)), list(weights)
        for part, weight in self._parts:
            for name, value in part.items():
                products.setdefault(name, []).append(_times(value, weight))
                divisors.setdefault(name, []).append(weight)
        for name in products:
            total, divisor = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + _sum(products[name]), divisor + _sum(divisors[name])
        self._parts, self._shared, self._num_shared = [], {}, 0

    def share(self) -> None:
        """Makes the numbers the means over the ranks, micro-step by micro-step: to share them again changes nothing."""
        series = self._series()
        sums = {name: (float(total), float(divisor)) for name, (total, divisor) in self._sums.items()}
        ranks = all_gather_object((series, sums))
        self._clear()
        for name in _names(series for series, _ in ranks):
            self._shared[name] = _mean_series([series[name] for series, _ in ranks if name in series], len(ranks))
            self._num_shared = max(self._num_shared, len(self._shared[name][0]))
        for name in _names(sums for _, sums in ranks):
            found = [sums[name] for _, sums in ranks if name in sums]
            self._sums[name] = sum(each[0] for each in found) / len(ranks), sum(each[1] for each in found) / len(ranks)
        self.commit()

    def state_dict(self) -> dict[str, Any]:
        """Returns what is not yet taken, a few tensors a name."""
        series = self._series()
        return {
            "apart": {name: _packed(values) for name, (values, _) in series.items()},
            "weights": {name: _packed(weights) for name, (_, weights) in series.items()},
            "sums": {name: (_packed(float(total)), float(divisor)) for name, (total, divisor) in self._sums.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes it back."""
        self._clear()
        for name, values in state["apart"].items():
            if values is not None:
                kept = state.get("weights", {}).get(name)  # which were all 1 where there are none
                self._shared[name] = values.tolist(), [1.0] * len(values) if kept is None else kept.tolist()
                self._num_shared = max(self._num_shared, len(values))
        self._sums = {name: (float(total), float(divisor)) for name, (total, divisor) in state["sums"].items()}
        self.commit()


def read_all(numbers: Sequence[Number]) -> list[float]:
    """Returns numbers as floats, those of a device and dtype read at once."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, number in enumerate(numbers):
        if isinstance(number, Tensor):
            groups.setdefault((number.device, number.dtype), []).append(index)
    found: list[Any] = list(numbers)
    for indices in groups.values():
        for index, value in zip(indices, torch.stack([found[index] for index in indices]).tolist(), strict=True):
            found[index] = float(value)
    return found


def _times(value: Any, weight: Any) -> Any:
    """Returns weight times value; a value of weight 0 counts for nothing, whatever it is."""
    if isinstance(weight, Tensor):
        return value * weight  # where that is 0 its values are, too
    return value if weight == 1.0 else value * weight if weight else 0.0


def _sum(numbers: Sequence[Number]) -> Number:
    """Returns the sum of numbers in float64, exactly where no accelerator holds them."""
    waiting: list[Any] = [number for number in numbers if _is_on_accelerator(number)]
    total = math.fsum(read_all([number for number in numbers if not _is_on_accelerator(number)]))
    if not waiting:
        return total
    return torch.stack([each.to(waiting[0].device).double() for each in waiting]).sum() + total


def _is_on_accelerator(number: Number) -> bool:
    return isinstance(number, Tensor) and not is_readable(number)


def _names(numbers: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for each in numbers for name in each))


def _mean_series(series: Sequence[Series], num_ranks: int) -> Series:
    """Returns the means of ranks' numbers, place by place, with the mean of their weights."""
    if len({len(values) for values, _ in series}) > 1:  # a number that not every forward returned on every rank
        series = [([_mean(*each)], [sum(each[1])]) for each in series if each[0]]
    means, weights = list[float](), list[float]()
    for place in range(len(series[0][0])):
        column = [values[place] for values, _ in series], [own[place] for _, own in series]
        means.append(_mean(*column))
        weights.append(sum(column[1]) / num_ranks)
    return means, weights


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total = sum(weights)
    return sum(map(_times, values, weights)) / total if total else 0.0


def _packed(values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
