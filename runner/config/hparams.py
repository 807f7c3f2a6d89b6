"""The hyperparameters of a run: the keys that its command line, its experiment or its sweep set, and their values.

A sweep's folders are named by the keys that its jobs vary. Must not import torch.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePath
from typing import Any

from hydra._internal.config_repository import ConfigRepository
from hydra._internal.config_search_path_impl import ConfigSearchPathImpl
from hydra.core.default_element import GroupDefault
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, Override
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict, read_write

Value = bool | int | float | str

_PLACE = "hydra.callbacks.run_folder"  # of the keys in the config of each job
_SPACES = ("params", "search_space", "parametrization", "ax_config.params")  # where sweepers keep what they vary
_ABSENT = "(none)"  # the value of a key that another job of the sweep has and this job lacks
_NO_HYPERPARAMETERS = ("resume", "resume_allow_changes", "allow_targets", "hydra", "defaults")
_PATH_KEY = re.compile(r"(.*_)?(path|paths|dir|dirs|directory|folder|folders|file|files|root)")
_LONGEST_LABEL = 72  # a job's number stands before it: 80 in all
_SHORTEST_PART = 12
_LONGEST_RECORD = 1000


@dataclass
class Keys:
    """The keys of a run's hyperparameters: those that jobs of its sweep vary, and those that are set for all.

    `constant` are the overrides that are the same in all jobs, by their own keys: one may set a mapping.
    """

    swept: list[str]
    fixed: list[str]
    constant: list[str]


def find_keys(cfg: DictConfig, *, reads_experiment: bool = True) -> Keys:
    """Returns the keys that the command line and the experiment of a composed config set.

    Args:
        cfg: a run's config, or a sweep's own, whose overrides are those of all jobs.
        reads_experiment: False leaves out the keys of the experiment's file.
    """
    swept, fixed, constant = dict[str, None](), dict[str, None](), list[str]()
    experiments = _listed(cfg.hydra.runtime.choices.get("experiment"))
    is_experiment_swept = False
    for key, override in _find_overrides(cfg).items():
        is_swept = override is None or override.is_sweep_override()
        (swept if is_swept else fixed).update(dict.fromkeys(_expand(key, override)))
        if not is_swept:
            constant.append(key)
        elif key == "experiment":
            is_experiment_swept, experiments = True, _find_choices(override)
    if reads_experiment:
        names = [name for name in _read_experiments(cfg, experiments) if name not in fixed]
        (swept if is_experiment_swept else fixed).update(dict.fromkeys(names))
    return Keys(list(swept), [key for key in fixed if key not in swept], constant)


def _find_overrides(cfg: DictConfig) -> dict[str, Override | None]:
    """Returns the last override of each key; None for a search space in a sweeper's own form."""
    texts = [*cfg.hydra.overrides.task]
    found: dict[str, Override | None] = {}
    if cfg.hydra.mode == RunMode.MULTIRUN:
        for key, value in _find_space(cfg.hydra.sweeper):
            found[_without_prefix(key)] = None if isinstance(value, Mapping) else _parse(f"{key}={value}")
    for override in _make_parser().parse_overrides(texts):
        if not override.is_delete():
            found[_without_prefix(override.get_key_element())] = override
    return found


def _find_space(sweeper: Any) -> Iterator[tuple[str, Any]]:
    for place in _SPACES:
        space = OmegaConf.select(sweeper, place, throw_on_missing=False)
        if isinstance(space, DictConfig):
            content = OmegaConf.to_container(space, resolve=False)
            assert isinstance(content, dict)
            yield from ((str(key), value) for key, value in content.items())
        for text in space if isinstance(space, ListConfig) else ():
            yield str(text).partition("=")[0], str(text).partition("=")[2]


def _parse(text: str) -> Override | None:
    with contextlib.suppress(HydraException):
        return _make_parser().parse_override(text)
    return None


def _make_parser() -> OverridesParser:
    hydra = GlobalHydra.instance()
    return OverridesParser.create(hydra.config_loader() if hydra.is_initialized() else None)  # which lists glob(...)


def _without_prefix(key: str) -> str:
    return key.lstrip("+~")


def _expand(key: str, override: Override | None) -> list[str]:
    """Returns the key of an override, or the keys of the mapping that it sets."""
    value = override.value() if override else None
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    if not all(isinstance(each, dict) and each for each in values):
        return [key]
    return list(dict.fromkeys(name for each in values for name, _ in flatten(each, key)))


