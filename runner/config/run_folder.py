"""Finds and reads a run's folder: its config, overrides, newest complete checkpoint and record.

A folder may come from anybody, so every file is read within bounds, and a link out of the folder is refused. The
allow-list in `config.trust` decides which names a config may use.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import socket
from collections.abc import Callable, Iterator, Mapping
from dataclasses import is_dataclass
from pathlib import Path
from typing import Any

import yaml
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.config import errors
from runner.config.aliases import update_paths
from runner.config.composition.expansion import (
    MAX_DEPTH,
    MAX_TOTAL_TEXT_LENGTH,
    check_expansion,
    check_interpolated_text,
)
from runner.config.composition.interpolation import mask_other_resolvers, quote_nested, use_hydra_config
from runner.config.diff import get_value
from runner.config.errors import ConfigError
from runner.config.trust import signature
from runner.utils.files import make_folders, read_bounded
from runner.utils.files.strict_json import parse_json

_MAX_YAML_BYTES = 1 << 20
_MAX_EVENTS = 20_000
_MAX_DIGITS = 400
_MAX_KEY = 1_000  # characters
_MAX_OVERRIDES = 1_000
_MAX_COMMAS = 1_000  # Hydra parses a list in the square of its length: 0.1 s
_MAX_RECORD_BYTES = 8 << 20
_LONG_NUMBER = re.compile(rf"[-+.0-9][0-9a-fA-FxXoO_:.+-]{{{_MAX_DIGITS},}}")
_TAGS = ("tag:yaml.org,2002:binary", "tag:yaml.org,2002:python/object/apply:pathlib.")  # what OmegaConf writes
_OWN_NAMES = {
    ".hydra",
    ".lock",
    "audio",
    "checkpoints",
    "exports",
    "log.txt",
    "metrics.csv",
    "metrics.jsonl",
    "run.json",
}
_MAX_ENTRIES = 100_000  # of a folder that is searched for links
_MAX_LEVELS = 16
# Keys that are set on a command line only, and never read from a run's config.
COMMAND_LINE_KEYS = ("resume", "resume_allow_changes", "allow_targets", "sign")


def find_run(path: Path) -> Path:
    """Returns the folder of a run from that folder or from one of its checkpoints.

    Raises:
        ConfigError: the path is neither, or can't be read.
    """
    try:
        if (path / "checkpoints").is_dir():
            return path
        absolute = Path(os.path.abspath(path))
        if _is_step(absolute.name) and absolute.parent.name == "checkpoints" and path.is_dir():
            return absolute.parent.parent  # of a link there, the run that has the link
        checkpoint = path.resolve()
        if _is_step(checkpoint.name) and path.is_dir():
            run = checkpoint.parent.parent
            # The run's folder may have a link to its checkpoints on another disk.
            return run if (run / ".hydra").is_dir() else signature.find_marked_run(checkpoint.parent) or run
        reason = "neither a run folder nor a checkpoint" if path.exists() else "no such folder"
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:  # the path contains NUL
        raise ConfigError(f"{path}: {error}") from error
    raise ConfigError(f"{path}: {reason}")


def _is_step(name: str) -> bool:
    return re.fullmatch(r"step_\d{8,}", name) is not None


def claim_folder(wanted: Path, is_asked_for: bool, may_hold_run: bool = False) -> tuple[Path, bool]:
    """Creates a new run's folder; returns it, and whether it was not there before.

    Args:
        is_asked_for: the user named this folder; otherwise a number is appended if another run has just taken it.
        may_hold_run: a scheduler starts the job again, so that its run may be there.
    Raises:
        ConfigError: it can't be created, or holds a run already.
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


def refuse_links(run: Path, links: Mapping[str, str] = {}, sign: str = "") -> None:
    """Checks that a run's folder holds regular files and folders only, as `disk.confine` requires later.

    Args:
        links: the folders that links may lead to, by the paths of the links in the run's folder.
        sign: how the user records a link in a run of theirs.
    Raises:
        ConfigError: naming a link that leads elsewhere, a pipe, a socket or a device.
    """
    for entry in _scan(run, lambda path: path.parent != run or _is_own_name(path.name)):
        path = Path(entry.path)
        if path.parent == run and not _is_own_name(entry.name):  # the user's file, which a run never writes to
            continue
        if entry.is_symlink() and links.get(path.relative_to(run).as_posix()) != os.path.realpath(path):
            signed = f"; if you made it for this run of yours: {sign} records where it leads"
            remedy = signed if sign and path.parent == run and path.is_dir() else ", or remove it"
            raise ConfigError(f"{path}: a link; a run would write where it leads: put the file itself there{remedy}")
        _check_regular(entry)


