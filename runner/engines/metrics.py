"""Accumulates losses and other numbers on their device until they are logged."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from runner.engines.forward import Number, is_readable
from runner.utils.distributed import all_gather_object

_MAX_KEPT = 1024  # micro-steps whose numbers are kept one by one; more are added up

Series = tuple[list[float], list[float]]  # values, and the weight of each


class MetricAccumulator:
    """The numbers of micro-steps, each with a weight.

    `rollback` drops those since the last `commit`. Beyond `_MAX_KEPT` micro-steps they are summed, in float64, so that
    a run that seldom logs does not grow.
    """

    def __init__(self) -> None:
        self._clear()

    def _clear(self) -> None:
        self._micro_steps: list[tuple[Mapping[str, Number], Number]] = []  # numbers by name, weight
        self._shared: dict[str, Series] = {}  # averaged over the ranks, or loaded; they precede `_micro_steps`
        self._num_shared = 0  # micro-steps in `_shared`
        self._sums: dict[str, tuple[Number, Number]] = {}  # sum of weight times value, sum of weights
        self._num_committed = 0

    def add(self, numbers: Mapping[str, Number], weight: Number = 1.0) -> None:
        """Adds the numbers of a micro-step, which must not change afterwards."""
        self._micro_steps.append((numbers, weight))

    def commit(self) -> None:
        """Keeps the numbers so far when `rollback` is called."""
        if len(self._micro_steps) + self._num_shared > _MAX_KEPT:
            self._add_up()
        self._num_committed = len(self._micro_steps)

    def rollback(self) -> None:
        """Drops the numbers since the last `commit`."""
        del self._micro_steps[self._num_committed :]

    def take(self) -> dict[str, float]:
        """Returns the weighted means and clears the numbers.

        A name whose weights add up to 0 is left out.
        """
        if len(self._micro_steps) == 1 and not self._shared and not self._sums:
            numbers, weight = self._micro_steps.pop()
            self._num_committed = 0
            return {name: float(value) for name, value in numbers.items()} if weight else {}
        means: dict[str, float] = {}
        series = self._series()
        for name in dict.fromkeys([*series, *self._sums]):
            values, weights = series.get(name, ([], []))
            total, total_weight = map(float, self._sums.get(name, (0.0, 0.0)))
            total_weight += sum(weights)
            if total_weight:
                means[name] = (sum(map(_times, values, weights)) + total) / total_weight
        self._clear()
        return means

    def _series(self) -> dict[str, Series]:
        """Returns the numbers that are kept one by one, by name; waits for the device."""
        series_by_name = {name: (list(values), list(weights)) for name, (values, weights) in self._shared.items()}
        numbers: list[Number] = []
        for values_by_name, weight in self._micro_steps:
            numbers += [weight, *values_by_name.values()]
        floats = iter(read_all(numbers))
        for values_by_name, _ in self._micro_steps:
            weight = next(floats)
            for name in values_by_name:
                values, weights = series_by_name.setdefault(name, ([], []))
                values.append(next(floats))
                weights.append(weight)
        return series_by_name

    def _add_up(self) -> None:
        """Replaces all numbers by their sums, without waiting for the device."""
        products: dict[str, list[Number]] = {name: list(map(_times, *series)) for name, series in self._shared.items()}
        weights_by_name: dict[str, list[Number]] = {name: [*weights] for name, (_, weights) in self._shared.items()}
        for values_by_name, weight in self._micro_steps:
            for name, value in values_by_name.items():
                products.setdefault(name, []).append(_times(value, weight))
                weights_by_name.setdefault(name, []).append(weight)
        for name in products:
            total, total_weight = self._sums.get(name, (0.0, 0.0))
            self._sums[name] = total + _sum(products[name]), total_weight + _sum(weights_by_name[name])
        self._micro_steps, self._shared, self._num_shared = [], {}, 0

    def share(self, count: int) -> int:
        """Replaces the numbers by their means over the ranks, micro-step by micro-step; returns the sum of `count`.

        A second call changes no number.
        """
        series = self._series()
        sums = {name: (float(total), float(weight)) for name, (total, weight) in self._sums.items()}
        gathered = all_gather_object((series, sums, count))
        ranks = [(series, sums) for series, sums, _ in gathered]
        self._clear()
        for name in _unique_names(series for series, _ in ranks):
            self._shared[name] = _mean_series([series[name] for series, _ in ranks if name in series], len(ranks))
            self._num_shared = max(self._num_shared, len(self._shared[name][0]))
        for name in _unique_names(sums for _, sums in ranks):
            totals, weights = zip(*(sums[name] for _, sums in ranks if name in sums), strict=True)
            self._sums[name] = sum(totals) / len(ranks), sum(weights) / len(ranks)
        self.commit()
        return sum(count for _, _, count in gathered)

    def state_dict(self) -> dict[str, Any]:
        """Returns the numbers that were not taken yet, a few tensors a name."""
        series = self._series()
        values_by_name = {name: _to_tensor(values) for name, (values, _) in series.items()}
        weights_by_name = {name: _to_tensor(weights) for name, (_, weights) in series.items()}
        sums = {name: (_to_tensor(float(total)), float(weight)) for name, (total, weight) in self._sums.items()}
        return {"apart": values_by_name, "weights": weights_by_name, "sums": sums}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a saved state; one of an older version has no weights, which were all 1."""
        self._clear()
        for name, values in state["apart"].items():
            if values is not None:
                weights = state.get("weights", {}).get(name)
                self._shared[name] = values.tolist(), [1.0] * len(values) if weights is None else weights.tolist()
                self._num_shared = max(self._num_shared, len(values))
        self._sums = {name: (float(total), float(weight)) for name, (total, weight) in state["sums"].items()}
        self.commit()


