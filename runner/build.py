"""The only caller of `instantiate`: config in, plain objects out.

`check_targets` looks at every `_target_` first, and reports all mistakes at once, before anything is built.
"""

from __future__ import annotations

import importlib
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

from runner.config import ConfigError, TrackingConfig, TrainerConfig, nearest, to_plain
from runner.engines import Engine, Engines, freeze
from runner.utils.batches import Batches, Samples, ignore_interrupts
from runner.utils.distributed import pick_device
from runner.utils.utils import mix

# How many arguments each role's target is given by position, beside its YAML.
_ROLES = {
    "model": 0,
    "data.train": 0,
    "data.eval": 0,
    "data.collate": 0,
    "sampler": 1,
    "optimizer": 1,
    "scheduler": 1,
    "feeder": 0,
    "report": 0,
}
_CALLED_LATER = ("data.collate", "feeder", "report")  # a plain function here is what is called, not what makes it
_EXTRAS = {
    "schedulefree": "schedulefree",
    "prodigyopt": "prodigy",
    "bitsandbytes": "adamw8bit",
    "sklearn": "digits",
    "matplotlib": "digits",
}


@dataclass
class Experiment:
    """One experiment as plain objects."""

    name: str
    seed: int
    engines: Engines
    batches: Batches
    evaluation: EvaluationData | None
    report: Callable[[nn.Module, Any], Mapping[str, Any]] | None
    trainer: TrainerConfig
    tracking: TrackingConfig
    settings: dict[str, Any]


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
    try:
        device = pick_device(cfg.distributed.device)
    except ValueError as error:
        raise ConfigError(f"distributed.{error}") from error
    data, trainer = plain["data"], OmegaConf.to_object(cfg.trainer)
    assert isinstance(trainer, TrainerConfig)
    tracking = OmegaConf.to_object(cfg.tracking)
    assert isinstance(tracking, TrackingConfig)
    torch.manual_seed(cfg.seed)  # of the initial weights
    return Experiment(
        name=cfg.name,
        seed=cfg.seed,
        engines=_build_engines(plain, trainer, device),
        batches=_build_batches(plain, trainer, device),
        evaluation=_build_evaluation(data, cfg.seed),
        report=_make("report", plain["report"]),
        trainer=trainer,
        tracking=tracking,
        settings=plain,
    )


def _build_engines(plain: dict[str, Any], trainer: TrainerConfig, device: torch.device) -> Engines:
    """Returns the engines in the config's order; one named `model` where there is no `engines`."""
    shared = {key: plain[key] for key in ("model", "optimizer", "scheduler", "feeder")}
    shared["freeze"] = plain["optimizations"]["freeze"]
    engines = Engines()
    for name, own in (plain["engines"] or {"model": {}}).items():
        place = f"engines.{name}." if plain["engines"] else ""
        parts = shared | {key: value for key, value in own.items() if value is not None}
        module = _make(place + "model", parts["model"])
        if not isinstance(module, nn.Module):
            raise ConfigError(f"{place}model: expected a torch.nn.Module, got {type(module).__name__}")
        module = module.to(device)
        _explained(place + "optimizations", partial(freeze, module, parts["freeze"]))
        trained = [(key, p) for key, p in module.named_parameters() if p.requires_grad]
        optimizer = _make(place + "optimizer", parts["optimizer"], trained) if trained else None
        scheduler = _make(place + "scheduler", parts["scheduler"], optimizer) if optimizer else None
        engines[name] = Engine(
            module,
            optimizer,
            scheduler,
            precision=trainer.precision.name,
            accumulate=trainer.accumulate,
            clip_norm=trainer.clip_norm,
            feeder=_make(place + "feeder", parts["feeder"]),
        )
    return engines


