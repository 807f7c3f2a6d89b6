import os
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.checkpoint import checkpoints, shards
from runner.checkpoint.checkpoints import CheckpointError, Checkpoints, load, verify
from runner.run.best import Best
from runner.utils import io

FACTS = {"step": 3, "lr": 0.1}


def make_parts(value=1.0):
    optimizer = {"state": {0: {"step": torch.tensor(2.0)}}, "groups": [{"lr": 0.1}]}
    return {"model": {"weight": torch.full((3,), value)}, "model.optimizer": optimizer}


def names_in(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.mark.parametrize(("format", "suffix"), [("sft", ".safetensors"), ("pt", ".pt")])
def test_what_is_saved_is_loaded(tmp_path, format, suffix):
    path = Checkpoints(tmp_path, format=format).save(3, make_parts(), FACTS)
    assert path == tmp_path / "step_00000003"
    assert names_in(path) == ["MANIFEST.json", f"model.optimizer{suffix}", f"model{suffix}", "trainer.json"]
    found = load(path)
    assert torch.equal(found["model"]["weight"], torch.ones(3))
    assert found["model.optimizer"]["state"][0]["step"].item() == 2.0
    assert found["trainer.json"] == FACTS
    assert names_in(tmp_path) == ["step_00000003"]


NAMES = ["trainer", "structure", "MANIFEST", "shards", "shards-json", "checkpoint"]


@pytest.mark.parametrize("format", ["sft", "pt", "shards"])
def test_no_name_of_a_part_is_that_of_another_file(tmp_path, format):
    parts = {}
    for value, name in enumerate(NAMES):
        parts[name] = {"weight": torch.full((3,), float(value))}
        parts[f"{name}.optimizer"] = {"step": value, "state": torch.tensor(value)}
    if format == "shards":
        saved = Checkpoints(tmp_path)
        partial = saved.begin(3)
        packed = {name: io.HostSnapshot(part) for name, part in parts.items()}
        tensors = {f"{name}/{key}": tensor for name, part in packed.items() for key, tensor in part.tensors.items()}
        (partial / "shards").mkdir()
        shards.write(tensors, partial / "shards")
        io.write_json({name: part.document for name, part in packed.items()}, partial / "structure.json")
        path = saved.commit(partial, 3, FACTS)
    else:
        path = Checkpoints(tmp_path, format=format).save(3, parts, FACTS)
    found = load(path)
    assert found.pop("trainer.json") == FACTS
    assert found.keys() == parts.keys()
    for value, name in enumerate(NAMES):
        assert torch.equal(found[name]["weight"], torch.full((3,), float(value)))
        assert found[f"{name}.optimizer"] == {"step": value, "state": torch.tensor(value)}


def test_a_snapshot_is_saved_as_it_was(tmp_path):
    parts = make_parts()
    snapshots = {name: io.HostSnapshot(value) for name, value in parts.items()}
    parts["model"]["weight"].zero_()
    path = Checkpoints(tmp_path).save(3, snapshots, FACTS)
    assert torch.equal(load(path)["model"]["weight"], torch.ones(3))


def test_only_older_ones_of_its_own_are_pruned(tmp_path):
    (tmp_path / "step_notes").mkdir()
    (tmp_path / "step_00000001").mkdir()  # no manifest: not ours
    (tmp_path / "best.txt").write_text("mine")
    saved = Checkpoints(tmp_path, keep_last=2)
    for step in (2, 4, 6):
        saved.save(step, make_parts(), FACTS)
    assert names_in(tmp_path) == ["best.txt", "step_00000001", "step_00000004", "step_00000006", "step_notes"]


def test_keep_last_zero_keeps_all(tmp_path):
    saved = Checkpoints(tmp_path, keep_last=0)
    for step in range(1, 6):
        saved.save(step, make_parts(), FACTS)
    assert len(names_in(tmp_path)) == 5


def test_round_steps_and_the_best_are_kept_beside_the_last(tmp_path):
    saved = Checkpoints(tmp_path, keep_last=1, keep_every=4, keep_best=2)
    losses = {1: 5.0, 2: 3.0, 3: None, 4: 9.0, 5: 1.0, 6: float("nan"), 7: 2.0, 8: 8.0, 9: 7.0}
    for step, loss in losses.items():
        saved.save(step, make_parts(), FACTS, loss)
    assert names_in(tmp_path) == [f"step_{step:08d}" for step in (4, 5, 7, 8, 9)]


def test_of_two_equally_good_the_later_is_kept(tmp_path):
    saved = Checkpoints(tmp_path, keep_last=1, keep_best=1)
    for step in (1, 2, 3):
        saved.save(step, make_parts(), FACTS, 1.0 if step < 3 else 2.0)
    assert names_in(tmp_path) == ["step_00000002", "step_00000003"]


def test_saving_a_step_again_replaces_it(tmp_path):
    saved = Checkpoints(tmp_path)
    saved.save(3, make_parts(1.0), FACTS)
    saved.save(3, make_parts(2.0), FACTS)
    assert load(saved.newest()[0])["model"]["weight"][0] == 2.0
    assert names_in(tmp_path) == ["step_00000003"]


def test_going_on_from_an_older_one_supersedes_the_later(tmp_path):
    saved = Checkpoints(tmp_path, keep_last=3)
    for step in (2, 4, 6):
        saved.save(step, make_parts(), FACTS)
    saved.save(3, make_parts(), FACTS)
    assert names_in(tmp_path) == ["step_00000002", "step_00000003"]


def harm(path, fault):
    """Makes a checkpoint incomplete in one way."""
    file = next(path.rglob("*.safetensors"))
    content = file.read_bytes()
    if fault == "no manifest":
        (path / "MANIFEST.json").unlink()
    elif fault == "no file":
        file.unlink()
    elif fault == "truncated":
        file.write_bytes(content[:-1])
    elif fault == "flipped":
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif fault == "link":
        shutil.copy(file, path.parent / "elsewhere")
        file.unlink()
        file.symlink_to(path.parent / "elsewhere")
    elif fault == "empty":
        shutil.rmtree(path)
        path.mkdir()


def is_complete(path):
    try:
        return bool(verify(path))
    except CheckpointError:
        return False


FAULTS = ["no manifest", "no file", "truncated", "flipped", "link", "empty"]


@pytest.fixture(scope="module")
def samples(tmp_path_factory):
    """Returns folders with checkpoints of steps 1 to 8 and metrics 8 to 1, saved by one process and sharded."""
    folders = []
    for is_sharded in (False, True):
        saved = Checkpoints(tmp_path_factory.mktemp("samples") / "checkpoints", keep_last=0)
        for step in range(1, 9):
            if is_sharded:
                partial = saved.begin(step)
                (partial / "shards").mkdir()
                io.write_new(make_parts()["model"], partial / "shards" / "shard-00000.safetensors")
                saved.commit(partial, step, FACTS, 9.0 - step)
            else:
                saved.save(step, make_parts(), FACTS, 9.0 - step)
        folders.append(saved.folder)
    return folders


@settings(max_examples=60, deadline=None)
@given(
    is_sharded=st.booleans(),
    states=st.lists(st.sampled_from(["absent", *["complete"] * 4, *FAULTS]), min_size=8, max_size=8),
    saved_step=st.integers(4, 9),
    keep_last=st.integers(1, 3),
    keep_every=st.sampled_from([0, 2]),
    keep_best=st.integers(0, 2),
)
def test_rotation_counts_complete_checkpoints_alone(
    samples, is_sharded, states, saved_step, keep_last, keep_every, keep_best
):
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch) / "checkpoints"
        shutil.copytree(samples[is_sharded], folder)
        complete = set()
        for step, state in enumerate(states, 1):
            path = folder / f"step_{step:08d}"
            if state == "absent":
                shutil.rmtree(path)
            elif state == "complete":
                complete.add(step)
            else:
                harm(path, state)
        saved = Checkpoints(folder, keep_last=keep_last, keep_every=keep_every, keep_best=keep_best)
        saved.save(saved_step, make_parts(), FACTS, 100.0)
        complete = {step for step in complete if step < saved_step} | {saved_step}
        newest = sorted(complete)[-keep_last:]
        best = sorted(complete - {saved_step})[-keep_best:] if keep_best else []
        expected = {*newest, *best, *(step for step in complete if keep_every and step % keep_every == 0)}
        left = {int(path.name[5:]) for path in folder.glob("step_*") if is_complete(path)}
        assert saved.newest()[0] == folder / f"step_{saved_step:08d}"
        assert left == (expected if len(complete) >= keep_last else complete)