def read_all(numbers: Sequence[Number]) -> list[float]:
    """Returns numbers as floats, with one read for all of the same device and dtype."""
    groups: dict[tuple[torch.device, torch.dtype], list[int]] = {}
    for index, number in enumerate(numbers):
        if isinstance(number, Tensor):
            groups.setdefault((number.device, number.dtype), []).append(index)
    floats: list[Any] = list(numbers)
    for indices in groups.values():
        stacked = torch.stack([floats[index] for index in indices])
        for index, value in zip(indices, stacked.tolist(), strict=True):
            floats[index] = float(value)
    return floats


def _times(value: Any, weight: Any) -> Any:
    """Returns weight times value; 0 if the weight is 0, even for a value that is NaN."""
    if isinstance(weight, Tensor):
        return value * weight  # `OutputReader` has masked the value if the weight is 0
    return value if weight == 1.0 else value * weight if weight else 0.0


def _sum(numbers: Sequence[Number]) -> Number:
    """Returns the sum in float64.

    It is exact for numbers on the host, and a tensor if some are on an accelerator.
    """
    on_accelerator = [number for number in numbers if isinstance(number, Tensor) and not is_readable(number)]
    on_host = [number for number in numbers if not isinstance(number, Tensor) or is_readable(number)]
    total = math.fsum(read_all(on_host))
    if not on_accelerator:
        return total
    device = on_accelerator[0].device
    return torch.stack([number.to(device).double() for number in on_accelerator]).sum() + total


def _unique_names(mappings: Iterable[Mapping[str, Any]]) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


def _mean_series(series: Sequence[Series], num_ranks: int) -> Series:
    """Returns the weighted means over the ranks, entry by entry, and the mean weights."""
    if len({len(values) for values, _ in series}) > 1:
        # Some rank lacks the number in some forwards, so entries do not correspond: each rank's mean is one entry.
        series = [([_mean(values, weights)], [sum(weights)]) for values, weights in series if values]
    values_by_entry = list(zip(*(values for values, _ in series), strict=True))
    weights_by_entry = list(zip(*(weights for _, weights in series), strict=True))
    means = list(map(_mean, values_by_entry, weights_by_entry))
    return means, [sum(weights) / num_ranks for weights in weights_by_entry]


def _mean(values: Sequence[float], weights: Sequence[float]) -> float:
    total_weight = sum(weights)
    return sum(map(_times, values, weights)) / total_weight if total_weight else 0.0


def _to_tensor(values: float | list[float]) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)
