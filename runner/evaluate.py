"""`python -m runner.evaluate RUN_OR_CHECKPOINT_OR_EXPORT`: prints the evaluation of a saved model.

torch is imported only once the arguments are parsed, so that `--help` is fast.
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

from runner.config.errors import ConfigError, exit_on_config_error, mention_start_directory, print_message
from runner.config.trust import import_path
from runner.config.trust.allowlist import add_trust_arguments
from runner.control import signals, terminal
from runner.utils.utils import escape_controls, one_line

_WORKERS = "processes that load data; by default the saved config's for a run of your own, and 0 for an untrusted one"


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    terminal.prepare_streams()
    parser = argparse.ArgumentParser(prog="python -m runner.evaluate", description="Evaluates a saved model.")
    parser.add_argument("saved", metavar="RUN_OR_CHECKPOINT_OR_EXPORT", type=Path, help="a folder, or an exported file")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="set on the saved config: data.batch_size=8")
    parser.add_argument("--num-workers", type=int, metavar="N", help=_WORKERS)
    add_trust_arguments(parser)
    options = parser.parse_intermixed_args(arguments)
    if options.num_workers is not None:
        options.overrides.append(f"data.num_workers={options.num_workers}")
        if options.num_workers == 0:  # their settings need a worker
            options.overrides += ["data.prefetch_factor=null", "data.persistent_workers=null"]
    with exit_on_config_error(), signals.exit_on_interrupt():
        from runner.run import saved_model

        if os.path.isfile(options.saved):
            if options.sign:
                raise ConfigError(f"--sign: signs a run; {options.saved} is a file: export it anew from its run")
            saved = saved_model.open_export(options.saved, options.overrides, options.allow_targets)
        else:
            saved = saved_model.open_checkpoint(
                options.saved, options.overrides, options.allow_targets, is_vouched_for=options.sign
            )
        for warning in saved.notes:
            print_message(warning)
        from runner.run.evaluation import evaluate

        with mention_start_directory(saved.origin.directory if saved.origin else None):
            numbers, shown = evaluate(saved)
        from runner.tracking.media import Audio

    for name, number in numbers.items():
        print(one_line(name), number)
    for name, value in shown.items():
        if isinstance(value, str):
            print(f"{one_line(name)}:\n{escape_controls(value)}")
        elif isinstance(value, Audio):
            length_s = value.num_samples / value.sample_rate
            print(f"{one_line(name)}: a sound of {length_s:.1f} s, which a run writes to its folder")


def start_installed() -> None:
    """Runs the installed command, which imports only allowed modules from the current directory."""
    import_path.defer_current_directory()
    main()


if __name__ == "__main__":
    main()
