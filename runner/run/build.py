"""The only caller of `instantiate`: config in, plain objects out."""

from __future__ import annotations

import copy
import inspect
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
from runner.config.checks import typed
from runner.config.errors import ConfigError
from runner.config.optimizations import Purpose
from runner.config.schema import CheckpointConfig, TrackingConfig, TrainerConfig
from runner.config.targets import (
    find_parameters,
    find_sampler_fault,
    find_untyped,
    is_called_later,
    is_number_text,
    locate,
    seed_imports,
)
from runner.engines import Engine, Engines
from runner.engines.dynamo import avoid_dynamo_import, step_without_dynamo
from runner.engines.ema import EMA
from runner.engines.optim.hyperparameters import check_covers_parameters, check_sparse
from runner.engines.optim.schedule import check_optimizer_step, check_scheduler_step, find_fall
from runner.engines.strategies import Strategy
from runner.run.warm_start import ModelBuilder
from runner.utils import distributed
from runner.utils.distributed import is_distributed, pick_device, rank, run_on_all_ranks, world_size
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.files.open_files import describe_limit, is_out_of_files
from runner.utils.modules.generators import HeldGenerators
from runner.utils.sampler.batches import Batches, EvaluationData
from runner.utils.utils import derive_seed
from runner.utils.wrapper.applied import AppliedOptimizations, shorten

_MOST_PASSES = 10_000
_OF_HYDRA = ("_target_", "_partial_", "_recursive_", "_convert_")
Report = Callable[[nn.Module, Any], Mapping[str, Any]]


@dataclass
class Experiment:
    """One experiment as plain objects."""

    name: str
    seed: int
    engines: Engines
    batches: Batches
    evaluation: EvaluationData | None
    report: Report | None
    trainer: TrainerConfig
    checkpoint: CheckpointConfig
    tracking: TrackingConfig
    settings: dict[str, Any]
    coordinator: Coordinator
    notes: list[str]

    def load_stream(self, state: Mapping[str, Any]) -> str | None:
        """Moves the batches to a saved position; says so where changes allow no more than the next epoch.

        Raises:
            ValueError: the sampler refuses the position, as that of another dataset, seed or setting.
        """
        try:
            self.batches.load_state_dict(state)
        except ValueError as error:
            if not self.settings["resume_allow_changes"]:
                raise ValueError(f"{error} Or go on with the next epoch: resume_allow_changes=true") from error
            self.batches.start_epoch_after(state)
            return f"The samples go on with the beginning of epoch {self.batches.epoch}: {error}"
        return None


@dataclass
class _EngineParts:
    """What an engine is made of, before it is spread over the ranks."""

    place: str
    settings: dict[str, Any]
    module: nn.Module
    applied: AppliedOptimizations

    @property
    def is_trained(self) -> bool:
        return self.settings["optimizer"] is not None and any(p.requires_grad for p in self.module.parameters())


def build(plain: dict[str, Any], store: Store | None = None, builder: ModelBuilder | None = None) -> Experiment:
    """Builds this rank's share of an experiment; all ranks of a run call it.

    Args:
        plain: the resolved config.
        store: where ranks leave word for each other.
        builder: decides which weights the models begin with; by default those that they are built with.
    Raises:
        ConfigError: naming the key whose target refused its arguments.
        RankError: another rank could not build its share.
    """
    trainer = typed(TrainerConfig, plain["trainer"])
    tracking = typed(TrackingConfig, plain["tracking"])
    checkpoint = typed(CheckpointConfig, plain["checkpoint"])
    made: dict[str, Any] = {}
    seed_imports(plain["seed"])

    def build_alone() -> None:  # a rank that fails here leaves nobody waiting
        device = build_device(plain)
        parts = _build_parts(plain, device, Purpose.train, builder or ModelBuilder())
        batches = _build_batches(plain, device)
        evaluation = build_evaluation(plain)
        made.update(batches=batches, evaluation=evaluation, report=build_report(plain))
        is_late = device.type != "cpu" and "skip" not in (trainer.on_oom.name, trainer.on_nonfinite.name)
        made.update(parts=parts, coordinator=Coordinator(store, is_late))
        made.update(notes=find_unseeded(plain, batches, evaluation))

    run_on_all_ranks(build_alone)
    parts = made.pop("parts")
    run_on_all_ranks(lambda: made.update(engines=_make_engines(plain, parts, made["coordinator"])))
    if made["engines"].is_sharded and checkpoint.format.name != "sft":
        raise ConfigError("checkpoint.format: weights that are spread over the ranks are stored as sft; choose that")
    made["coordinator"].is_spread = made["engines"].is_sharded
    return Experiment(
        plain["name"], plain["seed"], trainer=trainer, checkpoint=checkpoint, tracking=tracking, settings=plain, **made
    )


