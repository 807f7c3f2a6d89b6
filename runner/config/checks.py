"""Checks of a composed config beyond its types, and the specification of the experiment that it describes.

Nothing here imports torch, so that a misspelt key is reported at once.
"""

from __future__ import annotations

import base64
import copy
import json
import re
from collections.abc import Iterator
from dataclasses import fields
from typing import Any

from omegaconf import MISSING, DictConfig, OmegaConf
from omegaconf.errors import InterpolationKeyError

from runner.config import optimizations
from runner.config.aliases import update_paths
from runner.config.composition import source
from runner.config.composition.expansion import MAX_CHARACTERS, MAX_DEPTH, check_expansion, check_resolved_size, walk
from runner.config.diff import get_value
from runner.config.errors import INSTANTIATED_KEYS, ConfigError, field_names, find_type_mistakes, shown_value
from runner.config.hparams import run_label
from runner.config.schema import (
    RESERVED_METRICS,
    CheckpointConfig,
    Config,
    DataConfig,
    DistributedConfig,
    ExportConfig,
    InitConfig,
    TrackingConfig,
    TrainerConfig,
    eval_datasets,
)
from runner.config.sections.data import find_data_mistakes
from runner.config.spec import ExperimentSpec, select_trackers
from runner.utils.files.strict_json import parse_json
from runner.utils.utils import one_line, suggest

CONF_DIR = source.CONF_DIR


def register_with_hydra() -> None:
    """Registers the schema, the resolvers and the source of YAML files with Hydra."""
    source.register_config_sources()
    optimizations.expand_when_composed()
    OmegaConf.register_new_resolver("run_label", run_label, replace=True)


_ENGINE_KEYS = [
    "model",
    "optimizer",
    "scheduler",
    "feeder",
    "loss",
    "metrics",
    "freeze",
    "optimizations",
    "ema",
    "init_from",
    "init",
    "every",
]
_SECTIONS: dict[str, type] = {
    "data": DataConfig,
    "distributed": DistributedConfig,
    "trainer": TrainerConfig,
    "checkpoint": CheckpointConfig,
    "export": ExportConfig,
    "tracking": TrackingConfig,
}
_DEFAULTS: dict[str, Any] = {  # values of keys that a `~` may delete
    "resume": None,
    "resume_allow_changes": False,
    "allow_targets": [],
    "pattern": None,
    "ema": None,
    "init": None,
    "engines": {},
    "updates": "joint",
    "feeder": None,
    "loss": None,
    "metrics": {},
    "train_metrics": False,
    "report": None,
    "callbacks": {},
    "trackers": {},
}
_PATTERN_REMEDY = "a model takes it by an argument of its own, as in model.pattern=${pattern}"
_LARGEST_SEED = 2**63 - 1
_AT_LEAST = {
    "seed": 0,
    "data.batch_size": 1,
    "data.num_workers": 0,
    "data.prefetch_factor": 1,
    "trainer.steps": 1,
    "trainer.accumulate": 1,
    "trainer.clip_norm": 0,
    "trainer.log_every": 0,
    "trainer.save_every": 0,
    "trainer.eval_every": 0,
    "trainer.export_every": 0,
    "trainer.keep_last": 0,
    "trainer.keep_every": 0,
    "trainer.keep_best": 0,
    "trainer.max_skips": 0,
    "distributed.nnodes": 1,
    "distributed.max_restarts": 0,
    "distributed.timeout_s": 1,
    "distributed.rdzv_timeout_s": 1,
}
_LONGEST_NAME = 200  # characters: a file name has up to 255 bytes, with its suffixes
EXPORT_DTYPES = ("bf16", "fp16", "fp32")
_BACKENDS = ("auto", "gloo", "nccl")
_MAX_JSON = 20 * MAX_CHARACTERS  # characters: an escaped one has six, and there are brackets and marks
_ITEMS, _BYTES = "_items_", "_bytes_"  # marks in the JSON of a config


