"""Calls a module with a batch, and reads loss, metrics, tokens and weight."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from runner.engines.losses.output_errors import (
    EarlyOutputError,
    OutputError,
    describe_call,
    describe_missing_loss,
    describe_missing_output,
    describe_value,
)
from runner.engines.losses.transformers_loss_terms import count_terms, is_model_output
from runner.utils.utils import encodable

Feeder = Callable[..., Any]  # called as feeder(module, batch), or as feeder(module, batch, engines)
Number = Tensor | float  # a tensor (0-d) on an accelerator, since reading it would wait for the device; else a float

_log = logging.getLogger(__name__)
_MAX_WARNINGS = 20  # of values that are not metrics
_NOT_METRICS = ("loss", "tokens", "weight")
# Names of the runner's own metrics under train/.
_RESERVED = re.compile(r"lr(_\d+)?|grad_norm|loss_scale|step_time_s|(samples|tokens)_per_s|memory_gb")


class Weight(NamedTuple):
    """The weight of a micro-batch's mean loss.

    It is the number of terms in that mean, such as labels.

    Args:
        terms: the number of terms.
        factor: multiplies the gradients of the mean loss: `terms` divided by the reader's `reference_weight`.
        is_zero: 0-d bool on the loss's device; None if the number is known to be above 0.
    """

    terms: Number
    factor: Number
    is_zero: Tensor | None


class Output(NamedTuple):
    """The result of a forward.

    Args:
        loss: 0-d, with gradients.
        extras: its other numbers, which are logged; with a weight also `loss`, the mean over the terms.
        tokens: number of tokens, for throughput.
        weight: None if the loss is a mean over samples.
    """

    loss: Tensor
    extras: dict[str, Number]
    tokens: int
    weight: Weight | None = None


Forward = Callable[[Any], Output]  # called with a batch


def feed(module: nn.Module, batch: Any) -> Any:
    """Calls `module(**batch)` for a mapping, `module(*batch)` for a tuple or list.

    Any other batch is the single argument.
    """
    if isinstance(batch, (tuple, list)):
        return module(*batch)
    if isinstance(batch, Mapping):
        return module(**batch)
    return module(batch)


def arguments_of(batch: Any) -> tuple[Sequence[Any], Mapping[str, Any]]:
    """Returns the positional and keyword arguments that `feed` passes to a module."""
    if isinstance(batch, (tuple, list)):
        return batch, {}
    return ((), batch) if isinstance(batch, Mapping) else ((batch,), {})


def in_autocast(forward: Forward, device: torch.device, dtype: torch.dtype | None) -> Forward:
    """Returns a forward that runs in autocast with a dtype; without one, the forward itself."""
    if dtype is None:
        return forward
    autocast = torch.autocast(device.type, dtype)

    def forward_in_autocast(batch: Any) -> Output:
        with autocast:
            return forward(batch)

    return forward_in_autocast


def is_readable(tensor: Tensor) -> bool:
    """Returns whether a tensor can be read without waiting for a device."""
    return tensor.is_cpu


def read_number(value: Any) -> Number | None:
    """Returns a copy of a number, which the forward may overwrite.

    None if the value is not a single number. A tensor on an accelerator is copied there, since reading it would wait
    for the device.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        if type(value) is not Tensor and hasattr(value, "full_tensor"):  # a DTensor: all ranks run this
            value = value.full_tensor()
        return float(value.item()) if is_readable(value) else value.detach().clone().reshape(())
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):  # of NumPy
        value = value.item()
    try:
        return float(value) if isinstance(value, (int, float)) else None
    except OverflowError:
        return None


def as_number(loss: Tensor) -> Number:
    """Returns a copy of a loss, which the module may keep and write to in place."""
    if type(loss) is Tensor and is_readable(loss):
        return float(loss.item())
    number = read_number(loss)
    assert number is not None
    return number


