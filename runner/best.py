"""Which checkpoint is the best so far, and by which metric. Imports the standard library alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any


class Best:
    """The best evaluation so far.

    Args:
        metric: the name that decides, such as eval/accuracy; None is the first evaluated loss.
        is_higher_better: of two values of it.
    """

    def __init__(self, metric: str | None, is_higher_better: bool) -> None:
        self._named, self._sign = metric, -1 if is_higher_better else 1
        self.found: dict[str, Any] | None = None  # its name, value and step

    def _deciding(self, numbers: Mapping[str, Any]) -> str | None:
        if self._named is not None:
            return self._named if self._named in numbers else None
        return next((key for key in numbers if key.rpartition("/")[2] == "loss"), None)

    def rate(self, numbers: Mapping[str, Any]) -> float | None:
        """Returns what says how good an evaluation is, lower being better; None where nothing does."""
        name = self._deciding(numbers)
        return None if name is None or numbers[name] is None else self._sign * float(numbers[name])

    def describe(self, name: str, step: int, rating: float) -> dict[str, Any]:
        """Returns what `found` is after an evaluation with that rating."""
        return {"name": name, "value": self._sign * rating, "step": step}

    def take(self, step: int, numbers: Mapping[str, float]) -> bool:
        """Takes an evaluation; returns whether it is the best so far.

        Raises:
            ValueError: the metric that decides is not in it.
        """
        rating, name = self.rate(numbers), self._deciding(numbers)
        if name is None and self._named is not None:
            raise ValueError(f"trainer.best_metric={self._named}: was not evaluated; there are: {', '.join(numbers)}")
        if name is None or rating is None or not math.isfinite(rating):
            return False
        if self.found is not None and rating >= self._sign * self.found["value"]:
            return False
        self.found = {"name": name, "value": numbers[name], "step": step}
        return True
