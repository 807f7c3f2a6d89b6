"""The runs that a user has started are resumed, evaluated and exported by that user without naming anything again."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import Project
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from runner import evaluate, export
from runner.config import resume, run_folder
from runner.config.trust import signature


@pytest.fixture
def own(trained, monkeypatch):
    """A finished run in `run`, signed where it lies; the command line names no experiment and no directory."""
    (trained.folder / "run" / ".hydra" / signature.NAME).unlink()  # it tells of where the run was copied from
    trained.run("resume=run", "sign=true", "trainer.steps=13")
    monkeypatch.setattr(Project, "command", [sys.executable, "-m", "runner"])
    return trained


def call(main, *arguments):
    """Runs a command in this process; restores the import path afterwards."""
    path = list(sys.path)
    try:
        main([str(argument) for argument in arguments])
    finally:
        sys.path[:] = path
        sys.modules.pop("own", None)


def message_of(capsys, main, *arguments):
    with pytest.raises(SystemExit) as caught:
        call(main, *arguments)
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


def test_a_new_run_is_signed(project):
    project.run("hydra.run.dir=run", "trainer.steps=1", "trainer.eval_every=0")
    origin = signature.check_signature(project.folder / "run")
    assert origin.directory == str(project.folder)
    assert origin.config_dirs == [str(project.folder / "conf")]
    assert str(project.folder) in origin.python_path
    assert origin.links == {}


def test_it_is_resumed_evaluated_and_exported_from_anywhere(own, tmp_path_factory, monkeypatch, capsys):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    monkeypatch.chdir(elsewhere)
    run = own.folder / "run"
    call(evaluate.main, run)
    numbers = capsys.readouterr().out
    assert "eval/loss" in numbers
    call(export.main, run)
    call(evaluate.main, run / "exports" / "model.safetensors")
    assert capsys.readouterr().out.splitlines()[1:] == numbers.splitlines()
    monkeypatch.setattr(own, "folder", elsewhere)
    printed = own.run(f"resume={run}", "trainer.steps=14")
    assert printed.startswith("trainer.steps: 13 -> 14\n")
    assert "Finished at step 14" in printed


@pytest.mark.parametrize("is_deleted", [False, True])
def test_its_yaml_may_have_been_changed_or_deleted(own, is_deleted):
    before = OmegaConf.load(own.folder / "run" / ".hydra" / "config.yaml")
    if is_deleted:
        shutil.rmtree(own.folder / "conf")
    else:
        path = own.folder / "conf" / "experiment" / "mine.yaml"
        path.write_text(path.read_text().replace("own.Model", "own.Normed").replace("batch_size: 8", "batch_size: 4"))
    printed = own.run("resume=run", "trainer.steps=14", "optimizer.eps=1e-7", "+optimizer.maximize=true")
    changes = ["trainer.steps: 13 -> 14", "optimizer.eps: 1e-08 -> 1e-07", "optimizer.maximize: (none) -> true"]
    assert all(f"{line}\n" in printed for line in changes)
    assert printed.count("\n", 0, printed.index("Going on after step 13")) == len(changes)  # and no other key
    after = OmegaConf.load(own.folder / "run" / ".hydra" / "config.yaml")
    assert (after.model, after.data) == (before.model, before.data)
    own.run("resume=run", "trainer.steps=15")


def test_mistakes_are_reported_although_the_yaml_is_deleted(own):
    shutil.rmtree(own.folder / "conf")
    assert "trainer.stepz: no such key; did you mean steps?" in own.run("resume=run", "trainer.stepz=3", status=2)
    assert "optimizer=nosuch: no such choice" in own.run("resume=run", "optimizer=nosuch", status=2)
    assert "seed: 0 -> 3" in own.run("resume=run", "seed=3", status=2)


def test_after_a_move_one_message_gives_the_argument_that_signs_it_again(own, capsys, monkeypatch):
    (own.folder / "run").rename(own.folder / "moved")
    printed = own.run("resume=moved", "trainer.steps=14", status=2)
    assert f"it was signed in {own.folder / 'run'}, and lies elsewhere now. If it is: sign=true, typed in" in printed
    monkeypatch.chdir(own.folder)
    assert "--sign, typed in the project's directory, signs it" in message_of(capsys, evaluate.main, "moved")
    assert "--sign, typed in the project's directory, signs it" in message_of(capsys, export.main, "moved")
    call(evaluate.main, "moved", "--sign")
    own.run("resume=moved", "trainer.steps=14")
    call(export.main, "moved")


def test_a_modified_config_is_untrusted_until_it_is_signed(own):
    path = own.folder / "run" / ".hydra" / "config.yaml"
    path.write_text(path.read_text().replace("batch_size: 8", "batch_size: 4"))
    printed = own.run("resume=run", "trainer.steps=14", status=2)
    assert ".hydra/config.yaml was modified after it was signed" in printed
    own.run("resume=run", "trainer.steps=14", "allow_targets=[own]")
    assert "nobody" not in own.run("resume=run", "trainer.steps=15", status=2)  # it stays untrusted
    own.run("resume=run", "trainer.steps=15", "sign=true", "resume_allow_changes=true")
    own.run("resume=run", "trainer.steps=16")


def test_the_processes_of_an_untrusted_run_are_as_many_as_the_command_line_says(own):
    path = own.folder / "run" / ".hydra" / "config.yaml"
    text = path.read_text().replace("num_workers: 0", "num_workers: 40").replace("device: auto", "device: cpu")
    path.write_text(re.sub(r"nproc_per_node: \w+", "nproc_per_node: 64", text))
    printed = own.run("resume=run", "trainer.steps=14", "allow_targets=[own]")
    assert re.search(r"data.num_workers: 40 -> \d\n", printed)
    assert "distributed.nproc_per_node: 64 -> auto\n" in printed


def test_workers_import_from_where_the_run_was_started(own, tmp_path_factory, monkeypatch):
    run = own.folder / "run"
    monkeypatch.setattr(own, "folder", tmp_path_factory.mktemp("elsewhere"))
    own.run(f"resume={run}", "trainer.steps=14", "distributed=ddp", "distributed.nproc_per_node=2", forks_workers=True)


def test_a_link_to_a_checkpoint_on_another_disk_is_one_of_its_run(own, tmp_path_factory, monkeypatch, capsys):
    disk = tmp_path_factory.mktemp("disk") / "big"
    shutil.move(own.folder / "run" / "checkpoints", disk)
    (own.folder / "run" / "checkpoints").symlink_to(disk)
    (own.folder / "best").symlink_to(disk / "step_00000013")
    monkeypatch.chdir(own.folder)
    for place in ("run", "best", "run/checkpoints/step_00000013"):
        assert run_folder.find_run(Path(place)).resolve() == own.folder / "run"
    call(evaluate.main, "best")
    own.run("resume=best", "trainer.steps=14")
    assert (disk / "step_00000014").is_dir()


def test_signing_is_for_a_run_that_goes_on(project):
    assert "sign=true: signs the run that goes on; give it with resume=" in project.run("sign=true", status=2)


def test_the_config_that_would_run_is_shown(own):
    run = own.folder / "run"
    shown = OmegaConf.create(own.run("--cfg", "job", "resume=run", "trainer.steps=20"))
    saved = OmegaConf.load(run / ".hydra" / "config.yaml")
    assert shown.model == saved.model
    assert (shown.trainer.steps, shown.resume) == (20, "run")
    assert "hydra" not in shown
    assert own.run("--cfg", "job", "--package", "model._target_", "resume=run").strip() == "own.Model"
    resolved = OmegaConf.create(own.run("--cfg", "job", "--resolve", "resume=run", "trainer.steps=20"))
    assert OmegaConf.to_container(resolved.scheduler, resolve=False)["total_steps"] == 20
    assert "seed: 0 -> 3" in own.run("--cfg", "job", "resume=run", "seed=3", status=2)


NAMES = ["it's", 'a "b"', "ü, x=y", "[a]{b}", "tail'", "a\\'b\\"]


@pytest.mark.parametrize("name", NAMES)
def test_a_path_is_read_as_it_is_typed(tmp_path, monkeypatch, name):
    monkeypatch.chdir(tmp_path)
    (tmp_path / name / "checkpoints").mkdir(parents=True)
    found = resume.find_resumption([resume.quote_path(f"resume={name}")])
    assert (str(found.run), str(found.checkpoint)) == (name, name)
    for argument in found.arguments:
        assert OverridesParser.create().parse_override(argument).value() == name
    quoted = "'" + name.replace("'", "\\'") + "'"
    if "\\" not in name:
        assert str(resume.find_resumption([resume.quote_path(f"resume={quoted}")]).run) == name


def test_a_run_folder_of_any_name_is_made_and_resumed(project):
    name = "it's a \"run\", [ü]'"
    project.run(f"hydra.run.dir={name}", "trainer.steps=1", "trainer.eval_every=0")
    assert os.path.isdir(project.folder / name / "checkpoints")
    assert project.run(f"resume={name}", "trainer.steps=2").endswith(f"{project.folder / name}\n")


def test_a_run_goes_on_unsigned_where_there_is_no_place_for_a_key(project, tmp_path_factory, monkeypatch):
    place = tmp_path_factory.mktemp("state") / "file"
    place.touch()
    monkeypatch.setenv("XDG_STATE_HOME", str(place))
    printed = project.run("hydra.run.dir=run", "trainer.steps=1", "trainer.eval_every=0")
    assert "The run can't be signed: " in printed
    assert "set XDG_STATE_HOME" in printed


def installed(name, folder):
    """Writes the script that pip writes for an entry point."""
    import tomllib

    scripts = tomllib.loads((Path(__file__).parent.parent / "pyproject.toml").read_text())["project"]["scripts"]
    module, _, function = scripts[name].partition(":")
    path = folder / name
    path.write_text(f"import sys\nfrom {module} import {function}\nsys.exit({function}())\n")
    return path


def test_installed_commands_find_modules_in_the_current_directory(own, tmp_path_factory):
    scripts = tmp_path_factory.mktemp("bin")
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    settings = {
        "cwd": own.folder, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL,
        "env": os.environ | {"PYTHONPATH": root},
    }  # fmt: skip
    (own.folder / "run" / ".hydra" / "signature.json").unlink()  # which would tell where modules are
    python = [sys.executable]
    command = [
        installed("runner", scripts),
        "--config-dir",
        "conf",
        "experiment=mine",
        "trainer.steps=1",
        "hydra.run.dir=new",
    ]
    ended = subprocess.run([*python, *command], **settings)
    assert ended.returncode == 0, ended.stderr
    for name in ("runner-evaluate", "runner-export"):
        ended = subprocess.run([*python, installed(name, scripts), "run", "--allow-targets", "own"], **settings)
        assert ended.returncode == 0, ended.stderr


FAILING = """


