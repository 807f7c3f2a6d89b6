"""What lies in a run's folder, read again: its config and overrides as they stand, its newest whole state, its record.

Owns where each lies and what is told when it is not whole. Believes nothing of it: that is `trust`'s. Must not import
torch at the top.
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
from runner.config.composition.expansion import MAX_DEPTH, MAX_TEXTS, check_expansion, check_text
from runner.config.composition.interpolation import quote_nested, told_by_hydra, without_elsewhere
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
_OWN_NAMES = {".hydra", ".lock", "audio", "checkpoints", "exports", "log.txt", "metrics.jsonl", "run.json"}
_MOST_ENTRIES, _MOST_LEVELS = 100_000, 16  # of a run's folder that are looked at
# Never taken over from a run's config.
OF_THE_COMMAND_LINE = ("resume", "resume_allow_changes", "allow_targets", "sign")


def find_run(path: Path) -> Path:
    """Returns the run's folder of a run's folder or of one of its checkpoints.

    Raises:
        ConfigError: it is neither, or can't be looked at.
    """
    try:
        if (path / "checkpoints").is_dir():
            return path
        real = path.resolve()
        written = Path(os.path.abspath(path))
        if _is_step(written.name) and written.parent.name == "checkpoints" and path.is_dir():
            return written.parent.parent  # of a link there, the run that has the link
        if _is_step(real.name) and path.is_dir():
            return _find_run_of(real)
        path.exists()
    except OSError as error:
        raise ConfigError(f"{path}: can't be read ({error.strerror})") from error
    except ValueError as error:  # it holds NUL
        raise ConfigError(f"{path}: {error}") from error
    raise ConfigError(f"{path}: {'neither a run folder nor a checkpoint' if path.exists() else 'no such folder'}")


def _find_run_of(checkpoint: Path) -> Path:
    """Returns the run of a checkpoint, which may lie on another disk that the run's folder links to."""
    run = checkpoint.parent.parent
    return run if (run / ".hydra").is_dir() else signature.find_marked_run(checkpoint.parent) or run


def _is_step(name: str) -> bool:
    return re.fullmatch(r"step_\d{8,}", name) is not None


def is_file(path: Path) -> bool:
    """Says whether a path is a file, such as an export; no path that can't be looked at is."""
    try:
        return path.is_file()
    except (OSError, ValueError):
        return False


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


def refuse_links(run: Path, links: Mapping[str, str] = {}, sign: str = "") -> None:
    """Checks that a run's folder holds files and folders alone: says early what `disk.confine` would refuse later.

    Of a folder with very many files or levels the first are looked at.

    Args:
        links: the folders that links in the run's folder may lead to, by the links' paths in it.
        sign: how the user, whose own run it is, has a link recorded.
    Raises:
        ConfigError: naming a link that leads elsewhere, a pipe, a socket or a device.
    """
    if (found := next(_find_irregular(run, links), None)) is None:
        return
    if found.is_symlink():
        can_be_signed = sign and found.parent == run and found.is_dir()
        signed = f"; if you made it for this run of yours: {sign} records where it leads"
        remedy = signed if can_be_signed else ", or remove it"
        raise ConfigError(f"{found}: a link; a run would write where it leads: put the file itself there{remedy}")
    raise ConfigError(f"{found}: expected a file or a folder, found a pipe, a socket or a device; remove it")


def _find_irregular(run: Path, links: Mapping[str, str]) -> Iterator[Path]:
    num_seen, folders = 0, [run]
    for folder in folders:  # it grows; a link is not entered
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:  # who needs it finds out
            continue
        num_seen += len(entries)
        for entry in entries:
            path = folder / entry.name
            if folder == run and not _is_own_name(entry.name):
                continue
            if entry.is_symlink():
                if links.get(path.relative_to(run).as_posix()) != os.path.realpath(path):
                    yield path
            elif entry.is_dir(follow_symlinks=False):
                if len(path.parts) - len(run.parts) < _MOST_LEVELS and num_seen < _MOST_ENTRIES:
                    folders.append(path)
            elif not entry.is_file(follow_symlinks=False):
                yield path


