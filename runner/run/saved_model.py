"""Opens a run, a checkpoint or an export to evaluate or export it: checks its config, then builds its engines.

Its config is untrusted until its signature or the allow-list says otherwise.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from runner.config import checks, run_folder
from runner.config.composition.interpolation import escape
from runner.config.errors import ConfigError, mention_start_directory, print_message
from runner.config.sections.data import without_workers
from runner.config.spec import ExperimentSpec
from runner.config.trust import import_path, signature
from runner.config.trust.allowlist import Allowlist, check_interpolations, check_paths, check_resolved_objects
from runner.utils.wrapper import Purpose

if TYPE_CHECKING:
    import torch

    from runner.engines import Engines

SUFFIX = ".safetensors"
_PRETRAINED_FACTS = "runner.json"  # in a folder that `runner.run.pretrained` has exported
_REMEDY = "--allow-targets {}"
_BUILDS_ENGINES = ("model", "optimizer", "scheduler", "feeder", "loss", "engines", "optimizations", "ema")


@dataclass(frozen=True)
class SavedModel:
    """An opened checkpoint or export: the paths in its config are checked, and nothing of it is imported yet.

    Args:
        path: of the checkpoint, or of the exported file.
        run: the run's folder; None for an export.
        plain: the resolved config.
        parts: the weights by engine, with `<engine>.optimizer` in a checkpoint.
        engine: the name of an export's engine.
        notes: warnings for the reader.
        origin: where this user has started the run; None for an untrusted config.
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
    origin: signature.Origin | None = None

    @cached_property
    def spec(self) -> ExperimentSpec:
        """The specification of the experiment that `plain` describes."""
        return ExperimentSpec.from_plain(self.plain)

    def without_forward(self) -> SavedModel:
        """Returns it without feeders, losses and metrics, for writing weights without a forward."""
        left_out: dict[str, Any] = {"feeder": None, "loss": None, "metrics": {}}
        engines = {name: {**own, **left_out} for name, own in self.plain["engines"].items()}
        return replace(self, plain={**self.plain, **left_out, "engines": engines})

    def check_roles(self, *roles: str) -> None:
        """Imports and checks the targets of the engines and of these roles; ignores the other roles.

        Raises:
            ConfigError: a target that is not allowed, can't be imported, or does not accept an argument.
        """
        from runner.config.targets import check_targets, seed_imports

        wanted = (*_BUILDS_ENGINES, *roles)
        used: dict[str, Any] = {key: value if key in wanted else None for key, value in self.plain.items()}
        used["data"] = {key: value if f"data.{key}" in wanted else None for key, value in self.plain["data"].items()}
        if self.engine is not None:
            used |= {"optimizer": None, "scheduler": None}
        check_paths(used, self.allowlist)
        if self.allowlist.prefixes and not self.allowlist.is_signed:
            import_path.add_deferred()
        seed_imports(self.plain["seed"])
        check_resolved_objects(used, self.allowlist)
        check_targets(used)

    def build_engines(self, device: torch.device, *, to_write: bool = False) -> Engines:
        """Returns the engines with their saved weights, and with their optimizers if evaluation needs these.

        Args:
            to_write: the weights are only written: optimizations that need the hardware of training are left out.
        Raises:
            ConfigError: they can't be built, or the weights are of other modules.
        """
        from runner.run.build.engines import build_engines
        from runner.run.weights import placeholders

        purpose = Purpose.write if to_write else Purpose.train if self.engine is None else Purpose.use
        nodes = {} if self.engine is None else self.spec.engines[self.engine].optimizations
        is_adapter = nodes.get("lora", {}).get("export") in (
            "adapter",
            "peft",
        )  # its base model needs the weights files
        builder = placeholders.PlaceholderBuilder(self.run or self.path, self.parts, self.allowlist.is_signed)
        engines = build_engines(self.spec, device, purpose, None if is_adapter else builder)
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
    """Opens a checkpoint, or the newest complete one of a run's folder, with overrides set on the run's config.

    Args:
        prefixes: modules that the config may name, beside the runner's and torch.nn.
        is_vouched_for: the user says that the run is theirs, which signs it.
    Raises:
        ConfigError: it is no run, is incomplete, or its config reads or names something that is not allowed.
    """
    from runner.checkpoint.checkpoints import FACTS

    if (path / _PRETRAINED_FACTS).is_file():
        remedy = "name the run, one of its checkpoints, or an export of format=sft"
        raise ConfigError(f"{path}: an export for from_pretrained, from which nothing is built here; {remedy}")
    run = run_folder.find_run(path)
    origin, reason = signature.identify(run, "--sign" if is_vouched_for else "")
    sign = "--sign, typed in the project's directory,"
    source = run / ".hydra" / "config.yaml"
    trusted = Allowlist(source, prefixes, (), reason, _REMEDY, sign, is_signed=origin is not None)
    plain, trusted = _check_config(run_folder.read_config(run), trusted, overrides, run)
    checkpoint, content, faults = run_folder.find_checkpoint(path)
    facts = content.pop(FACTS)
    step, best, fingerprint = facts["loop"]["step"], facts["best"], facts.get("fingerprint")
    notes = [f"Passed over: {fault}" for fault in faults]
    notes += signature.describe_links(origin) if origin and is_vouched_for else []
    record = run_folder.read_record(run)
    if run_folder.is_crashed(record):
        notes.insert(0, f"{run}: crashed: run.json says running, but its process {record['pid']} is gone")
    return SavedModel(checkpoint, run, plain, trusted, step, content, best, None, notes, fingerprint, origin)


