"""Checks the types of all values that a run reads from a checkpoint, before anything is loaded from it.

A checkpoint's checksums show that it is as it was written, not who has written it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from runner.checkpoint.checkpoints import FACTS
from runner.control.commands import MOST_PENDING, parse
from runner.control.handlers import COMMANDS

BATCHES = "trainer.batches"  # a sampler's state that JSON can't hold; the name of an engine has no dot
CALLBACKS = "trainer.callbacks"  # likewise the states of callbacks
ACTIONS = ("eval", "export", "save")
COUNTERS = ("steps", "micro_steps", "skipped_steps", "tokens")
MAX_STEP = 1 << 53
_MAX_ENTRIES = 10_000
_ABSENT = object()
Kind = tuple[str, Callable[[Any], bool]]  # in words, and a test of a value


def check_content(content: Mapping[str, Any]) -> None:
    """Checks a checkpoint's content as `checkpoints.load` returns it.

    Raises:
        ValueError: naming the file and key, the expected and the found value.
    """
    facts = _check(content, FACTS, ("the facts of a run", _is_mapping), "")
    _check_all(_check(facts, "loop", _OBJECT, FACTS), _LOOP, f"{FACTS}: loop")
    _check(
        facts["loop"], "requests", ("a list of requests to the loop", _is_list_of(_is_request)), f"{FACTS}: loop", []
    )
    _check(facts, "callbacks", _OBJECT, FACTS, {})
    _check_commands(_check(facts, "commands", _OBJECT, FACTS))
    if (best := _check(facts, "best", _OBJECT_OR_NULL, FACTS)) is not None:
        _check_all(best, _BEST, f"{FACTS}: best")
    _check(facts, "fingerprint", ("a text or null", _is_text), FACTS, None)
    numbers = _check(facts, "numbers", _OBJECT_OR_NULL, FACTS, None) or {}
    _check_all(numbers, dict.fromkeys(numbers, _COUNT), f"{FACTS}: numbers")
    batches, place = (content[BATCHES], BATCHES) if BATCHES in content else (facts.get("batches"), f"{FACTS}: batches")
    _check_all(_require(batches, _OBJECT, place), {"sampler": _OBJECT, "ordinal": _COUNT}, place)
    if CALLBACKS in content:
        _require(content[CALLBACKS], _OBJECT, CALLBACKS)
    for name, part in content.items():
        if name.endswith(".optimizer"):
            _check_engine(_require(part, _OBJECT, name), name)
        elif "." not in name:
            _require(part, ("weights by name", _is_by_name), name)


def _check_commands(commands: Mapping[str, Any]) -> None:
    place = f"{FACTS}: commands"
    pending = _check(commands, "pending", ("a list of commands", _is_list_of(_is_text)), place)
    if len(pending) > 2 * MOST_PENDING:  # a run keeps fewer
        raise ValueError(f"{place}.pending: expected at most {2 * MOST_PENDING} commands, found {len(pending)}")
    for line in pending:
        try:
            is_scheduled = parse(line, COMMANDS).step is not None
        except ValueError as error:
            raise ValueError(f"{place}.pending: {error}") from None
        if not is_scheduled:
            raise ValueError(f"{place}.pending: expected commands with a step, as eval@20; found {line!r:.60}")


def _check_engine(state: Mapping[str, Any], part: str) -> None:
    """Checks an engine's state, but for its weights."""
    _check_all(state, _ENGINE, part)
    for name, value in state["counters"].items():
        if name not in COUNTERS or not _is_count(value):
            raise ValueError(f"{part}: counters: expected numbers of {', '.join(COUNTERS)}; found {name!r:.60}")
    _check_all(state["configured"], _CONFIGURED, f"{part}: configured")
    _check(state, "reference", ("a number or null", _is_number), part, None)
    _check(state, "numbers", ("a list", _is_list), part, None)
    _check(state, "metrics", _OBJECT, part, {})
    _check_gathered(state["gathered"], f"{part}: gathered")
    if "schedule" in state:
        _check_schedule(_check(state, "schedule", _OBJECT, part), f"{part}: schedule")


def _check_gathered(gathered: Mapping[str, Any], place: str) -> None:
    kind = "vectors of numbers by name"
    for name in ("apart", "weights"):
        for value in _check(gathered, name, (kind, _is_by_name), place, {}).values():
            _require(value, (kind, _or_none(_is_vector)), f"{place}.{name}")
    for value in _check(gathered, "sums", ("pairs of numbers by name", _is_by_name), place).values():
        if not isinstance(value, (list, tuple)) or len(value) != 2 or not all(map(_is_number, value)):
            raise ValueError(f"{place}.sums: expected pairs of numbers by name, found {_shown(value)}")