def build_device(plain: dict[str, Any]) -> torch.device:
    """Returns the device of a resolved config, of this rank's own where there are several.

    Raises:
        ConfigError: this machine has no such device.
    """
    try:
        return pick_device(plain["distributed"]["device"], distributed.local_rank())
    except ValueError as error:
        raise ConfigError(f"distributed.{error}") from error


def build_engines(
    plain: dict[str, Any], device: torch.device, purpose: Purpose = Purpose.train, builder: ModelBuilder | None = None
) -> Engines:
    """Returns the engines of a resolved config in its order, on this process alone.

    Args:
        purpose: to use exported weights takes no optimizer or schedule, nor other things that only training needs.
        builder: as of `build`.
    Raises:
        ConfigError: naming the key whose target refused its arguments.
    """
    parts = _build_parts(plain, device, purpose, builder or ModelBuilder())
    return _make_engines(plain, parts, None, is_trained=purpose is not Purpose.use)


def _build_parts(
    plain: dict[str, Any], device: torch.device, purpose: Purpose, builder: ModelBuilder
) -> dict[str, _EngineParts]:
    """Returns the modules of a resolved config by engine; one named `model` where there is no `engines`."""
    shared = {key: plain[key] for key in ("model", "optimizer", "scheduler", "feeder")}
    found = {}
    for name, own in (plain["engines"] or {"model": {}}).items():
        place = f"engines.{name}." if plain["engines"] else ""
        settings = shared | own | ({"feeder": None} if purpose is Purpose.write else {})
        changed = optimizations.of_engine(plain, name)
        make = partial(_make_model, plain, place + "model")
        module = builder.build(name, place + "model", settings["model"], make)
        change = partial(optimizations.carry_out, module, device, changed, purpose)
        changes = _explained(place + "optimizations", change)
        builder.finish(name, module)
        found[name] = _EngineParts(place, {**settings, "ema": changed["ema"]}, module, changes)
    return found


def _make_model(plain: dict[str, Any], key: str, node: Any) -> nn.Module:
    module = _make(plain, key, node)
    if not isinstance(module, nn.Module):
        raise ConfigError(f"{key}: expected a torch.nn.Module, got {type(module).__name__}")
    _explained(key, partial(_check_sized, module))
    return module


def _check_sized(module: nn.Module) -> None:
    """Checks that parameters and buffers have a shape: all that is made of them is made before the first forward.

    Raises:
        ValueError: naming those that have none.
    """
    tensors = dict(module.named_parameters()) | dict(module.named_buffers())
    if lazy := [name for name, tensor in tensors.items() if is_lazy(tensor)]:
        remedy = "give the sizes, or call the module on a sample batch at the end of its __init__"
        raise ValueError(f"{shorten(lazy)} get their shape in the first forward, and are needed before it; {remedy}")


def _make_engines(
    plain: dict[str, Any], parts: dict[str, _EngineParts], coordinator: Coordinator | None, *, is_trained: bool = True
) -> Engines:
    """Returns engines of their parts, spread over the ranks that have a coordinator."""
    trainer, strategy_node = plain["trainer"], plain["distributed"]["strategy"]
    trained = [name for name, part in parts.items() if part.is_trained and is_trained]
    if is_trained and not trained:
        raise ConfigError(
            "optimizer: nothing is left to train; all parameters are frozen, or no engine has an optimizer"
        )
    engines = Engines()
    avoid_dynamo_import()
    for name, part in parts.items():
        place, settings, module = part.place, part.settings, part.module
        strategy = (
            _make(plain, "distributed.strategy", strategy_node) if coordinator and is_distributed() else Strategy()
        )
        if coordinator:
            strategy.join(coordinator, name, name == trained[-1])
        _explained("distributed.strategy", partial(strategy.shard, module))
        named = [(key, p) for key, p in module.named_parameters() if p.requires_grad]
        optimizer, scheduler, metric = None, None, None
        if name in trained:
            optimizer = _make_optimizer(plain, place + "optimizer", settings["optimizer"], named)
            step_without_dynamo(optimizer)
            _explained(place + "optimizer", partial(strategy.check_optimizer, optimizer))
            metric = _metric_of(settings["scheduler"])
            scheduler = _make_scheduler(plain, place + "scheduler", settings["scheduler"], optimizer)
            _check_steps(plain, place, optimizer, scheduler, metric, is_run=coordinator is not None)
            _explained(
                place + "optimizer", partial(check_sparse, module, optimizer, strategy.is_sharded and is_distributed())
            )
        engines[name] = Engine(
            module,
            optimizer,
            scheduler,
            precision=trainer["precision"],
            accumulate=trainer["accumulate"],
            clip_norm=trainer["clip_norm"],
            on_nonfinite=trainer["on_nonfinite"],
            feeder=_make(plain, place + "feeder", settings["feeder"]),
            strategy=strategy,
            ema=_make_averages(part, optimizer),
            applied=part.applied,
            metric=metric,
        )
    return engines


