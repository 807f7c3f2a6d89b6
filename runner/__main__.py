"""`python -m runner`: imports the program only once Ctrl-C ends the process cleanly."""

import atexit
import contextlib
import gc
import io
import sys

from runner.config.trust import import_path
from runner.control import signals, terminal

_BUFFERED_FILES = (io.TextIOWrapper, io.BufferedWriter, io.BufferedRandom)


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
    atexit.register(_collect_once)


def _collect_once() -> None:
    """Collects garbage once at the program's end, in place of the interpreter's own three collections.

    These take 0.3 s with torch in memory. Files that a user's module left open are flushed, as they may not be closed.
    """
    if "torch" in sys.modules:
        for file in [found for found in gc.get_objects() if type(found) in _BUFFERED_FILES]:
            with contextlib.suppress(OSError, ValueError):  # closed, or only read
                file.flush()
        gc.collect()
    gc.freeze()


if __name__ == "__main__":
    _disable_gc()
    main()
