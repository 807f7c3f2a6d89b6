"""The saved state of an optimizer, and its assignment to parameters by name.

Torch assigns states by position: after a change of the model that moves a parameter, a parameter would get the moments
of another.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.utils.wrapper.protocol import shorten

Names = Mapping[int, Sequence[str]]  # the names of a parameter by its id; a tied parameter has several
_GroupNames = Sequence[Sequence[Sequence[str]]]  # the names of each parameter of each group


@dataclass
class MatchedState:
    """A saved state in the order of an optimizer's groups and parameters.

    Attributes:
        order: for each group of the optimizer the index of the saved group, or None.
        missing: names of the optimizer's parameters that have no saved state.
        unmatched: names of saved parameters that the optimizer lacks.
    """

    state: dict[str, Any]
    order: list[int | None]
    missing: list[str] = field(default_factory=list)
    unmatched: list[str] = field(default_factory=list)


def chained_optimizers(optimizer: Any) -> Sequence[Any]:
    """Returns the optimizers inside a `ChainedOptimizer`.

    Of any other, the optimizer itself.
    """
    return getattr(optimizer, "optimizers", None) or [optimizer]


def names_by_id(module: nn.Module) -> dict[int, list[str]]:
    """Returns the names of each parameter of a module by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def extra_state(optimizer: Optimizer | None) -> list[dict[str, Any]]:
    """Returns numbers and generators in an optimizer's attributes.

    Torch does not save these.
    """
    extra_states = []
    for part in () if optimizer is None else chained_optimizers(optimizer):
        public = {name: value for name, value in vars(part).items() if not name.startswith("_")}
        numbers = {name: value for name, value in public.items() if type(value) in (int, float)}
        generators = {name: value.get_state() for name, value in public.items() if isinstance(value, torch.Generator)}
        extra_states.append(numbers | generators)
    return extra_states


