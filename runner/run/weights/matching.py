"""Matches the names of weights in a file to those of a model, and loads those that fit.

The names in a file may have a prefix that the model's lack, or the reverse: DDP's `module.`, Lightning's `model.`, the
base model's `transformer.`. A prefix is removed or added only if more names match then.
"""

from __future__ import annotations

import fnmatch
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from runner.config.spec import InitSpec
from runner.run.weights.sources import Source, State
from runner.utils.modules.weights import load_weights
from runner.utils.wrapper.protocol import shorten

_WRAPPERS = (
    "_orig_mod.",
    "_fsdp_wrapped_module.",
    "_checkpoint_wrapped_module.",
)  # of torch.compile, FSDP, recomputation
_MAX_PREFIX_DEPTH = 4
_MAX_NUM_PREFIXES = 50  # that are tried, the most common ones
_ONLY_ENGINE = "model"  # the engine of a config without `engines`
_MAX_NUM_NAMES, _MAX_NAME_LENGTH = 20, 200  # in a message


class AmbiguousError(ValueError):
    """Several state dicts of a file, or several prefixes, fit the model equally well."""


@dataclass(frozen=True)
class Candidate:
    """One way to read a file: a state dict in it, and a prefix to remove from or to add to its names."""

    place: str
    removed: str
    added: str
    score: tuple[int, int]  # names that match with equal shapes, and names that match

    def map_name(self, name: str, known: Mapping[str, Any]) -> str:
        """Returns the model's name for a name in the state dict, if `known`, the model's names, has it."""
        if self.removed and name.startswith(self.removed):
            return name.removeprefix(self.removed)
        return self.added + name if self.added and name not in known else name

    def describe(self) -> str:
        """Returns a description for the log; "" for names that are used as they are."""
        parts = [f"those under {self.place!r}"] if self.place else []
        parts += [f"prefix {self.removed!r} removed"] if self.removed else []
        parts += [f"prefix {self.added!r} added"] if self.added else []
        return ", ".join(parts)


@dataclass
class Match:
    """The weights of a file by the names of a model, and those that do not fit.

    Attributes:
        weights: those that fit.
        missing: names in the model alone.
        unused: names in the file alone.
        mismatched: names in both that do not fit, with the reason.
        tied: missing names that share their weight with a loaded one.
        num_excluded: names in either that `include` and `exclude` leave out.
        converted: pairs of dtypes, in the file and in the model, with the number of weights.
        remarks: further lines for the log.
    """

    weights: dict[str, Any] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)
    unused: list[str] = field(default_factory=list)
    mismatched: list[str] = field(default_factory=list)
    tied: list[str] = field(default_factory=list)
    num_excluded: int = 0
    converted: Counter[tuple[str, str]] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    @property
    def is_complete(self) -> bool:
        return bool(self.weights) and not (self.missing or self.unused or self.mismatched)

    def load(self, module: nn.Module) -> None:
        """Loads the weights that fit.

        Raises:
            RuntimeError, TypeError, ValueError: the module refuses them.
        """
        load_weights(module, self.weights, strict=False)

    def mismatch_lines(self) -> list[str]:
        """Returns a line for each kind of weights that do not fit."""
        kinds = {"missing": self.missing, "unused": self.unused, "mismatched": self.mismatched}
        return [f"{kind}: {_join_names(names)}" for kind, names in kinds.items() if names]

    def table(self) -> list[str]:
        """Returns the rows for the log: loaded, missing, unused, mismatched."""
        notes = [f"{count} converted from {old} to {new}" for (old, new), count in self.converted.items()]
        notes += [f"{len(self.tied)} tied to them"] if self.tied else []
        notes += [f"{self.num_excluded} left out by include and exclude"] if self.num_excluded else []
        loaded = shorten([name[:_MAX_NAME_LENGTH] for name in self.weights])
        rows = {"loaded": f"{len(self.weights)}: {loaded}{''.join(f'; {note}' for note in notes)}"}
        for kind, names in (("missing", self.missing), ("unused", self.unused), ("mismatched", self.mismatched)):
            rows[kind] = f"{len(names)}: {_join_names(names)}" if names else "0"
        return [*self.remarks, *(f"{kind.ljust(10)}  {text}" for kind, text in rows.items())]


