"""What `resume=` stands for: which run, and its own config with this command line's changes on top.

Owns the way there: the run's files are a stranger's until `trust` has looked at them. Must not import torch.
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

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from runner.config import checks, diff, errors, run_folder
from runner.config.composition.interpolation import NOT_FOLLOWED, quote, without_elsewhere
from runner.config.errors import ConfigError, shown
from runner.config.run_folder import OF_THE_COMMAND_LINE
from runner.config.trust import allowlist, import_path, signature
from runner.config.trust.allowlist import Allowlist
from runner.config.trust.signature import Origin, SignatureError
from runner.utils.utils import one_line

OUTPUTS = Path("outputs")
_PATHS = ("resume", "init_from", "hydra.run.dir", "hydra.sweep.dir")  # whose values are taken as they are typed
_OF_THIS_PLACE = ("nnodes", "rdzv_endpoint", "rdzv_timeout_s", "backend")  # whom a run talks to, no file of it says
Compose = Callable[[list[str]], DictConfig]


@dataclass
class Resumption:
    """A run to go on with.

    Args:
        run: its folder.
        checkpoint: where to start.
        typed: this command line's overrides but those of Hydra.
        own: the run's overrides.
        search_path: the override that has Hydra search the user's directories of YAML, recorded ones too.
        arguments: the command line for Hydra: it composes the runner's own config, and `restore` replaces that.
        origin: where this user has started the run; None for an untrusted one.
        reason: why the run is untrusted.
        trust: what the run's config may name, once that is read.
    """

    run: Path
    checkpoint: Path
    typed: list[str]
    own: list[str]
    search_path: list[str]
    arguments: list[str]
    origin: Origin | None = None
    reason: str = ""
    trust: Allowlist | None = None


def find(arguments: list[str]) -> Resumption | None:
    """Returns what the `resume=` of a command line asks for; None where nothing is to be resumed.

    Raises:
        ConfigError: there is nothing to resume at that place, or the run's overrides are no experiment's.
    """
    if not any(_names_run(argument) for argument in arguments):
        return None
    parsed = get_args_parser().parse_args(arguments)
    place = [read_path(o) for o in parsed.overrides if _names_run(o)][-1]
    if not place:
        raise ConfigError("resume=: expected latest, a run folder, or one of its checkpoints/step_*")
    if place == "null" or parsed.multirun:
        return None
    typed = [o for o in parsed.overrides if _key(o) not in ("resume", "sign") and _root(o) != "hydra"]
    if begun := next((o for o in typed if sets_init_from(o) and not o.endswith("=null")), None):
        raise ConfigError(f"{begun}: expected it of a new run alone, found resume={place}; leave one of the two out")
    experiment = next((o for o in typed if _key(o) == "experiment"), None)
    checkpoint = _latest_run(experiment) if place == "latest" else Path(place)
    try:
        run = run_folder.find_run(checkpoint)
    except ConfigError as error:
        raise ConfigError(f"resume={error}; expected latest, a run folder, or one of its checkpoints/step_*") from None
    config_dirs = [parsed.config_dir] if parsed.config_dir else []
    origin, reason = _find_origin(run, _reads_sign(parsed.overrides), config_dirs)
    run_folder.refuse_links(run, origin.links if origin else {}, "sign=true" if origin else "")
    own = [o for o in run_folder.read_overrides(run) if _root(o) not in OF_THE_COMMAND_LINE]
    if origin is None:
        _check_overrides(own, _without_typed(own, typed), run / ".hydra" / "overrides.yaml")
    of_hydra = [o for o in parsed.overrides if _root(o) == "hydra"]
    places = [f"resume={quote(str(checkpoint))}", f"hydra.run.dir={quote(str(run))}"]
    count = len(parsed.overrides)
    start = max(i for i in range(len(arguments) + 1) if arguments[i : i + count] == parsed.overrides)
    changed = [*arguments[:start], *of_hydra, *places, *arguments[start + count :]]
    search_path = _find_search_path(of_hydra, config_dirs, origin.config_dirs if origin else [])
    return Resumption(run, checkpoint, typed, own, search_path, changed, origin, reason)


def _reads_sign(overrides: list[str]) -> bool:
    """Says whether a command line sets `sign`."""
    values = [override.partition("=")[2] for override in overrides if _key(override) == "sign"]
    if values and values[-1].lower() not in ("true", "false"):
        raise ConfigError(f"sign={shown(values[-1])}: expected true or false")
    return bool(values) and values[-1].lower() == "true"


def _names_run(argument: str) -> bool:
    return _key(argument) == "resume" and not argument.startswith("~")


def _find_origin(run: Path, is_vouched_for: bool, config_dirs: list[str]) -> tuple[Origin | None, str]:
    """Returns where this user has started a run, its modules importable; or None and why it is untrusted."""
    try:
        origin = signature.sign_present(run, config_dirs) if is_vouched_for else signature.check(run)
    except SignatureError as error:
        if is_vouched_for:
            raise ConfigError(f"sign=true: {run}: {error}") from error
        return None, str(error)
    for note in signature.describe_links(origin) if is_vouched_for else ():
        print(one_line(note))
    import_path.prepend(origin.python_path)
    return origin, ""


def _find_search_path(of_hydra: list[str], config_dirs: list[str], recorded: list[str]) -> list[str]:
    """Returns the override that has Hydra search the user's directories of YAML, those of this command line first."""
    typed = [o for o in of_hydra if _key(o) == "hydra.searchpath"]
    places: Any = OverridesParser.create().parse_override(typed[-1]).value() if typed else []
    directories = [os.path.abspath(each) for each in (*config_dirs, *recorded) if os.path.isdir(each)]
    places = dict.fromkeys([*map(str, places), *(f"file://{each}" for each in directories)])
    return [f"hydra.searchpath=[{','.join(map(quote, places))}]"] if places else []


