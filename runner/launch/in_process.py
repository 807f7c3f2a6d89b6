"""Composes and runs experiments inside a Python program, such as a notebook, by the steps of the command line."""

from __future__ import annotations

import contextlib
import copy
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hydra._internal.callbacks import Callbacks
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path, get_args_parser
from hydra.core.config_search_path import SearchPathQuery
from hydra.core.hydra_config import HydraConfig
from hydra.core.utils import run_job
from hydra.types import HydraContext, RunMode
from omegaconf import DictConfig, read_write

from runner.config import checks, diff, errors, optimizations, resume, run_folder
from runner.config.composition.interpolation import quote, quote_nested
from runner.config.errors import ConfigError, RunError
from runner.config.resume import Resumption
from runner.config.run_folder import COMMAND_LINE_KEYS
from runner.config.spec import ExperimentSpec
from runner.launch import elastic, launcher, worker
from runner.launch.environment import is_distributed_launch
from runner.launch.job import Job
from runner.launch.process_state import own_hydra, preserved_process
from runner.utils.utils import escape_controls

_training = threading.Lock()  # a run uses global state: generators, signal handlers, the logger
_training_thread: int | None = None  # that holds the lock for a run
_POLL_S = 0.05


@dataclass
class Composition:
    """A composed config.

    Args:
        cfg: the config with Hydra's own section.
        config_dir: the user's folder of YAML, an absolute path.
        resumption: the run that it resumes.
        search_path: places that Hydra searched beside these.
        before: the config as it was composed, unresolved.
        lines: differences from the config of the resumed run.
    """

    cfg: DictConfig
    config_dir: str | None = None
    resumption: Resumption | None = None
    search_path: list[str] = field(default_factory=list)
    before: dict[str, Any] = field(default_factory=dict)
    lines: list[str] = field(default_factory=list)


def compose(overrides: Sequence[str], config_dir: str | os.PathLike[str] | None) -> Composition:
    """Composes a config as the command line does, and checks it as far as that needs no torch.

    Raises:
        ConfigError: a mistake in the overrides or the YAML.
    """
    if isinstance(overrides, str):
        raise ConfigError(f"overrides={overrides!r}: expected a list of texts; write compose([{overrides!r}])")
    if not isinstance(overrides, Sequence) or not all(isinstance(override, str) for override in overrides):
        raise ConfigError(f"overrides={overrides!r}: expected a list of texts, such as ['trainer.steps=100']")
    if flag := next((override for override in overrides if override.startswith("-")), None):
        raise ConfigError(f"{flag}: expected key=value, found a flag of the command line; {_remedy_for(flag)}")
    directory = None if config_dir is None else os.path.abspath(config_dir)
    of_directory = [] if directory is None else ["--config-dir", directory]
    with own_hydra(), raised_as_config_error():
        hydra = _open_hydra(directory)
        typed = [*of_directory, *map(quote_nested, overrides)]
        arguments, resumption = launcher.find_resumption(typed)
        parsed = get_args_parser().parse_args(arguments)
        cfg = hydra.compose_config("config", parsed.overrides, RunMode.RUN, with_log_configuration=False)
        if cfg.hydra.mode == RunMode.MULTIRUN:
            raise ConfigError("hydra.mode=MULTIRUN: expected one run; call train in a loop, or use python -m runner -m")
        with read_write(cfg):
            cfg.hydra.mode = RunMode.RUN
        lines = launcher.restore(cfg, "config", resumption) if resumption else []
        composed = Composition(cfg, directory, resumption, optimizations.searched_places(), lines=lines)
        composed.before = run_folder.to_unresolved(resume.without_hydra(cfg))
        launcher.check_values(cfg, resumption)
        return composed


def _remedy_for(flag: str) -> str:
    if flag.startswith("--config-dir"):
        return "write compose(overrides, config_dir=...)"
    return "call train in a loop, or use python -m runner -m" if flag in ("-m", "--multirun") else "leave it out"


def _open_hydra(directory: str | None) -> Hydra:
    """Returns Hydra with the runner's YAML and that of a directory, as `--config-dir` adds it."""
    search_path = create_config_search_path(str(checks.CONF_DIR))
    if directory is not None:
        if not os.path.isdir(directory):
            raise ConfigError(f"config_dir={directory}: no such folder")
        search_path.prepend("command-line", f"file://{directory}", SearchPathQuery(provider="schema"))
    return Hydra.create_main_hydra2("runner", search_path)


@contextlib.contextmanager
def raised_as_config_error(kind: type[ConfigError] = ConfigError) -> Iterator[None]:
    """Raises each mistake in a config as a ConfigError, with the message that the command line prints."""
    try:
        yield
    except Exception as error:
        message = errors.format_error(error)
        if message is None or isinstance(error, ConfigError):
            raise
        raise kind(message) from (error if errors.wants_traceback() else None)


def without_hydra(composed: Composition) -> DictConfig:
    """Returns a copy of a composed config without Hydra's own section."""
    return resume.without_hydra(composed.cfg)


def _acquire(message: str) -> None:
    """Takes the lock, once a thread that only builds modules has released it; raises the message if a run trains."""
    while not _training.acquire(timeout=_POLL_S):
        if _training_thread is not None:
            raise ConfigError(message)


