"""The hyperparameters of a run: the keys that its command line, experiment or sweep sets, and their values.

The folder of a sweep's job is named by the keys that the sweep varies.
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

from runner.config.diff import get_value

Value = bool | int | float | str

_CALLBACK_KEY = "hydra.callbacks.run_folder"  # holds a sweep's hyperparameter keys in the config of each job
_SEARCH_SPACE_KEYS = (
    "params",
    "search_space",
    "parametrization",
    "ax_config.params",
)  # of sweepers
_ABSENT = "(none)"  # value of a key that only other jobs of the sweep have
_EXCLUDED_KEYS = ("resume", "resume_allow_changes", "allow_targets", "hydra", "defaults", "trackers")
_PATH_KEY = re.compile(r"(.*_)?(path|paths|dir|dirs|directory|folder|folders|file|files|root)")
_MAX_LABEL_LENGTH = 72  # 80 with the job's number before it
_MIN_PART_LENGTH = 12
_MAX_NUM_RECORDED = 1000


@dataclass
class HyperparameterKeys:
    """The keys of a run's hyperparameters.

    Attributes:
        swept: the keys that the jobs of the sweep vary.
        fixed: the keys that are set to one value for all jobs.
        constant: the keys of the overrides that are the same for all jobs; an override may set a mapping of keys.
    """

    swept: list[str]
    fixed: list[str]
    constant: list[str]


def find_keys(cfg: DictConfig, *, reads_experiment: bool = True) -> HyperparameterKeys:
    """Returns the keys that the command line and the experiment of a composed config set.

    Args:
        cfg: the config of a run, or of a sweep as a whole, whose overrides apply to all its jobs.
        reads_experiment: False leaves out the keys of the experiment's file.
    """
    overrides = _find_overrides(cfg)
    varied = [key for key, override in overrides.items() if override is None or override.is_sweep_override()]
    constant = [key for key in overrides if key not in varied]
    swept = dict.fromkeys(name for key in varied for name in _expand(key, overrides[key]))
    fixed = dict.fromkeys(name for key in constant for name in _expand(key, overrides[key]))
    if reads_experiment:
        is_swept = "experiment" in swept
        choice = cfg.hydra.runtime.choices.get("experiment")
        experiments = _list_swept_experiments(overrides["experiment"]) if is_swept else _split_choice(choice)
        names = [name for name in _find_experiment_keys(cfg, experiments) if name not in fixed]
        (swept if is_swept else fixed).update(dict.fromkeys(names))
    return HyperparameterKeys(list(swept), [key for key in fixed if key not in swept], constant)


def _find_overrides(cfg: DictConfig) -> dict[str, Override | None]:
    """Returns the last override of each key; None for a search space in a sweeper's own format."""
    overrides: dict[str, Override | None] = {}
    if cfg.hydra.mode == RunMode.MULTIRUN:
        for key, value in _read_search_spaces(cfg.hydra.sweeper):
            overrides[_strip_prefix(key)] = None if isinstance(value, Mapping) else _parse(f"{key}={value}")
    for override in _make_parser().parse_overrides([*cfg.hydra.overrides.task]):
        if not override.is_delete():
            overrides[_strip_prefix(override.get_key_element())] = override
    return overrides


def _read_search_spaces(sweeper: Any) -> Iterator[tuple[str, Any]]:
    for space_key in _SEARCH_SPACE_KEYS:
        space = OmegaConf.select(sweeper, space_key, throw_on_missing=False)
        if isinstance(space, DictConfig):
            content: Any = OmegaConf.to_container(space, resolve=False)
            yield from ((str(key), value) for key, value in content.items())
        for text in space if isinstance(space, ListConfig) else ():
            yield str(text).partition("=")[0], str(text).partition("=")[2]


def _parse(text: str) -> Override | None:
    with contextlib.suppress(HydraException):
        return _make_parser().parse_override(text)
    return None


def _make_parser() -> OverridesParser:
    hydra = GlobalHydra.instance()
    return OverridesParser.create(hydra.config_loader() if hydra.is_initialized() else None)  # expands glob(...)


def _strip_prefix(key: str) -> str:
    return key.lstrip("+~")


def _expand(key: str, override: Override | None) -> list[str]:
    """Returns the key of an override, or the dotted keys of the mapping that it sets."""
    value = override.value() if override else None
    values = value.list if isinstance(value, ChoiceSweep) else [value]
    if not all(isinstance(value, dict) and value for value in values):
        return [key]
    return list(dict.fromkeys(name for value in values for name, _ in flatten(value, key)))


def _list_swept_experiments(override: Override | None) -> list[str]:
    """Returns the experiments that a sweep chooses from, or none if the override does not list them."""
    choices: list[str] = []
    with contextlib.suppress(HydraException, AssertionError):
        for text in override.sweep_string_iterator() if override else ():
            choices += _split_choice(text)
    return choices