class OutputReader:
    """Reads the output of a module's forward.

    Numbers are copied, since the module may overwrite them. Either all forwards return a weight, or none does.

    Args:
        on_weighted: called in the first training forward, with True if it returned a weight.
    Attributes:
        keeps_output: the next forward's output is kept for `take_output`.
    """

    def __init__(self, module: nn.Module, on_weighted: Callable[[bool], None]) -> None:
        self._module = module
        self._where = f"{type(module).__name__.removeprefix('FSDP')}.forward"  # for messages
        self._on_weighted = on_weighted
        self.batch_weight: float | None = None  # weight of this rank's batch, 0 ignores it; None in evaluation
        self.multiplies_by_weight = False  # false if the loss is the only one of its step: its weight cancels out
        self.reference_weight: Number | None = None
        self.has_trained = False
        self.not_metrics: tuple[str, ...] = _NOT_METRICS  # names that are not logged
        self.keeps_output = False  # metrics need the output and target of the next forward
        self._kept: tuple[Any, Mapping[Any, Any]] = None, _NO_FIELDS
        self._is_weighted: bool | None = None
        self._has_called_back = False
        self._logged_names = dict[Any, str]()
        self._rejected_names = set[Any]()
        self._counter = count_terms(module)

    def __call__(self, output: Any) -> Output:
        """Returns an output's loss, numbers, tokens and weight.

        Raises:
            OutputError: neither the output nor a submodule has a loss, or the loss has no gradients; a number has a
                reserved name; the weight is not a number, or is missing in some forwards.
        """
        if isinstance(output, Tensor) and output.numel() == 1:
            loss, fields = output.reshape(()) if output.ndim else output, _NO_FIELDS
        else:
            loss, fields = self._find_loss(output), _find_fields(output)
        if not loss.requires_grad and self.batch_weight is not None and torch.is_grad_enabled():
            raise self.error(
                f"{self._where} returned a loss without gradients; "
                "compute it from parameters that are trained, without detach(), item() or no_grad()"
            )
        if self.keeps_output:
            self._kept = output, fields
        extras = self._read_extras(output, fields) if fields else {}
        terms = fields.get("weight")
        if self._counter is not None:
            num_labels = self._counter.take()
            terms = num_labels if terms is None and is_model_output(output) else terms
        is_unreported = not self._has_called_back and self.batch_weight is not None
        if self._is_weighted is not (terms is not None) or is_unreported:
            self._set_weighted(terms is not None)
        tokens = fields.get("tokens")
        tokens = 0 if tokens is None else int(tokens)
        return Output(loss, extras, tokens) if terms is None else self._weigh(loss, extras, tokens, terms)

    def take_output(self, batch: Any, target_key: str | None) -> tuple[Any, Any]:
        """Returns the output and the target of the last forward, for metrics.

        They are the entries `output` and `target`, or else the logits of a transformers model and the batch's target.

        Raises:
            OutputError: there are none.
        """
        (output, fields), self._kept = self._kept, (None, _NO_FIELDS)
        found = {"output": fields.get("output", fields.get("logits")), "target": fields.get("target")}
        if found["target"] is None and target_key is not None and isinstance(batch, Mapping):
            found["target"] = batch.get(target_key)
        if missing := [name for name, value in found.items() if value is None]:
            raise self.error(describe_missing_output(self._where, output, missing))
        return found["output"], found["target"]

    def _find_loss(self, output: Any) -> Tensor:
        if isinstance(output, Mapping) and "loss" in output:
            return self._scalar(output["loss"])
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            loss = _collect_losses(self._module)
        if loss is None:
            raise self.error(describe_missing_loss(self._where, output))
        return self._scalar(loss)

    def _scalar(self, loss: Any) -> Tensor:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss.reshape(()) if loss.ndim else loss
        raise self.error(f"{self._where}: its loss is a {describe_value(loss)}: expected a tensor with one number")

    def error(self, message: str) -> OutputError:
        """Returns an error that is handled as a set-up error if no step was trained yet."""
        return OutputError(message) if self.has_trained else EarlyOutputError(message, is_complete=False)

    def _read_extras(self, output: Any, fields: Mapping[Any, Any]) -> dict[str, Number]:
        extras: dict[str, Number] = {}
        for name, value in fields.items():
            if name in self.not_metrics:
                continue
            number = read_number(value)
            if number is not None:
                if name not in self._logged_names:
                    self._accept(name)
                extras[self._logged_names[name]] = number
            elif name not in self._rejected_names:
                self._reject(output, name, value)
        return extras

    def _accept(self, name: Any) -> None:
        if _RESERVED.fullmatch(str(name)):
            raise self.error(
                f"{self._where} returned a number named {name!r}, as the runner names one of its own: "
                "call it something else"
            )
        self._logged_names[name] = encodable(str(name))

    def _reject(self, output: Any, name: Any, value: Any) -> None:
        self._rejected_names.add(name)
        if not is_model_output(output) and len(self._rejected_names) <= _MAX_WARNINGS:
            dtype = f" and {value.dtype}" if isinstance(value, Tensor) else ""
            rest = "; no further ones are named" if len(self._rejected_names) == _MAX_WARNINGS else ""
            message = "%s: %r is a %s%s, which is not logged; a metric is a number or a tensor with one%s"
            _log.warning(message, self._where, name, describe_value(value), dtype, rest)

    def _set_weighted(self, is_weighted: bool) -> None:
        if self._is_weighted not in (None, is_weighted):
            raise self.error(
                f"{self._where} returned a weight in some forwards and not in others; "
                "return it always or never, also in evaluations: the losses would not count alike"
            )
        self._is_weighted = is_weighted
        if self.batch_weight is not None:
            self._has_called_back = True
            self._on_weighted(is_weighted)

    def _weigh(self, loss: Tensor, extras: dict[str, Number], tokens: int, value: Any) -> Output:
        terms = 0.0 if self.batch_weight == 0.0 else self._read_terms(value, loss)
        is_zero: Tensor | None = None
        if isinstance(terms, Tensor):
            is_zero = terms == 0
            extras = {name: _mask(value, is_zero) for name, value in extras.items()}
        elif not terms:
            is_zero = torch.ones((), dtype=torch.bool, device=loss.device)
            extras = dict.fromkeys(extras, 0.0)
        if is_zero is not None:
            # Multiplying by 0 would not do: 0 times NaN is NaN.
            loss = loss.masked_fill(is_zero, 0.0)
        extras["loss"] = as_number(loss)
        factor = terms if self.reference_weight is None else terms / self.reference_weight
        if self.multiplies_by_weight and self.batch_weight is not None:
            loss = loss * factor
        return Output(loss, extras, tokens, Weight(terms, factor, is_zero))

    def _read_terms(self, value: Any, loss: Tensor) -> Number:
        if isinstance(value, Tensor) and not is_readable(value) and value.numel() == 1:
            dtype = torch.float64 if loss.dtype is torch.float64 else torch.float32
            return value.detach().to(loss.device, dtype, copy=True).reshape(())
        terms = read_number(value)
        if not isinstance(terms, float) or not 0 <= terms < math.inf:
            found = describe_value(value) if terms is None else terms
            raise self.error(
                f"{self._where} returned weight={found}: expected the number of terms in its mean loss, 0 or more"
            )
        return terms


