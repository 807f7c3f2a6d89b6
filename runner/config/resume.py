"""Resumes a run: finds it by `resume=`, and applies this command line's overrides to its saved config.

The saved config is the truth: neither the YAML files nor the overrides that it was composed of are composed again. A
value (`optimizer.lr=0.1`) is set on it, and a choice of a group (`optimizer=sgd`) replaces that node. A run's files are
untrusted until `config.trust` has checked them.
"""

from __future__ import annotations

import contextlib
import copy
import os
import re
import shlex
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override, OverrideType
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from runner.config import checks, diff, errors, optimizations, run_folder
from runner.config.composition.interpolation import quote
from runner.config.errors import ConfigError, shown
from runner.config.run_folder import COMMAND_LINE_KEYS
from runner.config.sections.data import without_workers
from runner.config.trust import allowlist, signature
from runner.config.trust.allowlist import Allowlist
from runner.config.trust.signature import Origin
from runner.utils.utils import one_line

OUTPUTS = Path("outputs")
_PATH_KEYS = (
    "resume",
    "init_from",
    "init.path",
    "hydra.run.dir",
    "hydra.sweep.dir",
)  # their values are used as they are typed
# Settings of how processes find each other: they come from the command line, never from a file of the run.
_RENDEZVOUS_KEYS = ("nnodes", "rdzv_endpoint", "rdzv_timeout_s", "backend")
_LIST_GROUPS = ("callbacks", "trackers")  # groups of which a list is chosen; Hydra does not record these choices
_EXPECTED = "expected latest, a run folder, or one of its checkpoints/step_*"
Compose = Callable[[list[str]], DictConfig]


@dataclass
class Resumption:
    """A run to resume.

    Args:
        run: its folder.
        checkpoint: the run's folder, or the checkpoint to start from.
        overrides: of this command line, but for those of Hydra, `resume` and `sign`.
        run_overrides: those that the run was last started with.
        search_path: the override that has Hydra search the user's directories of YAML, recorded ones too.
        arguments: the command line for Hydra: it composes the defaults, and `restore` replaces them.
        origin: where this user has started the run; None for an untrusted one.
        reason: why the run is untrusted.
        trust: the allow-list of the run's config, once that is read.
    """

    run: Path
    checkpoint: Path
    overrides: list[str]
    run_overrides: list[str]
    search_path: list[str]
    arguments: list[str]
    origin: Origin | None = None
    reason: str = ""
    trust: Allowlist | None = None


def find_resumption(arguments: list[str]) -> Resumption | None:
    """Returns the run that the `resume=` of a command line names; None if there is nothing to resume.

    Raises:
        ConfigError: there is no such run, or its folder can't be read.
    """
    if not any(_is_resume(argument) for argument in arguments):
        return None
    parsed = get_args_parser().parse_args(arguments)
    path = [read_path(override) for override in parsed.overrides if _is_resume(override)][-1]
    if not path:
        raise ConfigError(f"resume=: {_EXPECTED}")
    if path == "null" or parsed.multirun:
        return None
    overrides = [o for o in parsed.overrides if _key(o) not in ("resume", "sign") and _root(o) != "hydra"]
    if init_from := next((o for o in overrides if sets_init_from(o) and not o.endswith("=null")), None):
        raise ConfigError(f"{init_from}: expected it of a new run alone, found resume={path}; leave one of the two out")
    experiment = next((o for o in overrides if _key(o) == "experiment"), None)
    checkpoint = _find_latest_run(experiment) if path == "latest" else Path(path)
    try:
        run = run_folder.find_run(checkpoint)
    except ConfigError as error:
        raise ConfigError(f"resume={error}; {_EXPECTED}") from None
    config_dirs = [parsed.config_dir] if parsed.config_dir else []
    is_vouched_for = _reads_sign(parsed.overrides)
    origin, reason = signature.identify(run, "sign=true" if is_vouched_for else "", config_dirs)
    for note in signature.describe_links(origin) if origin and is_vouched_for else ():
        print(one_line(note))
    run_folder.refuse_links(run, origin.links if origin else {}, "sign=true" if origin else "")
    run_overrides = [o for o in run_folder.read_overrides(run) if _root(o) not in (*COMMAND_LINE_KEYS, "hydra")]
    of_hydra = [o for o in parsed.overrides if _root(o) == "hydra"]
    paths = [f"resume={quote(str(checkpoint))}", f"hydra.run.dir={quote(str(run))}"]
    # The parser collects the overrides, which stand together between Hydra's flags.
    count = len(parsed.overrides)
    start = max(i for i in range(len(arguments) + 1) if arguments[i : i + count] == parsed.overrides)
    hydra_arguments = [*arguments[:start], *of_hydra, *paths, *arguments[start + count :]]
    search_path = _find_search_path(of_hydra, config_dirs, origin.config_dirs if origin else [])
    return Resumption(run, checkpoint, overrides, run_overrides, search_path, hydra_arguments, origin, reason)