def _split_choice(choice: Any) -> list[str]:
    """Returns the names in a group's choice, which is a name, a list of names, or such a list as text."""
    if isinstance(choice, (list, ListConfig)):
        return [str(name) for name in choice]
    return [] if choice is None else [name.strip(" '\"") for name in str(choice).strip("[]").split(",")]


def _find_experiment_keys(cfg: DictConfig, names: list[str]) -> Iterator[str]:
    """Yields the keys that experiments set and the groups that they override, also through their base experiments."""
    path = ConfigSearchPathImpl()
    for source in cfg.hydra.runtime.config_sources:
        path.append(source.provider, f"{source.schema}://{source.path}")
    repository = ConfigRepository(path)
    files = [f"experiment/{name}" for name in dict.fromkeys(names)]
    for file in files:  # the list grows
        loaded = None
        with contextlib.suppress(Exception):  # a swept file with a mistake, reported by the job that chooses it
            loaded = repository.load_config(file)
        if loaded is None:
            continue
        for default in loaded.defaults_list or []:
            group = default.group if isinstance(default, GroupDefault) else None
            if group is None or (not group.startswith("/") and not default.is_override()):  # a base experiment
                base = default.value if isinstance(default, GroupDefault) else default.path  # type: ignore[attr-defined]
                folder = file.rpartition("/")[0] + (f"/{group}" if group else "")
                bases = [name for name in _split_choice(base) if name != "_self_"]
                paths = [name[1:] if name.startswith("/") else f"{folder}/{name}" for name in bases]
                files += [path for path in paths if path not in files]
            elif not group.startswith(("hydra/", "/hydra/")):
                yield group.lstrip("/") + (f"@{default.package}" if default.package else "")
        package = loaded.header.get("package") or "experiment"
        content = OmegaConf.to_container(loaded.config, resolve=False)
        if content:
            yield from (name for name, _ in flatten(content, "" if package == "_global_" else package))


def pass_keys_to_jobs(cfg: DictConfig) -> None:
    """Adds a sweep's hyperparameter keys to the overrides with which Hydra composes the config of each job."""
    with read_write(cfg), open_dict(cfg):
        for name, keys in vars(find_keys(cfg)).items():
            texts = ",".join(f"'{key}'" for key in keys if re.fullmatch(r"[\w./@:-]+", key))
            cfg.hydra.overrides.hydra.append(f"++{_CALLBACK_KEY}.{name}=[{texts}]")


def select_hyperparameters(
    root: DictConfig, plain: Mapping[str, Any], *, reads_experiment: bool = True
) -> dict[str, Value]:
    """Returns a run's hyperparameters, first those that its sweep varies.

    All jobs of a sweep have the same swept keys. A path is not a hyperparameter, but if a sweep varies a path, its
    last part is the value.

    Args:
        root: a config that includes Hydra's section.
        plain: the run's config without that section, resolved.
        reads_experiment: False leaves out the keys of the experiment's file.
    """
    keys = _read_job_keys(root) or find_keys(root, reads_experiment=reads_experiment)
    choices = root.hydra.runtime.choices
    values = dict(flatten(plain)) | _read_typed_optimizations(root)
    hyperparameters = dict[str, Value]()
    for key in filter(_is_hyperparameter, keys.swept):
        value = (
            _to_value(choices[key])
            if key in choices
            else values.get(key, _to_value(get_value(plain, key.split("."), _ABSENT)))
        )
        hyperparameters[key] = PurePath(str(value)).name if _is_path(key, value) else value
    for key in filter(_is_hyperparameter, keys.fixed):
        if key in choices:
            chosen: dict[str, Value] = {} if choices[key] is None else {key: _to_value(choices[key])}
        else:
            names = [key] if key in values else [name for name in values if name.startswith(f"{key}.")]
            chosen = {name: values[name] for name in names}
        new_names = [name for name in chosen if name not in hyperparameters]
        hyperparameters |= {name: chosen[name] for name in new_names if not _is_path(name, chosen[name])}
    return hyperparameters


def _read_typed_optimizations(root: DictConfig) -> dict[str, Value]:
    """Returns the values of optimizations as typed: the config holds all arguments of what `true` enables."""
    typed = dict[str, Value]()
    for override in _make_parser().parse_overrides([*root.hydra.overrides.task]):
        key = _strip_prefix(override.get_key_element())
        if key.startswith("optimizations.") and not override.is_delete() and not override.is_sweep_override():
            typed |= flatten(override.value(), key)
    return typed


def _read_job_keys(root: DictConfig) -> HyperparameterKeys | None:
    """Returns the keys that a sweep stored in its job's config; keys that only the sweeper knows count as swept."""
    stored = OmegaConf.select(root, _CALLBACK_KEY)
    if root.hydra.mode != RunMode.MULTIRUN or stored is None or stored.get("swept") is None:
        return None
    keys = HyperparameterKeys(list(stored.swept), list(stored.fixed), list(stored.constant))
    for text in root.hydra.overrides.task:
        key = _strip_prefix(text.partition("=")[0])
        if key not in keys.constant and not any(f"{known}.".startswith(f"{key}.") for known in keys.swept):
            keys.swept.append(key)
    return keys


