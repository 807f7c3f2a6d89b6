"""Metrics measured on the outputs of training steps."""

from __future__ import annotations

import copy
import logging
from collections.abc import Mapping
from typing import Any

import torch

from runner.engines.metric_objects.collection import MetricCollection
from runner.engines.metric_objects.results import flatten
from runner.utils.distributed import is_distributed, is_rank_zero, nests, run_on_all_ranks
from runner.utils.train.failures import TrainingStopped

_log = logging.getLogger(__name__)
_MAX_KEPT = 16  # micro-steps whose outputs wait for the other ranks


class TrainingMetrics:
    """Metrics of the micro-steps since they were last taken.

    `rollback` drops the micro-steps since the last `commit`: a step that is discarded or skipped is not measured. On
    one process `commit` updates the metrics. On several ranks the outputs wait until `share`, or until there are 16:
    then rank zero receives those of all ranks, and updates in the order of micro-steps and ranks.

    Args:
        is_sharded: each rank writes a part of the checkpoint, so all ranks need the state.
    """

    def __init__(self, collection: MetricCollection, is_sharded: bool = False) -> None:
        self._collection = collection
        self._is_sharded = is_sharded
        self._pending: list[tuple[Any, Any] | None] = []  # since the last commit; None for a batch that is not counted
        self._kept: list[tuple[Any, Any] | None] = []
        self._has_checked_state = False
        self._has_warned = False

    def add(self, output_and_target: tuple[Any, Any] | None) -> None:
        """Adds the output and target of a micro-step; None for one that is not counted."""
        structure, tensors = nests.pack(output_and_target)
        # Copies, since a module may write to its output again.
        self._pending.append(nests.unpack(structure, iter([tensor.clone() for tensor in tensors])))

    def rollback(self) -> None:
        """Drops the micro-steps since the last `commit`."""
        self._pending.clear()

    def commit(self) -> None:
        """Measures the micro-steps so far, or has them wait for the other ranks; all ranks call it."""
        self._kept += self._pending
        self._pending.clear()
        if not is_distributed():
            self._update_all([self._kept])
            self._kept.clear()
        elif len(self._kept) >= _MAX_KEPT:
            self._exchange()

    def _update_all(self, kept_by_rank: list[list[tuple[Any, Any] | None]]) -> None:
        for outputs in zip(*kept_by_rank, strict=True):
            for output_and_target in outputs:
                if output_and_target is not None:
                    self._update(*output_and_target)

    def _update(self, output: Any, target: Any) -> None:
        before = None if self._has_checked_state else nests.pack(self._collection.state_dict())
        self._collection.update(output, target)
        if before is not None:
            self._has_checked_state = True
            self._check_state(before, nests.pack(self._collection.state_dict()))

    def _check_state(self, before: tuple[Any, list[Any]], after: tuple[Any, list[Any]]) -> None:
        """Checks that the state of each metric has changed with its first update."""
        states = [nests.unpack(structure, iter(tensors))["metrics"] for structure, tensors in (before, after)]
        for name in self._collection.names:
            (one, one_tensors), (other, other_tensors) = (nests.pack(state[name]) for state in states)
            if one == other and all(map(torch.equal, one_tensors, other_tensors)):
                raise TrainingStopped(
                    f"train_metrics=true: metrics.{name}: expected a state_dict() that changes with an update, so that "
                    "a resumed run is exact; found one that does not; add what update changes, such as buffers of a "
                    "module, or set train_metrics=false",
                    is_complete=False,
                )

    def _exchange(self) -> None:
        """Updates rank zero's metrics with the outputs of all ranks; every rank calls it."""
        packed: list[list[Any]] = []

        def pack() -> Any:
            structure, tensors = nests.pack(self._kept)
            packed.append(tensors)
            return structure

        structures = run_on_all_ranks(pack)
        kept_by_rank = list(nests.exchange(structures, packed[0]))
        self._kept.clear()
        run_on_all_ranks(lambda: self._update_all(kept_by_rank) if is_rank_zero() else None)

    def share(self) -> None:
        """Measures the outputs of all ranks that wait; every rank calls it."""
        if not is_distributed():
            return
        self._exchange()
        if self._is_sharded:
            state = nests.broadcast(self._collection.state_dict())
            if not is_rank_zero():
                self._collection.load_state_dict(state)

    def take(self) -> dict[str, Any]:
        """Returns the results by name, the same on every rank, and resets the metrics; every rank calls it."""
        computed = run_on_all_ranks(lambda: self._collection.compute() if is_rank_zero() else {})[0]
        self._collection.reset()
        items: dict[str, Any] = {}
        for name, plain in computed.items():
            items |= flatten(name, plain)
        numbers = {name: value for name, value in items.items() if isinstance(value, float)}
        if not self._has_warned and (others := sorted(items.keys() - numbers)):
            self._has_warned = True
            _log.warning("metrics: of training steps only numbers are logged, evaluations also show %s", others[0])
        return numbers

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of the metrics.

        Without `share` before, as where the ranks are disconnected, it includes this rank's own outputs that wait.
        """
        if not self._kept or not is_rank_zero():
            return self._collection.state_dict()
        collection = copy.deepcopy(self._collection)
        for output_and_target in filter(None, self._kept):
            collection.update(*output_and_target)
        return collection.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Loads a saved state; an empty one resets the metrics."""
        self._pending.clear()
        self._kept.clear()
        self._collection.load_state_dict(state)