def _scan(root: Path, enters: Callable[[Path], bool]) -> Iterator[os.DirEntry[str]]:
    """Yields the entries below a folder, level by level and sorted; follows no link.

    Of a folder with very many files or levels only the first are yielded.
    """
    num_seen, folders = 0, [root]
    for folder in folders:  # the list grows
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:  # whoever needs the folder reports it
            continue
        num_seen += len(entries)
        for entry in entries:
            yield entry
            path = Path(entry.path)
            is_within_bounds = len(path.parts) - len(root.parts) < _MAX_LEVELS and num_seen < _MAX_ENTRIES
            if is_within_bounds and entry.is_dir(follow_symlinks=False) and enters(path):
                folders.append(path)


def _check_regular(entry: os.DirEntry[str]) -> None:
    """Checks that an entry is a file, a folder or a link."""
    if not (entry.is_symlink() or entry.is_dir() or entry.is_file()):
        raise ConfigError(f"{entry.path}: expected a file or a folder, found a pipe, a socket or a device; remove it")


def _is_own_name(name: str) -> bool:
    """Returns whether a run writes to a file or folder of that name."""
    return name in _OWN_NAMES or name.startswith("events.out.tfevents.")


def refuse_links_of_sweep(folder: Path) -> None:
    """Checks that no link leads out of a sweep's folder, as Hydra writes there through links.

    A launcher of Hydra's may put links there that stay in the folder. The folders of jobs are checked with their runs.

    Raises:
        ConfigError: naming a link, a pipe, a socket or a device.
    """
    root = Path(os.path.realpath(folder))
    for entry in _scan(folder, lambda path: not any(os.path.lexists(path / mark) for mark in (".hydra", "run.json"))):
        is_summary = entry.name == "multirun.yaml"
        if entry.is_symlink() and (is_summary or not Path(os.path.realpath(entry.path)).is_relative_to(root)):
            raise _leads_out(entry.path)
        _check_regular(entry)
        if is_summary and entry.stat().st_nlink > 1:
            raise ConfigError(f"{entry.path}: has another name, a hard link, which Hydra would write to; remove it")


def _leads_out(path: str | Path) -> ConfigError:
    return ConfigError(f"{path}: a link; a job of the sweep would write where it leads: remove it")


def refuse_links_to(job: Path, sweep: Path) -> None:
    """Checks that the folder of a sweep's job is in the sweep's folder.

    Raises:
        ConfigError: a folder between them, or the job's own, is a link.
    """
    root = Path(os.path.abspath(sweep))
    for folder in (job, *job.parents):
        if root in folder.parents and folder.is_symlink():
            raise _leads_out(folder)


def find_links(folder: Path) -> dict[str, str]:
    """Returns the folders that links lead to, by the names of the links that a user has put into a new run's folder.

    There are none if the folder holds anything but such links and Hydra's own folder.
    """
    paths = [path for path in folder.iterdir() if path.name != ".hydra" or path.is_symlink()]
    has_only_links = all(path.is_symlink() and path.is_dir() for path in paths)
    return {path.name: os.path.realpath(path) for path in paths} if has_only_links else {}


def read_config(run: Path) -> dict[str, Any]:
    """Returns a run's config, unresolved; it expands to a bounded size.

    Raises:
        ConfigError: it is missing, can't be read, or expands to more.
    """
    path = run / ".hydra" / "config.yaml"
    content = _read_yaml(path)
    if not isinstance(content, dict) or "hydra" in content:
        raise ConfigError(f"{path}: not the config of a run")
    config = update_paths({str(key): value for key, value in content.items()})
    hydra = _read_hydra(run) if "${hydra:" in repr(config) else None
    with _naming(path):
        check_expansion(config, hydra, is_strict=True)
    return config


