"""The directories that modules are imported from: the user's own, and never an untrusted run folder.

`python -m` puts the current directory on `sys.path` before any code of ours runs. Must import nothing but `os` and
`sys`, which the interpreter has loaded by then: a file in an untrusted folder may have the name of any other module.
"""

import os
import sys

_MARKS = (".hydra", "run.json")  # a folder that holds one of these is a run folder


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
    """Says whether a command opens a run that is there: each but `python -m runner` without `resume=`."""
    is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    resumes = any(argument.startswith("resume=") for argument in sys.argv[1:])
    return _find_module_name() not in ("runner", "runner.__main__") or resumes or is_requeued


def add_current_directory(*, first: bool, opens_run: bool) -> None:
    """Puts the current directory on the path, as `python -m` does, for an installed command.

    Args:
        first: before all else, where a module of the user's may stand in for an installed one; else after it.
        opens_run: the command opens a run that is there, so that a run folder is left out.
    """
    current = os.getcwd()
    if sys.flags.safe_path or current in sys.path or (opens_run and is_in_run_folder(current)):
        return
    sys.path.insert(0 if first else len(sys.path), current)


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