def test_a_checkpoint_harmed_after_it_was_counted_counts_no_more(tmp_path):
    saved = Checkpoints(tmp_path, keep_last=2)
    for step in (2, 4, 6):
        saved.save(step, make_parts(), FACTS)
    harm(tmp_path / "step_00000006", "flipped")
    saved.save(8, make_parts(), FACTS)
    assert names_in(tmp_path) == ["step_00000004", "step_00000006", "step_00000008"]
    assert load(tmp_path / "step_00000004")["model"]["weight"][0] == 1.0


def test_what_cannot_be_stored_leaves_the_earlier_ones_and_no_trace(tmp_path):
    saved = Checkpoints(tmp_path, keep_last=1)
    saved.save(2, make_parts(), FACTS)
    with pytest.raises((TypeError, ValueError), match="object"):
        saved.save(4, make_parts() | {"model.optimizer": {"bad": object()}}, FACTS)
    assert names_in(tmp_path) == ["step_00000002"]
    verify(tmp_path / "step_00000002")


def test_what_is_raised_before_the_commit_ends_the_save_without_a_trace(tmp_path):
    def fail():
        raise OSError("the numbers are not on disk")

    saved = Checkpoints(tmp_path)
    with pytest.raises(OSError, match="numbers"):
        saved.save(2, make_parts(), FACTS, before_commit=fail)
    assert names_in(tmp_path) == []


