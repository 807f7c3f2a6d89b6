"""How a module is called with a batch, and what it returns, read as a loss and numbers. Must not import a config."""

from __future__ import annotations

import dataclasses
import logging
import math
import re
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor, nn

from runner.engines.hugging_face import count_terms, is_model_output
from runner.utils.train.failures import SetupError, TrainingStopped
from runner.utils.utils import encodable

Feeder = Callable[[nn.Module, Any], Any]
Number = Tensor | float  # a tensor (0-d) on an accelerator, which is not waited for; else a float

_log = logging.getLogger(__name__)
_MOST_REFUSED = 20  # values that are no metrics, each named in a warning
_NO_METRICS = ("loss", "tokens", "weight")
# What the runner logs under train/ itself.
_RESERVED = re.compile(r"lr(_\d+)?|grad_norm|loss_scale|step_time_s|(samples|tokens)_per_s|memory_gb")


class OutputError(TrainingStopped, ValueError):
    """A forward returned what can't be trained on or logged."""


class EarlyOutputError(OutputError, SetupError):
    """The first forward did so: nothing was trained yet."""


class Weight(NamedTuple):
    """The number of terms in a micro-batch's mean loss.

    Args:
        terms: the number itself.
        factor: how often the gradients of the mean loss count: the same, divided by the reader's `reference`.
        is_zero: 0-d bool on the loss's device; None where the number is known to be above 0.
    """

    terms: Number
    factor: Number
    is_zero: Tensor | None


class Output(NamedTuple):
    """The result of a forward.

    Args:
        loss: 0-d, to be differentiated.
        extras: its other numbers; with a weight also `loss`, the mean over the terms.
        tokens: counted for throughput.
        weight: None where the loss is a mean over samples.
    """

    loss: Tensor
    extras: dict[str, Number]
    tokens: int
    weight: Weight | None = None


def feed(module: nn.Module, batch: Any) -> Any:
    """Calls `module` with a mapping as keywords, a tuple or list as positions, anything else as it is."""
    if isinstance(batch, Mapping):
        return module(**batch)
    if isinstance(batch, (tuple, list)):
        return module(*batch)
    return module(batch)


def is_readable(tensor: Tensor) -> bool:
    """Says whether to read a tensor waits for no device."""
    return tensor.device.type == "cpu"


def read_number(value: Any) -> Number | None:
    """Returns a number as it is now, whatever becomes of its memory; None for what is no number.

    An accelerator's tensor is copied there, since reading it would wait for the device.
    """
    if isinstance(value, Tensor):
        if value.numel() != 1 or value.is_complex():
            return None
        if type(value) is not Tensor and hasattr(value, "full_tensor"):  # spread over the ranks, which all are here
            value = value.full_tensor()
        return float(value.item()) if is_readable(value) else value.detach().clone().reshape(())
    if getattr(value, "size", None) == 1 and hasattr(value, "item"):  # of NumPy
        value = value.item()
    try:
        return float(value) if isinstance(value, (int, float)) else None
    except OverflowError:
        return None


def keep(loss: Tensor) -> Number:
    """Returns a loss as it is now: the module may keep it, and write to it in place."""
    number = read_number(loss)
    assert number is not None
    return number


