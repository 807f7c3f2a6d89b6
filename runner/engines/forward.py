"""How a module is called with a batch, and what it returns, read as a loss and numbers. Must not import a config."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

Feeder = Callable[[nn.Module, Any], Any]


def feed(module: nn.Module, batch: Any) -> Any:
    """Calls `module` with a mapping as keywords, a tuple or list as positions, anything else as it is."""
    if isinstance(batch, Mapping):
        return module(**batch)
    if isinstance(batch, (tuple, list)):
        return module(*batch)
    return module(batch)


def read_output(module: nn.Module, output: Any) -> tuple[Tensor, dict[str, Tensor], int]:
    """Returns the loss (0-d), the forward's other numbers (0-d each), and the tokens it counted.

    Raises:
        TypeError: there is no loss in it, nor on the module's modules.
    """
    if isinstance(output, Tensor) and output.numel() == 1:
        return (output.reshape(()) if output.ndim else output), {}, 0
    if isinstance(output, Mapping) and "loss" in output:
        extras = {
            str(name): value for name, value in output.items()
            if isinstance(value, Tensor) and value.ndim == 0 and name not in ("loss", "tokens")
        }  # fmt: skip
        return _scalar(output["loss"], module), extras, int(output.get("tokens", 0))
    loss = getattr(output, "loss", None)
    if not isinstance(loss, Tensor):
        loss = _collect_losses(module)
    if loss is None:
        raise TypeError(
            f"{type(module).__name__}.forward returned {_describe(output)}: expected a scalar loss, a mapping "
            "or object with `loss`, or `loss` attributes on its modules; or give a feeder that returns one of these"
        )
    return _scalar(loss, module), {}, 0


def _scalar(loss: Any, module: nn.Module) -> Tensor:
    if isinstance(loss, Tensor) and loss.numel() == 1:
        return loss.reshape(()) if loss.ndim else loss
    raise TypeError(
        f"{type(module).__name__}.forward: its loss is a {_describe(loss)}: expected a tensor with one number"
    )


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
