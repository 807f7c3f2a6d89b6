"""`runner.checkpoint.sharded`: one process loads the full state that several ranks saved."""

import errno
from collections import Counter, defaultdict

import numpy as np
import pytest
import torch
from ranks import run_ranks
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from runner.checkpoint import sharded
from runner.checkpoint.checkpoints import Checkpoints, load
from runner.utils.files.disk import confine
from runner.utils.serialization import HostSnapshot

EXTRA = {
    "set": {1, (2, "b")},
    "counter": Counter({3: 2}),
    "default": defaultdict(list, {"a": [1]}),
    "array": np.arange(6, dtype="<i2").reshape(2, 3),
    "scalar": np.float32(0.1),
    "device": torch.device("cuda:1"),
    "sparse": torch.eye(3).to_sparse(),
    "wide": torch.ones(1, 3).expand(4, 3),
    "double": torch.tensor([1 + 2j], dtype=torch.complex128),
    "fp4": torch.arange(3, dtype=torch.uint8).view(torch.float4_e2m1fn_x2),
}
SPREAD = {
    "rows": (torch.randn(5, 2, dtype=torch.complex128), Shard(0)),
    "columns": (torch.randn(2, 3, dtype=torch.complex128).conj(), Shard(1)),
    "bytes": (torch.arange(5, dtype=torch.uint8).view(torch.float8_e5m2), Shard(0)),
}


def save(folder, keep_last, steps):
    mesh = init_device_mesh("cpu", (2,))
    checkpoints = sharded.make_sharded(Checkpoints(folder, keep_last=keep_last), 60.0)
    for step in steps:
        spread = {
            name: distribute_tensor(whole, mesh, [place], src_data_rank=None) for name, (whole, place) in SPREAD.items()
        }
        parts = {"trainer": HostSnapshot({"_extra_state": EXTRA}), "structure": HostSnapshot(spread)}
        checkpoints.save(step, parts, {"step": step})


def test_any_value_that_one_process_stores_is_stored_by_several_ranks(tmp_path):
    run_ranks(2, save, tmp_path / "checkpoints", 3, [2])
    found = load(tmp_path / "checkpoints" / "step_00000002")
    assert found.keys() == {"trainer.json", "trainer", "structure"}
    extra = found["trainer"]["_extra_state"]
    for name in ("set", "counter", "default", "scalar", "device"):
        assert (type(extra[name]), extra[name]) == (type(EXTRA[name]), EXTRA[name])
    assert (extra["array"].dtype, extra["array"].tolist()) == (EXTRA["array"].dtype, EXTRA["array"].tolist())
    for name in ("sparse", "wide"):
        assert torch.equal(extra[name].to_dense(), EXTRA[name].to_dense())
    assert torch.equal(extra["double"], EXTRA["double"])
    assert torch.equal(extra["fp4"].view(torch.uint8), EXTRA["fp4"].view(torch.uint8))
    for name, (whole, _) in SPREAD.items():
        assert (found["structure"][name].dtype, found["structure"][name].shape) == (whole.dtype, whole.shape)
        assert torch.equal(found["structure"][name].view(torch.uint8), whole.resolve_conj().view(torch.uint8))


def test_rotation_counts_complete_checkpoints_alone_on_several_ranks(tmp_path):
    run_ranks(2, save, tmp_path / "checkpoints", 0, [2, 4, 10])
    shard = tmp_path / "checkpoints" / "step_00000004" / "shards" / "shard-00000.safetensors"
    shard.write_bytes(shard.read_bytes()[:-1])
    (tmp_path / "checkpoints" / "step_00000010" / "MANIFEST.json").unlink()
    run_ranks(2, save, tmp_path / "checkpoints", 2, [6])
    left = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert left == [f"step_{step:08d}" for step in (2, 4, 6, 10)]


def save_behind_a_link(folder):
    with confine(folder.parent), pytest.raises(OSError, match="a link, which is not followed") as caught:
        save(folder, 0, [2])
    assert (caught.value.errno, caught.value.filename) == (errno.ELOOP, str(folder))


def test_what_the_disk_refuses_to_the_leader_is_the_same_error_on_every_rank(tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "decoy").mkdir()
    (tmp_path / "run" / "checkpoints").symlink_to(tmp_path / "decoy")
    run_ranks(2, save_behind_a_link, tmp_path / "run" / "checkpoints")
    assert list((tmp_path / "decoy").iterdir()) == []
