"""The runner follows no link out of a run folder, whoever made it and whenever."""

import json
import os
import re
from pathlib import Path

import pytest
import torch
from flips import flipped
from small_run import CONFIG_FILES, small_config

from runner import export
from runner.checkpoint.checkpoints import CheckpointError, Checkpoints, verify
from runner.config import run_folder
from runner.config.errors import ConfigError
from runner.config.spec import ExperimentSpec
from runner.launch.job import Job
from runner.run import evaluation
from runner.run.run import run
from runner.tracking.media import Audio
from runner.utils import io
from runner.utils.files import replace_file
from runner.utils.files.disk import confine

WAV = "audio/tone-00000014.wav"
PLACES = [  # files and folders that a run creates, replaces, appends to or removes
    "run.json", "metrics.jsonl", "log.txt", ".lock", ".hydra", ".hydra/config.yaml", ".hydra/overrides.yaml",
    "checkpoints", "checkpoints/.step_00000014.1.partial", "checkpoints/step_00000012", "exports",
    "exports/model.safetensors", "audio", WAV,
]  # fmt: skip


class Decoy:
    """A folder of the user with files that must not change."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        for name in ("step_00000004", "shards"):
            (folder / name).mkdir(parents=True)
        (folder / "diary").write_text('{"dear": "diary"}\n')
        (folder / "step_00000004" / "MANIFEST.json").write_text("{}")
        (folder / "config.yaml").write_text("{}")
        self.before = self.snapshot()

    def snapshot(self):
        paths = [self.folder, *sorted(self.folder.rglob("*"))]
        return {str(path): (path.stat().st_mtime_ns, path.read_bytes() if path.is_file() else b"") for path in paths}

    def is_unchanged(self):
        return self.snapshot() == self.before


@pytest.fixture
def decoy(tmp_path_factory):
    return Decoy(tmp_path_factory.mktemp("decoy"))


def plant(run: Path, name: str, decoy: Decoy, is_dangling: bool = False) -> Path:
    """Replaces a file or folder of a run with a link to the decoy."""
    path = run / name
    path.parent.mkdir(parents=True, exist_ok=True)
    is_folder = path.is_dir() or name in ("exports", "audio", "checkpoints", ".hydra") or "step" in name
    if path.exists():
        path.rename(run.parent / f"aside_{path.name}")
    path.symlink_to(decoy.folder / ("none" if is_dangling else "." if is_folder else "diary"))
    return path


def test_links_at_paths_that_no_run_writes_are_ignored(trained):
    (trained.folder / "run" / "self").symlink_to(".")
    (trained.folder / "run" / "by").mkdir()
    (trained.folder / "run" / "by" / "hand").symlink_to(trained.folder)
    run_folder.refuse_links(trained.folder / "run")


@pytest.mark.parametrize("name", PLACES)
def test_a_run_with_a_link_is_not_resumed(trained, decoy, name):
    link = plant(trained.folder / "run", name, decoy)
    before = sorted(trained.folder.rglob("*"))
    with pytest.raises(ConfigError, match=rf"run/{re.escape(name)}: a link; "):
        run_folder.refuse_links(link.parents[name.count("/")])
    assert sorted(trained.folder.rglob("*")) == before


def test_resume_names_the_link_and_writes_nothing(trained, decoy):
    plant(trained.folder / "run", name := WAV, decoy)
    printed = trained.run("resume=run", "trainer.steps=14", "allow_targets=[own]", status=2)
    assert printed.startswith(f"run/{name}: a link; ")
    assert printed.count("\n") == 1
    assert decoy.is_unchanged()


def test_a_checkpoint_that_is_a_link_to_another_run_is_not_resumed(trained, decoy):
    trained.copy("run", "stranger")
    step = trained.folder / "stranger" / "checkpoints" / "step_00000012"
    step.rename(trained.folder / "aside")
    step.symlink_to(trained.folder / "run" / "checkpoints" / "step_00000004")
    before = {path: path.read_bytes() for path in (trained.folder / "run").rglob("*") if path.is_file()}
    printed = trained.run(f"resume=stranger/checkpoints/{step.name}", "allow_targets=[own]", status=2)
    assert f"stranger/checkpoints/{step.name}: a link; " in printed
    assert before == {path: path.read_bytes() for path in (trained.folder / "run").rglob("*") if path.is_file()}


def test_a_requeued_job_follows_no_link(trained, decoy, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    run = trained.folder / "run"
    for name in ("metrics.jsonl", "checkpoints"):  # a run without checkpoints has saved nothing yet
        plant(run, name, decoy)
        printed = trained.run("hydra.run.dir=run", "allow_targets=[own]", status=2)
        assert printed.startswith("run/") or str(run) in printed
        assert ": a link; " in printed
        (run / name).unlink()
        (trained.folder / f"aside_{name}").rename(run / name)
    assert decoy.is_unchanged()
    empty = trained.folder / "empty"
    empty.mkdir()
    (empty / "checkpoints").symlink_to(decoy.folder)
    assert "empty/checkpoints: a link; " in trained.run("hydra.run.dir=empty", status=2)
    assert decoy.is_unchanged()


SWEEP = ("-m", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}", "seed=1", "trainer.eval_every=0")


@pytest.mark.parametrize("name", ["0/metrics.jsonl", "0", "multirun.yaml"])
def test_a_restarted_sweep_follows_no_link(trained, decoy, name):
    sweep = trained.folder / "sweep"
    sweep.mkdir()
    trained.copy("run", "sweep/0")
    plant(sweep, name, decoy)
    printed = trained.run(*SWEEP, status=2)
    assert f"sweep/{name}: a link; " in printed.splitlines()[0]
    assert decoy.is_unchanged()


def test_a_sweep_into_a_pipe_or_a_link_does_not_hang_and_writes_nothing_through_it(project, decoy):
    (project.folder / "sweep" / "a").mkdir(parents=True)
    os.mkfifo(project.folder / "sweep" / "multirun.yaml")
    assert "sweep/multirun.yaml: expected a file or a folder, found a pipe" in project.run(*SWEEP, status=2)
    (project.folder / "sweep" / "multirun.yaml").unlink()
    (project.folder / "sweep" / "a" / "b").symlink_to(decoy.folder)
    nested = (*SWEEP[:2], "hydra.sweep.subdir=a/b/c", *SWEEP[3:])
    assert project.run(*nested, status=2).startswith("sweep/a/b: a link; ")
    (project.folder / "sweep" / "a" / "b").unlink()
    (project.folder / "sweep" / "other").mkdir()
    (project.folder / "sweep" / "a" / "b").symlink_to("../other")  # as a launcher may for itself
    assert f"{project.folder}/sweep/a/b: a link; " in project.run(*nested, status=2)
    assert decoy.is_unchanged()


def test_an_export_into_a_run_with_a_link_is_refused_and_one_elsewhere_is_made(at_home, decoy, capsys):
    plant(at_home.folder / "run", name := "exports/model.safetensors", decoy)
    allowed = ["--allow-targets", "own"]
    for output in ([], ["--output", "run/other"], ["--output", f"../{at_home.folder.name}/run/exports"]):
        with pytest.raises(SystemExit) as caught:
            export.main(["run", *output, *allowed])
        assert caught.value.code == 2
        assert capsys.readouterr().err.startswith(f"run/{name}: a link; ")
    export.main(["run", "--output", "elsewhere", *allowed])
    assert capsys.readouterr().out == "elsewhere/model.safetensors\n"
    assert decoy.is_unchanged()
    assert not (at_home.folder / "run" / "other").exists()


def test_links_that_the_user_made_for_a_new_run_are_followed(project, tmp_path_factory):
    storage = tmp_path_factory.mktemp("storage")
    (project.folder / "disk").mkdir()
    (project.folder / "run").symlink_to("disk")
    (project.folder / "disk" / "checkpoints").symlink_to(storage)
    printed = project.run("hydra.run.dir=run")
    assert f"run/checkpoints: a link; the run writes to {storage}\n" in printed
    assert sorted(path.name for path in storage.glob("step_*")) == ["step_00000004", "step_00000008", "step_00000012"]
    assert not (project.folder / "disk" / "checkpoints" / "checkpoints").exists()


@pytest.mark.parametrize(
    ("inside", "expected"),
    [
        ({}, {}),
        ({"checkpoints": "folder"}, {"checkpoints": "folder"}),
        ({"checkpoints": "folder", ".hydra": None}, {"checkpoints": "folder"}),
        ({"checkpoints": "folder", "exports": "other"}, {"checkpoints": "folder", "exports": "other"}),
        ({"checkpoints": "folder", "notes": None}, {}),
        ({"checkpoints": "folder", "metrics.jsonl": "file"}, {}),
        ({"checkpoints": "folder", "exports": "missing"}, {}),
    ],
)
def test_a_folder_with_only_links_to_folders_was_prepared_by_the_user(tmp_path, inside, expected):
    run = tmp_path / "run"
    for folder in ("run", "folder", "other"):
        (tmp_path / folder).mkdir()
    (tmp_path / "file").write_text("")
    for name, target in inside.items():
        (run / name).mkdir() if target is None else (run / name).symlink_to(f"../{target}")
    assert run_folder.find_links(run) == {name: str(tmp_path / target) for name, target in expected.items()}


PLANTS = """

