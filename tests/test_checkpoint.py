import json

import pytest
import torch

from runner.checkpoint import CheckpointError, Checkpoints, load, verify


def make_files(value=1.0):
    return {
        "model.safetensors": {"weight": torch.full((3,), value)},
        "model.optimizer.safetensors": {"state": {0: {"step": torch.tensor(2.0)}}, "groups": [{"lr": 0.1}]},
        "trainer.json": {"step": 3, "lr": 0.1},
    }


def test_what_is_saved_is_loaded(tmp_path):
    path = Checkpoints(tmp_path).save(3, make_files())
    assert path == tmp_path / "step_00000003"
    found = load(path)
    assert torch.equal(found["model.safetensors"]["weight"], torch.ones(3))
    assert found["model.optimizer.safetensors"]["state"][0]["step"].item() == 2.0
    assert found["trainer.json"] == {"step": 3, "lr": 0.1}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000003"]


def test_only_older_ones_of_its_own_are_pruned(tmp_path):
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_00000001").mkdir()  # no manifest: not ours
    (tmp_path / "best.txt").write_text("mine")
    saved = Checkpoints(tmp_path, keep_last=2)
    for step in (2, 4, 6):
        saved.save(step, make_files())
    names = sorted(p.name for p in tmp_path.iterdir())
    assert names == ["best.txt", "step_00000001", "step_00000004", "step_00000006", "step_notes"]


def test_keep_last_zero_keeps_all(tmp_path):
    saved = Checkpoints(tmp_path, keep_last=0)
    for step in range(1, 6):
        saved.save(step, make_files())
    assert len(list(tmp_path.iterdir())) == 5


def test_saving_a_step_again_replaces_it(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(3, make_files(1.0))
    saved.save(3, make_files(2.0))
    assert load(saved.newest()[0])["model.safetensors"]["weight"][0] == 2.0
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000003"]


def test_going_on_from_an_older_one_supersedes_the_later(tmp_path):
    saved = Checkpoints(tmp_path, keep_last=3)
    for step in (2, 4, 6):
        saved.save(step, make_files())
    saved.save(3, make_files())
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step_00000002", "step_00000003"]


def test_what_cannot_be_stored_leaves_the_earlier_ones_and_no_trace(tmp_path):
    saved = Checkpoints(tmp_path, keep_last=1)
    saved.save(2, make_files())
    with pytest.raises((TypeError, ValueError), match="object"):
        saved.save(4, make_files() | {"model.optimizer.safetensors": {"bad": object()}})
    assert [p.name for p in tmp_path.iterdir()] == ["step_00000002"]
    verify(tmp_path / "step_00000002")


@pytest.mark.parametrize("name", [*make_files(), "MANIFEST.json"])
@pytest.mark.parametrize("harm", ["truncate", "flip", "remove"])
def test_a_harmed_file_is_never_loaded_always_named_and_the_newest_whole_one_found(tmp_path, name, harm):
    saved = Checkpoints(tmp_path)
    older, path = saved.save(2, make_files()), saved.save(4, make_files())
    content = bytearray((path / name).read_bytes())
    if harm == "remove":
        (path / name).unlink()
    elif harm == "truncate":
        (path / name).write_bytes(content[: len(content) // 2])
    else:
        content[len(content) // 2] ^= 4
        (path / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=r"step_00000004.*" + (name if name != "MANIFEST.json" else "")):
        load(path)
    newest, faults = saved.newest()
    assert newest == older
    assert len(faults) == (0 if (name, harm) == ("MANIFEST.json", "remove") else 1)


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", ".hidden", ""])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    path = Checkpoints(tmp_path / "checkpoints").save(1, make_files())
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"][name] = manifest["files"]["trainer.json"]
    (path / "MANIFEST.json").write_text(json.dumps(manifest))
    with pytest.raises(CheckpointError, match="no file of this folder"):
        verify(path)


def test_nothing_saved_yet_finds_nothing(tmp_path):
    assert Checkpoints(tmp_path / "none").newest() == (None, [])
