"""An engine's gradients, from backward to the optimizer: scaled, unscaled, looked at, clipped.

Must not import a config.
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

from runner.engines.dynamo import clear_gradients
from runner.engines.forward import Number, Weight, is_readable
from runner.engines.strategies import Strategy
from runner.utils.modules.weights import copy_into


class DeferredFiniteCheck:
    """Losses and norms of steps already done, on a device that was not waited for, until somebody looks."""

    _MOST = 1024  # sums kept one by one; older ones become one, so that a run that never logs needs no more memory

    def __init__(self) -> None:
        self._totals: list[tuple[int, int, Tensor]] = []  # first step, last step, their sum (0-d)

    def note(self, step: int, numbers: Sequence[Tensor | float]) -> None:
        """Takes the numbers (0-d each) of a step."""
        if len(self._totals) >= self._MOST:
            first, last = self._totals[0][0], self._totals[-1][1]
            self._totals = [(first, last, self._stacked().sum())]  # a sum with an infinity or NaN in it stays one
        tensors = [number for number in numbers if isinstance(number, Tensor)]
        read = float(sum(number for number in numbers if isinstance(number, float)))
        if tensors:
            # A module over several devices may return its loss from the CPU; the accelerator is not waited for.
            device = next((number.device for number in tensors if number.device.type != "cpu"), tensors[0].device)
            total = torch.stack([number.to(device).float() for number in tensors]).sum() + read
        else:
            total = torch.tensor(read)
        self._totals.append((step, step, total))

    def _stacked(self) -> Tensor:
        return torch.stack([total for _, _, total in self._totals])

    def find(self) -> str | None:
        """Returns what was not finite in the steps since the last call."""
        if not self._totals:
            return None
        values = self._stacked().tolist()
        totals, self._totals = self._totals, []
        for (first, last, _), value in zip(totals, values, strict=True):
            if not math.isfinite(value):
                where = f"its step {first}" if first == last else f"one of its steps {first} to {last}"
                return f"in {where} the loss or the gradients were not finite, and the update was made"
        return None


def describe_loss(value: float, part: int | None, named: Iterable[tuple[str, Tensor]]) -> str:
    """Tells of a loss that is not finite: of which micro-step, and which gradients are largest."""
    where = "" if part is None else f" of micro-step {part}"
    return f"its loss{where} is {value}; largest gradients: {describe_gradients(named) or 'none'}"


class FiniteCheck:
    """Says whether all gradients of some parameters are finite, in one pass over them and a read of one number."""

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
        for group, found, one in self._groups:
            grads = [_values(grad) for parameter in group if (grad := parameter.grad) is not None]
            if grads:
                # The loss scaler's own check, times 1: a fifth of what a norm costs where many gradients are small.
                torch._amp_foreach_non_finite_check_and_unscale_(grads, found, one)
            if found.item():
                found.zero_()
                is_finite = False
        return is_finite


def _values(grad: Tensor) -> Tensor:
    grad = _local(grad)
    return grad._values() if grad.is_sparse else grad


def _local(grad: Tensor) -> Tensor:
    """Returns this rank's part of a gradient that is spread over several."""
    part: Tensor = grad if type(grad) in (Tensor, nn.Parameter) else getattr(grad, "_local_tensor", grad)
    return part


def describe_gradients(named: Iterable[tuple[str, Tensor]], count: int = 3) -> str:
    """Names the parameters whose gradients are largest, those that are not finite first."""
    found = []
    for name, parameter in named:
        if parameter.grad is not None:
            grad = _values(parameter.grad.detach())
            if not grad.numel():
                continue
            num_bad = int((~torch.isfinite(grad)).sum())
            largest = float(torch.nan_to_num(grad, nan=0.0, posinf=0.0, neginf=0.0).abs().max())
            found.append((num_bad, largest, name, grad.numel()))
    found.sort(key=lambda each: (each[0] == 0, -each[1]))
    return ", ".join(
        f"{name} ({num_bad} of {total} not finite)" if num_bad else f"{name} (up to {largest:.3g})"
        for num_bad, largest, name, total in found[:count]
    )


