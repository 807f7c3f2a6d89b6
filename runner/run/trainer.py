"""The training of one experiment on this rank: opens the run, steps the loop and saves, and closes the run."""

from __future__ import annotations

import contextlib
import secrets
import time
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from torch.distributed import Store

from runner.checkpoint.checkpoints import FACTS, Checkpoints
from runner.checkpoint.saver import Saver
from runner.config.errors import ConfigError, RunError, truncate
from runner.config.hparams import merge_hyperparameters
from runner.config.run_folder import read_config, read_record
from runner.config.spec import ExperimentSpec
from runner.config.trust import signature
from runner.control.handlers import CommandHandlers
from runner.run.best import Best, BestCheckpoint
from runner.run.build.experiment import Experiment, build
from runner.run.evaluation import measure, show
from runner.run.exports import last_evaluation, make_metadata, write_exports
from runner.run.first_step import KnownTensors, log_model_summary
from runner.run.hooks import Hooks
from runner.run.pretrained import check_modules
from runner.run.state import RunState, fingerprint_of
from runner.run.weights import initial_weights, placeholders
from runner.tracking.console import Console, describe_numbers, open_log
from runner.tracking.null import NullRunRecord, NullSaver, NullTracker
from runner.tracking.run_record import RunRecord, find_run_id
from runner.tracking.tracker import TrackerThread
from runner.utils.distributed import (
    RankAbortError,
    RankError,
    RankLostError,
    is_rank_zero,
    rank,
    run_on_all_ranks,
    run_on_rank_zero,
    world_size,
)
from runner.utils.distributed.memory import freeze_gc
from runner.utils.files.open_files import describe_limit, is_out_of_files
from runner.utils.train.failures import FailurePolicy, SetupError, TrainingStopped, disk_errors_as, value_errors_as
from runner.utils.train.loop import Action, Loop
from runner.utils.utils import describe, is_signal

_CONSOLE_INTERVAL_S = 5.0  # between lines of metrics on the console; metrics.jsonl has every one