def _without_typed(own: list[str], typed: list[str]) -> list[str]:
    """Returns a run's overrides without those whose keys are typed anew."""
    keys = {_key(override) for override in typed}
    kept = [override for override in own if _key(override) not in keys]
    if "distributed" in keys:  # where the run goes on is chosen anew, with nothing of where it was
        kept = [override for override in kept if _root(override) != "distributed"]
    return kept


def quote_path(argument: str) -> str:
    """Returns an argument of the command line whose path, where it is one, is quoted for Hydra's grammar."""
    key, _, text = argument.partition("=")
    if key not in _PATHS or not text or "${" in text or re.fullmatch(r"[\w./+-]+", text, re.ASCII):
        return argument
    is_sweep = key == "init_from" and "," in text
    return argument if is_sweep or _unquote(text) is not None else f"{key}={quote(text)}"


def read_path(argument: str) -> str:
    """Returns the path of an argument of the command line: what stands in quotes, or all as it stands."""
    text = argument.partition("=")[2]
    unquoted = _unquote(text)
    return text if unquoted is None else unquoted


def _unquote(text: str) -> str | None:
    """Returns what stands between the quotes of a text that is quoted as a whole; None for another."""
    if len(text) < 2 or text[0] not in "'\"" or text[-1] != text[0]:
        return None
    try:
        value = OverridesParser.create().parse_override(f"path={text}").value()
    except HydraException:
        return None
    return value.replace("\\${", "${") if isinstance(value, str) else None


def _latest_run(experiment: str | None) -> Path:
    places = [path for run in _find_runs(OUTPUTS) for path in run.glob("checkpoints/step_*")]
    runs = {path.parent.parent: path.stat().st_mtime for path in sorted(places) if (path / "MANIFEST.json").is_file()}
    of_it = [run for run in runs if experiment is None or experiment in _overrides_or_none(run)]
    if not of_it:
        what = f" of {experiment}" if experiment else ""
        where = OUTPUTS.resolve()
        raise ConfigError(f"resume=latest: no run{what} with a checkpoint under {where}; start one, or give its path")
    return max(of_it, key=lambda run: runs[run])


def _find_runs(folder: Path, levels: int = 4) -> Iterator[Path]:
    """Yields the run folders below a folder, none of them inside another."""
    for path in sorted(folder.glob("*/")):
        if (path / "checkpoints").is_dir():
            yield path
        elif levels > 1:
            yield from _find_runs(path, levels - 1)


def _overrides_or_none(run: Path) -> list[str]:
    try:
        return run_folder.read_overrides(run)
    except ConfigError:  # it is not the run that is looked for
        return []


