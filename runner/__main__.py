"""`python -m runner`: imports the program only once a signal can end it cleanly."""

from runner import signals


def main() -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    signals.exit_on_signals()
    from runner import command

    command.main()


if __name__ == "__main__":
    main()
