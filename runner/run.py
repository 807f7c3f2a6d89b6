"""One run: build, resume, train, close. Must not know how its config was composed."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Any

from runner.build import build
from runner.config import ConfigError
from runner.console import Console, open_log
from runner.run_folder import find_checkpoint
from runner.run_record import RunRecord
from runner.session import Session

INTERRUPTED = 130  # the exit status after Ctrl-C, as shells have it


def run(cfg: Any, folder: Path) -> int:
    """Runs a composed config in its folder; returns the exit status: 0, or 130 after Ctrl-C.

    Raises:
        ConfigError: the config's objects can't be built, or there is nothing whole to resume.
    """
    try:
        experiment = build(cfg)
        found = _find(Path(cfg.resume)) if cfg.resume else None
    except ConfigError:
        if not cfg.resume:
            _remove_unused(folder)
        raise
    record = RunRecord(folder)
    with contextlib.ExitStack() as stack:
        first_step = found[1]["trainer.json"]["loop"]["step"] if found else 0
        is_shown = None if experiment.tracking.progress else False
        console = Console(experiment.trainer.steps, first_step=first_step, enabled=is_shown)
        stack.callback(console.close)
        log = stack.enter_context(open_log(folder, console))
        record.start(name=experiment.name)
        status = "failed"
        try:
            session = Session(experiment, folder, record, console, log, found)
            status = session.run()
        except KeyboardInterrupt:
            status = "interrupted"
        except BaseException as error:
            log.error("The run failed: %s: %s", type(error).__name__, error)
            raise
        finally:
            record.finish(status)
    return INTERRUPTED if status == "interrupted" else 0


def _remove_unused(folder: Path) -> None:
    """Removes a folder in which nothing but the config was written yet."""
    for file in (folder / ".hydra").glob("*.yaml"):
        file.unlink()
    with contextlib.suppress(OSError):  # it holds something else
        (folder / ".hydra").rmdir()
        folder.rmdir()


def _find(path: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the checkpoint to go on from and its content."""
    try:
        found, content, faults = find_checkpoint(path)
    except ConfigError as error:
        raise ConfigError(f"resume: {error}") from error
    for fault in faults:
        print(f"Passed over: {fault}")
    return found, content