_NO_FIELDS: Mapping[Any, Any] = {}


def _find_fields(output: Any) -> Mapping[Any, Any]:
    """Returns the fields of an output by name.

    The output is a mapping, named tuple, dataclass or other object with a loss.
    """
    if isinstance(output, Mapping):
        return output
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        return output._asdict()
    if getattr(output, "loss", None) is None:
        return _NO_FIELDS
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name, None) for field in dataclasses.fields(output)}
    return getattr(output, "__dict__", _NO_FIELDS)


def _mask(value: Number, is_zero: Tensor) -> Number:
    """Returns 0 if the micro-batch has weight 0, else the value.

    Multiplying would not do: NaN times 0 is NaN.
    """
    if isinstance(value, Tensor):
        return value.masked_fill(is_zero.to(value.device), 0)
    if math.isfinite(value):
        return value
    return torch.full_like(is_zero, value, dtype=torch.float32).masked_fill(is_zero, 0.0)


def _collect_losses(module: nn.Module) -> Tensor | None:
    total: Tensor | None = None
    for part in module.modules():
        loss = vars(part).get("loss")
        if isinstance(loss, Tensor):
            total = loss if total is None else total + loss
            part.loss = None  # type: ignore[assignment]  # a stale one must not count twice
    return total


class FirstStepHook(Protocol):
    """Checks an engine's first steps.

    `prepared` runs in `Engine.prepare`, and `updated` after each update. `updated` returns True when the checks are
    complete; the engine then drops the hook.
    """

    def prepared(self) -> None: ...
    def updated(self) -> bool: ...