def _make_optimizer(plain: dict[str, Any], key: str, node: Any, named: list[tuple[str, nn.Parameter]]) -> Any:
    """Returns an optimizer of all parameters.

    It is given (name, parameter) pairs, as torch's take them, and parameters alone where it does not: it fails, or it
    keeps the pairs beside its groups.
    """
    forms: list[tuple[str, list[Any]]] = [("(name, parameter) pairs", named), ("parameters", [p for _, p in named])]
    failures: list[ConfigError] = []
    told: list[str] = []
    for what, form in forms:
        try:
            optimizer = _make(plain, key, node, list(form))
            _explained(key, partial(check_covers_parameters, optimizer, named))
            if form is named and _keeps_pairs(optimizer):
                continue
            return optimizer
        except ConfigError as error:
            failures.append(error)
            told.append(f"{error}, given {what}")
    is_same = len(set(map(str, failures))) == 1
    raise failures[0] if is_same else ConfigError("\n".join(told))


def _keeps_pairs(optimizer: Any) -> bool:
    """Says whether an attribute of an optimizer is a list with (name, parameter) pairs: it expected parameters."""
    for value in vars(optimizer).values():
        if isinstance(value, (list, tuple)) and any(isinstance(each, tuple) and _is_pair(each) for each in value):
            return True
    return False


def _is_pair(item: tuple[Any, ...]) -> bool:
    return len(item) == 2 and isinstance(item[0], str) and isinstance(item[1], nn.Parameter)


def _make_scheduler(plain: dict[str, Any], key: str, node: Any, optimizer: Any) -> Any:
    """Returns a scheduler of an optimizer, which those that it is made of, under `schedulers`, are given as well."""
    if node is None:
        return None
    given: dict[str, Any] = {}
    for name, parts in node.items():
        if name == "schedulers" and isinstance(parts, list):
            given[name] = [_make_scheduler(plain, f"{key}.{name}.{i}", part, optimizer) for i, part in enumerate(parts)]
    is_ours = {"metric"} - {*find_parameters(node["_target_"])}
    settings = {name: value for name, value in node.items() if name not in given and name not in is_ours}
    make = _make(plain, key, settings | {"_partial_": True})
    if "optimizer" in find_parameters(node["_target_"]):
        return _explained(key, partial(make, optimizer=optimizer, **given))
    return _explained(key, partial(make, optimizer, **given))


def _metric_of(node: Any) -> str | None:
    """Returns the metric that a scheduler's settings name; null for one that has an argument of this name."""
    metric = None if node is None else node.get("metric")
    return None if metric is None or "metric" in find_parameters(node["_target_"]) else str(metric)


