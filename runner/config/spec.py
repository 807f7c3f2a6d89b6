"""The specification of an experiment: a checked config that is parsed once, for launch, the workers and build."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from enum import EnumMeta
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

from runner.config import optimizations
from runner.config.schema import (
    CheckpointConfig,
    DataConfig,
    DistributedConfig,
    ExportConfig,
    TrackingConfig,
    TrainerConfig,
    eval_datasets,
)

Node = dict[str, Any] | None  # a `_target_` with its arguments
Section = TypeVar("Section")


@dataclass(frozen=True)
class EngineSpec:
    """One engine: the nodes of its parts and its optimizations, with the defaults from the top level of the config.

    `prefix` is that of its keys in messages: `engines.NAME.`, or nothing in a config without `engines`. `has_own_loss`
    is false for a teacher: without an optimizer, and without a feeder or loss of its own.
    """

    name: str
    prefix: str
    model: Node
    optimizer: Node
    scheduler: Node
    feeder: Node
    ema: Node
    loss: Node
    metrics: dict[str, dict[str, Any]]
    optimizations: dict[str, dict[str, Any]]  # those that are enabled, by name
    every: int
    has_own_loss: bool


@dataclass(frozen=True)
class InitSpec:
    """The initial weights of an engine: `init` of the config, or its short form `init_from`.

    `key` is that of the path in messages. `include` and `exclude` are globs over the model's names of weights.
    """

    key: str
    path: str
    rename: dict[str, str] = field(default_factory=dict)
    include: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    strict: bool = True


def find_init(plain: Mapping[str, Any], engine: str) -> InitSpec | None:
    """Returns the initial weights of an engine of a resolved config; None for those that its model is built with."""
    own = (plain["engines"] or {}).get(engine, {})
    is_own = "init" in own or "init_from" in own
    prefix, source = (f"engines.{engine}.", own) if is_own else ("", plain)
    if (path := source.get("init_from")) is not None:
        return InitSpec(f"{prefix}init_from", path)
    init = source.get("init")
    return None if init is None else InitSpec(f"{prefix}init.path", **init)


@dataclass(frozen=True)
class ExperimentSpec:
    """A resolved config: typed sections, and a plain node for each object with a `_target_`.

    `plain` is the same config as JSON can hold it. Processes exchange it, and exports store it.
    """

    name: str
    seed: int
    resume: str | None
    resume_allow_changes: bool
    data: DataConfig
    sampler: Node
    report: Node
    train_metrics: bool
    alternates: bool
    callbacks: dict[str, Node]
    distributed: DistributedConfig
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    export: ExportConfig
    tracking: TrackingConfig
    trackers: dict[str, Any]  # nodes by name
    plain: dict[str, Any]

    @classmethod
    def from_plain(cls, plain: dict[str, Any]) -> ExperimentSpec:
        """Returns the specification of a resolved config, as `checks.to_plain` returns it.

        Raises:
            KeyError, TypeError, AttributeError: it is no checked config, such as one of another version.
        """
        return cls(
            name=plain["name"],
            seed=plain["seed"],
            resume=plain["resume"],
            resume_allow_changes=plain["resume_allow_changes"],
            data=_read_section(DataConfig, plain["data"]),
            sampler=plain["sampler"],
            report=plain["report"],
            train_metrics=plain["train_metrics"],
            alternates=plain["updates"] == "alternating",
            callbacks=plain.get("callbacks") or {},
            distributed=_read_section(DistributedConfig, plain["distributed"]),
            trainer=_read_section(TrainerConfig, plain["trainer"]),
            checkpoint=_read_section(CheckpointConfig, plain["checkpoint"]),
            export=_read_section(ExportConfig, plain["export"]),
            tracking=_read_section(TrackingConfig, plain["tracking"]),
            trackers=plain["trackers"],
            plain=plain,
        )

    @cached_property
    def engines(self) -> dict[str, EngineSpec]:
        """The engines in the order of the config; one named `model` if it has no `engines`.

        They are read when they are first used: a launcher and its checks don't need them.
        """
        shared = {key: self.plain[key] for key in ("model", "optimizer", "scheduler", "feeder", "loss")}
        engines = {}
        for name, values in (self.plain["engines"] or {"model": {}}).items():
            parts = {key: values.get(key, default) for key, default in shared.items()}
            prefix = f"engines.{name}." if self.plain["engines"] else ""
            metrics = {**self.plain["metrics"], **(values.get("metrics") or {})}
            parts["metrics"] = {key: node for key, node in metrics.items() if node is not None}
            nodes, ema = optimizations.of_engine(self.plain, name)
            engines[name] = EngineSpec(
                name, prefix, **parts, ema=ema, optimizations=nodes, every=values.get("every", 1),
                has_own_loss=parts["optimizer"] is not None or any(values.get(key) for key in ("feeder", "loss")),
            )  # fmt: skip
        return engines

    @property
    def eval_datasets(self) -> dict[str, dict[str, Any]]:
        """The nodes of the evaluation datasets by name; a single one has the empty name."""
        return eval_datasets(self.data.eval)

    def resumed_from(self, folder: Path) -> ExperimentSpec:
        """Returns the specification of the same experiment that resumes the run in a folder."""
        resume = str(folder)
        return replace(self, resume=resume, plain={**self.plain, "resume": resume})


def select_trackers(plain: dict[str, Any]) -> dict[str, Any]:
    """Returns a resolved config without the trackers that `tracking` switches off, or that are null.

    The configs of earlier runs have no `trackers`, but `tracking.tensorboard` and `tracking.jsonl`.
    """
    trackers, switches = plain.get("trackers"), plain.get("tracking")
    if not isinstance(trackers, Mapping) or not isinstance(switches, Mapping):  # reported where the types are checked
        return plain
    kept = {}
    for name, node in trackers.items():
        switch = switches.get(name) if name in ("tensorboard", "jsonl") else None
        if node is not None and (switches.get("trackers", True) if switch is None else switch):
            kept[name] = node
    return {**plain, "trackers": kept}


def _read_section(section: type[Section], values: Mapping[str, Any]) -> Section:
    """Returns a section of a resolved config as its dataclass."""
    hints = get_type_hints(section)
    enums = {key: hint for key, hint in hints.items() if isinstance(hint, EnumMeta)}
    return section(**{key: enums[key][value] if key in enums else value for key, value in values.items()})