class Trainer:
    """Trains one experiment on this rank, from its start or a checkpoint to its end.

    Call `open`, `fit` and `close` once each, in this order, on all ranks.

    Attributes:
        is_new: it resumes no checkpoint.
        begins_again: it is new, in the folder of an earlier start that saved nothing. The caller sets it.
    """

    @classmethod
    def open(
        cls,
        spec: ExperimentSpec,
        folder: Path,
        stack: contextlib.ExitStack,
        accept: Callable[[], None],
        *,
        checkpoint: tuple[Path, dict[str, Any]] | None = None,
        store: Store | None = None,
        launch_id: str = "",
        hparams: Mapping[str, bool | float | str] | None = None,
    ) -> Trainer:
        """Builds the experiment, loads the checkpoint, and starts run.json.

        Args:
            stack: closes the console and the log.
            accept: called on rank zero when everything is built and loaded, before the run is changed on disk.
            checkpoint: path and content of the checkpoint to resume.
            store: through which ranks send messages.
            launch_id: in run.json; the same for all restarts by one launcher.
            hparams: hyperparameters of this start, for TensorBoard.
        Raises:
            ConfigError: something can't be built, or the checkpoint does not fit.
            RankError: one of these on another rank.
        """
        other_run = None if checkpoint else initial_weights.find_initial_weights(spec.plain)
        builder: placeholders.ModelBuilder | None = other_run
        if checkpoint:
            is_signed = run_on_rank_zero(lambda: signature.find_signed(folder) is not None)  # others may lack the key
            builder = placeholders.PlaceholderBuilder(folder, checkpoint[1], is_signed)
        experiment = build(spec, store, builder)
        opened: list[Trainer] = []
        run_on_all_ranks(lambda: opened.append(cls(experiment, folder, stack, checkpoint)))
        (trainer,) = opened
        for line in other_run.lines if other_run and is_rank_zero() else ():
            trainer.log.info("%s", line)
        run_on_all_ranks(lambda: trainer._start_record(accept, launch_id, hparams or {}) if is_rank_zero() else None)
        return trainer

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        stack: contextlib.ExitStack,
        checkpoint: tuple[Path, dict[str, Any]] | None,
    ) -> None:
        self.experiment = experiment
        self.spec = experiment.spec
        self.engines = experiment.engines
        self.coordinator = experiment.coordinator
        check_modules(self.spec, self.engines)
        self.folder = folder
        self.is_new = checkpoint is None
        self.begins_again = False
        self.record: RunRecord | NullRunRecord = NullRunRecord()
        if is_rank_zero():
            self.record = RunRecord(folder, partial(signature.may_read_git, folder))
        try:
            self.record.read()
        except ValueError as error:
            raise ConfigError(str(error)) from error
        trainer = self.spec.trainer
        start = checkpoint[1][FACTS]["loop"]["step"] if checkpoint else 0
        is_shown = None if self.spec.tracking.progress and is_rank_zero() else False
        self._console = Console(trainer.steps, first_step=start, enabled=is_shown)
        stack.callback(self._console.close)
        for evaluation in experiment.evaluations.values():
            stack.callback(evaluation.close)
        self.log = stack.enter_context(open_log(folder, self._console, rank()))
        self.tracker: TrackerThread | NullTracker = NullTracker()
        self._recorded: dict[str, int] | None = None  # the tracker's counts at the checkpoint
        self.best = Best(trainer.best_metric, trainer.best_mode.name == "max")
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            format=self.spec.checkpoint.format.name,
            keep_last=trainer.keep_last,
            keep_every=trainer.keep_every,
            keep_best=trainer.keep_best,
            rate=self.best.rate,
        )
        self.best_checkpoint = BestCheckpoint(self.best, self.checkpoints, trainer.keep_best > 0)
        self.saver = self._make_saver()
        self._saved_best: dict[str, Any] | None = None  # in the checkpoint that is resumed
        self._last_saved: tuple[int, Path | None] = (start, checkpoint[0] if checkpoint else None)
        self.evaluation: dict[str, Any] | None = None
        self.hparams: dict[str, bool | float | str] = {}
        self.run_id = ""  # by which trackers know the run
        self._next_line_s = time.monotonic() + _CONSOLE_INTERVAL_S
        self._num_evaluated = 0  # batches
        self.commands = CommandHandlers(self.engines.set_lr, self.coordinator, partial(self.log.info, "%s"))
        self.hooks = Hooks(self)
        self.loop = self._make_loop()
        self.state = RunState(experiment, self.loop, self.commands.queue, self.best)
        if checkpoint:
            self._resume(*checkpoint)
        self._first_step = self.loop.step
        self._tensors: list[KnownTensors] = []
        self._steps_before = {name: engine.steps for name, engine in self.engines.items()}
        if fault := self.state.find_unsaveable():
            raise ConfigError(fault)

    def _check_first_update(self) -> bool:
        """Checks the state again once every optimizer has made its own; returns whether that is done."""
        trained = [(name, engine) for name, engine in self.engines.items() if engine.optimizer is not None]
        if any(engine.steps == self._steps_before[name] for name, engine in trained):
            return False
        if fault := self.state.find_unsaveable():
            raise TrainingStopped(f"After its first step: {fault}", is_complete=False)
        for note in self.engines.find_late_generators():
            self.log.warning("%s", note)
        return True

    def _make_saver(self) -> Saver | NullSaver:
        if not is_rank_zero() and not self.engines.is_sharded:
            return NullSaver()
        writer: Any = self.checkpoints
        if self.engines.is_sharded:
            from runner.checkpoint import sharded  # slow to import

            writer = sharded.make_sharded(self.checkpoints, self.spec.distributed.timeout_s)
        return Saver(
            writer,
            before_commit=self._flush_numbers,
            before_prune=self._record_best,
            saved=self._saved,
            failed=self._save_failed,
        )

    def _start_record(self, accept: Callable[[], None], launch_id: str, hparams: Mapping[str, Any]) -> None:
        """Accepts the run, starts its session in run.json, and removes checkpoints after the step that is resumed."""
        before = read_record(self.folder)
        self.hparams = merge_hyperparameters(before.get("hparams"), hparams, self.spec.plain)
        self.run_id = find_run_id(before) or secrets.token_hex(8)
        self.best_checkpoint.convert_metrics(self._saved_best, lambda: read_config(self.folder))
        accept()  # replaces the config
        facts = {"id": self.run_id, "name": self.spec.name, "ranks": world_size(), "launch": launch_id}
        facts |= {"hparams": self.hparams}
        try:
            self.checkpoints.recover()
            later = set() if self.is_new else set(self.checkpoints.steps_after(self.loop.step))
            if not self.is_new:
                self.best_checkpoint.find_better(later)
            # Before they are removed: run.json must name no checkpoint that is gone.
            self.record.start_session(best=self.best_checkpoint.describe_best(later), **facts)
            if later:
                self.checkpoints.remove_after(self.loop.step)
        except ValueError as error:  # run.json is another file by now
            raise ConfigError(str(error)) from error

    def _record_best(self, removed: set[int]) -> bool:
        """Updates the best checkpoint in run.json; returns whether the checkpoints `removed` may be pruned."""
        try:
            self.record.update(best=self.best_checkpoint.describe_best(removed))
        except OSError as error:
            self.log.error("run.json can't be written, so that older checkpoints stay: %s", error)
            return False
        return True

    def _open_tracker(self) -> None:
        """Opens the tracker, which truncates the numbers in the folder to those up to this step."""
        self.tracker = TrackerThread(
            self.folder,
            self.experiment.trackers,
            resume_step=None if self.is_new and not self.begins_again else self.loop.step,
            is_eval_pending=self.begins_again or "eval" in self.loop.schedule.pending,
            recorded=self._recorded,
            warn=partial(self.log.warning, "%s"),
            name=self.spec.name,
            run_id=self.run_id,
        )
        self.tracker.hparams(self.hparams)

    def _make_loop(self) -> Loop:
        trainer = self.spec.trainer
        return Loop(
            self.engines,
            self.experiment.batches,
            steps=trainer.steps,
            accumulate=trainer.accumulate,
            seed=self.spec.seed,
            log_every=trainer.log_every,
            log=self._log_metrics,
            warn=self.log.warning,
            actions={
                "eval": Action(self.evaluate, trainer.eval_every),
                "export": Action(self.export, trainer.export_every),
                "save": Action(self.save, trainer.save_every),
            },
            commands=self.commands.by_name,
            queue=self.commands.queue,
            display=self._console,
            policy=FailurePolicy(trainer.on_oom.name, trainer.max_skips),
            coordinator=self.coordinator,
            check=self._check_first_update,
            on_step=self.hooks.on_step,
        )

    def fit(self) -> str:
        """Trains to the end; returns "finished", "quit" after that command, or the meaning of a signal.

        Raises:
            ConfigError: a mistake of the user's that showed before the first step.
            RunError: the run can't continue, but not because of a bug.
            RankLostError: another rank is gone.
        """
        with disk_errors_as("the run's folder", RunError):
            run_on_all_ranks(lambda: self._open_tracker() if is_rank_zero() else None)
            if not self.is_new:
                best = self.best_checkpoint
                self.best.found = run_on_rank_zero(best.describe_best if best.keep_best else lambda: self.best.found)
        self._log_summary()
        batches = self.experiment.batches
        status: str | None = None
        loop_error: BaseException | None = None
        try:
            with freeze_gc(), contextlib.closing(self.commands.queue), contextlib.closing(batches):
                if stdin := self.spec.tracking.stdin:
                    self.commands.start(self.loop.step, peeks=stdin == "auto", warn=self.log.warning)
                is_evaluated = bool(self.experiment.evaluations) and self.spec.trainer.eval_every > 0
                if self.is_new and is_evaluated and self.spec.trainer.eval_at_start:
                    self.loop.schedule.pending.append("eval")
                # The loop is called here, not on all ranks by a callback, so that few frames are above a user's module.
                try:
                    self.hooks.start()
                    status = self.loop.run()
                except BaseException as error:
                    if is_signal(error):
                        batches.kill_workers()
                        raise
                    loop_error = self._explain(error)
                status = self._agree_on_end(status, loop_error)
            if self.hooks.has_end:
                status = self._agree_on_end(status, self.hooks.end(status, self._explain))
        except BaseException as failure:
            self.hooks.end_failed(failure)
            try:
                self.tracker.close("failed")
            except Exception as error:  # must not hide the failure
                self.log.error("The run's numbers can't be written: %s", describe(error))
            raise
        with disk_errors_as("the run's numbers", RunError):
            self.tracker.close(status)
        if self.loop.end_reason:
            self.log.info("The run ends early: %s", self.loop.end_reason)
        self.log.info("%s at step %d: %s", status.capitalize(), self.loop.step, self.folder)
        return status

    def close(self, status: str, reason: str | None) -> None:
        """Writes the end of the run to run.json; an error of that must not hide the one that ended the run."""
        try:
            self.record.finish(status, reason, last_step=self.loop.step, best=self.best_checkpoint.describe_best())
        except OSError as error:
            self.log.error("run.json can't be written: %s", error)

    def _explain(self, error: BaseException) -> BaseException:
        """Returns the error that ends the run for an error of the loop, once the last save has ended."""
        with contextlib.suppress(Exception):  # it was logged when it failed
            self.saver.close()
        step, path = self._last_saved
        if is_rank_zero() and self.loop.step > step:
            remedy = f"go on from {path}" if path else "start anew"
            self.log.error("Steps %d to %d are not saved; %s", step + 1, self.loop.step, remedy)
        cause = error.__cause__ if isinstance(error, RankError) else error
        if isinstance(cause, SetupError):
            return ConfigError(str(cause))
        return RunError(str(error)) if cause is None or isinstance(cause, TrainingStopped) else cause

    def _agree_on_end(self, status: str | None, failure: BaseException | None) -> str:
        """Returns the status of the loop once all ranks have ended it; a failure on one rank fails all.

        Raises:
            RunError: a rank can't continue. The rank with a bug raises its own error instead.
        """

        def finish() -> str:
            if failure is not None:
                raise failure
            assert status is not None
            with disk_errors_as("the last checkpoint", RunError):
                self.saver.close()
            return status

        ending: BaseException
        try:
            return run_on_all_ranks(finish)[0]
        except RankAbortError as error:
            ending = RunError(str(error)) if error.is_expected or not error.__cause__ else error.__cause__
        except RankLostError as error:
            raise (RunError(reason) if (reason := self.coordinator.abort_reason(error)) else error) from error
        except RankError as error:
            ending = error.__cause__ or RunError(str(error))
        except Exception as error:  # the same on all ranks: only rank zero reports a bug
            ending = error if is_rank_zero() or isinstance(error, RunError) else RunError(f"rank 0: {describe(error)}")
        raise ending  # outside of the handlers, so that its traceback shows no other error

    def _log_summary(self) -> None:
        for name, engine in self.engines.items():
            if tensors := log_model_summary(name, engine, self.log.info):
                self._tensors.append(tensors)
        for note in [*self.experiment.notes, *self.engines.find_unseeded()]:
            self.log.warning("%s", note)
        ranks = f" on {world_size()} ranks" if world_size() > 1 else ""
        self.log.info("%d steps%s into %s", self.spec.trainer.steps, ranks, self.folder)

    def _check_tensors(self) -> None:
        for tensors in self._tensors:
            tensors.check_tensors(f"a forward up to step {self.loop.step}")

    def _log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        for tensors in self._tensors:
            tensors.check_quickly(f"a forward up to step {step}")
        with disk_errors_as("the run's numbers", TrainingStopped):
            self.tracker.log(step, values)
        self.hooks.log_values(values)
        if self.spec.tracking.progress and time.monotonic() >= self._next_line_s:
            self._next_line_s = time.monotonic() + _CONSOLE_INTERVAL_S
            shown = {name.removeprefix("train/"): value for name, value in values.items()}
            self.log.info("Step %d of %d: %s", step, self.spec.trainer.steps, describe_numbers(shown))

    def save(self) -> None:
        """Copies the state and has the saver commit it as a checkpoint, beside the loop."""
        if self.coordinator.is_disconnected:
            self.log.warning("Rank 0 saves alone: numbers not yet logged are those of its own samples")
        else:
            self.hooks.saving()
            self.engines.share_metrics()
            self.engines.sync_buffers()
        step = self.loop.step
        evaluated = self.evaluation if self.evaluation and self.evaluation["step"] == step else {}
        parts, facts = self.state.collect()
        self._check_tensors()  # after `collect`, which reshards weights that an evaluation has left gathered
        facts["numbers"] = self.tracker.counts()
        try:
            self.saver.save(step, parts, facts, self.best.metric_of(evaluated))
        except (TypeError, ValueError) as error:
            raise TrainingStopped(self.state.find_unsaveable() or f"the state can't be saved: {error}") from error

    def _flush_numbers(self) -> None:
        """Writes the numbers to disk before a checkpoint is committed, which does not depend on them."""
        try:
            self.tracker.flush()
        except OSError as error:
            self.log.error("The checkpoint is saved without its last numbers: %s", error)

    def _saved(self, step: int, path: Path) -> None:
        self.log.info("Saved %s", path)
        if is_rank_zero():
            signature.mark_checkpoints(self.folder)
        self._last_saved = step, path
        with contextlib.suppress(OSError):  # the next update of run.json has it
            self.record.update(last_step=step)

    def _save_failed(self, step: int, error: Exception) -> None:
        remedy = f"; {describe_limit()}" if is_out_of_files(error) else ""
        self.log.error("The checkpoint of step %d could not be written: %s%s", step, error, remedy)
        self.best_checkpoint.mark_failed_save(step)
        if not self.folder.is_dir():
            self.loop.stop("failed")

    def _resume(self, path: Path, content: dict[str, Any]) -> None:
        facts = content.pop(FACTS)
        warnings = self.state.load_checkpoint(path, content, facts)
        self._recorded = facts.get("numbers")
        self._saved_best = facts["best"]
        self.evaluation = last_evaluation(self.folder, self.loop.step)
        if other_metric := self.best.restore_best(self._saved_best, self.evaluation or {}):
            warnings.append(other_metric)
        for warning in warnings:
            self.log.warning("%s", truncate(warning))
        self.log.info("Going on after step %d from %s", self.loop.step, path)

    def evaluate(self) -> None:
        """Evaluates every engine, logs its numbers and shows its report."""
        experiment, step = self.experiment, self.loop.step
        if not experiment.evaluations:
            self.log.info("There is nothing to evaluate on: data.eval has no dataset")
            return
        self._check_tensors()
        self.best_checkpoint.fall_back(self.coordinator.run_on_all_ranks)
        numbers, shown = measure(
            self.engines, experiment.evaluations, experiment.report, seed=self.spec.seed, step=step,
            should_stop=self.should_stop_evaluation, run_on_ranks=self.coordinator.run_on_all_ranks,
        )  # fmt: skip
        self.evaluation = {"step": step, **numbers}
        with disk_errors_as("the run's numbers", TrainingStopped):
            self.tracker.log(step, numbers)
        self.log.info("Step %d: %s", step, describe_numbers(numbers))
        with disk_errors_as("the run's sounds", TrainingStopped):
            show(self.tracker, self.log, self.folder, step, shown, writes=is_rank_zero())
        self.hooks.evaluated(numbers)
        try:
            # A typed evaluation, or that at the end of the run, must not change the learning rates.
            if self.loop.schedule.actions["eval"].is_due(step, is_last=False):
                self.engines.observe(numbers)
            is_best = self.best.update(step, numbers)
        except ValueError as error:  # a mistake in the config that the evaluation has shown
            if step > self._first_step:
                raise TrainingStopped(f"{error}; resume with the right name") from error
            raise SetupError(str(error), is_complete=False) from error
        if not is_best:
            return
        with disk_errors_as("run.json", TrainingStopped):
            if not self.best_checkpoint.keep_best:
                self.record.update(last_step=step, best=self.best_checkpoint.describe_best())
            elif "save" not in self.loop.schedule.pending:  # run.json names it when it is on disk
                self.loop.schedule.pending.append("save")

    @property
    def progress(self) -> tuple[int, int]:
        """Numbers that change while this rank makes progress: steps, and batches evaluated."""
        return self.loop.step, self._num_evaluated

    def should_stop_evaluation(self) -> bool:
        """Counts a batch as progress; returns whether the loop is stopping."""
        self._num_evaluated += 1
        return self.loop.is_stopping

    def export(self) -> None:
        """Writes each engine's weights, with the metadata of this run."""
        self.write_export(self.evaluation)

    def write_export(self, evaluation: Mapping[str, Any] | None, suffix: str = "") -> None:
        """Writes the weights as they are, with the numbers of an evaluation and `suffix` after the engines' names."""
        data, best = fingerprint_of(self.experiment.batches.dataset), self.best.found
        metadata = make_metadata(self.spec.plain, self.folder, self.loop.step, best, evaluation, data)
        with disk_errors_as("the export", TrainingStopped), value_errors_as("the export", TrainingStopped):
            paths = write_exports(
                self.engines, self.folder / "exports", metadata, self.spec.export, writes=is_rank_zero(), suffix=suffix
            )
        for path in paths:
            self.log.info("Exported %s", path)