def _check_overrides(own: list[str], kept: list[str], source: Path) -> None:
    """Checks that a run's overrides choose and set what an experiment has, and nothing of Hydra or the machine."""
    parser, refused = OverridesParser.create(), []
    for text in own:
        try:
            override = parser.parse_override(text)
        except HydraException:
            refused.append(f"{shown(text)}: no override")
            continue
        places = [override.key_or_group.lstrip("/"), *re.split(r"[.:]", override.package or "")]
        if text.startswith("-") or any(re.split(r"[./]", place)[0] == "hydra" for place in places):
            refused.append(f"{shown(text)}: sets Hydra itself")
        elif text in kept and _reads_elsewhere(override):
            refused.append(f"{shown(text)}: {NOT_FOLLOWED}; where you want it, give it anew")
        elif "." not in (key := override.key_or_group) and key != "init_from" and _leads_out(override.value()):
            refused.append(f"{shown(text)}: leads out of conf/")
    if refused:
        raise ConfigError("\n  ".join([f"{source}: a run's overrides are data, and these are not followed", *refused]))


def _reads_elsewhere(override: Override) -> bool:
    value = override.input_line if override.is_sweep_override() else override.value()
    return bool(without_elsewhere(value) != value)


def _leads_out(choice: Any) -> bool:
    choices = choice if isinstance(choice, list) else [choice]
    texts = [each for each in choices if isinstance(each, str)]
    return any(text.startswith("/") or ":" in text or "\\" in text or ".." in text.split("/") for text in texts)


def restore(cfg: DictConfig, asked: Resumption, compose: Compose) -> list[str]:
    """Puts a run's own config, with this command line's changes on top, in the place of the composed one.

    Args:
        cfg: what Hydra composed, with Hydra's own part.
        compose: composes overrides.
    Returns:
        What differs from the run's config, a line a key.
    Raises:
        ConfigError: a change that makes it another run, or a config that names what it may not.
    """
    typed = _compose_typed(asked, compose)
    mine = {key: typed[key] for key in OF_THE_COMMAND_LINE if key != "resume"} | {"resume": str(asked.checkpoint)}
    asked.trust = _make_trust(asked, typed)
    saved = _read_run(asked)
    wanted, choices, notes = _change(saved, asked, compose)
    _set_processes(wanted, typed, asked)
    before, after = _without_hydra(cfg), _without_hydra(cfg)
    run_folder.put(before, saved)
    run_folder.put(after, wanted | mine)
    with run_folder.told_of(asked.run, after):
        plain = checks.to_plain(after)
        allowlist.check_paths(plain, asked.trust)
        if not typed.resume_allow_changes:
            diff.check_same_run(checks.to_plain(before), plain, asked.checkpoint, _describe_new_run(asked))
    with read_write(cfg), open_dict(cfg):
        for key in after:
            cfg[key] = after[key]
        cfg.hydra.runtime.choices = choices
        cfg.hydra.overrides.task = [*_without_typed(asked.own, asked.typed), *asked.typed, *cfg.hydra.overrides.task]
    return [*notes, *diff.describe(saved, wanted)]


def _describe_new_run(asked: Resumption) -> str:
    """Returns the command that starts a new run like a user's own with this command line's changes."""
    if asked.origin is None:  # what a stranger's overrides would start is not to be copied
        return ""
    changed = [override for override in asked.typed if _root(override) not in OF_THE_COMMAND_LINE]
    weights = quote_path(f"init_from={asked.checkpoint}")
    overrides = [*asked.search_path, *_without_typed(asked.own, asked.typed), *changed, weights]
    return shlex.join(["python", "-m", "runner", *(o for o in overrides if not sets_init_from(o) or o == weights)])


def _set_processes(wanted: dict[str, Any], typed: DictConfig, asked: Resumption) -> None:
    """Has this command line say where a run's processes meet; of an untrusted run, how many there are, too."""
    of_processes = {key: typed.distributed[key] for key in _OF_THIS_PLACE}
    of_data = {}
    if asked.origin is None:  # a file of a few bytes could start any number of processes
        of_processes["nproc_per_node"] = typed.distributed.nproc_per_node
        of_data["num_workers"] = typed.data.num_workers
    for section, values in (("distributed", of_processes), ("data", of_data)):
        found = wanted.get(section)
        wanted[section] = {**(found if isinstance(found, dict) else {}), **values}


