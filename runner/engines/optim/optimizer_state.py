"""The saved state of an optimizer, matched to an optimizer by parameter names.

Torch matches by position: after an edit of the model that moves a parameter, another one's moments would be taken.
Must not import a config.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

Names = Mapping[int, Sequence[str]]  # the names of a parameter by its id; a tied one has several
_Aliases = Sequence[Sequence[Sequence[str]]]  # the names of each parameter of each group


@dataclass
class Matched:
    """A saved state in the order of an optimizer.

    `order` has for each group of the optimizer the index of the saved one, or None. `missing` names parameters of the
    optimizer that the saved state has not, `left` those that only the saved state has.
    """

    state: dict[str, Any]
    order: list[int | None]
    missing: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)


def names_of(module: nn.Module) -> dict[int, list[str]]:
    """Returns the names of each parameter of a module by its id."""
    names: dict[int, list[str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return names


def numbers_of(optimizer: Optimizer | None) -> list[dict[str, Any]]:
    """Returns the numbers and generators that an optimizer keeps as attributes, beside its state."""
    parts = [] if optimizer is None else getattr(optimizer, "optimizers", None) or [optimizer]
    found = []
    for part in parts:
        public = {name: value for name, value in vars(part).items() if not name.startswith("_")}
        numbers = {name: value for name, value in public.items() if type(value) in (int, float)}
        generators = {name: value.get_state() for name, value in public.items() if isinstance(value, torch.Generator)}
        found.append(numbers | generators)
    return found


def moved_numbers(optimizer: Optimizer, built: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Returns the numbers and generators that moved since an optimizer was built: the others are settings."""
    return [
        {name: value for name, value in now.items() if isinstance(value, Tensor) or before.get(name) != value}
        for now, before in zip(numbers_of(optimizer), built, strict=True)
    ]


def set_numbers(optimizer: Optimizer, moved: Sequence[Mapping[str, Any]]) -> None:
    """Takes back what `moved_numbers` gave."""
    for part, values in zip(getattr(optimizer, "optimizers", None) or [optimizer], moved, strict=True):
        for name, value in values.items():
            if isinstance(own := getattr(part, name, None), torch.Generator):
                own.set_state(value)
            else:
                setattr(part, name, value)


