import ast
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parent.parent / "runner"
CONTRACTS = tomllib.loads((PACKAGE.parent / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
LAYERS = [name.strip() for layer in CONTRACTS[0]["layers"] for name in layer.split("|")]
# These import Hydra or OmegaConf themselves; `runner.utils` may not even import what does.
KNOWS_CONFIG = {
    "launch.command_line",
    "launch.job",
    "launch.launcher",
    "launch.sweep",
    "run.build",
    "run.saved_model",
    "config.checks",
    "config.diff",
    "config.errors",
    "config.hparams",
    "config.optimizations",
    "config.resume",
    "config.run_folder",
    "config.schema",
    "config.trust.allowlist",
    "config.composition.expansion",
    "config.composition.interpolation",
    "config.composition.source",
}


def path_of(path):
    """Returns the dotted path of a module's file; of a package, that of the package."""
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = sorted(path_of(path) for path in PACKAGE.rglob("*.py"))


def is_under(module, names):
    return any(module == name or module.startswith(f"{name}.") for name in names)


def test_an_import_only_goes_down():
    done = subprocess.run(
        [Path(sys.executable).parent / "lint-imports", "--no-cache"], cwd=PACKAGE.parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_every_module_stands_once_in_the_layers(module):
    if module not in ("runner", "runner.utils"):  # one imports the two modules that it starts with, one imports nothing
        assert sum(is_under(module, [layer]) for layer in LAYERS) == 1


def test_every_module_that_may_not_know_the_config_stands_in_that_contract():
    packages = {path_of(path) for path in PACKAGE.rglob("__init__.py")}
    apart = [module for module in MODULES if module not in packages and not module.startswith("runner.utils.")]
    unaware = {module for module in apart if is_under(module, CONTRACTS[2]["source_modules"])}
    assert {f"runner.{name}" for name in KNOWS_CONFIG} == {*apart} - unaware


@pytest.mark.parametrize("path", sorted((PACKAGE / "utils").rglob("*.py")), ids=path_of)
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


def test_the_readme_of_the_box_lists_each_of_its_modules_once():
    rows = re.findall(r"^\| `([\w.]+)` \|", (PACKAGE / "utils" / "README.md").read_text(), re.MULTILINE)
    assert sorted(f"runner.utils.{row}" for row in rows) == [
        module for module in MODULES if module.startswith("runner.utils.") and module not in REEXPORTING
    ]


REEXPORTING = {path_of(path) for path in (PACKAGE / "utils").rglob("__init__.py")}


def test_a_package_but_a_tool_imports_nothing():
    for path in PACKAGE.rglob("__init__.py"):
        if path_of(path) not in ("runner", "runner.engines", *REEXPORTING):
            assert len(ast.parse(path.read_text()).body) == 1, path


def test_a_folder_has_at_most_12_files():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        files = [path for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
        assert len(files) <= 12, folder
    assert len([path for path in PACKAGE.iterdir() if path.name != "__pycache__"]) <= 13


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_stays_under_500_lines_and_a_function_under_60(path):
    text = path.read_text()
    assert text.count("\n") <= 510
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno <= 60, f"{path.name}: {node.name}"


# Changes of files that no call of `disk` makes, by module: what they are of, which is no run's folder.
ELSEWHERE = {
    "launch/elastic.py": ["tempfile.TemporaryDirectory", "touch", "write_bytes"],  # for the workers
    "examples/audio/audio_codec.py": ["write_bytes"],  # a sound where the user's program wants it
    "examples/audio/speech_codes.py": ["mkdir", "os.open"],  # the user's cache
    "control/signals.py": ["write_text"],  # the status for the launcher
    "control/terminal.py": ["os.open"],  # /dev/null
    "config/trust/signature.py": ["open", "os.link", "os.mkdir", "os.open", "os.unlink"],  # the user's key
    "utils/files/files.py": ["os.open"],  # to read
    "run/warm_start.py": ["tempfile.TemporaryDirectory"],  # of weights files that are gone
    "utils/files/open_files.py": ["os.open"],  # /dev/null, and open files again
    "launch/worker.py": ["touch", "write_text"],  # for the launcher
}
OF_OS = {"open", "replace", "rename", "renames", "unlink", "remove", "mkdir", "makedirs", "rmdir", "removedirs"}
OF_OS |= {"truncate", "link", "symlink", "mkfifo", "mknod", "chmod", "chown", "utime", "setxattr", "removexattr"}
OF_PATHS = {"write_text", "write_bytes", "unlink", "mkdir", "rmdir", "touch", "symlink_to", "hardlink_to", "rename"}
OF_LIBRARIES = {"shutil", "tempfile"}
READS = {"shutil.which", "shutil.disk_usage", "shutil.get_terminal_size"}
TO_A_PATH = {"FileHandler", "save_file", "savez", "savetxt", "tofile", "memmap", "SummaryWriter"}


def changes_of_files(tree):
    """Yields each call that opens a file by its path to write to it, or changes a name; as Python's own."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in READS:
            continue
        holder, _, last = name.rpartition(".")
        is_path = last in OF_PATHS and holder not in ("disk", "os")
        if (holder == "os" and last in OF_OS) or is_path or holder in OF_LIBRARIES or last in TO_A_PATH:
            yield last if is_path else name
        elif last == "open" and holder not in ("wave_format", "disk", "self._reserve", "reserve"):
            arguments = [*node.args[0 if holder else 1 :], *(each.value for each in node.keywords)]
            if any(not isinstance(each, ast.Constant) or set(str(each.value)) & {*"wax+"} for each in arguments):
                yield name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_file_is_changed_by_the_operations_of_disk_alone(path):
    changes = {*changes_of_files(ast.parse(path.read_text()))}
    assert path.name == "disk.py" or changes <= {*ELSEWHERE.get(str(path.relative_to(PACKAGE)), [])}


@pytest.mark.parametrize(
    "call",
    [
        "open(path, 'w')",
        "open(path, mode)",
        "open(path, mode='ab')",
        "path.open('w')",
        "os.replace(a, b)",
        "(a / b).write_text('')",
        "shutil.rmtree(a)",
        "tempfile.mkstemp()",
        "logging.FileHandler(a)",
        "a.rename(b)",
    ],
)
def test_a_change_of_a_file_is_seen(call):
    assert [*changes_of_files(ast.parse(call))]
    reads = "open(path), open(path, 'rb'), path.open('rb'), path.open(), disk.unlink(a), text.replace('a', 'b')"
    assert not [*changes_of_files(ast.parse(reads))]