def check_config(cfg: DictConfig) -> ExperimentSpec:
    """Checks a composed config beyond its types; returns the specification of its experiment.

    Raises:
        ConfigError: with a line for every key that is missing, unknown or out of range.
    """
    if absent := _absent_keys(cfg):
        raise ConfigError("\n".join(absent))
    check_expansion(cfg)
    resolved = _resolve(cfg)
    unresolved = OmegaConf.to_container(cfg, resolve=False)
    mistakes = [*_unknown_keys(cfg), *_mixed_keys(unresolved), *_unbuildable(unresolved), *_range_mistakes(cfg)]
    missing = sorted(key for key in OmegaConf.missing_keys(cfg) if not key.startswith("hydra"))
    mistakes += [f"{key}: has no value; set it in the YAML or on the command line" for key in missing]
    mistakes += [*_engine_mistakes(cfg), *_callback_mistakes(unresolved), *_metric_mistakes(unresolved)]
    mistakes += _input_mistakes(cfg)
    if not mistakes:
        mistakes += _batch_mistakes(cfg) + _process_mistakes(cfg.distributed) + optimizations.find_mistakes(resolved)
        mistakes += [*_pattern_mistakes(resolved), *_stdin_mistakes(cfg), *find_data_mistakes(resolved["data"])]
        mistakes += _export_mistakes(cfg)
    mistakes += [*_text_mistakes(cfg), *_all_init_mistakes(resolved)]
    if mistakes:
        raise ConfigError("\n".join(map(one_line, mistakes)))
    return ExperimentSpec.from_plain(optimizations.expand(resolved))


def _range_mistakes(cfg: DictConfig) -> list[str]:
    values = {key: OmegaConf.select(cfg, key) for key in _AT_LEAST}
    # `not >=` is true of NaN, too.
    low = {key: value for key, value in values.items() if value is not None and not value >= _AT_LEAST[key]}
    mistakes = [f"{key}={value}: expected {_AT_LEAST[key]} or more" for key, value in low.items()]
    if (OmegaConf.select(cfg, "seed", throw_on_missing=False) or 0) > _LARGEST_SEED:
        mistakes.append(f"seed={cfg.seed}: expected at most {_LARGEST_SEED}")
    return mistakes