def merge_hyperparameters(recorded: Any, current: Mapping[str, Value], plain: Mapping[str, Any]) -> dict[str, Value]:
    """Returns the hyperparameters of a resumed run: the recorded ones with their current values, then new ones.

    Args:
        recorded: the hyperparameters in run.json; invalid entries are left out.
        current: the hyperparameters of this start.
        plain: the run's config, resolved.
    """
    values = dict(flatten(plain))
    merged = dict[str, Value]()
    for key, before in list(recorded.items())[:_MAX_NUM_RECORDED] if isinstance(recorded, dict) else ():
        if isinstance(before, (bool, int, float, str)) and _is_hyperparameter(str(key)):
            value = current.get(key, values.get(key, before))
            merged[key] = before if _is_path(key, value) else value
    return merged | {key: value for key, value in current.items() if key not in merged}


def _is_hyperparameter(key: str) -> bool:
    return re.split(r"[./@]", key)[0] not in _EXCLUDED_KEYS


def _is_path(key: str, value: Any) -> bool:
    if not isinstance(value, str) or value in ("null", _ABSENT):
        return False
    if _PATH_KEY.fullmatch(key.rpartition(".")[2]) or value.startswith(("/", "~", "./", "../", "file:", '["/')):
        return True
    with contextlib.suppress(OSError, ValueError):  # too long, or invalid as a path
        return "/" in value and Path(value).exists()
    return False


def _to_value(value: Any) -> Value:
    """Returns a value in a form that TensorBoard shows: a number, a bool or a text."""
    if isinstance(value, (ListConfig, DictConfig)):
        value = OmegaConf.to_container(value, resolve=True)
    if isinstance(value, int) and not isinstance(value, bool) and abs(value) > 2**1000:
        return str(value)
    return value if isinstance(value, (bool, int, float, str)) else json.dumps(value, default=str)


def flatten(node: Any, key: str = "") -> Iterator[tuple[str, Value]]:
    """Yields the dotted keys of a plain config, and values in a form that TensorBoard shows."""
    if isinstance(node, dict) and node:
        for name, value in node.items():
            yield from flatten(value, f"{key}.{name}" if key else str(name))
    else:
        yield key, _to_value(node)


def run_label(overrides: Any, constant: Any = None) -> str:
    """Returns a folder name for a sweep's job: the overrides that its sweep varies, in at most 72 characters.

    A key is shortened to its last parts, as many as distinguish it from the others. If nothing varies, all overrides
    are used.

    Args:
        overrides: the overrides of the job, as a list or one text.
        constant: the keys whose overrides are the same for all jobs.
    """
    texts = [overrides] if isinstance(overrides, str) else _to_texts(overrides)
    keys = [_strip_prefix(text.partition("=")[0]) for text in texts]
    swept = [index for index, key in enumerate(keys) if key not in _to_texts(constant)] or range(len(texts))
    names = _shorten_keys([keys[index] for index in swept])
    assignments = [texts[index].partition("=") for index in swept]
    parts = [
        _remove_special_characters(f"{name}{equals}{value}")
        for name, (_, equals, value) in zip(names, assignments, strict=True)
    ]
    label = _shorten_middle(",".join(_shorten_parts(parts)), _MAX_LABEL_LENGTH)
    return re.sub(r"[^\x00-\x7f]+", "-", label) if len(label.encode()) > 200 else label or "job"


def _to_texts(values: Any) -> list[str]:
    return [str(value) for value in values] if isinstance(values, Iterable) and not isinstance(values, str) else []


def _shorten_keys(keys: list[str]) -> list[str]:
    """Returns the last parts of each key, as many as no other key ends with."""
    split = [re.split(r"[./@]", key) for key in keys]
    names = []
    for key, parts in zip(keys, split, strict=True):
        others = [other for other, other_key in zip(split, keys, strict=True) if other_key != key]
        count = 2 if parts[-1] == "_target_" else 1
        while count < len(parts) and any(other[-count:] == parts[-count:] for other in others):
            count += 1
        names.append(".".join(parts[-count:]))
    return names


def _remove_special_characters(text: str) -> str:
    return re.sub(r"[^\w.,=+-]+", "-", re.sub(r"['\"(){}\[\]]", "", text))


def _shorten_parts(parts: list[str]) -> list[str]:
    """Returns the parts of a label, the longest shortened until all fit."""
    limit = max(map(len, parts), default=0)
    while limit > _MIN_PART_LENGTH and sum(min(len(part), limit) + 1 for part in parts) - 1 > _MAX_LABEL_LENGTH:
        limit -= 1
    return [_shorten_middle(part, limit) for part in parts]


def _shorten_middle(text: str, length: int) -> str:
    """Returns a text with its middle left out if it is longer than `length` characters."""
    if len(text) <= length:
        return text
    num_first = (length - 2) // 2
    return f"{text[:num_first]}..{text[len(text) - (length - 2 - num_first) :]}"