class OutputReader:
    """Reads what a module's forward returns: at once, as a module's buffers may change before numbers are logged.

    Args:
        decided: called in the first forward that is trained on, with whether it returned a weight: all do, or none.
    """

    def __init__(self, module: nn.Module, decided: Callable[[bool], None]) -> None:
        self._module, self._decided = module, decided
        self.share: float | None = None  # what a rank's batch counts for, 0 for nothing; None in evaluation
        self.multiplies = False  # a weighted loss counts as often as it has terms; else it is a step's only one
        self.reference: Number | None = None
        self._is_weighted: bool | None = None
        self._is_told = self.has_trained = False
        self._names, self._refused = dict[Any, str](), set[Any]()  # names as they are logged
        self._counter = count_terms(module)

    def __call__(self, output: Any) -> Output:
        """Returns an output's loss, numbers, tokens and weight.

        Raises:
            OutputError: there is no loss in it, nor on the module's modules, or the loss has no gradients; a number has
                a reserved name, or the weight is no number, or not always there.
        """
        if isinstance(output, Tensor) and output.numel() == 1:
            loss, fields = output.reshape(()) if output.ndim else output, _NO_FIELDS
        else:
            loss, fields = self._find_loss(output), _find_fields(output)
        if not loss.requires_grad and self.share is not None and torch.is_grad_enabled():
            remedy = "compute it from parameters that are trained, without detach(), item() or no_grad()"
            raise self._error(f"{self._where} returned a loss without gradients; {remedy}")
        extras = self._read_extras(output, fields) if fields else {}
        terms = fields.get("weight")
        if self._counter is not None:
            counted = self._counter.take()
            terms = counted if terms is None and is_model_output(output) else terms
        if self._is_weighted is not (terms is not None) or (not self._is_told and self.share is not None):
            self._decide(terms is not None)
        tokens = fields.get("tokens")
        tokens = 0 if tokens is None else int(tokens)
        return Output(loss, extras, tokens) if terms is None else self._weigh(loss, extras, tokens, terms)

    def _find_loss(self, output: Any) -> Tensor:
        if isinstance(output, Mapping) and "loss" in output:
            return self._scalar(output["loss"])
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            loss = _collect_losses(self._module)
        if loss is None:
            raise self._error(
                f"{self._where} returned {_describe(output)}: expected a scalar loss, a mapping "
                "or object with `loss`, or `loss` attributes on its modules; or give a feeder that returns one of these"
            )
        return self._scalar(loss)

    def _scalar(self, loss: Any) -> Tensor:
        if isinstance(loss, Tensor) and loss.numel() == 1:
            return loss.reshape(()) if loss.ndim else loss
        raise self._error(f"{self._where}: its loss is a {_describe(loss)}: expected a tensor with one number")

    def _error(self, message: str) -> OutputError:
        """Returns an error that costs a run the steps done so far only where there are any."""
        return OutputError(message) if self.has_trained else EarlyOutputError(message, is_whole=False)

    @property
    def _where(self) -> str:
        return f"{type(self._module).__name__.removeprefix('FSDP')}.forward"

    def _read_extras(self, output: Any, fields: Mapping[Any, Any]) -> dict[str, Number]:
        extras: dict[str, Number] = {}
        for name, value in fields.items():
            if name in _NO_METRICS:
                continue
            number = read_number(value)
            if number is None:
                if name not in self._refused:
                    self._refuse(output, name, value)
                continue
            if name not in self._names:
                self._accept(name)
            extras[self._names[name]] = number
        return extras

    def _accept(self, name: Any) -> None:
        if _RESERVED.fullmatch(str(name)):
            remedy = "as the runner names one of its own: call it something else"
            raise self._error(f"{self._where} returned a number named {name!r}, {remedy}")
        self._names[name] = encodable(str(name))

    def _refuse(self, output: Any, name: Any, value: Any) -> None:
        self._refused.add(name)
        if not is_model_output(output):
            kind = f" and {value.dtype}" if isinstance(value, Tensor) else ""
            found = f"{name!r} is a {_describe(value)}{kind}"
            rest = "; no further ones are named" if len(self._refused) == _MOST_REFUSED else ""
            if len(self._refused) <= _MOST_REFUSED:
                remedy = f"a metric is a number or a tensor with one{rest}"
                _log.warning("%s: %s, which is not logged; %s", self._where, found, remedy)

    def _decide(self, is_weighted: bool) -> None:
        if self._is_weighted not in (None, is_weighted):
            remedy = "return it always or never, also in evaluations: the losses would not count alike"
            raise self._error(f"{self._where} returned a weight in some forwards and not in others; {remedy}")
        self._is_weighted = is_weighted
        if self.share is not None:
            self._is_told = True
            self._decided(is_weighted)

    def _weigh(self, loss: Tensor, extras: dict[str, Number], tokens: int, found: Any) -> Output:
        terms = 0.0 if self.share == 0.0 else self._read_terms(found, loss)
        is_zero: Tensor | None = None
        if isinstance(terms, Tensor):
            is_zero = terms == 0
            extras = {name: _mask(value, is_zero) for name, value in extras.items()}
        elif not terms:
            is_zero = torch.ones((), dtype=torch.bool, device=loss.device)
            extras = dict.fromkeys(extras, 0.0)
        if is_zero is not None:  # a product would not do: 0 times NaN is NaN
            loss = loss.masked_fill(is_zero, 0.0)
        extras["loss"] = keep(loss)
        factor = terms if self.reference is None else terms / self.reference
        if self.multiplies and self.share is not None:
            loss = loss * factor
        return Output(loss, extras, tokens, Weight(terms, factor, is_zero))

    def _read_terms(self, found: Any, loss: Tensor) -> Number:
        if isinstance(found, Tensor) and not is_readable(found) and found.numel() == 1:
            dtype = torch.float64 if loss.dtype is torch.float64 else torch.float32
            return found.detach().to(loss.device, dtype, copy=True).reshape(())
        terms = read_number(found)
        if not isinstance(terms, float) or not 0 <= terms < math.inf:
            expected = "expected the number of terms in its mean loss, 0 or more"
            shown = _describe(found) if terms is None else terms
            raise self._error(f"{self._where} returned weight={shown}: {expected}")
        return terms


_NO_FIELDS: Mapping[Any, Any] = {}


