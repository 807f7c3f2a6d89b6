"""One run in its folder: locks the folder, opens the trainer, fits and closes it, and cleans up if it never began."""

from __future__ import annotations

import contextlib
import errno
import logging
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.distributed import Store

from runner.checkpoint.saver import Saver
from runner.config.errors import (
    ConfigError,
    RunError,
    are_tracebacks_hidden,
    describe_without_traceback,
    print_traceback,
    truncate,
)
from runner.config.run_folder import find_checkpoint, load_checked, read_record
from runner.config.spec import ExperimentSpec
from runner.config.trust import signature
from runner.control.signals import EXIT_STATUSES, STATUS_BY_SIGNAL, StopSignals, status_of_interrupt
from runner.engines.dynamo import reset_dynamo
from runner.run.trainer import Trainer
from runner.run.watchdog import watchdog
from runner.run.weights.placeholders import RECORD_NAME
from runner.tracking.trackers.csv import CSV_NAME
from runner.tracking.trackers.jsonl import METRICS_NAME
from runner.utils.distributed import (
    RankError,
    RankLostError,
    is_distributed,
    is_rank_zero,
    rank,
    run_on_all_ranks,
    run_on_rank_zero,
)
from runner.utils.files import disk, lock_file, make_folders
from runner.utils.sampler.batches import EvaluationData, PositionedBatches
from runner.utils.sampler.stream import StreamEvaluation
from runner.utils.train.step import StepRunner
from runner.utils.utils import describe, escape_controls, is_signal, one_line

LOCK = ".lock"
_BEGUN = "begun"


@dataclass
class _End:
    """The end of a run: status and reason as in run.json, and an error to print with its traceback."""

    status: str = "failed"
    reason: str | None = None
    signal_number: int = 0  # of a second signal, which ended the run without a save
    bug: BaseException | None = None

    @property
    def exit_status(self) -> int:
        return 128 + self.signal_number if self.signal_number else EXIT_STATUSES[self.status]

    def raise_failure(self) -> None:
        """Raises the error that ended the run, unless it was saved and may go on."""
        if self.signal_number:
            raise KeyboardInterrupt(self.signal_number)
        if self.bug is not None:
            raise self.bug
        if self.status == "failed":
            raise RunError(self.reason)


def run(
    spec: ExperimentSpec,
    folder: Path,
    accept: Callable[[], None],
    store: Store | None = None,
    *,
    is_restart: bool = False,
    persistent: Store | None = None,
    launch_id: str = "",
    is_sweep_job: bool = False,
    hparams: Mapping[str, bool | float | str] | None = None,
    links: Mapping[str, str] = {},
    raises: bool = False,
) -> int:
    """Runs an experiment in its folder, on this rank; returns the exit status.

    It is 0 at the end and after `quit`, 130 after Ctrl-C, 75 after SIGTERM or SIGUSR1 (saved: start it again with
    resume), 1 if the run can't continue, and 128 + its number after a second signal, which waits for nothing.

    Args:
        is_restart: a run that the folder holds resumes from its newest complete checkpoint, or begins again.
        persistent: a store that outlives restarts of the processes; it records that the run has begun.
        is_sweep_job: a failure is one line on the screen; the traceback is in log.txt.
        links: the target folders of links in `folder` that may be followed, by the links' names.
        raises: for a program that goes on: a failure is raised, and no signal ends the process.
        others: as of `Trainer.open`.
    Raises:
        SystemExit: this rank has aborted, so that its process must end.
        ConfigError: `Trainer.open` raised it, nothing can be resumed, or another process runs in this folder.
        RankError: one of these on another rank.
        RankLostError: another rank is gone.
        RunError, or the error of the model or data: the run has failed; only with `raises`.
        KeyboardInterrupt: a second signal; only with `raises`.
    """
    with contextlib.ExitStack() as stack:
        signals = StopSignals(ends_process=not raises)
        stack.enter_context(signals.install())
        stack.callback(reset_dynamo)
        _lock_on_all_ranks(folder, stack, links, is_restart, persistent)
        if is_restart and run_on_rank_zero(lambda: _may_resume(folder, spec.resume, launch_id)):
            spec = spec.resumed_from(folder)
        had_log = (folder / "log.txt").exists()
        with _undo_opening(spec, folder, had_log):
            checkpoint = _find_checkpoint(Path(spec.resume)) if spec.resume else None
            trainer = Trainer.open(
                spec, folder, stack, accept, checkpoint=checkpoint, store=store, launch_id=launch_id, hparams=hparams
            )
        if persistent is not None and is_rank_zero():
            persistent.set(_BEGUN, "")
        trainer.begins_again = is_restart and trainer.is_new
        _connect(signals, trainer)
        _log_record_faults(trainer)
        with _undo_start(trainer, had_log), _closing(trainer, signals, is_sweep_job) as end, _watch(trainer):
            end.status = trainer.fit()
    if raises:
        end.raise_failure()
    if end.bug is not None and not is_sweep_job and not are_tracebacks_hidden():
        print_traceback(end.bug)
    if trainer.coordinator.has_aborted:  # the other ranks wait until its connections are closed
        raise SystemExit(end.exit_status)
    return end.exit_status