def _is_own_name(name: str) -> bool:
    """Says whether a run writes to a file or folder of that name; what else lies in its folder is the user's."""
    return name in _OWN_NAMES or name.startswith("events.out.tfevents.")


def refuse_links_of_sweep(folder: Path) -> None:
    """Checks that no link leads out of a sweep's folder, up to those of its jobs: Hydra writes there through links.

    A launcher of Hydra's may put links there that lead nowhere else.

    Raises:
        ConfigError: naming a link, a pipe, a socket or a device.
    """
    root = Path(os.path.realpath(folder))
    num_seen, folders = 0, [folder] if folder.is_dir() else []
    for each in folders:  # it grows
        with os.scandir(each) as found:
            entries = sorted(found, key=lambda entry: entry.name)
        for entry in entries:
            num_seen += 1
            if entry.is_symlink():
                if Path(os.path.realpath(entry.path)).is_relative_to(root) and entry.name != "multirun.yaml":
                    continue
                raise ConfigError(f"{entry.path}: a link; a job of the sweep would write where it leads: remove it")
            if entry.is_dir():
                is_job = any(os.path.lexists(os.path.join(entry.path, mark)) for mark in (".hydra", "run.json"))
                if not is_job and num_seen < _MOST_ENTRIES:
                    folders.append(Path(entry.path))
            elif entry.name == "multirun.yaml" and entry.stat().st_nlink > 1:
                raise ConfigError(f"{entry.path}: has another name, a hard link, which Hydra would write to; remove it")
            elif not entry.is_file():
                raise ConfigError(f"{entry.path}: expected a file or a folder, found a pipe, a socket or a device")


def refuse_links_to(job: Path, sweep: Path) -> None:
    """Checks that the folder of a sweep's job lies in the sweep's.

    Raises:
        ConfigError: a folder between them, or the job's own, is a link.
    """
    root = Path(os.path.abspath(sweep))
    for place in (job, *job.parents):
        if root in place.parents and place.is_symlink():
            raise ConfigError(f"{place}: a link; a job of the sweep would write where it leads: remove it")


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
    """Returns a run's own config, unresolved; it expands to a bounded size.

    Raises:
        ConfigError: it is not there, can't be read, or expands to more.
    """
    path = run / ".hydra" / "config.yaml"
    content = _read_yaml(path)
    if not isinstance(content, dict) or "hydra" in content:
        raise ConfigError(f"{path}: not the config of a run")
    config = update_paths({str(key): value for key, value in content.items()})
    reads_hydra = any("${hydra:" in text for text in _texts(config))
    _check(path, lambda: check_expansion(config, _read_hydra(run) if reads_hydra else None, is_strict=True))
    return config


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for child in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from _texts(child)


def _check(path: Path, check: Callable[[], None]) -> None:
    try:
        check()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def told_of(run: Path, cfg: DictConfig) -> contextlib.AbstractContextManager[None]:
    """Has `${hydra:...}` of a run's config tell what it told when the run was begun, and the folder where it lies now.

    A value of Hydra's that reads what the machine knows is missing. Hydra's config and the run's together expand to a
    bounded size, or the first that is told of it raises ConfigError.
    """

    def read() -> Any:
        hydra = without_elsewhere(_read_hydra(run))
        _check(run / ".hydra" / "hydra.yaml", lambda: check_expansion(cfg, hydra))
        return hydra

    return told_by_hydra(cfg, read, run)


def _read_hydra(run: Path) -> Any:
    path = run / ".hydra" / "hydra.yaml"
    content = _read_yaml(path) if os.path.lexists(path) else {}
    return content.get("hydra", {}) if isinstance(content, dict) else {}


def read_overrides(run: Path) -> list[str]:
    """Returns the overrides that a run was last started with; none where no file tells.

    Raises:
        ConfigError: it can't be read, or parsing it would take long.
    """
    path = run / ".hydra" / "overrides.yaml"
    content = _read_yaml(path) if os.path.lexists(path) else []
    if not isinstance(content, list):
        raise ConfigError(f"{path}: not the overrides of a run")
    overrides = [str(override) for override in content]
    _check(path, lambda: _check_overrides(overrides))
    return overrides


