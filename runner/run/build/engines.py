"""Builds the engines of an experiment: models, their optimizations, and their optimizers and schedulers."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from runner.config import optimizations
from runner.config.errors import ConfigError
from runner.config.spec import EngineSpec, ExperimentSpec
from runner.engines import Engine, Engines
from runner.engines.dynamo import avoid_dynamo_import, step_without_dynamo
from runner.engines.losses.supervised_loss import SupervisedLoss
from runner.engines.metric_objects.collection import MetricCollection
from runner.engines.metric_objects.training import TrainingMetrics
from runner.engines.optim.fused import use_fused_kernels
from runner.engines.optim.hyperparameters import check_sparse
from runner.engines.strategies import DDP, Strategy
from runner.run.build.instantiate import HYDRA_KEYS, explain_errors, instantiate_node, make_object
from runner.run.build.optimizers import check_steps, make_optimizer, make_scheduler, metric_of
from runner.run.weights.placeholders import ModelBuilder
from runner.utils.distributed import is_distributed
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.wrapper import Purpose, optimize
from runner.utils.wrapper.applied import AppliedOptimizations
from runner.utils.wrapper.protocol import shorten


@dataclass
class EngineParts:
    """An engine's module with its optimizations, before it is distributed over the ranks."""

    spec: EngineSpec
    module: nn.Module
    applied: AppliedOptimizations

    @property
    def is_trained(self) -> bool:
        return self.spec.optimizer is not None and any(p.requires_grad for p in self.module.parameters())


def build_engines(
    spec: ExperimentSpec, device: torch.device, purpose: Purpose = Purpose.train, builder: ModelBuilder | None = None
) -> Engines:
    """Returns the engines of an experiment in its order, on this process alone.

    Args:
        purpose: other purposes than training leave out the optimizer, the scheduler and whatever else they don't need.
        builder: as of `build`.
    Raises:
        ConfigError: naming the key whose target refused its arguments.
    """
    parts = build_parts(spec, device, purpose, builder or ModelBuilder())
    return make_engines(spec, parts, None, is_trained=purpose is not Purpose.use)


def build_parts(
    spec: ExperimentSpec, device: torch.device, purpose: Purpose, builder: ModelBuilder
) -> list[EngineParts]:
    parts = []
    for engine in spec.engines.values():
        key = f"{engine.prefix}model"
        module = builder.build(engine.name, key, engine.model, partial(_make_model, spec.seed, key))
        objects = {}
        for option, node in engine.optimizations.items():
            make = partial(optimizations.make_optimization, node, instantiate_node)
            objects[option] = explain_errors(f"{engine.prefix}optimizations.{option}", make, node)
        applied = explain_errors(f"{engine.prefix}optimizations", partial(optimize, module, objects, device, purpose))
        builder.finish(engine.name, module)
        parts.append(EngineParts(engine, module, applied))
    return parts


def _make_model(seed: int, key: str, node: Any) -> nn.Module:
    module = make_object(seed, key, node)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{key}: expected a torch.nn.Module, got {type(module).__name__}")
    explain_errors(key, partial(check_sized, module))
    return module


