"""Histograms of gradients and weights in TensorBoard."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from runner.callbacks.run_view import RunView
from runner.tracking.media import Histogram, read_histogram
from runner.utils.modules.selection import match_parameters
from runner.utils.train.failures import SetupError
from runner.utils.utils import checked_int


class Histograms:
    """Shows histograms of gradients and weights every `every` steps, as `gradients/<name>` and `weights/<name>`.

    Gradients are those that the optimizer gets: averaged over the ranks, unscaled and clipped. They are counted on
    their device just before the update of a step that is due; other steps have no cost. Sharded tensors are gathered
    one by one. A gradient that a step lacks is not shown.

    Args:
        every: steps between histograms, at least 1.
        match: globs over the names of parameters, such as `layers.0.*`; those that are trained are shown. With several
            engines, a name begins with that of its engine.
    Raises:
        ValueError: an argument is out of its range.
    """

    def __init__(
        self, every: int = 100, gradients: bool = True, weights: bool = True, match: Sequence[str] = ("*",)
    ) -> None:
        self.every = checked_int("every", every, 1)
        self.gradients = gradients
        self.weights = weights
        self.match = match
        self._parameters: dict[str, Tensor] = {}  # that match, by name
        self._gradients: dict[str, Histogram | None] = {}  # of the step in progress
        self._hooks: list[Any] = []  # on the optimizers, for a step that is due

    def on_start(self, view: RunView) -> None:
        named: dict[str, Tensor] = {}
        for engine_name, engine in view.engines.items():
            prefix = f"{engine_name}." if len(view.engines) > 1 else ""
            trained = engine.module.named_parameters() if engine.optimizer is not None else ()
            named |= {f"{prefix}{name}": parameter for name, parameter in trained if parameter.requires_grad}
        try:
            self._parameters = {name: named[name] for name in match_parameters("match", named, self.match)}
        except ValueError as error:
            raise SetupError(str(error), is_complete=False) from error
        self._watch_next(view)

    def on_step(self, view: RunView) -> None:
        if self._hooks:  # the step was due, or the one before it that was skipped
            for hook in self._hooks:
                hook.remove()
            self._hooks = []
            for name, gradient in self._gradients.items():
                if gradient is not None:
                    view.histogram(f"gradients/{name}", gradient)
            self._gradients = {}
        if self.weights and view.step % self.every == 0:
            for name, parameter in self._parameters.items():
                weight = _count(name, parameter.detach(), view.is_rank_zero)
                if weight is not None:
                    view.histogram(f"weights/{name}", weight)
        self._watch_next(view)

    def _watch_next(self, view: RunView) -> None:
        """Has the optimizers count the gradients of the next step if that is due."""
        if not self.gradients or (view.step + 1) % self.every:
            return
        is_counted = view.is_rank_zero
        for engine in view.engines.values():
            if engine.optimizer is None:
                continue
            groups = engine.optimizer.param_groups
            own = {id(parameter) for group in groups for parameter in group["params"]}
            parameters = {name: p for name, p in self._parameters.items() if id(p) in own}

            def count(*_: Any, parameters: dict[str, Tensor] = parameters) -> None:
                for name, parameter in parameters.items():
                    if parameter.grad is not None:
                        self._gradients[name] = _count(name, parameter.grad.detach(), is_counted)

            self._hooks.append(engine.optimizer.register_step_pre_hook(count))


def _count(name: str, tensor: Tensor, is_counted: bool) -> Histogram | None:
    """Returns the histogram of a tensor, gathered from the shards of all ranks; None on ranks that do not count."""
    if hasattr(tensor, "full_tensor"):
        tensor = tensor.full_tensor()
    if not is_counted:
        return None
    return read_histogram(name, tensor.coalesce().values() if tensor.is_sparse else tensor)