def _find_choices(override: Override | None) -> list[str]:
    """Returns the experiments that a sweep chooses from; none where they are not listed."""
    with contextlib.suppress(HydraException, AssertionError):
        if override is not None:
            return [choice for text in override.sweep_string_iterator() for choice in _listed(text)]
    return []


def _listed(choice: Any) -> list[str]:
    """Returns the file names of a group's choice: a name, a list of names, or one as text."""
    if isinstance(choice, (list, ListConfig)):
        return [str(each) for each in choice]
    return [] if choice is None else [each.strip(" '\"") for each in str(choice).strip("[]").split(",")]


def _read_experiments(cfg: DictConfig, names: list[str]) -> Iterator[str]:
    """Yields the keys that experiments set and the groups that they choose from, with those that they are based on."""
    path = ConfigSearchPathImpl()
    for source in cfg.hydra.runtime.config_sources:
        path.append(source.provider, f"{source.schema}://{source.path}")
    repository = ConfigRepository(path)
    waiting, known = [f"experiment/{name}" for name in names], set[str]()
    while waiting:
        place = waiting.pop(0)
        try:
            loaded = None if place in known else repository.load_config(place)
        except Exception:  # a swept file with a mistake, which the job tells that chooses it
            loaded = None
        known.add(place)
        if loaded is None:
            continue
        for default in loaded.defaults_list or []:
            group = default.group if isinstance(default, GroupDefault) else None
            if group is None or (not group.startswith("/") and not default.is_override()):  # a file beside it
                base = default.value if isinstance(default, GroupDefault) else default.path  # type: ignore[attr-defined]
                folder = place.rpartition("/")[0] + (f"/{group}" if group else "")
                texts = [text for text in _listed(base) if text != "_self_"]
                waiting += [text[1:] if text.startswith("/") else f"{folder}/{text}" for text in texts]
            elif not group.startswith(("hydra/", "/hydra/")):
                yield group.lstrip("/") + (f"@{default.package}" if default.package else "")
        package = loaded.header.get("package") or "experiment"
        content = OmegaConf.to_container(loaded.config, resolve=False)
        if content:
            yield from (name for name, _ in flatten(content, "" if package == "_global_" else package))


def put_into_jobs(cfg: DictConfig) -> None:
    """Has each job of a sweep find the keys that all its jobs vary: Hydra composes it with these overrides."""
    keys = find_keys(cfg)
    with read_write(cfg), open_dict(cfg):
        for name, found in vars(keys).items():
            texts = ",".join(f"'{key}'" for key in found if re.fullmatch(r"[\w./@:-]+", key))
            cfg.hydra.overrides.hydra.append(f"++{_PLACE}.{name}=[{texts}]")


def select(root: DictConfig, plain: Mapping[str, Any], *, reads_experiment: bool = True) -> dict[str, Value]:
    """Returns a run's hyperparameters, those that its sweep varies first.

    All jobs of a sweep have those that it varies. There is no path among them: where a sweep varies a path, its last
    part is the value.

    Args:
        root: a config with Hydra's part.
        plain: the run's part, resolved.
        reads_experiment: False leaves out the keys of the experiment's file.
    """
    keys = _find_keys_of_job(root) or find_keys(root, reads_experiment=reads_experiment)
    choices, values, found = root.hydra.runtime.choices, dict(flatten(plain)), dict[str, Value]()
    for key in filter(_is_hyperparameter, keys.swept):
        value = _show(choices[key]) if key in choices else values.get(key, _show(_get(plain, key)))
        found[key] = PurePath(str(value)).name if _is_path(key, value) else value
    for key in filter(_is_hyperparameter, keys.fixed):
        if key in choices:
            chosen: dict[str, Value] = {} if choices[key] is None else {key: _show(choices[key])}
        else:
            chosen = {name: values[name] for name in values if name == key or name.startswith(f"{key}.")}
        found |= {name: value for name, value in chosen.items() if name not in found and not _is_path(name, value)}
    return found


def _find_keys_of_job(root: DictConfig) -> Keys | None:
    """Returns the keys that the sweep of a job left it; those that only the sweeper knows are varied as well."""
    place = OmegaConf.select(root, _PLACE)
    if root.hydra.mode != RunMode.MULTIRUN or place is None or place.get("swept") is None:
        return None
    keys = Keys(list(place.swept), list(place.fixed), list(place.constant))
    for text in root.hydra.overrides.task:
        key = _without_prefix(text.partition("=")[0])
        if key not in keys.constant and not any(f"{known}.".startswith(f"{key}.") for known in keys.swept):
            keys.swept.append(key)
    return keys


