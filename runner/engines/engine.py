"""One module with all that trains it: optimizer, scheduler, loss scaler, counters, and their state.

Must not import a config or another model's code: what it drives is any `nn.Module`.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from runner.engines.ema import EMA
from runner.engines.forward import Feeder, FirstStepHook, LossModule, Number, Output, OutputReader, feed, keep
from runner.engines.gradients import BufferSnapshot, Gradients
from runner.engines.metrics import MetricAccumulator
from runner.engines.optim.hyperparameters import lrs, snapshot_hyperparameters
from runner.engines.optim.optimizer_state import moved_numbers, name_parameters, names_of, numbers_of
from runner.engines.optim.schedule import LRSchedule
from runner.engines.restore import restore
from runner.engines.strategies import Strategy
from runner.utils.distributed import all_gather_object, move
from runner.utils.wrapper.applied import AppliedOptimizations

ON_NONFINITE = ("stop", "skip", "ignore")
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """Trains one module: a step is `micro_step` once or more, then `prepare` and, unless that found a fault, `update`.

    Args:
        module: any module whose forward returns a loss: a 0-d tensor; a mapping or object with `loss` (its other
            numbers become metrics, `tokens` counts for throughput, `weight` is the number of terms that the loss is a
            mean over); or nothing of these, while its modules keep `loss` attributes, which are added up.
        optimizer: over the parameters that are to be trained; None for a module that is only evaluated.
        scheduler: steps after each optimizer step that was taken.
        precision: fp32, bf16 or fp16 (autocast; fp16 with a loss scaler).
        accumulate: micro-steps a step; each loss counts for 1 / accumulate, or by its weight.
        clip_norm: largest norm of all gradients; 0 does not clip.
        feeder: called as feeder(module, batch) in place of the module.
        on_nonfinite: what is to become of a step whose loss or gradients are not finite: stop and skip make `prepare`
            look for them. With stop, an accelerator is not waited for: `find_late_fault` tells after the update.
        strategy: how the module lies over the ranks of a run; it was placed already.
        ema: averages of the weights, for evaluations and exports.
        applied: what was done to the module, which exports undo.
        metric: the number of an evaluation that the scheduler steps with, such as `eval/loss`, in place of each update.
    """

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
    ) -> None:
        if precision not in _AUTOCAST:
            raise ValueError(f"precision={precision!r}: expected one of {', '.join(_AUTOCAST)}")
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite={on_nonfinite!r}: expected one of {', '.join(ON_NONFINITE)}")
        self.module, self.optimizer, self.scheduler = module, optimizer, scheduler
        self.accumulate, self.feeder = accumulate, feeder
        self.on_nonfinite = on_nonfinite
        self.steps = self.micro_steps = self.skipped_steps = self.tokens = self._tokens_shared = 0
        first = next(module.parameters(), None)
        self.device = first.device if first is not None else torch.device("cpu")
        self.strategy, self.ema, self.applied = strategy or Strategy(), ema, applied or AppliedOptimizations(module)
        self.first: FirstStepHook | None = None
        self.kind = type(module).__name__.removeprefix("FSDP" if self.strategy.is_sharded else "")
        self._dtype = _AUTOCAST[precision]
        self._gradients = Gradients(
            module, optimizer, self.strategy, self.device,
            is_scaled=precision == "fp16", clip_norm=clip_norm, on_nonfinite=on_nonfinite,
        )  # fmt: skip
        self.looks_late = self._gradients.looks_late  # what is not finite is told by `find_late_fault`
        self._looks_first = type(self.strategy) is not Strategy and self._gradients.looks_at_losses
        self._looks = self._gradients.looks_at_losses and not self._looks_first
        self._reader = OutputReader(module, self._say_weighted)
        self._reader.multiplies = self._gradients.divides = accumulate > 1 or type(self.strategy) is not Strategy
        self._loss_module = LossModule(module, feeder or feed, self._reader)
        self.first_step_hook = self._loss_module.wrap_next_forward
        self._trained_fed = self.strategy.wrap_forward(self._loss_module, self._look if self._looks_first else None)
        self.schedule = LRSchedule(optimizer, scheduler, metric)
        self._configured = snapshot_hyperparameters(optimizer, scheduler)
        self._names, self._numbers = names_of(module), numbers_of(optimizer)
        self._lrs = lrs(self.optimizer)
        self._metrics, self._is_exchanging = MetricAccumulator(), False
        self._buffers = BufferSnapshot(module)
        self._mark_step()
        self.train()

    def micro_step(self, batch: Any, weight: float = 1.0) -> None:
        """Runs forward and backward on one batch.

        Args:
            weight: what the batch counts for beside those of other ranks, whose mean is 1; 0 is for nothing. A loss
                with a weight of its own counts by that.
        """
        tokens = self.tokens
        if self.optimizer is None:
            with torch.no_grad():
                loss, extras, _, own = self.forward(batch, self._loss_module.forward, weight)
            loss = loss if own is not None else loss * weight
        else:
            is_last = self.micro_steps - self._mark[1] + 1 >= self.accumulate
            with self.strategy.micro_step(is_last, weight):
                loss, extras, _, own = self.forward(batch, self._trained_fed, weight)
                if own is None:
                    loss = loss if weight == 1.0 or self.strategy.weighs else loss * weight
                self._is_exchanging = is_last
                is_part = own is None and self.accumulate > 1
                self._gradients.backward(loss / self.accumulate if is_part else loss, own)
                if is_last:
                    self.strategy.exchange_weight()
                self._is_exchanging = False
        if weight != 1.0:
            if own is None:
                extras = {name: value * weight for name, value in extras.items()}
            self.tokens = self.tokens if weight else tokens
        if own is None:
            self._metrics.add({"loss": keep(loss), **extras})
        else:
            self._metrics.add(extras, own.terms)
        self.micro_steps += 1

    @property
    def can_shadow(self) -> bool:
        """Whether this rank can still release the others from a step that it can't make."""
        return self.optimizer is None or (self.strategy.can_shadow and not self._is_exchanging)

    def shadow_step(self) -> None:
        """Takes part in the exchange of a step that this rank can't make, unless it has; then discard it."""
        if self.optimizer is not None and self.micro_steps - self._mark[1] < self.accumulate:
            self.strategy.shadow_step()
        self.strategy.finish_exchange()

    def forward(self, batch: Any, loss_module: Any = None, share: float | None = None) -> Output:
        """Returns what the module makes of a batch; without a `share` it is an evaluation."""
        loss_module = loss_module or self._loss_module.forward
        self._reader.share, self._reader.has_trained = share, self.micro_steps >= self.accumulate
        if self._dtype is None:
            output: Output = loss_module(batch)
        else:
            with torch.autocast(self.device.type, self._dtype):
                output = loss_module(batch)
        self.tokens += output.tokens
        return output

    def _say_weighted(self, is_weighted: bool) -> None:
        """Tells the other ranks, which are to find out whether the losses of all are weighted."""
        if is_weighted and self.strategy.coordinator is not None and type(self.strategy) is not Strategy:
            self.strategy.coordinator.post("weighted", self.strategy.name)

    def step(self) -> str | None:
        """Ends a step: `prepare`, and `update` unless a fault was found, which is returned."""
        fault = self.prepare()
        if fault is None:
            self.update()
        return fault

    def prepare(self) -> str | None:
        """Unscales and clips the gradients; returns what is not finite in the step, where that is looked for."""
        if self.first is not None:
            self.first.prepared()
        fault = self._find_loss_fault() if self._looks else None
        if fault is None:
            fault = self._gradients.prepare(self.steps + self.skipped_steps + 1, self._metrics.uncommitted)
        self.strategy.finish_exchange()
        return fault

    def _find_loss_fault(self) -> str | None:
        found = (self._describe(loss, number) for number, loss in enumerate(self._metrics.uncommitted, 1))
        return next(filter(None, found), None)

    def _describe(self, loss: Number, number: int) -> str | None:
        return self._gradients.describe(loss, number if self.accumulate > 1 else None)

    def _look(self, output: Output) -> None:
        """Tells the other ranks of a loss that is not finite, before it goes into their gradients."""
        if fault := self._describe(output.extras.get("loss", output.loss), self.micro_steps - self._mark[1] + 1):
            self.strategy.post_fault(fault)

    def find_late_fault(self) -> str | None:
        """Returns what was not finite in the steps since the last call, on a device that was not waited for."""
        return self._gradients.late.find()

    def update(self) -> bool:
        """Updates the parameters and clears the gradients; returns False where the scaler skipped the update."""
        self._lrs = lrs(self.optimizer)
        taken = self._gradients.update()
        self._reader.reference = self._gradients.reference
        self.steps += taken
        self.skipped_steps += not taken
        if taken:
            self.schedule.step()
        if taken and self.ema is not None:
            self.ema.update()
        if taken and self.first is not None and self.first.updated():
            self.first = None
        self._mark_step()
        return taken

    def skip(self) -> None:
        """Leaves out a step: as `discard`, and it counts as skipped."""
        self.discard()
        self.skipped_steps += 1

    def discard(self) -> None:
        """Makes all as it was before the step's first micro-step: gradients, buffers, counters, metrics."""
        self.tokens, self.micro_steps, self._gradients.norm = self._mark
        self._is_exchanging = False
        self._metrics.rollback()
        self._buffers.restore()
        self._gradients.discard()

    def _mark_step(self) -> None:
        self._buffers.keep()
        self._metrics.commit()
        self._mark = self.tokens, self.micro_steps, self._gradients.norm

    def train(self) -> None:
        """Puts the module, and an optimizer that tells the two apart, into training mode; frozen modules stay."""
        self.module.train()
        self.applied.frozen.put_into_eval()
        getattr(self.optimizer, "train", bool)()
        self._use_averages(False)

    def eval(self) -> None:
        """Puts the module, and an optimizer that tells the two apart, into evaluation mode."""
        self.module.eval()
        getattr(self.optimizer, "eval", bool)()
        self._use_averages(True)

    def _use_averages(self, is_wanted: bool) -> None:
        if self.ema is not None and self.ema.is_swapped is not is_wanted:
            self.ema.swap()

    @contextlib.contextmanager
    def evaluating(self) -> Any:
        """Evaluation mode, without gradients, for the length of a block."""
        self.eval()
        try:
            with torch.no_grad():
                yield self
        finally:
            self.train()

    def share_metrics(self) -> None:
        """Makes the numbers since the last call of `take_metrics`, and the tokens, those of all ranks together."""
        if type(self.strategy) is not Strategy:
            since = sum(all_gather_object(self.tokens - self._tokens_shared))
            self.tokens = self._tokens_shared = self._tokens_shared + since
            self._metrics.share()
            self._mark_step()

    def take_metrics(self) -> dict[str, float]:
        """Returns the means since the last call, and the last update's gradient norm and rate of each group."""
        self.share_metrics()
        values = self._metrics.take()
        values |= {f"lr_{index}" if index else "lr": lr for index, lr in enumerate(self._lrs)}
        return values | self._gradients.metrics()

    def set_lr(self, lr: float) -> None:
        """Makes `lr` the base rate of the first group, scaling the others alike; the schedule goes on from it."""
        self.schedule.set_lr(lr)

    def state_dict(self) -> dict[str, Any]:
        """Returns all but the weights: optimizer, scheduler, scaler, counters, and metrics not yet taken."""
        parts: dict[str, Any] = {}
        for name, part in self._parts.items():
            parts[name] = None if part is None else part.state_dict()
        if self.optimizer is not None:
            parts["optimizer"] = name_parameters(parts["optimizer"], self.optimizer, self._names)
            parts["numbers"] = moved_numbers(self.optimizer, self._numbers)
        return {
            **parts,
            "schedule": self.schedule.state_dict(),
            "counters": {name: getattr(self, name) for name in ("steps", "micro_steps", "skipped_steps", "tokens")},
            "configured": self._configured,
            "lrs": self._lrs,
            "grad_norm": None if (norm := self._gradients.norm) is None else norm.detach().clone(),
            "gathered": self._metrics.state_dict(),
            "reference": None if (reference := self._gradients.reference) is None else float(reference),
        }

    def load_state_dict(
        self, state: Mapping[str, Any], allows_changes: bool = False, saved_order: Sequence[str] = ()
    ) -> list[str]:
        """Takes a state back, its tensors as its own; what the config says otherwise since then takes effect.

        Args:
            saved_order: the names of the saved weights in their order.
        Returns:
            Which parts begin anew, as the state has none of their kind.
        Raises:
            ValueError: there is such a part, and changes are not allowed; or the state is of other parameters.
        """
        self._use_averages(False)
        notes = restore(
            self._parts, self.schedule, state, self._configured, self._names, saved_order, self._fitted, allows_changes
        )
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self._tokens_shared = self.tokens
        self._gradients.norm, self._lrs = move(state["grad_norm"], self.device), list(state["lrs"])
        self._metrics.load_state_dict(state["gathered"])
        self._reader.reference = self._gradients.reference = state.get("reference")
        self._mark_step()
        self.train()
        return notes

    @property
    def _parts(self) -> dict[str, Any]:
        scaler = self._gradients.scaler
        return {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": scaler, "averages": self.ema}

    def _fitted(self, name: str, state: Any) -> Any:
        """Returns the whole state of one of its parts as this rank holds it."""
        if name == "averages":
            return {**state, "weights": self.strategy.to_local(state["weights"], self.module)}
        return self.strategy.optimizer_to_local(state, self._parts[name]) if name == "optimizer" else state
