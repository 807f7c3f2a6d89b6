"""Parameter groups of an optimizer: settings for parameters by name, and learning rates that decay with depth."""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeGuard

from torch import Tensor, nn
from torch.optim import Optimizer

from runner.engines.optim.hyperparameters import base_lrs
from runner.engines.optim.optimizer_state import chained_optimizers, names_by_id
from runner.utils.modules.selection import match_parameters
from runner.utils.utils import format_number, list_nearest, suggest
from runner.utils.wrapper.protocol import shorten

# Libraries whose optimizers refuse different learning rates in their first step, or use one of them for all groups.
_ONE_RATE = ("prodigyopt",)
_NOT_NEGATIVE = ("lr", "lr_scale", "weight_decay")
_NOT_SHOWN = {"params", "param_names", "lr", "initial_lr", "weight_decay"}
_NO_GROUPS = "expected an optimizer that keeps the groups it is given"


@dataclass
class ParameterGroup:
    """Parameters with the same settings.

    Attributes:
        settings: those that differ from the optimizer's own, such as weight_decay, or lr for a rate of their own.
        keys: for each setting the config key that sets it.
        lr_scale: factor on the optimizer's learning rate.
    """

    settings: dict[str, Any]
    keys: dict[str, str]
    lr_scale: float
    named: list[tuple[str, Tensor]] = field(default_factory=list)

    @property
    def has_base_lr(self) -> bool:
        return self.lr_scale == 1 and "lr" not in self.settings


def group_parameters(
    module: nn.Module, entries: Sequence[Mapping[str, Any]], layer_decay: Mapping[str, Any] | None
) -> list[ParameterGroup]:
    """Returns the trained parameters of a module in groups.

    Parameters that the same entries match, in the same layer, are one group, whatever the values are: a run whose
    values are changed resumes with the same groups. Groups with the optimizer's own rate are first, because commands
    and metrics name the rate of the first group `lr`.

    Args:
        entries: mappings with `match`, one or several globs over whole parameter names, and settings. Of several that
            match a parameter, the later ones win. `lr_scale` multiplies the optimizer's rate, `lr` replaces it.
        layer_decay: `rate`, and `layers`: a glob such as `blocks.*`, segment by segment. The rate of the last layer is
            multiplied by `rate`, that of the layer below by its square, and so on; see `_find_depths`.
    Raises:
        ValueError: with the key and the value that is wrong.
    """
    names = names_by_id(module)
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    trained_ids = {id(parameter) for _, parameter in trained}
    matches = [_match_entry(f"groups.{i}", entry, names, trained_ids) for i, entry in enumerate(_as_list(entries))]
    depths, rate = _find_depths(names, layer_decay) if layer_decay is not None else ({}, 1.0)
    groups: dict[tuple[int, tuple[int, ...]], ParameterGroup] = {}
    for name, parameter in trained:
        depth = depths.get(id(parameter), 0)
        indices = tuple(index for index, matched_ids in enumerate(matches) if id(parameter) in matched_ids)
        if (depth, indices) not in groups:
            groups[depth, indices] = _merge_settings(entries, indices, rate**depth)
        groups[depth, indices].named.append((name, parameter))
    ordered = sorted(groups.items(), key=lambda item: (not item[1].has_base_lr, item[0]))
    return [group for _, group in ordered]


def _as_list(entries: Any) -> Sequence[Any]:
    if not isinstance(entries, (list, tuple)):
        example = '[{match: ["*.bias"], weight_decay: 0}]'
        raise ValueError(f"groups={entries}: expected a list of mappings; write {example}")
    return entries


def _match_entry(key: str, entry: Any, names: Mapping[int, Sequence[str]], trained_ids: set[int]) -> set[int]:
    """Returns the ids of the trained parameters that an entry matches, after checking the entry."""
    if not isinstance(entry, Mapping) or "match" not in entry or len(entry) < 2:
        raise ValueError(f"{key}={entry}: expected match, and settings such as weight_decay or lr_scale")
    globs = [entry["match"]] if isinstance(entry["match"], str) else entry["match"]
    if not isinstance(globs, (list, tuple)) or not globs or not all(isinstance(glob, str) for glob in globs):
        raise ValueError(f"{key}.match={entry['match']}: expected a glob over parameter names, or a list of globs")
    if {"lr", "lr_scale"} <= entry.keys():
        raise ValueError(f"{key}.lr_scale: expected lr or lr_scale, found both; lr_scale multiplies the optimizer's lr")
    for name in entry.keys() & set(_NOT_NEGATIVE):
        if not _is_number(entry[name]) or not 0 <= entry[name] < math.inf:
            raise ValueError(f"{key}.{name}={entry[name]}: expected a number of 0 or more")
    if "params" in entry:
        raise ValueError(f"{key}.params: expected no such setting; match selects the parameters")
    all_names = [name for parameter_names in names.values() for name in parameter_names]
    for glob in globs:
        matched = set(match_parameters(f"{key}.match", all_names, [glob]))
        if not any(matched.intersection(names[parameter_id]) for parameter_id in trained_ids):
            raise ValueError(f"{key}.match: {glob!r} matches only frozen parameters, {shorten(sorted(matched))}")
    matched = set(match_parameters(f"{key}.match", all_names, globs))
    return {parameter_id for parameter_id in trained_ids if matched.intersection(names[parameter_id])}


