"""The schema of what the runner owns: values stand in YAML, and a type ends in one line what is of another.

Must not import torch: a misspelt key ends before that second is spent.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from omegaconf import MISSING


class Precision(Enum):
    """Arithmetic of forward and backward; weights stay fp32."""

    fp32 = "fp32"
    bf16 = "bf16"
    fp16 = "fp16"


class OnNonfinite(Enum):
    """What becomes of a step whose loss or gradients are not finite."""

    stop = "stop"
    skip = "skip"
    ignore = "ignore"


class OnOom(Enum):
    """What becomes of a step for which memory runs out."""

    stop = "stop"
    skip = "skip"


class Offload(Enum):
    """Which blocks' inputs are moved to host memory: those for which it pays, all, or none."""

    auto = "auto"
    always = "always"
    never = "never"


class Mode(Enum):
    """Which of two values of a metric is better."""

    min = "min"
    max = "max"


class Format(Enum):
    """How tensors are stored: SafeTensors, or pickles that are read without executing anything."""

    sft = "sft"
    pt = "pt"


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


class Scope(Enum):
    """What is compiled: nothing, each block's forward, or the whole module's call."""

    off = "off"
    blocks = "blocks"
    whole = "whole"


class FreezeMode(Enum):
    """The mode in which modules that are wholly frozen run while the rest is in training mode."""

    eval = "eval"
    train = "train"


class Export(Enum):
    """What is exported of a module with adapters: its weights with them merged in, or the adapters alone."""

    merged = "merged"
    adapter = "adapter"


class Recipe(Enum):
    """How a matrix is scaled into float8: as a whole, by its rows, or so and gradients of weights not at all."""

    tensorwise = "tensorwise"
    rowwise = "rowwise"
    rowwise_with_gw_hp = "rowwise_with_gw_hp"


@dataclass
class LoraConfig:
    rank: int = MISSING
    alpha: float | None = MISSING
    dropout: float = MISSING
    include: list[str] | None = MISSING
    exclude: list[str] = MISSING
    also_train: list[str] = MISSING
    export: Export = MISSING


@dataclass
class Float8Config:
    enabled: bool = MISSING
    include: list[str] | None = MISSING
    exclude: list[str] = MISSING
    recipe: Recipe = MISSING
    emulate: bool = MISSING


@dataclass
class CompileConfig:
    scope: Scope = MISSING
    backend: str = MISSING
    mode: str | None = MISSING
    dynamic: bool | None = MISSING


@dataclass
class DeviceMapConfig:
    budgets: Any = MISSING
    bytes_factor: float = MISSING


@dataclass
class AveragesConfig:
    decay: float = MISSING
    warmup: bool = MISSING


@dataclass
class UnslothConfig:
    """What `optimizations.unsloth` may be in place of true."""

    include: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    offload: Offload = Offload.auto
    min_bytes: int = 1 << 20
    keep_last: int = 1
    in_flight: int = 2
    prefetch: int = 1
    host_limit: int | None = None


@dataclass
class CheckpointingConfig:
    """What `optimizations.checkpointing` may be in place of none and full."""

    every: int = 1
    include: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    memory_budget: float | None = None


@dataclass
class RuleConfig:
    """One of `optimizations.replace`; `with`, which is a word of Python's own, comes beside these."""

    match: str = MISSING
    include: list[str] | None = None
    exclude: list[str] = field(default_factory=list)
    subclasses: bool = False
    arguments: dict[str, Any] = field(default_factory=dict)


@dataclass
class OptimizationsConfig:
    freeze: list[str] = MISSING
    freeze_mode: FreezeMode = FreezeMode.eval  # a run of before it was there goes on
    lora: LoraConfig = MISSING
    replace: list[Any] = MISSING
    fp8: Float8Config = MISSING
    device_map: DeviceMapConfig = MISSING
    compile: CompileConfig = MISSING
    unsloth: Any = MISSING
    checkpointing: Any = MISSING
    ema: AveragesConfig = MISSING


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
    tensorboard: bool = MISSING
    jsonl: bool = MISSING
    progress: bool = MISSING
    stdin: Any = MISSING


@dataclass
class DataConfig:
    train: Any = MISSING
    eval: Any = None
    batch_size: int = MISSING
    num_workers: int = MISSING
    collate: Any = None
    seed_samples: bool = True


@dataclass
class Config:
    name: str = MISSING
    seed: int = MISSING
    resume: str | None = MISSING
    resume_allow_changes: bool = MISSING
    allow_targets: list[str] = MISSING
    sign: bool = False
    init_from: str | None = MISSING
    model: Any = MISSING
    data: DataConfig = MISSING
    sampler: Any = MISSING
    pattern: Any = None
    optimizer: Any = MISSING
    scheduler: Any = MISSING
    optimizations: OptimizationsConfig = MISSING
    distributed: DistributedConfig = MISSING
    trainer: TrainerConfig = MISSING
    checkpoint: CheckpointConfig = MISSING
    tracking: TrackingConfig = MISSING
    engines: dict[str, Any] = field(default_factory=dict)
    feeder: Any = None
    report: Any = None
