"""The layers of imports, the size of modules, and where files are changed."""

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
# Modules that import Hydra or OmegaConf themselves.
IMPORT_HYDRA = {
    "api",
    "launch.command_line",
    "launch.in_process",
    "launch.job",
    "launch.launcher",
    "launch.process_state",
    "launch.sweep",
    "run.build.instantiate",
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
    "config.composition.yaml_text",
}


def path_of(path):
    """Returns the dotted path of a module or package from its file."""
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
def test_every_module_is_in_exactly_one_layer(module):
    if module not in ("runner", "runner.utils"):  # above and below all layers
        assert sum(is_under(module, [layer]) for layer in LAYERS) == 1


def test_the_contract_lists_every_module_that_does_not_import_hydra():
    packages = {path_of(path) for path in PACKAGE.rglob("__init__.py")}
    modules = [module for module in MODULES if module not in packages and not module.startswith("runner.utils.")]
    listed = {module for module in modules if is_under(module, CONTRACTS[2]["source_modules"])}
    assert {f"runner.{name}" for name in IMPORT_HYDRA} == {*modules} - listed


@pytest.mark.parametrize("path", sorted((PACKAGE / "utils").rglob("*.py")), ids=path_of)
def test_utils_imports_only_torch_safetensors_numpy_and_the_standard_library(path):
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


def test_the_readme_of_utils_lists_each_module_once():
    rows = re.findall(r"^\| `([\w.]+)` \|", (PACKAGE / "utils" / "README.md").read_text(), re.MULTILINE)
    assert sorted(f"runner.utils.{row}" for row in rows) == [
        module for module in MODULES if module.startswith("runner.utils.") and module not in REEXPORTING
    ]


REEXPORTING = {path_of(path) for path in (PACKAGE / "utils").rglob("__init__.py")}


def test_a_package_outside_utils_and_engines_imports_nothing():
    for path in PACKAGE.rglob("__init__.py"):
        if path_of(path) not in ("runner", "runner.engines", *REEXPORTING):
            assert len(ast.parse(path.read_text()).body) == 1, path


def test_a_folder_has_at_most_12_files():
    for folder in {path.parent for path in PACKAGE.rglob("*.py")}:
        files = [path for path in folder.iterdir() if path.is_file() and path.name != "__init__.py"]
        assert len(files) <= 12, folder
    assert len([path for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed")]) <= 15


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_a_module_stays_under_500_lines_and_a_function_under_60(path):
    text = path.read_text()
    assert text.count("\n") <= 500
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
            assert node.end_lineno - node.lineno <= 60, f"{path.name}: {node.name}"


# Calls by module that change files without `disk`, because these files are outside the run folder.
OUTSIDE_RUN_FOLDER = {
    "launch/elastic.py": ["tempfile.TemporaryDirectory", "touch", "write_bytes"],  # for the workers
    "examples/audio/audio_codec.py": ["write_bytes"],  # a WAV file at the caller's path
    "examples/audio/speech_codes.py": ["mkdir", "os.open"],  # the user's cache
    "control/signals.py": ["write_text"],  # the status for the launcher
    "control/terminal.py": ["os.open"],  # /dev/null
    "config/trust/signature.py": ["open", "os.link", "os.mkdir", "os.open", "os.unlink"],  # the user's key
    "utils/files/files.py": ["os.open"],  # to read
    "run/weights/placeholders.py": ["tempfile.TemporaryDirectory"],  # for placeholder weights files
    "utils/files/open_files.py": ["os.open"],  # /dev/null, and reopened files
    "launch/worker.py": ["touch", "write_text"],  # for the launcher
}
OS_FUNCTIONS = {"open", "replace", "rename", "renames", "unlink", "remove", "mkdir", "makedirs", "rmdir", "removedirs"}
OS_FUNCTIONS |= {"truncate", "link", "symlink", "mkfifo", "mknod", "chmod", "chown", "utime", "setxattr", "removexattr"}
PATH_METHODS = {"write_text", "write_bytes", "unlink", "mkdir", "rmdir", "touch", "symlink_to", "hardlink_to", "rename"}
LIBRARIES = {"shutil", "tempfile"}
READING_CALLS = {"shutil.which", "shutil.disk_usage", "shutil.get_terminal_size"}
WRITERS_TO_A_PATH = {"FileHandler", "save_file", "savez", "savetxt", "tofile", "memmap", "SummaryWriter"}


def find_file_changes(tree):
    """Yields the name of each call that opens a file by its path for writing, or changes a directory entry."""
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in READING_CALLS:
            continue
        holder, _, last = name.rpartition(".")
        is_path = last in PATH_METHODS and holder not in ("disk", "os")
        is_os = holder == "os" and last in OS_FUNCTIONS
        if is_os or is_path or holder in LIBRARIES or last in WRITERS_TO_A_PATH:
            yield last if is_path else name
        elif last == "open" and holder not in ("wave_format", "disk", "Trainer", "self._reserve", "reserve"):
            arguments = [*node.args[0 if holder else 1 :], *(keyword.value for keyword in node.keywords)]
            if any(not isinstance(value, ast.Constant) or set(str(value.value)) & {*"wax+"} for value in arguments):
                yield name


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda path: str(path.relative_to(PACKAGE)))
def test_files_in_a_run_folder_are_changed_only_through_disk(path):
    changes = {*find_file_changes(ast.parse(path.read_text()))}
    assert path.name == "disk.py" or changes <= {*OUTSIDE_RUN_FOLDER.get(str(path.relative_to(PACKAGE)), [])}


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
def test_find_file_changes_finds_writes_and_no_reads(call):
    assert [*find_file_changes(ast.parse(call))]
    reads = "open(path), open(path, 'rb'), path.open('rb'), path.open(), disk.unlink(a), text.replace('a', 'b')"
    assert not [*find_file_changes(ast.parse(reads))]
