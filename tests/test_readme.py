import re
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_the_two_commands_stand_in_it():
    assert "pip install -e . -c constraints.txt && python -m runner\n" in README
    assert 'pip install -e ".[test]" -c constraints.txt && python -m pytest -n 2 --dist loadfile\n' in README


def test_every_path_of_its_tree_is_there():
    tree = re.search(r"```\n(conf/.*?)```", README, re.DOTALL)
    paths = re.findall(r"^((?:conf|runner|tests|outputs)[\w/.]*)", tree[1], re.MULTILINE)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def test_every_module_stands_in_its_tree():
    for path in (ROOT / "runner").rglob("*.py"):
        if path.name != "__init__.py":
            assert path.stem in README, path


@pytest.mark.parametrize("command", re.findall(r"^    (python -m runner .*?)(?: +#.*)?$", README, re.MULTILINE))
def test_every_command_of_it_composes(command):
    words = re.sub(r"--config-dir \S+|experiment=mine|resume=\S+|<.*|-m ", "", command.removeprefix("python -m runner"))
    words = [re.sub(r"=([^,\[]*),.*", r"=\1", word) for word in words.split()]
    flags = [] if "--help" in words or "--cfg" in words else ["--cfg", "job"]
    subprocess.run([sys.executable, "-m", "runner", *words, *flags], check=True, cwd=ROOT, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_the_wheel_carries_the_config_and_runs_from_anywhere(tmp_path):
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    subprocess.run([*pip, "wheel", "--no-deps", "-w", tmp_path, ROOT], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    zipfile.ZipFile(wheel).extractall(tmp_path / "site")
    command = [sys.executable, "-P", "-m", "runner", "experiment=digits", "trainer=debug"]
    work = tmp_path / "work"
    work.mkdir()
    done = subprocess.run(
        command,
        cwd=work,
        env={"PYTHONPATH": str(tmp_path / "site"), "PATH": "/usr/bin:/bin"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert list(work.glob("outputs/*/*-digits/checkpoints/step_00000002/MANIFEST.json"))