def open_engines(path: Path, overrides: Sequence[str], prefixes: Sequence[str], *, may_move: bool) -> Engines:
    """Returns the engines of a checkpoint, or of a run's newest complete one, in evaluation mode.

    Args:
        may_move: they may be on the CPU if this machine lacks the device of the run.
    Raises:
        ConfigError: as of `open_checkpoint`, or a module can't be built.
    """
    import torch

    from runner.run.build.experiment import build_device
    from runner.utils.distributed import preserve_rng_state

    saved = open_checkpoint(path, overrides, prefixes)
    for warning in saved.notes:
        print_message(warning)
    with mention_start_directory(saved.origin.directory if saved.origin else None):
        with preserve_rng_state():
            saved.check_roles()
        try:
            device = build_device(saved.spec)
        except ConfigError:  # of another machine
            if not may_move:
                raise
            device = torch.device("cpu")
        with preserve_rng_state(device):
            engines = saved.build_engines(device)
    for engine in engines.values():
        engine.eval()
    return engines


def open_export(path: Path, overrides: Sequence[str] = (), prefixes: Sequence[str] = ()) -> SavedModel:
    """Opens an exported file, with overrides set on the config in its metadata.

    Raises:
        ConfigError: it is no export, is damaged, or its config reads or names something that is not allowed.
    """
    from runner.run.weights import placeholders
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
        signed_text = placeholders.signed_text(facts["config"], facts)
        import_path.prepend(signature.check_text(signed_text, facts.get("signature")).python_path)
        trusted = Allowlist(path, is_signed=True)
    except signature.SignatureError as error:
        trusted = Allowlist(path, prefixes, (), str(error), _REMEDY)
    # The config was resolved before the export: a text that looks like an interpolation is none.
    plain, trusted = _check_config(escape(raw), trusted, overrides)
    engines = plain["engines"] or {"model": {}}
    if name not in engines:
        raise ConfigError(f"{path}: it is of engine {name!r}, its config has {', '.join(engines)}")
    own = {key: value for key, value in engines[name].items() if key not in ("optimizer", "scheduler")}
    plain["engines"] = {name: own} if plain["engines"] else {}
    return SavedModel(
        path, None, plain, trusted, step, {name: weights}, engine=name, fingerprint=facts.get("fingerprint")
    )


def _read_facts(facts: Mapping[str, str], path: Path) -> tuple[dict[str, Any], str, int]:
    """Returns the config, engine and step in an export's metadata."""
    try:
        raw, name, step = checks.from_json(facts["config"]), facts["engine"], int(facts["step"])
        if isinstance(raw, dict):
            return raw, name, step
        reason = "its config is no mapping"
    except KeyError as error:
        reason = f"it has no {error}"
    except (ValueError, TypeError, RecursionError) as error:
        reason = f"it can't be read ({error})"
    raise ConfigError(f"{path}: no export of python -m runner.export: in its metadata, {reason}")


def _check_config(
    raw: dict[str, Any], trusted: Allowlist, overrides: Sequence[str], run: Path | None = None
) -> tuple[dict[str, Any], Allowlist]:
    """Returns a file's config with overrides set on it, checked and resolved, and an allow-list that has these, too.

    Args:
        run: the folder whose hydra.yaml `${hydra:...}` reads.
    """
    checks.register_with_hydra()
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        cfg = compose("config")
    typed = OmegaConf.create({})
    for override in overrides:
        run_folder.set_value(typed, override, is_new=True)
    own = run_folder.to_unresolved(typed)
    trusted = replace(trusted, prefixes=[*trusted.prefixes, *own.get("allow_targets", [])], own=[own])
    check_interpolations(raw, trusted)
    run_folder.put_values(cfg, {key: value for key, value in raw.items() if key not in run_folder.COMMAND_LINE_KEYS})
    if not trusted.is_signed:  # a small file could start any number of processes
        run_folder.put_values(cfg, {"data": without_workers()})
    for override in overrides:
        run_folder.set_value(cfg, override)
    with run_folder.recorded_hydra_config(run, cfg) if run else contextlib.nullcontext():
        checks.check_config(cfg)
        return checks.to_plain(cfg), trusted