def _check_steps(
    plain: dict[str, Any], place: str, optimizer: Any, scheduler: Any, metric: str | None, *, is_run: bool
) -> None:
    """Checks that an optimizer and its scheduler can be stepped, before the first step is made.

    Raises:
        ConfigError: a step needs more than it is given, or the rates fall under an optimizer that averages instead.
    """
    _explained(place + "optimizer", partial(check_optimizer_step, optimizer))
    _explained(place + "scheduler", partial(check_scheduler_step, scheduler, metric))
    if is_run and metric is not None and (plain["data"]["eval"] is None or not plain["trainer"]["eval_every"]):
        key = "data.eval" if plain["data"]["eval"] is None else "trainer.eval_every"
        found = f"expected evaluations that measure it, found none; set {key}, or choose another schedule"
        raise ConfigError(f"{place}scheduler.metric={metric}: {found}")
    if not is_run or not hasattr(optimizer, "eval"):
        return
    fall = find_fall(scheduler, plain["trainer"]["steps"])
    if fall is not None:
        found = f"{type(scheduler).__name__}, whose rate has fallen by step {fall + 1}"
        expected = f"expected a rate that doesn't fall, as {type(optimizer).__name__} averages the weights instead"
        raise ConfigError(f"{place}scheduler: {expected}; found {found}; set scheduler=constant")


def _make_averages(part: _EngineParts, optimizer: Any) -> EMA | None:
    ema = part.settings["ema"]
    if not optimizer or not ema["decay"]:
        return None
    if hasattr(optimizer, "eval"):
        kind = type(optimizer).__name__
        raise ConfigError(f"{part.place}optimizations.ema: {kind} evaluates an average of its own; set ema.decay=0")
    part.applied.rows.append(("ema", f"decay {ema['decay']}: evaluations and exports use the averages"))
    return EMA(part.module, ema["decay"], warmup=ema["warmup"])


def _build_batches(plain: dict[str, Any], device: torch.device) -> Batches:
    data = plain["data"]
    dataset = _make_dataset(plain, "data.train", data["train"])
    target, parts = locate(plain["sampler"]["_target_"]), plain["trainer"]["accumulate"]
    is_batched = "lengths" in inspect.signature(target).parameters
    if is_batched and parts > 1:
        remedy = "give it a smaller sampler.max_size or max_cost, and trainer.accumulate=1"
        raise ConfigError(f"trainer.accumulate={parts}: each batch of {target.__name__} is a step of its own; {remedy}")
    if not is_batched and data["batch_size"] // parts < world_size():
        found = f"data.batch_size={data['batch_size']} with trainer.accumulate={parts}"
        raise ConfigError(
            f"{found}: {world_size()} ranks share {data['batch_size'] // parts}; expected one each or more"
        )
    if not is_batched and data["batch_size"] > _MOST_PASSES * len(dataset):
        expected = f"expected at most {_MOST_PASSES} passes over the {len(dataset)} samples of data.train in a step"
        raise ConfigError(f"data.batch_size={data['batch_size']}: {expected}")
    what = _lengths(dataset) if is_batched else len(dataset)
    sampler = _make(plain, "sampler", plain["sampler"], what)
    _check_sampler(sampler)
    return Batches(
        dataset,
        sampler,
        None if is_batched else data["batch_size"] // parts,
        seed=plain["seed"],
        num_workers=data["num_workers"],
        collate=_make(plain, "data.collate", data["collate"]),
        pin_memory=device.type == "cuda",
        seed_samples=data["seed_samples"],
        rank=rank(),
        num_ranks=world_size(),
    )


def _check_sampler(sampler: Any) -> None:
    """Raises a ConfigError for a sampler that does not go on from its own state."""
    if fault := find_sampler_fault(sampler):
        raise ConfigError(f"sampler: {type(sampler).__name__}: {fault}")
    state = sampler.state_dict()
    if not isinstance(state, Mapping):
        raise ConfigError(f"sampler: {type(sampler).__name__}.state_dict: expected a mapping, found {state!r}")
    _explained("sampler", partial(sampler.load_state_dict, copy.deepcopy(dict(state))))


def _lengths(dataset: Any) -> Any:
    """Returns the dataset's own `lengths`, or one each: then the budget counts samples."""
    lengths = getattr(dataset, "lengths", None)
    return torch.ones(len(dataset), dtype=torch.int64) if lengths is None else lengths


def build_evaluation(plain: dict[str, Any]) -> EvaluationData | None:
    """Returns what a resolved config evaluates on, or None where it has no dataset for that.

    Raises:
        ConfigError: naming the key whose target refused its arguments.
    """
    data, seed = plain["data"], plain["seed"]
    if data["eval"] is None:
        return None
    collate = _make(plain, "data.collate", data["collate"])
    dataset = _make_dataset(plain, "data.eval", data["eval"])
    sample_seed = derive_seed(seed, -1) if data["seed_samples"] else None
    size, workers = data["batch_size"], data["num_workers"]
    return EvaluationData(dataset, size, workers, collate, sample_seed, rank(), world_size())


