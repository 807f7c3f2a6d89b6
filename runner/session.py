"""One process's share of a run: the loop, and what is done between its steps. Must not know how it was composed."""

from __future__ import annotations

import contextlib
import gc
import logging
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from runner.build import Experiment
from runner.checkpoint import FACTS, Checkpoints
from runner.commands import HELP, Commands, describe_events, describe_time
from runner.config import flatten
from runner.console import Console
from runner.evaluate import measure
from runner.export import facts_of, last_evaluation, write
from runner.mistakes import ConfigError
from runner.run_record import RunRecord
from runner.saver import Saver
from runner.tracking import Tracker
from runner.utils.agenda import Action
from runner.utils.mishaps import Halt, Policy
from runner.utils.train import Loop, Stop

_LINE_EVERY_S = 5.0  # metrics.jsonl has every one


class RunError(RuntimeError):
    """What ended a run without being a mistake in the program: told as one message."""


@contextlib.contextmanager
def _lasting() -> Iterator[None]:
    """What was built so far stays to the end: the garbage collector, off until here, does not look through it."""
    gc.freeze()
    gc.enable()
    try:
        yield
    finally:
        gc.unfreeze()


class Session:
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
        self.engines, trainer = experiment.engines, experiment.trainer
        checkpoints = Checkpoints(
            folder / "checkpoints",
            format=experiment.checkpoint.format.name,
            keep_last=trainer.keep_last,
            keep_every=trainer.keep_every,
            keep_best=trainer.keep_best,
        )
        self.checkpoints = checkpoints
        self.saver = Saver(
            checkpoints, before_commit=lambda: self.tracker.flush(), saved=self._saved, failed=self._save_failed
        )
        self.is_new = found is None
        self.best: dict[str, Any] | None = None
        self.evaluation: dict[str, Any] | None = None
        self._next_line = time.monotonic() + _LINE_EVERY_S
        self.inbox = Commands(self._answer)
        self.loop = self._make_loop(console)
        if found:
            self._resume(*found)

    def _begin(self) -> None:
        """Makes the folder one of a run at this step: what a crash left, and what this run has left, goes."""
        self.checkpoints.recover()
        if not self.is_new:
            self.checkpoints.leave(self.loop.step)  # before the numbers are cut back to that step
        tracking = self.experiment.tracking
        self.tracker = Tracker(
            self.folder,
            tensorboard=tracking.tensorboard,
            jsonl=tracking.jsonl,
            resume_step=None if self.is_new else self.loop.step,
            is_eval_owed="eval" in self.loop.agenda.owed,
        )

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
            commands={
                "quit": self._quit,
                "lr": self._set_lr,
                "time": self._tell_time,
                "events": lambda _: self._answer(describe_events(self.inbox.pending)),
                "help": lambda _: self._answer(HELP),
            },
            inbox=self.inbox,
            screen=console,
            policy=Policy(trainer.on_oom.name, trainer.max_skips),
        )

    def run(self) -> str:
        """Trains to the end; returns "finished", "quit" after that command, or what a signal asked for.

        Raises:
            RunError: the run can't go on, for no mistake in the program.
        """
        with _told("the run's folder", RunError):
            self._begin()
        self._introduce()
        experiment, status = self.experiment, "failed"
        try:
            with _lasting(), contextlib.closing(self.inbox), contextlib.closing(experiment.batches):
                if experiment.tracking.stdin:
                    self.inbox.start(self.loop.step)
                if self.is_new and experiment.trainer.eval_at_start and experiment.evaluation:
                    self.loop.agenda.owe("eval")
                status = self._train()
        finally:
            with _told("the run's numbers", RunError):
                self.tracker.close(status)
        self.log.info("%s at step %d: %s", status.capitalize(), self.loop.step, self.folder)
        return status

    def _train(self) -> str:
        """Runs the loop, and waits for its last save."""
        try:
            status = self.loop.run()
        except Exception as error:
            with contextlib.suppress(Exception):  # it was told when it failed
                self.saver.close()
            if isinstance(error, Halt):
                raise RunError(str(error)) from error
            raise
        with _told("the last checkpoint", RunError):
            self.saver.close()
        return status

    def _introduce(self) -> None:
        for name, engine in self.engines.items():
            sizes = [(p.numel(), p.requires_grad) for p in engine.module.parameters()]
            total, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
            frozen = "" if trained == total else f", {total - trained:,} of them frozen"
            kind = type(engine.module).__name__
            self.log.info("%s: %s, %s parameters%s, on %s", name, kind, f"{total:,}", frozen, engine.device)
        self.log.info("%d steps into %s", self.experiment.trainer.steps, self.folder)
        self.tracker.hparams(dict(flatten(self.experiment.settings)))

    def _log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        with _told("the run's numbers", Halt):
            self.tracker.log(step, values)
        if self.experiment.tracking.progress and time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY_S
            shown = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in values.items())
            self.log.info("Step %d of %d: %s", step, self.experiment.trainer.steps, shown)

    def _answer(self, text: str) -> None:
        self.log.info("%s", text)

    def save(self) -> None:
        """Has a checkpoint committed beside the loop, which is held while the state is copied."""
        step = self.loop.step
        facts = {
            "loop": self.loop.state_dict(),
            "batches": self.experiment.batches.state_dict(),
            "commands": self.inbox.state_dict(),
            "best": self.best,
        }
        evaluated = self.evaluation if self.evaluation and self.evaluation["step"] == step else {}
        name = self._deciding(evaluated)
        metric = None if name is None or evaluated[name] is None else self._sign * evaluated[name]
        self.saver.save(step, self.engines.state_dict(), facts, metric)

    def _saved(self, step: int, path: Path) -> None:
        self.log.info("Saved %s", path)
        with contextlib.suppress(OSError):  # run.json tells it at the next occasion
            self.record.update(last_step=step)

    def _save_failed(self, step: int, error: Exception) -> None:
        self.log.error("The checkpoint of step %d could not be written: %s", step, error)
        if not self.folder.is_dir():
            self.loop.stop("failed")

    def _resume(self, path: Path, saved: dict[str, Any]) -> None:
        facts = saved.pop(FACTS)
        try:
            notes = self.engines.load_state_dict(saved, self.experiment.settings["resume_allow_changes"])
            note = self.experiment.load_stream(facts["batches"])
        except (KeyError, ValueError) as error:
            raise ConfigError(f"resume={path}: {error}") from error
        self.loop.load_state_dict(facts["loop"])
        self.inbox.load_state_dict(facts["commands"])
        self.best, self.evaluation = facts["best"], last_evaluation(self.folder, self.loop.step)
        for each in [*notes, *([note] if note else [])]:
            self.log.warning("%s", each)
        self.log.info("Going on after step %d from %s", self.loop.step, path)

    def evaluate(self) -> None:
        """Evaluates every engine, and shows what the report makes of it."""
        experiment, step = self.experiment, self.loop.step
        if experiment.evaluation is None:
            self._answer("There is nothing to evaluate on: data.eval has no dataset")
            return
        numbers, shown = measure(
            self.engines, experiment.evaluation, experiment.report,
            seed=experiment.seed, step=step, is_cut=lambda: self.loop.is_stopping,
        )  # fmt: skip
        self.evaluation = {"step": step, **numbers}
        with _told("the run's numbers", Halt):
            self.tracker.log(step, numbers)
        self.log.info("Step %d: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        for name, value in shown.items():
            if isinstance(value, str):
                self.tracker.text(step, name, value)
                self.log.info("%s:\n%s", name, value)
            else:
                self.tracker.image(step, name, value)
        self._keep_best(step, numbers)

    @property
    def _sign(self) -> int:
        """What makes the lower value of the deciding metric the better one."""
        return -1 if self.experiment.trainer.best_mode.name == "max" else 1

    def _deciding(self, numbers: Mapping[str, Any]) -> str | None:
        """Returns the name among an evaluation's numbers that says which checkpoint is best."""
        named = self.experiment.trainer.best_metric
        if named is not None:
            return named if named in numbers else None
        return next((key for key in numbers if key.rpartition("/")[2] == "loss"), None)

    def _keep_best(self, step: int, numbers: Mapping[str, float]) -> None:
        name = self._deciding(numbers)
        if name is None:
            if named := self.experiment.trainer.best_metric:
                raise ConfigError(f"trainer.best_metric={named}: was not evaluated; there are: {', '.join(numbers)}")
            return
        value, sign = numbers[name], self._sign
        if math.isfinite(value) and (self.best is None or sign * value < sign * self.best["value"]):
            self.best = {"name": name, "value": value, "step": step}
            with _told("run.json", Halt):
                self.record.update(last_step=step, best=self.best)

    def export(self) -> None:
        """Writes each engine's weights, with what they are from."""
        facts = facts_of(self.experiment.settings, self.folder, self.loop.step, self.best, self.evaluation)
        with _told("the export", Halt):
            paths = write(self.engines, self.folder / "exports", facts)
        for path in paths:
            self.log.info("Exported %s", path)

    def _quit(self, _: Any) -> None:
        raise Stop("quit")

    def _set_lr(self, lr: float) -> None:
        self.engines.set_lr(lr)
        self._answer(f"The base learning rate is {lr:g} from step {self.loop.step + 1} on")

    def _tell_time(self, to: int | None) -> None:
        elapsed_s, step_s = self.loop.pace.overall(self.loop.step)
        self._answer(describe_time(self.loop.step, self.experiment.trainer.steps, step_s, elapsed_s, to))


@contextlib.contextmanager
def _told(what: str, as_error: type[Exception]) -> Iterator[None]:
    """What the disk refuses is raised as `as_error`, with the remedy."""
    try:
        yield
    except OSError as error:
        remedy = "what was saved before is whole: make room or the folder writable, then resume"
        raise as_error(f"{what} can't be written: {error}; {remedy}") from error