def _check_overrides(overrides: list[str]) -> None:
    """Checks that Hydra parses overrides in little time, and without exhausting Python's stack."""
    for number, override in enumerate(overrides):
        check_text(override, f"override {number}")
    counts = {
        "overrides": (len(overrides), _MAX_OVERRIDES),
        "characters": (sum(map(len, overrides)), MAX_TEXTS),
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
    except Exception as error:  # of YAML, of its encoding
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
    """Checks a YAML text while it is parsed, before values are made of it: some texts would make any number of them.

    Raises:
        ConfigError: it has what a config that OmegaConf has written never has, or too much of what it may have.
    """
    depth = num_characters = 0
    for number, event in enumerate(yaml.parse(text)):
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent):
            raise ConfigError(f"{path}: has an alias (*), which a run's own config never has")
        if depth > MAX_DEPTH or number > _MAX_EVENTS:
            limit = f"nested over {MAX_DEPTH} deep" if depth > MAX_DEPTH else f"over {_MAX_EVENTS:,} keys and values"
            raise ConfigError(f"{path}: line {event.start_mark.line + 1}: {limit}")
        if (tag := getattr(event, "tag", None)) and not tag.startswith(_TAGS):
            raise ConfigError(f"{path}: line {event.start_mark.line + 1}: has the tag {tag[:60]}, which no config has")
        if isinstance(event, yaml.ScalarEvent) and "${" in event.value:  # OmegaConf parses it as soon as it is read
            check_text(event.value, f"{path}: line {event.start_mark.line + 1}")
            num_characters += len(event.value)
            if num_characters > MAX_TEXTS:
                raise ConfigError(f"{path}: its texts with interpolations have over {MAX_TEXTS:,} characters")
        # Python reads 4300 digits at most, and a number of base 60 (1:30:00) takes its square of time.
        if isinstance(event, yaml.ScalarEvent) and event.implicit[0] and _LONG_NUMBER.match(event.value):
            raise ConfigError(f"{path}: line {event.start_mark.line + 1}: a number of over {_MAX_DIGITS} digits")


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
        if isinstance(error, ConfigError) or (message := errors.format_error(error)) is None:
            raise
        raise ConfigError(message) from error


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
    """Returns a checkpoint, or a run's newest whole one, with its content and why newer ones were passed over.

    Raises:
        ConfigError: it is not whole, naming file and check; or the run has none that is.
    """
    from runner.checkpoint import checkpoints

    faults: list[str] = []
    try:
        if not (path / "checkpoints").is_dir():
            return path, load_checked(path), faults
        for found in checkpoints.Checkpoints(path / "checkpoints").newest_first():
            try:
                return found, load_checked(found), faults
            except checkpoints.CheckpointError as error:
                faults.append(str(error))
    except checkpoints.CheckpointError as error:
        raise ConfigError(str(error)) from error
    except OSError as error:
        raise ConfigError(f"{error.filename or path}: can't be read ({error.strerror or error})") from error
    raise ConfigError(f"{path} has no whole checkpoint. {' '.join(faults)}")


def load_checked(path: Path) -> dict[str, Any]:
    """Returns a whole checkpoint's content, whose values have the types that a run reads.

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
    """Returns a run's run.json; nothing where it is not there or can't be read. Its values may be of any type."""
    try:
        record = parse_json(read_bounded(run / "run.json", _MAX_RECORD_BYTES))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def is_crashed(record: Mapping[str, Any]) -> bool:
    """Says whether a run.json says running while its process, of this host, is gone."""
    pid = record.get("pid")
    if record.get("status") != "running" or record.get("host") != socket.gethostname():
        return False
    if type(pid) is not int or not 0 < pid < 1 << 31:
        return False
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return True
    except OSError:  # another user's
        return False
    return False
