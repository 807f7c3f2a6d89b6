"""What lies in a run's folder, read again: its config and overrides as they stand, its newest whole state, its record.

Owns where each lies and what is told when it is not whole. Believes nothing of it: that is `trust`'s. Must not import
torch at the top.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import socket
from collections.abc import Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf, read_write

from runner import mistakes
from runner.interpolation import told_by_hydra, without_elsewhere
from runner.mistakes import ConfigError
from runner.utils.files import make_folders

_MOST_ENTRIES, _MOST_LEVELS = 100_000, 16  # of a run's folder that are looked at
OF_THE_COMMAND_LINE = ("resume", "resume_allow_changes", "allow_targets")  # never taken over from a run's config


def find_run(path: Path) -> Path:
    """Returns the run's folder of a run's folder or of one of its checkpoints.

    Raises:
        ConfigError: it is neither.
    """
    if (path / "checkpoints").is_dir():
        return path
    written = Path(os.path.abspath(path))
    if _is_step(written.name) and written.parent.name == "checkpoints" and path.is_dir():
        return written.parent.parent  # of a link there, the run that has the link
    if _is_step(path.resolve().name) and path.is_dir():
        return path.resolve().parent.parent
    raise ConfigError(f"{path}: {'neither a run folder nor a checkpoint' if path.exists() else 'no such folder'}")


def _is_step(name: str) -> bool:
    return re.fullmatch(r"step_\d{8,}", name) is not None


def claim(wanted: Path, is_asked_for: bool, may_hold_run: bool = False) -> tuple[Path, bool]:
    """Returns a new run's folder, made, and whether it was not there before.

    Args:
        is_asked_for: it is this folder or none; otherwise another run of the same second makes it the next number's.
        may_hold_run: as where a scheduler starts a job again.
    Raises:
        ConfigError: it can't be made, or holds a run already.
    """
    folder, is_new = wanted, True
    for number in range(2, 1000):
        is_new = not folder.exists()
        try:
            make_folders(folder, exist_ok=is_asked_for)
        except FileExistsError:
            if is_asked_for:
                raise ConfigError(f"hydra.run.dir={folder}: is a file") from None
            folder = wanted.with_name(f"{wanted.name}-{number}")
        except OSError as error:
            raise ConfigError(f"hydra.run.dir={folder}: can't be made ({error.strerror})") from error
        else:
            break
    if (folder / "run.json").exists() and not may_hold_run:
        raise ConfigError(f"hydra.run.dir={folder}: holds a run already; resume={folder} goes on with it")
    return folder, is_new


def refuse_links(run: Path, links: Mapping[str, str] = {}, *, is_sweep: bool = False) -> None:
    """Checks that a run's folder holds files and folders alone: says early what `disk.confine` would refuse later.

    Of a folder with very many files or levels the first are looked at.

    Args:
        links: the folders that links in the run's folder may lead to, by the links' paths in it.
        is_sweep: it is a sweep's folder, where a launcher of Hydra's may put links that lead nowhere else.
    Raises:
        ConfigError: naming a link that leads elsewhere, a pipe, a socket or a device.
    """
    if (found := next(_find_irregular(run, links, is_sweep), None)) is None:
        return
    if found.is_symlink():
        raise ConfigError(
            f"{found}: a link; a run that goes on would write where it leads: put the file itself there, or remove it"
        )
    raise ConfigError(f"{found}: expected a file or a folder, found a pipe, a socket or a device; remove it")


def _find_irregular(run: Path, links: Mapping[str, str], is_sweep: bool) -> Iterator[Path]:
    num_seen, folders = 0, [run]
    root = Path(os.path.realpath(run))
    for folder in folders:  # it grows; a link is not entered
        try:
            entries = sorted(os.scandir(folder), key=lambda entry: entry.name)
        except OSError:  # who needs it finds out
            continue
        num_seen += len(entries)
        for entry in entries:
            path = folder / entry.name
            if entry.is_symlink():
                target = os.path.realpath(path)
                is_inside = is_sweep and Path(target).is_relative_to(root)
                if not is_inside and links.get(path.relative_to(run).as_posix()) != target:
                    yield path
            elif entry.is_dir(follow_symlinks=False):
                if len(path.parts) - len(run.parts) < _MOST_LEVELS and num_seen < _MOST_ENTRIES:
                    folders.append(path)
            elif not entry.is_file(follow_symlinks=False):
                yield path


def find_links(folder: Path) -> dict[str, str]:
    """Returns the links that a user has put into a run's folder before the run, by name: the folders they lead to.

    There are none where the folder holds anything else than such links and Hydra's own.
    """
    links = {}
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_symlink() and entry.is_dir():
                links[entry.name] = os.path.realpath(entry.path)
            elif entry.is_symlink() or entry.name != ".hydra":
                return {}
    return links


def read_config(run: Path) -> dict[str, Any]:
    """Returns a run's own config, unresolved.

    Raises:
        ConfigError: it is not there or can't be read.
    """
    content = _read_yaml(run / ".hydra" / "config.yaml")
    if not isinstance(content, dict) or "hydra" in content:
        raise ConfigError(f"{run / '.hydra' / 'config.yaml'}: not the config of a run")
    return {str(key): value for key, value in content.items()}


def told_of(run: Path, cfg: DictConfig) -> contextlib.AbstractContextManager[None]:
    """Has `${hydra:...}` of a run's config tell what it told when the run was begun, and the folder where it lies now.

    A value of Hydra's that reads what the machine knows is missing.
    """
    return told_by_hydra(cfg, lambda: without_elsewhere(_read_hydra(run)), run)


def _read_hydra(run: Path) -> Any:
    path = run / ".hydra" / "hydra.yaml"
    content = _read_yaml(path) if path.is_file() else {}
    return content.get("hydra", {}) if isinstance(content, dict) else {}


def read_overrides(run: Path) -> list[str]:
    """Returns the overrides that a run was last started with; none where no file tells."""
    path = run / ".hydra" / "overrides.yaml"
    content = _read_yaml(path) if path.is_file() else []
    if not isinstance(content, list):
        raise ConfigError(f"{path}: not the overrides of a run")
    return [str(override) for override in content]


def _read_yaml(path: Path) -> Any:
    try:
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(path.read_text(encoding="utf-8"))):
            raise ConfigError(f"{path}: has an alias (*), which a run's own config never has")
        return OmegaConf.to_container(OmegaConf.load(path), resolve=False)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; the run's folder is not whole") from None
    except Exception as error:  # of YAML, of its encoding, of the disk
        raise ConfigError(f"{path}: can't be read ({str(error).splitlines()[0]})") from error


def put(cfg: DictConfig, values: Mapping[str, Any]) -> None:
    """Puts values in the place of a config's own; a section with a schema keeps its types, and keys not given.

    Raises:
        ConfigError: a value of another type, or a key that the schema lacks.
    """
    try:
        with read_write(cfg):
            for key, value in values.items():
                if is_dataclass(OmegaConf.get_type(cfg, key)) and isinstance(value, Mapping):
                    put(cfg[key], value)
                else:
                    cfg[key] = value
    except Exception as error:
        if isinstance(error, ConfigError) or (message := mistakes.explain(error)) is None:
            raise
        raise ConfigError(message) from error


def find_checkpoint(path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Returns a checkpoint, or a run's newest whole one, with its content and why newer ones were passed over.

    Raises:
        ConfigError: it is not whole, naming file and check; or the run has none that is.
    """
    from runner import checkpoint

    faults: list[str] = []
    try:
        if (path / "checkpoints").is_dir():
            newest, faults = checkpoint.Checkpoints(path / "checkpoints").newest()
            if newest is None:
                raise ConfigError(f"{path} has no whole checkpoint. {' '.join(faults)}")
            path = newest
        return path, checkpoint.load(path), faults
    except checkpoint.CheckpointError as error:
        raise ConfigError(str(error)) from error


def read_record(run: Path) -> dict[str, Any]:
    """Returns a run's run.json; nothing where it is not there or can't be read."""
    try:
        record = json.loads((run / "run.json").read_bytes())
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_crashed(record: Mapping[str, Any]) -> bool:
    """Says whether a run.json says running while its process, of this host, is gone."""
    pid = record.get("pid")
    if record.get("status") != "running" or record.get("host") != socket.gethostname():
        return False
    if type(pid) is not int or pid < 1:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False
