"""From a composed config to a run: its folder, then the run itself, in this process or in workers.

Must not import torch at the top: what is wrong in the config is told before that.
"""

from __future__ import annotations

import contextlib
import copy
import os
import sys
import traceback
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner import agent, config, handover, mistakes, resume, run_folder, signals, worker
from runner.handover import Handover
from runner.interpolation import fill_cache, fix_values, told_by_hydra
from runner.mistakes import ConfigError
from runner.resume import Resumption
from runner.utils import disk
from runner.utils.files import remove_tree
from runner.utils.place import is_one_of_several

_joined: worker.Joined | None = None  # where torchrun or srun have started several processes
_resumption: Resumption | None = None  # of this command line, from before Hydra reads it to the end
_made: Path | None = None  # the run's folder, if it was not there before


class RunFolder(Callback):
    """Checks the config and claims the run's folder, before Hydra writes into it."""

    def on_multirun_start(self, config: DictConfig, **given: Any) -> None:
        """Checks the folder of the sweep before Hydra writes into it, as it does through links.

        Leaves Ctrl-C to a launcher that runs the jobs in other processes: it may have to stop them.
        """
        try:
            run_folder.refuse_links(Path(config.hydra.sweep.dir), is_sweep=True)
        except ConfigError as error:  # Hydra turns what a callback raises into a warning, and would go on
            _end(error)
        if not _is_basic(config.hydra.launcher):
            signals.raise_on_interrupt()
        fill_cache(config)

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
            print(line)
        with read_write(config):
            config.hydra.run.dir = str(folder)


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
    config.check(cfg)
    from runner import targets, trust  # what they name is imported, and torch with it, once the rest is right

    plain = config.to_plain(cfg)
    targets.seed_imports(plain["seed"])
    if _resumption is not None:
        assert _resumption.trust is not None
        trust.check_objects(plain, _resumption.trust)
    targets.check_targets(plain)


def _claim(cfg: DictConfig, task: DictConfig) -> Path:
    wanted = Path(cfg.hydra.run.dir)
    if task.resume is not None:
        if _resumption is None:
            raise ConfigError(f"resume={task.resume}: give it on the command line; it stands in a YAML file")
        return wanted
    if task.distributed.nnodes > 1 and _joined is None:
        return wanted  # of several machines the one with the first rank claims it
    global _made
    folder, is_new = run_folder.claim(wanted, _is_folder_given(cfg.hydra.overrides.hydra), _is_requeued())
    _made = folder.resolve() if is_new else None
    return folder


def _is_folder_given(overrides: Any) -> bool:
    return any(str(override).startswith("hydra.run.dir=") for override in overrides)


def drop_unused() -> None:
    """Removes the folder that was made for a run if none has begun in it."""
    if _made is not None and not (_made / "run.json").exists():
        with contextlib.suppress(OSError), disk.confine(_made):
            remove_tree(_made)


def launch(cfg: DictConfig) -> None:
    """Runs the composed config in this process, or in workers; ends the program where the run was cut short."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    is_sweep = hydra_config.mode == RunMode.MULTIRUN
    if is_sweep:
        _check_job(cfg, folder)
    try:
        if is_sweep:
            _refuse_links_to(folder, Path(hydra_config.sweep.dir))
        goes_on = _is_same_run(cfg, folder) if is_sweep else _is_requeued()
        resumed = _resumption.run if _resumption else None
        job = handover.make(cfg, folder, goes_on=goes_on, resumed=resumed)
        job.links = {} if is_sweep or goes_on or resumed else _take_over_links(folder)
        if resumed is None:
            run_folder.refuse_links(folder, job.links)
        status = _launch(job, is_sweep)
    except ConfigError as error:
        if is_sweep:
            raise _told(error) from None
        _end(error)
    if is_sweep and (status == 1 or (status and not _is_basic(hydra_config.launcher))):  # the other jobs go on
        raise RuntimeError(f"{folder}: the run ended with status {status}; log.txt there says why")
    if status:
        signals.leave_if_cut(status)
        raise SystemExit(status)


def _take_over_links(folder: Path) -> dict[str, str]:
    """Returns the links that the user has put into a new run's folder for its storage, and tells of them."""
    links = run_folder.find_links(folder)
    for name, target in links.items():
        print(f"{folder / name}: a link; the run writes to {target}")
    return links