def _reads_sign(overrides: list[str]) -> bool:
    values = [override.partition("=")[2] for override in overrides if _key(override) == "sign"]
    if values and values[-1].lower() not in ("true", "false"):
        raise ConfigError(f"sign={shown(values[-1])}: expected true or false")
    return bool(values) and values[-1].lower() == "true"


def _is_resume(argument: str) -> bool:
    return _key(argument) == "resume" and not argument.startswith("~")


def _find_search_path(of_hydra: list[str], config_dirs: list[str], recorded: list[str]) -> list[str]:
    """Returns the override that has Hydra search the user's directories of YAML, those of this command line first."""
    typed = [o for o in of_hydra if _key(o) == "hydra.searchpath"]
    places: Any = OverridesParser.create().parse_override(typed[-1]).value() if typed else []
    directories = [os.path.abspath(path) for path in (*config_dirs, *recorded) if os.path.isdir(path)]
    places = dict.fromkeys([*map(str, places), *(f"file://{path}" for path in directories)])
    return [f"hydra.searchpath=[{','.join(map(quote, places))}]"] if places else []


def quote_path(argument: str) -> str:
    """Returns an argument of the command line whose path, where it is one, is quoted for Hydra's grammar."""
    key, _, text = argument.partition("=")
    is_sweep = key in ("init_from", "init.path") and "," in text
    if key not in _PATH_KEYS or not text or "${" in text or is_sweep or _unquote(text) is not None:
        return argument
    return f"{key}={_quote_if_needed(text)}"


def _quote_if_needed(path: str) -> str:
    return path if re.fullmatch(r"[\w./+-]+", path, re.ASCII) else quote(path)


def read_path(argument: str) -> str:
    """Returns the path of an argument of the command line, without the quotes around it."""
    text = argument.partition("=")[2]
    unquoted = _unquote(text)
    return text if unquoted is None else unquoted