def fails(module, dataset):
    raise RuntimeError("first\\nsecond" + "y" * 100_000)
"""


@pytest.fixture
def failing(own):
    """An unsigned run whose report fails."""
    source = own.folder / "own.py"
    source.write_text(source.read_text() + FAILING)
    path = own.folder / "run" / ".hydra" / "config.yaml"
    text = path.read_text()
    assert "_target_: own.report\n" in text
    path.write_text(text.replace("_target_: own.report\n", "_target_: own.fails\n"))
    return own


def test_an_error_of_an_untrusted_run_is_one_line_unless_its_traceback_is_asked_for(failing, capsys, monkeypatch):
    line = "RuntimeError: first\\nsecond"
    hint = "; HYDRA_FULL_ERROR=1 shows the traceback\n"
    log = failing.folder / "run" / "log.txt"
    arguments = "resume=run", "trainer.steps=14", "trainer.eval_every=1", "allow_targets=[own]"
    printed = failing.run(*arguments, status=1)
    assert printed.count(f"error: The run failed: {line}") == printed.count(hint) == 1
    assert "Traceback" not in printed + log.read_text()
    assert hint in log.read_text()
    assert len(printed) < 10_000
    monkeypatch.syspath_prepend(str(failing.folder))
    with pytest.raises(SystemExit) as caught:
        call(evaluate.main, failing.folder / "run", "--allow-targets", "own")
    assert caught.value.code == 1
    message = capsys.readouterr().err
    assert (message.startswith(line), message.endswith(hint), message.count("\n")) == (True, True, 1)
    monkeypatch.setenv("HYDRA_FULL_ERROR", "1")
    assert "Traceback (most recent call last)" in failing.run(*arguments, status=1)
    with pytest.raises(RuntimeError, match="first"):
        call(evaluate.main, failing.folder / "run", "--allow-targets", "own")
