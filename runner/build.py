"""The only caller of `instantiate`: config in, plain objects out."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from hydra.utils import instantiate
from omegaconf import DictConfig, OmegaConf
from torch import nn
from torch.utils.data import DataLoader, Dataset, default_collate

from runner.config import CheckpointConfig, TrackingConfig, TrainerConfig, to_plain
from runner.engines import Engine, Engines
from runner.engines.eager import defer_compiler, step_eagerly
from runner.mistakes import ConfigError
from runner.targets import is_called_later, locate
from runner.utils.batches import Batches, Samples, ignore_interrupts
from runner.utils.distributed import pick_device
from runner.utils.utils import mix
from runner.utils.wrapper import freeze

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
class EvaluationData:
    """One ordered pass over a dataset, the same each time: iterates pairs of a batch and the number of its samples."""

    dataset: Dataset[Any]
    batch_size: int
    num_workers: int
    collate: Callable[[list[Any]], Any] | None
    seed: int | None

    def __iter__(self) -> Iterator[tuple[Any, int]]:
        length = len(self.dataset)  # type: ignore[arg-type]
        draws = [
            (first, [*range(first, min(first + self.batch_size, length))])
            for first in range(0, length, self.batch_size)
        ]
        loader: DataLoader[Any] = DataLoader(
            Samples(self.dataset, self.seed),
            batch_size=None,
            sampler=draws,
            num_workers=self.num_workers,
            collate_fn=self.collate or default_collate,
            generator=torch.Generator(),  # else it draws from the global one
            worker_init_fn=ignore_interrupts,
        )
        for batch, (_, indices) in zip(loader, draws, strict=True):
            yield batch, len(indices)


def build(cfg: DictConfig) -> Experiment:
    """Builds an experiment.

    Raises:
        ConfigError: naming the key whose target refused its arguments.
    """
    plain = to_plain(cfg)
    device = build_device(plain)
    trainer, tracking = OmegaConf.to_object(cfg.trainer), OmegaConf.to_object(cfg.tracking)
    assert isinstance(trainer, TrainerConfig)
    checkpoint = OmegaConf.to_object(cfg.checkpoint)
    assert isinstance(tracking, TrackingConfig)
    assert isinstance(checkpoint, CheckpointConfig)
    return Experiment(
        name=cfg.name,
        seed=cfg.seed,
        engines=build_engines(plain, device),
        batches=_build_batches(plain, device),
        evaluation=build_evaluation(plain),
        report=build_report(plain),
        trainer=trainer,
        checkpoint=checkpoint,
        tracking=tracking,
        settings=plain,
    )


def build_device(plain: dict[str, Any]) -> torch.device:
    """Returns the device of a resolved config.

    Raises:
        ConfigError: this machine has no such device.
    """
    try:
        return pick_device(plain["distributed"]["device"])
    except ValueError as error:
        raise ConfigError(f"distributed.{error}") from error


def build_engines(plain: dict[str, Any], device: torch.device, *, is_trained: bool = True) -> Engines:
    """Returns the engines of a resolved config in its order; one named `model` where there is no `engines`.

    Args:
        is_trained: False leaves out what only training needs: optimizers and schedulers.
    Raises:
        ConfigError: naming the key whose target refused its arguments.
    """
    trainer = plain["trainer"]
    torch.manual_seed(plain["seed"])  # of the initial weights
    shared = {key: plain[key] for key in ("model", "optimizer", "scheduler", "feeder")}
    shared["freeze"] = plain["optimizations"]["freeze"]
    engines = Engines()
    defer_compiler()
    for name, own in (plain["engines"] or {"model": {}}).items():
        place = f"engines.{name}." if plain["engines"] else ""
        parts = shared | own
        module = _make(place + "model", parts["model"])
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{place}model: expected a torch.nn.Module, got {type(module).__name__}")
        module = module.to(device)
        _explained(place + "optimizations", partial(freeze, module, parts["freeze"]))
        trained = [(key, p) for key, p in module.named_parameters() if p.requires_grad]
        optimizer = _make(place + "optimizer", parts["optimizer"], trained) if trained and is_trained else None
        step_eagerly(optimizer)
        scheduler = _make(place + "scheduler", parts["scheduler"], optimizer) if optimizer else None
        engines[name] = Engine(
            module,
            optimizer,
            scheduler,
            precision=trainer["precision"],
            accumulate=trainer["accumulate"],
            clip_norm=trainer["clip_norm"],
            on_nonfinite=trainer["on_nonfinite"],
            feeder=_make(place + "feeder", parts["feeder"]),
        )
    if is_trained and not any(engine.optimizer for engine in engines.values()):
        raise ConfigError(
            "optimizer: nothing is left to train; all parameters are frozen, or no engine has an optimizer"
        )
    return engines


def _build_batches(plain: dict[str, Any], device: torch.device) -> Batches:
    data = plain["data"]
    torch.manual_seed(mix(plain["seed"], -2))  # of a dataset that draws when it is made, whatever was built before
    dataset = _make_dataset("data.train", data["train"])
    target, parts = locate(plain["sampler"]["_target_"]), plain["trainer"]["accumulate"]
    is_batched = "lengths" in inspect.signature(target).parameters
    if is_batched and parts > 1:
        remedy = "give it a smaller sampler.max_size or max_cost, and trainer.accumulate=1"
        raise ConfigError(f"trainer.accumulate={parts}: each batch of {target.__name__} is a step of its own; {remedy}")
    what = _lengths(dataset) if is_batched else len(dataset)
    sampler = _make("sampler", plain["sampler"], what)
    return Batches(
        dataset,
        sampler,
        None if is_batched else data["batch_size"] // parts,
        seed=plain["seed"],
        num_workers=data["num_workers"],
        collate=_make("data.collate", data["collate"]),
        pin_memory=device.type == "cuda",
        seed_samples=data["seed_samples"],
    )


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
    torch.manual_seed(mix(seed, -3))
    collate = _make("data.collate", data["collate"])
    dataset = _make_dataset("data.eval", data["eval"])
    sample_seed = mix(seed, -1) if data["seed_samples"] else None
    return EvaluationData(dataset, data["batch_size"], data["num_workers"], collate, sample_seed)


def build_report(plain: dict[str, Any]) -> Report | None:
    """Returns what shows more of an evaluation than its means, or None."""
    report: Report | None = _make("report", plain["report"])
    return report


def _make(key: str, node: Any, *given: Any) -> Any:
    if node is None:
        return None
    later = {"_partial_": True} if is_called_later(key, locate(node["_target_"])) else {}
    return _explained(key, lambda: instantiate(node | later, *given, _convert_="all"))


def _make_dataset(key: str, node: Any) -> Any:
    dataset = _make(key, node)
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        found = type(dataset).__name__
        raise ConfigError(
            f"{key}: expected a dataset with __len__ and __getitem__, for a position in it; found {found}"
        )
    if not len(dataset):
        raise ConfigError(f"{key}: the dataset is empty")
    return dataset


def _explained(key: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        cause = error.__cause__ or error
        is_said = isinstance(cause, (ValueError, TypeError, ImportError, OSError))
        raise ConfigError(f"{key}: {cause if is_said else repr(cause)}") from error
