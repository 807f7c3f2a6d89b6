"""Steps that go wrong: gradients that are not finite, and buffers taken back from a step that is discarded.

Must not import a config.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from runner.utils.weights import copy_into


class LateFaults:
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


class KeptBuffers:
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
