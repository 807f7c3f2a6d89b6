"""Builds the objects of an experiment from its specification; the only module that calls Hydra's `instantiate`."""

from __future__ import annotations

import copy
import inspect
import itertools
import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate
from torch import nn
from torch.distributed import Store
from torch.nn.parameter import is_lazy

from runner.config import optimizations
from runner.config.errors import ConfigError
from runner.config.spec import EngineSpec, ExperimentSpec
from runner.config.targets import (
    find_sampler_fault,
    hint_at_text_numbers,
    is_number_text,
    is_used_directly,
    locate,
    parameter_names,
    seed_imports,
)
from runner.engines import Engine, Engines
from runner.engines.dynamo import avoid_dynamo_import, step_without_dynamo
from runner.engines.optim.hyperparameters import check_covers_parameters, check_sparse
from runner.engines.optim.schedule_replay import check_optimizer_step, check_scheduler_step, find_lr_decrease
from runner.engines.strategies import Strategy
from runner.run.weights_placeholders import ModelBuilder
from runner.utils.distributed import is_distributed, local_rank, pick_device, rank, run_on_all_ranks, world_size
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.files.open_files import describe_limit, is_out_of_files
from runner.utils.modules.generators import ObjectGenerators
from runner.utils.sampler.batches import Batches, EvaluationData
from runner.utils.utils import derive_seed
from runner.utils.wrapper import Purpose, optimize
from runner.utils.wrapper.applied import AppliedOptimizations
from runner.utils.wrapper.protocol import shorten

_MOST_PASSES = 10_000
_HYDRA_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_")
Report = Callable[[nn.Module, Any], Mapping[str, Any]]


@dataclass
class Experiment:
    """The objects of one experiment, on one rank."""

    spec: ExperimentSpec
    engines: Engines
    batches: Batches
    evaluation: EvaluationData | None
    report: Report | None
    coordinator: Coordinator
    notes: list[str]  # warnings for the log


@dataclass
class _EngineParts:
    """An engine's module with its optimizations, before it is distributed over the ranks."""

    spec: EngineSpec
    module: nn.Module
    applied: AppliedOptimizations

    @property
    def is_trained(self) -> bool:
        return self.spec.optimizer is not None and any(p.requires_grad for p in self.module.parameters())


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
            parts=_build_parts(spec, device, Purpose.train, builder or ModelBuilder()),
            batches=_build_batches(spec, device),
            evaluation=build_evaluation(spec),
            report=build_report(spec),
            coordinator=Coordinator(store, delays_flags=device.type != "cpu" and not skips),
        )
        made["notes"] = find_unseeded(spec, made["batches"], made["evaluation"])

    run_on_all_ranks(build_local)
    parts, coordinator = made.pop("parts"), made["coordinator"]
    run_on_all_ranks(lambda: made.update(engines=_make_engines(spec, parts, coordinator)))
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
    parts = _build_parts(spec, device, purpose, builder or ModelBuilder())
    return _make_engines(spec, parts, None, is_trained=purpose is not Purpose.use)


def _build_parts(
    spec: ExperimentSpec, device: torch.device, purpose: Purpose, builder: ModelBuilder
) -> list[_EngineParts]:
    parts = []
    for engine in spec.engines.values():
        key = f"{engine.prefix}model"
        module = builder.build(engine.name, key, engine.model, partial(_make_model, spec.seed, key))
        objects = {}
        for option, node in engine.optimizations.items():
            make = partial(optimizations.make_optimization, node, _instantiate)
            objects[option] = _explain_errors(f"{engine.prefix}optimizations.{option}", make, node)
        applied = _explain_errors(f"{engine.prefix}optimizations", partial(optimize, module, objects, device, purpose))
        builder.finish(engine.name, module)
        parts.append(_EngineParts(engine, module, applied))
    return parts


def _make_model(seed: int, key: str, node: Any) -> nn.Module:
    module = _make(seed, key, node)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{key}: expected a torch.nn.Module, got {type(module).__name__}")
    _explain_errors(key, partial(_check_sized, module))
    return module