def check_sized(module: nn.Module) -> None:
    """Checks that all parameters and buffers have a shape before the first forward.

    Raises:
        ValueError: naming those that are lazy.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if lazy := [name for name, tensor in tensors.items() if is_lazy(tensor)]:
        remedy = "give the sizes, or call the module on a sample batch at the end of its __init__"
        raise ValueError(f"{shorten(lazy)} get their shape in the first forward, and are needed before it; {remedy}")


def make_engines(
    spec: ExperimentSpec, parts: list[EngineParts], coordinator: Coordinator | None, *, is_trained: bool = True
) -> Engines:
    """Returns engines of their parts; with a coordinator they are distributed over the ranks."""
    trained = [part.spec.name for part in parts if part.is_trained and is_trained]
    if is_trained and not trained:
        raise ConfigError(
            "optimizer: nothing is left to train; all parameters are frozen, or no engine has an optimizer"
        )
    if trained and all(part.spec.every > 1 for part in parts if part.spec.name in trained):
        raise ConfigError("engines: each is trained in some steps only; leave `every` out of one of them")
    engines = Engines()
    engines.alternates = spec.alternates
    avoid_dynamo_import()
    for part in parts:
        engine, module = part.spec, part.module
        is_run = coordinator is not None
        strategy = Strategy()
        if is_run and is_distributed():
            strategy = make_object(spec.seed, "distributed.strategy", spec.distributed.strategy)
        if engine.optimizer is None and is_trained:
            module.requires_grad_(False)
            strategy = DDP() if strategy.is_sharded else strategy  # other engines use its full weights
        if coordinator:
            strategy.attach_coordinator(coordinator, engine.name, engine.name == trained[-1])
        explain_errors("distributed.strategy", partial(strategy.shard, module))
        optimizer = scheduler = metric = None
        if engine.name in trained:
            optimizer = make_optimizer(spec.seed, engine, module)
            step_without_dynamo(optimizer)
            explain_errors(f"{engine.prefix}optimizer", partial(strategy.check_optimizer, optimizer))
            metric = metric_of(engine.scheduler)
            scheduler = make_scheduler(spec.seed, f"{engine.prefix}scheduler", engine.scheduler, optimizer)
            check_steps(spec, engine, optimizer, scheduler, metric, is_run=is_run)
            check = partial(check_sparse, module, optimizer, strategy.is_sharded and is_distributed())
            explain_errors(f"{engine.prefix}optimizer", check)
        engines[engine.name] = Engine(
            module,
            optimizer,
            scheduler,
            precision=spec.trainer.precision.name,
            accumulate=spec.trainer.accumulate,
            clip_norm=spec.trainer.clip_norm,
            on_nonfinite=spec.trainer.on_nonfinite.name,
            feeder=make_object(spec.seed, f"{engine.prefix}feeder", engine.feeder),
            strategy=strategy,
            ema=_make_ema(spec.seed, part, optimizer),
            applied=part.applied,
            metric=metric,
            loss=_make_loss(spec, engine),
            metrics=_make_metrics(spec, engine, module),
            training_metrics=_make_training_metrics(spec, engine, module, strategy) if is_run else None,
            target=spec.data.target,
        )
        if optimizer is not None:
            use_fused_kernels(optimizer, module)
        engines[engine.name].every = engine.every
        engines[engine.name].has_own_loss = engine.has_own_loss or not is_trained
    return engines


def _make_loss(spec: ExperimentSpec, engine: EngineSpec) -> SupervisedLoss | None:
    if engine.loss is None:
        return None
    key = f"{engine.prefix}loss"
    function = make_object(spec.seed, key, engine.loss)
    if not callable(function):
        raise ConfigError(f"{key}: expected a callable (output, target), found {type(function).__name__}")
    inputs = [spec.data.input] if isinstance(spec.data.input, str) else spec.data.input
    return explain_errors(key, partial(SupervisedLoss, function, spec.data.target, inputs))


def _make_metrics(
    spec: ExperimentSpec, engine: EngineSpec, module: nn.Module, *, needs_state: bool = False
) -> MetricCollection | None:
    if not engine.metrics:
        return None
    metrics = {}
    for name, node in engine.metrics.items():
        metrics[name] = make_object(spec.seed, f"{engine.prefix}metrics.{name}", node)
    device = next((parameter.device for parameter in module.parameters()), torch.device("cpu"))
    return explain_errors(f"{engine.prefix}metrics", partial(MetricCollection, metrics, device, needs_state))


def _make_training_metrics(
    spec: ExperimentSpec, engine: EngineSpec, module: nn.Module, strategy: Strategy
) -> TrainingMetrics | None:
    if not spec.train_metrics or engine.optimizer is None:
        return None
    collection = _make_metrics(spec, engine, module, needs_state=True)
    return None if collection is None else TrainingMetrics(collection, strategy.is_sharded)


def _make_ema(seed: int, part: EngineParts, optimizer: Any) -> Any:
    node, prefix = part.spec.ema, part.spec.prefix
    if not optimizer or node is None:
        return None
    if hasattr(optimizer, "eval"):
        raise ConfigError(f"{prefix}ema: {type(optimizer).__name__} evaluates an average of its own; set ema=null")
    ema = make_object(seed, f"{prefix}ema", node, part.module)
    settings = ", ".join(f"{key} {value}" for key, value in node.items() if key not in HYDRA_KEYS)
    part.applied.rows.append(("ema", f"{settings}: evaluations and exports use the averages"))
    return ema
