"""The best evaluation so far, by the metric that decides, and the checkpoint that it belongs to."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Container, Mapping
from typing import Any

from runner.checkpoint.checkpoints import Checkpoints
from runner.utils.distributed import is_rank_zero
from runner.utils.utils import one_line

_LONGEST = 200  # characters of a name that are shown


class Best:
    """The best evaluation so far.

    Args:
        metric: the metric that decides, such as eval/accuracy; None is the first evaluated loss.
        is_higher_better: whether a higher value of it is better.
    """

    def __init__(self, metric: str | None, is_higher_better: bool) -> None:
        self._configured = metric
        self._sign = -1 if is_higher_better else 1
        self._name = metric  # None until a loss is evaluated
        self.found: dict[str, Any] | None = None  # its name, value and step

    def _find_name(self, numbers: Mapping[str, Any]) -> str | None:
        if self._configured is not None:
            return self._configured if self._configured in numbers else None
        return next((key for key in numbers if key.rpartition("/")[2] == "loss"), None)

    def metric_of(self, numbers: Mapping[str, Any]) -> dict[str, Any] | None:
        """Returns name and value of the metric that decides; None if an evaluation has none."""
        name = self._find_name(numbers)
        return None if name is None or numbers[name] is None else {"name": name, "value": float(numbers[name])}

    def rate(self, metric: Any) -> float | None:
        """Returns the rating of a result of `metric_of`, lower is better; None for another metric than decides now."""
        if not isinstance(metric, Mapping) or metric.get("name") != self._name:
            return None
        value: Any = metric.get("value")
        with contextlib.suppress(OverflowError):
            return self._sign * float(value) if type(value) in (int, float) else None
        return None

    @property
    def rating(self) -> float:
        """The rating of the best evaluation; infinite if there is none."""
        return math.inf if self.found is None else self._sign * float(self.found["value"])

    def restore_best(self, found: dict[str, Any] | None, numbers: Mapping[str, Any]) -> str | None:
        """Restores the best evaluation of a checkpoint; returns a warning if another metric decided then.

        Args:
            found: the best evaluation, as `self.found` was.
            numbers: of the last evaluation; empty if it isn't known.
        """
        saved = {found["name"]: 0} if found else {}
        self._name = self._find_name(numbers) or self._configured or self._find_name(saved)
        if found is None or found["name"] == self._name:
            self.found = found
            return None
        self.found = None
        name = self._name or "the first evaluated loss"
        other = one_line(str(found["name"])[:_LONGEST])
        return f"The best checkpoint is now found by {name}: that by {other} no longer counts"

    def describe_rated(self, step: int, rating: float) -> dict[str, Any]:
        """Returns the value of `found` for an evaluation with that rating."""
        return {"name": self._name, "value": self._sign * rating, "step": step}

    def update(self, step: int, numbers: Mapping[str, float]) -> bool:
        """Compares a new evaluation with the best; returns whether it is the best now.

        Raises:
            ValueError: it lacks the metric that decides.
        """
        name = self._find_name(numbers)
        if name is None:
            if self._configured is None:
                return False
            raise ValueError(
                f"trainer.best_metric={self._configured}: was not evaluated; there are: {', '.join(numbers)}"
            )
        self._name = name
        if self.found is not None and self.found["name"] != name:
            self.found = None
        value = numbers[name]
        if not math.isfinite(value) or self._sign * value >= self.rating:
            return False
        self.found = {"name": name, "value": value, "step": step}
        return True


class BestCheckpoint:
    """The checkpoint of the best evaluation, as run.json names it.

    Args:
        keep_best: whether checkpoints are kept for their rating; otherwise only the evaluation is described.
    """

    def __init__(self, best: Best, checkpoints: Checkpoints, keep_best: bool) -> None:
        self._best = best
        self._checkpoints = checkpoints
        self.keep_best = keep_best
        self._is_lost = False  # its save has failed

    def describe_best(self, removed: Container[int] = ()) -> dict[str, Any] | None:
        """Returns the best evaluation, whose step is None unless its checkpoint can be loaded.

        With `keep_best` it is the best of those that can be loaded.

        Args:
            removed: steps of checkpoints that are about to be removed.
        """
        found = self._best.found
        if (
            found is None
            or not is_rank_zero()  # only rank zero reads the disk
            or (found["step"] not in removed and self._checkpoints.has(found["step"]))
        ):
            return found
        if not self.keep_best:
            return found | {"step": None}
        ranked = self._checkpoints.rank_best(removed)
        return self._best.describe_rated(*ranked[0]) if ranked else None

    def find_better(self, removed: Container[int]) -> None:
        """Looks for a better checkpoint than is known: `best_mode` or `best_metric` may have changed."""
        for step, rating in self._checkpoints.rank_best(removed, 1, self._best.rating):
            self._best.found = self._best.describe_rated(step, rating)

    def convert_metrics(self, saved: Mapping[str, Any] | None, read_config: Callable[[], Mapping[str, Any]]) -> None:
        """Converts metrics that older versions saved as numbers to name and value.

        Args:
            saved: the best evaluation of the checkpoint that is resumed.
            read_config: returns the config by which the run rated them so far; the mode "max" negated them.
        """
        if not saved:
            return
        name = saved["name"]

        def name_metric(number: float) -> dict[str, Any]:
            trainer = read_config().get("trainer")
            is_negated = isinstance(trainer, Mapping) and trainer.get("best_mode") == "max"
            return {"name": name, "value": -number if is_negated else number}

        self._checkpoints.convert_metrics(name_metric)

    def mark_failed_save(self, step: int) -> None:
        """Records that the checkpoint of a step could not be written, in any thread."""
        self._is_lost |= self._best.found is not None and self._best.found["step"] == step

    def fall_back(self, run_on_ranks: Callable[[Callable[[], Any]], list[Any]]) -> None:
        """Makes the best checkpoint on disk the best if the save of the best has failed; all ranks call it.

        Args:
            run_on_ranks: calls a function on every rank and returns the results.
        """
        if run_on_ranks(lambda: self._is_lost)[0] and self.keep_best:
            self._is_lost = False
            self._best.found = run_on_ranks(lambda: self.describe_best() if is_rank_zero() else None)[0]
