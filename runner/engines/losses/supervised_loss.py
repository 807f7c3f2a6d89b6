"""A loss chosen by config: loss(output, target), for a module that returns its output alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from runner.engines.losses.output_errors import EarlyOutputError, OutputError, describe_nest, describe_value
from runner.utils.distributed.memory import is_out_of_memory
from runner.utils.utils import add_note, message_of, suggest

Arguments = tuple[Sequence[Any], Mapping[str, Any]]

_ELEMENTWISE = (nn.MSELoss, nn.L1Loss, nn.HuberLoss, nn.SmoothL1Loss, nn.BCELoss, nn.BCEWithLogitsLoss)


class SupervisedLoss:
    """Feeds a batch's input to a module, and calls loss(output, target).

    A batch (input, ..., target) is a tuple or list: the module receives all but the last entry. Of a mapping, `target`
    is the key of the target; the module receives the entries `inputs` in their order, or by keyword all others.

    The loss receives the module's output; if that is a mapping or object with `logits`, as of transformers, the logits.
    It returns a mean over samples, or a mapping with `loss` and optionally `weight` and other numbers.

    A mean of `torch.nn.CrossEntropyLoss` or `NLLLoss` has a weight: the number of its terms, which are the targets
    other than `ignore_index`, each counted by its class weight. Accumulated micro-steps, ranks and evaluations are then
    exact means over all terms.

    Args:
        function: the loss; a module's buffers are moved to the device by `to`.
        target: the key of the target in a batch that is a mapping.
        inputs: the keys of the input in a batch that is a mapping; None is all but the target, by keyword.
    Raises:
        ValueError: the loss is a sum or has parameters, which no optimizer trains and no checkpoint holds.
    """

    def __init__(
        self, function: Callable[..., Any], target: str | None = None, inputs: Sequence[str] | None = None
    ) -> None:
        self.function = function
        self._target = target
        self._inputs = inputs
        self._name = type(function).__name__ if isinstance(function, nn.Module) else "the loss"
        self._is_elementwise = isinstance(function, _ELEMENTWISE)
        self._counts_terms = isinstance(function, (nn.CrossEntropyLoss, nn.NLLLoss))
        self._has_succeeded = False
        self.feeder: Callable[[nn.Module, Any], Any] | None = None  # called in place of the module
        reduction = getattr(function, "reduction", "mean") if isinstance(function, nn.Module) else "mean"
        if reduction in ("sum", "none"):
            raise ValueError(f"reduction={reduction}: expected mean: micro-steps and ranks are averaged")
        if isinstance(function, nn.Module) and any(True for _ in function.parameters()):
            raise ValueError(
                f"{self._name} has parameters, which no optimizer would train and no checkpoint would hold; "
                "make it a part of the model"
            )

    def to(self, device: torch.device) -> None:
        """Moves the buffers of the loss, such as class weights, to a device."""
        if isinstance(self.function, nn.Module):
            self.function.to(device)

    def __call__(self, module: nn.Module, batch: Any) -> dict[str, Any]:
        """Returns `loss`, the `output` and `target` that it was computed from, and its `weight` if it has one.

        Raises:
            OutputError: the batch has no target, or the loss does not accept the output and the target.
        """
        target, arguments, keywords = self._split(batch)
        output = module(*arguments, **keywords) if self.feeder is None else self.feeder(module, batch)
        output = _find_logits(output)
        if self._is_elementwise and _shape_of(output) != _shape_of(target):
            raise self._error(f"{_describe(output, target)}: expected equal shapes, or torch would repeat the smaller")
        try:
            loss = self.function(output, target)
        except Exception as error:
            if is_out_of_memory(error):
                raise
            if self._has_succeeded:
                add_note(error, f"in {self._name}, of {_describe(output, target)}")
                raise
            raise self._error(f"{message_of(error)} (of {_describe(output, target)})") from error
        self._has_succeeded = True
        fields = {"output": output, "target": target}
        if isinstance(loss, Mapping):
            return {**fields, **loss}
        if self._counts_terms and isinstance(output, Tensor) and isinstance(target, Tensor):
            fields["weight"] = self._count(output, target)
        return {**fields, "loss": loss}

    def arguments_of(self, batch: Any) -> Arguments:
        """Returns the positional and keyword arguments of the module."""
        return self._split(batch)[1:]

    def _split(self, batch: Any) -> tuple[Any, Sequence[Any], Mapping[str, Any]]:
        """Returns the target, and the positional and keyword arguments of the module."""
        if isinstance(batch, Mapping):
            target = self._target
            if target is None or target not in batch:
                expected = "null" if target is None else target
                raise self._error(
                    f"data.target={expected}: expected the key of the target, {suggest(str(target), list(batch))}; "
                    f"found a batch {describe_nest(batch)}"
                )
            if self._inputs is None:
                return batch[target], (), {key: value for key, value in batch.items() if key != target}
            if missing := [key for key in self._inputs if key not in batch]:
                raise self._error(f"data.input: expected keys of the batch, {suggest(missing[0], list(batch))}")
            return batch[target], [batch[key] for key in self._inputs], {}
        if isinstance(batch, (tuple, list)) and len(batch) > 1:
            return batch[-1], batch[:-1], {}
        raise self._error(
            f"expected batches (input, ..., target), or mappings with data.target; found {describe_nest(batch)}"
        )

    def _count(self, output: Tensor, target: Tensor) -> Tensor | int:
        """Returns the number of terms in the mean, each counted by its class weight."""
        if target.is_floating_point():  # probabilities of the classes
            return output.numel() // output.shape[min(1, output.ndim - 1)]
        is_ignored = target == self.function.ignore_index  # type: ignore[attr-defined]
        weights = self.function.weight  # type: ignore[attr-defined]
        if weights is None:
            return target.numel() - is_ignored.sum()
        return weights[target.masked_fill(is_ignored, 0)].masked_fill(is_ignored, 0).sum()

    def _error(self, message: str) -> OutputError:
        message = f"loss={self._name}: {message}"
        return OutputError(message) if self._has_succeeded else EarlyOutputError(message, is_complete=False)


def _find_logits(output: Any) -> Any:
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping):
        return output.get("logits", output)
    return getattr(output, "logits", output)


def _shape_of(value: Any) -> Any:
    return getattr(value, "shape", None)


def _describe(output: Any, target: Any) -> str:
    described = []
    for name, value in (("output", output), ("target", target)):
        dtype = f" and {value.dtype}" if isinstance(value, Tensor) else ""
        described.append(f"the {name}, a {describe_value(value)}{dtype}")
    return " and ".join(described)
