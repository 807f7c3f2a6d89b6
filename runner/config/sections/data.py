"""Checks of the section `data` beyond its types: mixes, and settings of loader workers."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from runner.config.errors import shown_value
from runner.utils.utils import suggest

_MIX = "expected datasets by name: {a: {dataset: {_target_: ...}, weight: 2}, b: {dataset: {_target_: ...}}}"
_ENTRY_KEYS = ["dataset", "weight"]
_WORKER_KEYS = ("prefetch_factor", "persistent_workers")


def find_data_mistakes(data: Mapping[str, Any]) -> Iterator[str]:
    """Yields the mistakes of a resolved section `data`, a line each."""
    mix = data.get("mix")
    if mix is not None:
        mistakes = [*_find_mix_mistakes(mix)]
        yield from mistakes
        if not mistakes and data.get("train") is not None:
            yield "data.mix: it takes the place of data.train, and both are set; set data.train=null or data.mix=null"
    for key in _WORKER_KEYS:
        if (value := data.get(key)) and not data.get("num_workers"):
            text = str(value).lower()
            yield f"data.{key}={text}: data.num_workers=0 has no worker; set data.num_workers=1, or data.{key}=null"


def _find_mix_mistakes(mix: Any) -> Iterator[str]:
    if not isinstance(mix, Mapping) or not mix or "_target_" in mix:
        yield f"data.mix={shown_value(mix)}: {_MIX}"
        return
    for name, entry in mix.items():
        key = f"data.mix.{name}"
        if not isinstance(name, str):
            yield f"{key}: expected a text as the name, found a number"
        elif not isinstance(entry, Mapping):
            yield f"{key}={shown_value(entry)}: {_MIX}"
        elif "_target_" in entry:
            remedy = f"write {name}: {{dataset: {{_target_: ...}}, weight: 1}}"
            yield f"{key}: expected the keys dataset and weight, found a dataset itself; {remedy}"
        else:
            yield from _find_entry_mistakes(key, entry)


def _find_entry_mistakes(key: str, entry: Mapping[Any, Any]) -> Iterator[str]:
    for name in [name for name in entry if name not in _ENTRY_KEYS]:
        yield f"{key}.{name}: no such key; {suggest(str(name), _ENTRY_KEYS)}"
    dataset, weight = entry.get("dataset"), entry.get("weight", 1)
    if not isinstance(dataset, Mapping) or "_target_" not in dataset:
        found = "nothing" if dataset is None else shown_value(dataset)
        yield f"{key}.dataset: expected a mapping with _target_, the dotted path of a class or function; found {found}"
    is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
    if not is_number or not 0 < weight < math.inf:
        yield f"{key}.weight={shown_value(weight)}: expected a finite number above 0"


def without_workers() -> dict[str, Any]:
    """Returns the values of `data` for a config that may start no loader worker."""
    return {"num_workers": 0, **dict.fromkeys(_WORKER_KEYS)}
