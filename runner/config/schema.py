"""The schema of the runner's own config keys: their types. The values are in YAML.

A misspelt key or a wrong type is reported in one line, before torch is imported.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from omegaconf import MISSING

# Arithmetic of forward and backward; weights stay fp32.
Precision = StrEnum("Precision", ["fp32", "bf16", "fp16"])
# Reaction to a step whose loss or gradients are not finite.
OnNonfinite = StrEnum("OnNonfinite", ["stop", "skip", "ignore"])
# Order of updates of several engines: all after all forwards, or each before the next one's forward.
Updates = StrEnum("Updates", ["joint", "alternating"])
# Reaction to a step that runs out of memory.
OnOom = StrEnum("OnOom", ["stop", "skip"])
# Order of a metric: the better of two values.
Mode = StrEnum("Mode", ["min", "max"])
# Names of numbers that the runner logs itself, and of what a forward returns besides numbers.
RESERVED_METRICS = (
    r"loss|tokens|weight|output|target|lr(_\d+)?|grad_norm|loss_scale|step_time_s|(samples|tokens)_per_s|memory_gb"
)
# Return of a resumed run to its position in an iterable dataset: by the dataset's own state, or by reading up to there.
Resume = StrEnum("Resume", ["state", "skip"])
# Format of exports: one file, or a folder for `from_pretrained` of transformers.
ExportFormat = StrEnum("ExportFormat", ["sft", "huggingface"])
# Names under which an exported file has a tied weight.
Ties = StrEnum("Ties", ["each", "once"])
# Format of stored tensors: SafeTensors, or pickles that are read without executing anything.
Format = StrEnum("Format", ["sft", "pt"])


@dataclass
class TrainerConfig:
    steps: int = MISSING
    accumulate: int = MISSING
    clip_norm: float = MISSING
    precision: Precision = MISSING
    log_every: int = MISSING
    save_every: int = MISSING
    eval_every: int = MISSING
    eval_at_start: bool = MISSING
    export_every: int = MISSING
    keep_last: int = MISSING
    keep_every: int = MISSING
    keep_best: int = MISSING
    best_metric: str | None = MISSING
    best_mode: Mode = MISSING
    on_nonfinite: OnNonfinite = MISSING
    on_oom: OnOom = MISSING
    max_skips: int = MISSING


@dataclass
class CheckpointConfig:
    format: Format = MISSING


@dataclass
class ExportConfig:
    format: ExportFormat = MISSING
    dtype: str | None = MISSING
    ties: Ties = MISSING


@dataclass
class EmaConfig:
    """The arguments of `runner.engines.ema.EMA`."""

    decay: float = MISSING
    warmup: bool = MISSING


@dataclass
class DistributedConfig:
    device: str = MISSING
    nproc_per_node: Any = MISSING
    nnodes: int = MISSING
    rdzv_endpoint: str | None = MISSING
    rdzv_timeout_s: float = MISSING
    backend: str = MISSING
    max_restarts: int = MISSING
    timeout_s: float = MISSING
    strategy: Any = MISSING


@dataclass
class TrackingConfig:
    trackers: bool = True
    tensorboard: bool | None = None
    jsonl: bool | None = None
    progress: bool = MISSING
    stdin: Any = MISSING


@dataclass
class InitConfig:
    """The initial weights of an engine: their source, and the names of those that are loaded."""

    path: str | None = None
    rename: dict[str, str] = field(default_factory=dict)
    include: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    strict: bool = True


@dataclass
class DataConfig:
    train: Any = None
    mix: Any = None
    eval: Any = None
    batch_size: int = MISSING
    num_workers: int = MISSING
    collate: Any = None
    seed_samples: bool = True
    target: str | None = None
    input: Any = None
    resume: Resume = Resume.state
    persistent_workers: bool | None = None
    prefetch_factor: int | None = None
    pin_memory: bool | None = None


def eval_datasets(node: Any) -> dict[str, Any]:
    """Returns the nodes of `data.eval` by name.

    A single dataset, a node with `_target_`, has the empty name. A mapping without `_target_` names several; null
    leaves one out, and `_target_: null` removes one that the mapping is merged with.
    """
    if node is None:
        return {}
    if not isinstance(node, Mapping) or node.get("_target_") is not None:
        return {"": node}
    return {str(name): dataset for name, dataset in node.items() if dataset is not None}


@dataclass
class Config:
    name: str = MISSING
    seed: int = MISSING
    resume: str | None = MISSING
    resume_allow_changes: bool = MISSING
    allow_targets: list[str] = MISSING
    sign: bool = False
    init_from: str | None = MISSING
    init: Any = None  # or an InitConfig
    model: Any = MISSING
    data: DataConfig = MISSING
    sampler: Any = MISSING
    pattern: Any = None
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    optimizations: Any = MISSING
    ema: Any = None
    distributed: DistributedConfig = MISSING
    trainer: TrainerConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    export: ExportConfig = MISSING
    tracking: TrackingConfig = MISSING
    trackers: dict[str, Any] = field(default_factory=dict)
    engines: dict[str, Any] = field(default_factory=dict)
    updates: Updates = Updates.joint
    feeder: Any = None
    report: Any = None
    callbacks: dict[str, Any] = field(default_factory=dict)
    loss: Any = None
    metrics: dict[str, Any] = field(default_factory=dict)
    train_metrics: bool = False
