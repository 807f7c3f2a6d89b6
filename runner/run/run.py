"""One run: build, resume, train, close. Must not know how its config was composed."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import Store

from runner.checkpoint.checkpoints import FACTS
from runner.config.errors import ConfigError, cut, describe_hidden, hides_tracebacks, tell_traceback
from runner.config.hparams import merge
from runner.config.run_folder import find_checkpoint, load_checked, read_config, read_record
from runner.config.trust import signature
from runner.control.signals import MEANINGS, STATUSES, Signals, meaning_of
from runner.engines.dynamo import reset_dynamo
from runner.run import initial_weights, warm_start
from runner.run.build import Experiment, build
from runner.run.trainer import RunError, Trainer
from runner.run.watchdog import watchdog
from runner.tracking.console import Console, open_log
from runner.tracking.null import Silent
from runner.tracking.run_record import RunRecord
from runner.tracking.tracker import METRICS_NAME
from runner.utils.distributed import (
    RankError,
    RankLostError,
    is_distributed,
    is_rank_zero,
    rank,
    run_on_all_ranks,
    run_on_rank_zero,
    world_size,
)
from runner.utils.files import disk, held, make_folders
from runner.utils.utils import describe, escape_controls, is_signal, one_line

LOCK = ".lock"
_BEGUN = "begun"
Found = tuple[Path, dict[str, Any]]  # a checkpoint and its content


def run(
    settings: dict[str, Any],
    folder: Path,
    accept: Callable[[], None],
    store: Store | None = None,
    *,
    goes_on: bool = False,
    lasting: Store | None = None,
    launch: str = "",
    is_job: bool = False,
    hparams: Mapping[str, bool | float | str] | None = None,
    links: Mapping[str, str] = {},
) -> int:
    """Runs a resolved config in its folder, on this rank; returns the exit status.

    `accept` is called on the leader when all is built and loaded: until then a run that goes on is as it was.

    It is 0 at the end and after `quit`, 130 after Ctrl-C, 75 after SIGTERM or SIGUSR1 (saved: start it again with
    resume), 1 where the run can't go on, and 128 + its number after a second signal, which waits for nothing.

    Args:
        store: where the ranks of a run leave word for each other.
        goes_on: the folder holds the run already, which goes on from its newest whole checkpoint, or begins again.
        lasting: a store that outlives the processes, where they are started again: it says whether the run has begun.
        launch: the same for each start of all ranks by one launcher.
        is_job: of a sweep, which prints one line where the run fails; the traceback is in log.txt.
        hparams: the values that TensorBoard's HPARAMS page shows of this start.
        links: the folders that links in `folder` may lead to, by the links' names; no other link there is followed.
    Raises:
        SystemExit: this rank has left the others, so that its process must end.
        ConfigError: the config's objects can't be built, there is nothing whole to resume, or another process runs
            in this folder.
        RankError: one of these on another rank.
        LostError: another rank is gone.
    """
    with contextlib.ExitStack() as stack:
        signals = Signals()
        stack.enter_context(signals.taken())
        stack.callback(reset_dynamo)
        run_on_all_ranks(lambda: _hold(folder, stack, links, goes_on, lasting) if is_rank_zero() else None)
        run_on_all_ranks(lambda: None if is_rank_zero() else _confine(folder, stack, links))
        if goes_on and run_on_rank_zero(lambda: _has_begun(folder, settings["resume"], launch)):
            settings = {**settings, "resume": str(folder)}
        had_log = (folder / "log.txt").exists()
        session, record, log = _open(settings, folder, stack, accept, store, launch, hparams or {})
        if lasting is not None and is_rank_zero():
            lasting.set(_BEGUN, "")
        session.begins_again = goes_on and session.is_new
        _connect(signals, session, record, log)
        try:
            status, failure = _run(session, record, log, signals, {"is_for_file": is_job})
        except ConfigError:
            has_saved = any((folder / "checkpoints").glob("step_*"))
            if session.is_new and not session.begins_again and is_rank_zero() and not has_saved:
                _remove_begun(folder, had_log)
            raise
    if failure is not None and not is_job and not hides_tracebacks():
        tell_traceback(failure)
    if session.coordinator.has_aborted:  # the other ranks wait until its connections are closed
        raise SystemExit(status)
    return status


def _connect(signals: Signals, session: Trainer, record: RunRecord, log: logging.Logger) -> None:
    def tell(name: str) -> None:
        log.info(
            "%s: the run saves and ends. It waits for %s; a second signal ends it at once, without a save",
            "Ctrl-C" if name == "SIGINT" else name,
            session.describe_wait(),
        )

    def give_up(number: int) -> None:
        _finish(session, record, *_describe_cut(number), log)

    signals.connect(session.loop.stop, tell, give_up)


def _has_begun(folder: Path, resume: str | None, launch: str) -> bool:
    """Says whether a run that is started again is to go on from its newest checkpoint, whatever it was to resume."""
    is_of_this = read_record(folder).get("launch") == launch
    return (resume is None or is_of_this) and any((folder / "checkpoints").glob("step_*"))


def _hold(
    folder: Path, stack: contextlib.ExitStack, links: Mapping[str, str], goes_on: bool, lasting: Store | None
) -> None:
    try:
        # A start that was cut before the run began has removed the folder. A later one was deleted, and stays so.
        if goes_on and not (lasting is not None and lasting.check([_BEGUN])):
            make_folders(folder)
        _confine(folder, stack, links)
        stack.enter_context(held(folder / LOCK))
    except BlockingIOError:
        raise ConfigError(f"{folder}: another process runs there; {_describe_runner(folder)}") from None
    except OSError as error:
        raise _refused(error, folder) from error


def _confine(folder: Path, stack: contextlib.ExitStack, links: Mapping[str, str]) -> None:
    """Keeps this rank's writes in the run's folder until the stack is closed."""
    try:
        stack.enter_context(disk.confine(folder, links))
    except OSError as error:
        raise _refused(error, folder) from error


def _refused(error: OSError, folder: Path) -> ConfigError:
    """Returns what a run that has not begun ends with where the disk refuses, naming a link or the folder."""
    place = error.filename if error.errno in (errno.ELOOP, errno.EINVAL) else folder
    return ConfigError(f"{place}: can't be written to ({error.strerror or error})")


def _open(
    settings: dict[str, Any],
    folder: Path,
    stack: contextlib.ExitStack,
    accept: Callable[[], None],
    store: Store | None,
    launch: str,
    hparams: Mapping[str, bool | float | str],
) -> tuple[Trainer, Any, logging.Logger]:
    """Builds and loads all; where that can't be done, the folder is as it was."""
    has_log = (folder / "log.txt").exists()
    try:
        found = _find_together(Path(settings["resume"])) if settings["resume"] else None
        other_run = None if found else initial_weights.find(settings)
        experiment = build(settings, store, _make_stand_ins(folder, found[1]) if found else other_run)
        made: list[tuple[Trainer, Any, logging.Logger]] = []
        run_on_all_ranks(lambda: made.append(_make_session(experiment, folder, stack, found)))
        session, record, log = made[0]
        for line in other_run.lines if other_run and is_rank_zero() else ():
            log.info("%s", line)
        run_on_all_ranks(lambda: _begin(session, record, accept, launch, hparams) if is_rank_zero() else None)
        return session, record, log
    except BaseException as error:
        if not settings["resume"] and is_rank_zero() and not (folder / "run.json").exists():
            _remove_unused(folder, has_log)
        if isinstance(error, OSError):
            raise _refused(error, folder) from error
        raise


