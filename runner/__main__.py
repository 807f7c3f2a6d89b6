"""`python -m runner`: imports the program only once Ctrl-C ends the process cleanly."""

import atexit
import gc
import sys

from runner.config.trust import import_path
from runner.control import signals, terminal


def main() -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    terminal.survive_closed_terminal()
    with signals.exit_on_interrupt():
        from runner.launch import command_line

        command_line.main()


def start_installed() -> None:
    """Runs the installed command, which imports modules from the current directory, as `python -m` does.

    If the command opens a folder that may be untrusted, only modules that the user allows are imported.
    """
    _disable_gc()
    if import_path.opens_folder(sys.argv[1:]):
        import_path.defer_current_directory()
    else:
        import_path.add_current_directory()
    main()


def _disable_gc() -> None:
    """Collects no garbage during imports, a third of whose time it takes; `Trainer.fit` enables it."""
    gc.disable()
    atexit.register(_freeze_without_torch)


def _freeze_without_torch() -> None:
    """Skips the collections at the program's end if no module of the user's was imported, such as by `--help`."""
    if "torch" not in sys.modules:
        gc.freeze()


if __name__ == "__main__":
    _disable_gc()
    main()
