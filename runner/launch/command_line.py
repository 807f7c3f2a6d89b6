"""The command line of `python -m runner`: composes the config, then launches it. Does not import torch."""

from __future__ import annotations

import gc
import sys

import hydra

from runner.config import checks, errors
from runner.config.composition.interpolation import quote_nested
from runner.control import signals
from runner.launch import launcher

_CONFIG = {"config_path": str(checks.CONF_DIR), "config_name": "config", "version_base": "1.3"}


def _clean_up(status: int) -> None:
    launcher.end_group(status)
    launcher.remove_unused_folder()


@signals.exit_on_interrupt(_clean_up)
def main() -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    checks.register_with_hydra()
    gc.disable()  # importing torch makes no garbage, but collecting takes a third of its time; `Trainer.fit` enables it
    status = 1
    try:
        with errors.exit_on_config_error():
            if (group_status := launcher.join_group()) is not None:
                sys.exit(group_status)
            arguments = launcher.prepare_arguments([quote_nested(argument) for argument in sys.argv[1:]])
            if launcher.print_resumed_config(arguments):
                sys.exit(0)
            sys.argv[1:] = sorted(arguments, key=lambda a: a not in ("-m", "--multirun"))
            with errors.make_hydra_raise():
                hydra.main(**_CONFIG)(launcher.launch)()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        _clean_up(status)
        gc.enable()
