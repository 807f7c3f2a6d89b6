"""The Python API: composes a config, trains it in this process, and reads the folder of a run.

`import runner` loads this module when one of its names is used; torch is imported only to train or to build a model.
"""

from __future__ import annotations

import copy
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from omegaconf import DictConfig, OmegaConf

from runner.config import run_folder
from runner.config.errors import ConfigError
from runner.launch import in_process
from runner.launch.process_state import own_hydra, preserved_process

if TYPE_CHECKING:
    from runner.engines import Engines

_MAX_STEP = 1 << 53


class Config:
    """A composed config, or a mapping in it: `config.trainer.steps = 100` sets a key, and `print` shows YAML.

    A value is checked by its type when it is set, and together with the others by `train`.
    """

    def __init__(self, composed: in_process.Composition, node: DictConfig | None = None) -> None:
        vars(self)["_composed"] = composed
        vars(self)["_node"] = node

    def __getattr__(self, key: str) -> Any:
        if key.startswith("_"):  # copies and notebooks ask for such names
            raise AttributeError(key)
        return self[key]

    def __getitem__(self, key: str) -> Any:
        node = self._mapping
        if key not in node:
            with in_process.raised_as_config_error(_NoSuchKeyError):
                return getattr(node, key)
        with in_process.raised_as_config_error():
            value = node[key]
        return Config(self._composed, value) if isinstance(value, DictConfig) else value

    def __setitem__(self, key: str, value: Any) -> None:
        with in_process.raised_as_config_error():
            self._mapping[key] = value

    def __setattr__(self, key: str, value: Any) -> None:
        self[key] = value

    def __contains__(self, key: object) -> bool:
        return key in [*self]

    def __iter__(self) -> Iterator[str]:
        return (str(key) for key in self._mapping if key != "hydra")

    def __dir__(self) -> list[str]:
        return [*self]

    def __str__(self) -> str:
        return OmegaConf.to_yaml(self._mapping if self._node is not None else in_process.without_hydra(self._composed))

    __repr__ = __str__

    def __deepcopy__(self, memo: dict[int, Any]) -> Config:
        return Config(copy.deepcopy(self._composed, memo), copy.deepcopy(self._node, memo))

    @property
    def _mapping(self) -> DictConfig:
        return self._composed.cfg if self._node is None else self._node


class _NoSuchKeyError(ConfigError, AttributeError):
    """A key that a config lacks; `hasattr` is then False."""


class Checkpoint(NamedTuple):
    """A complete checkpoint of a run.

    Attributes:
        metric: the value of the metric that decides which checkpoint is best; None if it was not evaluated there.
    """

    step: int
    path: Path
    metric: float | None


