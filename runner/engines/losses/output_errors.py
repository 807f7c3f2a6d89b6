"""Errors of a forward whose call or return value does not fit, with the ways to adapt a model."""

from __future__ import annotations

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

from torch import nn

from runner.utils.train.failures import SetupError, TrainingStopped

_MAX_ENTRIES = 8  # of a nest that are described
_WAYS_TO_ADAPT = (
    "or give a feeder that returns one of these ({_target_: own.feed}, a function (module, batch)); or choose "
    "loss=cross_entropy, mse, ...: then the forward receives the input, and the loss its output and the target"
)


class OutputError(TrainingStopped, ValueError):
    """A forward returned something that can't be trained on or logged."""


class EarlyOutputError(OutputError, SetupError):
    """An `OutputError` in the first step, before anything was trained."""


def describe_value(value: Any) -> str:
    """Returns the type of a value in words, with its shape."""
    shape = getattr(value, "shape", None)
    return type(value).__name__ if shape is None else f"{type(value).__name__} of shape {list(shape)}"


def describe_nest(value: Any) -> str:
    """Returns the type of a value in words, with the entries of a mapping, tuple or list."""
    entries: list[str] = []
    if isinstance(value, Mapping):
        entries = [f"{key}: {describe_value(child)}" for key, child in value.items()]
    elif isinstance(value, (tuple, list)):
        entries = [describe_value(child) for child in value]
    if not entries:
        return describe_value(value)
    rest = [f"{len(entries) - _MAX_ENTRIES} more"] if len(entries) > _MAX_ENTRIES else []
    return f"{type(value).__name__} of ({', '.join([*entries[:_MAX_ENTRIES], *rest])})"


def describe_missing_loss(where: str, output: Any) -> str:
    """Returns the message for a forward that returned no loss."""
    return (
        f"{where} returned {describe_nest(output)}: expected a scalar loss, a mapping or object with `loss`, or `loss` "
        f"attributes on its modules; {_WAYS_TO_ADAPT}"
    )


def describe_missing_output(where: str, output: Any, missing: Sequence[str]) -> str:
    """Returns the message for a forward without the entries that metrics need."""
    return (
        f"{where} returned {describe_nest(output)}: the metrics need its {' and '.join(missing)}; return a mapping "
        "with loss, output and target; or choose a loss=..., whose output and target they then receive"
    )


def describe_call(module: nn.Module, arguments: Sequence[Any], keywords: Mapping[str, Any]) -> str | None:
    """Returns the message for a forward that does not accept the arguments; None if it does."""
    try:
        inspect.signature(module.forward).bind(*arguments, **keywords)
    except TypeError as error:
        batch = describe_nest(dict(keywords) if keywords else tuple(arguments))
        return (
            f"{type(module).__name__}.forward can't be called with {batch}: {error}; choose loss=cross_entropy, mse, "
            "...: then the forward receives the input without the target (data.target names it in a mapping, and "
            "data.input the input); or give a feeder ({_target_: own.feed}, a function (module, batch))"
        )
    except ValueError:  # it has no signature
        return None
    return None