@contextlib.contextmanager
def between_runs() -> Iterator[None]:
    """Lets a block build modules, which draw random numbers, while no other thread of this process trains.

    A callback of the run itself may build modules: the generators are then restored before the run uses them.

    Raises:
        ConfigError: another thread trains.
    """
    if _training_thread == threading.get_ident():
        yield
        return
    found = "found one, whose random numbers would change; open the run in another process"
    _acquire(f"engines: expected no run that trains in another thread of this process, {found}")
    try:
        yield
    finally:
        _training.release()


def train(composed: Composition) -> Path:
    """Trains a run to its end, or until Ctrl-C; returns its folder.

    After another signal, such as SIGTERM, the run is saved, and this process receives the signal again.

    Raises:
        ConfigError: a mistake in the config.
        RunError, or the error of the model or data: the run has failed.
        KeyboardInterrupt: a second Ctrl-C, or one before there was anything to save.
    """
    global _training_thread
    if is_distributed_launch():
        raise ConfigError("WORLD_SIZE: expected one process, found several of torchrun or srun; use python -m runner")
    _acquire("train: expected one run at a time, found another that trains in this process")
    _training_thread = threading.get_ident()
    try:
        with preserved_process(), own_hydra(composed.search_path, is_brief=False):
            folder = _train(composed)
    except KeyboardInterrupt as interrupt:
        if interrupt.args and interrupt.args[0] != signal.SIGINT:
            signal.raise_signal(interrupt.args[0])
        raise
    finally:
        _training_thread = None
        _training.release()
    record = run_folder.read_record(folder)
    name = str(record.get("reason")).partition(",")[0]
    if record.get("status") == "preempted" and name in signal.Signals.__members__:
        signal.raise_signal(signal.Signals[name])
    return folder


def _train(composed: Composition) -> Path:
    hydra = _open_hydra(composed.config_dir)
    composed = _record_edits(composed)
    with raised_as_config_error():
        try:
            launcher.claim_checked(composed.cfg, composed.resumption)
            for line in composed.lines:
                print(escape_controls(line))
            ended = run_job(
                lambda task: _run(task, composed.resumption),
                composed.cfg,
                job_dir_key="hydra.run.dir",
                job_subdir_key=None,
                hydra_context=HydraContext(hydra.config_loader, Callbacks()),
                configure_logging=False,
            )
        finally:
            launcher.remove_unused_folder()
        if isinstance(ended._return_value, Exception):  # without what Hydra prints where it raises it
            raise ended._return_value
    return Path(ended._return_value)


def _run(task: DictConfig, resumption: Resumption | None) -> Path:
    """Runs the job of a composed config, in this process or in workers; returns the folder."""
    job = _without_typed_commands(launcher.make_own_job(task, HydraConfig.get(), resumption))
    distributed = job.spec.distributed
    num_local = elastic.count_workers(distributed)
    if distributed.nnodes > 1:
        raise ConfigError(f"distributed.nnodes={distributed.nnodes}: expected 1 from Python; use python -m runner")
    if num_local == 1:
        worker.run_job(job, raises=True)
        return job.folder
    if threading.current_thread() is not threading.main_thread():
        found = f"distributed.nproc_per_node={distributed.nproc_per_node}"
        raise ConfigError(f"{found}: expected to be called from the main thread, which forwards signals to the workers")
    if elastic.run_workers(job, num_local, raises=True) in (1, 2):
        reason = run_folder.read_record(job.folder).get("reason") or "a rank has ended"
        raise RunError(f"{reason}; {job.folder / 'log.txt'} has the tracebacks")
    return job.folder


def _without_typed_commands(job: Job) -> Job:
    """Returns the job without reading standard input, which belongs to the program, unless that is asked for."""
    plain = job.spec.plain
    if plain["tracking"]["stdin"] != "auto":
        return job
    tracking = {**plain["tracking"], "stdin": False}
    return replace(job, spec=ExperimentSpec.from_plain({**plain, "tracking": tracking}))


def _record_edits(composed: Composition) -> Composition:
    """Returns a copy to run, whose overrides have the values that were set on the config after it was composed.

    A node that replaces the choice of a group is no override.


    Raises:
        ConfigError: a value makes a resumed run another one.
    """
    composed = replace(composed, cfg=copy.deepcopy(composed.cfg))
    after = run_folder.to_unresolved(resume.without_hydra(composed.cfg))
    changes = diff.find_changes(composed.before, after)
    if composed.resumption is not None and not composed.cfg.resume_allow_changes:
        remedy = "init_from=... (without resume=)"
        diff.check_same_run(_without_command_line(composed.before), _without_command_line(after), remedy)
    groups = composed.cfg.hydra.runtime.choices  # their keys take a choice there
    texts = [
        f"~{key}" if value is ... else f"{key}={_to_override(value)}"
        for key, value in changes.items()
        if key not in groups
    ]
    with read_write(composed.cfg):
        composed.cfg.hydra.overrides.task = [*composed.cfg.hydra.overrides.task, *texts]
    return composed


def _without_command_line(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if key not in COMMAND_LINE_KEYS}


def _to_override(value: Any) -> str:
    """Returns a value as Hydra's grammar of overrides reads it."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{key}:{_to_override(child)}" for key, child in value.items()) + "}"
    if isinstance(value, list):
        return f"[{','.join(map(_to_override, value))}]"
    if isinstance(value, str):
        return value if value.startswith("${") else quote(value)
    return "null" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
