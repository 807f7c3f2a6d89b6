"""One process's share of a run: the loop, and what is done between its steps. Must not know how it was composed."""

from __future__ import annotations

import contextlib
import gc
import logging
import signal
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import FrameType
from typing import Any

from runner.build import Experiment
from runner.checkpoint import Checkpoints
from runner.commands import HELP, Commands, describe_events, describe_time
from runner.config import ConfigError
from runner.console import Console
from runner.evaluate import measure
from runner.export import facts_of, last_evaluation, write
from runner.run_record import RunRecord
from runner.tracking import Tracker
from runner.utils.train import Action, Loop, Stop

_LINE_EVERY_S = 5.0  # metrics.jsonl has every one


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
        self.checkpoints = Checkpoints(folder / "checkpoints", trainer.keep_last)
        self.best: dict[str, Any] | None = None
        self.evaluation: dict[str, Any] | None = None
        self._next_line = time.monotonic() + _LINE_EVERY_S
        self.inbox = Commands(self._answer)
        self.loop = self._make_loop(console)
        if found:
            self._resume(*found)
        tracking = experiment.tracking
        self.tracker = Tracker(
            folder,
            tensorboard=tracking.tensorboard,
            jsonl=tracking.jsonl,
            resume_step=self.loop.step if found else None,
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
        )

    def run(self) -> str:
        """Trains to the end; returns "finished", "quit" after that command, or "interrupted" after Ctrl-C."""
        self._introduce()
        experiment, status = self.experiment, "failed"
        try:
            with _lasting(), self._signals(), contextlib.closing(self.inbox), contextlib.closing(experiment.batches):
                if experiment.tracking.stdin:
                    self.inbox.start(self.loop.step)
                if self.loop.step == 0 and experiment.trainer.eval_at_start and experiment.evaluation:
                    self.loop.do("eval")
                reason = self.loop.run()
            status = reason
        except KeyboardInterrupt:
            status = "interrupted"
            raise
        finally:
            self.record.update(last_step=self.loop.step, best=self.best)
            self.tracker.close(status)
        self.log.info("%s at step %d: %s", reason.capitalize(), self.loop.step, self.folder)
        return status

    def _introduce(self) -> None:
        for name, engine in self.engines.items():
            sizes = [(p.numel(), p.requires_grad) for p in engine.module.parameters()]
            total, trained = sum(n for n, _ in sizes), sum(n for n, is_trained in sizes if is_trained)
            frozen = "" if trained == total else f", {total - trained:,} of them frozen"
            kind = type(engine.module).__name__
            self.log.info("%s: %s, %s parameters%s, on %s", name, kind, f"{total:,}", frozen, engine.device)
        self.log.info("%d steps into %s", self.experiment.trainer.steps, self.folder)
        self.tracker.hparams(dict(_flatten(self.experiment.settings)))

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """The first Ctrl-C asks the loop to save and end; the second ends at once."""

        def interrupt(number: int, frame: FrameType | None) -> None:
            if self.loop.is_stopping:
                raise KeyboardInterrupt
            self.loop.stop("interrupted")

        before = signal.signal(signal.SIGINT, interrupt)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def _log_metrics(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(step, values)
        if time.monotonic() >= self._next_line:
            self._next_line = time.monotonic() + _LINE_EVERY_S
            shown = ", ".join(f"{name.removeprefix('train/')} {value:.4g}" for name, value in values.items())
            self.log.info("Step %d of %d: %s", step, self.experiment.trainer.steps, shown)

    def _answer(self, text: str) -> None:
        self.log.info("%s", text)

    def save(self) -> None:
        """Commits a checkpoint."""
        state = self.engines.state_dict()
        files = {f"{name}.safetensors": value for name, value in state.items()}
        files["trainer.json"] = {
            "loop": self.loop.state_dict(),
            "batches": self.experiment.batches.state_dict(),
            "commands": self.inbox.state_dict(),
            "best": self.best,
        }
        path = self.checkpoints.save(self.loop.step, files)
        self.record.update(last_step=self.loop.step, best=self.best)
        self.log.info("Saved %s", path)

    def _resume(self, path: Path, files: dict[str, Any]) -> None:
        try:
            trainer = files.pop("trainer.json")
            self.engines.load_state_dict({name.removesuffix(".safetensors"): v for name, v in files.items()})
            note = self.experiment.load_stream(trainer["batches"])
        except (KeyError, ValueError) as error:
            raise ConfigError(f"resume={path}: {error}") from error
        self.loop.load_state_dict(trainer["loop"])
        self.inbox.load_state_dict(trainer["commands"])
        self.best, self.evaluation = trainer["best"], last_evaluation(self.folder, self.loop.step)
        if note:
            self.log.warning("%s", note)
        self.log.info("Going on after step %d from %s", self.loop.step, path)

    def evaluate(self) -> None:
        """Evaluates every engine, and shows what the report makes of it."""
        experiment, step = self.experiment, self.loop.step
        if experiment.evaluation is None:
            self._answer("There is nothing to evaluate on: data.eval has no dataset")
            return
        try:
            numbers, shown = measure(
                self.engines, experiment.evaluation, experiment.report,
                seed=experiment.seed, step=step, is_cut=lambda: self.loop.is_stopping,
            )  # fmt: skip
        except InterruptedError:
            return
        self.evaluation = {"step": step, **numbers}
        self.tracker.log(step, numbers)
        self.log.info("Step %d: %s", step, ", ".join(f"{k} {v:.4f}" for k, v in numbers.items()))
        for name, value in shown.items():
            if isinstance(value, str):
                self.tracker.text(step, name, value)
                self.log.info("%s:\n%s", name, value)
            else:
                self.tracker.image(step, name, value)
        self._keep_best(step, numbers)

    def _keep_best(self, step: int, numbers: Mapping[str, float]) -> None:
        name = next((key for key in numbers if key.rpartition("/")[2] == "loss"), None)
        if name is not None and (self.best is None or numbers[name] < self.best["value"]):
            self.best = {"name": name, "value": numbers[name], "step": step}
            self.record.update(last_step=step, best=self.best)

    def export(self) -> None:
        """Writes each engine's weights, with what they are from."""
        facts = facts_of(self.experiment.settings, self.folder, self.loop.step, self.best, self.evaluation)
        for path in write(self.engines, self.folder / "exports", facts):
            self.log.info("Exported %s", path)

    def _quit(self, _: Any) -> None:
        raise Stop("quit")

    def _set_lr(self, lr: float) -> None:
        self.engines.set_lr(lr)
        self._answer(f"The base learning rate is {lr:g} from step {self.loop.step + 1} on")

    def _tell_time(self, to: int | None) -> None:
        elapsed_s, step_s = self.loop.pace()
        self._answer(describe_time(self.loop.step, self.experiment.trainer.steps, step_s, elapsed_s, to))


def _flatten(node: Any, key: str = "") -> Iterator[tuple[str, bool | float | str]]:
    """Yields the dotted keys of a plain config with values that TensorBoard shows."""
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from _flatten(value, f"{key}.{name}" if key else str(name))
    elif isinstance(node, (bool, int, float, str)):
        yield key, node
    else:
        yield key, str(node)