def _unquote(text: str) -> str | None:
    """Returns a text without its quotes; None if it is not quoted as a whole."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    try:
        value = OverridesParser.create().parse_override(f"path={text}").value()
    except HydraException:
        return None
    return value.replace("\\${", "${") if isinstance(value, str) else None


def _find_latest_run(experiment: str | None) -> Path:
    """Returns the run under outputs/ with the newest checkpoint, of an experiment if one is typed."""
    checkpoints = [path for run in _find_runs(OUTPUTS) for path in sorted(run.glob("checkpoints/step_*"))]
    times = {path.parent.parent: path.stat().st_mtime for path in checkpoints if (path / "MANIFEST.json").is_file()}
    for run in sorted(times, key=times.__getitem__, reverse=True):
        with contextlib.suppress(ConfigError):  # another run's fault
            if experiment is None or experiment in run_folder.read_overrides(run):
                return run
    found = f"no run{f' of {experiment}' if experiment else ''} with a checkpoint under {OUTPUTS.resolve()}"
    raise ConfigError(f"resume=latest: {found}; start one, or give its path")


def _find_runs(folder: Path, levels: int = 4) -> Iterator[Path]:
    """Yields the run folders below a folder, none of them inside another."""
    for path in sorted(folder.glob("*/")):
        if (path / "checkpoints").is_dir():
            yield path
        elif levels > 1:
            yield from _find_runs(path, levels - 1)


def restore_config(cfg: DictConfig, resumption: Resumption, compose: Compose) -> list[str]:
    """Replaces a composed config by the run's own, with this command line's overrides applied to it.

    Args:
        cfg: the defaults as Hydra composed them, with Hydra's own part.
        compose: composes overrides.
    Returns:
        The differences from the run's config, a line a key.
    Raises:
        ConfigError: a change that makes it another run, or a config with names that are not allowed.
    """
    overrides = OverridesParser.create().parse_overrides(resumption.overrides)
    ConfigLoaderImpl.validate_sweep_overrides_legal(overrides, RunMode.RUN, from_shell=True)
    run_overrides = _parse_run_overrides(resumption)
    recorded = _read_choices(resumption.run, run_overrides)
    groups = {*cfg.hydra.runtime.choices, *recorded, *_LIST_GROUPS}
    values = [override for override in overrides if not _is_choice(override, groups)]
    # Of two choices of a group the last counts.
    choices = [*{_group_of(override): override for override in overrides if override not in values}.values()]
    new_choices = [choice for choice in choices if not _is_recorded(choice, recorded)]
    typed = _compose_typed(resumption, choices, new_choices, compose)
    resumption.trust = _make_allowlist(resumption, typed, values)
    saved = run_folder.read_config(resumption.run)
    allowlist.check_interpolations(saved, resumption.trust)
    saved = {key: value for key, value in saved.items() if key not in COMMAND_LINE_KEYS}

    before = without_hydra(cfg)
    after = copy.deepcopy(before)
    wanted = saved
    if paths := [_path_of(choice) for choice in new_choices if choice.key_or_group not in COMMAND_LINE_KEYS]:
        composed = without_hydra(compose([*resumption.search_path, *_texts(new_choices)]))
        wanted = diff.replace_nodes(saved, _run_part(before), _run_part(composed), paths)
    kept = _drop_overridden(run_overrides, overrides, paths)
    run_folder.put_values(before, saved)
    run_folder.put_values(after, wanted)
    run_folder.put_values(after, _process_settings(typed, is_trusted=resumption.origin is not None))
    optimizations.expand_composed(before)  # the config of an earlier run has switches without `_target_`
    ConfigLoaderImpl._apply_overrides_to_config(_adapt_to_saved(values, run_overrides, after), after)
    run_folder.put_values(
        after, {key: typed[key] for key in COMMAND_LINE_KEYS} | {"resume": str(resumption.checkpoint)}
    )

    with run_folder.recorded_hydra_config(resumption.run, after):
        plain = checks.to_plain(after)
        allowlist.check_paths(plain, resumption.trust)
        if not typed.resume_allow_changes:
            diff.check_same_run(checks.to_plain(before), plain, _describe_new_run(resumption, kept))
    chosen = typed.hydra.runtime.choices
    with read_write(cfg), open_dict(cfg):
        for key in after:
            cfg[key] = after[key]
        cfg.hydra.runtime.choices.update(recorded)
        cfg.hydra.runtime.choices.update({group: chosen[group] for group in map(_group_of, choices) if group in chosen})
        cfg.hydra.overrides.task = [*kept, *resumption.overrides, *cfg.hydra.overrides.task]
    return diff.describe_changes(_run_part(before), _run_part(after))


def _is_choice(override: Override, groups: set[str]) -> bool:
    """Returns whether an override has to be composed: it chooses from a group, or is for the command line alone."""
    key = override.key_or_group
    if "." in key or isinstance(override.value(), dict):
        return False
    is_group = _group_of(override) in groups or "/" in key or override.package is not None or override.is_add()
    return is_group or key in COMMAND_LINE_KEYS


def _is_recorded(choice: Override, recorded: dict[str, Any]) -> bool:
    """Returns whether the run has made a choice already, so that its saved config holds what became of it."""
    group = _group_of(choice)
    is_always_new = group == "distributed" or choice.is_delete()
    return not is_always_new and group in recorded and recorded[group] == choice.value()


def _group_of(override: Override) -> str:
    return override.get_key_element().lstrip("+~")


def _path_of(choice: Override) -> diff.KeyPath:
    return tuple(re.split(r"[./]", choice.package or choice.key_or_group))


def _texts(overrides: list[Override]) -> list[str]:
    return [str(override.input_line) for override in overrides]


def _parse_run_overrides(resumption: Resumption) -> list[Override]:
    """Returns a run's overrides, which are compared and shown, and never composed."""
    try:
        overrides = OverridesParser.create().parse_overrides(resumption.run_overrides)
        ConfigLoaderImpl.validate_sweep_overrides_legal(overrides, RunMode.RUN, from_shell=True)
    except HydraException as error:
        source = resumption.run / ".hydra" / "overrides.yaml"
        raise ConfigError(f"{source}: {errors.format_error(error)}") from error
    return overrides


def _read_choices(run: Path, run_overrides: list[Override]) -> dict[str, Any]:
    """Returns a run's choices of groups: those of its start, and those of later command lines."""
    choices = run_folder.read_choices(run)
    groups = {*choices, *_LIST_GROUPS}
    choices |= {_group_of(override): override.value() for override in run_overrides if _group_of(override) in groups}
    # A text with an interpolation would be resolved where the choices are shown.
    return {
        group: choice
        for group, choice in choices.items()
        if isinstance(group, str) and isinstance(choice, str | list | None) and "${" not in repr(choice)
    }