def _connect(signals: StopSignals, trainer: Trainer) -> None:
    """Has signals stop the trainer's loop, from now on."""

    def report(name: str) -> None:
        trainer.log.info(
            "%s: the run saves and ends. It waits for %s; a second signal ends it at once, without a save",
            "Ctrl-C" if name == "SIGINT" else name,
            _describe_activity(trainer),
        )

    def close(number: int) -> None:
        end = _end_by_signal(number)
        trainer.close(end.status, end.reason)

    signals.connect(trainer.loop.stop, report, close)


def _describe_activity(trainer: Trainer) -> str:
    """Returns the activity of the main thread, for another thread that reports it."""
    frame = sys._current_frames().get(threading.main_thread().ident or 0)
    while frame is not None and frame.f_code not in _ACTIVITIES:
        frame = frame.f_back
    activity = _ACTIVITIES[frame.f_code] if frame is not None else "the end of step {next}"
    step, workers = trainer.loop.step, trainer.spec.data.num_workers
    source = f"{workers} loader workers" if workers else "this process"
    return activity.format(step=step, next=step + 1, source=source)


_ACTIVITIES = {  # by the function of the innermost frame that has one
    PositionedBatches._read.__code__: "a batch of data.train for step {next}, from {source}",
    EvaluationData.__iter__.__code__: "a batch of data.eval, from {source}",
    StreamEvaluation.__iter__.__code__: "a batch of data.eval, from {source}",
    Trainer.evaluate.__code__: "the evaluation after step {step}",
    Trainer.export.__code__: "the export after step {step}",
    Trainer.save.__code__: "the checkpoint of step {step}",
    Saver.close.__code__: "the checkpoint of step {step}",
    StepRunner.run.__code__: "the end of step {next}",
}


def _log_record_faults(trainer: Trainer) -> None:
    for fault in trainer.record.faults:
        trainer.log.warning("run.json: left out %s", fault)
    if crashed := trainer.record.crashed:
        trainer.log.warning("The session of process %s on %s crashed", crashed["pid"], one_line(str(crashed["host"])))


@contextlib.contextmanager
def _closing(trainer: Trainer, signals: StopSignals, is_sweep_job: bool) -> Iterator[_End]:
    """Closes the trainer after a block that fits it, which an error may have ended; the block sets the status."""
    end = _End()
    try:
        yield end
        end.reason = signals.first_signal or trainer.loop.end_reason
    except BaseException as error:
        vars(end).update(vars(_explain_end(error, trainer.log, is_sweep_job)))
        if isinstance(error, (ConfigError, RankError, RankLostError)):
            raise
    finally:
        signals.is_finished = True
        trainer.close(end.status, end.reason)


def _explain_end(error: BaseException, log: logging.Logger, is_sweep_job: bool) -> _End:
    """Returns the end of a run for an error of `Trainer.fit`, and logs it unless the caller reports it."""
    extra = {"is_for_file": is_sweep_job}
    if isinstance(error, RunError):
        log.error("The run ends: %s", error, extra=extra)
        return _End(reason=str(error))
    if isinstance(error, ConfigError):
        return _End(reason=str(error))
    if is_signal(error):
        return _end_by_signal(status_of_interrupt(error)[1])
    is_hidden = are_tracebacks_hidden()
    reason = describe_without_traceback(error) if is_hidden else describe(error)
    log.error("The run failed: %s", reason, exc_info=None if is_hidden else error, extra=extra)
    return _End(reason=reason, bug=error)


def _end_by_signal(number: int) -> _End:
    name = signal.Signals(number)
    return _End(STATUS_BY_SIGNAL[name], f"{name.name}, which did not wait for a save", number)