class Run:
    """A run in its folder: its status, config, metrics, checkpoints and trained models, read when they are asked for.

    Attributes:
        folder: the run's folder.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def __repr__(self) -> str:
        return f"Run({str(self.folder)!r}, status={self.status!r}, step={self.step})"

    @property
    def status(self) -> str:
        """Its status in run.json: running, finished, quit, interrupted, preempted or failed; crashed if it is gone."""
        record = run_folder.read_record(self.folder)
        status = record.get("status")
        if run_folder.is_crashed(record):
            return "crashed"
        return status if isinstance(status, str) else "unknown"

    @property
    def step(self) -> int:
        """The last step that run.json records."""
        step = run_folder.read_record(self.folder).get("last_step")
        return step if type(step) is int else 0

    @property
    def config(self) -> DictConfig:
        """The run's config, read only.

        Raises:
            ConfigError: it can't be read.
        """
        config = OmegaConf.create(run_folder.read_config(self.folder))
        OmegaConf.set_readonly(config, True)
        return config

    @property
    def checkpoints(self) -> list[Checkpoint]:
        """The complete checkpoints, the oldest first; their files have the recorded sizes."""
        from runner.checkpoint import checkpoints

        found = []
        for path in reversed(checkpoints.Checkpoints(self.folder / "checkpoints").newest_first()):
            try:
                manifest = checkpoints.verify(path, reads_content=False)
            except checkpoints.CheckpointError:
                continue
            metric = manifest["metric"]
            value = metric.get("value") if isinstance(metric, dict) else metric
            found.append(Checkpoint(manifest["step"], path, float(value) if isinstance(value, (int, float)) else None))
        return found

    def metrics(self) -> Any:
        """Returns the logged numbers by name, one row a line of metrics.jsonl: `run.metrics()["train/loss"]`.

        `step` and `time_s` (seconds of training) come first. A number that a row lacks, or that is not finite, is NaN.
        The result is a pandas DataFrame if pandas is installed, and else a dictionary of NumPy arrays. Damaged lines
        are left out.
        """
        columns = self._read_columns()
        try:
            import pandas
        except ImportError:
            return columns
        return pandas.DataFrame(columns)

    def _read_columns(self) -> dict[str, Any]:
        import numpy as np

        from runner.tracking.repair import read_lines
        from runner.tracking.trackers.jsonl import METRICS_NAME

        log = read_lines(self.folder / METRICS_NAME, _MAX_STEP, is_eval_pending=False)
        rows = [json.loads(record.content) for record in log.records]
        columns = {
            "step": np.array([row["step"] for row in rows], dtype=np.int64),
            "time_s": np.array([row["time_s"] for row in rows], dtype=np.float64),
        }
        for index, row in enumerate(rows):
            for name, value in row.items():
                if name not in columns:
                    columns[name] = np.full(len(rows), np.nan)
                if value is not None:
                    columns[name][index] = value
        return columns

    def engines(
        self, checkpoint: int | str | None = None, *, allow_targets: Sequence[str] = (), device: str | None = None
    ) -> Engines:
        """Returns the engines with their saved weights, in evaluation mode: `run.engines()["model"].module(...)`.

        They have the weights that an evaluation uses, so the averaged ones of an EMA.

        Args:
            checkpoint: a step, "last" (the default: the newest complete one), or "best".
            allow_targets: modules that the config of a run which you have not started may name, such as ["own"].
            device: such as "cpu"; by default that of the run, or the CPU if this machine lacks it.
        Raises:
            ConfigError: there is no such checkpoint, it is damaged, its config names what is not allowed, or another
                thread of this process trains.
        """
        path = self._find(checkpoint)
        overrides = [] if device is None else [f"distributed.device={device}"]
        with (
            in_process.between_runs(),
            preserved_process(keeps_path=True),
            own_hydra(),
            in_process.raised_as_config_error(),
        ):
            from runner.run import saved_model

            return saved_model.open_engines(path, overrides, allow_targets, may_move=device is None)

    def _find(self, checkpoint: int | str | None) -> Path:
        """Returns the path of a checkpoint, or of the run for its newest complete one."""
        if not (self.folder / "checkpoints").is_dir():
            raise ConfigError(f"{self.folder}: the run has saved no checkpoint; see trainer.save_every")
        if checkpoint in (None, "last"):
            return self.folder
        step: int | str | None = checkpoint
        if checkpoint == "best":
            best = run_folder.read_record(self.folder).get("best")
            step = best.get("step") if isinstance(best, dict) else None
        found = {each.step: each.path for each in self.checkpoints}
        if step in found:
            return found[step]
        steps = ", ".join(map(str, found)) or "(none)"
        if step is None:
            raise ConfigError(f"checkpoint=best: {self.folder} has none, see trainer.keep_best; its steps are {steps}")
        raise ConfigError(f"checkpoint={checkpoint}: expected last, best or one of the steps {steps} of {self.folder}")


def compose(overrides: Sequence[str] = (), config_dir: str | os.PathLike[str] | None = None) -> Config:
    """Composes a config as `python -m runner --config-dir CONFIG_DIR OVERRIDES...` does; imports no torch.

    `compose(["resume=FOLDER", "trainer.steps=600"])` goes on with a run.

    Raises:
        ConfigError: a mistake, with the message that the command line prints.
    """
    return Config(in_process.compose(overrides, config_dir))


def train(config: Config) -> Run:
    """Trains in this process, or in several that it starts for `distributed=ddp` or `fsdp`; returns the run.

    Ctrl-C, or the interrupt of a notebook's kernel, ends the current step and saves: `status` is then "interrupted",
    and `compose(["resume=FOLDER"])` goes on. A loop over runs checks this status before it goes on. A second one
    raises KeyboardInterrupt at once. After any other signal, such as SIGTERM, the run is saved and the signal takes its
    usual effect. In a thread beside the main one, no signal stops the run.

    Nothing is read from standard input unless `tracking.stdin` is true. Generators, environment, working directory,
    import path, signal handlers, logging and Hydra are left as they were.

    Raises:
        ConfigError: a mistake in the config.
        RunError: the run can't go on, such as after a loss that is not finite; it is saved as on the command line.
        Exception: the model's or the data's own error; likewise saved.
    """
    if not isinstance(config, Config) or config._node is not None:
        found = "a part of it" if isinstance(config, Config) else f"a {type(config).__name__}"
        raise ConfigError(f"train: expected the config that runner.compose returns, found {found}")
    return Run(in_process.train(config._composed))


def open(folder: str | os.PathLike[str]) -> Run:
    """Opens a run by its folder, or by one of its checkpoints.

    Raises:
        ConfigError: there is no run.
    """
    path = Path(folder)
    has_record = (path / "run.json").is_file()  # a run that has saved nothing yet, too
    return Run((path if has_record else run_folder.find_run(path)).absolute())