@contextlib.contextmanager
def _naming(path: Path) -> Iterator[None]:
    """Puts the name of a file before a message about its content."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def recorded_hydra_config(run: Path, cfg: DictConfig) -> contextlib.AbstractContextManager[None]:
    """Resolves `${hydra:...}` in a run's config by the hydra.yaml of its start, and by where its folder is now.

    A value of hydra.yaml that reads this machine is missing. The first interpolation raises ConfigError if
    hydra.yaml and the config together expand to too much.
    """

    def read() -> Any:
        hydra = mask_other_resolvers(_read_hydra(run))
        with _naming(run / ".hydra" / "hydra.yaml"):
            check_expansion(cfg, hydra)
        return hydra

    return use_hydra_config(cfg, read, run)


def _read_hydra(run: Path) -> Any:
    path = run / ".hydra" / "hydra.yaml"
    content = _read_yaml(path) if os.path.lexists(path) else {}
    return content.get("hydra", {}) if isinstance(content, dict) else {}


def read_choices(run: Path) -> dict[str, Any]:
    """Returns the choices of groups that a run was started with; a value may be anything."""
    node = get_value(_read_hydra(run), ("runtime", "choices"), {})
    return node if isinstance(node, dict) else {}


def read_overrides(run: Path) -> list[str]:
    """Returns the overrides that a run was last started with; none if they are not recorded.

    Raises:
        ConfigError: they can't be read, or parsing them would take long.
    """
    path = run / ".hydra" / "overrides.yaml"
    content = _read_yaml(path) if os.path.lexists(path) else []
    if not isinstance(content, list):
        raise ConfigError(f"{path}: not the overrides of a run")
    overrides = [str(override) for override in content]
    with _naming(path):
        _check_overrides(overrides)
    return overrides


def _check_overrides(overrides: list[str]) -> None:
    """Checks that Hydra parses overrides in little time, and without exhausting Python's stack."""
    for number, override in enumerate(overrides):
        check_interpolated_text(override, f"override {number}")
    counts = {
        "overrides": (len(overrides), _MAX_OVERRIDES),
        "characters": (sum(map(len, overrides)), MAX_TOTAL_TEXT_LENGTH),
        "commas in one override": (max((override.count(",") for override in overrides), default=0), _MAX_COMMAS),
        "commas": (sum(override.count(",") for override in overrides), 5 * _MAX_COMMAS),
    }
    for kind, (found, limit) in counts.items():
        if found > limit:
            raise ConfigError(f"has {found:,} {kind}; {limit:,} at most are read")


def _read_yaml(path: Path) -> Any:
    try:
        data = read_bounded(path, _MAX_YAML_BYTES)
        if not signature.is_as_checked(path, data):
            raise ConfigError(f"{path}: was modified while it was read; try again")
        text = data.decode()
        _check_events(path, text)
        content = OmegaConf.to_container(OmegaConf.load(io.StringIO(text)), resolve=False)
    except ConfigError:
        raise
    except FileNotFoundError:
        raise ConfigError(f"{path}: no such file; the run's folder is not whole") from None
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror or error})") from error
    except Exception as error:  # of the parser, or of the encoding
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ConfigError(f"{path}: can't be read ({reason})") from error
    if key := next((key for key in _keys(content) if len(str(key)) > _MAX_KEY), None):
        raise ConfigError(f"{path}: the key {str(key)[:60]}... has over {_MAX_KEY:,} characters")
    return content


def _keys(value: Any) -> Iterator[Any]:
    for key, child in value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ():
        yield key
        yield from _keys(child)


def _check_events(path: Path, text: str) -> None:
    """Checks a YAML text while it is parsed, before values are made of it: some short texts make very many values.

    Raises:
        ConfigError: it has what OmegaConf never writes to a config, or too much of it.
    """
    depth = num_characters = 0
    for number, event in enumerate(yaml.parse(text)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}: has an alias (*), which a run's own config never has")
        line = f"{path}: line {event.start_mark.line + 1}"
        if depth > MAX_DEPTH:
            raise ConfigError(f"{line}: nested over {MAX_DEPTH} deep")
        if number > _MAX_EVENTS:
            raise ConfigError(f"{line}: over {_MAX_EVENTS:,} keys and values")
        if (tag := getattr(event, "tag", None)) and not tag.startswith(_TAGS):
            raise ConfigError(f"{line}: has the tag {tag[:60]}, which no config has")
        text = event.value if isinstance(event, yaml.ScalarEvent) else ""
        if "${" in text:  # OmegaConf parses it as soon as it is read
            check_interpolated_text(text, line)
            num_characters += len(text)
            if num_characters > MAX_TOTAL_TEXT_LENGTH:
                raise ConfigError(
                    f"{path}: its texts with interpolations have over {MAX_TOTAL_TEXT_LENGTH:,} characters"
                )
        # Python reads 4300 digits at most, and the time for a number of base 60 (1:30:00) grows with its square.
        if _LONG_NUMBER.match(text) and event.implicit[0]:
            raise ConfigError(f"{line}: a number of over {_MAX_DIGITS} digits")


