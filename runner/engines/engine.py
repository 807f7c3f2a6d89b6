"""Engine: one module with its optimizer, scheduler, scaler, counters and metrics."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from runner.engines.ema import EMA
from runner.engines.forward import (
    Feeder,
    FirstStepHook,
    Forward,
    LossModule,
    Number,
    Output,
    OutputReader,
    arguments_of,
    as_number,
    feed,
    in_autocast,
)
from runner.engines.gradients import BufferSnapshot, Gradients
from runner.engines.losses.output_errors import OutputError
from runner.engines.losses.supervised_loss import SupervisedLoss
from runner.engines.metric_objects.collection import MetricCollection
from runner.engines.metric_objects.training import TrainingMetrics
from runner.engines.metrics import MetricAccumulator
from runner.engines.optim.hyperparameters import current_lrs, snapshot_hyperparameters
from runner.engines.optim.optimizer_state import changed_extra_state, extra_state, name_parameters, names_by_id
from runner.engines.optim.schedule_replay import LRSchedule
from runner.engines.other_modules import connect_feeder
from runner.engines.restore import restore
from runner.engines.strategies import Strategy
from runner.utils.distributed import move, world_size
from runner.utils.utils import check_choice
from runner.utils.wrapper.applied import AppliedOptimizations

ON_NONFINITE = ("stop", "skip", "ignore")
_NO_CONTEXT = contextlib.nullcontext()
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class _StepStart(NamedTuple):
    """The counters before the first micro-step of a step, which `discard` restores."""

    tokens: int
    micro_steps: int
    grad_norm: Tensor | None


class Engine:
    """Trains one module.

    A step is one or more calls of `micro_step`, then `prepare` and, if that found no fault, `update`.

    Args:
        module: any module whose forward returns a loss: a 0-d tensor; a mapping or object with `loss` (its other
            numbers become metrics, `tokens` counts for throughput, `weight` is the number of terms in the mean loss);
            or none of these, if its submodules set `loss` attributes, which are summed.
        optimizer: over the parameters to train; None for a module that is only evaluated, in evaluation mode.
        scheduler: stepped after each update that was not skipped.
        precision: fp32, bf16 or fp16 (autocast; fp16 with a loss scaler).
        accumulate: micro-steps a step; each loss is divided by it, or counts by its weight.
        clip_norm: gradients are clipped to this total norm; 0 disables clipping.
        feeder: called as feeder(module, batch) in place of the module, or as feeder(module, batch, engines) with the
            modules of all engines.
        on_nonfinite: action for a step whose loss or gradients are not finite: stop, skip or ignore. With stop and
            skip, `prepare` checks them. With stop on an accelerator, the check does not wait for the device:
            `find_late_fault` returns the fault after the update.
        strategy: distributes the module over the ranks; it has sharded the module already.
        ema: averaged weights, used by evaluations and exports.
        applied: the optimizations that were applied to the module; exports undo them.
        metric: name of an evaluation metric, such as `eval/loss`, with which the scheduler is stepped after an
            evaluation; None steps it after each update.
        loss: computed from the output of the module, or of the feeder; None if the output has the loss.
        metrics: measured in evaluations, beside the loss.
        training_metrics: measured on training steps.
        target: the key of the target in a batch that is a mapping, for metrics without a `loss`.
    Attributes:
        every: it is trained in each `every`-th step of the run.
        has_own_loss: false for a teacher that other engines' feeders call: it runs no forward of its own.
    """

    every = 1
    has_own_loss = True
    _is_exchanging = False

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        *,
        precision: str = "fp32",
        accumulate: int = 1,
        clip_norm: float = 0.0,
        feeder: Feeder | None = None,
        on_nonfinite: str = "ignore",
        strategy: Strategy | None = None,
        ema: EMA | None = None,
        applied: AppliedOptimizations | None = None,
        metric: str | None = None,
        loss: SupervisedLoss | None = None,
        metrics: MetricCollection | None = None,
        training_metrics: TrainingMetrics | None = None,
        target: str | None = None,
    ) -> None:
        check_choice("precision", precision, tuple(_AUTOCAST))
        check_choice("on_nonfinite", on_nonfinite, ON_NONFINITE)
        self.module, self.optimizer, self.scheduler = module, optimizer, scheduler
        self.accumulate = accumulate
        self.feeder = feeder
        self.on_nonfinite = on_nonfinite
        self.steps = self.micro_steps = self.skipped_steps = self.tokens = self._synced_tokens = 0
        self.device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
        self.strategy = strategy or Strategy()
        self._is_distributed = self.strategy.is_distributed
        self.ema = ema
        self.applied = applied or AppliedOptimizations(module)
        self.first_step_hook: FirstStepHook | None = None
        self.kind = type(module).__name__.removeprefix("FSDP" if self.strategy.is_sharded else "")
        self._gradients = Gradients(
            module, optimizer, self.strategy, self.device,
            is_scaled=precision == "fp16", clip_norm=clip_norm, on_nonfinite=on_nonfinite,
        )  # fmt: skip
        self.defers_finite_check = self._gradients.defers_check
        # On several ranks a bad loss is reported before it reaches the gradients of the other ranks.
        self._checks_in_forward = self.strategy.is_distributed and self._gradients.checks_losses
        self._checks_in_prepare = self._gradients.checks_losses and not self._checks_in_forward
        self._reader = OutputReader(module, self._post_weighted)
        divides_by_weight = accumulate > 1 or self.strategy.is_distributed
        self._reader.multiplies_by_weight = self._gradients.divides_by_weight = divides_by_weight
        self.loss, self.metrics, self._training_metrics = loss, metrics, training_metrics
        self._target_key = target
        self._loss_module = self._make_loss_module()
        self._train_forward, self._evaluation_forward = self._make_forwards(_AUTOCAST[precision])
        self.schedule = LRSchedule(optimizer, scheduler, metric)
        self._hyperparameters = snapshot_hyperparameters(optimizer, scheduler)
        self._parameter_names = names_by_id(module)
        self._initial_extra_state = extra_state(optimizer)
        self._lrs = current_lrs(self.optimizer)
        self._metrics = MetricAccumulator()
        self._losses: list[Number] = []  # of the step in progress
        self._num_ranks = world_size()
        self._buffers = BufferSnapshot(module)
        self._commit_step()
        self.train()

    def _make_loss_module(self) -> LossModule:
        self.other_modules, feed_batch = connect_feeder(self.feeder or feed)
        loss = self.loss
        if loss is not None or self.metrics is not None:
            self._reader.not_metrics = (*self._reader.not_metrics, "output", "target")
        if loss is None:
            return LossModule(self.module, feed_batch, self._reader, None if self.feeder is not None else arguments_of)
        loss.to(self.device)
        loss.feeder = feed_batch if self.feeder is not None else None
        return LossModule(self.module, loss, self._reader, None if self.feeder is not None else loss.arguments_of)

    def _make_forwards(self, dtype: torch.dtype | None) -> tuple[Forward, Forward]:
        """Returns the forwards of training and of evaluation."""
        check_loss = self._check_loss if self._checks_in_forward else None
        train_forward = self.strategy.wrap_forward(self._loss_module, check_loss)
        evaluation_forward = self._loss_module.forward
        return in_autocast(train_forward, self.device, dtype), in_autocast(evaluation_forward, self.device, dtype)

    def is_due(self, step: int) -> bool:
        """Returns whether it runs in the step that follows `step` completed steps of the run."""
        return self.has_own_loss and (self.optimizer is None or (step + 1) % self.every == 0)

    def micro_step(self, batch: Any, weight: float = 1.0) -> None:
        """Runs forward and backward on one batch.

        Args:
            weight: weight of this rank's batch, relative to a mean of 1 over the ranks; 0 ignores the batch. A loss
                that has its own weight is weighted by that instead.
        """
        tokens = self.tokens
        if self.optimizer is None:
            with torch.no_grad():
                loss, extras, _, loss_weight = self.forward(batch, weight)
            loss = loss if loss_weight is not None else loss * weight
        else:
            is_last = self.micro_steps - self._step_start.micro_steps + 1 >= self.accumulate
            with self.strategy.micro_step(is_last, weight) if self._is_distributed else _NO_CONTEXT:
                self._reader.batch_weight = weight
                loss, extras, num_tokens, loss_weight = self._train_forward(batch)
                self.tokens += num_tokens
                if loss_weight is None:
                    loss = loss if weight == 1.0 or self.strategy.weights_losses else loss * weight
                self._is_exchanging = is_last
                is_part = loss_weight is None and self.accumulate > 1
                self._gradients.backward(loss / self.accumulate if is_part else loss, loss_weight)
                if is_last and self._is_distributed:
                    self.strategy.all_reduce_weight()
                self._is_exchanging = False
        if self._training_metrics is not None:
            self._training_metrics.add(self.take_output(batch) if weight else None)
        if weight != 1.0:
            if loss_weight is None:
                extras = {name: value * weight for name, value in extras.items()}
            self.tokens = self.tokens if weight else tokens
        if loss_weight is None:
            numbers = {"loss": as_number(loss), **extras}
            self._metrics.add(numbers)
        else:
            # The ranks' mean of these weights is the number of all their terms, whatever the number of ranks.
            numbers, terms = extras, loss_weight.terms
            self._metrics.add(numbers, terms if self._num_ranks == 1 else terms * self._num_ranks)
        self._losses.append(numbers["loss"])
        self.micro_steps += 1

    @property
    def can_shadow(self) -> bool:
        """True if this rank can join the all-reduce of a step that it can't complete."""
        return self.optimizer is None or (self.strategy.can_shadow and not self._is_exchanging)

    def shadow_step(self) -> None:
        """Joins the pending all-reduce with zero gradients.

        Otherwise the other ranks would be left waiting. Call `discard` afterwards.
        """
        if self.optimizer is not None and self.micro_steps - self._step_start.micro_steps < self.accumulate:
            self.strategy.shadow_step()
        self.strategy.finish_exchange()

    def forward(self, batch: Any, batch_weight: float | None = None) -> Output:
        """Runs the module on a batch without the strategy, and reads its output.

        Without a `batch_weight` it is an evaluation.
        """
        self._reader.batch_weight = batch_weight
        output = self._evaluation_forward(batch)
        self.tokens += output.tokens
        return output

    def take_output(self, batch: Any) -> tuple[Any, Any]:
        """Returns the output and target of the last forward, for metrics; `batch` is that of the forward."""
        return self._reader.take_output(batch, self._target_key)

    def output_error(self, message: str) -> OutputError:
        """Returns an error about the forward's return value; before the first step, it counts as a set-up error."""
        return self._reader.error(message)

    def _post_weighted(self, is_weighted: bool) -> None:
        """Reports to the other ranks that losses are weighted: all ranks must agree."""
        if is_weighted and self.strategy.coordinator is not None and self.strategy.is_distributed:
            self.strategy.coordinator.post("weighted", self.strategy.name)

    def step(self) -> str | None:
        """Ends a step with `prepare`, then `update` if there is no fault.

        Returns the fault.
        """
        fault = self.prepare()
        if fault is None:
            self.update()
        return fault

    def prepare(self) -> str | None:
        """Unscales and clips the gradients.

        Returns a description of a loss or gradient that is not finite.
        """
        if self.first_step_hook is not None:
            self.first_step_hook.prepared()
        fault: str | None = None
        if self._checks_in_prepare:
            for number, loss in enumerate(self._losses, 1):
                if not math.isfinite(loss):
                    fault = self._describe_loss_fault(loss, number)
                    break
        if fault is None:
            fault = self._gradients.prepare(self.steps + self.skipped_steps + 1, self._losses)
        if self._is_distributed:
            self.strategy.finish_exchange()
        return fault

    def _describe_loss_fault(self, loss: Number, number: int) -> str | None:
        return self._gradients.describe_loss_fault(loss, number if self.accumulate > 1 else None)

    def _check_loss(self, output: Output) -> None:
        """Reports a loss that is not finite before it reaches the other ranks' gradients."""
        loss = output.extras.get("loss", output.loss)
        number = self.micro_steps - self._step_start.micro_steps + 1
        if fault := self._describe_loss_fault(loss, number):
            self.strategy.post_fault(fault)

    def wrap_next_forward(self, context: contextlib.AbstractContextManager[None]) -> None:
        """Runs the next training forward in a context."""
        self._loss_module.next_context = context

    def find_late_fault(self) -> str | None:
        """Returns the first fault since the last call, if the finite check is deferred."""
        return self._gradients.deferred_check.find_fault()

    def update(self) -> bool:
        """Steps the optimizer and clears the gradients.

        Returns False if the loss scaler skipped the update.
        """
        self._lrs = current_lrs(self.optimizer)
        is_taken = self._gradients.update()
        self._reader.reference_weight = self._gradients.reference_weight
        self.steps += is_taken
        self.skipped_steps += not is_taken
        if is_taken:
            self.schedule.step()
            if self.ema is not None:
                self.ema.update()
            if self.first_step_hook is not None and self.first_step_hook.updated():
                self.first_step_hook = None
        self._commit_step()
        return is_taken

    def skip(self) -> None:
        """Discards the step and counts it as skipped."""
        self.discard()
        self.skipped_steps += 1

    def discard(self) -> None:
        """Restores the state before the step: gradients, buffers, counters and metrics."""
        self.tokens, self.micro_steps, self._gradients.norm = self._step_start
        self._is_exchanging = False
        self._metrics.rollback()
        self._losses.clear()
        if self._training_metrics is not None:
            self._training_metrics.rollback()
        self._buffers.restore()
        self._gradients.discard()

    def _commit_step(self) -> None:
        self._buffers.save()
        self._metrics.commit()
        self._losses.clear()
        if self._training_metrics is not None:
            self._training_metrics.commit()
        self._step_start = _StepStart(self.tokens, self.micro_steps, self._gradients.norm)
        self._reader.has_trained = self.micro_steps >= self.accumulate

    def train(self) -> None:
        """Sets training mode, for the optimizer too if it has one.

        Frozen modules stay in evaluation mode, and so does a module without an optimizer.
        """
        self.module.train(self.optimizer is not None)
        self.applied.frozen.put_into_eval()
        getattr(self.optimizer, "train", bool)()
        self._reader.keeps_output = self._training_metrics is not None
        self._swap_ema(False)

    def eval(self) -> None:
        """Sets evaluation mode and swaps in the averaged weights.

        The optimizer is switched too if it has modes.
        """
        self.module.eval()
        getattr(self.optimizer, "eval", bool)()
        self._reader.keeps_output = self.metrics is not None
        self._swap_ema(True)

    def _swap_ema(self, is_used: bool) -> None:
        if self.ema is not None and self.ema.is_swapped is not is_used:
            self.ema.swap()

    @contextlib.contextmanager
    def evaluating(self) -> Any:
        """Returns a context in evaluation mode, without gradients."""
        self.eval()
        try:
            with torch.no_grad():
                yield self
        finally:
            self.train()

    def share_metrics(self) -> None:
        """Averages the metrics since they were last taken over the ranks; sums the tokens."""
        if self._is_distributed:
            new_tokens = self._metrics.share(self.tokens - self._synced_tokens)
            self.tokens = self._synced_tokens = self._synced_tokens + new_tokens
            self._commit_step()
            if self._training_metrics is not None:
                self._training_metrics.share()

    def take_metrics(self) -> dict[str, float]:
        """Returns the means since the last call, gradient norm and learning rates."""
        self.share_metrics()
        numbers = self._metrics.take()
        if self._training_metrics is not None:
            self._add_training_metrics(numbers, self._training_metrics.take())
        for index, lr in enumerate(self._lrs):
            numbers[f"lr_{index}" if index else "lr"] = lr
        numbers.update(self._gradients.metrics())
        return numbers

    def _add_training_metrics(self, numbers: dict[str, Any], results: Mapping[str, Any]) -> None:
        """Adds the results of the training metrics to the means of the forward's numbers."""
        if clash := sorted(numbers.keys() & results):
            raise self.output_error(
                f"metrics.{clash[0]}: the forward returns a number of this name; rename one of them"
            )
        numbers.update(results)

    def set_lr(self, lr: float) -> None:
        """Sets the base rate of the first group and scales those of the other groups.

        The schedule continues.
        """
        self.schedule.set_lr(lr)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of optimizer, scheduler, scaler, EMA, counters and metrics.

        Without the weights.
        """
        states: dict[str, Any] = {
            name: None if part is None else part.state_dict() for name, part in self._parts.items()
        }
        if self.optimizer is not None:
            states["optimizer"] = name_parameters(states["optimizer"], self.optimizer, self._parameter_names)
            states["numbers"] = changed_extra_state(self.optimizer, self._initial_extra_state)
        norm, reference_weight = self._gradients.norm, self._gradients.reference_weight
        return {
            **states,
            "schedule": self.schedule.state_dict(),
            "counters": {name: getattr(self, name) for name in ("steps", "micro_steps", "skipped_steps", "tokens")},
            "configured": self._hyperparameters,
            "lrs": self._lrs,
            "grad_norm": None if norm is None else norm.detach().clone(),
            "gathered": self._metrics.state_dict(),
            **({"metrics": self._training_metrics.state_dict()} if self._training_metrics is not None else {}),
            "reference": None if reference_weight is None else float(reference_weight),
        }

    def load_state_dict(
        self, state: Mapping[str, Any], allows_changes: bool = False, saved_order: Sequence[str] = ()
    ) -> list[str]:
        """Loads a saved state without copying its tensors.

        Hyperparameters changed in the config take effect.

        Args:
            allows_changes: a part whose state is missing or of another kind starts anew instead of raising.
            saved_order: the names of the saved weights in their order.
        Returns:
            A description of each part that starts anew.
        Raises:
            ValueError: a part has no saved state and changes are not allowed; the state is of other parameters.
        """
        self._swap_ema(False)
        notes = restore(
            self._parts, self.schedule, state, self._hyperparameters, self._parameter_names, saved_order,
            self._to_local, allows_changes,
        )  # fmt: skip
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self._synced_tokens = self.tokens
        self._gradients.norm = move(state["grad_norm"], self.device)
        self._lrs = list(state["lrs"])
        self._metrics.load_state_dict(state["gathered"])
        if self._training_metrics is not None:
            self._training_metrics.load_state_dict(state.get("metrics") or {})
        self._reader.reference_weight = self._gradients.reference_weight = state.get("reference")
        self._commit_step()
        self.train()
        return notes

    @property
    def _parts(self) -> dict[str, Any]:
        return {
            "optimizer": self.optimizer,
            "scheduler": self.scheduler,
            "scaler": self._gradients.scaler,
            "averages": self.ema,
        }

    def _to_local(self, name: str, state: Any) -> Any:
        """Returns this rank's part of the full state of the part `name`."""
        if name == "averages":
            return {**state, "weights": self.strategy.to_local(state["weights"], self.module)}
        return self.strategy.optimizer_to_local(state, self._parts[name]) if name == "optimizer" else state
