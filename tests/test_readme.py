"""The READMEs: their trees, links and commands match the repository."""

import ast
import re
import subprocess
import sys
import tomllib
import zipfile
from dataclasses import fields
from pathlib import Path

import pytest
from conftest import shared_zygote

from runner.config import schema
from runner.tracking.run_record import DISTRIBUTION

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PATHS_OF_A_RUN = ("outputs/", "audio/", "shards/", "checkpoints/", ".hydra/", "exports/", "wandb/")
PATHS_OF_A_USER = ("mine.py", "codec.py", "my_conf/")


def test_the_readme_has_the_commands_to_install_run_and_test():
    assert "pip install -e . -c constraints.txt && python -m runner\n" in README
    assert 'pip install -e ".[test]" -c constraints.txt && python -m pytest -n 2 --dist loadfile\n' in README


def test_every_path_in_the_tree_of_the_readme_exists():
    tree = re.search(r"```\n(conf/.*?)```", README, re.DOTALL)
    paths = re.findall(r"^((?:conf|runner|tests|outputs)[\w/.]*)", tree[1], re.MULTILINE)
    assert len(paths) > 10
    for path in paths:
        assert (ROOT / path).exists(), path


def test_the_tree_of_the_readme_lists_every_module():
    (tree,) = re.findall(r"```\n(conf/.*?)```", README, re.DOTALL)
    rows = dict(re.findall(r"^(\S+) +(.*(?:\n +.*)*)", tree, re.MULTILINE))  # continuation lines are indented
    for path in (ROOT / "runner").rglob("*.py"):
        module = path.relative_to(ROOT)
        if len(module.parts) == 2 and path.name != "__init__.py":
            assert str(module) in rows
        elif path.name != "__init__.py":
            assert path.stem in re.findall(r"\w+", rows[f"{module.parent}/"]), path


def rows_of(heading):
    """Returns the cells of each row of the table under a heading, without the two rows of its head."""
    section = re.search(rf"^## {heading}\n(.*?)^## ", README, re.DOTALL | re.MULTILINE)[1]
    return [re.split(r" \| ", row.strip("| ")) for row in re.findall(r"^\|.*\|$", section, re.MULTILINE)[2:]]


def test_the_reading_path_has_under_3000_lines():
    paths = [cells[0].strip("`") for cells in rows_of("Reading path")]
    assert f"These {len(paths)} files, under 3,000 lines together" in README
    assert len(set(paths)) == len(paths)
    assert sum(len((ROOT / path).read_text().splitlines()) for path in paths) < 3000


@pytest.mark.parametrize("cells", rows_of("Where is it"), ids=lambda cells: cells[0])
def test_a_file_that_the_readme_points_to_defines_the_names(cells):
    defined = set()
    for node in ast.parse((ROOT / cells[1].strip("`")).read_text()).body:
        if isinstance(node, ast.Assign):
            defined |= {ast.unparse(target) for target in node.targets}
        elif isinstance(node, ast.AnnAssign):
            defined.add(ast.unparse(node.target))
        elif isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            members = [member for member in node.body if isinstance(member, ast.FunctionDef)]
            defined |= {node.name, *(f"{node.name}.{member.name}" for member in members)}
    assert {*re.findall(r"`([\w.]+)`", cells[2])} <= defined


@pytest.mark.parametrize("name", ["README.md", "conf/README.md", "runner/utils/README.md", "tests/README.md"])
def test_every_path_in_a_readme_exists(name):
    page = ROOT / name
    for text in re.findall(r"`([\w./*-]+)`", page.read_text()):
        is_path = text.endswith("/") or re.fullmatch(r"[\w./*-]+\.(py|yaml|md|sh|toml)", text)
        if is_path and not text.startswith(PATHS_OF_A_RUN + PATHS_OF_A_USER):
            assert any(any(folder.glob(text)) for folder in (ROOT, page.parent)), f"{name}: {text}"


def test_the_readme_of_conf_lists_every_group_and_its_choices():
    page = (ROOT / "conf" / "README.md").read_text()
    rows = dict(re.findall(r"^\| `([\w/]+)/` \|.*\| (.*) \|$", page, re.MULTILINE))
    files = [path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml") if path.name != "config.yaml"]
    assert set(rows) == {str(path.parent) for path in files}
    for group, row in rows.items():
        assert sorted(re.findall(r"`(\w+)`", row)) == sorted(path.stem for path in files if str(path.parent) == group)


def test_the_readme_of_conf_names_the_schema_and_its_sections():
    page = (ROOT / "conf" / "README.md").read_text()
    ((sections, module),) = re.findall(
        r"^The runner's own sections \((.*?)\) have a schema in `(\S+)`", page, re.MULTILINE
    )
    assert module == str(Path(schema.__file__).relative_to(ROOT))
    types = {field.name: str(field.type) for field in fields(schema.Config)}
    assert set(re.findall(r"\w+", sections)) == {key for key, hint in types.items() if hint.endswith("Config")}


def test_install_commands_name_the_distribution_and_its_extras():
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert project["name"] == DISTRIBUTION
    places = [path for folder in ("conf", "runner", "tests") for path in (ROOT / folder).rglob("*.*")]
    texts = {p: p.read_text() for p in [ROOT / "README.md", *places] if p.suffix in (".py", ".yaml", ".md", ".sh")}
    for path, text in texts.items():
        for name, extra in re.findall(r'pip install "([\w-]+)\[(\w+)\]"', text):
            assert name == DISTRIBUTION, path
            assert extra in project["optional-dependencies"], path


@pytest.mark.parametrize("command", re.findall(r"^    (python -m runner .*?)(?: +#.*)?$", README, re.MULTILINE))
def test_every_command_in_the_readme_composes(command, tmp_path):
    words = re.sub(r"--config-dir \S+|experiment=mine|resume=\S+|<.*|-m ", "", command.removeprefix("python -m runner"))
    words = [re.sub(r"=([^,\[]*),.*", r"=\1", word) for word in words.split()]
    flags = [] if "--help" in words or "--cfg" in words else ["--cfg", "job"]
    zygote = shared_zygote()
    status = zygote.wait(zygote.start(ROOT, [*words, *flags], output=tmp_path / "printed.txt"))
    assert status == 0, (tmp_path / "printed.txt").read_text()


@pytest.mark.slow
def test_the_lines_for_python_run(tmp_path):
    section = README.partition("## From Python\n")[2]
    lines = re.findall(r"^    (.*)$", section.partition("\nA mistake")[0], re.MULTILINE)
    code = "\n".join(lines).replace('"outputs/..."', "run.folder").replace("200", "20").replace("400", "40")
    assert "runner.train" in code
    code += '\nassert (run.status, run.step) == ("finished", 40), run'
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path, stdout=subprocess.DEVNULL)


@pytest.mark.slow
def test_the_wheel_contains_the_config_and_runs_in_any_directory(tmp_path):
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