def _make_trust(asked: Resumption, typed: DictConfig) -> Allowlist:
    """Returns what a run's config may name, once its overrides name nothing else."""
    if asked.origin is not None:
        return Allowlist(asked.run / ".hydra" / "config.yaml", is_signed=True)
    with run_folder.told_of(asked.run, typed):
        forms = _forms(typed)
    remedy = "allow_targets=[{}]", "sign=true, typed in the project's directory,"
    trusted = Allowlist(asked.run / ".hydra" / "config.yaml", list(typed.allow_targets), forms, asked.reason, *remedy)
    allowlist.check_paths(_nodes_of(asked.own), replace(trusted, source=asked.run / ".hydra" / "overrides.yaml"))
    return trusted


def _read_run(asked: Resumption) -> dict[str, Any]:
    """Returns a run's config, unresolved, once it reads nothing that it may not."""
    assert asked.trust is not None
    saved = run_folder.read_config(asked.run)
    allowlist.check_interpolations(saved, asked.trust)
    return {key: value for key, value in saved.items() if key not in OF_THE_COMMAND_LINE}


def _change(saved: dict[str, Any], asked: Resumption, compose: Compose) -> tuple[dict[str, Any], Any, list[str]]:
    """Returns a run's config with what this command line changes, the choices made, and a note where there is one.

    A change is what the typed overrides change of a composition of the run's own overrides. Where these can't be
    composed any more, because a file of the user's was deleted, it is what they change of the runner's own config.
    """
    typed, own, notes = asked.typed, asked.own, []
    try:
        without = compose([*asked.search_path, *own])
    except (HydraException, OmegaConfBaseException) as error:
        told = f"{errors.format_error(error)}; its saved config is used"
        notes = [f"The run's YAML can't be composed any more: {told}"]
        typed, own = [override for override in asked.typed if "." not in _key(override)], []
        without = compose(asked.search_path)
    beside = compose([*asked.search_path, *_without_typed(own, typed), *typed])
    before, after = _own_part(_without_hydra(without)), _own_part(_without_hydra(beside))
    others = [override for override in asked.typed if override not in typed]
    wanted = _set(diff.apply(saved, before, after, typed), others)
    return wanted, beside.hydra.runtime.choices, notes


def _set(plain: dict[str, Any], overrides: list[str]) -> dict[str, Any]:
    """Returns an unresolved config with the values of dotted overrides set."""
    if not overrides:
        return plain
    cfg = OmegaConf.create(plain)
    for override in overrides:
        run_folder.set_value(cfg, override)
    return _raw(cfg)


def _compose_typed(asked: Resumption, compose: Compose) -> DictConfig:
    """Returns what this command line alone composes; where a key is of the run's choices, without such keys."""
    for part in (asked.typed, [o for o in asked.typed if "." not in _key(o)]):
        with contextlib.suppress(HydraException, OmegaConfBaseException):
            return _without_hydra(compose([*asked.search_path, *part]))
    of_this_command = [o for o in asked.typed if _root(o) in OF_THE_COMMAND_LINE]
    return _without_hydra(compose([*asked.search_path, *of_this_command]))


def _forms(cfg: DictConfig) -> list[dict[str, Any]]:
    """Returns a config unresolved, and resolved where it can be."""
    forms = [_raw(cfg)]
    with contextlib.suppress(OmegaConfBaseException):
        forms.append(checks.to_plain(cfg))
    return forms


def _nodes_of(overrides: list[str]) -> dict[str, Any]:
    """Returns the values that overrides set, by key; that of a `_target_` as a node."""
    nodes: dict[str, Any] = {}
    for override in OverridesParser.create().parse_overrides(overrides):
        key, value = override.key_or_group, override.value()
        if key.rpartition(".")[2] == "_target_":
            key, value = key.rpartition(".")[0], {"_target_": value}
        while key in nodes:
            key += "'"
        nodes[key] = value
    return nodes


def _without_hydra(cfg: DictConfig) -> DictConfig:
    task = copy.deepcopy(cfg)
    with read_write(task), open_dict(task):
        task.pop("hydra", None)
    return task


def _raw(cfg: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}


def _own_part(cfg: DictConfig) -> dict[str, Any]:
    return {key: value for key, value in _raw(cfg).items() if key not in OF_THE_COMMAND_LINE}


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def sets_init_from(override: str) -> bool:
    """Says whether an override sets the weights that a new run, or one of its engines, begins with."""
    return re.fullmatch(r"(engines\.[^.]+\.)?init_from", _key(override)) is not None


def _root(override: str) -> str:
    return re.split(r"[./@]", _key(override))[0]