def test_a_run_folder_that_was_deleted_stays_deleted(tmp_path):
    saved = Checkpoints(tmp_path / "run" / "checkpoints")
    with pytest.raises(FileNotFoundError, match="the run's folder was deleted"):
        saved.save(2, make_parts(), FACTS)
    assert names_in(tmp_path) == []


def test_what_a_crash_left_is_removed_and_what_it_had_set_aside_is_taken_back(tmp_path):
    saved = Checkpoints(tmp_path)
    kept = saved.save(2, make_parts(), FACTS)
    aside = saved.save(4, make_parts(4.0), FACTS)
    os.rename(aside, tmp_path / ".step_00000004.123.replaced")
    for leftover in (".step_00000002.123.replaced", ".step_00000006.99.partial", ".step_00000001.7.pruned"):
        (tmp_path / leftover).mkdir()
        (tmp_path / leftover / "model.safetensors").write_bytes(b"half")
    (tmp_path / ".step_notes").mkdir()
    saved.recover()
    assert names_in(tmp_path) == [".step_notes", "step_00000002", "step_00000004"]
    verify(kept)
    assert load(aside)["model"]["weight"][0] == 4.0


FILES = ["model.safetensors", "model.optimizer.safetensors", "trainer.json", "MANIFEST.json"]


def assert_named(saved, older, path, name):
    with pytest.raises(CheckpointError, match=rf"step_00000004.*{name}"):
        load(path)
    newest, faults = saved.newest()
    assert newest == older
    assert len(faults) == 1
    assert name in faults[0]