def _watch(trainer: Trainer) -> contextlib.AbstractContextManager[None]:
    if not is_distributed():
        return contextlib.nullcontext()
    timeout_s = trainer.spec.distributed.timeout_s
    return watchdog(lambda: trainer.progress, timeout_s, trainer.folder / "log.txt", f"rank {rank()}")


def _may_resume(folder: Path, resume: str | None, launch_id: str) -> bool:
    """Returns whether a run that is started again resumes from its newest checkpoint, and not from `resume`."""
    is_same_launch = read_record(folder).get("launch") == launch_id
    return (resume is None or is_same_launch) and any((folder / "checkpoints").glob("step_*"))


def _find_checkpoint(path: Path) -> tuple[Path, dict[str, Any]]:
    """Returns the checkpoint that rank zero finds at a path, and its content; all ranks call it."""
    content: dict[str, Any] = {}

    def find() -> Path:
        try:
            checkpoint, loaded, faults = find_checkpoint(path)
        except ConfigError as error:
            raise ConfigError(f"resume: {error}") from error
        for fault in faults:
            print(escape_controls(f"Passed over: {truncate(fault)}"))
        content.update(loaded)
        return checkpoint

    checkpoint = run_on_rank_zero(find)
    run_on_all_ranks(lambda: None if is_rank_zero() else content.update(load_checked(checkpoint)))
    return checkpoint, content


def _lock_on_all_ranks(
    folder: Path, stack: contextlib.ExitStack, links: Mapping[str, str], is_restart: bool, persistent: Store | None
) -> None:
    """Locks the folder on rank zero, and restricts every rank's writes to it, until the stack is closed."""

    def lock() -> None:
        try:
            # A start that ended before the run began has removed the folder. If the run began, somebody deleted it.
            if is_restart and is_rank_zero() and not (persistent is not None and persistent.check([_BEGUN])):
                make_folders(folder)
            stack.enter_context(disk.confine(folder, links))
            if is_rank_zero():
                stack.enter_context(lock_file(folder / LOCK))
        except BlockingIOError:
            raise ConfigError(f"{folder}: another process runs there; {_describe_runner(folder)}") from None
        except OSError as error:
            raise _refuse(error, folder) from error

    run_on_rank_zero(lock)
    run_on_all_ranks(lambda: None if is_rank_zero() else lock())


def _refuse(error: OSError, folder: Path) -> ConfigError:
    """Returns the error of a run that the disk does not let begin, which names a link or the folder."""
    path = error.filename if error.errno in (errno.ELOOP, errno.EINVAL) else folder
    return ConfigError(f"{path}: can't be written to ({error.strerror or error})")


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


@contextlib.contextmanager
def _undo_opening(spec: ExperimentSpec, folder: Path, had_log: bool) -> Iterator[None]:
    """Removes the folder of a new run that can't be opened."""
    try:
        yield
    except BaseException as error:
        if not spec.resume and is_rank_zero() and not (folder / "run.json").exists():
            _remove_unused(folder, had_log)
        if isinstance(error, OSError):
            raise _refuse(error, folder) from error
        raise


@contextlib.contextmanager
def _undo_start(trainer: Trainer, had_log: bool) -> Iterator[None]:
    """Removes the folder of a new run that a mistake in its config ends before its first step."""
    folder = trainer.folder
    try:
        yield
    except ConfigError:
        has_saved = any((folder / "checkpoints").glob("step_*"))
        if trainer.is_new and not trainer.begins_again and is_rank_zero() and not has_saved:
            written = [*folder.glob("events.out.tfevents.*"), folder / METRICS_NAME, folder / CSV_NAME]
            written.append(folder / "run.json")
            _remove_unused(folder, had_log, written)
        raise


def _remove_unused(folder: Path, had_log: bool, written: Iterable[Path] = ()) -> None:
    """Removes a folder that holds nothing but the config and what this process has written; an older log stays."""
    config = folder / ".hydra"
    with contextlib.suppress(OSError):  # it holds other files
        files = [*written, *config.glob("*.yaml"), config / RECORD_NAME, config / signature.NAME, folder / LOCK]
        for file in files if had_log else [*files, folder / "log.txt"]:
            with contextlib.suppress(FileNotFoundError):
                disk.unlink(file)
        if disk.is_folder(config):
            disk.remove_folder(config)
        disk.remove_folder(folder)