def _find_fields(output: Any) -> Mapping[Any, Any]:
    """Returns what an output holds by name: of a mapping, named tuple, dataclass or other object with a loss."""
    if isinstance(output, Mapping):
        return output
    if isinstance(output, tuple) and hasattr(output, "_asdict"):
        fields: Mapping[Any, Any] = output._asdict()
        return fields
    if getattr(output, "loss", None) is None:
        return _NO_FIELDS
    if dataclasses.is_dataclass(output):
        return {field.name: getattr(output, field.name, None) for field in dataclasses.fields(output)}
    return getattr(output, "__dict__", _NO_FIELDS)


def _mask(value: Number, is_zero: Tensor) -> Number:
    """Returns 0 where the micro-batch counts for nothing: NaN times 0 is NaN."""
    if isinstance(value, Tensor):
        return value.masked_fill(is_zero.to(value.device), 0)
    if math.isfinite(value):
        return value
    return torch.full_like(is_zero, value, dtype=torch.float32).masked_fill(is_zero, 0.0)


def _collect_losses(module: nn.Module) -> Tensor | None:
    total: Tensor | None = None
    for each in module.modules():
        loss = vars(each).get("loss")
        if isinstance(loss, Tensor):
            total = loss if total is None else total + loss
            each.loss = None  # type: ignore[assignment]  # a stale one must not count twice
    return total


def _describe(output: Any) -> str:
    shape = getattr(output, "shape", None)
    return type(output).__name__ if shape is None else f"{type(output).__name__} of shape {list(shape)}"


class FirstStepHook(Protocol):
    """What looks at an engine's first step."""

    def prepared(self) -> None: ...
    def updated(self) -> bool: ...


class LossModule(nn.Module):
    """Calls feeder(module, batch) and reads its output.

    So a wrapper sees every tensor of the forward, a feeder sees the user's own module, and names stay the user's.
    """

    def __init__(self, module: nn.Module, feeder: Feeder, read: OutputReader) -> None:
        super().__init__()
        self.module = module
        self._run = lambda batch: read(feeder(module, batch))  # an attribute that is a module is slow
        self.explain: Callable[[RuntimeError], str | None] | None = None  # what an error is to be told as

    def wrap_next_forward(self, context: AbstractContextManager[None]) -> None:
        """Has the next forward that is trained on run in a context."""
        run = self._run

        def look(batch: Any) -> Output:
            if not torch.is_grad_enabled():
                return run(batch)
            self._run = run
            with context:
                return run(batch)

        self._run = look

    def forward(self, batch: Any) -> Output:
        """Returns what the module makes of a batch."""
        try:
            return self._run(batch)
        except RuntimeError as error:
            if self.explain is not None and (said := self.explain(error)) is not None:
                raise RuntimeError(said) from error
            raise


class FlaggedLossModule(nn.Module):
    """A `Fed` with a flag beside its loss: a parameter of one zero, whose gradient is 1 where the flag is up.

    It lies in a bucket among the other gradients, so that their exchange tells every rank whether one of them has its
    flag up. The loss is not changed by it, but counts `weight` times: the flag counts always. Where a parameter is of
    fp32 or fp64, the gradient of a second zero is the number of terms in weighted losses: bf16 would round it.

    Args:
        is_raised: asked in each forward whether this rank's flag is up.
        look: called with the output before that, where this rank is to look at its loss.
    """

    def __init__(
        self, loss_module: LossModule, is_raised: Callable[[], bool], look: Callable[[Output], None] | None
    ) -> None:
        super().__init__()
        self.loss_module = loss_module
        trained = [parameter for parameter in loss_module.parameters() if parameter.requires_grad]
        exact = next((each for dtype in _EXACT for each in trained if each.dtype is dtype), None)
        self.has_terms = exact is not None
        like = trained[0] if exact is None else exact
        self.flag = nn.Parameter(torch.zeros(1 + self.has_terms, device=like.device, dtype=like.dtype))
        self._trained = trained
        up = torch.zeros_like(self.flag.data)
        up[0] = 1
        self._values = torch.zeros_like(up), up
        self._is_raised, self._look = is_raised, look
        self.is_shadowing, self.weight = False, 1.0

    def forward(self, batch: Any) -> Output:
        """Returns the same; while it is making up, a loss that gives every parameter a gradient of zeros."""
        if self.is_shadowing:
            made_up = torch.stack([parameter.sum() * 0 for parameter in self._trained]).sum()
            return Output(made_up + torch.dot(self.flag, self._values[1]), {}, 0)
        output: Output = self.loss_module(batch)
        loss, weight = output.loss, output.weight
        if self._look is not None:
            self._look(output)
        if weight is None:
            loss = loss if self.weight == 1.0 else loss * self.weight
        elif self.has_terms:
            loss = loss + self.flag[1] * weight.factor
        return output._replace(loss=loss + torch.dot(self.flag, self._values[self._is_raised()]))


_EXACT = torch.float32, torch.float64