class GradientMask:
    """Makes the gradients of one backward zeros where its micro-batch counts for nothing, even if they are NaN.

    A loss of 0 would not do: the derivative of a mean over nothing is NaN, and so is 0 times that.
    """

    def __init__(self) -> None:
        self._is_zero: Tensor | None = None
        self._seen: set[int] = set()

    @contextlib.contextmanager
    def __call__(self, is_zero: Tensor, leaves: Sequence[Tensor]) -> Iterator[None]:
        """Masks what backward gives the leaves in a block.

        Args:
            is_zero: 0-d bool; the device is not waited for.
        """
        for leaf in leaves:
            if leaf.requires_grad and id(leaf) not in self._seen:
                self._seen.add(id(leaf))
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


_MOST_COPIED = 65536  # elements of a buffer that is copied at each step, however it is written to


class BufferSnapshot:
    """What a module's buffers were at the last `keep`, so that a step that is discarded leaves no statistics behind.

    A large buffer is copied only when its version says that it was written to since; running statistics, to which torch
    writes without telling, and small buffers always. A write through `.data` to a large one goes unseen.
    """

    def __init__(self, module: nn.Module) -> None:
        self._owners = [(owner, isinstance(owner, _NormBase)) for owner in module.modules() if owner._buffers]
        self._kept: dict[tuple[int, str], tuple[Tensor | None, Tensor | None, int]] = {}
        self.keep()

    def keep(self) -> None:
        """Notes what the buffers are now."""
        for index, (owner, is_silent) in enumerate(self._owners):
            for name, buffer in owner._buffers.items():
                if buffer is None:
                    self._kept[index, name] = None, None, 0
                    continue
                old, _, version = self._kept.get((index, name), (None, None, -1))
                if is_silent or buffer.numel() <= _MOST_COPIED or old is not buffer or version != buffer._version:
                    self._kept[index, name] = buffer, buffer.detach().clone(), buffer._version

    def restore(self) -> None:
        """Makes the buffers what they were."""
        for (index, name), (buffer, copy, _) in self._kept.items():
            self._owners[index][0]._buffers[name] = buffer
            if buffer is not None and copy is not None:
                if buffer.shape == copy.shape:
                    copy_into(buffer.data, copy)
                else:
                    buffer.data = copy.clone()


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
        self.looks_late = on_nonfinite == "stop" and device.type != "cpu"
        self.scaler = torch.amp.GradScaler(device.type) if is_scaled and optimizer else None
        self.trained = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        self._is_finite = FiniteCheck(self.trained)
        self.late = DeferredFiniteCheck()
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
            self._strategy.weight = (
                weight.factor if self._strategy.weight is None else self._strategy.weight + weight.factor
            )
            if weight.is_zero is not None:
                with self._mask(weight.is_zero, self._strategy.leaves(self.trained)):
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
        norm = self._strategy.norm(self.trained) if self._clip_norm else None
        if norm is not None:
            self.norm = norm
        if self.looks_late:
            self.late.note(step, [*losses, *([] if norm is None else [norm])])
        elif fault := self._find_fault(norm):
            return fault
        factor: Number | None = None
        if self._strategy.weight is not None:  # after what may have brought those of other ranks along
            total = self._read_total()
            if isinstance(total, float) and not total:
                return EMPTY
            factor = self._invert(total) if self.divides else None
        if factor is not None:
            if norm is not None:
                self.norm = norm = norm * factor
            # One pass over the gradients divides and clips.
            clipped = 1.0 if norm is None else torch.clamp(self._clip_norm / (norm + 1e-6), max=1.0)
            self._strategy.scale(self.trained, factor * clipped)
        elif norm is not None:
            self._strategy.clip(self.trained, self._clip_norm, norm)
        return None

    def _read_total(self) -> Number:
        """Returns the mean over the ranks of the weights of a step; a float where no device is waited for."""
        scale = None if self.scaler is None else self.scaler.scale(torch.ones((), device=self._device))
        total = self._strategy.mean_weight(scale)
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
        if math.isfinite(float(norm)) if norm is not None else self._strategy.is_true(self._is_finite()):
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
        self._strategy.reset_step()
        return taken

    def discard(self) -> None:
        """Forgets them, wherever they were on the way."""
        self._module.zero_grad(set_to_none=True)
        self._strategy.reset_step()
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