def _build_batches(plain: dict[str, Any], trainer: TrainerConfig, device: torch.device) -> Batches:
    data = plain["data"]
    dataset = _make("data.train", data["train"])
    target = _locate(plain["sampler"]["_target_"])
    is_batched = "lengths" in inspect.signature(target).parameters
    what = _lengths(dataset) if is_batched else len(dataset)
    sampler = _make("sampler", plain["sampler"], what)
    return Batches(
        dataset,
        sampler,
        None if is_batched else data["batch_size"] // trainer.accumulate,
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


def _build_evaluation(data: dict[str, Any], seed: int) -> EvaluationData | None:
    if data["eval"] is None:
        return None
    collate = _make("data.collate", data["collate"])
    dataset = _make("data.eval", data["eval"])
    sample_seed = mix(seed, -1) if data["seed_samples"] else None
    return EvaluationData(dataset, data["batch_size"], data["num_workers"], collate, sample_seed)


def _make(key: str, node: Any, *given: Any) -> Any:
    if node is None:
        return None
    later = {"_partial_": True} if _is_called_later(key, _locate(node["_target_"])) else {}
    return _explained(key, lambda: instantiate(node | later, *given, _convert_="all"))


def _is_called_later(key: str, target: Any) -> bool:
    return key.endswith(_CALLED_LATER) and inspect.isfunction(target)


def _explained(key: str, make: Callable[[], Any]) -> Any:
    try:
        return make()
    except Exception as error:
        cause = error.__cause__ or error
        if isinstance(cause, (ValueError, TypeError, ImportError, OSError)):
            raise ConfigError(f"{key}: {cause}") from error
        raise


def check_targets(cfg: DictConfig) -> None:
    """Checks that each `_target_` can be imported and takes the arguments it is given.

    Raises:
        ConfigError: with every mistake, a line each.
    """
    mistakes = [m for key, node, num_given in _targets(to_plain(cfg)) for m in _mistakes(key, node, num_given)]
    if mistakes:
        raise ConfigError("\n".join(mistakes))


def _targets(plain: dict[str, Any]) -> Iterator[tuple[str, Any, int]]:
    """Yields key, node and number of positional arguments of all that will be instantiated."""
    roles = [(role, role, plain) for role in _ROLES]
    for name, engine in plain["engines"].items():
        roles += [(f"engines.{name}.{role}", role, engine) for role in _ROLES if engine.get(role) is not None]
    for key, role, place in roles:
        node: Any = place
        for part in role.split("."):
            node = node[part]
        if node is not None:
            yield key, node, _ROLES[role]
            yield from ((k, n, 0) for k, n in _nested_targets(node, key))


def _nested_targets(node: Any, key: str) -> Iterator[tuple[str, dict[str, Any]]]:
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        if isinstance(child, dict) and "_target_" in child:
            yield f"{key}.{name}", child
        yield from _nested_targets(child, f"{key}.{name}")


def _mistakes(key: str, node: Any, num_given: int) -> Iterator[str]:
    if not isinstance(node, dict) or not isinstance(node.get("_target_"), str):
        yield f"{key}: expected a mapping with _target_, the dotted path of a class or function; found {node!r}"
        return
    try:
        target = _locate(node["_target_"])
    except ImportError as error:
        yield f"{key}._target_={node['_target_']}: {error}"
        return
    try:
        parameters = inspect.signature(target).parameters
    except (TypeError, ValueError):  # a built-in without a signature: instantiating it will tell
        return
    given = {name for name in node if not (name.startswith("_") and name.endswith("_"))}
    taken = [n for n, p in parameters.items() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)][num_given:]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        for name in sorted(given.difference(taken)):
            yield f"{key}.{name}: {node['_target_']} takes no such argument; {nearest(name, taken)}"
    if node.get("_partial_") or node.get("_args_") or _is_called_later(key, target):
        return
    for name in taken:
        if parameters[name].default is inspect.Parameter.empty and name not in given:
            yield f"{key}.{name}: {node['_target_']} needs it; set +{key}.{name}=..."


def _locate(path: str) -> Any:
    """Returns the object of a dotted path.

    Raises:
        ImportError: saying which part is not there, and what is.
    """
    parts = path.split(".")
    for length in range(len(parts), 0, -1):
        name = ".".join(parts[:length])
        try:
            found = importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
                raise ImportError(f"importing {name} failed: {error}{_extra(error.name)}") from error
            continue
        return _descend(found, name, parts[length:])
    raise ImportError(
        f"there is no module {parts[0]!r}{_extra(parts[0])}; check the spelling, or start where Python finds it"
    )


def _descend(found: Any, name: str, attributes: list[str]) -> Any:
    for attribute in attributes:
        if not hasattr(found, attribute):
            public = [key for key in vars(found) if not key.startswith("_")] if hasattr(found, "__dict__") else []
            raise ImportError(f"{name} has no {attribute!r}; {nearest(attribute, public)}")
        found, name = getattr(found, attribute), f"{name}.{attribute}"
    if not callable(found):
        raise ImportError(f"{name} is a {type(found).__name__}; expected a class or function")
    return found


def _extra(module: str | None) -> str:
    extra = _EXTRAS.get((module or "").partition(".")[0])
    return f'; pip install "runner[{extra}]"' if extra else ""
