"""`python -m runner`: imports the program only once Ctrl-C can end it cleanly."""

import os
import sys

from runner import import_path, signals, terminal


def main() -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    terminal.outlive()
    with signals.exit_on_interrupt():
        from runner import command

        command.main()


def start_installed() -> None:
    """Runs the installed command, which finds modules in the current directory, as `python -m` does."""
    is_requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    opens_run = is_requeued or any(argument.startswith("resume=") for argument in sys.argv[1:])
    import_path.add_current_directory(first=True, opens_run=opens_run)
    main()


if __name__ == "__main__":
    main()
