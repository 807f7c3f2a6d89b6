"""What `resume=` stands for: which run, and its own config with this command line's changes on top.

Owns the way there: the run's files are a stranger's until `trust` has looked at them. Must not import torch.
"""

from __future__ import annotations

import contextlib
import copy
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra._internal.utils import get_args_parser
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict, read_write
from omegaconf.errors import OmegaConfBaseException

from runner import changes, config, run_folder, trust
from runner.interpolation import NOT_FOLLOWED, without_elsewhere
from runner.mistakes import ConfigError
from runner.run_folder import OF_THE_COMMAND_LINE
from runner.trust import Trust

OUTPUTS = Path("outputs")
_OF_THIS_PLACE = ("nnodes", "rdzv_endpoint", "rdzv_timeout_s", "backend")  # whom a run talks to, no file of it says
Compose = Callable[[list[str]], DictConfig]


@dataclass
class Resumption:
    """A run to go on with: its folder, where to start, and the overrides of this command line and of its own."""

    run: Path
    checkpoint: Path
    typed: list[str]
    own: list[str]
    arguments: list[str]
    trust: Trust | None = None


def find(arguments: list[str]) -> Resumption | None:
    """Returns what the `resume=` of a command line asks for, with the command line for Hydra: the run's folder and
    overrides, beside the new ones; None where nothing is to be resumed.

    Raises:
        ConfigError: there is nothing to resume at that place, or the run's overrides are no experiment's.
    """
    if not any(_key(argument) == "resume" for argument in arguments):
        return None
    parsed = get_args_parser().parse_args(arguments)
    typed = [override for override in parsed.overrides if _key(override) != "resume"]
    given = [o.partition("=")[2].strip("'\"") for o in parsed.overrides if _key(o) == "resume"][-1]
    if not given:
        raise ConfigError("resume=: expected latest, a run folder, or one of its checkpoints/step_*")
    if given == "null" or parsed.multirun:
        return None
    experiment = next((o for o in typed if _key(o) == "experiment"), None)
    checkpoint = _latest_run(experiment) if given == "latest" else Path(given)
    try:
        run = run_folder.find_run(checkpoint)
    except ConfigError as error:
        raise ConfigError(f"resume={error}; expected latest, a run folder, or one of its checkpoints/step_*") from None
    run_folder.refuse_links(run)
    own = [o for o in run_folder.read_overrides(run) if _root(o) not in OF_THE_COMMAND_LINE]
    keys = {_key(override) for override in typed}
    kept = [override for override in own if _key(override) not in keys]
    if "distributed" in keys:  # where the run goes on is chosen anew, with nothing of where it was
        kept = [override for override in kept if _root(override) != "distributed"]
    _check_overrides(own, kept, run / ".hydra" / "overrides.yaml")
    place = [f"resume={_quote(checkpoint)}", f"hydra.run.dir={_quote(run)}"]
    count = len(parsed.overrides)
    start = max(i for i in range(len(arguments) + 1) if arguments[i : i + count] == parsed.overrides)
    changed = [*arguments[:start], *kept, *typed, *place, *arguments[start + count :]]
    return Resumption(run, checkpoint, typed, own, changed)


def _latest_run(experiment: str | None) -> Path:
    places = [path for depth in ("*/*", "multirun/*/*") for path in OUTPUTS.glob(f"{depth}/checkpoints/step_*")]
    runs = {path.parent.parent: path.stat().st_mtime for path in sorted(places) if (path / "MANIFEST.json").is_file()}
    of_it = [run for run in runs if experiment is None or experiment in _overrides_or_none(run)]
    if not of_it:
        what = f" of {experiment}" if experiment else ""
        where = OUTPUTS.resolve()
        raise ConfigError(f"resume=latest: no run{what} with a checkpoint under {where}; start one, or give its path")
    return max(of_it, key=lambda run: runs[run])


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
            refused.append(f"{text}: no override")
            continue
        places = [override.key_or_group.lstrip("/"), *re.split(r"[.:]", override.package or "")]
        if text.startswith("-") or any(re.split(r"[./]", place)[0] == "hydra" for place in places):
            refused.append(f"{text}: sets Hydra itself")
        elif text in kept and _reads_elsewhere(override):
            refused.append(f"{text}: {NOT_FOLLOWED}; where you want it, give it anew")
        elif "." not in override.key_or_group and _leads_out(override.value()):
            refused.append(f"{text}: leads out of conf/")
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
        cfg: what Hydra composed of this command line's overrides beside the run's own.
        compose: composes other overrides the same way.
    Returns:
        What differs from the run's config, a line a key.
    Raises:
        ConfigError: a change that makes it another run, or a config that names what it may not.
    """
    typed = _compose_typed(asked.typed, compose)
    mine = {key: typed[key] for key in ("resume_allow_changes", "allow_targets")}
    with run_folder.told_of(asked.run, typed):
        forms = _forms(typed)
    saved, trusted = _read_run(asked, list(typed.allow_targets), forms)
    beside = _without_hydra(cfg)
    wanted = changes.apply(saved, _own_part(_without_hydra(compose(asked.own))), _own_part(beside), _own(asked.typed))
    processes = wanted.get("distributed")
    processes = processes if isinstance(processes, dict) else {}
    wanted["distributed"] = {**processes, **{key: typed.distributed[key] for key in _OF_THIS_PLACE}}
    before, after = copy.deepcopy(beside), copy.deepcopy(beside)
    run_folder.put(before, saved)
    run_folder.put(after, wanted | mine)
    with run_folder.told_of(asked.run, after):
        plain = config.to_plain(after)
        trust.check_names(plain, trusted)
        if not typed.resume_allow_changes:
            changes.refuse(config.to_plain(before), plain)
    with read_write(cfg), open_dict(cfg):
        for key in after:
            cfg[key] = after[key]
    asked.trust = trusted
    return changes.tell(saved, wanted)


def _read_run(asked: Resumption, prefixes: list[str], own: list[dict[str, Any]]) -> tuple[dict[str, Any], Trust]:
    """Returns a run's config, unresolved, once neither it nor the run's overrides name what they may not."""
    folder = asked.run / ".hydra"
    trust.check_names(_nodes_of(asked.own), Trust(folder / "overrides.yaml", prefixes, own))
    trusted = Trust(folder / "config.yaml", prefixes, own)
    saved = run_folder.read_config(asked.run)
    trust.check_interpolations(saved, trusted)
    return {key: value for key, value in saved.items() if key not in OF_THE_COMMAND_LINE}, trusted


def _compose_typed(typed: list[str], compose: Compose) -> DictConfig:
    """Returns what this command line alone composes; where a key is of the run's choices, without such keys."""
    for part in (typed, [o for o in typed if "." not in _key(o)]):
        with contextlib.suppress(HydraException, OmegaConfBaseException):
            return _without_hydra(compose(part))
    return _without_hydra(compose([o for o in typed if _root(o) in OF_THE_COMMAND_LINE]))


def _forms(cfg: DictConfig) -> list[dict[str, Any]]:
    """Returns a config unresolved, and resolved where it can be."""
    forms = [_raw(cfg)]
    with contextlib.suppress(OmegaConfBaseException):
        forms.append(config.to_plain(cfg))
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


def _own(overrides: list[str]) -> list[str]:
    return [o for o in overrides if _root(o) not in (*OF_THE_COMMAND_LINE, "hydra")]


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _root(override: str) -> str:
    return re.split(r"[./@]", _key(override))[0]


def _quote(path: Path) -> str:
    return "'" + str(path).replace("'", "\\'") + "'"