def _check_sized(module: nn.Module) -> None:
    """Checks that all parameters and buffers have a shape before the first forward.

    Raises:
        ValueError: naming those that are lazy.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if lazy := [name for name, tensor in tensors.items() if is_lazy(tensor)]:
        remedy = "give the sizes, or call the module on a sample batch at the end of its __init__"
        raise ValueError(f"{shorten(lazy)} get their shape in the first forward, and are needed before it; {remedy}")


def _make_engines(
    spec: ExperimentSpec, parts: list[_EngineParts], coordinator: Coordinator | None, *, is_trained: bool = True
) -> Engines:
    """Returns engines of their parts; with a coordinator they are distributed over the ranks."""
    trained = [part.spec.name for part in parts if part.is_trained and is_trained]
    if is_trained and not trained:
        raise ConfigError(
            "optimizer: nothing is left to train; all parameters are frozen, or no engine has an optimizer"
        )
    engines = Engines()
    avoid_dynamo_import()
    for part in parts:
        engine, module = part.spec, part.module
        is_run = coordinator is not None
        strategy = Strategy()
        if is_run and is_distributed():
            strategy = _make(spec.seed, "distributed.strategy", spec.distributed.strategy)
        if coordinator:
            strategy.attach_coordinator(coordinator, engine.name, engine.name == trained[-1])
        _explain_errors("distributed.strategy", partial(strategy.shard, module))
        optimizer = scheduler = metric = None
        if engine.name in trained:
            optimizer = _make_optimizer(spec.seed, engine, module)
            step_without_dynamo(optimizer)
            _explain_errors(f"{engine.prefix}optimizer", partial(strategy.check_optimizer, optimizer))
            metric = _metric_of(engine.scheduler)
            scheduler = _make_scheduler(spec.seed, f"{engine.prefix}scheduler", engine.scheduler, optimizer)
            _check_steps(spec, engine, optimizer, scheduler, metric, is_run=is_run)
            check = partial(check_sparse, module, optimizer, strategy.is_sharded and is_distributed())
            _explain_errors(f"{engine.prefix}optimizer", check)
        engines[engine.name] = Engine(
            module,
            optimizer,
            scheduler,
            precision=spec.trainer.precision.name,
            accumulate=spec.trainer.accumulate,
            clip_norm=spec.trainer.clip_norm,
            on_nonfinite=spec.trainer.on_nonfinite.name,
            feeder=_make(spec.seed, f"{engine.prefix}feeder", engine.feeder),
            strategy=strategy,
            ema=_make_ema(spec.seed, part, optimizer),
            applied=part.applied,
            metric=metric,
        )
    return engines


def _make_optimizer(seed: int, engine: EngineSpec, module: nn.Module) -> Any:
    """Returns an optimizer of all trained parameters.

    It gets (name, parameter) pairs, as torch's optimizers take them. If it fails, or keeps the pairs beside its groups,
    it is built again with the parameters alone.
    """
    key = f"{engine.prefix}optimizer"
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    forms: list[tuple[str, list[Any]]] = [("(name, parameter) pairs", named), ("parameters", [p for _, p in named])]
    failures: dict[str, ConfigError] = {}
    for description, form in forms:
        try:
            optimizer = _make(seed, key, engine.optimizer, list(form))
            _explain_errors(key, partial(check_covers_parameters, optimizer, named))
            if form is not named or not _keeps_pairs(optimizer):
                return optimizer
        except ConfigError as error:
            failures[f"{error}, given {description}"] = error
    is_same = len(set(map(str, failures.values()))) == 1
    raise next(iter(failures.values())) if is_same else ConfigError("\n".join(failures))


def _keeps_pairs(optimizer: Any) -> bool:
    """Returns whether an attribute of an optimizer is a list of (name, parameter) pairs: it expected parameters."""
    lists = [value for value in vars(optimizer).values() if isinstance(value, (list, tuple))]
    pairs = [item for item in itertools.chain(*lists) if isinstance(item, tuple) and len(item) == 2]
    return any(isinstance(name, str) and isinstance(parameter, nn.Parameter) for name, parameter in pairs)


def _make_scheduler(seed: int, key: str, node: Any, optimizer: Any) -> Any:
    """Returns a scheduler of an optimizer, which also goes to the schedulers that the node lists as `schedulers`."""
    if node is None:
        return None
    parameters = parameter_names(node["_target_"])
    built: dict[str, Any] = {}
    if isinstance(node.get("schedulers"), list):
        nested = enumerate(node["schedulers"])
        built["schedulers"] = [_make_scheduler(seed, f"{key}.schedulers.{i}", child, optimizer) for i, child in nested]
    left_out = {*built, *({"metric"} - {*parameters})}  # the engine reads `metric`, unless the scheduler takes it
    settings = {name: value for name, value in node.items() if name not in left_out}
    make = _make(seed, key, settings | {"_partial_": True})
    make = partial(make, optimizer=optimizer) if "optimizer" in parameters else partial(make, optimizer)
    return _explain_errors(key, partial(make, **built))


def _metric_of(node: Any) -> str | None:
    """Returns the `metric` of a scheduler's node; None if the scheduler has an argument of this name."""
    metric = None if node is None else node.get("metric")
    return None if metric is None or "metric" in parameter_names(node["_target_"]) else str(metric)


