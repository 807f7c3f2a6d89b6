"""`python -m runner`: imports the program only once Ctrl-C can end it cleanly."""

import sys

from runner.config.trust import import_path
from runner.control import signals, terminal


def main() -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    terminal.outlive()
    with signals.exit_on_interrupt():
        from runner.launch import command_line

        command_line.main()


def start_installed() -> None:
    """Runs the installed command, which finds modules in the current directory, as `python -m` does.

    Where the command opens a folder that may be untrusted, only what the user allows is imported from there.
    """
    if import_path.opens_folder(sys.argv[1:]):
        import_path.defer_current_directory()
    else:
        import_path.add_current_directory()
    main()


if __name__ == "__main__":
    main()