def _adapt_to_saved(values: list[Override], run_overrides: list[Override], cfg: DictConfig) -> list[Override]:
    """Returns overrides as a config takes them that the same command line may have changed already.

    A key that the run added is there, and may be set by `+` again; one that it deleted may be gone.
    """
    added = {override.key_or_group for override in run_overrides if override.is_add()}
    deleted = {override.key_or_group for override in run_overrides if override.is_delete()}
    gone = {key for key in deleted if OmegaConf.select(cfg, key, throw_on_missing=False) is None}
    kept = [override for override in values if not (override.is_delete() and override.key_or_group in gone)]
    again = [override for override in kept if override.is_add() and override.key_or_group in added]
    return [replace(override, type=OverrideType.FORCE_ADD) if override in again else override for override in kept]


def _compose_typed(
    resumption: Resumption, choices: list[Override], new_choices: list[Override], compose: Compose
) -> DictConfig:
    """Returns the defaults with the choices of this command line; without those of the run if their YAML is gone."""
    try:
        return compose([*resumption.search_path, *_texts(choices)])
    except (HydraException, OmegaConfBaseException, ConfigError):
        return compose([*resumption.search_path, *_texts(new_choices)])


def _make_allowlist(resumption: Resumption, typed: DictConfig, values: list[Override]) -> Allowlist:
    """Returns the allow-list for a run's config; an untrusted run may also name the targets of this command line."""
    source = resumption.run / ".hydra" / "config.yaml"
    if resumption.origin is not None:
        return Allowlist(source, is_signed=True)
    own = without_hydra(typed)
    for value in values:
        with contextlib.suppress(OmegaConfBaseException):  # of a node that only the run has
            OmegaConf.update(own, value.key_or_group, value.value(), merge=True, force_add=True)
    configs = [run_folder.to_unresolved(own)]
    with contextlib.suppress(OmegaConfBaseException), run_folder.recorded_hydra_config(resumption.run, own):
        configs.append(checks.to_plain(own))
    sign = "sign=true, typed in the project's directory,"
    return Allowlist(source, list(typed.allow_targets), configs, resumption.reason, sign=sign)


def _process_settings(typed: DictConfig, *, is_trusted: bool) -> dict[str, diff.Nest]:
    """Returns this command line's settings of where processes meet.

    The number of processes of an untrusted run comes from the command line, too: a small file could start many.
    """
    keys = _RENDEZVOUS_KEYS if is_trusted else (*_RENDEZVOUS_KEYS, "nproc_per_node")
    distributed = {key: typed.distributed[key] for key in keys}
    workers = without_workers() | {"num_workers": typed.data.num_workers}
    return {"distributed": distributed, "data": {} if is_trusted else workers}


def _describe_new_run(resumption: Resumption, kept: list[str]) -> str:
    """Returns the command that starts a new run from the checkpoint, with this command line's changes.

    Args:
        kept: the run's overrides that this command line does not replace.
    """
    init_from = f"init_from={_quote_if_needed(str(resumption.checkpoint))}"
    if resumption.origin is None:  # nobody shall copy what an untrusted file says
        return f"{shlex.quote(init_from)} (without resume=) with the same overrides"
    typed = [override for override in resumption.overrides if _root(override) not in COMMAND_LINE_KEYS]
    others = [override for override in [*kept, *typed] if not sets_init_from(override)]
    return shlex.join(["python", "-m", "runner", *resumption.search_path, *others, init_from])


def _drop_overridden(run_overrides: list[Override], typed: list[Override], paths: list[diff.KeyPath]) -> list[str]:
    """Returns a run's overrides without those of keys that are typed anew, or in nodes that are chosen anew."""
    keys = {_key(str(override.input_line)) for override in typed}
    kept = []
    for override in run_overrides:
        line = str(override.input_line)
        path = tuple(_key(line).split("."))
        is_replaced = _key(line) in keys or any(path[: len(node)] == node for node in paths)
        # A switch of an optimization that is typed anew, or a value of one that is switched off now.
        pairs = [pair for other in typed for pair in ((override, other), (other, override))]
        if not is_replaced and not any(optimizations.switches_off(*pair) for pair in pairs):
            kept.append(line)
    return kept


def without_hydra(cfg: DictConfig) -> DictConfig:
    """Returns a copy of a composed config without Hydra's own part."""
    task = copy.deepcopy(cfg)
    with read_write(task), open_dict(task):
        task.pop("hydra", None)
    return task


def _run_part(cfg: DictConfig) -> diff.Nest:
    return {key: value for key, value in run_folder.to_unresolved(cfg).items() if key not in COMMAND_LINE_KEYS}


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def sets_init_from(override: str) -> bool:
    """Returns whether an override sets the weights that a new run, or one of its engines, starts from."""
    return re.fullmatch(r"(engines\.[^.]+\.)?init(_from|\..+)?", _key(override)) is not None


def _root(override: str) -> str:
    return re.split(r"[./@]", _key(override))[0]
