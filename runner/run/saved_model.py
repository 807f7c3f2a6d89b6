"""A run, a checkpoint or an export, opened to be evaluated or exported: checked first, then built without its training.

Owns the way from a path to a config that may be built, and to engines with the saved weights. Must not import torch at
the top.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from omegaconf import DictConfig, OmegaConf

from runner.config import checks, run_folder
from runner.config.composition.interpolation import escape
from runner.config.errors import ConfigError
from runner.config.optimizations import Purpose
from runner.config.trust import allowlist, import_path, signature
from runner.config.trust.allowlist import Allowlist
from runner.config.trust.signature import Origin, SignatureError
from runner.run import warm_start

if TYPE_CHECKING:
    import torch

    from runner.engines import Engines

SUFFIX = ".safetensors"
_REMEDY = "--allow-targets {}"
_BUILDS_ENGINES = ("model", "optimizer", "scheduler", "feeder", "engines", "optimizations")


@dataclass(frozen=True)
class SavedModel:
    """A checkpoint or an export, opened: its config is checked by its letters, and nothing of it is imported yet.

    `plain` is the resolved config. `parts` holds the weights by engine, with `<engine>.optimizer` where there is more.
    `engine` is the one of an export. `notes` are what its reader should know. `origin` is where this user has started
    the run; None where the config is untrusted.
    """

    path: Path
    run: Path | None
    plain: dict[str, Any]
    allowlist: Allowlist
    step: int
    parts: dict[str, Any]
    best: dict[str, Any] | None = None
    engine: str | None = None
    notes: list[str] = field(default_factory=list)
    fingerprint: str | None = None
    origin: Origin | None = None

    def without_feeder(self) -> SavedModel:
        """Returns it with models that are fed nothing: their weights are written, and nothing is run."""
        engines = {name: {**own, "feeder": None} for name, own in self.plain["engines"].items()}
        return replace(self, plain={**self.plain, "feeder": None, "engines": engines})

    def check(self, *roles: str) -> None:
        """Imports what the engines and these roles name, and checks it; the other roles are left alone.

        Raises:
            ConfigError: a target that may not be named, is not what its name says, not there, or takes other
                arguments.
        """
        from runner.config.targets import check_targets, seed_imports

        wanted = (*_BUILDS_ENGINES, *roles)
        used: dict[str, Any] = {key: value if key in wanted else None for key, value in self.plain.items()}
        used["data"] = {key: value if f"data.{key}" in wanted else None for key, value in self.plain["data"].items()}
        if self.engine is not None:
            used |= {"optimizer": None, "scheduler": None}
        allowlist.check_paths(used, self.allowlist)
        if self.allowlist.prefixes and not self.allowlist.is_signed:
            import_path.add_deferred()
        seed_imports(self.plain["seed"])
        allowlist.check_resolved_objects(used, self.allowlist)
        check_targets(used)

    def build_engines(self, device: torch.device, *, to_write: bool = False) -> Engines:
        """Returns the engines with their saved weights, and what trained them where evaluation needs it.

        Args:
            to_write: the weights are written and nothing is run: what needs the hardware of training is left out.

        Raises:
            ConfigError: they can't be built, or the weights are of others.
        """
        from runner.run import build

        purpose = Purpose.write if to_write else Purpose.train if self.engine is None else Purpose.use
        source, is_signed = self.run or self.path, self.allowlist.is_signed
        stand_ins = warm_start.of_saved(self.plain, source, self.parts, self.engine, is_signed)
        engines = build.build_engines(self.plain, device, purpose, stand_ins)
        try:
            if self.engine is None:
                engines.load_state_dict(self.parts)
            else:
                engines[self.engine].applied.load_exported(self.parts[self.engine])
        except (KeyError, TypeError, ValueError, RuntimeError) as error:
            raise ConfigError(f"{self.path}: {error}") from error
        return engines


def open_checkpoint(
    path: Path, overrides: Sequence[str] = (), prefixes: Sequence[str] = (), *, is_vouched_for: bool = False
) -> SavedModel:
    """Opens a run's folder (at its newest whole checkpoint) or a checkpoint, with overrides set on the run's config.

    Args:
        prefixes: modules that the config may name, beside the runner's and torch.nn.
        is_vouched_for: the user says that the run is theirs, which signs it.
    Raises:
        ConfigError: it is neither, is not whole, or its config reads what it may not.
    """
    run = run_folder.find_run(path)
    try:
        origin = signature.sign_present(run) if is_vouched_for else signature.check(run)
        trusted = _trust_signed(run / ".hydra" / "config.yaml", origin)
    except SignatureError as error:
        if is_vouched_for:
            raise ConfigError(f"--sign: {run}: {error}") from error
        origin, remedies = None, (_REMEDY, "--sign, typed in the project's directory,")
        trusted = Allowlist(run / ".hydra" / "config.yaml", prefixes, (), str(error), *remedies)
    plain, trusted = _check_config(run_folder.read_config(run), trusted, overrides, run)
    from runner.checkpoint.checkpoints import FACTS

    found, content, faults = run_folder.find_checkpoint(path)
    try:
        trainer = content.pop(FACTS)
        step, best, fingerprint = int(trainer["loop"]["step"]), trainer["best"], trainer.get("fingerprint")
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{found}: it tells no step ({error})") from error
    notes = [f"Passed over: {fault}" for fault in faults]
    notes += signature.describe_links(origin) if origin and is_vouched_for else []
    record = run_folder.read_record(run)
    if run_folder.is_crashed(record):
        notes.insert(0, f"{run}: crashed: run.json says running, but its process {record['pid']} is gone")
    return SavedModel(found, run, plain, trusted, step, content, best, None, notes, fingerprint, origin)


def _trust_signed(source: Path, origin: Origin) -> Allowlist:
    """Returns the trust of a config that this user has signed, whose modules can be imported from now on."""
    import_path.prepend(origin.python_path)
    return Allowlist(source, is_signed=True)


def open_export(path: Path, overrides: Sequence[str] = (), prefixes: Sequence[str] = ()) -> SavedModel:
    """Opens an exported file by the config in its metadata, for the one engine that it holds.

    Raises:
        ConfigError: it is no export, is broken, or its config names what it may not.
    """
    from runner.utils import io

    if path.suffix != SUFFIX:
        raise ConfigError(f"{path}: neither a run folder, nor a checkpoint, nor an export (a {SUFFIX} file)")
    try:
        facts, weights = io.read_metadata(path), io.load(path)
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:
        raise ConfigError(str(error)) from error
    raw, name, step = _read_facts(facts, path)
    try:
        signed_text = warm_start.join(facts["config"], facts)
        trusted = _trust_signed(path, signature.check_text(signed_text, facts.get("signature")))
    except SignatureError as error:
        trusted = Allowlist(path, prefixes, (), str(error), _REMEDY)
    # It was resolved when it was written: its texts are what they say.
    plain, trusted = _check_config(escape(raw), trusted, overrides)
    engines = plain["engines"] or {"model": {}}
    if name not in engines:
        raise ConfigError(f"{path}: it is of engine {name!r}, its config has {', '.join(engines)}")
    own = {key: value for key, value in engines[name].items() if key not in ("optimizer", "scheduler")}
    plain["engines"] = {name: own} if plain["engines"] else {}
    told = facts.get("fingerprint")
    return SavedModel(path, None, plain, trusted, step, {name: weights}, engine=name, fingerprint=told)


def _read_facts(facts: Mapping[str, str], path: Path) -> tuple[dict[str, Any], str, int]:
    """Returns the config, engine and step that an export's metadata tells."""
    try:
        raw, name, step = checks.from_json(facts["config"]), facts["engine"], int(facts["step"])
        if isinstance(raw, dict):
            return raw, name, step
        mistake = "its config is no mapping"
    except KeyError as error:
        mistake = f"it has no {error}"
    except (ValueError, TypeError, RecursionError) as error:
        mistake = f"it can't be read ({error})"
    raise ConfigError(f"{path}: no export of python -m runner.export: in its metadata, {mistake}")