def match(spec: InitSpec, source: Source, engine: str, module: nn.Module) -> Match:
    """Returns the weights of a source that fit a module.

    Raises:
        AmbiguousError: several state dicts or prefixes fit.
        ValueError: two names in the file become one.
    """
    expected = module.state_dict()
    states = source.states
    result = Match()
    renamed: dict[str, dict[str, str]] = {}  # by place: names in the file by the name after `rename`
    for place, state in states.items():
        renamed[place] = _rename(spec, state, expected)
    candidate = _choose(spec, engine, states, renamed, expected)
    state, names = states[candidate.place], renamed[candidate.place]
    is_named_by_engine = source.has_engines
    how = (Candidate("", candidate.removed, candidate.added, (0, 0)) if is_named_by_engine else candidate).describe()
    result.remarks += [f"names: {how}"] if how else []
    result.remarks += _describe_idle_rules(spec, state)
    found: dict[str, Any] = {}
    for name, original in names.items():
        goal = candidate.map_name(name, expected)
        if goal in found:
            raise ValueError(f"two names become {goal[:_MAX_NAME_LENGTH]}, one of them {original[:_MAX_NAME_LENGTH]}")
        found[goal] = state[original]
    result.remarks += _describe_idle_globs(spec, {*expected, *found})
    _compare(spec, module, expected, found, result)
    return result


def _rename(spec: InitSpec, state: State, expected: Mapping[str, Any]) -> dict[str, str]:
    """Returns the names of a state dict by their names after `rename`, without those of wrappers of modules."""
    names: dict[str, str] = {}
    for original in state:
        name = original
        for pattern, replacement in spec.rename.items():
            name = re.sub(pattern, replacement, name)
        if name not in expected:
            for wrapper in _WRAPPERS:
                name = name.replace(wrapper, "")
        if name in names:
            both = f"{names[name][:_MAX_NAME_LENGTH]} and {original[:_MAX_NAME_LENGTH]}"
            raise ValueError(f"expected different names, found that both {both} become {name[:_MAX_NAME_LENGTH]}")
        names[name] = original
    return names


def _describe_idle_rules(spec: InitSpec, state: State) -> list[str]:
    """Returns a line for each rule of `rename` that matches no name."""
    names = list(state)
    lines = []
    for pattern, replacement in spec.rename.items():
        if not any(re.search(pattern, name) for name in names):
            lines.append(f"rename: {pattern!r} matches no name")
        names = [re.sub(pattern, replacement, name) for name in names]
    return lines


def _describe_idle_globs(spec: InitSpec, names: Iterable[str]) -> list[str]:
    """Returns a line for each glob of `include` and `exclude` that matches no name of the model or the file."""
    globs = {"include": spec.include or [], "exclude": spec.exclude}
    idle = [(key, glob) for key in globs for glob in globs[key] if not fnmatch.filter(names, glob)]
    return [f"{key}: {glob!r} matches no name" for key, glob in idle]


def _choose(
    spec: InitSpec,
    engine: str,
    states: Mapping[str, State],
    renamed: Mapping[str, Mapping[str, str]],
    expected: Mapping[str, Any],
) -> Candidate:
    """Returns the candidate with which most names match; of equal ones the one that has the engine's name."""
    best: list[Candidate] = []
    for place, names in renamed.items():
        shapes = {name: _shape(states[place][original]) for name, original in names.items()}
        for candidate in _find_candidates(place, shapes, expected):
            if not best or candidate.score > best[0].score:
                best = [candidate]
            elif candidate.score == best[0].score:
                best.append(candidate)
    as_it_is = {candidate.place for candidate in best if not candidate.removed + candidate.added}
    best = [each for each in best if each.place not in as_it_is or not each.removed + each.added]
    if engine != _ONLY_ENGINE:  # a name that somebody has chosen
        named = [each for each in best if engine in (*each.place.split("."), *each.removed.split("."))]
        best = named if len(named) == 1 else best
    tensors = {tuple(map(id, states[each.place].values())) for each in best}
    if len(best) > 1 and best[0].score[0] and not (len(tensors) == 1 and len({each.removed for each in best}) == 1):
        places = [f"{each.place}.{each.removed}".strip(".") for each in best]
        expected_one = f"expected one state dict that fits engine {engine}, found {len(best)}: {_join_names(places)}"
        remedy = "save the one that you mean in a file of its own: torch.save(torch.load(PATH)[NAME], 'weights.pt')"
        if best[0].removed:
            remedy = f"rename its prefix away: init.rename: {{'^{re.escape(best[0].removed)}': ''}}, and exclude others"
        raise AmbiguousError(f"{expected_one}; {remedy}")
    return best[0]