def put_values(cfg: DictConfig, values: Mapping[str, Any]) -> None:
    """Replaces values of a config; a section with a schema keeps its types, and the keys that are not given.

    Raises:
        ConfigError: a value of another type, or a key that the schema lacks.
    """
    try:
        with read_write(cfg):
            for key, value in values.items():
                if is_dataclass(OmegaConf.get_type(cfg, key)) and isinstance(value, Mapping):
                    put_values(cfg[key], value)
                else:
                    cfg[key] = value
    except Exception as error:
        if isinstance(error, ConfigError) or (message := errors.format_error(error)) is None:
            raise
        raise ConfigError(message) from error


def to_unresolved(cfg: DictConfig) -> dict[str, Any]:
    """Returns a config as plain values, with its interpolations as they are."""
    content: Any = OmegaConf.to_container(cfg, resolve=False, enum_to_str=True)
    return dict(content)


def set_value(cfg: DictConfig, text: str, *, is_new: bool = False) -> None:
    """Sets one `key=value`, adds a `+key=value` or removes a `~key`, as Hydra reads them.

    Raises:
        ConfigError: it is another kind of override, or a choice of conf/.
    """
    override = OverridesParser.create().parse_override(quote_nested(text))
    key = override.key_or_group
    if override.is_sweep_override() or override.package or "/" in key or (is_new and override.is_delete()):
        raise ConfigError(f"{text}: expected key=value")
    if override.is_delete():
        parent, _, name = key.rpartition(".")
        node = OmegaConf.select(cfg, parent) if parent else cfg
        if not OmegaConf.is_dict(node) or name not in node:
            raise ConfigError(f"{text}: no such key")
        with open_dict(node):
            del node[name]
        return
    value = override.value()
    if not is_new and isinstance(value, str) and OmegaConf.is_dict(OmegaConf.select(cfg, key)):
        raise ConfigError(f"{text}: a choice of conf/ can't be made here; set its keys, or {key}={{_target_: ...}}")
    is_added = is_new or override.is_add() or override.is_force_add()
    is_whole = isinstance(value, dict) and "_target_" in value  # no argument of what it replaces is kept
    OmegaConf.update(cfg, key, value, merge=not is_whole, force_add=is_added)


def find_checkpoint(path: Path) -> tuple[Path, dict[str, Any], list[str]]:
    """Returns a checkpoint, or a run's newest complete one, with its content and why newer ones were passed over.

    Raises:
        ConfigError: it is incomplete, naming file and check; or the run has none that is complete.
    """
    from runner.checkpoint import checkpoints

    faults: list[str] = []
    try:
        if not (path / "checkpoints").is_dir():
            return path, load_checked(path), faults
        for checkpoint in checkpoints.Checkpoints(path / "checkpoints").newest_first():
            try:
                return checkpoint, load_checked(checkpoint), faults
            except checkpoints.CheckpointError as error:
                faults.append(str(error))
    except checkpoints.CheckpointError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: can't be read ({error.strerror or error})") from error
    raise ConfigError(f"{path} has no whole checkpoint. {' '.join(faults)}")


def load_checked(path: Path) -> dict[str, Any]:
    """Returns the content of a complete checkpoint; its values have the types that a run reads.

    Raises:
        CheckpointError: naming the file, and the check that failed.
    """
    from runner.checkpoint import checkpoints
    from runner.config import checkpoint_facts

    content = checkpoints.load(path)
    try:
        checkpoint_facts.check_content(content)
    except ValueError as error:
        raise checkpoints.CheckpointError(f"{path}: {error}") from error
    return content


def read_record(run: Path) -> dict[str, Any]:
    """Returns a run's run.json; empty if it can't be read. Its values may be of any type."""
    try:
        record = parse_json(read_bounded(run / "run.json", _MAX_RECORD_BYTES))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_crashed(record: Mapping[str, Any]) -> bool:
    """Returns whether a run.json has the status running although its process, on this host, is gone."""
    pid = record.get("pid")
    is_here = record.get("status") == "running" and record.get("host") == socket.gethostname()
    if not is_here or type(pid) is not int or not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except OSError as error:  # also of a process of another user
        return isinstance(error, ProcessLookupError)
    return False
