"""From a composed config to a run: its folder, then the run itself, in this process or in workers.

Must not import torch at the top: what is wrong in the config is told before that.
"""

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace
from pathlib import Path
from typing import Any, NoReturn

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner.config import checks, errors, hparams, resume, run_folder
from runner.config.composition.interpolation import fill_cache, fix_values, quote, told_by_hydra
from runner.config.errors import ConfigError
from runner.config.resume import Resumption
from runner.config.trust import import_path, signature
from runner.config.trust.signature import Origin
from runner.control import signals
from runner.launch import elastic, sweep, worker
from runner.launch import job as handover
from runner.launch.environment import is_distributed_launch
from runner.launch.job import Job
from runner.utils.files import disk, read_bounded, remove_tree
from runner.utils.utils import describe, escape_controls, one_line

_joined: worker.WorkerGroup | None = None  # where torchrun or srun have started several processes
_resumption: Resumption | None = None  # of this command line, from before Hydra reads it to the end
_made: Path | None = None  # the run's folder, if it was not there before


class RunFolder(Callback):
    """Checks the config and claims the run's folder, before Hydra writes into it.

    Args:
        keys: of a sweep's hyperparameters, which its jobs read in their config.
    """

    def __init__(self, **keys: list[str] | None) -> None:
        pass

    def on_multirun_start(self, config: DictConfig, **given: Any) -> None:
        """Checks the folder of the sweep before Hydra writes into it, as it does through links.

        Leaves Ctrl-C to a launcher that runs the jobs in other processes: it may have to stop them.
        """
        try:
            run_folder.refuse_links_of_sweep(Path(config.hydra.sweep.dir))
        except ConfigError as error:  # Hydra turns what a callback raises into a warning, and would go on
            _end(error)
        if not _is_basic(config.hydra.launcher):
            signals.raise_on_interrupt()
        fill_cache(config)
        sweep.begin(_typed(config.hydra))
        hparams.put_into_jobs(config)

    def on_multirun_end(self, config: DictConfig, **given: Any) -> None:
        """Prints the table of all jobs; ends the program where one of them has failed."""
        if status := sweep.end():
            raise SystemExit(status)

    def on_run_start(self, config: DictConfig, **given: Any) -> None:
        """Ends the program with one message where the config is wrong: nothing was made yet."""
        try:
            lines = _restore(config, given["config_name"], _resumption) if _resumption else []
            with _told_by_hydra(config, config):
                fix_values(config)
            task = copy.deepcopy(config)
            with read_write(task), open_dict(task):
                del task["hydra"]
            with _told_by_hydra(config, task):
                _check(task)
            folder = _claim(config, task)
        except Exception as error:  # Hydra turns what a callback raises into a warning, and would go on
            _end(error)
        for line in lines:
            print(escape_controls(line))
        with read_write(config):
            config.hydra.run.dir = str(folder)


def shows_resumed(arguments: list[str]) -> bool:
    """Prints the config of the run that goes on where `--cfg` asks for it; says whether it did."""
    if _resumption is None:
        return False
    parsed = get_args_parser().parse_args(arguments)
    if parsed.cfg not in ("job", "all"):
        return False
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        cfg = compose("config", parsed.overrides, return_hydra_config=True)
        _restore(cfg, "config", _resumption)
    if parsed.cfg == "job":
        with read_write(cfg), open_dict(cfg):
            del cfg["hydra"]
    with run_folder.told_of(_resumption.run, cfg):
        shown = OmegaConf.select(cfg, parsed.package) if parsed.package else cfg
        print(OmegaConf.to_yaml(shown, resolve=parsed.resolve) if OmegaConf.is_config(shown) else shown, end="")
    return True


def _restore(cfg: DictConfig, config_name: str, asked: Resumption) -> list[str]:
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    return resume.restore(cfg, asked, lambda overrides: hydra.compose_config(config_name, overrides, RunMode.RUN))


def _told_by_hydra(cfg: DictConfig, task: DictConfig) -> contextlib.AbstractContextManager[None]:
    """Has `${hydra:...}` tell what it will when the job runs, but for another name of its folder."""
    if _resumption is not None:
        return run_folder.told_of(_resumption.run, task)
    return told_by_hydra(task, lambda: cfg.hydra, Path(cfg.hydra.run.dir))


