import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest

from runner.config import schema
from runner.tracking.run_record import DISTRIBUTION

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
OF_A_RUN = ("outputs/", "audio/", "shards/", "checkpoints/", ".hydra/", "exports/")
OF_A_USER = ("mine.py", "codec.py", "my_conf/")


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
    (tree,) = re.findall(r"```\n(conf/.*?)```", README, re.DOTALL)
    rows = dict(re.findall(r"^(\S+) +(.*(?:\n +.*)*)", tree, re.MULTILINE))  # a row's later lines are indented
    for path in (ROOT / "runner").rglob("*.py"):
        place = path.relative_to(ROOT)
        if len(place.parts) == 2 and path.name != "__init__.py":
            assert str(place) in rows
        elif path.name != "__init__.py":
            assert path.stem in re.findall(r"\w+", rows[f"{place.parent}/"]), path


@pytest.mark.parametrize("name", ["README.md", "conf/README.md", "runner/utils/README.md", "tests/README.md"])
def test_every_path_that_a_readme_names_is_there(name):
    page = ROOT / name
    for text in re.findall(r"`([\w./*-]+)`", page.read_text()):
        is_path = text.endswith("/") or re.fullmatch(r"[\w./*-]+\.(py|yaml|md|sh|toml)", text)
        if is_path and not text.startswith(OF_A_RUN + OF_A_USER):
            assert any(any(folder.glob(text)) for folder in (ROOT, page.parent)), f"{name}: {text}"


def test_the_page_of_the_config_describes_every_group_and_lists_its_choices():
    page = (ROOT / "conf" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/]+)/` \|.*\| (.*) \|$", page, re.MULTILINE))
    files = [path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml") if path.name != "config.yaml"]
    assert set(rows) == {str(path.parent) for path in files}
    for group, row in rows.items():
        assert sorted(re.findall(r"`(\w+)`", row)) == sorted(path.stem for path in files if str(path.parent) == group)


def test_the_page_of_the_config_names_where_the_schema_is_and_what_it_types():
    page = (ROOT / "conf" / "README.md").read_text()
    ((sections, place),) = re.findall(r"^What the runner owns \((.*?)\) has a schema in `(\S+)`", page, re.MULTILINE)
    assert place == str(Path(schema.__file__).relative_to(ROOT))
    types = {field.name: field.type for field in fields(schema.Config)}
    assert set(re.findall(r"\w+", sections)) == {key for key, kind in types.items() if str(kind).endswith("Config")}


def test_what_is_installed_is_called_by_the_distributions_own_name():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    places = [path for folder in ("conf", "runner", "tests") for path in (ROOT / folder).rglob("*.*")]
    texts = {p: p.read_text() for p in [ROOT / "README.md", *places] if p.suffix in (".py", ".yaml", ".md", ".sh")}
    for path, text in texts.items():
        for name, extra in re.findall(r'pip install "([\w-]+)\[(\w+)\]"', text):
            assert name == DISTRIBUTION, path
            assert extra in project["optional-dependencies"], path


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