def _merge_settings(entries: Sequence[Mapping[str, Any]], indices: Sequence[int], scale: float) -> ParameterGroup:
    settings: dict[str, Any] = {}
    keys: dict[str, str] = {}
    for index in indices:
        own = {name: value for name, value in entries[index].items() if name != "match"}
        if own.keys() & {"lr", "lr_scale"}:  # one replaces the other
            settings = {name: value for name, value in settings.items() if name not in ("lr", "lr_scale")}
        settings |= own
        keys |= {name: f"groups.{index}.{name}" for name in own}
    return ParameterGroup(settings, keys, float(settings.pop("lr_scale", 1.0)) * scale)


def _find_depths(names: Mapping[int, Sequence[str]], layer_decay: Any) -> tuple[dict[int, int], float]:
    """Returns the depth of each parameter by id, and the factor on the rate from one depth to the next.

    What is registered after the last layer has depth 0, the last layer 1, the first layer the number of layers, and
    what is registered before it one more. Anything between two layers has the depth of the one before.

    Source: BEiT, https://arxiv.org/abs/2106.08254, and timm's `param_groups_layer_decay`
    """
    if not isinstance(layer_decay, Mapping) or layer_decay.keys() != {"rate", "layers"}:
        raise ValueError(f'layer_decay={layer_decay}: expected {{rate: 0.75, layers: "blocks.*"}}, or null')
    rate, glob = layer_decay["rate"], layer_decay["layers"]
    if not _is_number(rate) or not 0 < rate <= 1:
        raise ValueError(f"layer_decay.rate={rate}: expected a number above 0, up to 1")
    if not isinstance(glob, str) or not set(glob) & set("*?["):
        raise ValueError(f'layer_decay.layers={glob}: expected a glob over layers, such as "blocks.*"')
    numbers = {parameter_id: _number_of(parameter_names, glob) for parameter_id, parameter_names in names.items()}
    layers = sorted({number for number in numbers.values() if number is not None})
    if len(layers) < 2:
        all_names = [name.rpartition(".")[0] for parameter_names in names.values() for name in parameter_names]
        found = f"found {len(layers) or 'none'}; there are: {list_nearest(glob, all_names)}"
        raise ValueError(f"layer_decay.layers={glob}: expected two or more numbered layers, {found}")
    depth_of = {number: len(layers) - index for index, number in enumerate(layers)}
    last_position = max(index for index, number in enumerate(numbers.values()) if number is not None)
    depths: dict[int, int] = {}
    depth = len(layers) + 1
    for index, (parameter_id, number) in enumerate(numbers.items()):
        if number is not None:
            depth = depth_of[number]
        depths[parameter_id] = depth if index <= last_position else 0
    return depths, float(rate)


def _number_of(parameter_names: Sequence[str], glob: str) -> tuple[int, ...] | None:
    """Returns the numbers that the wildcards of a glob match in one of a parameter's names; None without a match."""
    globs = glob.split(".")
    for name in parameter_names:
        segments = name.split(".")[: len(globs)]
        if len(segments) == len(globs) and all(map(fnmatch.fnmatchcase, segments, globs)):
            pairs = zip(segments, globs, strict=True)
            numbers = tuple(int(segment) for segment, part in pairs if segment != part and segment.isdecimal())
            if numbers:
                return numbers
    return None


def _is_number(value: Any) -> TypeGuard[float]:
    return type(value) in (int, float)


