"""Checkpoints that many ranks write, each its share of the tensors, and that one of them commits for all.

Must not know what is in them.
"""

from __future__ import annotations

import errno
from collections.abc import Callable, Mapping
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from runner.checkpoint import shards
from runner.checkpoint.checkpoints import SHARDS, STRUCTURE, Checkpoints
from runner.utils import io
from runner.utils.distributed import run_on_rank_zero
from runner.utils.files import disk, remove_tree
from runner.utils.serialization import HostSnapshot, as_stored


def share(checkpoints: Checkpoints, timeout_s: float) -> ShardedCheckpoints:
    """Returns the checkpoints that all ranks write; all call it."""
    return ShardedCheckpoints(checkpoints, dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout_s)))


class ShardedCheckpoints:
    """Saves as `Checkpoints` do, on all ranks at once; every rank calls what it has, in a thread of its own if need be.

    Args:
        checkpoints: of the leader's folder, on a disk that all ranks share.
        group: of all ranks, on the CPU, that nothing else uses meanwhile.
    """

    def __init__(self, checkpoints: Checkpoints, group: dist.ProcessGroup) -> None:
        self._checkpoints, self._group = checkpoints, group
        self._commits = dist.get_rank(group) == 0
        self._mesh = DeviceMesh.from_group(group, "cpu")

    def save(
        self,
        step: int,
        parts: Mapping[str, HostSnapshot],
        facts: Mapping[str, Any],
        metric: Any = None,
        before_commit: Callable[[], None] | None = None,
        before_prune: Callable[[set[int]], bool] | None = None,
    ) -> Path:
        """Commits a checkpoint, and prunes older ones; the arguments are those of `Checkpoints.save`.

        Raises:
            OSError: the disk refused on one of the ranks; every earlier checkpoint is untouched.
            RankError: something else failed on one of them.
        """
        partial = self._of_leader(lambda: self._begin(step))
        tensors = {f"{part}/{name}": t for part, value in parts.items() for name, t in self._spread(value).items()}
        documents = {part: value.document for part, value in parts.items()}

        def commit() -> Path:
            io.write_new_json(documents, partial / STRUCTURE, indent=None)
            return self._checkpoints.commit(partial, step, facts, metric, before_commit, before_prune)

        try:
            shards.write(tensors, partial / SHARDS, self._group)
            return self._of_leader(commit)
        except BaseException:
            if self._commits:  # no other knows how far the one that commits has come
                remove_tree(partial)
            raise

    def _of_leader(self, work: Callable[[], Path]) -> Path:
        """Returns on every rank what the leader's work gave; what the disk refused it is an OSError on all."""

        def attempt() -> tuple[Path | None, tuple[int, str, str | None] | None]:
            try:
                return work(), None
            except OSError as error:
                name = None if error.filename is None else str(error.filename)
                return None, (error.errno or errno.EIO, error.strerror or str(error), name)

        path, refusal = run_on_rank_zero(attempt, self._group)
        if refusal is not None:
            raise OSError(*refusal)
        assert path is not None
        return path

    def _begin(self, step: int) -> Path:
        partial = self._checkpoints.begin(step)
        disk.make_folder(partial / SHARDS)
        return partial

    def _spread(self, value: HostSnapshot) -> dict[str, Any]:
        """Returns copies of this rank's parts as parts of the whole that they are of."""
        found: dict[str, Any] = {}
        for name, tensor in value.tensors.items():
            value.wait_for(name)
            whole = value.spread.get(name)
            found[name] = as_stored(tensor) if whole is None else self._part_of(whole, tensor)
        return found

    def _part_of(self, whole: DTensor, copy: Any) -> DTensor:
        stored = as_stored(torch.empty_strided(whole.shape, whole.stride(), dtype=whole.dtype, device="meta"))
        return DTensor.from_local(
            as_stored(copy), self._mesh, whole.placements, run_check=False, shape=stored.shape, stride=stored.stride()
        )
