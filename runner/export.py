"""`python -m runner.export RUN_OR_CHECKPOINT`: writes a saved model's weights, a file or folder for each engine.

torch is imported only once the arguments are parsed, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from runner.config.errors import exit_on_config_error, mention_start_directory, print_message
from runner.config.trust import import_path
from runner.config.trust.allowlist import add_trust_arguments
from runner.control import signals, terminal
from runner.utils.utils import escape_controls

_DESCRIPTION = "Writes a saved model's weights; by default as the run's config has it (export.*)."


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    terminal.prepare_streams()
    parser = argparse.ArgumentParser(prog="python -m runner.export", description=_DESCRIPTION)
    parser.add_argument("saved", metavar="RUN_OR_CHECKPOINT", type=Path, help="a folder")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="where to; by default the run's exports/")
    dtypes = ("bf16", "fp16", "fp32")
    parser.add_argument("--dtype", choices=dtypes, help="of the floating-point tensors")
    parser.add_argument("--format", choices=("sft", "huggingface"), help="a file, or a folder for from_pretrained")
    parser.add_argument("--ties", choices=("each", "once"), help="names of a tied weight in a file")
    add_trust_arguments(parser)
    options = parser.parse_args(arguments)
    with exit_on_config_error():
        with signals.exit_on_interrupt():
            from runner.run import saved_model

            saved = saved_model.open_checkpoint(options.saved, (), options.allow_targets, is_vouched_for=options.sign)
        for warning in saved.notes:
            print_message(warning)
        from runner.run.exports import export

        with mention_start_directory(saved.origin.directory if saved.origin else None):
            paths = export(saved, options.output, dtype=options.dtype, format=options.format, ties=options.ties)
        for path in paths:
            print(escape_controls(str(path)))


def start_installed() -> None:
    """Runs the installed command, which imports only allowed modules from the current directory."""
    import_path.defer_current_directory()
    main()


if __name__ == "__main__":
    main()