def _find_candidates(place: str, shapes: Mapping[str, Any], expected: Mapping[str, Any]) -> Iterator[Candidate]:
    """Yields the names of a state dict as they are, and with each prefix removed or added that makes some match."""
    prefixes: Counter[tuple[str, str]] = Counter()
    for name in shapes:
        for prefix in _prefixes(name):
            prefixes[prefix, ""] += name[len(prefix) :] in expected
    for name in expected:
        for prefix in _prefixes(name):
            prefixes["", prefix] += name[len(prefix) :] in shapes
    likely = [prefix for prefix, count in prefixes.most_common(_MAX_NUM_PREFIXES) if count]
    for removed, added in dict.fromkeys([("", ""), *likely]):
        candidate = Candidate(place, removed, added, (0, 0))
        goals = {candidate.map_name(name, expected): shape for name, shape in shapes.items()}
        matching = [name for name in goals if name in expected]
        num_equal = sum(goals[name] == _shape(expected[name]) for name in matching)
        yield Candidate(place, removed, added, (num_equal, len(matching)))


def _prefixes(name: str) -> Iterator[str]:
    end = -1
    for _ in range(_MAX_PREFIX_DEPTH):
        end = name.find(".", end + 1)
        if end < 0:
            return
        yield name[: end + 1]


def _compare(
    spec: InitSpec, module: nn.Module, expected: Mapping[str, Any], found: Mapping[str, Any], result: Match
) -> None:
    """Sorts the names of the model and of the file into those that fit and those that do not."""
    ties = _find_ties(module)
    in_both = [name for name in expected if name in found]
    for name in dict.fromkeys([*in_both, *found]):  # in the order of the model
        value = found[name]
        if not _is_selected(spec, name):
            result.num_excluded += 1
        elif name not in expected:
            result.unused.append(name)
        elif reason := _find_mismatch(expected[name], value):
            result.mismatched.append(f"{name} ({reason})")
        elif other := _find_unequal(ties.get(name, ()), name, found):
            result.mismatched.append(f"{name} (is {other} in the model, which has other values in the file)")
        else:
            result.weights[name] = value
            if isinstance(value, Tensor) and value.dtype != expected[name].dtype:
                result.converted[_name(value.dtype), _name(expected[name].dtype)] += 1
    for name in expected:
        if name not in found and _is_selected(spec, name):
            is_tied = any(other in result.weights for other in ties.get(name, ()))
            (result.tied if is_tied else result.missing).append(name)
        elif name not in found:
            result.num_excluded += 1


def _is_selected(spec: InitSpec, name: str) -> bool:
    is_included = spec.include is None or any(fnmatch.fnmatchcase(name, glob) for glob in spec.include)
    return is_included and not any(fnmatch.fnmatchcase(name, glob) for glob in spec.exclude)


def _find_mismatch(expected: Any, found: Any) -> str | None:
    """Returns why a value does not fit, or None if it does."""
    if not isinstance(expected, Tensor) or not isinstance(found, Tensor):
        kinds = f"expected {type(expected).__name__}, found {type(found).__name__}"
        return kinds if isinstance(expected, Tensor) or isinstance(found, Tensor) else None
    if expected.shape != found.shape:
        return f"expected {[*expected.shape]}, found {[*found.shape]}"
    if _kind(expected.dtype) != _kind(found.dtype):
        return f"expected {_name(expected.dtype)}, found {_name(found.dtype)}"
    if expected.layout != found.layout:
        return f"expected {_name(expected.layout)}, found {_name(found.layout)}"
    return "has no values" if found.is_meta and not expected.is_meta else None


def _find_unequal(ties: Iterable[str], name: str, found: Mapping[str, Any]) -> str | None:
    """Returns a name that shares its weight with `name` in the model, but has other values in the file."""
    for other in ties:
        if other in found and found[other] is not found[name] and not _are_equal(found[other], found[name]):
            return other
    return None


def _are_equal(one: Any, other: Any) -> bool:
    both = isinstance(one, Tensor) and isinstance(other, Tensor)
    return both and one.shape == other.shape and bool(torch.equal(one, other.to(one.dtype)))


def _find_ties(module: nn.Module) -> dict[str, list[str]]:
    """Returns the other names of each parameter or buffer that has several."""
    names: dict[int, list[str]] = {}
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    for name, tensor in tensors:
        names.setdefault(id(tensor), []).append(name)
    ties = {}
    for group in names.values():
        for name in group if len(group) > 1 else ():
            ties[name] = [other for other in group if other != name]
    return ties


def _kind(dtype: torch.dtype) -> str:
    if dtype.is_floating_point or dtype.is_complex:
        return "floating-point" if dtype.is_floating_point else "complex"
    return "boolean" if dtype == torch.bool else "integer"


def _name(kind: torch.dtype | torch.layout) -> str:
    return str(kind).removeprefix("torch.")


def _shape(value: Any) -> Any:
    return value.shape if isinstance(value, Tensor) else None


def _join_names(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NUM_NAMES} more" if len(names) > _MAX_NUM_NAMES else ""
    return ", ".join(name[:_MAX_NAME_LENGTH] for name in names[:_MAX_NUM_NAMES]) + more
