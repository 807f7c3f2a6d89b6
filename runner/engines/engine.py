"""One module with all that trains it: optimizer, scheduler, loss scaler, counters, and their state.

Must not import a config or another model's code: what it drives is any `nn.Module`.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from runner.engines.eager import clear_gradients
from runner.engines.faults import FiniteCheck, KeptBuffers, describe_gradients
from runner.engines.forward import Feeder, feed, read_output
from runner.engines.gathered import Gathered
from runner.engines.settings import apply_changes, base_lrs, configured, find_changed_kinds, lrs, set_base_lr
from runner.utils.distributed import move

ON_NONFINITE = ("stop", "skip", "ignore")
_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}


class Engine:
    """Trains one module: a step is `micro_step` once or more, then `prepare` and, unless that found a fault, `update`.

    Args:
        module: any module whose forward returns a loss: a 0-d tensor; a mapping with `loss` (its other 0-d
            tensors become metrics, `tokens` counts for throughput); an object with `loss`; or nothing of
            these, while its modules keep `loss` attributes, which are added up.
        optimizer: over the parameters that are to be trained; None for a module that is only evaluated.
        scheduler: steps after each optimizer step that was taken.
        precision: fp32, bf16 or fp16 (autocast; fp16 with a loss scaler).
        accumulate: micro-steps a step; each loss counts for 1 / accumulate.
        clip_norm: largest norm of all gradients; 0 does not clip.
        feeder: called as feeder(module, batch) in place of the module.
        on_nonfinite: what is to become of a step whose loss or gradients are not finite: stop and skip make `prepare`
            look for them. With stop, an accelerator is not waited for: `find_late_fault` tells after the update.
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
    ) -> None:
        if precision not in _AUTOCAST:
            raise ValueError(f"precision={precision!r}: expected one of {', '.join(_AUTOCAST)}")
        if on_nonfinite not in ON_NONFINITE:
            raise ValueError(f"on_nonfinite={on_nonfinite!r}: expected one of {', '.join(ON_NONFINITE)}")
        self.module = module
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.on_nonfinite = on_nonfinite
        self.steps = self.micro_steps = self.skipped_steps = self.tokens = 0
        self.grad_norm: Tensor | None = None
        self._feeder = feeder or feed
        first = next(module.parameters(), None)
        self.device = first.device if first is not None else torch.device("cpu")
        self.looks_late = on_nonfinite == "stop" and self.device.type != "cpu"
        self._dtype = _AUTOCAST[precision]
        self._scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" and optimizer else None
        self._trained = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        self._configured = configured(optimizer, scheduler)
        self._lrs = lrs(self.optimizer)
        self._gathered = Gathered()
        self._late: list[tuple[int, Tensor]] = []
        self._is_finite = FiniteCheck(self._trained)
        self._buffers = KeptBuffers(module)
        self._mark_step()
        self.train()

    def micro_step(self, batch: Any) -> None:
        """Runs forward and backward on one batch."""
        if self.optimizer is None:
            with torch.no_grad():
                loss, extras = self.forward(batch)
        else:
            loss, extras = self.forward(batch)
            self.backward(loss)
        self._gathered.add(loss, extras)
        self.micro_steps += 1

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss (0-d) of a batch and the forward's other numbers (0-d each)."""
        if self._dtype is None:
            loss, extras, tokens = read_output(self.module, self._feeder(self.module, batch))
        else:
            with torch.autocast(self.device.type, self._dtype):
                loss, extras, tokens = read_output(self.module, self._feeder(self.module, batch))
        self.tokens += tokens
        return loss, extras

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of loss / accumulate."""
        if self.accumulate > 1:
            loss = loss / self.accumulate
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        loss.backward()

    def step(self) -> str | None:
        """Ends a step: `prepare`, and `update` unless a fault was found, which is returned."""
        fault = self.prepare()
        if fault is None:
            self.update()
        return fault

    def prepare(self) -> str | None:
        """Unscales and clips the gradients; returns what is not finite in the step, where that is looked for."""
        if self.on_nonfinite != "ignore" and not self.looks_late and (fault := self._find_loss_fault()):
            return fault
        if self.optimizer is None:
            return None
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if self.clip_norm:
            norm = nn.utils.get_total_norm([p.grad for p in self._trained if p.grad is not None])
            self.grad_norm = norm
        if fault := self._find_gradient_fault():
            return fault
        if self.clip_norm:
            nn.utils.clip_grads_with_norm_(self._trained, self.clip_norm, norm)
        return None

    def _find_loss_fault(self) -> str | None:
        for number, loss in enumerate(self._gathered.unmarked, 1):
            value = float(loss)
            if not math.isfinite(value):
                part = f" of micro-step {number}" if self.accumulate > 1 else ""
                grads = describe_gradients(self.module.named_parameters())
                return f"its loss{part} is {value}; largest gradients: {grads or 'none'}"
        return None

    def _find_gradient_fault(self) -> str | None:
        norm = self.grad_norm if self.clip_norm else None
        if self.looks_late:
            parts = [loss.float() for loss in self._gathered.unmarked] + ([] if norm is None else [norm])
            self._late.append((self.steps + self.skipped_steps + 1, torch.stack(parts).sum()))
        if self.looks_late or self.on_nonfinite == "ignore":
            return None
        if self._scaler is not None and self._scaler.get_scale() > 1.0:
            return None  # it skips such a step itself, and scales the next ones less
        if math.isfinite(float(norm)) if norm is not None else self._is_finite():
            return None
        return f"its gradients are not finite; largest: {describe_gradients(self.module.named_parameters())}"

    def find_late_fault(self) -> str | None:
        """Returns what was not finite in the steps since the last call, on a device that was not waited for."""
        late, self._late = self._late, []
        if not late:
            return None
        for (step, _), value in zip(late, torch.stack([total for _, total in late]).tolist(), strict=True):
            if not math.isfinite(value):
                return f"in its step {step} the loss or the gradients were not finite, and the update was made"
        return None

    def update(self) -> bool:
        """Updates the parameters and clears the gradients; returns False where the scaler skipped the update."""
        self._lrs = lrs(self.optimizer)
        taken = self.optimizer is None or self._update(self.optimizer)
        if self.optimizer is not None:
            clear_gradients(self.optimizer, self._trained)
        self.steps += taken
        self.skipped_steps += not taken
        if taken and self.scheduler is not None:
            self.scheduler.step()
        self._mark_step()
        return taken

    def _update(self, optimizer: Optimizer) -> bool:
        if self._scaler is None:
            optimizer.step()
            return True
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= before

    def skip(self) -> None:
        """Leaves out a step: as `discard`, and it counts as skipped."""
        self.discard()
        self.skipped_steps += 1

    def discard(self) -> None:
        """Makes all as it was before the step's first micro-step: gradients, buffers, counters, metrics."""
        self.tokens, self.micro_steps, self.grad_norm = self._mark
        self._gathered.drop_unmarked()
        self._buffers.restore()
        self.module.zero_grad(set_to_none=True)
        if self._scaler is not None:  # it may be between unscaling and the update
            scaler = torch.amp.GradScaler(self.device.type)
            scaler.load_state_dict(self._scaler.state_dict())
            self._scaler = scaler

    def _mark_step(self) -> None:
        self._buffers.keep()
        self._gathered.mark()
        self._mark = self.tokens, self.micro_steps, self.grad_norm

    def train(self) -> None:
        """Puts the module, and an optimizer that tells the two apart, into training mode."""
        self.module.train()
        getattr(self.optimizer, "train", _do_nothing)()

    def eval(self) -> None:
        """Puts the module, and an optimizer that tells the two apart, into evaluation mode."""
        self.module.eval()
        getattr(self.optimizer, "eval", _do_nothing)()

    @contextlib.contextmanager
    def evaluating(self) -> Any:
        """Evaluation mode, without gradients, for the length of a block."""
        self.eval()
        try:
            with torch.no_grad():
                yield self
        finally:
            self.train()

    def take_metrics(self) -> dict[str, float]:
        """Returns the means since the last call, and the last update's gradient norm and rate of each group."""
        values = self._gathered.take()
        own = {f"lr_{index}" if index else "lr": lr for index, lr in enumerate(self._lrs)}
        if self.grad_norm is not None:
            own["grad_norm"] = float(self.grad_norm)
        if self._scaler is not None:
            own["loss_scale"] = self._scaler.get_scale()
        if clash := sorted(values.keys() & own):
            found = f"{type(self.module).__name__}.forward returned a number named {clash[0]!r}"
            raise ValueError(f"{found}, as the engine names one of its own: call it something else")
        return values | own

    def set_lr(self, lr: float) -> None:
        """Makes `lr` the base rate of the first group, scaling the others alike; the schedule goes on from it."""
        assert self.optimizer is not None
        bases = base_lrs(self.optimizer)
        for index, base in enumerate(bases):
            set_base_lr(self.optimizer, self.scheduler, index, lr if base == bases[0] else lr * base / bases[0])

    def state_dict(self) -> dict[str, Any]:
        """Returns all but the weights: optimizer, scheduler, scaler, counters, and metrics not yet taken."""
        return {
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "scaler": self._scaler.state_dict() if self._scaler else None,
            "counters": {name: getattr(self, name) for name in ("steps", "micro_steps", "skipped_steps", "tokens")},
            "configured": self._configured,
            "lrs": self._lrs,
            "grad_norm": None if self.grad_norm is None else self.grad_norm.detach().clone(),
            "gathered": self._gathered.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any], allows_changes: bool = False) -> list[str]:
        """Takes a state back, its tensors as its own; what the config says otherwise since then takes effect.

        Returns:
            Which parts begin anew, as the state has none of their kind.
        Raises:
            ValueError: there is such a part, and changes are not allowed.
        """
        notes = self._load_parts(state, allows_changes)
        for name, value in state["counters"].items():
            setattr(self, name, value)
        self.grad_norm, self._lrs = move(state["grad_norm"], self.device), list(state["lrs"])
        self._gathered.load_state_dict(move(state["gathered"], self.device))
        self._mark_step()
        self.train()
        return notes

    def _load_parts(self, state: Mapping[str, Any], allows_changes: bool) -> list[str]:
        parts = {"optimizer": self.optimizer, "scheduler": self.scheduler, "scaler": self._scaler}
        before = state["configured"]
        notes = find_changed_kinds(parts, state)
        if notes and not allows_changes:
            raise ValueError(f"{notes[0]}; resume with the same config, or allow changes: it then begins anew")
        changed = {note.partition(":")[0] for note in notes}
        for name, part in parts.items():
            if part is not None and name not in changed:
                part.load_state_dict(state[name])
        if self.optimizer is not None and not changed & {"optimizer", "scheduler"}:
            apply_changes(self.optimizer, self.scheduler, self._configured, before)
        return [f"{note}: it begins anew" for note in notes]


def _do_nothing() -> None:
    return None
