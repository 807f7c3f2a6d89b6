"""The state of a run as a checkpoint holds it: collected, checked, and loaded when the run resumes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from runner.checkpoint.checkpoints import FACTS
from runner.config.checkpoint_facts import BATCHES, CALLBACKS
from runner.config.errors import ConfigError
from runner.control.commands import CommandQueue
from runner.run.best import Best
from runner.run.build.experiment import Experiment
from runner.utils import io
from runner.utils.distributed import RankAbortError, RankError, RankLostError
from runner.utils.serialization import FlattenedState
from runner.utils.train import Loop
from runner.utils.utils import message_of

_LONGEST = 200  # characters of a saved fingerprint that are shown


class RunState:
    """The objects of a run that have a state: engines, batches, loop, commands, callbacks and the best evaluation."""

    def __init__(self, experiment: Experiment, loop: Loop, queue: CommandQueue, best: Best) -> None:
        self._experiment = experiment
        self._loop = loop
        self._queue = queue
        self._best = best

    def collect(self) -> tuple[dict[str, Any], dict[str, Any]]:
        """Returns the parts of a checkpoint, by name, and its facts, which are JSON."""
        parts = self._experiment.engines.state_dict()
        batches = self._experiment.batches
        facts: dict[str, Any] = {
            "loop": self._loop.state_dict(),
            "batches": batches.state_dict(),
            "commands": self._queue.state_dict(),
            "best": self._best.found,
            "fingerprint": fingerprint_of(batches.dataset),
        }
        if self._experiment.callbacks is not None:
            facts["callbacks"] = self._experiment.callbacks.state_dict()
        for name, part in (("batches", BATCHES), ("callbacks", CALLBACKS)):
            try:
                io.check_json(facts.get(name))
            except (TypeError, ValueError):  # the state has tensors
                parts[part] = facts.pop(name)
        return parts, facts

    def find_unsaveable(self) -> str | None:
        """Returns why the state can't be saved, or None. Nothing is copied."""
        parts, facts = self.collect()
        of_callbacks = parts.pop(CALLBACKS, {})
        checks: dict[str, Callable[[], Any]] = {name: partial(FlattenedState, value) for name, value in parts.items()}
        checks |= {f"callbacks.{name}": partial(FlattenedState, state) for name, state in of_callbacks.items()}
        checks[FACTS] = partial(io.check_json, facts)
        for name, check in checks.items():
            try:
                check()
            except (TypeError, ValueError) as error:
                return f"{name}: its state can't be saved: {error}"
        return None

    def load_checkpoint(self, path: Path, parts: dict[str, Any], facts: dict[str, Any]) -> list[str]:
        """Loads a checkpoint, but for the best evaluation; returns warnings of changes since it was saved.

        Raises:
            ConfigError: it does not fit the engines that were built.
        """
        experiment, batches = self._experiment, self._experiment.batches
        allows_changes = experiment.spec.resume_allow_changes
        try:
            changed_data = find_change(batches.dataset, facts.get("fingerprint"), allows_changes)
            warnings = experiment.engines.load_state_dict(parts, allows_changes)
            moved_on = self._load_batches(parts[BATCHES] if BATCHES in parts else facts["batches"])
            self._loop.load_state_dict(facts["loop"])
            self._queue.load_state_dict(facts["commands"])
            warnings += self._load_callbacks(parts[CALLBACKS] if CALLBACKS in parts else facts.get("callbacks", {}))
        except (RankAbortError, RankLostError, RankError):
            raise
        except Exception as error:  # of any kind: the state has the right types, but is of other objects
            raise ConfigError(f"resume={path}: {message_of(error)}") from error
        return [*warnings, *filter(None, [moved_on, changed_data])]

    def _load_callbacks(self, state: Mapping[str, Any]) -> list[str]:
        """Loads the states of callbacks; returns notes of those that start anew or are gone."""
        if self._experiment.callbacks is not None:
            return self._experiment.callbacks.load_state_dict(state)
        return [f"callbacks.{name}: it is not configured any more; its saved state is dropped" for name in state]

    def _load_batches(self, state: Any) -> str | None:
        """Moves the batches to a saved position; returns a warning if changes leave only the next epoch.

        Raises:
            ValueError: the sampler refuses the position, as that of another dataset, seed or setting.
        """
        batches = self._experiment.batches
        try:
            batches.load_state_dict(state)
        except ValueError as error:
            if not self._experiment.spec.resume_allow_changes:
                raise ValueError(f"{error} Or go on with the next epoch: resume_allow_changes=true") from error
            batches.start_next_epoch(state)
            return f"The samples go on with the beginning of epoch {batches.epoch}: {error}"
        return None


def fingerprint_of(dataset: Any) -> str | None:
    """Returns a dataset's `fingerprint`, a text that changes with its content; None without one.

    A dataset has one if its samples mean something only with another model, such as codes with their codec.
    """
    fingerprint = getattr(dataset, "fingerprint", None)
    return None if fingerprint is None else str(fingerprint)


def find_change(dataset: Any, saved: str | None, is_allowed: bool = True) -> str | None:
    """Returns a warning if a dataset's fingerprint differs from the saved one.

    Raises:
        ValueError: with the same message, unless that is allowed.
    """
    now = fingerprint_of(dataset)
    if saved is None or now is None or now == saved:
        return None
    kind = type(dataset).__name__
    changed = f"{kind}: its data is not what the run was trained on: {now} now, {saved[:_LONGEST]} then"
    if is_allowed:
        return changed
    raise ValueError(f"{changed}; give it that data, or go on with this: resume_allow_changes=true")
