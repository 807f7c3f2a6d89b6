"""The directories that modules are imported from: the user's own, and never an untrusted run folder.

`python -m` puts the current directory on `sys.path` before any code of ours runs. Must import nothing but `os` and
`sys`, which the interpreter has loaded by then: a file in an untrusted folder may have the name of any other module.
"""

import os
import sys

# A folder that holds one of these is a run folder, or a sweep's or a checkpoint's.
_MARKS = (".hydra", "run.json", "multirun.yaml", "MANIFEST.json")
# Keys of a command line that name a folder which may be untrusted.
_OPENING = ("resume", "init_from", "hydra.run.dir", "hydra.sweep.dir")
_deferred: str | None = None  # a directory to import from once it is known that the user trusts what it has


def is_in_run_folder(directory: str) -> bool:
    """Says whether a directory is a run folder or lies inside one."""
    place = os.path.realpath(directory)
    while True:
        if any(os.path.lexists(os.path.join(place, mark)) for mark in _MARKS) or _has_checkpoints(place):
            return True
        parent = os.path.dirname(place)
        if parent == place:
            return False
        place = parent


def _has_checkpoints(place: str) -> bool:
    folder = os.path.join(place, "checkpoints")
    try:
        return any(name.startswith("step_") for name in os.listdir(folder))
    except OSError:
        return False


def leave_out_run_folder() -> None:
    """Takes the current directory off the path where it is a run folder, or in one, and `python -m` opens a saved run.

    Call it first thing. A new run may be started in such a folder: its modules are the user's own.
    """
    if _find_module_name() is None or not _opens_run():
        return
    current = os.getcwd()
    if is_in_run_folder(current):
        sys.path[:] = [entry for entry in sys.path if os.path.realpath(entry or current) != os.path.realpath(current)]


def _find_module_name() -> str | None:
    """Returns the name of the module of the runner that `python -m` is about to start; None for another program."""
    if sys.argv[:1] != ["-m"]:  # so it reads while the module is looked for
        return None
    name = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)].removeprefix("-m")
    return name if name.partition(".")[0] == "runner" else None


def _opens_run() -> bool:
    """Says whether a command opens a folder that is there: each but `python -m runner` of a new run."""
    return _find_module_name() not in ("runner", "runner.__main__") or opens_folder(sys.argv[1:])


def opens_folder(arguments: list[str]) -> bool:
    """Says whether a command line of `runner` names a folder that may be untrusted."""
    return is_requeued() or any(argument.partition("=")[0].lstrip("+~") in _OPENING for argument in arguments)


def is_requeued() -> bool:
    """Says whether Slurm starts this job again, after a preemption: its folder, if it is given, may hold the run."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def add_current_directory() -> None:
    """Puts the current directory first on the path, as `python -m` does, for an installed command."""
    current = os.getcwd()
    if not sys.flags.safe_path and current not in sys.path:
        sys.path.insert(0, current)


def defer_current_directory() -> None:
    """Remembers the current directory for `add_deferred`; a run folder is none to import from."""
    global _deferred
    current = os.getcwd()
    if not sys.flags.safe_path and current not in sys.path and not is_in_run_folder(current):
        _deferred = current


def add_deferred() -> None:
    """Puts the remembered directory last on the path: what the user allowed by name may lie there."""
    if _deferred is not None and _deferred not in sys.path:
        sys.path.append(_deferred)


def list_own() -> list[str]:
    """Returns the directories of `sys.path` that are the user's: none of the interpreter's or of installed packages."""
    places = {os.path.realpath(path) for path in (sys.prefix, sys.base_prefix, sys.exec_prefix)}
    entries = [os.path.abspath(entry) for entry in sys.path if entry != "" or not sys.flags.safe_path]
    return [
        entry
        for entry in dict.fromkeys(entries)
        if os.path.isdir(entry) and not any(_is_below(os.path.realpath(entry), place) for place in places)
    ]


def _is_below(path: str, folder: str) -> bool:
    return os.path.commonpath([path, folder]) == folder


def prepend(directories: list[str]) -> None:
    """Puts directories that are not on the path yet before all others, in their order."""
    present = {os.path.realpath(entry or os.getcwd()) for entry in sys.path}
    sys.path[:0] = [each for each in directories if os.path.isdir(each) and os.path.realpath(each) not in present]
