"""`python -m runner`: imports the program only once Ctrl-C can end it cleanly."""

from runner import signals, terminal


def main() -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    terminal.outlive()
    with signals.exit_on_interrupt():
        from runner import command

        command.main()


if __name__ == "__main__":
    main()