def groups_of(state: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Returns the groups of a saved state, also of several optimizers stepped as one."""
    if "optimizers" in state:
        return [group for part in state["optimizers"] for group in groups_of(part)]
    return list(state.get("param_groups", ()))


def name_parameters(state: dict[str, Any], optimizer: Optimizer, names: Names) -> dict[str, Any]:
    """Returns the state of an optimizer with the names of each group's parameters in it."""
    if parts := getattr(optimizer, "optimizers", None):
        named = [name_parameters(part, own, names) for part, own in zip(state["optimizers"], parts, strict=True)]
        return {**state, "optimizers": named}
    if not _is_torchs(state) or any(id(p) not in names for group in optimizer.param_groups for p in group["params"]):
        return state
    groups = [
        {**saved, "param_names": [names[id(p)][0] for p in group["params"]]}
        for saved, group in zip(state["param_groups"], optimizer.param_groups, strict=True)
    ]
    return {**state, "param_groups": groups}


def match(state: Mapping[str, Any], optimizer: Optimizer, names: Names, saved_order: Sequence[str]) -> Matched:
    """Returns a saved state in the order of an optimizer's groups and parameters.

    Args:
        saved_order: the names of the saved weights in their order, for a state that has no names.
    Raises:
        ValueError: parameters that were in one group are in several now, or the reverse.
    """
    if parts := getattr(optimizer, "optimizers", None):
        saved_parts = state.get("optimizers", ())
        if len(saved_parts) != len(parts):
            raise ValueError(f"optimizer: expected the state of {len(parts)} optimizers, found {len(saved_parts)}")
        found = [match(part, own, names, saved_order) for part, own in zip(saved_parts, parts, strict=True)]
        return _join(state, found)
    if not _is_torchs(state):
        return Matched(dict(state), list(range(len(optimizer.param_groups))))
    aliases = _aliases(optimizer, names)
    saved_names = _saved_names(state["param_groups"], aliases, names, saved_order)
    matched = Matched({**state, "state": {}, "param_groups": []}, [])
    taken = _take_parameters(matched, state, aliases, saved_names)
    matched.left = [name for group in saved_names for name in group if name not in taken]
    _take_groups(matched, state, optimizer)
    return matched


def _join(state: Mapping[str, Any], parts: Sequence[Matched]) -> Matched:
    joined = Matched({**state, "optimizers": [part.state for part in parts]}, [])
    num_groups = 0
    for part, saved in zip(parts, state["optimizers"], strict=True):
        joined.order += [None if index is None else index + num_groups for index in part.order]
        joined.missing += part.missing
        joined.left += part.left
        num_groups += len(groups_of(saved))
    return joined


def _is_torchs(state: Mapping[str, Any]) -> bool:
    return "state" in state and "param_groups" in state


def _aliases(optimizer: Optimizer, names: Names) -> _Aliases:
    """Returns the names of each parameter, by group; one that the module has not is named by its position."""
    number = itertools.count()
    found = []
    for group in optimizer.param_groups:
        positions = [f"parameter {next(number)}" for _ in group["params"]]
        found.append([names.get(id(p), [name]) for p, name in zip(group["params"], positions, strict=True)])
    return found


def _saved_names(
    groups: Sequence[Mapping[str, Any]], aliases: _Aliases, names: Names, saved_order: Sequence[str]
) -> list[list[str]]:
    """Returns the parameters' names of each saved group; without names in it, by position where the order is the same.

    Raises:
        ValueError: it has no names, and the order is another.
    """
    if all(len(group.get("param_names", ())) == len(group["params"]) for group in groups):
        return [list(group["param_names"]) if group["params"] else [] for group in groups]
    present = [[each[0] for each in group] for group in aliases]
    trained = set(itertools.chain.from_iterable(present))
    order = [each[0] for each in names.values() if each[0] in trained]
    was = [name for name in saved_order if name in trained]
    is_as_long = [len(group["params"]) for group in groups] == [len(group) for group in present]
    if not is_as_long or (saved_order and was != order):
        found = f"expected {', '.join(order)}, found {', '.join(was)}"
        remedy = "resume with the model and optimizer as they were"
        raise ValueError(f"optimizer: its saved state names no parameters, and their order changed: {found}; {remedy}")
    return present


def _take_parameters(
    matched: Matched, state: Mapping[str, Any], aliases: _Aliases, saved_names: Sequence[Sequence[str]]
) -> set[str]:
    """Takes the state of each parameter, and finds the saved group of each group; returns the names that were taken."""
    places: dict[str, tuple[int, int]] = {}
    for number, (saved, own) in enumerate(zip(state["param_groups"], saved_names, strict=True)):
        places |= {name: (number, index) for name, index in zip(own, saved["params"], strict=True)}
    indices = {index for _, index in places.values()}
    taken: set[str] = set()
    new_state = {key: value for key, value in state["state"].items() if key not in indices}
    position = itertools.count()
    for group in aliases:
        sources = dict[int, str]()
        for own in group:
            index = next(position)
            name = next((each for each in own if each in places), None)
            if name is None:
                matched.missing.append(own[0])
                continue
            taken.add(name)
            source, saved_index = places[name]
            sources[source] = name
            if saved_index in state["state"]:
                new_state[index] = state["state"][saved_index]
        if len(sources) > 1 or sources.keys() & set(matched.order):
            raise ValueError(_tell_regrouped(aliases, saved_names))
        matched.order.append(next(iter(sources), None))
    matched.state["state"] = new_state
    return taken


def _tell_regrouped(aliases: _Aliases, saved_names: Sequence[Sequence[str]]) -> str:
    expected = " | ".join(", ".join(each[0] for each in group) for group in aliases)
    found = " | ".join(", ".join(group) for group in saved_names)
    remedy = "resume with the groups as they were"
    return f"optimizer: its parameters are grouped anew: expected {expected}; found {found}; {remedy}"


def _take_groups(matched: Matched, state: Mapping[str, Any], optimizer: Optimizer) -> None:
    """Takes the settings of each group's saved one; an empty group takes those of an empty one."""
    unused = [i for i, group in enumerate(state["param_groups"]) if i not in matched.order and not group["params"]]
    number = itertools.count()
    for position, group in enumerate(optimizer.param_groups):
        if matched.order[position] is None and not group["params"] and unused:
            matched.order[position] = unused.pop(0)
        source = matched.order[position]
        settings = dict(group if source is None else state["param_groups"][source])
        if "param_names" in group:
            settings["param_names"] = list(group["param_names"])
        else:
            settings.pop("param_names", None)
        settings["params"] = [next(number) for _ in group["params"]]
        matched.state["param_groups"].append(settings)
