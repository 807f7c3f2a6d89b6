"""No module is imported from inside an untrusted run folder; the user's own directories are."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from runner.config.trust import import_path

ROOT = Path(__file__).parents[3]
CANARY = "import pathlib\npathlib.Path(__file__).with_name('CANARY').touch()\n"
SHADOWED = ["yaml", "torch", "logging", "argparse", "__future__", "hydra", "numpy", "mine", "sitecustomize"]


@pytest.fixture
def hostile(tmp_path):
    """A run folder with files that have the names of modules."""
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / ".hydra" / "config.yaml").write_text("model: {_target_: mine.Model}\n")
    (run / "checkpoints" / "step_00000001").mkdir(parents=True)
    for folder in (run, run / "checkpoints", run / "checkpoints" / "step_00000001"):
        for name in SHADOWED:
            (folder / f"{name}.py").write_text(CANARY)
    yield run
    assert not list(tmp_path.rglob("CANARY"))


def start(folder, *command):
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    settings = {"cwd": folder, "env": environment, "capture_output": True, "text": True, "stdin": subprocess.DEVNULL}
    return subprocess.run([sys.executable, *command], **settings)


@pytest.mark.parametrize("inside", [".", "checkpoints/step_00000001"])
def test_nothing_is_imported_from_a_run_folder_that_is_the_current_directory(hostile, inside):
    target = os.path.relpath(hostile, hostile / inside)
    ended = start(hostile / inside, "-m", "runner.evaluate", target, "--allow-targets", "mine")
    assert ended.returncode == 2, ended.stderr
    assert "Traceback" not in ended.stderr


def test_nor_by_a_resume_an_export_a_worker_or_an_installed_command(hostile, tmp_path):
    script = tmp_path / "runner-export"
    script.write_text("from runner.export import start_installed\nstart_installed()\n")
    for command in (["-m", "runner", "resume=."], ["-m", "runner.launch.worker", "no", "0"], [str(script), "."]):
        assert start(hostile, *command).returncode != 0


@pytest.mark.parametrize(
    ("marks", "is_one"),
    [
        ([".hydra"], True),
        (["run.json"], True),
        (["checkpoints/step_00000001"], True),
        (["checkpoints/other"], False),
        (["conf/experiment"], False),
    ],
)
def test_a_run_folder_is_known_from_anywhere_inside(tmp_path, marks, is_one):
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    for mark in marks:
        (tmp_path / mark).mkdir(parents=True)
    assert import_path.is_in_run_folder(str(tmp_path)) == import_path.is_in_run_folder(str(inside)) == is_one


def test_a_link_to_a_run_folder_is_one(tmp_path):
    (tmp_path / "run" / ".hydra").mkdir(parents=True)
    (tmp_path / "link").symlink_to(tmp_path / "run")
    assert import_path.is_in_run_folder(str(tmp_path / "link"))


def test_an_installed_command_takes_the_current_directory_first(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", ["/bin", "/lib"])
    import_path.add_current_directory()
    import_path.add_current_directory()
    assert sys.path == [str(tmp_path), "/bin", "/lib"]


@pytest.mark.parametrize("is_run_folder", [False, True])
def test_one_that_opens_a_folder_takes_it_last_and_later_and_no_run_folder(tmp_path, monkeypatch, is_run_folder):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(import_path, "_deferred", None)
    monkeypatch.setattr(sys, "path", ["/bin", "/lib"])
    if is_run_folder:
        (tmp_path / "multirun.yaml").touch()
    import_path.defer_current_directory()
    assert sys.path == ["/bin", "/lib"]
    import_path.add_deferred()
    import_path.add_deferred()
    assert sys.path == ["/bin", "/lib", *([] if is_run_folder else [str(tmp_path)])]


@pytest.mark.parametrize("argument", ["resume=.", "+resume=.", "init_from=x", "hydra.sweep.dir=.", "hydra.run.dir=."])
def test_a_command_that_names_a_folder_opens_it(monkeypatch, argument):
    assert import_path.opens_folder(["-m", argument])
    assert not import_path.opens_folder(["seed=1", "experiment=resume"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    assert import_path.opens_folder([])


def test_own_directories_are_those_outside_the_interpreters(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "lib").mkdir()
    monkeypatch.setattr(sys, "path", ["", str(tmp_path / "lib"), "lib", str(tmp_path / "gone"), *sys.path])
    own = import_path.list_own()
    assert own[:2] == [str(tmp_path), str(tmp_path / "lib")]
    assert not any(path.startswith((sys.prefix, sys.base_prefix + "/lib")) for path in own)
    monkeypatch.setattr(sys, "path", ["/bin"])
    import_path.prepend([*own, str(tmp_path / "gone")])
    assert sys.path == [*own, "/bin"]
    import_path.prepend(own)
    assert sys.path == [*own, "/bin"]