def changed_extra_state(optimizer: Optimizer, built: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the extra state that changed since the optimizer was built.

    The rest is hyperparameters.
    """
    changed = []
    for now, before in zip(extra_state(optimizer), built, strict=True):
        changed.append({name: v for name, v in now.items() if isinstance(v, Tensor) or before.get(name) != v})
    return changed


def load_extra_state(optimizer: Optimizer, changed: Sequence[Mapping[str, Any]]) -> None:
    """Loads the result of `changed_extra_state`."""
    for part, values in zip(chained_optimizers(optimizer), changed, strict=True):
        for name, value in values.items():
            if isinstance(generator := getattr(part, name, None), torch.Generator):
                generator.set_state(value)
            else:
                setattr(part, name, value)


def groups_of(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the groups of a saved state, also of a `ChainedOptimizer`."""
    if "optimizers" in state:
        return [group for part in state["optimizers"] for group in groups_of(part)]
    return list(state.get("param_groups", ()))


def name_parameters(state: dict[str, Any], optimizer: Optimizer, names: Names) -> dict[str, Any]:
    """Returns an optimizer's state with the parameters' names added to each group."""
    if parts := getattr(optimizer, "optimizers", None):
        pairs = zip(state["optimizers"], parts, strict=True)
        return {**state, "optimizers": [name_parameters(part_state, part, names) for part_state, part in pairs]}
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if not _has_torch_layout(state) or any(id(p) not in names for p in parameters):
        return state
    pairs = zip(state["param_groups"], map(_first_names, _group_names(optimizer, names)), strict=True)
    return {**state, "param_groups": [{**group, "param_names": first_names} for group, first_names in pairs]}


def match_state(
    state: Mapping[str, Any], optimizer: Optimizer, names: Names, saved_order: Sequence[str]
) -> MatchedState:
    """Returns a saved state in the order of an optimizer's groups and parameters.

    Args:
        saved_order: the names of the saved weights in their order, for a state without names.
    Raises:
        ValueError: parameters of one saved group are in several groups now, or the reverse.
    """
    if parts := getattr(optimizer, "optimizers", None):
        part_states = state.get("optimizers", ())
        if len(part_states) != len(parts):
            raise ValueError(f"optimizer: expected the state of {len(parts)} optimizers, found {len(part_states)}")
        pairs = zip(part_states, parts, strict=True)
        return _join(state, [match_state(part_state, part, names, saved_order) for part_state, part in pairs])
    if not _has_torch_layout(state):
        return MatchedState(dict(state), list(range(len(optimizer.param_groups))))
    group_names = _group_names(optimizer, names)
    saved_names = _saved_names(state["param_groups"], group_names, names, saved_order)
    matched = MatchedState({**state, "state": {}, "param_groups": []}, [])
    _match_parameters(matched, state, group_names, saved_names)
    _match_groups(matched, state, optimizer)
    return matched


def _join(state: Mapping[str, Any], parts: Sequence[MatchedState]) -> MatchedState:
    joined = MatchedState({**state, "optimizers": [part.state for part in parts]}, [])
    num_groups = 0
    for part, saved in zip(parts, state["optimizers"], strict=True):
        joined.order += [None if index is None else index + num_groups for index in part.order]
        joined.missing += part.missing
        joined.unmatched += part.unmatched
        num_groups += len(groups_of(saved))
    return joined


def _has_torch_layout(state: Mapping[str, Any]) -> bool:
    return "state" in state and "param_groups" in state


def _group_names(optimizer: Optimizer, names: Names) -> _GroupNames:
    """Returns the names of each parameter, by group.

    A parameter that the module lacks is named by its position.
    """
    number = itertools.count()
    groups = []
    for group in optimizer.param_groups:
        defaults = [f"parameter {next(number)}" for _ in group["params"]]
        groups.append([names.get(id(p), [default]) for p, default in zip(group["params"], defaults, strict=True)])
    return groups


def _first_names(names_of_group: Sequence[Sequence[str]]) -> list[str]:
    return [parameter_names[0] for parameter_names in names_of_group]


def _saved_names(
    groups: Sequence[Mapping[str, Any]], group_names: _GroupNames, names: Names, saved_order: Sequence[str]
) -> list[list[str]]:
    """Returns the parameters' names of each saved group.

    Of a state without names, the current ones by position.

    Raises:
        ValueError: the state has no names, and the order of the parameters has changed.
    """
    if all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        return [list(group["param_names"]) if group["params"] else [] for group in groups]
    current = list(map(_first_names, group_names))
    trained = set(itertools.chain.from_iterable(current))
    order = [name for name in _first_names([*names.values()]) if name in trained]
    trained_saved_order = [name for name in saved_order if name in trained]
    sizes = [len(group["params"]) for group in groups]
    if sizes != list(map(len, current)) or (saved_order and trained_saved_order != order):
        raise ValueError(
            "optimizer: its saved state names no parameters, and their order changed: "
            f"expected {', '.join(order)}, found {', '.join(trained_saved_order)}; "
            "resume with the model and optimizer as they were"
        )
    return current


def _match_parameters(
    matched: MatchedState, state: Mapping[str, Any], group_names: _GroupNames, saved_names: Sequence[Sequence[str]]
) -> None:
    """Assigns each parameter its saved state, and each group its saved group."""
    locations: dict[str, tuple[int, int]] = {}  # index of the saved group, and key in the saved state, by name
    for group_index, (saved_group, group) in enumerate(zip(state["param_groups"], saved_names, strict=True)):
        locations |= {name: (group_index, key) for name, key in zip(group, saved_group["params"], strict=True)}
    saved_keys = {key for _, key in locations.values()}
    new_state = {key: value for key, value in state["state"].items() if key not in saved_keys}
    position = itertools.count()
    matched_groups = set[int]()
    for names_of_group in group_names:
        saved_groups = set[int]()
        for parameter_names in names_of_group:
            index = next(position)
            name = next((name for name in parameter_names if name in locations), None)
            if name is None:
                matched.missing.append(parameter_names[0])
                continue
            group_index, saved_key = locations.pop(name)
            saved_groups.add(group_index)
            if saved_key in state["state"]:
                new_state[index] = state["state"][saved_key]
        if len(saved_groups) > 1 or saved_groups & matched_groups:
            raise ValueError(_describe_regrouping(group_names, saved_names))
        matched_groups |= saved_groups
        matched.order.append(next(iter(saved_groups), None))
    matched.state["state"] = new_state
    matched.unmatched = [*locations]


def _describe_regrouping(group_names: _GroupNames, saved_names: Sequence[Sequence[str]]) -> str:
    expected = " | ".join(map(shorten, map(_first_names, group_names)))
    found = " | ".join(map(shorten, saved_names))
    return (
        f"optimizer: its parameters are grouped anew: expected {expected}; found {found}; "
        "resume with the groups as they were, or start a new run with init_from"
    )


def _match_groups(matched: MatchedState, state: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Gives each group the settings of its saved group.

    An empty group gets those of an empty saved group.
    """
    unused = [i for i, group in enumerate(state["param_groups"]) if i not in matched.order and not group["params"]]
    # For each value of the state, torch searches its key in `params`: in a list, that takes quadratic time.
    is_torchs = type(optimizer).load_state_dict is Optimizer.load_state_dict
    is_read_by_torch = is_torchs and not getattr(optimizer, "_optimizer_load_state_dict_pre_hooks", True)
    num_parameters = 0
    for position, group in enumerate(optimizer.param_groups):
        if matched.order[position] is None and not group["params"] and unused:
            matched.order[position] = unused.pop(0)
        source = matched.order[position]
        settings = dict(group if source is None else state["param_groups"][source])
        if "param_names" in group:
            settings["param_names"] = list(group["param_names"])
        else:
            settings.pop("param_names", None)
        keys = range(num_parameters, num_parameters := num_parameters + len(group["params"]))
        settings["params"] = keys if is_read_by_torch else [*keys]
        matched.state["param_groups"].append(settings)