def _check_steps(
    spec: ExperimentSpec, engine: EngineSpec, optimizer: Any, scheduler: Any, metric: str | None, *, is_run: bool
) -> None:
    """Checks that an optimizer and its scheduler can be stepped, before the first step.

    Raises:
        ConfigError: a step needs an argument or metric that it won't get, or the learning rates fall though the
            optimizer averages the weights instead.
    """
    _explain_errors(f"{engine.prefix}optimizer", partial(check_optimizer_step, optimizer))
    _explain_errors(f"{engine.prefix}scheduler", partial(check_scheduler_step, scheduler, metric))
    if is_run and metric is not None and (spec.data.eval is None or not spec.trainer.eval_every):
        key = "data.eval" if spec.data.eval is None else "trainer.eval_every"
        found = f"expected evaluations that measure it, found none; set {key}, or choose another schedule"
        raise ConfigError(f"{engine.prefix}scheduler.metric={metric}: {found}")
    is_averaging = is_run and hasattr(optimizer, "eval")
    if is_averaging and (fall := find_lr_decrease(scheduler, spec.trainer.steps)) is not None:
        found = f"{type(scheduler).__name__}, whose rate has fallen by step {fall + 1}"
        expected = f"expected a rate that doesn't fall, as {type(optimizer).__name__} averages the weights instead"
        raise ConfigError(f"{engine.prefix}scheduler: {expected}; found {found}; set scheduler=constant")


def _make_ema(seed: int, part: _EngineParts, optimizer: Any) -> Any:
    node, prefix = part.spec.ema, part.spec.prefix
    if not optimizer or node is None:
        return None
    if hasattr(optimizer, "eval"):
        raise ConfigError(f"{prefix}ema: {type(optimizer).__name__} evaluates an average of its own; set ema=null")
    ema = _make(seed, f"{prefix}ema", node, part.module)
    settings = ", ".join(f"{key} {value}" for key, value in node.items() if key not in _HYDRA_KEYS)
    part.applied.rows.append(("ema", f"{settings}: evaluations and exports use the averages"))
    return ema


def _build_batches(spec: ExperimentSpec, device: torch.device) -> Batches:
    data, parts = spec.data, spec.trainer.accumulate
    dataset = _make_dataset(spec.seed, "data.train", data.train)
    assert spec.sampler is not None
    target = locate(spec.sampler["_target_"])
    is_batched = "lengths" in inspect.signature(target).parameters
    if is_batched and parts > 1:
        remedy = "give it a smaller sampler.max_size or max_cost, and trainer.accumulate=1"
        raise ConfigError(f"trainer.accumulate={parts}: each batch of {target.__name__} is a step of its own; {remedy}")
    micro_batch_size = data.batch_size // parts
    if not is_batched and micro_batch_size < world_size():
        found = f"data.batch_size={data.batch_size} with trainer.accumulate={parts}"
        raise ConfigError(f"{found}: {world_size()} ranks share {micro_batch_size}; expected one each or more")
    if not is_batched and data.batch_size > _MOST_PASSES * len(dataset):
        expected = f"expected at most {_MOST_PASSES} passes over the {len(dataset)} samples of data.train in a step"
        raise ConfigError(f"data.batch_size={data.batch_size}: {expected}")
    sampler = _make(spec.seed, "sampler", spec.sampler, _lengths_of(dataset) if is_batched else len(dataset))
    _check_sampler(sampler)
    return Batches(
        dataset,
        sampler,
        None if is_batched else micro_batch_size,
        seed=spec.seed,
        num_workers=data.num_workers,
        collate=_make(spec.seed, "data.collate", data.collate),
        pin_memory=device.type == "cuda",
        seed_samples=data.seed_samples,
        rank=rank(),
        world_size=world_size(),
    )


def _check_sampler(sampler: Any) -> None:
    """Checks that a sampler can load its own state; raises ConfigError otherwise."""
    if fault := find_sampler_fault(sampler):
        raise ConfigError(f"sampler: {type(sampler).__name__}: {fault}")
    state = sampler.state_dict()
    if not isinstance(state, Mapping):
        raise ConfigError(f"sampler: {type(sampler).__name__}.state_dict: expected a mapping, found {state!r}")
    _explain_errors("sampler", partial(sampler.load_state_dict, copy.deepcopy(dict(state))))


def _lengths_of(dataset: Any) -> Any:
    """Returns the dataset's own `lengths`, or ones, so that a sampler's budget counts samples."""
    lengths = getattr(dataset, "lengths", None)
    return torch.ones(len(dataset), dtype=torch.int64) if lengths is None else lengths


