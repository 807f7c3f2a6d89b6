"""Which checkpoint is the best so far, and by which metric. Imports the standard library alone."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runner.utils.utils import one_line

_LONGEST = 200  # characters of a name that are shown


def name_metric(number: float, name: str, mode: str) -> dict[str, Any]:
    """Returns the metric that older versions stored as a number, negated with the mode "max"."""
    return {"name": name, "value": -number if mode == "max" else number}


def mode_of(config: Mapping[str, Any]) -> str:
    """Returns the mode that an unresolved config of a run names, "min" where it names none."""
    trainer = config.get("trainer")
    return str(trainer.get("best_mode", "min")) if isinstance(trainer, Mapping) else "min"


class Best:
    """The best evaluation so far.

    Args:
        metric: the name that decides, such as eval/accuracy; None is the first evaluated loss.
        is_higher_better: of two values of it.
    """

    def __init__(self, metric: str | None, is_higher_better: bool) -> None:
        self._named, self._sign = metric, -1 if is_higher_better else 1
        self._name = metric  # that decides; None until a loss is evaluated
        self.found: dict[str, Any] | None = None  # its name, value and step

    def _deciding(self, numbers: Mapping[str, Any]) -> str | None:
        if self._named is not None:
            return self._named if self._named in numbers else None
        return next((key for key in numbers if key.rpartition("/")[2] == "loss"), None)

    def metric_of(self, numbers: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns name and value of what decides in an evaluation; None where nothing does."""
        name = self._deciding(numbers)
        return None if name is None or numbers[name] is None else {"name": name, "value": float(numbers[name])}

    def rate(self, metric: Any) -> float | None:
        """Returns the rating of what `metric_of` returned, lower being better; None where another metric decides."""
        if not isinstance(metric, Mapping) or metric.get("name") != self._name:
            return None
        value: Any = metric.get("value")
        try:
            return self._sign * float(value) if type(value) in (int, float) else None
        except OverflowError:
            return None

    @property
    def rating(self) -> float:
        """The rating of the best evaluation; infinite where there is none."""
        return math.inf if self.found is None else self._sign * float(self.found["value"])

    def restore(self, found: dict[str, Any] | None, numbers: Mapping[str, Any]) -> str | None:
        """Goes on from what a checkpoint says was best; returns a note if another metric decided then.

        Args:
            numbers: of the last evaluation; nothing where it is not known.
        """
        self._name = self._deciding(numbers) or self._named or (self._deciding({found["name"]: 0}) if found else None)
        if found is None or found["name"] == self._name:
            self.found = found
            return None
        self.found, name = None, self._name or "the first evaluated loss"
        other = one_line(str(found["name"])[:_LONGEST])
        return f"The best checkpoint is now found by {name}: that by {other} no longer counts"

    def describe(self, step: int, rating: float) -> dict[str, Any]:
        """Returns what `found` is after an evaluation with that rating."""
        return {"name": self._name, "value": self._sign * rating, "step": step}

    def take(self, step: int, numbers: Mapping[str, float]) -> bool:
        """Takes an evaluation; returns whether it is the best so far.

        Raises:
            ValueError: the metric that decides is not in it.
        """
        name = self._deciding(numbers)
        if name is None and self._named is not None:
            raise ValueError(f"trainer.best_metric={self._named}: was not evaluated; there are: {', '.join(numbers)}")
        if name is None:
            return False
        self._name = name
        if self.found is not None and self.found["name"] != name:
            self.found = None
        value = numbers[name]
        if not math.isfinite(value) or self._sign * value >= self.rating:
            return False
        self.found = {"name": name, "value": value, "step": step}
        return True