def check_groups(optimizer: Any, groups: Sequence[ParameterGroup]) -> None:
    """Checks that an optimizer just built has kept the groups that it was given, and knows their settings.

    Torch keeps a setting that it does not know in a group without a message.

    Raises:
        ValueError: with the key of the setting.
    """
    owners = _owners(groups)
    known: dict[int, set[str]] = {id(group): set() for group in groups}
    kinds: dict[int, str] = {}
    for part in chained_optimizers(optimizer):
        defaults = getattr(part, "defaults", {})
        for built in part.param_groups:
            owned = {id(owners[id(p)]): owners[id(p)] for p in built["params"] if id(p) in owners}
            if len(owned) > 1:
                raise ValueError(f"groups: {_NO_GROUPS}; {type(part).__name__} joins several of them")
            for group in owned.values():
                known[id(group)] |= defaults.keys()
                kinds[id(group)] = type(part).__name__
                _check_kept(part, built, group, defaults)
    for group in groups:
        for name in group.settings.keys() - known[id(group)] - {"lr"}:
            choices = sorted({"lr", "lr_scale", *known[id(group)]})
            raise ValueError(f"{group.keys[name]}: {kinds[id(group)]} has no such setting; {suggest(name, choices)}")


def _owners(groups: Sequence[ParameterGroup]) -> dict[int, ParameterGroup]:
    """Returns the group of each parameter by the parameter's id."""
    owners: dict[int, ParameterGroup] = {}
    for group in groups:
        owners |= dict.fromkeys((id(parameter) for _, parameter in group.named), group)
    return owners


def _check_kept(part: Any, built: Mapping[str, Any], group: ParameterGroup, defaults: Mapping[str, Any]) -> None:
    for name, value in group.settings.items():
        if name in defaults and not _has_type_of(value, defaults[name]):
            raise ValueError(f"{group.keys[name]}={value}: expected a value like {defaults[name]!r}, found {value!r}")
        if (name in defaults or name == "lr") and built.get(name) != value:
            raise ValueError(f"groups: {_NO_GROUPS}; {type(part).__name__} has {name}={built.get(name)}, not {value}")


def _has_type_of(value: Any, default: Any) -> bool:
    if default is None or value is None:
        return True
    if _is_number(default) or isinstance(default, Tensor):
        return _is_number(value)
    if isinstance(default, (list, tuple)):
        has_length = isinstance(value, (list, tuple)) and len(value) == len(default)
        return has_length and all(map(_has_type_of, value, default))
    return type(value) is type(default)


def scale_rates(optimizer: Optimizer, groups: Sequence[ParameterGroup]) -> None:
    """Multiplies the learning rate of each group by its factor, before a scheduler reads the rates.

    Raises:
        ValueError: the optimizer refuses groups with different rates.
    """
    owners = _owners(groups)
    for built in optimizer.param_groups:
        scale = next((owners[id(p)].lr_scale for p in built["params"] if id(p) in owners), 1.0)
        if scale != 1:
            built["lr"] = built["lr"] * scale
    lrs = list(dict.fromkeys(base_lrs(optimizer)))
    if type(optimizer).__module__.partition(".")[0] in _ONE_RATE and len(lrs) > 1:
        expected = f"{type(optimizer).__name__} takes one learning rate for all groups"
        remedy = "leave out lr, lr_scale and layer_decay"
        raise ValueError(f"groups: {expected}; found {', '.join(map(format_number, lrs))}; {remedy}")


def describe_groups(optimizer: Optimizer, module: nn.Module) -> list[str]:
    """Returns a table of the groups of an optimizer as lines; none if it has one group.

    The first column is the metric that logs the learning rate of the group, beside the base rate.
    """
    if len(optimizer.param_groups) < 2:
        return []
    names = names_by_id(module)
    rows = [("metric", "lr", "decay", "tensors", "parameters", "")]
    for index, (group, lr) in enumerate(zip(optimizer.param_groups, base_lrs(optimizer), strict=True)):
        parameters = group["params"]
        first_names = [names[id(p)][0] for p in parameters if id(p) in names]
        decay = group.get("weight_decay")
        rows.append(
            (
                f"lr_{index}" if index else "lr",
                format_number(lr),
                format_number(decay) if _is_number(decay) else "",
                str(len(parameters)),
                f"{sum(p.numel() for p in parameters):,}",
                "; ".join([*_describe_others(group, optimizer.param_groups), shorten(first_names)]),
            )
        )
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [row[0].ljust(widths[0]), *(row[column].rjust(widths[column]) for column in range(1, 5)), row[5]]
        lines.append("  ".join(cells).rstrip())
    return lines


def _describe_others(group: Mapping[str, Any], groups: Sequence[Mapping[str, Any]]) -> list[str]:
    """Returns the settings of a group that another group has with another value."""
    described = []
    for name, value in group.items():
        is_plain = isinstance(value, (bool, int, float, str, list, tuple))
        if name not in _NOT_SHOWN and is_plain and any(other.get(name, value) != value for other in groups):
            described.append(f"{name}={value}")
    return described