def _make_stand_ins(folder: Path, weights: Mapping[str, Any]) -> warm_start.StandIns:
    is_signed = run_on_rank_zero(
        lambda: signature.find_signed(folder) is not None
    )  # the key may lie on its machine alone
    return warm_start.StandIns(folder, weights, is_signed)


def _make_session(
    experiment: Experiment, folder: Path, stack: contextlib.ExitStack, found: Found | None
) -> tuple[Trainer, Any, logging.Logger]:
    record: Any = RunRecord(folder, partial(signature.may_read_git, folder)) if is_rank_zero() else Silent()
    try:
        record.read()
    except ValueError as error:
        raise ConfigError(str(error)) from error
    first_step = found[1][FACTS]["loop"]["step"] if found else 0
    is_shown = None if experiment.tracking.progress and is_rank_zero() else False
    console = Console(experiment.trainer.steps, first_step=first_step, enabled=is_shown)
    stack.callback(console.close)
    log = stack.enter_context(open_log(folder, console, rank()))
    return Trainer(experiment, folder, record, console, log, found), record, log


def _begin(
    session: Trainer,
    record: RunRecord,
    accept: Callable[[], None],
    launch: str,
    hparams: Mapping[str, bool | float | str],
) -> None:
    before = read_record(session.folder).get("hparams")
    session.hparams = merge(before, hparams, session.experiment.settings)
    session.convert_metrics(lambda: read_config(session.folder))  # which `accept` replaces
    accept()
    facts = {"name": session.experiment.name, "ranks": world_size(), "launch": launch, "hparams": session.hparams}
    try:
        session.start_record(**facts)
    except ValueError as error:  # another file has taken the place of run.json
        raise ConfigError(str(error)) from error


