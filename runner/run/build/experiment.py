"""Builds the objects of an experiment from its specification, the same on every rank."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import nn
from torch.distributed import Store

from runner.config.errors import ConfigError
from runner.config.spec import ExperimentSpec
from runner.config.targets import seed_imports
from runner.engines import Engines
from runner.run.build.data import build_batches, build_evaluations, find_unseeded
from runner.run.build.datasets import describe_stream
from runner.run.build.engines import build_parts, make_engines
from runner.run.build.instantiate import explain_errors, make_object
from runner.run.weights.placeholders import ModelBuilder
from runner.tracking.protocol import find_fault
from runner.utils.distributed import is_rank_zero, local_rank, pick_device, run_on_all_ranks
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.sampler.batches import EvaluationData, PositionedBatches
from runner.utils.wrapper import Purpose

if TYPE_CHECKING:
    from runner.callbacks.group import CallbackGroup

Report = Callable[[nn.Module, Any], Mapping[str, Any]]


@dataclass
class Experiment:
    """The objects of one experiment, on one rank."""

    spec: ExperimentSpec
    engines: Engines
    batches: PositionedBatches
    evaluations: dict[str, EvaluationData]  # by the name of the dataset; a single one has the empty name
    report: Report | None
    trackers: dict[str, Any]  # by name, on rank zero
    coordinator: Coordinator
    callbacks: CallbackGroup | None
    notes: list[str]  # warnings for the log


def build(spec: ExperimentSpec, store: Store | None = None, builder: ModelBuilder | None = None) -> Experiment:
    """Builds this rank's share of an experiment; all ranks of a run call it.

    Args:
        store: through which ranks send messages.
        builder: decides the initial weights of the models; by default those that they are built with.
    Raises:
        ConfigError: naming the key whose target refused its arguments.
        RankError: another rank could not build its share.
    """
    made: dict[str, Any] = {}
    seed_imports(spec.seed)

    def build_local() -> None:  # without a collective, so that no rank waits for one that fails
        device = build_device(spec)
        skips = "skip" in (spec.trainer.on_oom.name, spec.trainer.on_nonfinite.name)
        made.update(
            parts=build_parts(spec, device, Purpose.train, builder or ModelBuilder()),
            batches=build_batches(spec, device),
            evaluations=build_evaluations(spec),
            report=build_report(spec),
            callbacks=build_callbacks(spec),
            trackers=build_trackers(spec) if is_rank_zero() else {},
            coordinator=Coordinator(store, delays_flags=device.type != "cpu" and not skips),
        )
        made["notes"] = [
            *describe_stream(spec, made["batches"].dataset),
            *find_unseeded(spec, made["batches"], made["evaluations"]),
        ]

    run_on_all_ranks(build_local)
    parts, coordinator = made.pop("parts"), made["coordinator"]
    run_on_all_ranks(lambda: made.update(engines=make_engines(spec, parts, coordinator)))
    engines = made["engines"]
    if engines.is_sharded and spec.checkpoint.format.name != "sft":
        raise ConfigError("checkpoint.format: weights that are spread over the ranks are stored as sft; choose that")
    coordinator.is_sharded = engines.is_sharded
    return Experiment(spec, **made)


def build_device(spec: ExperimentSpec) -> torch.device:
    """Returns the device of this rank.

    Raises:
        ConfigError: this machine has no such device.
    """
    try:
        return pick_device(spec.distributed.device, local_rank())
    except ValueError as error:
        raise ConfigError(f"distributed.{error}") from error


def build_report(spec: ExperimentSpec) -> Report | None:
    """Returns the report of an experiment's evaluations, or None."""
    return make_object(spec.seed, "report", spec.report)


def build_callbacks(spec: ExperimentSpec) -> CallbackGroup | None:
    """Returns the callbacks of an experiment; None without any."""
    nodes = {name: node for name, node in spec.callbacks.items() if node is not None}
    if not nodes:
        return None
    from runner.callbacks.group import CallbackGroup, check_callback

    callbacks = {name: make_object(spec.seed, f"callbacks.{name}", node) for name, node in nodes.items()}
    for name, callback in callbacks.items():
        explain_errors(f"callbacks.{name}", partial(check_callback, callback))
    return CallbackGroup(callbacks)


def build_trackers(spec: ExperimentSpec) -> dict[str, Any]:
    """Returns the trackers of an experiment by name.

    Raises:
        ConfigError: naming the key whose object is no tracker, or whose target refused its arguments.
    """
    trackers = {}
    for name, node in spec.trackers.items():
        key = f"trackers.{name}"
        trackers[name] = make_object(spec.seed, key, node)
        if fault := find_fault(trackers[name]):
            raise ConfigError(f"{key}: {fault}")
    return trackers