@pytest.mark.parametrize("name", FILES)
def test_a_truncated_or_missing_file_is_never_loaded_and_always_named(tmp_path, name):
    saved = Checkpoints(tmp_path)
    older, path = saved.save(2, make_parts(), FACTS), saved.save(4, make_parts(), FACTS)
    content = (path / name).read_bytes()
    for length in {0, 1, 7, 8, len(content) // 2, len(content) - 1}:
        (path / name).write_bytes(content[:length])
        assert_named(saved, older, path, name)
    (path / name).write_bytes(content + b" ")
    if name != "MANIFEST.json":
        assert_named(saved, older, path, name)
    (path / name).unlink()
    assert_named(saved, older, path, name)


@pytest.mark.parametrize("name", FILES)
def test_a_file_with_any_single_bit_flipped_is_never_loaded_and_always_named(tmp_path, name):
    saved = Checkpoints(tmp_path)
    older, path = saved.save(2, make_parts(), FACTS), saved.save(4, make_parts(), FACTS)
    content = (path / name).read_bytes()
    for place in range(0, len(content), 1 + len(content) // 64):
        harmed = bytearray(content)
        harmed[place] ^= 1 << place % 8
        (path / name).write_bytes(harmed)
        assert_named(saved, older, path, name)


def forge(path, name, file):
    """Adds a file to a manifest with a valid checksum, as an attacker would."""
    manifest = io.read_json(path / "MANIFEST.json")
    del manifest["crc32c"]
    manifest["files"][name] = checkpoints._measure(file)
    io.write_json(manifest | {"crc32c": checkpoints._checksum(manifest)}, path / "MANIFEST.json")


@pytest.mark.parametrize("name", ["../../x", "/etc/passwd", "a/b", ".hidden", "", "x.pkl", "x"])
def test_a_manifest_that_names_a_file_elsewhere_is_refused(tmp_path, name):
    path = Checkpoints(tmp_path / "checkpoints").save(1, make_parts(), FACTS)
    forge(path, name, path / "trainer.json")
    with pytest.raises(CheckpointError, match="no file of a checkpoint"):
        verify(path)


ELSEWHERE = [
    *("../../x.json", "{root}/x.json", "a/../../../x.json", "a/x.json", "shards/../x.json", "shards/a/x.json"),
    *("..\\x.json", ".x.json", ".json", "./x.json"),
]


@pytest.mark.parametrize("name", [*ELSEWHERE, "x\0.json", "x.json"])
def test_a_manifest_names_files_of_its_own_folder_alone(tmp_path, name):
    """The file exists with the listed bytes: only its name is wrong."""
    (tmp_path / "run").mkdir()
    path = Checkpoints(tmp_path / "run" / "checkpoints").save(1, make_parts(), FACTS)
    file, name = tmp_path / "copy", name.format(root=tmp_path)
    if "\0" not in name:
        file = path / name
        for folder in ("a", "shards/a"):
            (path / folder).mkdir(parents=True, exist_ok=True)
    file.write_text('"a secret"')
    forge(path, name, file)
    if name == "x.json":
        assert load(path)["x.json"] == "a secret"
        return
    for read in (verify, load):
        with pytest.raises(CheckpointError, match="no file of a checkpoint"):
            read(path)


def test_a_manifest_that_names_two_files_of_a_part_is_refused(tmp_path):
    path = Checkpoints(tmp_path / "checkpoints").save(1, make_parts(), FACTS)
    io.save({"weight": torch.zeros(3)}, path / "model.pt")
    forge(path, "model.pt", path / "model.pt")
    with pytest.raises(CheckpointError, match="names two files of 'model'"):
        load(path)


@pytest.mark.parametrize(
    "metric", [{"name": "eval/loss"}, {"value": 1}, [1], "x", 10**400, {"name": "loss", "value": []}]
)
def test_a_metric_of_any_kind_is_never_best(tmp_path, metric):
    saved = Checkpoints(tmp_path, keep_last=1, keep_best=1, rate=Best("loss", False).rate)
    saved.save(1, make_parts(), FACTS, metric)
    saved.save(2, make_parts(), FACTS, {"name": "loss", "value": 1.0})
    assert saved.rank_best() == [(2, 1.0)]


def test_a_link_in_place_of_a_file_is_refused(tmp_path):
    path = Checkpoints(tmp_path / "checkpoints").save(1, make_parts(), FACTS)
    (path / "trainer.json").rename(tmp_path / "elsewhere.json")
    (path / "trainer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(CheckpointError, match=r"trainer\.json is missing"):
        verify(path)


def test_a_pickle_in_a_checkpoint_runs_nothing(tmp_path):
    canary = tmp_path / "canary"

    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(canary),)

    saved = Checkpoints(tmp_path / "checkpoints", format="pt")
    path = saved.save(1, make_parts(), FACTS)
    torch.save({"weight": Hostile()}, path / "model.pt")
    forge(path, "model.pt", path / "model.pt")
    with pytest.raises(CheckpointError, match=r"model\.pt: not read"):
        load(path)
    assert not canary.exists()


def test_nothing_saved_yet_finds_nothing(tmp_path):
    assert Checkpoints(tmp_path / "none").newest() == (None, [])