def _run(
    session: Trainer, record: RunRecord, log: logging.Logger, signals: Signals, extra: Mapping[str, Any]
) -> tuple[int, BaseException | None]:
    """Runs a session to its end; returns the exit status and an error whose traceback is to be printed.

    Args:
        extra: of the log record that says why the run failed.
    Raises:
        ConfigError, RankError: a mistake that was found before the first step.
        LostError: another rank is gone.
    """
    for fault in record.faults:
        log.warning("run.json: left out %s", fault)
    if record.crashed:
        pid, host = record.crashed["pid"], one_line(str(record.crashed["host"]))
        log.warning("The session of process %s on %s crashed", pid, host)
    status, reason = "failed", None
    try:
        with _watched(session):
            status = session.run()
        reason = signals.first
    except RunError as error:
        reason = str(error)
        log.error("The run ends: %s", error, extra=extra)
    except ConfigError as error:  # whoever started the run prints it
        reason = str(error)
        raise
    except BaseException as error:
        if is_signal(error):
            status, reason = _describe_cut(number := meaning_of(error)[1])
            return 128 + number, None
        is_hidden = hides_tracebacks()
        reason = describe_hidden(error) if is_hidden else describe(error)
        log.error("The run failed: %s", reason, exc_info=None if is_hidden else True, extra=extra)
        if isinstance(error, (RankError, RankLostError)):
            raise
        return STATUSES["failed"], error
    finally:
        signals.is_over = True
        _finish(session, record, status, reason, log)
    return STATUSES[status], None


def _describe_cut(number: int) -> tuple[str, str]:
    """Returns the status of a run that a second signal ends, and the reason."""
    name = signal.Signals(number)
    return MEANINGS[name], f"{name.name}, which did not wait for a save"


def _watched(session: Trainer) -> contextlib.AbstractContextManager[None]:
    if not is_distributed():
        return contextlib.nullcontext()
    timeout_s = session.experiment.settings["distributed"]["timeout_s"]
    return watchdog(lambda: session.progress, timeout_s, session.folder / "log.txt", f"rank {rank()}")


def _finish(session: Trainer, record: RunRecord, status: str, reason: str | None, log: logging.Logger) -> None:
    try:
        record.finish(status, reason, last_step=session.loop.step, best=session.describe_best())
    except OSError as error:  # what ended the run is not to be hidden by it
        log.error("run.json can't be written: %s", error)


def _describe_runner(folder: Path) -> str:
    record = read_record(folder)
    try:
        pid, host, started = record["pid"], record["host"], record["sessions"][-1]["started"]
    except (KeyError, IndexError, TypeError):
        return "it has only just begun"
    is_known = type(pid) is int and isinstance(host, str) and isinstance(started, str)
    return (
        one_line(f"process {pid} on {host:.80}, since {started:.40}") if is_known else "its run.json does not say which"
    )


def _remove_begun(folder: Path, has_log: bool) -> None:
    """Removes the folder of a run that has made no step, as what it was started with is a mistake."""
    with contextlib.suppress(OSError):
        for file in [*folder.glob("events.out.tfevents.*"), folder / METRICS_NAME, folder / "run.json"]:
            _remove(file)
    _remove_unused(folder, has_log)


def _remove_unused(folder: Path, has_log: bool) -> None:
    """Removes a folder in which nothing but the config was written yet."""
    with contextlib.suppress(OSError):  # it holds something else
        for file in [*(folder / ".hydra").glob("*.yaml"), folder / ".hydra" / warm_start.RECORD]:
            _remove(file)
        _remove(folder / ".hydra" / signature.NAME)
        _remove(folder / LOCK)
        if not has_log:
            _remove(folder / "log.txt")
        if disk.is_folder(folder / ".hydra"):
            disk.remove_folder(folder / ".hydra")
        disk.remove_folder(folder)


def _remove(file: Path) -> None:
    with contextlib.suppress(FileNotFoundError):
        disk.unlink(file)


def _find_together(path: Path) -> Found:
    """Returns the checkpoint that the leader finds to go on from, and its content."""
    content: dict[str, Any] = {}

    def find() -> Path:
        try:
            found, loaded, faults = find_checkpoint(path)
        except ConfigError as error:
            raise ConfigError(f"resume: {error}") from error
        for fault in faults:
            print(escape_controls(f"Passed over: {cut(fault)}"))
        content.update(loaded)
        return found

    found = run_on_rank_zero(find)
    run_on_all_ranks(lambda: None if is_rank_zero() else content.update(load_checked(found)))
    return found, content