class Plants(Model):
    # replaces a file or folder of the run with a link after step 5
    def __init__(self, place, decoy):
        super().__init__()
        self.place, self.decoy, self.calls = place, decoy, 0

    def forward(self, x, y):
        self.calls += self.training
        if self.calls == 6 and self.training:
            self.calls += 1
            if os.path.lexists(self.place):
                os.rename(self.place, "aside")
            os.makedirs(os.path.dirname(self.place), exist_ok=True)
            os.symlink(self.decoy, self.place)
        return super().forward(x, y)


def tones(module, dataset):
    from runner.tracking.media import Audio

    return {"tone": Audio(torch.zeros(100), 8000)}
"""


@pytest.mark.parametrize(
    ("place", "message", "last_saved"),
    [
        ("checkpoints", "error: The run ends: the last checkpoint can't be written: ", None),
        ("audio", "error: The run ends: the run's sounds can't be written: ", 6),
        ("exports", "error: The run ends: the export can't be written: ", 12),
        ("run.json", None, 12),
    ],
)
def test_a_link_made_during_a_run_ends_it_in_one_message_or_is_replaced(project, decoy, place, message, last_saved):
    with open(project.folder / "own.py", "a") as file:
        file.write(PLANTS)
    target = decoy.folder / "diary" if "." in place else decoy.folder
    overrides = [
        "model._target_=own.Plants",
        f"+model.place=run/{place}",
        f"+model.decoy={target}",
        "hydra.run.dir=run",
    ]
    overrides += ["report._target_=own.tones", "trainer.export_every=12"]
    printed = project.run(*overrides, status=0 if message is None else 1)
    assert "Traceback" not in printed
    assert decoy.is_unchanged()
    assert last_saved is None or verify(project.folder / "run" / "checkpoints" / f"step_{last_saved:08d}")
    path = project.folder / "run" / place
    if message is None:
        assert not path.is_symlink()
        return
    (line,) = (line for line in printed.splitlines() if line.startswith(message))
    assert f"a link, which is not followed: '{path}'" in line
    assert line.endswith("put the file or folder itself in the place of the link, then resume")


def start(folder):
    """Runs in a folder without the checks of the folder; returns the status and the error message."""
    plain = small_config(2)
    plain["report"] = {"_target_": "test_links.tones"}
    job = Job(ExperimentSpec.from_plain(plain), folder, CONFIG_FILES)
    try:
        status = run(job.spec, folder, job.write_config)
    except ConfigError as error:
        return 2, str(error)
    return status, json.loads((folder / "run.json").read_text())["reason"]


@pytest.mark.parametrize("is_dangling", [False, True])
def test_writing_a_file_replaces_a_link_at_its_path(tmp_path, decoy, is_dangling):
    places = (".hydra/config.yaml", "exports/model.safetensors", "audio/tone-00000002.wav")
    links = [plant(tmp_path / "run", name, decoy, is_dangling) for name in places]
    assert start(tmp_path / "run") == (0, None)
    assert not any(link.is_symlink() for link in links)
    assert decoy.is_unchanged()


def test_a_link_at_run_json_is_reported(tmp_path, decoy):
    link = plant(tmp_path / "run", "run.json", decoy)
    status, reason = start(tmp_path / "run")
    assert status == 2
    assert f"{link}: not the record of a run (is a link, expected a regular file)" in reason
    assert decoy.is_unchanged()


@pytest.mark.parametrize("name", [".lock", "log.txt", ".hydra"])
def test_a_link_missed_by_the_checks_is_reported_before_the_run_starts(tmp_path, decoy, name):
    for is_dangling in (False, True):
        link = plant(tmp_path / "run", name, decoy, is_dangling)
        assert start(tmp_path / "run") == (2, f"{link}: can't be written to (a link, which is not followed)")
        link.unlink(missing_ok=True)
    assert decoy.is_unchanged()


@pytest.mark.parametrize("name", ["metrics.jsonl", "checkpoints", "audio", "exports"])
def test_a_link_missed_by_the_checks_ends_the_run_and_is_not_followed(tmp_path, decoy, name):
    link = plant(tmp_path / "run", name, decoy, is_dangling=name == "metrics.jsonl")
    status, reason = start(tmp_path / "run")
    assert status == 1
    assert f"a link, which is not followed: '{link}'" in reason
    assert decoy.is_unchanged()


def tones(module, dataset):
    """A report with a sound."""
    return {"tone": Audio(torch.zeros(100), 8000)}


def test_a_sound_whose_name_leads_out_of_the_folder_is_not_written(tmp_path, decoy):
    folder = tmp_path / "run"
    folder.mkdir()
    for name in (f"../../{decoy.folder.name}/tone", f"{decoy.folder}/tone"):
        with pytest.raises(OSError, match="not a place in the run's folder"):
            write_sound(folder, name)
    assert decoy.is_unchanged()


def test_writes_beside_changing_links_stay_in_the_folder(tmp_path, decoy):
    folder = tmp_path / "run"
    for name in ("checkpoints", "audio", "exports"):
        (folder / name).mkdir(parents=True)
    checkpoints = Checkpoints(folder / "checkpoints", keep_last=1)
    num_done = num_refused = 0
    with confine(folder), flipped(folder, decoy.folder, "checkpoints", "audio", "exports"):
        for step in range(1, 10_000):
            for write in (
                lambda step=step: checkpoints.save(step, {"model": {"weight": torch.ones(2)}}, {"step": step}),
                lambda step=step: write_sound(folder, "tone", step),
                lambda: io.save({"weight": torch.ones(2)}, folder / "exports" / "model.safetensors"),
                lambda step=step: replace_file(folder / "run.json", [str(step).encode()]),
                checkpoints.recover,
            ):
                try:
                    write()
                except (OSError, CheckpointError):
                    num_refused += 1
                else:
                    num_done += 1
            if min(num_done, num_refused) > 100:
                break
    assert min(num_done, num_refused) > 100
    assert decoy.is_unchanged()
    for path in [*tmp_path.glob("run/checkpoints/step_*"), *tmp_path.glob("run/.checkpoints.link/step_*")]:
        if path.resolve().is_relative_to(decoy.folder):
            continue
        assert verify(path)["files"].keys() >= {"model.safetensors", "trainer.json"}


def write_sound(folder, name, step=4):
    """Writes a sound as an evaluation does."""

    class NullOutput:
        def audio(self, *arguments): ...

        def info(self, *arguments): ...

    evaluation.show(NullOutput(), NullOutput(), folder, step, {f"eval/{name}": Audio(torch.zeros(100), 8000)})


@pytest.mark.parametrize(("name", "is_recorded"), [("exports", True), ("log.txt", False), ("audio/x.wav", False)])
def test_a_link_to_a_folder_in_ones_own_run_can_be_recorded(trained, decoy, name, is_recorded):
    plant(trained.folder / "run", name, decoy)
    with pytest.raises(ConfigError, match="a link; ") as caught:
        run_folder.refuse_links(trained.folder / "run", {}, "sign=true")
    assert ("sign=true records where it leads" in str(caught.value)) == is_recorded
