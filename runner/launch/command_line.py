"""The command line of `python -m runner`: composes the config, then launches it. Must not import torch."""

from __future__ import annotations

import gc
import sys
from typing import Any

import hydra
from omegaconf import DictConfig

from runner.config import checks, errors
from runner.config.composition.interpolation import quote_nested
from runner.control import signals
from runner.launch import launcher


@hydra.main(config_path=str(checks.CONF_DIR), config_name="config", version_base="1.3")
def _compose_and_launch(cfg: DictConfig) -> Any:
    return launcher.launch(cfg)


def main() -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    with signals.exit_on_interrupt(_clean_up):
        _run()


def _clean_up(status: int) -> None:
    launcher.leave(status)
    launcher.drop_unused()


def _run() -> None:
    checks.register()
    errors.hide_tracebacks(False)
    gc.disable()  # importing torch makes no garbage, and looking for it takes a third of the time; `run` enables it
    status = 1
    try:
        if (followed := launcher.join()) is not None:
            sys.exit(followed)
        arguments = launcher.with_resumed_overrides([quote_nested(argument) for argument in sys.argv[1:]])
        if launcher.shows_resumed(arguments):
            sys.exit(0)
        sys.argv[1:] = sorted(arguments, key=lambda a: a not in ("-m", "--multirun"))
        with errors.raised_by_hydra():  # the message is made here
            _compose_and_launch()
        status = 0
    except Exception as error:
        message = errors.format_error(error)
        if message is None and errors.hides_tracebacks():
            errors.tell_traceback(error)
            sys.exit(status)
        if errors.wants_traceback() or message is None:
            raise
        if not getattr(error, "is_told", False):
            errors.tell(message)
        status = 2
        sys.exit(status)
    except KeyboardInterrupt as interrupt:  # before there was a run to save
        status = signals.STATUSES[signals.meaning_of(interrupt)[0]]
        sys.exit(status)
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        _clean_up(status)
        gc.enable()