def _check(cfg: DictConfig) -> None:
    checks.check(cfg)
    from runner.config import targets  # what they name is imported, and torch with it, once the rest is right
    from runner.config.trust import allowlist

    plain = checks.to_plain(cfg)
    if _resumption is None or _resumption.origin is None:
        import_path.add_deferred()
    targets.seed_imports(plain["seed"])
    if _resumption is not None:
        assert _resumption.trust is not None
        allowlist.check_resolved_objects(plain, _resumption.trust)
    targets.check_targets(plain)


def _claim(cfg: DictConfig, task: DictConfig) -> Path:
    wanted = Path(cfg.hydra.run.dir)
    if (given := OmegaConf.select(task, "resume")) is not None:
        if _resumption is None:
            raise ConfigError(f"resume={given}: give it on the command line; it stands in a YAML file")
        return wanted
    if task.distributed.nnodes > 1 and _joined is None:
        return wanted  # of several machines the one with the first rank claims it
    global _made
    folder, is_new = run_folder.claim(wanted, _is_folder_given(cfg.hydra.overrides.hydra), import_path.is_requeued())
    _made = folder.resolve() if is_new else None
    return folder


def _is_folder_given(overrides: Any) -> bool:
    return any(str(override).startswith("hydra.run.dir=") for override in overrides)


def drop_unused() -> None:
    """Removes the folder that was made for a run if none has begun in it."""
    if _made is not None and not (_made / "run.json").exists():
        with contextlib.suppress(OSError), disk.confine(_made):
            remove_tree(_made)


def launch(cfg: DictConfig) -> sweep.Outcome | float | None:
    """Runs the composed config in this process, or in workers; ends the program where the run was cut short.

    Returns:
        For a job of a sweep, how it ended; the value of its best metric for sweepers that search, such as Optuna's.
    """
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        return _launch_job(cfg, hydra_config, folder)
    try:
        resumed = _resumption.run if _resumption else None
        origin = _resumption.origin if _resumption else _find_new_origin(hydra_config, folder)
        job = handover.make(cfg, folder, origin, goes_on=import_path.is_requeued(), resumed=resumed)
        run_folder.refuse_links(folder, job.links)
        status = _launch(job)
    except ConfigError as error:
        _end(error)
    if status:
        signals.leave_if_cut(status)
        raise SystemExit(status)
    return None


def _launch_job(cfg: DictConfig, hydra_config: Any, folder: Path) -> sweep.Outcome | float | None:
    """Runs one job of a sweep; the other jobs go on where it fails."""
    facts: tuple[str, int, str, float | None]
    try:
        signed = signature.find_signed(folder)
        origin = _find_origin(hydra_config, signed)
        run_folder.refuse_links_to(folder, Path(hydra_config.sweep.dir))
        run_folder.refuse_links(folder, origin.links)
        _check_job(cfg, folder, signed is not None)
        goes_on = _is_same_run(cfg, folder)
        status = _launch(handover.make(cfg, folder, origin, goes_on=goes_on, is_job=True))
        facts = sweep.describe_end(folder, status)
    except Exception as error:  # Hydra would keep it for the end, and raise the first alone
        message = errors.format_error(error)
        if message is None:
            errors.tell_traceback(error)
        status = 1 if message is None else 2
        result = describe(error) if message is None else "; ".join(message.splitlines())
        facts = "failed" if message is None else "refused", status, result, None
    outcome = sweep.note(hydra_config.job.num, tuple(_typed(hydra_config)), *facts)
    if status not in (0, 1, 2) and _is_basic(hydra_config.launcher):  # a signal ends the whole sweep
        sweep.end()
        signals.leave_if_cut(status)
        raise SystemExit(status)
    if hydra_config.sweeper["_target_"].endswith(".BasicSweeper"):
        return outcome
    if status:
        raise ConfigError(outcome.result)
    return outcome.metric


def _find_new_origin(hydra_config: Any, folder: Path) -> Origin:
    """Returns where this command was started, with the links of the run's folder that it may follow."""
    signed = signature.find_signed(folder)
    origin = _find_origin(hydra_config, signed)
    if signed is not None or import_path.is_requeued():
        return origin
    return replace(origin, links=_take_over_links(folder))


def _find_origin(hydra_config: Any, signed: Origin | None) -> Origin:
    """Returns where this command was started, with the user's directories of YAML.

    Args:
        signed: where an earlier start of the same run was; its links are followed further.
    """
    sources = [s for s in hydra_config.runtime.config_sources if s.schema == "file" and s.provider != "main"]
    origin = replace(signature.find_origin([s.path for s in sources]), directory=hydra_config.runtime.cwd)
    return origin if signed is None else replace(origin, links=signed.links, run_id=signed.run_id)


