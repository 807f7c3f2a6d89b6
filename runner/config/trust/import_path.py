"""Keeps untrusted run folders off `sys.path`, and adds the directories that the user trusts.

`python -m` puts the current directory on `sys.path` before any code of ours runs. This module imports only `os` and
`sys`, which the interpreter has loaded by then: a file in an untrusted folder may have the name of any other module.
"""

import os
import sys

# A folder with one of these is that of a run, a sweep or a checkpoint.
_MARKS = (".hydra", "run.json", "multirun.yaml", "MANIFEST.json")
# Keys of a command line that name a folder which may be untrusted.
_PATH_KEYS = ("resume", "init_from", "init.path", "hydra.run.dir", "hydra.sweep.dir")
_deferred: str | None = None  # a directory to import from once the user has allowed modules by name


def is_in_run_folder(directory: str) -> bool:
    """Returns whether a directory is a run folder or inside one."""
    folder = os.path.realpath(directory)
    while not (any(os.path.lexists(os.path.join(folder, mark)) for mark in _MARKS) or _has_checkpoints(folder)):
        if folder == os.path.dirname(folder):
            return False
        folder = os.path.dirname(folder)
    return True


def _has_checkpoints(folder: str) -> bool:
    try:
        return any(name.startswith("step_") for name in os.listdir(os.path.join(folder, "checkpoints")))
    except OSError:
        return False


def leave_out_run_folder() -> None:
    """Removes the current directory from the path if it is in a run folder and `python -m` opens a saved run.

    Call it before any import. A new run may be started in such a folder: its modules are the user's own.
    """
    name = _find_module_name()
    # Every command opens a saved run but `python -m runner` of a new run.
    starts_run = name in ("runner", "runner.__main__") and not opens_folder(sys.argv[1:])
    if name is not None and not starts_run and is_in_run_folder(os.getcwd()):
        current = os.path.realpath(os.getcwd())
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or current) != current]


def _find_module_name() -> str | None:
    """Returns the name of the runner's module that `python -m` is about to start; None for another program."""
    if sys.argv[:1] != ["-m"]:  # its value while the interpreter searches for the module
        return None
    name = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)].removeprefix("-m")
    return name if name.partition(".")[0] == "runner" else None


def opens_folder(arguments: list[str]) -> bool:
    """Returns whether a command line of `runner` names a folder that may be untrusted."""
    return is_requeued() or any(argument.partition("=")[0].lstrip("+~") in _PATH_KEYS for argument in arguments)


def is_requeued() -> bool:
    """Returns whether Slurm restarts this job after a preemption: its folder, if it is given, may hold the run."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def add_current_directory() -> None:
    """Puts the current directory first on the path, for an installed command, as `python -m` does."""
    current = os.getcwd()
    if not sys.flags.safe_path and current not in sys.path:
        sys.path.insert(0, current)


def defer_current_directory() -> None:
    """Stores the current directory for `add_deferred`, unless it is in a run folder."""
    global _deferred
    current = os.getcwd()
    if not sys.flags.safe_path and current not in sys.path and not is_in_run_folder(current):
        _deferred = current


def add_deferred() -> None:
    """Puts the stored directory last on the path: modules that the user allowed by name may be there."""
    if _deferred is not None and _deferred not in sys.path:
        sys.path.append(_deferred)


def list_own() -> list[str]:
    """Returns the user's directories in `sys.path`: not the interpreter's, nor those of installed packages."""
    entries = [os.path.abspath(entry) for entry in sys.path if entry != "" or not sys.flags.safe_path]
    return [entry for entry in dict.fromkeys(entries) if os.path.isdir(entry) and not _is_installed(entry)]


def _is_installed(folder: str) -> bool:
    """Returns whether a folder belongs to the interpreter or its installed packages."""
    path = os.path.realpath(folder)
    prefixes = {os.path.realpath(prefix) for prefix in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    return any(os.path.commonpath([path, prefix]) == prefix for prefix in prefixes)


def prepend(directories: list[str]) -> None:
    """Puts directories that are not on the path yet before all others, in their order."""
    present = {os.path.realpath(entry or os.getcwd()) for entry in sys.path}
    sys.path[:0] = [path for path in directories if os.path.isdir(path) and os.path.realpath(path) not in present]
