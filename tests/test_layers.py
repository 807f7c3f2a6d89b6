import ast
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "runner"


def test_an_import_only_goes_down():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("path", sorted((PACKAGE / "utils").glob("*.py")), ids=lambda path: path.name)
def test_the_box_of_tools_imports_torch_safetensors_numpy_and_the_standard_library_alone(path):
    allowed = {"torch", "safetensors", "numpy", "__future__", "runner"} | sys.stdlib_module_names
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [node.module or "."]
        for name in names:
            assert name.partition(".")[0] in allowed, f"{path.name} imports {name}"
            assert not name.startswith("runner") or name.startswith("runner.utils"), f"{path.name} imports {name}"


def test_the_box_itself_imports_nothing():
    body = ast.parse((PACKAGE / "utils" / "__init__.py").read_text()).body
    assert len(body) == 1


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_stays_under_500_lines_and_a_function_under_60(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno <= 60, f"{path.name}: {node.name}"