def merge(recorded: Any, found: Mapping[str, Value], plain: Mapping[str, Any]) -> dict[str, Value]:
    """Returns the hyperparameters of a run that goes on: those of its start at their present values, then new ones.

    Args:
        recorded: what run.json says; anything in it that is no hyperparameter is left out.
        found: those of this start.
        plain: the run's config, resolved.
    """
    values, merged = dict(flatten(plain)), dict[str, Value]()
    for key, before in list(recorded.items())[:_LONGEST_RECORD] if isinstance(recorded, dict) else ():
        if isinstance(before, (bool, int, float, str)) and _is_hyperparameter(str(key)):
            value = found.get(key, values.get(key, before))
            merged[key] = before if _is_path(key, value) else value
    return merged | {key: value for key, value in found.items() if key not in merged}


def _is_hyperparameter(key: str) -> bool:
    return re.split(r"[./@]", key)[0] not in _NO_HYPERPARAMETERS


def _is_path(key: str, value: Any) -> bool:
    if not isinstance(value, str) or value in ("null", _ABSENT):
        return False
    if _PATH_KEY.fullmatch(key.rpartition(".")[2]) or value.startswith(("/", "~", "./", "../", "file:", '["/')):
        return True
    with contextlib.suppress(OSError, ValueError):  # too long, or no text for a file system
        return "/" in value and Path(value).exists()
    return False


def _get(plain: Any, key: str) -> Any:
    for name in key.split("."):
        if not isinstance(plain, dict) or name not in plain:
            return _ABSENT
        plain = plain[name]
    return plain


def _show(value: Any) -> Value:
    """Returns a value as TensorBoard shows it: a number, a bool or a text."""
    if isinstance(value, (ListConfig, DictConfig)):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**1000:
        return str(value)
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)


def flatten(node: Any, key: str = "") -> Iterator[tuple[str, Value]]:
    """Yields the dotted keys of a plain config with values that TensorBoard shows."""
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from flatten(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, _show(node)


def run_label(overrides: Any, constant: Any = None) -> str:
    """Returns a folder name for a sweep's job: the overrides that its sweep varies, in at most 72 characters.

    A key is shown by its last part, or as many as tell it from the others. Where nothing varies, all are shown.

    Args:
        overrides: of the job, or one text.
        constant: the keys that are the same in all jobs.
    """
    texts = [overrides] if isinstance(overrides, str) else _texts(overrides)
    keys = [_without_prefix(text.partition("=")[0]) for text in texts]
    swept = [at for at, key in enumerate(keys) if key not in _texts(constant)] or range(len(texts))
    names = _shorten_keys([keys[at] for at in swept])
    parts = [
        _clean(f"{name}{equals}{value}")
        for name, at in zip(names, swept, strict=True)
        for _, equals, value in [texts[at].partition("=")]
    ]
    label = _cut(",".join(_cut_parts(parts)), _LONGEST_LABEL)
    return re.sub(r"[^\x00-\x7f]+", "-", label) if len(label.encode()) > 200 else label or "job"


def _texts(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, Iterable) and not isinstance(values, str) else []


def _shorten_keys(keys: list[str]) -> list[str]:
    """Returns each key's last part, or as many as no other key ends with."""
    split = [re.split(r"[./@]", key) for key in keys]
    names = []
    for key, parts in zip(keys, split, strict=True):
        others = [other for other, text in zip(split, keys, strict=True) if text != key]
        count = 2 if parts[-1] == "_target_" else 1
        while count < len(parts) and any(other[-count:] == parts[-count:] for other in others):
            count += 1
        names.append(".".join(parts[-count:]))
    return names


def _clean(text: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "-", re.sub(r"['\"(){}\[\]]", "", text))


def _cut_parts(parts: list[str]) -> list[str]:
    """Returns the parts of a label, the longest cut until all fit."""
    limit = max(map(len, parts), default=0)
    while limit > _SHORTEST_PART and sum(min(len(part), limit) + 1 for part in parts) - 1 > _LONGEST_LABEL:
        limit -= 1
    return [_cut(part, limit) for part in parts]


def _cut(text: str, length: int) -> str:
    """Returns a text with its middle left out, where it is too long."""
    if len(text) <= length:
        return text
    num_first = (length - 2) // 2
    return f"{text[:num_first]}..{text[len(text) - (length - 2 - num_first) :]}"
