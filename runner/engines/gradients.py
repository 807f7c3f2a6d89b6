"""The gradients of one engine.

This module does backward, unscaling, the finite check, clipping and the update.
"""

from __future__ import annotations

import contextlib
import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase
from torch.optim import Optimizer

from runner.engines.dynamo import backward, clear_gradients
from runner.engines.forward import Number, Weight, is_readable
from runner.engines.strategies import Strategy
from runner.utils.modules.weights import copy_into

_log = logging.getLogger(__name__)
EMPTY = "the weights of its losses add up to 0: there is nothing to learn from"


class Gradients:
    """The gradients of an optimizer's parameters.

    Scales them, checks that they are finite, clips them (`clip_norm`), and steps the optimizer. If `defers_check` is
    true, the finite check does not wait for the device: a fault is found after the update.

    Args:
        optimizer: None for a module that is only evaluated.
        is_scaled: multiplies losses by a `GradScaler`, as fp16 needs.
        clip_norm: gradients are clipped to this total norm; 0 disables clipping.
        on_nonfinite: stop, skip or ignore.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None,
        strategy: Strategy,
        device: torch.device,
        *,
        is_scaled: bool,
        clip_norm: float,
        on_nonfinite: str,
    ) -> None:
        self._module, self._optimizer, self._strategy, self._device = module, optimizer, strategy, device
        self._clip_norm, self._on_nonfinite = clip_norm, on_nonfinite
        self.norm: Tensor | None = None
        self.defers_check = on_nonfinite == "stop" and device.type != "cpu"
        self.checks_losses = on_nonfinite != "ignore" and not self.defers_check  # each loss, before the update
        self.scaler = torch.amp.GradScaler(device.type) if is_scaled and optimizer else None
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        self._is_finite = FiniteCheck(self.parameters)
        self.deferred_check = DeferredFiniteCheck()
        self.divides_by_weight = False  # weighted losses were multiplied by their weights
        self._mask = GradientMask()
        # With a scaler: the mean weight of the last step. Weights are divided by it, so that the loss scale does not
        # have to change with the number of terms.
        self.reference_weight: Number | None = None
        self._mean_weight: Number | None = None  # of this step, relative to the reference
        self._num_empty_steps: Number = 0  # steps whose weights add up to 0, counted on the device

    def backward(self, loss: Tensor, weight: Weight | None = None) -> None:
        """Adds the gradients of a loss."""
        loss = loss if self.scaler is None else self.scaler.scale(loss)
        if weight is not None:
            previous = self._strategy.weight
            self._strategy.weight = weight.factor if previous is None else previous + weight.factor
            if weight.is_zero is not None:
                with self._mask(weight.is_zero, self._strategy.leaves(self.parameters)):
                    backward(loss)
                return
        backward(loss)

    def describe_loss_fault(self, loss: Number, number: int | None) -> str | None:
        """Returns a description of a loss that is not finite, with the largest gradients.

        Args:
            number: of the micro-step; None if the step has only one.
        """
        value = float(loss.detach() if isinstance(loss, Tensor) else loss)
        if math.isfinite(value):
            return None
        where = "" if number is None else f" of micro-step {number}"
        largest = describe_gradients(self._module.named_parameters()) or "none"
        return f"its loss{where} is {value}; largest gradients: {largest}"

    def prepare(self, step: int, losses: Sequence[Number]) -> str | None:
        """Unscales, divides and clips the gradients.

        Returns a description of a fault.

        Args:
            step: the engine's own step number.
            losses: the losses of the step (0-d each).
        """
        if self._optimizer is None:
            return None
        if self.scaler is not None:
            self.scaler.unscale_(self._optimizer)
        norm = self._strategy.norm(self.parameters) if self._clip_norm else None
        if norm is not None:
            self.norm = norm
        if self.defers_check:
            self.deferred_check.add(step, losses if norm is None else [*losses, norm])
        elif fault := self._find_fault(norm):
            return fault
        factor: Number | None = None
        # Read after the norm and the finite check: their all-reduce may have included the weights of other ranks.
        if self._strategy.weight is not None:
            mean_weight = self._read_mean_weight()
            if isinstance(mean_weight, float) and not mean_weight:
                return EMPTY
            factor = self._invert(mean_weight) if self.divides_by_weight else None
        if factor is not None:
            if norm is not None:
                self.norm = norm = norm * factor
            # One pass over the gradients divides and clips.
            clip_factor = 1.0 if norm is None else torch.clamp(self._clip_norm / (norm + 1e-6), max=1.0)
            self._strategy.scale(self.parameters, factor * clip_factor)
        elif norm is not None:
            self._strategy.clip(self.parameters, self._clip_norm, norm)
        return None

    def _read_mean_weight(self) -> Number:
        """Returns the mean of the step's weights over the ranks.

        A float unless that would wait for the device.
        """
        scale = None if self.scaler is None else self.scaler.scale(torch.ones((), device=self._device))
        mean_weight = self._strategy.mean_weight(scale)
        if isinstance(mean_weight, float):
            return mean_weight
        is_awaited = self.scaler is not None or self._on_nonfinite == "skip"  # the step waits for the device anyway
        if is_awaited or is_readable(mean_weight):
            return float(mean_weight)
        self._num_empty_steps = self._num_empty_steps + (mean_weight == 0)
        return mean_weight

    def _invert(self, mean_weight: Number) -> Number:
        if self.scaler is not None:
            self._mean_weight = mean_weight
        if isinstance(mean_weight, float):
            return 1.0 / mean_weight
        return (1.0 / mean_weight).masked_fill(mean_weight == 0, 0.0)

    def _find_fault(self, norm: Tensor | None) -> str | None:
        # With a scale above 1 the scaler skips such a step itself, and lowers the scale.
        if self._on_nonfinite == "ignore" or (self.scaler is not None and self.scaler.get_scale() > 1.0):
            return None
        is_finite = self._strategy.all_ranks_true(self._is_finite()) if norm is None else math.isfinite(norm)
        if is_finite:
            return None
        return f"its gradients are not finite; largest: {describe_gradients(self._module.named_parameters())}"

    def update(self) -> bool:
        """Steps the optimizer and clears the gradients.

        Returns False if the loss scaler skipped the update.
        """
        if self._optimizer is None:
            return True
        if self._mean_weight is not None:
            reference_weight = 1.0 if self.reference_weight is None else self.reference_weight
            self.reference_weight = self._mean_weight * reference_weight
            self._mean_weight = None
        is_taken = True
        if self.scaler is None:
            self._optimizer.step()
        else:
            scale = self.scaler.get_scale()
            self.scaler.step(self._optimizer)
            self.scaler.update()
            is_taken = self.scaler.get_scale() >= scale
        clear_gradients(self._optimizer, self.parameters)
        self._strategy.reset_step()
        return is_taken

    def discard(self) -> None:
        """Clears the gradients, whether or not they are unscaled."""
        self._module.zero_grad(set_to_none=True)
        self._strategy.reset_step()
        self._mean_weight = None
        if self.scaler is not None:
            # A new scaler: the old one remembers that it has unscaled, and would refuse to do it again.
            scaler = torch.amp.GradScaler(self._device.type)
            scaler.load_state_dict(self.scaler.state_dict())
            self.scaler = scaler

    def metrics(self) -> dict[str, float]:
        """Returns the last gradient norm and the loss scale, as far as there are any."""
        if num_empty_steps := int(self._num_empty_steps):
            _log.warning("In %d steps %s; their gradients were taken as 0", num_empty_steps, EMPTY.partition(":")[0])
            self._num_empty_steps = 0
        values: dict[str, Any] = {} if self.norm is None else {"grad_norm": float(self.norm)}
        return values if self.scaler is None else values | {"loss_scale": self.scaler.get_scale()}


class DeferredFiniteCheck:
    """Sums of losses and norms that stay on the device.

    `find_fault` reads them later, all at once.
    """

    _MAX_SUMS = 1024  # more are merged into one, so that a run that never logs needs no more memory

    def __init__(self) -> None:
        self._sums: list[tuple[int, int, Tensor]] = []  # first step, last step, their sum (0-d)

    def add(self, step: int, numbers: Sequence[Tensor | float]) -> None:
        """Adds the numbers (0-d each) of a step."""
        if len(self._sums) >= self._MAX_SUMS:
            first, last = self._sums[0][0], self._sums[-1][1]
            self._sums = [(first, last, self._stacked().sum())]  # stays infinite or NaN if one of them was
        tensors = [number for number in numbers if isinstance(number, Tensor)]
        total_of_floats = float(sum(number for number in numbers if isinstance(number, float)))
        if tensors:
            # A module over several devices may return its loss on the CPU: sum on the accelerator, without a wait.
            device = next((number.device for number in tensors if number.device.type != "cpu"), tensors[0].device)
            total = torch.stack([number.to(device).float() for number in tensors]).sum() + total_of_floats
        else:
            total = torch.tensor(total_of_floats)
        self._sums.append((step, step, total))

    def _stacked(self) -> Tensor:
        return torch.stack([total for _, _, total in self._sums])

    def find_fault(self) -> str | None:
        """Returns a description of the first step since the last call that was not finite."""
        if not self._sums:
            return None
        values = self._stacked().tolist()
        sums, self._sums = self._sums, []
        for (first, last, _), value in zip(sums, values, strict=True):
            if not math.isfinite(value):
                where = f"its step {first}" if first == last else f"one of its steps {first} to {last}"
                return f"in {where} the loss or the gradients were not finite, and the update was made"
        return None


class FiniteCheck:
    """Returns whether all gradients of some parameters are finite.

    It makes one pass over them, and reads one number.
    """

    def __init__(self, parameters: Iterable[Tensor]) -> None:
        groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
        for parameter in parameters:
            groups.setdefault((parameter.device, parameter.dtype), []).append(parameter)
        self._groups = [
            (group, torch.zeros(1, device=device), torch.ones(1, device=device))
            for (device, _), group in groups.items()
        ]

    def __call__(self) -> bool:
        is_finite = True
        for group, found_inf, one in self._groups:
            grads = [
                grad if type(grad) is Tensor and not grad.is_sparse else _values(grad)
                for parameter in group
                if (grad := parameter.grad) is not None
            ]
            if grads:
                # The loss scaler's own kernel, times 1: a fifth of the cost of a norm where many gradients are small.
                torch._amp_foreach_non_finite_check_and_unscale_(grads, found_inf, one)
            if found_inf.item():
                found_inf.zero_()
                is_finite = False
        return is_finite


def _values(grad: Tensor) -> Tensor:
    """Returns the numbers of this rank's part of a gradient, of a sparse one too."""
    local: Tensor = grad if type(grad) in (Tensor, nn.Parameter) else getattr(grad, "_local_tensor", grad)
    return local._values() if local.is_sparse else local


