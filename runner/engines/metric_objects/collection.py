"""The configured metrics of one engine, updated with outputs and targets."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from runner.engines.losses.output_errors import EarlyOutputError, OutputError, describe_nest
from runner.engines.metric_objects.results import to_plain
from runner.utils.distributed import move
from runner.utils.distributed.memory import is_out_of_memory
from runner.utils.utils import add_note, describe


class Metric(Protocol):
    """A metric, as torchmetrics defines it. To be measured in training, it also has a state."""

    def update(self, output: Any, target: Any, /) -> Any: ...
    def compute(self) -> Any: ...
    def reset(self) -> Any: ...


class MetricCollection:
    """Metrics by name.

    On several ranks, every metric receives the batches of all ranks in their global order on rank zero, those of
    torchmetrics too, whose own synchronization is switched off. So each sees the same updates as on one process:
    sums of floats, lists and results that depend on the order have the same bits, and one rule holds for all objects.
    The price is that outputs and targets travel to rank zero.

    Raises:
        ValueError: a metric lacks a method; `needs_state`, and it has no state to save.
    """

    def __init__(self, metrics: Mapping[str, Any], device: torch.device, needs_state: bool = False) -> None:
        self._metrics = dict(metrics)
        self._device = device
        self._has_succeeded = False
        self.num_updates = 0
        for name, metric in self._metrics.items():
            missing = [method for method in ("update", "compute", "reset") if not hasattr(metric, method)]
            if missing:
                raise ValueError(f"metrics.{name}: {type(metric).__name__} has no {', '.join(missing)}")
            if isinstance(metric, nn.Module):
                metric.to(device)
            for part in _find_torchmetrics(metric):
                part.sync_on_compute = part.dist_sync_on_step = False
                part._to_sync = False
            has_state = hasattr(metric, "state_dict") and hasattr(metric, "load_state_dict")
            if needs_state and not has_state:
                raise ValueError(
                    f"train_metrics=true: metrics.{name}: expected state_dict() and load_state_dict(), so that a "
                    f"resumed run is exact; found {type(metric).__name__} without; add them, or set train_metrics=false"
                )

    @property
    def names(self) -> list[str]:
        """The names of the metrics."""
        return list(self._metrics)

    def reset(self) -> None:
        """Resets all metrics."""
        self.num_updates = 0
        for metric in self._metrics.values():
            metric.reset()

    def update(self, output: Any, target: Any) -> None:
        """Updates all metrics with a batch."""
        output, target = move((output, target), self._device)
        with torch.no_grad():
            for name, metric in self._metrics.items():
                try:
                    metric.update(output, target)
                except Exception as error:
                    if is_out_of_memory(error):
                        raise
                    place = f"metrics.{name}, of the output, a {describe_nest(output)}, and the target, "
                    place += f"a {describe_nest(target)}"
                    if self._has_succeeded:
                        add_note(error, f"in {place}")
                        raise
                    raise EarlyOutputError(f"{place}: {describe(error)}", is_complete=False) from error
        self._has_succeeded = True
        self.num_updates += 1

    def compute(self) -> dict[str, Any]:
        """Returns the results by name, as plain values; nothing without an update."""
        results = {}
        for name, metric in self._metrics.items() if self.num_updates else ():
            try:
                results[name] = to_plain(metric.compute())
            except Exception as error:
                raise OutputError(f"metrics.{name}: {describe(error)}") from error
        return results

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of each metric, for the middle of an interval of training."""
        states = {name: {"kind": type(m).__name__, **_state_of(m)} for name, m in self._metrics.items()}
        return {"updates": self.num_updates, "metrics": states}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a saved state; a metric without one, or whose saved state is of another kind, starts anew."""
        self.reset()
        if not state:
            return
        self.num_updates = int(state["updates"])
        for name, metric in self._metrics.items():
            saved = state["metrics"].get(name)
            if saved is not None and saved["kind"] == type(metric).__name__:
                _load_state(metric, move(saved, self._device), self._device)


def _find_torchmetrics(value: Any, depth: int = 4) -> Iterator[Any]:
    """Yields the metrics of torchmetrics that an object is or holds."""
    library = sys.modules.get("torchmetrics")
    if library is None or depth == 0:
        return
    if isinstance(value, nn.Module):
        yield from (part for part in value.modules() if isinstance(part, library.Metric))
    elif isinstance(value, Mapping):
        for child in value.values():
            yield from _find_torchmetrics(child, depth - 1)
    elif isinstance(value, (list, tuple)):
        for child in value:
            yield from _find_torchmetrics(child, depth - 1)
    elif hasattr(value, "__dict__") and not isinstance(value, type):
        yield from _find_torchmetrics(list(vars(value).values()), depth - 1)


def _named_torchmetrics(metric: Any) -> dict[str, Any]:
    if not isinstance(metric, nn.Module) or not list(_find_torchmetrics(metric)):
        return {}
    library = sys.modules["torchmetrics"]
    return {name: part for name, part in metric.named_modules() if isinstance(part, library.Metric)}


def _state_of(metric: Any) -> dict[str, Any]:
    """Returns the state of a metric: those of torchmetrics leave theirs out of `state_dict` by default."""
    parts = _named_torchmetrics(metric)
    if not parts:
        return {"state": metric.state_dict()}
    counts = {name: int(part._update_count) for name, part in parts.items()}
    return {"torchmetrics": {name: _copy(part.metric_state) for name, part in parts.items()}, "counts": counts}


def _copy(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _copy(child) for key, child in value.items()}
    return [_copy(child) for child in value] if isinstance(value, list) else value.detach().clone()


def _load_state(metric: Any, saved: Mapping[str, Any], device: torch.device) -> None:
    parts = _named_torchmetrics(metric)
    if not parts:
        metric.load_state_dict(saved["state"])
        return
    if any(not _fits(part, saved["torchmetrics"].get(name, {})) for name, part in parts.items()):
        return  # its arguments have changed
    for name, part in parts.items():
        for key in part.metric_state:
            setattr(part, key, _to_device(saved["torchmetrics"][name][key], device))
        part._update_count = saved["counts"][name]
        part._computed = None


def _fits(part: Any, states: Mapping[str, Any]) -> bool:
    """Returns whether saved states have the names and shapes of a torchmetrics object."""
    own = part.metric_state
    if own.keys() != states.keys():
        return False
    return all(
        getattr(value, "shape", None) == getattr(states[key], "shape", None)
        for key, value in own.items()
        if isinstance(value, Tensor)
    )


def _to_device(value: Any, device: torch.device) -> Any:
    if isinstance(value, (list, tuple)):
        return [_to_device(child, device) for child in value]
    assert isinstance(value, Tensor)
    return value.to(device)
