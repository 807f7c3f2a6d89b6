"""Calls the hooks of a run's callbacks, and carries out their requests, alike on all ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import Subset

from runner.engines import Engines
from runner.run.evaluation import measure
from runner.utils.distributed import RankError, RankLostError, move
from runner.utils.sampler.batches import EvaluationData
from runner.utils.train import Loop
from runner.utils.utils import derive_seed, describe, is_signal

if TYPE_CHECKING:
    from runner.run.trainer import Trainer


class Hooks:
    """The hooks of a run's callbacks. A hook that no callback has does nothing.

    Attributes:
        on_step: for the loop; None if no callback has this hook.
        has_end: a callback has `on_end`.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer
        self._callbacks = trainer.experiment.callbacks
        self._num_updates = 0
        self._is_started = False
        self.on_step: Callable[[], None] | None = self._on_step if self._defines("on_step") else None
        self.has_end = self._defines("on_end")
        if self._callbacks is not None:
            from runner.callbacks.run_view import RunView

            self._view = RunView(self)

    def _defines(self, hook: str) -> bool:
        return self._callbacks is not None and self._callbacks.defines(hook)

    def start(self) -> None:
        """Calls `on_start`; a requested action runs before the first step."""
        self._num_updates = self._count_updates()
        self._is_started = True
        self._call_on_all_ranks("on_start")

    def log_values(self, values: Mapping[str, float]) -> None:
        """Shows the callbacks the training values that were logged at this step."""
        if self.on_step is not None:
            self._view.values = dict(values)

    def _on_step(self) -> None:
        assert self._callbacks is not None
        num_updates = self._count_updates()
        if num_updates != self._num_updates:  # otherwise the step was skipped
            self._num_updates = num_updates
            self._callbacks.call("on_step", self._view)
            for topic, content in self._view.take_requests():
                self.loop.request(topic, content)
        self._view.values = {}

    def _count_updates(self) -> int:
        return sum(engine.steps for engine in self.engines.values())

    def evaluated(self, numbers: Mapping[str, float]) -> None:
        """Calls `on_evaluate` with rank zero's numbers: a report may show others on other ranks."""
        if self._defines("on_evaluate"):
            numbers = self._trainer.coordinator.run_on_all_ranks(lambda: dict(numbers))[0]
            self._call_on_all_ranks("on_evaluate", numbers)

    def saving(self) -> None:
        """Calls `on_save`."""
        self._call_on_all_ranks("on_save")

    def end(self, status: str, explain: Callable[[BaseException], BaseException]) -> BaseException | None:
        """Calls `on_end` after a run that did not fail; returns the error of a callback, explained."""
        try:
            self._call_on_all_ranks("on_end", status)
        except BaseException as error:
            if is_signal(error):
                raise
            return explain(error)
        return None

    def end_failed(self, failure: BaseException) -> None:
        """Calls `on_end` after a failure, which an error of a callback must not hide."""
        if self._callbacks is None or not self._is_started or is_signal(failure):
            return
        try:
            self._callbacks.call("on_end", self._view, "failed")
        except Exception as error:
            self._trainer.log.error("%s", describe(error))

    def _call_on_all_ranks(self, hook: str, *arguments: Any) -> None:
        """Calls a hook on all ranks, raises an error of any rank, and applies the requests of all."""
        if self._callbacks is None or not self._defines(hook):
            return
        failure: BaseException | None = None
        try:
            self._callbacks.call(hook, self._view, *arguments)
        except BaseException as error:
            # All ranks know of these errors, so that none waits below.
            if is_signal(error) or isinstance(error, RankError | RankLostError | InterruptedError):
                raise
            failure = error

        def report() -> list[tuple[str, str]]:
            if failure is not None:
                raise failure
            return self._view.take_requests()

        for requests in self._trainer.coordinator.run_on_all_ranks(report):
            for topic, content in requests:
                if topic == "end":
                    self.loop.end_now(content, in_action=hook == "on_evaluate")
                else:
                    self.loop.schedule.enqueue([content])

    # What the view reads, and the work that it offers to callbacks.

    @property
    def engines(self) -> Engines:
        return self._trainer.engines

    @property
    def loop(self) -> Loop:
        return self._trainer.loop

    @property
    def folder(self) -> Path:
        return self._trainer.folder

    @property
    def tracker(self) -> Any:
        return self._trainer.tracker

    @property
    def is_new(self) -> bool:
        return self._trainer.is_new

    def measure(self) -> dict[str, float]:
        """Returns the numbers of an evaluation, without those of the report."""
        trainer = self._trainer
        numbers, _ = measure(
            trainer.engines, trainer.experiment.evaluations, None, seed=trainer.spec.seed, step=trainer.loop.step,
            should_stop=trainer.should_stop_evaluation, run_on_ranks=trainer.coordinator.run_on_all_ranks,
        )  # fmt: skip
        return numbers

    def write_export(self, suffix: str, numbers: Mapping[str, float]) -> None:
        """Writes the weights as they are, with the numbers of an evaluation."""
        evaluation = {"step": self.loop.step, **numbers} if numbers else None
        self._trainer.write_export(evaluation, suffix)

    def training_pass(self, num_batches: int | None) -> Iterator[Any]:
        """Yields batches of one shuffled pass over data.train, the same on every rank, on the device."""
        spec, batches = self._trainer.spec, self._trainer.experiment.batches
        length, size = len(batches.dataset), spec.data.batch_size // spec.trainer.accumulate
        order = torch.randperm(length, generator=torch.Generator().manual_seed(derive_seed(spec.seed, -4))).tolist()
        num_complete = max(length // size, 1)
        order = order[: size * min(num_complete, num_batches or num_complete)]
        sample_seed = derive_seed(spec.seed, -4) if spec.data.seed_samples else None
        subset = Subset(batches.dataset, order)
        for number, batch, _ in EvaluationData(subset, size, spec.data.num_workers, batches.collate, sample_seed):
            self._trainer.should_stop_evaluation()  # only counts it, for the watchdog
            self.engines.seed(derive_seed(spec.seed, -4, number))
            yield move(batch, self.engines.device)
