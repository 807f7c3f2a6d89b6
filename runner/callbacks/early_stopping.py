"""Early stopping: ends a run whose evaluations do not improve any more."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from runner.callbacks.run_view import RunView
from runner.utils.train.failures import SetupError, TrainingStopped
from runner.utils.utils import check_choice, checked_int, suggest


class EarlyStopping:
    """Ends the run after `patience` evaluations in a row without an improvement.

    A value improves if it is better than the best so far by more than `min_delta`; NaN never does. A stopped run that
    is resumed trains on only with more patience.

    Args:
        metric: the name of a number of the evaluations, such as eval/loss.
        mode: min if a lower value is better, max if a higher one is.
        patience: number of evaluations, at least 1.
        min_delta: at least 0.
    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(self, metric: str = "eval/loss", mode: str = "min", patience: int = 5, min_delta: float = 0.0) -> None:
        check_choice("mode", mode, ("min", "max"))
        if not isinstance(metric, str):
            raise ValueError(f"metric={metric}: expected the name of a number of the evaluations, such as eval/loss")
        if not 0 <= min_delta < math.inf:
            raise ValueError(f"min_delta={min_delta}: expected a number, 0 or more")
        self.metric = metric
        self.mode = mode
        self.patience = checked_int("patience", patience, 1)
        self.min_delta = min_delta
        self._forget()

    def _forget(self) -> None:
        self._best: float | None = None
        self._best_step: int | None = None
        self._num_without = 0  # evaluations in a row without an improvement
        self._evaluated_step: int | None = None
        self._first_step = 0  # of the session

    def on_start(self, view: RunView) -> None:
        self._first_step = view.step
        self._stop_if_due(view)

    def on_evaluate(self, view: RunView, numbers: Mapping[str, float]) -> None:
        if self.metric not in numbers:
            found = f"metric={self.metric}: was not evaluated; {suggest(self.metric, list(numbers))}"
            if view.step > self._first_step:
                raise TrainingStopped(f"{found}; resume with the right name")
            raise SetupError(found, is_complete=False)
        if view.step == self._evaluated_step:  # a typed evaluation, or one that is repeated on resume
            return
        self._evaluated_step = view.step
        value = numbers[self.metric]
        if self._is_better(value):
            self._best, self._best_step, self._num_without = value, view.step, 0
        else:
            self._num_without += 1
            self._stop_if_due(view)

    def _is_better(self, value: float) -> bool:
        if self._best is None or math.isnan(value):
            return not math.isnan(value)
        return (value - self._best if self.mode == "max" else self._best - value) > self.min_delta

    def _stop_if_due(self, view: RunView) -> None:
        if self._num_without >= self.patience:
            best = "never a number" if self._best is None else f"{self._best:.6g} at step {self._best_step}"
            by = f" by more than {self.min_delta:g}" if self.min_delta else ""
            count = f"{self._num_without} evaluations" if self._num_without > 1 else "1 evaluation"
            view.request_stop(f"{self.metric} has not improved{by} in {count}; its best is {best}")

    def state_dict(self) -> dict[str, Any]:
        return {
            "metric": self.metric,
            "mode": self.mode,
            "best": self._best,
            "best_step": self._best_step,
            "num_without": self._num_without,
            "evaluated_step": self._evaluated_step,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a state; that of another metric or mode starts anew."""
        if (state["metric"], state["mode"]) == (self.metric, self.mode):
            self._best, self._best_step = state["best"], state["best_step"]
            self._num_without, self._evaluated_step = state["num_without"], state["evaluated_step"]