def _check_config(
    raw: dict[str, Any], trusted: Allowlist, overrides: Sequence[str], run: Path | None = None
) -> tuple[dict[str, Any], Allowlist]:
    """Returns the resolved config of a file with overrides set on it, once it reads nothing that it may not.

    Args:
        run: the folder that `${hydra:...}` tells of.
    """
    checks.register()
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        cfg = compose("config")
    typed = OmegaConf.create({})
    for override in overrides:
        run_folder.set_value(typed, override, is_new=True)
    own = _container(typed)
    trusted = replace(trusted, prefixes=[*trusted.prefixes, *own.get("allow_targets", [])], own=[own])
    allowlist.check_interpolations(raw, trusted)
    run_folder.put(cfg, {key: value for key, value in raw.items() if key not in run_folder.OF_THE_COMMAND_LINE})
    if not trusted.is_signed:  # a file of a few bytes could start any number of processes
        cfg.data.num_workers = 0
    for override in overrides:
        run_folder.set_value(cfg, override)
    with run_folder.told_of(run, cfg) if run else contextlib.nullcontext():
        checks.check(cfg)
        return checks.to_plain(cfg), trusted


def _container(cfg: DictConfig) -> dict[str, Any]:
    content = OmegaConf.to_container(cfg, resolve=False)
    assert isinstance(content, dict)
    return {str(key): value for key, value in content.items()}
