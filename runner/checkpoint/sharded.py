"""Saves checkpoints from all ranks.

Each writes its part of the tensors, and rank zero commits.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from runner.checkpoint import shards
from runner.checkpoint.checkpoints import SHARDS, STRUCTURE, Checkpoints
from runner.utils import io
from runner.utils.files import disk, remove_tree
from runner.utils.serialization import HostSnapshot, to_storable

T = TypeVar("T")


def make_sharded(checkpoints: Checkpoints, timeout_s: float) -> ShardedCheckpoints:
    """Returns a writer for checkpoints of all ranks.

    Every rank must call this function.
    """
    return ShardedCheckpoints(checkpoints, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))


class ShardedCheckpoints:
    """Saves checkpoints like `Checkpoints`, with every rank calling `save`.

    This may be done in a thread.

    Args:
        checkpoints: in a folder on a disk that all ranks share; only rank zero uses it.
        group: a process group of all ranks on the CPU, which nothing else uses.
    """

    def __init__(self, checkpoints: Checkpoints, group: dist.ProcessGroup) -> None:
        self._checkpoints, self._group = checkpoints, group
        self._is_rank_zero = dist.get_rank(group) == 0
        self._mesh = DeviceMesh.from_group(group, "cpu")

    def save(
        self,
        step: int,
        parts: Mapping[str, HostSnapshot],
        facts: Mapping[str, Any],
        metric: Any = None,
        before_commit: Callable[[], None] = lambda: None,
        before_prune: Callable[[set[int]], bool] = lambda steps: True,
    ) -> Path:
        """Commits a checkpoint and prunes older ones.

        For the arguments see `Checkpoints.save`.

        Raises:
            OSError: the disk refused on one of the ranks; every earlier checkpoint is untouched.
            RankError: something else failed on one of them.
        """
        partial = self._on_rank_zero(lambda: self._begin(step))
        tensors: dict[str, Any] = {}
        for part, value in parts.items():
            tensors |= {f"{part}/{name}": tensor for name, tensor in self._stored_tensors(value).items()}
        documents = {part: value.document for part, value in parts.items()}

        def commit() -> Path:
            io.write_new_json(documents, partial / STRUCTURE, indent=None)
            return self._checkpoints.commit(partial, step, facts, metric, before_commit, before_prune)

        try:
            shards.write(tensors, partial / SHARDS, self._group)
            return self._on_rank_zero(commit)
        except BaseException:
            if self._is_rank_zero:  # another rank can't know whether the commit was completed
                remove_tree(partial)
            raise

    def _on_rank_zero(self, work: Callable[[], T]) -> T:
        """Returns the result of rank zero's work on every rank. An OSError is raised on every rank too."""
        results = shards.run_on_all_ranks_raising_os_errors(lambda: work() if self._is_rank_zero else None, self._group)
        return cast(T, results[0])

    def _begin(self, step: int) -> Path:
        partial = self._checkpoints.begin(step)
        disk.make_folder(partial / SHARDS)
        return partial

    def _stored_tensors(self, value: HostSnapshot) -> dict[str, Any]:
        """Returns the copied tensors by name.

        A copied shard becomes a DTensor on the CPU again.
        """
        stored: dict[str, Any] = {}
        for name, tensor in value.tensors.items():
            value.wait_for_copy(name)
            original = value.dtensors.get(name)
            stored[name] = to_storable(tensor) if original is None else self._as_dtensor(original, tensor)
        return stored

    def _as_dtensor(self, original: DTensor, copy: Any) -> DTensor:
        """Returns a copy of this rank's shard as a DTensor placed like the original."""
        meta = to_storable(torch.empty_strided(original.shape, original.stride(), dtype=original.dtype, device="meta"))
        return DTensor.from_local(
            to_storable(copy), self._mesh, original.placements, run_check=False, shape=meta.shape, stride=meta.stride()
        )
