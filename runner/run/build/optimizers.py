"""Builds an engine's optimizer and scheduler, and checks that they can be stepped."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

from torch import nn

from runner.config.errors import ConfigError
from runner.config.spec import EngineSpec, ExperimentSpec
from runner.config.targets import parameter_names, split_optimizer_node
from runner.engines.optim.hyperparameters import check_covers_parameters
from runner.engines.optim.parameter_groups import ParameterGroup, check_groups, group_parameters, scale_rates
from runner.engines.optim.schedule_replay import check_optimizer_step, check_scheduler_step, find_lr_decrease
from runner.run.build.instantiate import explain_errors, make_object


def make_optimizer(seed: int, engine: EngineSpec, module: nn.Module) -> Any:
    """Returns an optimizer of all trained parameters, in the groups of its node.

    It gets (name, parameter) pairs, as torch's optimizers take them, or groups of these. If it fails, or keeps the
    pairs beside its groups, it is built again with the parameters alone.
    """
    key = f"{engine.prefix}optimizer"
    assert engine.optimizer is not None
    node, reserved = split_optimizer_node(engine.optimizer)
    groups = _make_groups(key, module, reserved)
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    failures: dict[str, ConfigError] = {}
    for description, has_names in (("(name, parameter) pairs", True), ("parameters", False)):
        form = _as_groups(groups, has_names) if groups else named if has_names else [p for _, p in named]
        try:
            optimizer = make_object(seed, key, node, list(form))
            explain_errors(key, partial(check_covers_parameters, optimizer, named))
        except ConfigError as error:
            failures[f"{error}, given {'groups of ' if groups else ''}{description}"] = error
            continue
        if not has_names or not _keeps_pairs(optimizer):
            _call_with_key(key, partial(check_groups, optimizer, groups))
            _call_with_key(key, partial(scale_rates, optimizer, groups))
            return optimizer
    is_same = len(set(map(str, failures.values()))) == 1 and not groups
    raise next(iter(failures.values())) if is_same else ConfigError("\n".join(failures))


def _make_groups(key: str, module: nn.Module, reserved: Mapping[str, Any]) -> list[ParameterGroup]:
    """Returns the groups that a node sets; none if it sets none."""
    entries, layer_decay = reserved.get("groups") or [], reserved.get("layer_decay")
    if not entries and layer_decay is None:
        return []
    return list(_call_with_key(key, partial(group_parameters, module, entries, layer_decay)))


def _as_groups(groups: Sequence[ParameterGroup], has_names: bool) -> list[dict[str, Any]]:
    """Returns groups as torch's optimizers take them: new ones, because an optimizer keeps and changes them."""
    made = []
    for group in groups:
        parameters: list[Any] = list(group.named) if has_names else [parameter for _, parameter in group.named]
        made.append({"params": parameters, **group.settings})
    return made


def _call_with_key(key: str, make: Callable[[], Any]) -> Any:
    """Calls `make`, whose error begins with a key of the node at `key`."""
    try:
        return make()
    except ValueError as error:
        raise ConfigError(f"{key}.{error}") from error


def _keeps_pairs(optimizer: Any) -> bool:
    """Returns whether an attribute of an optimizer is a list of (name, parameter) pairs: it expected parameters."""
    lists = [value for value in vars(optimizer).values() if isinstance(value, (list, tuple))]
    pairs = [item for item in itertools.chain(*lists) if isinstance(item, tuple) and len(item) == 2]
    return any(isinstance(name, str) and isinstance(parameter, nn.Parameter) for name, parameter in pairs)


def make_scheduler(seed: int, key: str, node: Any, optimizer: Any) -> Any:
    """Returns a scheduler of an optimizer, which also goes to the schedulers that the node lists as `schedulers`."""
    if node is None:
        return None
    parameters = parameter_names(node["_target_"])
    built: dict[str, Any] = {}
    if isinstance(node.get("schedulers"), list):
        nested = enumerate(node["schedulers"])
        built["schedulers"] = [make_scheduler(seed, f"{key}.schedulers.{i}", child, optimizer) for i, child in nested]
    left_out = {*built, *({"metric"} - {*parameters})}  # the engine reads `metric`, unless the scheduler takes it
    settings = {name: value for name, value in node.items() if name not in left_out}
    make = make_object(seed, key, settings | {"_partial_": True})
    make = partial(make, optimizer=optimizer) if "optimizer" in parameters else partial(make, optimizer)
    return explain_errors(key, partial(make, **built))


def metric_of(node: Any) -> str | None:
    """Returns the `metric` of a scheduler's node; None if the scheduler has an argument of this name."""
    metric = None if node is None else node.get("metric")
    return None if metric is None or "metric" in parameter_names(node["_target_"]) else str(metric)


def check_steps(
    spec: ExperimentSpec, engine: EngineSpec, optimizer: Any, scheduler: Any, metric: str | None, *, is_run: bool
) -> None:
    """Checks that an optimizer and its scheduler can be stepped, before the first step.

    Raises:
        ConfigError: a step needs an argument or metric that it won't get, or the learning rates fall though the
            optimizer averages the weights instead.
    """
    explain_errors(f"{engine.prefix}optimizer", partial(check_optimizer_step, optimizer))
    explain_errors(f"{engine.prefix}scheduler", partial(check_scheduler_step, scheduler, metric))
    if is_run and metric is not None and (not spec.eval_datasets or not spec.trainer.eval_every):
        key = "trainer.eval_every" if spec.eval_datasets else "data.eval"
        found = f"expected evaluations that measure it, found none; set {key}, or choose another schedule"
        raise ConfigError(f"{engine.prefix}scheduler.metric={metric}: {found}")
    is_averaging = is_run and hasattr(optimizer, "eval")
    if is_averaging and (fall := find_lr_decrease(scheduler, spec.trainer.steps)) is not None:
        found = f"{type(scheduler).__name__}, whose rate has fallen by step {fall + 1}"
        expected = f"expected a rate that doesn't fall, as {type(optimizer).__name__} averages the weights instead"
        raise ConfigError(f"{engine.prefix}scheduler: {expected}; found {found}; set scheduler=constant")
