import threading
from unittest import mock

import pytest
import torch

from runner.checkpoint.checkpoints import Checkpoints, load
from runner.checkpoint.saver import Saver
from runner.utils.serialization import HostSnapshot


class Told:
    """Returns a saver on a folder, and the list of its callbacks' calls."""

    def __init__(self, folder):
        self.saved, self.failed = [], []
        self.may_commit = threading.Event()
        self.may_commit.set()
        self.saver = Saver(
            Checkpoints(folder),
            before_commit=lambda: self.may_commit.wait(10) or None,
            saved=lambda step, path: self.saved.append(step),
            failed=lambda step, error: self.failed.append((step, str(error))),
        )


def make_parts(value):
    weight = torch.full((1000,), float(value))
    return {"model": {"weight": weight, "tied": weight, "name": str(value)}, "model.optimizer": {"step": value}}


def test_what_becomes_of_the_state_after_the_call_is_not_saved(tmp_path):
    told = Told(tmp_path)
    told.may_commit.clear()
    parts = make_parts(1)
    for step in (1, 2):  # the second is written over the memory of the first
        parts["model"]["weight"].fill_(step)
        told.saver.save(step, parts, {"step": step})
        parts["model"]["weight"].fill_(-1.0)
        told.may_commit.set()
    told.saver.close()
    assert told.saved == [1, 2]
    for step in (1, 2):
        found = load(tmp_path / f"step_0000000{step}")
        assert torch.equal(found["model"]["weight"], torch.full((1000,), float(step)))
        assert found["model"]["tied"] is found["model"]["weight"]
        assert found["trainer.json"] == {"step": step}


def test_one_save_is_under_way_at_a_time(tmp_path):
    told = Told(tmp_path)
    told.may_commit.clear()
    told.saver.save(1, make_parts(1), {})
    second = threading.Thread(target=told.saver.save, args=(2, make_parts(2), {}))
    second.start()
    second.join(0.2)
    assert second.is_alive()
    assert told.saved == []
    told.may_commit.set()
    second.join(10)
    told.saver.close()
    assert told.saved == [1, 2]


def test_a_failed_save_is_told_and_made_up_for_by_the_next(tmp_path):
    told = Told(tmp_path / "checkpoints")
    (tmp_path / "checkpoints").write_text("in the way")
    told.saver.save(1, make_parts(1), {})
    with pytest.raises(OSError, match="exists"):
        told.saver.close()
    assert [step for step, _ in told.failed] == [1]
    told.saver.save(2, make_parts(2), {})
    told.saver._wait()
    (tmp_path / "checkpoints").unlink()
    told.saver.save(3, make_parts(3), {})
    told.saver.close()
    assert told.saved == [3]


def test_what_cannot_be_stored_is_told_at_once(tmp_path):
    told = Told(tmp_path)
    with pytest.raises(TypeError, match="object"):
        told.saver.save(1, {"model": {"bad": object()}}, {})
    told.saver.close()
    told.saver.save(2, make_parts(2), {})
    told.saver.close()
    assert told.saved == [2]


def test_a_state_that_grew_is_copied_whole(tmp_path):
    told = Told(tmp_path)
    told.saver.save(1, {"model": {"a": torch.zeros(3)}}, {})
    told.saver.save(2, {"model": {"a": torch.ones(5), "b": torch.ones(3, dtype=torch.bfloat16)}}, {})
    told.saver.close()
    found = load(tmp_path / "step_00000002")["model"]
    assert torch.equal(found["a"], torch.ones(5))
    assert found["b"].dtype == torch.bfloat16


def test_a_copy_that_fails_fails_the_save_and_not_the_wait(tmp_path):
    snapshot = HostSnapshot({"a": torch.zeros(3)}, copy_now=False)
    lost = RuntimeError("the device is lost")
    with mock.patch.object(torch, "_foreach_copy_", side_effect=lost), pytest.raises(RuntimeError, match="is lost"):
        snapshot.copy()
    with pytest.raises(RuntimeError, match="the copy was not made"):
        snapshot.wait_for_copy("a")


def test_after_a_copy_that_fails_the_next_save_succeeds(tmp_path):
    told = Told(tmp_path / "checkpoints")
    lost = RuntimeError("the device is lost")
    with mock.patch.object(torch, "_foreach_copy_", side_effect=lost), pytest.raises(RuntimeError, match="is lost"):
        told.saver.save(1, make_parts(1), {})
    told.saver.save(2, make_parts(2), {})
    told.saver.close()
    assert told.saved == [2]


@pytest.mark.parametrize("large_bytes", [0, 1 << 40])
def test_a_state_with_a_long_structure_is_saved_as_it_is_now(tmp_path, monkeypatch, large_bytes):
    monkeypatch.setattr("runner.utils.io._MAX_INLINE_BYTES", 1000)
    monkeypatch.setattr("runner.checkpoint.saver._LARGE_BYTES", large_bytes)  # 0: written while it is copied
    told = Told(tmp_path)
    lengths = [number / 7 for number in range(1000)]
    tensors = {"w": torch.zeros(3), "b": torch.zeros(2), "c": torch.zeros(2, dtype=torch.complex128)}
    for step in range(1, 4):
        for tensor in tensors.values():
            tensor.fill_(step)
        told.saver.save(step, {"model": tensors | {"lengths": lengths}}, {})
        told.saver.close()
        found = load(tmp_path / f"step_{step:08d}")["model"]
        assert found["lengths"] == lengths
        assert all(torch.equal(found[name], tensor) for name, tensor in tensors.items())
