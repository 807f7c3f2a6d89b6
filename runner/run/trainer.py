"""One process's share of a run: the loop, and what is done between its steps. Must not know how it was composed."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
import time
from collections.abc import Callable, Container, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from runner.checkpoint.checkpoints import FACTS, Checkpoints
from runner.checkpoint.saver import Saver
from runner.config.checkpoint_facts import BATCHES
from runner.config.errors import ConfigError, cut
from runner.config.trust import signature
from runner.control.handlers import CommandHandlers
from runner.run.best import Best, mode_of, name_metric
from runner.run.build import Experiment
from runner.run.evaluation import measure, show
from runner.run.exports import facts_of, last_evaluation, write
from runner.run.fingerprint import find_change, fingerprint_of
from runner.run.first_step import KnownTensors, log_model_summary
from runner.tracking.console import Console, describe_numbers
from runner.tracking.null import Silent
from runner.tracking.run_record import RunRecord
from runner.tracking.tracker import Tracker
from runner.utils import io
from runner.utils.distributed import (
    RankAbortError,
    RankError,
    RankLostError,
    is_rank_zero,
    run_on_all_ranks,
    run_on_rank_zero,
    world_size,
)
from runner.utils.distributed.memory import lasting
from runner.utils.files.open_files import describe_limit, is_out_of_files
from runner.utils.sampler.batches import Batches, EvaluationData
from runner.utils.serialization import FlattenedState
from runner.utils.train import Loop
from runner.utils.train.failures import FailurePolicy, SetupError, TrainingStopped, disk_errors_as
from runner.utils.train.loop import Action
from runner.utils.train.step import StepRunner
from runner.utils.utils import describe, is_signal, message_of

_LINE_EVERY_S = 5.0  # metrics.jsonl has every one


class RunError(RuntimeError):
    """What ended a run without being a mistake in the program: told as one message."""


class Trainer:
    """One process's share of a run, from its start or a checkpoint to its end.

    Args:
        found: a checkpoint's folder and content to go on from.
    """

    def __init__(
        self,
        experiment: Experiment,
        folder: Path,
        record: RunRecord,
        console: Console,
        log: logging.Logger,
        found: tuple[Path, dict[str, Any]] | None,
    ) -> None:
        self.experiment, self.folder, self.record, self.log = experiment, folder, record, log
        self.engines, trainer, self.coordinator = experiment.engines, experiment.trainer, experiment.coordinator
        self.tracker: Any = Silent()
        self._recorded: dict[str, int] | None = None  # the tracker's counts at the checkpoint
        self.best = Best(trainer.best_metric, trainer.best_mode.name == "max")
        self.checkpoints = Checkpoints(
            folder / "checkpoints",
            format=experiment.checkpoint.format.name,
            keep_last=trainer.keep_last,
            keep_every=trainer.keep_every,
            keep_best=trainer.keep_best,
            rate=self.best.rate,
        )
        self.saver: Any = Silent()
        if is_rank_zero() or self.engines.is_sharded:
            self.saver = Saver(
                self._writer(),
                before_commit=self._flush_numbers,
                before_prune=self._tell_best,
                saved=self._saved,
                failed=self._save_failed,
            )
        self.is_new, self.begins_again = found is None, False  # over what one left that saved nothing yet
        self._has_lost_best = False  # its save has failed
        self._saved_best: dict[str, Any] | None = None  # as the checkpoint says
        self._last_saved: tuple[int, Path | None] = (found[1][FACTS]["loop"]["step"], found[0]) if found else (0, None)
        self.evaluation: dict[str, Any] | None = None
        self.hparams: dict[str, bool | float | str] = {}  # as TensorBoard shows them
        self._next_line, self._num_evaluated = time.monotonic() + _LINE_EVERY_S, 0
        self.dialogue = CommandHandlers(self.engines, self.coordinator, self._answer)
        self.loop = self.dialogue.loop = self._make_loop(console)
        if found:
            self._resume(*found)
        self._first_step = self.loop.step
        self._tensors: list[KnownTensors] = []
        self._steps_before = {name: engine.steps for name, engine in self.engines.items()}
        if fault := self._find_unsaveable():
            raise ConfigError(fault)

    def _find_unsaveable(self) -> str | None:
        """Returns what of the state could not be saved: it is packed as for a save, but no content is copied."""
        parts, facts = self._state()
        checks: dict[str, Callable[[], Any]] = {name: partial(FlattenedState, value) for name, value in parts.items()}
        checks[FACTS] = partial(io.check_json, facts)
        for name, check in checks.items():
            try:
                check()
            except (TypeError, ValueError) as error:
                return f"{name}: its state can't be saved: {error}"
        return None

    def _check_first_update(self) -> bool:
        """Looks at the state once more when every optimizer has made its own; says whether they have."""
        trained = [(name, engine) for name, engine in self.engines.items() if engine.optimizer is not None]
        if any(engine.steps == self._steps_before[name] for name, engine in trained):
            return False
        if fault := self._find_unsaveable():
            raise TrainingStopped(f"After its first step: {fault}", is_whole=False)
        for note in self.engines.find_late_generators():
            self.log.warning("%s", note)
        return True

    def _writer(self) -> Any:
        if not self.engines.is_sharded:
            return self.checkpoints
        from runner.checkpoint import sharded  # which is slow

        return sharded.share(self.checkpoints, self.experiment.settings["distributed"]["timeout_s"])

    def start_record(self, **facts: Any) -> None:
        """Begins run.json's session, then removes the checkpoints that this run has left: it names none of them."""
        self.checkpoints.recover()
        later = set() if self.is_new else set(self.checkpoints.steps_after(self.loop.step))
        if not self.is_new:  # `best_mode` or `best_metric` may have changed: a checkpoint may be better by them
            for step, rating in self.checkpoints.rank_best(later, 1, self.best.rating):
                self.best.found = self.best.describe(step, rating)
        self.record.start(best=self.describe_best(later), **facts)
        if later:
            self.checkpoints.remove_after(self.loop.step)

    def convert_metrics(self, read_config: Callable[[], Mapping[str, Any]]) -> None:
        """Gives metrics that older versions saved as numbers their name and value.

        Args:
            read_config: returns the config by which the run rated them so far.
        """
        if best := self._saved_best:
            self.checkpoints.convert_metrics(lambda number: name_metric(number, best["name"], mode_of(read_config())))

    def describe_best(self, removed: Container[int] = ()) -> dict[str, Any] | None:
        """Returns the best evaluation as run.json names it: a step only where its checkpoint can be loaded.

        With `keep_best` it is the best of those that can be loaded.

        Args:
            removed: steps of checkpoints that are about to be.
        """
        found = self.best.found
        if not is_rank_zero():  # whose disk it is
            return found
        is_there = found is not None and found["step"] not in removed and self.checkpoints.has(found["step"])
        if found is None or is_there:
            return found
        if not self.experiment.trainer.keep_best:
            return found | {"step": None}
        ranked = self.checkpoints.rank_best(removed)
        return self.best.describe(*ranked[0]) if ranked else None

    def _tell_best(self, removed: set[int]) -> bool:
        """Has run.json name the best checkpoint that stays; says whether the others may go."""
        try:
            self.record.update(best=self.describe_best(removed))
        except OSError as error:
            self.log.error("run.json can't be written, so that older checkpoints stay: %s", error)
            return False
        return True

    def _begin(self) -> None:
        """Makes the numbers in the folder those of a run at this step."""
        tracking = self.experiment.tracking
        self.tracker = Tracker(
            self.folder,
            tensorboard=tracking.tensorboard,
            jsonl=tracking.jsonl,
            resume_step=None if self.is_new and not self.begins_again else self.loop.step,
            is_eval_owed=self.begins_again or "eval" in self.loop.schedule.pending,
            recorded=self._recorded,
            warn=self.log.warning,
        )
        self.tracker.hparams(self.hparams)

    def _make_loop(self, console: Console) -> Loop:
        trainer = self.experiment.trainer
        return Loop(
            self.engines,
            self.experiment.batches,
            steps=trainer.steps,
            accumulate=trainer.accumulate,
            seed=self.experiment.seed,
            log_every=trainer.log_every,
            log=self._log_metrics,
            warn=self.log.warning,
            actions={
                "eval": Action(self.evaluate, trainer.eval_every),
                "export": Action(self.export, trainer.export_every),
                "save": Action(self.save, trainer.save_every),
            },
            commands=self.dialogue.commands,
            inbox=self.dialogue.queue,
            screen=console,
            policy=FailurePolicy(trainer.on_oom.name, trainer.max_skips),
            coordinator=self.coordinator,
            check=self._check_first_update,
        )

    def run(self) -> str:
        """Trains to the end; returns "finished", "quit" after that command, or what a signal asked for.

        Raises:
            RunError: the run can't go on, for no mistake in the program.
        """
        with disk_errors_as("the run's folder", RunError):
            run_on_all_ranks(self._begin if is_rank_zero() else bool)
            if not self.is_new:
                keeps_best = self.experiment.trainer.keep_best
                self.best.found = run_on_rank_zero(self.describe_best if keeps_best else lambda: self.best.found)
        self._introduce()
        experiment, status = self.experiment, "failed"
        try:
            with lasting(), contextlib.closing(self.dialogue.queue), contextlib.closing(experiment.batches):
                if stdin := experiment.tracking.stdin:
                    self.dialogue.start(self.loop.step, peeks=stdin == "auto", warn=self.log.warning)
                is_evaluated = experiment.evaluation is not None and experiment.trainer.eval_every > 0
                if self.is_new and is_evaluated and experiment.trainer.eval_at_start:
                    self.loop.schedule.enqueue("eval")
                status = self._train_together()
        except BaseException:
            self._close_failed()
            raise
        with disk_errors_as("the run's numbers", RunError):
            self.tracker.close(status)
        self.log.info("%s at step %d: %s", status.capitalize(), self.loop.step, self.folder)
        return status

    def _train_together(self) -> str:
        """Runs the loop on every rank; what ends it on one of them ends it on all.

        Raises:
            RunError: it can't go on; where a mistake in the program is to blame, another rank raises that as it is.
        """
        failure: BaseException | None
        try:
            return run_on_all_ranks(self._train)[0]
        except RankAbortError as error:
            failure = RunError(str(error)) if error.is_expected or not error.__cause__ else error.__cause__
        except RankLostError as error:
            raise (RunError(reason) if (reason := self.coordinator.abort_reason(error)) else error) from error
        except RankError as error:
            failure = error.__cause__ or RunError(str(error))
        except Exception as error:  # the same on all
            failure = error if is_rank_zero() or isinstance(error, RunError) else RunError(f"rank 0: {describe(error)}")
        assert failure is not None
        raise failure  # outside of the handlers: a traceback then shows it alone

    def _train(self) -> str:
        """Runs the loop, and waits for its last save."""
        try:
            status = self.loop.run()
        except BaseException as error:
            if is_signal(error):
                self.experiment.batches.kill_workers()
                raise
            with contextlib.suppress(Exception):  # it was told when it failed
                self.saver.close()
            self._tell_unsaved()
            failure = self._explained(error)
        else:
            with disk_errors_as("the last checkpoint", RunError):
                self.saver.close()
            return status
        raise failure

    def _tell_unsaved(self) -> None:
        """Tells which of the steps done an error loses."""
        step, path = self._last_saved
        if is_rank_zero() and self.loop.step > step:
            remedy = f"go on from {path}" if path else "start anew"
            self.log.error("Steps %d to %d are not saved; %s", step + 1, self.loop.step, remedy)

    def _explained(self, error: BaseException) -> BaseException:
        """Returns what an error of the loop ends the run as: told in one message, or with its traceback."""
        cause = error.__cause__ if isinstance(error, RankError) else error
        if isinstance(cause, SetupError):
            return ConfigError(str(cause))
        return RunError(str(error)) if cause is None or isinstance(cause, TrainingStopped) else cause

    def _close_failed(self) -> None:
        """Closes the tracker of a run that an error ends, which an error of the tracker must not hide."""
        try:
            self.tracker.close("failed")
        except Exception as error:
            self.log.error("The run's numbers can't be written: %s", describe(error))

    def _introduce(self) -> None:
        for name, engine in self.engines.items():
            if tensors := log_model_summary(name, engine, self.log.info):
                self._tensors.append(tensors)
        for note in [*self.experiment.notes, *self.engines.find_unseeded()]:
            self.log.warning("%s", note)
        ranks = f" on {world_size()} ranks" if world_size() > 1 else ""
        self.log.info("%d steps%s into %s", self.experiment.trainer.steps, ranks, self.folder)

    def _check_tensors(self) -> None:
        """Checks that what is trained and saved is what it was at the start; else nothing more is saved."""
        for tensors in self._tensors:
            tensors.check(f"a forward up to step {self.loop.step}")

    def _log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        for tensors in self._tensors:
            tensors.check_quickly(f"a forward up to step {step}")
        with disk_errors_as("the run's numbers", TrainingStopped):
            self.tracker.log(step, values)
        if self.experiment.tracking.progress and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY_S
            shown = {name.removeprefix("train/"): value for name, value in values.items()}
            self.log.info("Step %d of %d: %s", step, self.experiment.trainer.steps, describe_numbers(shown))

    def _answer(self, text: str) -> None:
        self.log.info("%s", text)

    def save(self) -> None:
        """Has a checkpoint committed beside the loop, which is held while the state is copied."""
        if self.coordinator.is_alone:
            self.log.warning("Rank 0 saves alone: numbers not yet logged are those of its own samples")
        else:
            self.engines.share_metrics()
            self.engines.sync_buffers()
        step = self.loop.step
        evaluated = self.evaluation if self.evaluation and self.evaluation["step"] == step else {}
        parts, facts = self._state()
        self._check_tensors()  # after the state is made, which gives up weights that an evaluation left gathered
        facts["numbers"] = self.tracker.counts()
        try:
            self.saver.save(step, parts, facts, self.best.metric_of(evaluated))
        except (TypeError, ValueError) as error:
            raise TrainingStopped(self._find_unsaveable() or f"the state can't be saved: {error}") from error

    def _flush_numbers(self) -> None:
        """Has the numbers on disk before a checkpoint is; numbers that are lost cost no checkpoint."""
        try:
            self.tracker.flush()
        except OSError as error:
            self.log.error("The checkpoint is saved without its last numbers: %s", error)

    def _state(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns what a checkpoint is made of: its parts and its facts."""
        parts = self.engines.state_dict()
        facts: dict[str, Any] = {
            "loop": self.loop.state_dict(),
            "batches": self.experiment.batches.state_dict(),
            "commands": self.dialogue.queue.state_dict(),
            "best": self.best.found,
            "fingerprint": fingerprint_of(self.experiment.batches.dataset),
        }
        try:
            io.check_json(facts["batches"])
        except (TypeError, ValueError):  # of a sampler whose state has tensors in it
            parts[BATCHES] = facts.pop("batches")
        return parts, facts

    def _saved(self, step: int, path: Path) -> None:
        self.log.info("Saved %s", path)
        if is_rank_zero():
            signature.mark_checkpoints(self.folder)
        self._last_saved = step, path
        with contextlib.suppress(OSError):  # run.json tells it at the next occasion
            self.record.update(last_step=step)

    def _save_failed(self, step: int, error: Exception) -> None:
        remedy = f"; {describe_limit()}" if is_out_of_files(error) else ""
        self.log.error("The checkpoint of step %d could not be written: %s%s", step, error, remedy)
        self._has_lost_best |= self.best.found is not None and self.best.found["step"] == step
        if not self.folder.is_dir():
            self.loop.stop("failed")

    def _resume(self, path: Path, saved: dict[str, Any]) -> None:
        facts = saved.pop(FACTS)
        try:
            allows = self.experiment.settings["resume_allow_changes"]
            changed = find_change(self.experiment.batches.dataset, facts.get("fingerprint"), allows)
            notes = self.engines.load_state_dict(saved, allows)
            batches = saved[BATCHES] if BATCHES in saved else facts["batches"]
            note = self.experiment.load_stream(batches)
            self.loop.load_state_dict(facts["loop"])
            self.dialogue.queue.load_state_dict(facts["commands"])
        except (RankAbortError, RankLostError, RankError):
            raise
        except Exception as error:  # of a state whose types are right, which is no state of these objects
            raise ConfigError(f"resume={path}: {message_of(error)}") from error
        self._recorded = facts.get("numbers")
        self.evaluation, self._saved_best = last_evaluation(self.folder, self.loop.step), facts["best"]
        renamed = self.best.restore(facts["best"], self.evaluation or {})
        for each in filter(None, [*notes, note, changed, renamed]):
            self.log.warning("%s", cut(each))
        self.log.info("Going on after step %d from %s", self.loop.step, path)

    def evaluate(self) -> None:
        """Evaluates every engine, and shows what the report makes of it."""
        experiment, step = self.experiment, self.loop.step
        if experiment.evaluation is None:
            self._answer("There is nothing to evaluate on: data.eval has no dataset")
            return
        self._check_tensors()
        self._find_lost_best()
        numbers, shown = measure(
            self.engines, experiment.evaluation, experiment.report, seed=experiment.seed, step=step,
            is_cut=self._is_cut, together=self.coordinator.run_on_all_ranks,
        )  # fmt: skip
        self.evaluation = {"step": step, **numbers}
        with disk_errors_as("the run's numbers", TrainingStopped):
            self.tracker.log(step, numbers)
        self.log.info("Step %d: %s", step, describe_numbers(numbers))
        with disk_errors_as("the run's sounds", TrainingStopped):
            show(self.tracker, self.log, self.folder, step, shown, writes=is_rank_zero())
        # An evaluation that was typed or is the last one of this length must not change the schedule.
        if self.loop.schedule.actions["eval"].is_due(step, is_last=False):
            try:
                self.engines.observe(numbers)
            except ValueError as error:
                raise self._mistake(f"{error}; resume with the right name") from error
        try:
            is_best = self.best.take(step, numbers)
        except ValueError as error:
            raise self._mistake(str(error)) from error
        if not is_best:
            return
        with disk_errors_as("run.json", TrainingStopped):
            if not experiment.trainer.keep_best:
                self.record.update(last_step=step, best=self.describe_best())
            elif "save" not in self.loop.schedule.pending:  # run.json names it when it is on disk
                self.loop.schedule.enqueue("save")

    def _mistake(self, message: str) -> TrainingStopped:
        """Returns what a mistake in the config is raised as that an evaluation has found."""
        return TrainingStopped(message) if self.loop.step > self._first_step else SetupError(message, is_whole=False)

    def _take_lost_best(self) -> bool:
        is_lost, self._has_lost_best = self._has_lost_best, False
        return is_lost

    def _find_lost_best(self) -> None:
        """Goes back, where the best checkpoint could not be written, to the best that is on disk."""
        is_lost = self.coordinator.run_on_all_ranks(self._take_lost_best)[0]  # and none of the ranks is in trouble
        if is_lost and self.experiment.trainer.keep_best:
            self.best.found = self.coordinator.run_on_all_ranks(
                lambda: self.describe_best() if is_rank_zero() else None
            )[0]

    def describe_wait(self) -> str:
        """Says what the main thread is about; called from another thread, at no cost to the loop."""
        frame = sys._current_frames().get(threading.main_thread().ident or 0)
        while frame is not None and frame.f_code not in _PLACES:
            frame = frame.f_back
        place = _PLACES[frame.f_code] if frame is not None else "the end of step {next}"
        workers = self.experiment.settings["data"]["num_workers"]
        source = f"{workers} loader workers" if workers else "this process"
        return place.format(step=self.loop.step, next=self.loop.step + 1, source=source)

    @property
    def progress(self) -> tuple[int, int]:
        """What changes as long as this rank gets on: steps, and batches evaluated."""
        return self.loop.step, self._num_evaluated

    def _is_cut(self) -> bool:
        self._num_evaluated += 1
        return self.loop.is_stopping

    def export(self) -> None:
        """Writes each engine's weights, with what they are from."""
        data = fingerprint_of(self.experiment.batches.dataset)
        facts = facts_of(self.experiment.settings, self.folder, self.loop.step, self.best.found, self.evaluation, data)
        with disk_errors_as("the export", TrainingStopped):
            paths = write(self.engines, self.folder / "exports", facts, writes=is_rank_zero())
        for path in paths:
            self.log.info("Exported %s", path)


_PLACES = {  # what runs there, the innermost first
    Batches.__next__.__code__: "a batch of data.train for step {next}, from {source}",
    EvaluationData.__iter__.__code__: "a batch of data.eval, from {source}",
    Trainer.evaluate.__code__: "the evaluation after step {step}",
    Trainer.export.__code__: "the export after step {step}",
    Trainer.save.__code__: "the checkpoint of step {step}",
    Saver.close.__code__: "the checkpoint of step {step}",
    StepRunner.run.__code__: "the end of step {next}",
}