def build_evaluation(spec: ExperimentSpec) -> EvaluationData | None:
    """Returns the evaluation data of an experiment, or None if it has none.

    Raises:
        ConfigError: naming the key whose target refused its arguments.
    """
    data, seed = spec.data, spec.seed
    if data.eval is None:
        return None
    collate = _make(seed, "data.collate", data.collate)
    dataset = _make_dataset(seed, "data.eval", data.eval)
    sample_seed = derive_seed(seed, -1) if data.seed_samples else None
    return EvaluationData(dataset, data.batch_size, data.num_workers, collate, sample_seed, rank(), world_size())


def find_unseeded(spec: ExperimentSpec, batches: Batches | None, evaluation: EvaluationData | None) -> list[str]:
    """Returns warnings of generators that the data holds and that are not reseeded for each sample."""
    roots: dict[str, Any] = {}
    for key, data in (("data.train", batches), ("data.eval", evaluation)):
        if data is not None:
            roots |= {key: data.dataset, "data.collate": data.collate}
    held = ObjectGenerators(**roots)
    if spec.data.seed_samples:
        effect = "its numbers depend on loader workers and on where the run is cut"
        remedy = "draw from torch, NumPy, random or a generator of theirs"
        return [f"{path}: expected a generator that a seed decides; {effect}; {remedy}" for path in held.unseeded]
    effect = "each loader worker and each resume starts a generator of the dataset's own anew"
    remedy = "set data.seed_samples=true to reseed it for each sample"
    return [f"{path}: {effect}; {remedy}" for path in [*held.paths, *held.unseeded]]


def build_report(spec: ExperimentSpec) -> Report | None:
    """Returns the report of an experiment's evaluations, or None."""
    return _make(spec.seed, "report", spec.report)


def _make(seed: int, key: str, node: Any, *arguments: Any) -> Any:
    """Instantiates the node at a key with every global generator seeded for the key."""
    if node is None:
        return None
    later = {"_partial_": True} if is_used_directly(key, locate(node["_target_"])) else {}
    _seed_all(seed, key)
    return _explain_errors(key, lambda: _instantiate(node | later, *arguments), node)


def _instantiate(node: Any, *positional: Any) -> Any:
    """Instantiates a resolved node as Hydra does.

    Hydra's `instantiate` would resolve the node's texts again, so it gets the target alone.
    """
    if isinstance(node, list):
        return [_instantiate(child) for child in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {key: _instantiate(value) for key, value in node.items()}
    arguments = {key: value for key, value in node.items() if key not in _HYDRA_KEYS}
    if node.get("_recursive_", True):
        arguments = {key: _instantiate(value) for key, value in arguments.items()}
    positional = positional or arguments.pop("_args_", ())
    target = instantiate({"_target_": node["_target_"], "_partial_": True})
    if node.get("_partial_"):
        return partial(target, *positional, **arguments)
    return target(*positional, **arguments)


def _seed_all(seed: int, key: str) -> None:
    """Seeds every global generator from the run's seed and a key, the same on every rank.

    So an object that is added or left out does not change what the others draw. For `model` the seed is the run's own.
    """
    if key != "model":
        seed = derive_seed(seed, _SEED_NUMBERS.get(key) or zlib.crc32(key.encode()))
    torch.manual_seed(seed)  # of every device
    seed_imports(seed)


_SEED_NUMBERS = {"data.train": -2, "data.eval": -3}


def _make_dataset(seed: int, key: str, node: Any) -> Any:
    dataset = _make(seed, key, node)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        expected = "expected a dataset with __len__ and __getitem__, for a position in it"
        raise ConfigError(f"{key}: {expected}; found {type(dataset).__name__}")
    if not _explain_errors(key, lambda: len(dataset), node):
        raise ConfigError(f"{key}: the dataset is empty")
    return dataset


def _explain_errors(key: str, make: Callable[[], Any], node: Mapping[str, Any] | None = None) -> Any:
    """Calls `make`; an error becomes a ConfigError that names the key."""
    try:
        return make()
    except (Exception, SystemExit) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        has_message = isinstance(cause, (ValueError, TypeError, ImportError, OSError))
        hint = _hint_at_numbers(node) if isinstance(cause, (TypeError, ValueError)) else ""
        remedy = f"; {describe_limit()}" if is_out_of_files(cause) else ""
        raise ConfigError(f"{key}: {cause if has_message else repr(cause)}{hint}{remedy}") from error


def _hint_at_numbers(node: Mapping[str, Any] | None) -> str:
    """Returns a remedy if an argument is a text that looks like a number, such as one from the environment."""
    texts = {name: value for name, value in (node or {}).items() if is_number_text(value)}
    shown = ", ".join(f"{name}={value!r}" for name, value in texts.items())
    remedy = f"; {shown}: a text; ${{oc.decode:...}} makes it a number" if texts else ""
    return remedy + (hint_at_text_numbers(node) if node else "")
