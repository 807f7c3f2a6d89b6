"""Builds the data of an experiment: the training batches and the evaluation data."""

from __future__ import annotations

import copy
import zlib
from collections.abc import Mapping
from functools import partial
from typing import Any

import torch

from runner.config.errors import ConfigError
from runner.config.schema import Resume
from runner.config.spec import ExperimentSpec
from runner.config.targets import find_sampler_fault, locate, parameter_names
from runner.run.build.datasets import check_unused_sampler, make_dataset, make_training_dataset, pins_memory
from runner.run.build.instantiate import explain_errors, make_object
from runner.utils.distributed import rank, world_size
from runner.utils.modules.generators import ObjectGenerators
from runner.utils.sampler.batches import Batches, EvaluationData, PositionedBatches
from runner.utils.sampler.device_copies import make_copier
from runner.utils.sampler.mix import Mix, MixSampler
from runner.utils.sampler.stream import StreamBatches, StreamEvaluation, is_stream
from runner.utils.sampler.workers import DEFAULT_PREFETCH
from runner.utils.utils import derive_seed

_MOST_PASSES = 10_000
_MOST_KEPT_WORKERS = 16  # by default, of all evaluation datasets together: each keeps old memory of this process


def build_batches(spec: ExperimentSpec, device: torch.device) -> PositionedBatches:
    """Returns the batches of `data.train` or `data.mix`.

    Raises:
        ConfigError: naming the key whose target refused its arguments, or a combination of keys that can't be trained.
    """
    data, parts = spec.data, spec.trainer.accumulate
    dataset = make_training_dataset(spec)
    is_ordered = is_stream(dataset) or isinstance(dataset, Mix)
    path = spec.sampler["_target_"] if spec.sampler else ""
    if is_ordered:
        check_unused_sampler(spec, dataset)
    elif not path:
        raise ConfigError("sampler: nothing is chosen; a run needs one")
    is_batched = not is_ordered and "lengths" in parameter_names(path)
    if is_batched and parts > 1:
        kind = locate(path).__name__
        remedy = "give it a smaller sampler.max_size or max_cost, and trainer.accumulate=1"
        raise ConfigError(f"trainer.accumulate={parts}: each batch of {kind} is a step of its own; {remedy}")
    micro_batch_size = data.batch_size // parts
    if not is_batched and micro_batch_size < world_size():
        found = f"data.batch_size={data.batch_size} with trainer.accumulate={parts}"
        raise ConfigError(f"{found}: {world_size()} ranks share {micro_batch_size}; expected one each or more")
    settings = {
        "seed": spec.seed,
        "num_workers": data.num_workers,
        "collate": make_object(spec.seed, "data.collate", data.collate),
        "pin_memory": pins_memory(spec, device),
        "seed_samples": data.seed_samples,
        "prefetch_factor": data.prefetch_factor or DEFAULT_PREFETCH,
        "rank": rank(),
        "world_size": world_size(),
    }
    batches: PositionedBatches
    if is_stream(dataset):
        batches = StreamBatches(dataset, micro_batch_size, skips=data.resume is Resume.skip, **settings)
        batches.copy_with(make_copier(device))
        return batches
    if not is_batched and data.batch_size > _MOST_PASSES * len(dataset):
        expected = f"expected at most {_MOST_PASSES} passes over the {len(dataset)} samples of data.train in a step"
        raise ConfigError(f"data.batch_size={data.batch_size}: {expected}")
    sampler = _make_sampler(spec, dataset, is_batched)
    batches = Batches(dataset, sampler, None if is_batched else micro_batch_size, **settings)
    batches.copy_with(make_copier(device))
    return batches


def _make_sampler(spec: ExperimentSpec, dataset: Any, is_batched: bool) -> Any:
    if isinstance(dataset, Mix):
        return MixSampler(dataset, spec.seed)
    sampler = make_object(spec.seed, "sampler", spec.sampler, _lengths_of(dataset) if is_batched else len(dataset))
    _check_sampler(sampler)
    return sampler


def _check_sampler(sampler: Any) -> None:
    """Checks that a sampler can load its own state; raises ConfigError otherwise."""
    if fault := find_sampler_fault(sampler):
        raise ConfigError(f"sampler: {type(sampler).__name__}: {fault}")
    state = sampler.state_dict()
    if not isinstance(state, Mapping):
        raise ConfigError(f"sampler: {type(sampler).__name__}.state_dict: expected a mapping, found {state!r}")
    explain_errors("sampler", partial(sampler.load_state_dict, copy.deepcopy(dict(state))))


def _lengths_of(dataset: Any) -> Any:
    """Returns the dataset's own `lengths`, or ones, so that a sampler's budget counts samples."""
    lengths = getattr(dataset, "lengths", None)
    return torch.ones(len(dataset), dtype=torch.int64) if lengths is None else lengths


def build_evaluations(spec: ExperimentSpec) -> dict[str, EvaluationData]:
    """Returns the evaluation data of an experiment by name; a single dataset has the empty name.

    The seed of a named dataset's samples depends on its name, and not on the other datasets.

    Raises:
        ConfigError: naming the key whose target refused its arguments.
    """
    data, seed = spec.data, spec.seed
    is_persistent = data.persistent_workers
    if is_persistent is None and data.num_workers * len(spec.eval_datasets) > _MOST_KEPT_WORKERS:
        is_persistent = False
    evaluations = {}
    for name, node in spec.eval_datasets.items():
        collate = make_object(seed, "data.collate", data.collate)
        dataset = make_dataset(seed, f"data.eval.{name}".removesuffix("."), node, needs_state=False)
        sample_seed = derive_seed(seed, -1, *name_seed(name)) if data.seed_samples else None
        kind = StreamEvaluation if is_stream(dataset) else EvaluationData
        evaluations[name] = kind(
            dataset, data.batch_size, data.num_workers, collate, sample_seed, rank(), world_size(),
            prefetch_factor=data.prefetch_factor or DEFAULT_PREFETCH,
            pin_memory=bool(data.pin_memory) and torch.accelerator.is_available(),
            is_persistent=is_persistent,
        )  # fmt: skip
    return evaluations


def name_seed(name: str) -> tuple[int, ...]:
    """Returns the numbers that a seed derives from the name of an evaluation dataset; none for a single one."""
    return (zlib.crc32(name.encode()),) if name else ()


def find_unseeded(
    spec: ExperimentSpec, batches: PositionedBatches | None, evaluations: Mapping[str, EvaluationData]
) -> list[str]:
    """Returns warnings of generators that the data holds and that are not reseeded for each sample."""
    sources: dict[str, Any] = {} if batches is None else {"data.train": batches}
    sources |= {f"data.eval.{name}".removesuffix("."): evaluation for name, evaluation in evaluations.items()}
    roots: dict[str, Any] = {}
    for key, data in sources.items():
        # The generators of a stream belong to its own state.
        roots |= {key: None if is_stream(data.dataset) else data.dataset, "data.collate": data.collate}
    held = ObjectGenerators(**roots)
    if spec.data.seed_samples:
        effect = "its numbers depend on loader workers and on where the run is cut"
        remedy = "draw from torch, NumPy, random or a generator of theirs"
        return [f"{path}: expected a generator that a seed decides; {effect}; {remedy}" for path in held.unseeded]
    effect = "each loader worker and each resume starts a generator of the dataset's own anew"
    remedy = "set data.seed_samples=true to reseed it for each sample"
    return [f"{path}: {effect}; {remedy}" for path in [*held.paths, *held.unseeded]]
