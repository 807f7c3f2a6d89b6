"""An engine's gradients, from backward to the optimizer: scaled, unscaled, looked at, clipped.

Must not import a config.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.engines.eager import clear_gradients
from runner.engines.faults import FiniteCheck, GradientMask, LateFaults, describe_gradients, describe_loss
from runner.engines.forward import Number, Weight, is_readable
from runner.engines.layouts import Alone

_log = logging.getLogger(__name__)
EMPTY = "the weights of its losses add up to 0: there is nothing to learn from"


class Gradients:
    """The gradients of the parameters that an optimizer has; None for a module that is only evaluated.

    `looks_late` says that a device is not waited for: what is not finite is told after the update.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        layout: Alone,
        device: torch.device,
        *,
        is_scaled: bool,
        clip_norm: float,
        on_nonfinite: str,
    ) -> None:
        self._module, self._optimizer, self._layout, self._device = module, optimizer, layout, device
        self._clip_norm, self._on_nonfinite = clip_norm, on_nonfinite
        self.norm: Tensor | None = None
        self.looks_late = on_nonfinite == "stop" and device.type != "cpu"
        self.scaler = torch.amp.GradScaler(device.type) if is_scaled and optimizer else None
        self.trained = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        self._is_finite = FiniteCheck(self.trained)
        self.late = LateFaults()
        self.divides = False  # weighted losses were multiplied by their weights
        self._mask = GradientMask()
        self.reference: Number | None = None  # of fp16: the mean weight of the last step, to which gradients relate
        self._total: Number | None = None  # of this step
        self._num_empty: Number = 0  # steps without a term, of a device that is not waited for

    @property
    def looks_at_losses(self) -> bool:
        """Whether each loss is looked at before the update."""
        return self._on_nonfinite != "ignore" and not self.looks_late

    def backward(self, loss: Tensor, weight: Weight | None = None) -> None:
        """Adds the gradients of a loss."""
        loss = loss if self.scaler is None else self.scaler.scale(loss)
        if weight is not None:
            self._layout.weight = weight.factor if self._layout.weight is None else self._layout.weight + weight.factor
            if weight.is_zero is not None:
                with self._mask(weight.is_zero, self._layout.leaves(self.trained)):
                    loss.backward()
                return
        loss.backward()

    def describe(self, loss: Number, part: int | None) -> str | None:
        """Returns what is wrong with a loss that is not finite; of a step in parts, of which."""
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        return None if math.isfinite(value) else describe_loss(value, part, self._module.named_parameters())

    def prepare(self, step: int, losses: Sequence[Number]) -> str | None:
        """Unscales, divides and clips them; returns what is wrong with them, where that is looked for.

        Args:
            step: the number of the engine's own step.
            losses: its losses (0-d each).
        """
        if self._optimizer is None:
            return None
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
        norm = self._layout.norm(self.trained) if self._clip_norm else None
        if norm is not None:
            self.norm = norm
        if self.looks_late:
            self.late.note(step, [*losses, *([] if norm is None else [norm])])
        elif fault := self._find_fault(norm):
            return fault
        factor: Number | None = None
        if self._layout.weight is not None:  # after what may have brought those of other ranks along
            total = self._read_total()
            if isinstance(total, float) and not total:
                return EMPTY
            factor = self._invert(total) if self.divides else None
        if factor is not None:
            if norm is not None:
                self.norm = norm = norm * factor
            # One pass over the gradients divides and clips.
            clipped = 1.0 if norm is None else torch.clamp(self._clip_norm / (norm + 1e-6), max=1.0)
            self._layout.scale(self.trained, factor * clipped)
        elif norm is not None:
            self._layout.clip(self.trained, self._clip_norm, norm)
        return None

    def _read_total(self) -> Number:
        """Returns the mean over the ranks of the weights of a step; a float where no device is waited for."""
        scale = None if self.scaler is None else self.scaler.scale(torch.ones((), device=self._device))
        total = self._layout.mean_weight(scale)
        if isinstance(total, float):
            return total
        waits = self.scaler is not None or self._on_nonfinite == "skip"  # in this step, whatever its weights
        if waits or is_readable(total):
            return float(total)
        self._num_empty = self._num_empty + (total == 0)
        return total

    def _invert(self, total: Number) -> Number:
        if self.scaler is not None:
            self._total = total
        if isinstance(total, float):
            return 1.0 / total
        return (1.0 / total).masked_fill(total == 0, 0.0)

    def _find_fault(self, norm: Tensor | None) -> str | None:
        if self._on_nonfinite == "ignore":
            return None
        if self.scaler is not None and self.scaler.get_scale() > 1.0:
            return None  # it skips such a step itself, and scales the next ones less
        if math.isfinite(float(norm)) if norm is not None else self._layout.is_true(self._is_finite()):
            return None
        return f"its gradients are not finite; largest: {describe_gradients(self._module.named_parameters())}"

    def update(self) -> bool:
        """Updates the parameters; returns False where the scaler skipped that."""
        taken = True
        if self._optimizer is None:
            return taken
        if self._total is not None:
            self.reference, self._total = self._total * (1.0 if self.reference is None else self.reference), None
        if self.scaler is None:
            self._optimizer.step()
        else:
            before = self.scaler.get_scale()
            self.scaler.step(self._optimizer)
            self.scaler.update()
            taken = self.scaler.get_scale() >= before
        clear_gradients(self._optimizer, self.trained)
        self._layout.clear()
        return taken

    def discard(self) -> None:
        """Forgets them, wherever they were on the way."""
        self._module.zero_grad(set_to_none=True)
        self._layout.clear()
        self._total = None
        if self.scaler is not None:  # it may be between unscaling and the update
            scaler = torch.amp.GradScaler(self._device.type)
            scaler.load_state_dict(self.scaler.state_dict())
            self.scaler = scaler

    def metrics(self) -> dict[str, float]:
        """Returns the last norm and the loss scale, where there are."""
        if num_empty := int(self._num_empty):
            _log.warning("In %d steps %s; their gradients were taken as 0", num_empty, EMPTY.partition(":")[0])
            self._num_empty = 0
        found: dict[str, Any] = {} if self.norm is None else {"grad_norm": float(self.norm)}
        return found if self.scaler is None else found | {"loss_scale": self.scaler.get_scale()}