def describe_gradients(named: Iterable[tuple[str, Tensor]], count: int = 3) -> str:
    """Returns the parameters with the largest gradients, non-finite ones first."""
    rows = []
    grads = ((name, _values(parameter.grad.detach())) for name, parameter in named if parameter.grad is not None)
    for name, grad in grads:
        if grad.numel():
            num_bad = int((~torch.isfinite(grad)).sum())
            largest = float(torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).abs().max())
            rows.append((num_bad, largest, name, grad.numel()))
    rows.sort(key=lambda row: (row[0] == 0, -row[1]))
    return ", ".join(
        f"{name} ({num_bad} of {total} not finite)" if num_bad else f"{name} (up to {largest:.3g})"
        for num_bad, largest, name, total in rows[:count]
    )


class GradientMask:
    """Zeroes the gradients of a backward, even NaN, if its micro-batch has weight 0.

    Multiplying the loss by 0 would not do: the derivative of a mean over nothing is NaN, and so is 0 times that.
    """

    def __init__(self) -> None:
        self._is_zero: Tensor | None = None
        self._hooked_ids: set[int] = set()

    @contextlib.contextmanager
    def __call__(self, is_zero: Tensor, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Returns a context for a backward that masks the gradients of the leaves.

        Args:
            is_zero: 0-d bool on the device, which is not waited for.
        """
        for leaf in leaves:
            if leaf.requires_grad and id(leaf) not in self._hooked_ids:
                self._hooked_ids.add(id(leaf))
                leaf.register_hook(self._mask)
        self._is_zero = is_zero
        try:
            yield
        finally:
            self._is_zero = None

    def _mask(self, grad: Tensor) -> Tensor | None:
        if self._is_zero is None:
            return None
        is_zero = self._is_zero.to(grad.device)
        if not grad.is_sparse:
            return grad.masked_fill(is_zero, 0)
        values = grad._values().masked_fill(is_zero, 0)
        return torch.sparse_coo_tensor(grad._indices(), values, grad.shape, check_invariants=False)


class BufferSnapshot:
    """A copy of a module's buffers, to restore them when a step is discarded.

    A large buffer is copied only if its version counter says that it was written to. Small buffers are always copied,
    and so are running statistics, whose version torch does not raise. A write to a large buffer through `.data` is
    missed.
    """

    _MAX_ALWAYS_COPIED = 65536  # elements

    def __init__(self, module: nn.Module) -> None:
        self._owners = [(owner, isinstance(owner, _NormBase)) for owner in module.modules() if owner._buffers]
        self._saved: dict[tuple[int, str], tuple[Tensor | None, Tensor | None, int]] = {}  # buffer, copy, version
        self.save()

    def save(self) -> None:
        """Copies the buffers as they are now."""
        for index, (owner, is_norm) in enumerate(self._owners):
            for name, buffer in owner._buffers.items():
                if buffer is None:
                    self._saved[index, name] = None, None, 0
                    continue
                old, _, version = self._saved.get((index, name), (None, None, -1))
                is_always_copied = is_norm or buffer.numel() <= self._MAX_ALWAYS_COPIED
                if is_always_copied or old is not buffer or version != buffer._version:
                    self._saved[index, name] = buffer, buffer.detach().clone(), buffer._version

    def restore(self) -> None:
        """Restores the buffers as they were at the last `save`."""
        for (index, name), (buffer, saved, _) in self._saved.items():
            self._owners[index][0]._buffers[name] = buffer
            if buffer is not None and saved is not None:
                if buffer.shape == saved.shape:
                    copy_into(buffer.data, saved)
                else:
                    buffer.data = saved.clone()