def _check_schedule(schedule: Mapping[str, Any], place: str) -> None:
    _check_all(schedule, {"count": _COUNT, "events": ("a list of objects", _is_list_of(_is_mapping))}, place)
    for event in schedule["events"]:
        _check(event, "count", _COUNT, f"{place}.events")
        _check(event, "metric", ("a number", _is_number), f"{place}.events", 0.0)
        for rate in _check(event, "base_lrs", ("a list of numbers", _is_list), f"{place}.events", []):
            _require(rate, ("numbers", _or_none(_is_number)), f"{place}.events.base_lrs")


def _check_all(values: Mapping[str, Any], kinds: Mapping[str, Kind], place: str) -> None:
    for key, kind in kinds.items():
        _check(values, key, kind, place)


def _check(values: Mapping[str, Any], key: str, kind: Kind, place: str, default: Any = _ABSENT) -> Any:
    """Returns the value of a key.

    Args:
        place: the file, and the keys above this one.
        default: the value of a missing key; without a default the key is required.
    Raises:
        ValueError: it is missing, or of another kind.
    """
    where = f"{place}.{key}" if ": " in place else f"{place}: {key}".removeprefix(": ")
    value = values.get(key, default)
    if value is _ABSENT:
        raise ValueError(f"{where}: expected {kind[0]}, found nothing")
    return value if value is default else _require(value, kind, where)


def _require(value: Any, kind: Kind, where: str) -> Any:
    expected, is_kind = kind
    if not is_kind(value):
        raise ValueError(f"{where}: expected {expected}, found {_shown(value)}")
    return value


def _shown(value: Any) -> str:
    is_short = isinstance(value, (bool, float, str)) or value is None or _is_count(value)
    return f"{value!r:.60}" if is_short else type(value).__name__


def _or_none(is_kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: value is None or is_kind(value)


def _is_list_of(is_kind: Callable[[Any], bool]) -> Callable[[Any], bool]:
    return lambda value: _is_list(value) and len(value) <= _MAX_ENTRIES and all(map(is_kind, value))


def _is_mapping(value: Any) -> bool:
    return isinstance(value, Mapping)


def _is_by_name(value: Any) -> bool:
    return isinstance(value, Mapping) and all(isinstance(key, str) for key in value)


def _is_request(value: Any) -> bool:
    is_pair = _is_list(value) and len(value) == 2 and all(map(_is_text, value))
    return is_pair and (value[0] == "end" or (value[0] == "action" and value[1] in ACTIONS))


def _is_text(value: Any) -> bool:
    return isinstance(value, str)


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def _is_count(value: Any) -> bool:
    return type(value) is int and 0 <= value < MAX_STEP


def _is_number(value: Any) -> bool:
    return _is_scalar(value) or type(value) is float or (type(value) is int and abs(value) < MAX_STEP)


def _is_finite(value: Any) -> bool:
    return _is_number(value) and not isinstance(value, Tensor) and math.isfinite(value)


def _is_scalar(value: Any) -> bool:
    return isinstance(value, Tensor) and value.numel() == 1 and value.dtype.is_floating_point


def _is_vector(value: Any) -> bool:
    return isinstance(value, Tensor) and value.ndim == 1 and value.dtype.is_floating_point


_COUNT: Kind = ("a number from 0 on", _is_count)
_OBJECT: Kind = ("an object", _is_mapping)
_OBJECT_OR_NULL: Kind = ("an object or null", _or_none(_is_mapping))
_NUMBERS: Kind = ("a list of numbers", _is_list_of(_is_number))
_LOOP: dict[str, Kind] = {
    "step": _COUNT,
    "skipped": _COUNT,
    "owed": (f"a list of {', '.join(ACTIONS)}", _is_list_of(ACTIONS.__contains__)),
}
_BEST: dict[str, Kind] = {
    "name": ("a text", _is_text),
    "value": ("a finite number", _is_finite),
    "step": _COUNT,
}
_ENGINE: dict[str, Kind] = {
    "optimizer": _OBJECT_OR_NULL,
    "scheduler": _OBJECT_OR_NULL,
    "scaler": _OBJECT_OR_NULL,
    "averages": _OBJECT_OR_NULL,
    "counters": _OBJECT,
    "configured": _OBJECT,
    "lrs": _NUMBERS,
    "grad_norm": ("a tensor of one number, or null", _or_none(_is_scalar)),
    "gathered": _OBJECT,
}
_CONFIGURED: dict[str, Kind] = {
    "kinds": _OBJECT,
    "base_lrs": _NUMBERS,
    "groups": ("a list of objects", _is_list_of(_is_by_name)),
    "scheduler": _OBJECT,
}