def _take_over_links(folder: Path) -> dict[str, str]:
    """Returns the links that the user has put into a new run's folder for its storage, and tells of them."""
    links = run_folder.find_links(folder)
    for name, target in links.items():
        print(one_line(f"{folder / name}: a link; the run writes to {target}"))
    return links


def _typed(hydra_config: Any) -> list[str]:
    """Returns the overrides as typed, interpolations as they stand."""
    overrides: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return [str(override) for override in overrides]


def _is_basic(launcher: Any) -> bool:
    return bool(launcher["_target_"].endswith(".BasicLauncher"))


def _launch(job: Job) -> int:
    settings, is_sweep = job.distributed, job.is_job
    if _joined is not None:
        if settings.strategy is None:
            raise ConfigError(f"distributed: it trains on one process, and {_joined.place.world_size} were started")
        if not is_sweep:
            _joined.remember(job)
        _joined.channel.send(job)
        return _joined.work(job)
    num_local = elastic.num_workers(settings)
    if num_local == 1 and settings.nnodes == 1:
        return worker.work(job)
    if settings.nnodes > 1 and job.settings["resume"] is None and not is_sweep:
        with contextlib.suppress(OSError):
            disk.remove_folder(job.folder)  # Hydra's; the first rank makes the one that counts
        job.is_unclaimed, job.is_asked_for = True, _is_folder_given(HydraConfig.get().overrides.hydra)
    return elastic.start(job, num_local)


def _is_same_run(cfg: DictConfig, folder: Path) -> bool:
    """Says whether a sweep's job stands in its folder already, as where a scheduler starts it again.

    Raises:
        ConfigError: another run does.
    """
    if not (folder / "run.json").exists():
        return False
    with contextlib.suppress(OSError, ValueError):
        if read_bounded(folder / ".hydra" / "config.yaml", 1 << 20).decode() == OmegaConf.to_yaml(cfg):
            return True
    raise ConfigError(f"{folder}: holds another run already; give the sweep another hydra.sweep.dir")


def join() -> int | None:
    """Takes this process's place where several were started; returns the exit status of one that only follows.

    Raises:
        ConfigError: what has started it did not say where it stands.
    """
    global _joined
    if not is_distributed_launch():
        return None
    _joined = worker.WorkerGroup()
    if _joined.is_rank_zero and (job := _joined.recall()) is not None:
        _joined.channel.send(job)
        status = _joined.work(job)
        leave(status)
        return status
    return None if _joined.is_rank_zero else _joined.follow()


def leave(status: int) -> None:
    """Sends home those that wait for a job."""
    if _joined is not None and _joined.is_rank_zero:
        _joined.channel.end(status)


def _end(error: Exception) -> NoReturn:
    message = errors.format_error(error)
    if message is None:
        errors.tell_traceback(error)
        raise SystemExit(1) from None
    errors.tell(message)
    raise SystemExit(2) from None


def _check_job(cfg: DictConfig, folder: Path, is_signed: bool) -> None:
    try:
        fix_values(cfg, run_folder.read_config(folder) if is_signed else None)
        hydra_root: Any = HydraConfig.instance().cfg
        fix_values(hydra_root)
        if OmegaConf.select(cfg, "resume") is not None:
            raise ConfigError("resume: a sweep makes new runs; resume each of its folders by itself")
        _check(cfg)
    except ConfigError:
        with contextlib.suppress(OSError):  # it holds what an earlier start of this job left
            disk.remove_folder(folder)
        raise


def with_resumed_overrides(arguments: list[str]) -> list[str]:
    """Returns the command line for Hydra: paths quoted, and with `resume=`, the folder of that run.

    Raises:
        ConfigError: there is nothing to resume at that place.
    """
    global _resumption
    arguments = [resume.quote_path(argument) for argument in arguments]
    places = [resume.read_path(a) for a in arguments if a.startswith("hydra.run.dir=")]
    if import_path.is_requeued() and places and any(Path(places[-1], "checkpoints").glob("step_*")):
        others = [a for a in arguments if not a.startswith("hydra.run.dir=") and not resume.sets_init_from(a)]
        arguments = [*others, f"resume={quote(places[-1])}"]
    _resumption = resume.find(arguments)
    return arguments if _resumption is None else _resumption.arguments