class LossModule(nn.Module):
    """Calls feeder(module, batch) and reads its output: the module that DDP wraps.

    It contains the user's module, so that DDP sees every parameter, a feeder sees the user's own module, and the names
    of the parameters stay the user's.
    """

    def __init__(
        self,
        module: nn.Module,
        feeder: Feeder,
        read: OutputReader,
        arguments_of: Callable[[Any], tuple[Sequence[Any], Mapping[str, Any]]] | None = None,
    ) -> None:
        super().__init__()
        self.module = module
        self._feed = partial(feeder, module)  # reading `self.module` in each forward would be slow
        self._read = read
        self._arguments_of = arguments_of
        self.next_context: AbstractContextManager[None] | None = None  # of the next training forward
        self.explain_error: Callable[[RuntimeError], str | None] | None = None  # returns a clearer message

    def forward(self, batch: Any) -> Output:
        context = self.next_context
        try:
            if context is None or not torch.is_grad_enabled():
                return self._read(self._feed(batch))
            self.next_context = None
            with context:
                return self._read(self._feed(batch))
        except TypeError as error:
            if self._arguments_of is not None and not self._read.has_trained:
                self._explain_call(error, *self._arguments_of(batch))
            raise
        except RuntimeError as error:
            if self.explain_error is not None and (message := self.explain_error(error)) is not None:
                raise RuntimeError(message) from error
            raise

    def _explain_call(self, error: TypeError, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> None:
        """Raises a clearer error if the module does not accept the arguments."""
        message = describe_call(self.module, arguments, keywords)
        if message is not None:
            raise EarlyOutputError(message, is_complete=False) from error


class FlaggedLossModule(nn.Module):
    """A `LossModule` whose gradient all-reduce also reduces a flag and a weight.

    `flag` is an extra parameter of zeros. Its gradient is 1 on a rank whose flag is set. DDP reduces it in a bucket
    with the other gradients, so all ranks learn without another collective whether any flag is set. The value of the
    loss is unchanged. If a parameter is fp32 or fp64, `flag` has a second element whose gradient is the weight of the
    losses; bf16 would round that.

    Args:
        is_flag_set: called in each forward; returns whether this rank's flag is set.
        check_loss: called with each output before the flag is read, so that it can set the flag; None if unchecked.
    """

    def __init__(
        self, loss_module: LossModule, is_flag_set: Callable[[], bool], check_loss: Callable[[Output], None] | None
    ) -> None:
        super().__init__()
        self.loss_module = loss_module
        self._trained = [parameter for parameter in loss_module.parameters() if parameter.requires_grad]
        exact = next((p for dtype in (torch.float32, torch.float64) for p in self._trained if p.dtype is dtype), None)
        self.carries_weight = exact is not None
        like = self._trained[0] if exact is None else exact
        self.flag = nn.Parameter(torch.zeros(1 + self.carries_weight, device=like.device, dtype=like.dtype))
        self._flag_grads = torch.zeros_like(self.flag.data), torch.zeros_like(self.flag.data)  # cleared, set
        self._flag_grads[1][0] = 1
        self._is_flag_set = is_flag_set
        self._check_loss = check_loss
        self.is_shadowing = False
        self.batch_weight = 1.0

    def forward(self, batch: Any) -> Output:
        """Returns the output with the flag added to its loss.

        In a shadow step, a loss with zero gradients.
        """
        if self.is_shadowing:
            zero = torch.stack([parameter.sum() * 0 for parameter in self._trained]).sum()
            return Output(zero + torch.dot(self.flag, self._flag_grads[1]), {}, 0)
        output: Output = self.loss_module(batch)
        loss, weight = output.loss, output.weight
        if self._check_loss is not None:
            self._check_loss(output)
        if weight is None:
            loss = loss if self.batch_weight == 1.0 else loss * self.batch_weight
        elif self.carries_weight:
            loss = loss + self.flag[1] * weight.factor
        return output._replace(loss=loss + torch.dot(self.flag, self._flag_grads[self._is_flag_set()]))