def _refuse_links_to(folder: Path, sweep: Path) -> None:
    """Checks that the folder of a sweep's job lies in the sweep's.

    Raises:
        ConfigError: a folder between them, or the job's own, is a link.
    """
    root = Path(os.path.abspath(sweep))
    for place in (folder, *folder.parents):
        if root in place.parents and place.is_symlink():
            raise ConfigError(f"{place}: a link; a job of the sweep would write where it leads: remove it")


def _is_basic(launcher: Any) -> bool:
    return bool(launcher["_target_"].endswith(".BasicLauncher"))


def _launch(job: Handover, is_sweep: bool) -> int:
    settings = job.distributed
    if _joined is not None:
        if settings.strategy is None:
            raise ConfigError(f"distributed: it trains on one process, and {_joined.place.num_ranks} were started")
        if not is_sweep:
            _joined.remember(job)
        _joined.post.send(job)
        return _joined.work(job)
    num_local = agent.num_workers(settings)
    if num_local == 1 and settings.nnodes == 1:
        return worker.work(job)
    if settings.nnodes > 1 and job.settings["resume"] is None and not is_sweep:
        with contextlib.suppress(OSError):
            disk.remove_folder(job.folder)  # Hydra's; the first rank makes the one that counts
        job.is_unclaimed, job.is_asked_for = True, _is_folder_given(HydraConfig.get().overrides.hydra)
    return agent.start(job, num_local)


def _is_same_run(cfg: DictConfig, folder: Path) -> bool:
    """Says whether a sweep's job stands in its folder already, as where a scheduler starts it again.

    Raises:
        ConfigError: another run does.
    """
    if not (folder / "run.json").exists():
        return False
    path = folder / ".hydra" / "config.yaml"
    if path.is_file() and path.read_text() == OmegaConf.to_yaml(cfg):
        return True
    raise _told(ConfigError(f"{folder}: holds another run already; give the sweep another hydra.sweep.dir"))


def join() -> int | None:
    """Takes this process's place where several were started; returns the exit status of one that only follows.

    Raises:
        ConfigError: what has started it did not say where it stands.
    """
    global _joined
    if not is_one_of_several():
        return None
    _joined = worker.Joined()
    if _joined.is_leader and (job := _joined.recall()) is not None:
        _joined.post.send(job)
        status = _joined.work(job)
        leave(status)
        return status
    return None if _joined.is_leader else _joined.follow()


def leave(status: int) -> None:
    """Sends home those that wait for a job."""
    if _joined is not None and _joined.is_leader:
        _joined.post.end(status)


def _end(error: Exception) -> NoReturn:
    message = mistakes.explain(error)
    if message is None:
        traceback.print_exception(error)
        raise SystemExit(1) from None
    print(message, file=sys.stderr)
    raise SystemExit(2) from None


def _check_job(cfg: DictConfig, folder: Path) -> None:
    try:
        has_run = (folder / ".hydra" / "config.yaml").is_file()
        fix_values(cfg, run_folder.read_config(folder) if has_run else None)
        hydra_root: Any = HydraConfig.instance().cfg
        fix_values(hydra_root)
        if cfg.resume is not None:
            raise ConfigError("resume: a sweep makes new runs; resume each of its folders by itself")
        _check(cfg)
    except ConfigError as error:
        with contextlib.suppress(OSError):  # it holds what an earlier start of this job left
            disk.remove_folder(folder)
        raise _told(ConfigError(f"{folder.name}: {error}")) from None


def _told(error: ConfigError) -> ConfigError:
    """The mistake of a sweep's job, told at once: the other jobs go on, and Hydra raises but one at the end."""
    print(error, file=sys.stderr)
    error.is_told = True
    return error


def _is_requeued() -> bool:
    """Says whether Slurm starts this job again, after a preemption: its folder, if it is given, may hold the run."""
    return os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")


def with_resumed_overrides(arguments: list[str]) -> list[str]:
    """Returns the command line with what `resume=` stands for: the run's folder and overrides, beside the new ones.

    Raises:
        ConfigError: there is nothing to resume at that place.
    """
    global _resumption
    given = [a.partition("=")[2].strip("'\"") for a in arguments if a.startswith("hydra.run.dir=")]
    if _is_requeued() and given and any(Path(given[-1], "checkpoints").glob("step_*")):
        arguments = [*(a for a in arguments if not a.startswith("hydra.run.dir=")), f"resume={given[-1]}"]
    _resumption = resume.find(arguments)
    return arguments if _resumption is None else _resumption.arguments