def _text_mistakes(cfg: DictConfig) -> list[str]:
    """Returns the mistakes of texts that name a folder, a metric or modules, and of a `sign` without `resume`."""
    mistakes = []
    if not re.fullmatch(r"[\w.+-]+", cfg.name):
        mistakes.append(f"name={cfg.name!r}: expected letters, digits, '.', '_', '+' and '-' (it names a folder)")
    best_metric = OmegaConf.select(cfg, "trainer.best_metric", throw_on_missing=False) or ""
    if best_metric != one_line(best_metric):
        mistakes.append(f"trainer.best_metric={best_metric}: expected the name of a metric, without control characters")
    if OmegaConf.select(cfg, "sign", throw_on_missing=False):
        mistakes.append("sign=true: signs the run that goes on; give it with resume=")
    prefixes = OmegaConf.select(cfg, "allow_targets", throw_on_missing=False) or []
    wrong = [prefix for prefix in prefixes if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*", prefix, re.ASCII)]
    return mistakes + [f"allow_targets: {prefix!r} is no module prefix; expected own or own.models" for prefix in wrong]


def _engine_mistakes(cfg: DictConfig) -> list[str]:
    """Returns the mistakes of the names of engines, which name files, and of entries that are no mappings."""
    mistakes = []
    engines = _engines_of(cfg)
    for name in engines:
        if not re.fullmatch(rf"[A-Za-z][A-Za-z0-9_-]{{0,{_LONGEST_NAME - 1}}}", name):
            expected = f"a letter, then letters, digits, '_', '-', {_LONGEST_NAME} in all at most (it names files)"
            mistakes.append(f"engines.{name}: expected {expected}")
        elif not OmegaConf.is_dict(engines[name]):
            mistakes.append(f"engines.{name}: expected a mapping of {', '.join(_ENGINE_KEYS)}; {{}} is one too")
        elif type(every := engines[name].get("every", 1)) is not int or every < 1:
            mistakes.append(f"engines.{name}.every={every}: expected a whole number of steps from 1 on")
        elif every > 1 and "optimizer" in engines[name] and engines[name].optimizer is None:
            mistakes.append(
                f"engines.{name}.every={every}: it is never trained, for its optimizer is null; leave it out"
            )
    if len({name.lower() for name in engines}) < len(engines):
        mistakes.append("engines: names differ in case alone; their files would collide on some disks")
    return mistakes


def _callback_mistakes(plain: Any) -> Iterator[str]:
    """Yields the mistakes of callbacks that are no objects to build, or whose names are no keys."""
    for name, node in (get_value(plain, ["callbacks"], None) or {}).items():
        if not re.fullmatch(r"[A-Za-z]\w*", str(name), re.ASCII):
            yield f"callbacks.{name}: expected a name of letters, digits and '_'"
        elif not isinstance(node, dict | None):
            found = shown_value(node)
            yield f"callbacks.{name}={found}: expected a mapping with _target_, the path of a class, or null for none"
        elif node is not None and "_target_" not in node:
            yield f"callbacks.{name}: has no _target_; choose it: callbacks=[{name}], or add callbacks.{name}._target_"


def _metric_mistakes(plain: Any) -> list[str]:
    """Returns the mistakes of `metrics`, whose names become those of numbers."""
    mistakes = []
    engines = get_value(plain, ["engines"], None)
    sections = {"": plain} | {f"engines.{name}.": engine for name, engine in (engines or {}).items()}
    for prefix, section in sections.items():
        metrics = get_value(section, ["metrics"], None)
        if not isinstance(metrics, (dict, type(None))):
            mistakes.append(f"{prefix}metrics={shown_value(metrics)}: expected a mapping of names to metrics")
            continue
        for name, node in (metrics or {}).items():
            key = f"{prefix}metrics.{name}"
            if not re.fullmatch(r"[A-Za-z0-9_.@+-]+", str(name)):
                mistakes.append(f"{key}: expected a name of letters, digits, '_', '.', '@', '+' and '-'")
            elif re.fullmatch(RESERVED_METRICS, str(name)):
                mistakes.append(f"{key}: the runner logs a number of this name itself; call it something else")
            elif not isinstance(node, (dict, type(None))) and "${" not in str(node):
                expected = "expected a mapping with _target_, the dotted path of a class or function"
                mistakes.append(f"{key}={shown_value(node)}: {expected}")
    return mistakes


def _input_mistakes(cfg: DictConfig) -> list[str]:
    """Returns the mistake of a `data.input` that is neither a key of the batch nor a list of keys."""
    node = OmegaConf.select(cfg, "data.input")
    keys = list(node) if OmegaConf.is_list(node) else [node]
    is_known = node is None or (bool(keys) and all(isinstance(key, str) for key in keys))
    return [] if is_known else [f"data.input={shown_value(node)}: expected a key of the batch, a list of keys, or null"]


def _all_init_mistakes(resolved: dict[str, Any]) -> Iterator[str]:
    """Yields the mistakes of the initial weights of all engines and of each."""
    yield from _init_mistakes("", resolved)
    for name, values in (resolved["engines"] or {}).items():
        yield from _init_mistakes(f"engines.{name}.", values) if isinstance(values, dict) else ()


def _init_mistakes(prefix: str, values: Any) -> list[str]:
    """Returns the mistakes of the initial weights of all engines, or those of one engine.

    Args:
        prefix: of the engine's keys.
        values: the mapping that has the keys `init` and `init_from`.
    """
    path, init = values.get("init_from"), values.get("init")
    key = f"{prefix}init"
    if not isinstance(path, (str, type(None))):
        return [f"{prefix}init_from={path}: expected a path or null"]
    if init is None:
        return []
    if not isinstance(init, dict):
        keys = ", ".join(field_names(InitConfig))
        return [f"{key}={init}: expected a mapping of {keys}; for a path alone: {prefix}init_from={init}"]
    if path is not None:
        return [f"{prefix}init_from={path}: expected one of init_from and init, found both; set {key}.path={path}"]
    known = field_names(InitConfig)
    mistakes = [f"{key}.{name}: no such key; {suggest(str(name), known)}" for name in init if name not in known]
    mistakes += find_type_mistakes(InitConfig, init, key) or _number_mistakes(key, init)
    if init.get("path") is None:
        mistakes.append(f"{key}.path: expected a run, a checkpoint, or a file or folder of weights; found null")
    return mistakes or _rename_mistakes(f"{key}.rename", init.get("rename", {}))


def _number_mistakes(key: str, init: dict[str, Any]) -> list[str]:
    """Returns the mistakes of numbers and booleans in place of texts, which OmegaConf accepts as texts."""
    rules = init.get("rename") or {}
    texts = {"path": [init.get("path") or ""], "rename": [*rules, *rules.values()]}
    texts |= {name: init.get(name) or [] for name in ("include", "exclude")}
    mistakes = []
    for name, values in texts.items():
        wrong = [value for value in values if not isinstance(value, str)]
        mistakes += [f"{key}.{name}: expected a text, found {value}; put it into quotes" for value in wrong]
    return mistakes


def _rename_mistakes(key: str, rules: dict[str, str]) -> list[str]:
    """Returns the mistakes of regular expressions and replacements."""
    mistakes = []
    for pattern, replacement in rules.items():
        try:
            re.compile(pattern).sub(replacement, "")
        except (re.error, RecursionError, OverflowError, IndexError) as error:
            mistakes.append(
                f"{key}: {pattern!r}: {replacement!r}: expected a regular expression and its replacement; {error}"
            )
    return mistakes


def _absent_keys(cfg: DictConfig) -> list[str]:
    """Returns the mistakes of keys and sections without a default that a `~` has deleted."""
    required = [key for key in field_names(Config) if key not in _DEFAULTS]
    deleted = [key for key in required if key not in cfg and not OmegaConf.is_missing(cfg, key)]
    mistakes = [f"{key}: it is deleted, and has no default; leave ~{key} out" for key in deleted]
    for section, kind in _SECTIONS.items():
        needed = [field.name for field in fields(kind) if field.default is MISSING]
        is_whole = OmegaConf.is_missing(cfg, section)
        num_missing = 0 if is_whole else sum(OmegaConf.is_missing(cfg[section], key) for key in needed)
        if is_whole or (num_missing > 1 and 2 * num_missing >= len(needed)):
            mistakes.append(f"{section}: nothing is chosen; leave ~{section} out, or choose one: {section}=...")
    return mistakes


def _unknown_keys(cfg: DictConfig) -> list[str]:
    """Returns the mistakes of keys that a `+` has added to the runner's own sections."""
    known = {section: field_names(kind) for section, kind in {"": Config, **_SECTIONS}.items()}
    known |= {f"engines.{name}": _ENGINE_KEYS for name in _engines_of(cfg)}
    mistakes = []
    for section, keys in known.items():
        node = OmegaConf.select(cfg, section) if section else cfg
        unknown = [str(key) for key in node if key not in keys] if OmegaConf.is_dict(node) else []
        mistakes += [f"{section}.{key}: no such key; {suggest(key, keys)}".lstrip(".") for key in unknown]
    return mistakes


def _engines_of(cfg: DictConfig) -> dict[str, Any]:
    return OmegaConf.select(cfg, "engines") or {}


def _unbuildable(plain: Any) -> Iterator[str]:
    """Yields the mistakes of keys that hold neither a mapping nor nothing, where an object is built."""
    for key in INSTANTIATED_KEYS:
        node = get_value(plain, key.split("."), None)
        is_open = node is None or isinstance(node, dict) or (isinstance(node, str) and ("${" in node or node == "???"))
        is_several = isinstance(node, list) and key in ("data.train", "data.eval")  # `targets` reports a list
        if key == "data.eval" and isinstance(node, dict):
            yield from _eval_mistakes(node)
        if not is_open and not is_several:
            yield f"{key}={shown_value(node)}: expected a mapping with _target_, the dotted path of a class or function"


def _eval_mistakes(node: dict[Any, Any]) -> Iterator[str]:
    """Yields the mistakes of a `data.eval` that names several datasets."""
    if node.get("_target_") is not None:
        return
    expected = "expected one dataset with _target_, or datasets by name: {a: {_target_: ...}, b: {_target_: ...}}"
    if not any(dataset is not None for dataset in node.values()):
        yield f"data.eval={{}}: {expected}; null for none"
    for name, dataset in node.items():
        if not re.fullmatch(r"[A-Za-z0-9_.+-]+", str(name)):
            yield f"data.eval.{name}: expected a name of letters, digits, '.', '_', '+' and '-' (it names numbers)"
        elif isinstance(dataset, str) and "${" in dataset:
            continue
        elif not isinstance(dataset, (dict, type(None))):
            yield f"data.eval.{name}={shown_value(dataset)}: {expected}"


def _mixed_keys(plain: Any) -> Iterator[str]:
    """Yields the mistakes of keys that are numbers in the YAML, but texts in a dotted key of the command line."""
    for place, node in walk(plain):
        path = ".".join(map(str, place))
        if isinstance(node, dict) and any(type(key) is int for key in node):
            for key in [key for key in node if isinstance(key, str) and re.fullmatch(r"-?\d+", key)]:
                yield f"{path}.{key}: expected a number as the key, found the text {key!r}; set {path}={{{key}: ...}}"


def _export_mistakes(cfg: DictConfig) -> list[str]:
    dtype = cfg.export.dtype
    is_known = dtype is None or dtype in EXPORT_DTYPES
    return [] if is_known else [f"export.dtype={dtype}: {suggest(str(dtype), [*EXPORT_DTYPES])}, or null"]


def _stdin_mistakes(cfg: DictConfig) -> list[str]:
    stdin = cfg.tracking.stdin
    is_known = isinstance(stdin, bool) or stdin == "auto"
    return [] if is_known else [f"tracking.stdin={stdin}: expected auto, true or false"]


def _pattern_mistakes(resolved: dict[str, Any]) -> list[str]:
    pattern = resolved.get("pattern")
    is_taken = pattern is None or any(node == pattern for _, node in walk({**resolved, "pattern": None}))
    return [] if is_taken else [f"pattern: nothing takes it; {_PATTERN_REMEDY}"]


def _batch_mistakes(cfg: DictConfig) -> list[str]:
    engines = _engines_of(cfg)
    has_own_models = engines and all(OmegaConf.is_dict(engine) and "model" in engine for engine in engines.values())
    train = "data.train" if OmegaConf.select(cfg, "data.mix") is None else "data.mix"
    needed = [train, *([] if has_own_models else ["model"])]
    if empty := [key for key in needed if OmegaConf.select(cfg, key) is None]:
        return [f"{key}: nothing is chosen; a run needs one" for key in empty]
    size, parts = cfg.data.batch_size, cfg.trainer.accumulate
    if size % parts:
        return [f"data.batch_size={size}: expected a multiple of trainer.accumulate={parts}, its number of parts"]
    if cfg.trainer.eval_every and not eval_datasets(cfg.data.eval):
        every = cfg.trainer.eval_every
        return [f"trainer.eval_every={every}: data.eval has no dataset; add one, or set trainer.eval_every=0"]
    if cfg.trainer.keep_best and not cfg.trainer.eval_every:
        every, best = "trainer.eval_every=0", f"trainer.keep_best={cfg.trainer.keep_best}"
        return [f"{best}: {every} evaluates nothing that could be best; set trainer.eval_every=100, or keep_best=0"]
    return []


def _process_mistakes(cfg: DictConfig) -> list[str]:
    """Returns the mistakes of the number of processes, the backend and the rendezvous endpoint."""
    mistakes, count = [], cfg.nproc_per_node
    if count != "auto" and (type(count) is not int or count < 1):
        mistakes.append(f"distributed.nproc_per_node={count}: expected auto, or a number from 1 on")
    if cfg.backend not in _BACKENDS:
        mistakes.append(f"distributed.backend={cfg.backend}: {suggest(str(cfg.backend), list(_BACKENDS))}")
    if cfg.strategy is None and (count not in (1, "auto") or cfg.nnodes > 1):
        key = "nnodes" if cfg.nnodes > 1 else "nproc_per_node"
        mistakes.append(f"distributed.{key}={cfg[key]}: it trains on one process; choose distributed=ddp or fsdp")
    is_address = re.fullmatch(r"[^:]+:\d+", cfg.rdzv_endpoint or "") is not None
    if not is_address and (cfg.nnodes > 1 or cfg.rdzv_endpoint is not None):
        found = f"distributed.rdzv_endpoint={cfg.rdzv_endpoint} with nnodes={cfg.nnodes}"
        mistakes.append(f"{found}: expected host:port of one of the machines, the same on all")
    return mistakes


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """Returns the config as plain dicts and lists, interpolations resolved, enums as their names.

    An escaped `\\${...}` becomes the text `${...}`, so a text of the result must not be resolved again.

    Raises:
        ConfigError: its interpolations expand beyond the limit.
    """
    check_expansion(cfg)
    return optimizations.expand(_resolve(cfg))


def _resolve(cfg: DictConfig) -> dict[str, Any]:
    try:
        plain: Any = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    except InterpolationKeyError as error:
        if error.full_key != "pattern.num_codebooks":
            raise
        remedy = f"set pattern.num_codebooks=... ({_PATTERN_REMEDY})"
        raise ConfigError(f"{error.full_key}: this data does not tell it; {remedy}") from error
    deleted = {key: copy.copy(value) for key, value in _DEFAULTS.items() if key not in plain}
    return select_trackers(dict(update_paths(plain)) | deleted)


def to_json(plain: Any) -> str:
    """Returns a resolved config as JSON that `from_json` reads; marks keys that are no text, and bytes."""
    return json.dumps(_mark(plain), default=str)


def _mark(value: Any) -> Any:
    if isinstance(value, list):
        return [_mark(child) for child in value]
    if isinstance(value, bytes):
        return {_BYTES: base64.b64encode(value).decode()}
    if not isinstance(value, dict):
        return value
    if all(isinstance(key, str) for key in value) and not value.keys() & {_BYTES, _ITEMS}:
        return {key: _mark(child) for key, child in value.items()}
    return {_ITEMS: [[_mark(key), _mark(child)] for key, child in value.items()]}


def from_json(text: str) -> Any:
    """Returns the config that `to_json` wrote.

    Raises:
        ValueError, TypeError: another program wrote it.
    """
    if len(text) > _MAX_JSON:
        raise ValueError(f"it has {len(text):,} characters, expected {_MAX_JSON:,} at most")
    found = _unmark(parse_json(text, 3 * MAX_DEPTH))
    check_resolved_size(found)
    return found


def _unmark(value: Any) -> Any:
    if isinstance(value, list):
        return [_unmark(child) for child in value]
    if not isinstance(value, dict):
        return value
    if value.keys() == {_BYTES}:
        return base64.b64decode(value[_BYTES])
    if value.keys() == {_ITEMS}:
        return {_unmark(key): _unmark(child) for key, child in value[_ITEMS]}
    return {key: _unmark(child) for key, child in value.items()}