def find_unseeded(plain: dict[str, Any], batches: Batches | None, evaluation: EvaluationData | None) -> list[str]:
    """Returns warnings of generators that data holds and that are not reseeded for each sample."""
    roots: dict[str, Any] = {}
    if batches is not None:
        roots |= {"data.train": batches.dataset, "data.collate": batches.collate}
    if evaluation is not None:
        roots |= {"data.eval": evaluation.dataset, "data.collate": evaluation.collate}
    held = HeldGenerators(**roots)
    if plain["data"]["seed_samples"]:
        effect = "its numbers depend on loader workers and on where the run is cut"
        remedy = "draw from torch, NumPy, random or a generator of theirs"
        return [f"{path}: expected a generator that a seed decides; {effect}; {remedy}" for path in held.unseeded]
    effect = "each loader worker and each resume starts a generator of the dataset's own anew"
    remedy = "set data.seed_samples=true to reseed it for each sample"
    return [f"{path}: {effect}; {remedy}" for path in [*held.paths, *held.unseeded]]


def build_report(plain: dict[str, Any]) -> Report | None:
    """Returns what shows more of an evaluation than its means, or None."""
    report: Report | None = _make(plain, "report", plain["report"])
    return report


def _make(plain: dict[str, Any], key: str, node: Any, *given: Any) -> Any:
    """Instantiates what stands at a key, every global generator seeded for it."""
    if node is None:
        return None
    later = {"_partial_": True} if is_called_later(key, locate(node["_target_"])) else {}
    _seed(plain["seed"], key)
    return _explained(key, lambda: _instantiate(node | later, *given), node)


def _instantiate(node: Any, *given: Any) -> Any:
    """Builds what a resolved node describes, as Hydra does.

    Hydra's `instantiate` would resolve the node's texts again, so it is given the target alone.
    """
    if isinstance(node, list):
        return [_instantiate(child) for child in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {key: _instantiate(value) for key, value in node.items()}
    arguments = {key: value for key, value in node.items() if key not in _OF_HYDRA}
    if node.get("_recursive_", True):
        arguments = {key: _instantiate(value) for key, value in arguments.items()}
    positional = given or arguments.pop("_args_", ())
    target = instantiate({"_target_": node["_target_"], "_partial_": True})
    if node.get("_partial_"):
        return partial(target, *positional, **arguments)
    return target(*positional, **arguments)


def _seed(seed: int, key: str) -> None:
    """Seeds every global generator from the run's seed and a key, alike on every rank.

    An object that is added or left out does not change what the others draw. `model` takes the run's seed as it is.
    """
    if key != "model":
        seed = derive_seed(seed, _SEEDED_AS.get(key) or zlib.crc32(key.encode()))
    torch.manual_seed(seed)  # of every device
    seed_imports(seed)


_SEEDED_AS = {"data.train": -2, "data.eval": -3}


def _make_dataset(plain: dict[str, Any], key: str, node: Any) -> Any:
    dataset = _make(plain, key, node)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        found = type(dataset).__name__
        raise ConfigError(
            f"{key}: expected a dataset with __len__ and __getitem__, for a position in it; found {found}"
        )
    if not _explained(key, lambda: len(dataset), node):
        raise ConfigError(f"{key}: the dataset is empty")
    return dataset


def _explained(key: str, make: Callable[[], Any], node: Mapping[str, Any] | None = None) -> Any:
    try:
        return make()
    except (Exception, SystemExit) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        is_said = isinstance(cause, (ValueError, TypeError, ImportError, OSError))
        hint = _hint_at_numbers(node) if isinstance(cause, (TypeError, ValueError)) else ""
        remedy = f"; {describe_limit()}" if is_out_of_files(cause) else ""
        raise ConfigError(f"{key}: {cause if is_said else repr(cause)}{hint}{remedy}") from error


def _hint_at_numbers(node: Mapping[str, Any] | None) -> str:
    """Returns the remedy where an argument is a text that reads as a number, as one from the environment does."""
    texts = {name: value for name, value in (node or {}).items() if is_number_text(value)}
    shown = ", ".join(f"{name}={value!r}" for name, value in texts.items())
    remedy = f"; {shown}: a text; ${{oc.decode:...}} makes it a number" if texts else ""
    return remedy + (find_untyped(node) if node else "")
