"""Checks a composed config, claims the run's folder, and runs the job in this process or in workers.

torch is imported only once the config is checked.
"""

from __future__ import annotations

import contextlib
import copy
import gc
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, cast

from hydra import compose, initialize_config_dir
from hydra._internal.utils import get_args_parser
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write

from runner.config import checks, errors, hparams, resume, run_folder
from runner.config.composition.interpolation import cache_now, pin_unstable_values, quote, use_hydra_config
from runner.config.errors import ConfigError
from runner.config.resume import Resumption
from runner.config.trust import import_path, signature
from runner.config.trust.signature import Origin
from runner.control import signals
from runner.launch import elastic, sweep, worker
from runner.launch.environment import is_distributed_launch
from runner.launch.job import Job, make_job
from runner.utils.files import disk, read_bounded, remove_tree
from runner.utils.utils import describe, escape_controls, one_line

_group: worker.WorkerGroup | None = None  # if torchrun or srun have started several processes
_resumption: Resumption | None = None  # of this command line, if it resumes a run
_new_folder: Path | None = None  # the run's folder, if this process made it


class RunFolder(Callback):
    """Checks the config and claims the run's folder before Hydra writes into it.

    Args:
        keys: of a sweep's hyperparameters, for the configs of its jobs.
    """

    def __init__(self, **keys: list[str] | None) -> None:
        pass

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Checks the folder of the sweep for links, through which Hydra would write.

        A launcher that runs the jobs in other processes handles Ctrl-C itself, as it may have to stop them.
        """
        try:
            run_folder.refuse_links_of_sweep(Path(config.hydra.sweep.dir))
        except ConfigError as error:  # Hydra turns what a callback raises into a warning, and would go on
            raise SystemExit(errors.print_error(error)) from None
        if not _is_basic(config.hydra.launcher):
            signals.raise_on_interrupt()
        cache_now(config)
        sweep.begin(_typed_overrides(config.hydra))
        hparams.pass_keys_to_jobs(config)

    def on_multirun_end(self, config: DictConfig, **kwargs: Any) -> None:
        """Prints the table of all jobs; ends the program where one of them has failed."""
        if status := sweep.end():
            raise SystemExit(status)

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Ends the program with one message if the config is wrong, before anything is written."""
        try:
            lines = restore(config, kwargs["config_name"], _resumption) if _resumption else []
            claim_checked(config, _resumption)
        except Exception as error:  # Hydra turns what a callback raises into a warning, and would go on
            raise SystemExit(errors.print_error(error)) from None
        for line in lines:
            print(escape_controls(line))


def claim_checked(config: DictConfig, resumption: Resumption | None) -> None:
    """Checks a composed config and claims the run's folder, whose path it sets in the config.

    Raises:
        ConfigError: a mistake in the config, or a folder that holds another run.
    """
    with _hydra_values_of(config, config, resumption):
        pin_unstable_values(config)
    task = resume.without_hydra(config)
    with _hydra_values_of(config, task, resumption):
        _check(task, resumption)
    folder = _claim(config, task, resumption)
    with read_write(config):
        config.hydra.run.dir = str(folder)


def print_resumed_config(arguments: list[str]) -> bool:
    """Prints the config of the resumed run if `--cfg` asks for it; returns whether it did."""
    if _resumption is None:
        return False
    parsed = get_args_parser().parse_args(arguments)
    if parsed.cfg not in ("job", "all"):
        return False
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        cfg = compose("config", parsed.overrides, return_hydra_config=True)
        restore(cfg, "config", _resumption)
    if parsed.cfg == "job":
        cfg = resume.without_hydra(cfg)
    with run_folder.recorded_hydra_config(_resumption.run, cfg):
        shown = OmegaConf.select(cfg, parsed.package) if parsed.package else cfg
        print(OmegaConf.to_yaml(shown, resolve=parsed.resolve) if OmegaConf.is_config(shown) else shown, end="")
    return True


def check_values(config: DictConfig, resumption: Resumption | None) -> None:
    """Checks a composed config as far as that imports no module of the user and no torch.

    Raises:
        ConfigError: a mistake in the config.
    """
    config = copy.deepcopy(config)  # which stores the time that its interpolations read
    task = resume.without_hydra(config)
    with _hydra_values_of(config, task, resumption):
        checks.check_config(task)


def restore(cfg: DictConfig, config_name: str, asked: Resumption) -> list[str]:
    """Replaces a composed config by that of the run to resume; for more see `resume.restore_config`."""
    hydra = GlobalHydra.instance().hydra
    assert hydra is not None
    return resume.restore_config(
        cfg, asked, lambda overrides: hydra.compose_config(config_name, overrides, RunMode.RUN)
    )


def _hydra_values_of(
    cfg: DictConfig, task: DictConfig, resumption: Resumption | None
) -> contextlib.AbstractContextManager[None]:
    """Resolves `${hydra:...}` as when the job runs, except that its folder may get another name."""
    if resumption is not None:
        return run_folder.recorded_hydra_config(resumption.run, task)
    return use_hydra_config(task, lambda: cfg.hydra, Path(cfg.hydra.run.dir))


def _check(cfg: DictConfig, resumption: Resumption | None = None) -> None:
    plain = checks.check_config(cfg).plain
    from runner.config import targets  # imports what the config names, and so torch: only once the rest is right
    from runner.config.trust import allowlist

    if resumption is None or resumption.origin is None:
        import_path.add_deferred()
    _freeze_torch()
    targets.seed_imports(plain["seed"])
    if resumption is not None:
        assert resumption.trust is not None
        allowlist.check_resolved_objects(plain, resumption.trust)
    targets.check_targets(plain)


def _freeze_torch() -> None:
    """Exempts torch's objects from garbage collection in a command, before modules of the user's are imported.

    The interpreter's collections at the end of the process would take 0.3 s for them. A command has switched the
    collection off; in a program of the user's nothing is exempted.
    """
    import torch  # noqa: F401

    if not gc.isenabled() and not gc.get_freeze_count():
        gc.freeze()


def _claim(cfg: DictConfig, task: DictConfig, resumption: Resumption | None) -> Path:
    wanted = Path(cfg.hydra.run.dir)
    if (resume_path := OmegaConf.select(task, "resume")) is not None:
        if resumption is None:
            raise ConfigError(f"resume={resume_path}: give it on the command line; it stands in a YAML file")
        return wanted
    if task.distributed.nnodes > 1 and _group is None:
        return wanted  # the machine of rank 0 claims it
    global _new_folder
    folder, is_new = run_folder.claim_folder(
        wanted, _is_folder_fixed(cfg.hydra.overrides.hydra), import_path.is_requeued()
    )
    _new_folder = folder.resolve() if is_new else None
    return folder


def _is_folder_fixed(overrides: Any) -> bool:
    return any(str(override).startswith("hydra.run.dir=") for override in overrides)


def remove_unused_folder() -> None:
    """Removes the folder that this process has made if no run has begun there."""
    global _new_folder
    if _new_folder is not None and not (_new_folder / "run.json").exists():
        with contextlib.suppress(OSError), disk.confine(_new_folder):
            remove_tree(_new_folder)
    _new_folder = None


def launch(cfg: DictConfig) -> sweep.Outcome | float | None:
    """Runs the composed config in this process or in workers; exits unless the run ended well.

    Returns:
        The outcome of a sweep's job; for sweepers that search, such as Optuna's, the value of its best metric.
    """
    hydra_config = HydraConfig.get()
    if hydra_config.mode == RunMode.MULTIRUN:
        return _launch_job(cfg, hydra_config, Path(hydra_config.runtime.output_dir))
    try:
        status = _prepare(make_own_job(cfg, hydra_config, _resumption))()
    except ConfigError as error:
        raise SystemExit(errors.print_error(error)) from None
    if status:
        signals.exit_if_aborted(status)
        raise SystemExit(status)
    return None


def make_own_job(cfg: DictConfig, hydra_config: Any, resumption: Resumption | None) -> Job:
    """Returns the job of a run that is no job of a sweep, in the folder that was claimed.

    Raises:
        ConfigError: the folder holds a link that the run would write through.
    """
    folder = Path(hydra_config.runtime.output_dir)
    resumed = resumption.run if resumption else None
    origin = resumption.origin if resumption else _find_new_origin(hydra_config, folder)
    job = make_job(cfg, folder, origin, is_restart=import_path.is_requeued(), resumed=resumed)
    run_folder.refuse_links(folder, job.links)
    return job


def _launch_job(cfg: DictConfig, hydra_config: Any, folder: Path) -> sweep.Outcome | float | None:
    """Runs one job of a sweep, whose other jobs run even if it fails."""
    try:
        signed = signature.find_signed(folder)
        origin = _find_origin(hydra_config, signed)
        run_folder.refuse_links_to(folder, Path(hydra_config.sweep.dir))
        run_folder.refuse_links(folder, origin.links)
        _check_job(cfg, folder, signed is not None)
        is_restart = _is_same_run(cfg, folder)
        status = _prepare(make_job(cfg, folder, origin, is_restart=is_restart, is_sweep_job=True))()
        facts = sweep.describe_end(folder, status)
    except Exception as error:  # Hydra would raise the first one, after the last job
        message = errors.format_error(error)
        if message is None:
            errors.print_traceback(error)
        status = 1 if message is None else 2
        result = describe(error) if message is None else "; ".join(message.splitlines())
        facts = "failed" if message is None else "refused", status, result, None
    outcome = sweep.record(hydra_config.job.num, tuple(_typed_overrides(hydra_config)), *facts)
    if status not in (0, 1, 2) and _is_basic(hydra_config.launcher):  # a signal, which ends the whole sweep
        sweep.end()
        signals.exit_if_aborted(status)
        raise SystemExit(status)
    if hydra_config.sweeper["_target_"].endswith(".BasicSweeper"):
        return outcome
    if status:
        raise ConfigError(outcome.result)
    return outcome.metric


def _find_new_origin(hydra_config: Any, folder: Path) -> Origin:
    """Returns the origin of a new run, with the links that the user has put into its folder; prints each."""
    signed = signature.find_signed(folder)
    origin = _find_origin(hydra_config, signed)
    if signed is not None or import_path.is_requeued():
        return origin
    links = run_folder.find_links(folder)
    for name, target in links.items():
        print(one_line(f"{folder / name}: a link; the run writes to {target}"))
    return replace(origin, links=links)


def _find_origin(hydra_config: Any, signed: Origin | None) -> Origin:
    """Returns the origin of this command: its directory, and the user's directories of YAML.

    Args:
        signed: the origin of an earlier start of the same run, whose links may still be followed.
    """
    sources = [s for s in hydra_config.runtime.config_sources if s.schema == "file" and s.provider != "main"]
    origin = replace(signature.find_origin([s.path for s in sources]), directory=hydra_config.runtime.cwd)
    return origin if signed is None else replace(origin, links=signed.links, run_id=signed.run_id)


def _typed_overrides(hydra_config: Any) -> list[str]:
    """Returns the overrides as typed, with interpolations unresolved."""
    overrides: Any = OmegaConf.to_container(hydra_config.overrides.task, resolve=False)
    return [str(override) for override in overrides]


def _is_basic(launcher: Any) -> bool:
    return bool(launcher["_target_"].endswith(".BasicLauncher"))


def _prepare(job: Job) -> Callable[[], int]:
    """Returns the function that runs a job to its end, once the other processes that this needs have the job.

    It returns the exit status. It is called by `launch`, so that fewer frames stand above a user's module.
    """
    distributed = job.spec.distributed
    if _group is not None:
        if distributed.strategy is None:
            found = f"{_group.environment.world_size} were started"
            raise ConfigError(f"distributed: it trains on one process, and {found}")
        if not job.is_sweep_job:
            _group.keep_job(job)
        _group.channel.send(job)
        return partial(worker.run_job, job, _group)
    num_local = elastic.count_workers(distributed)
    if num_local == 1 and distributed.nnodes == 1:
        return partial(worker.run_job, job)
    if distributed.nnodes > 1 and job.spec.resume is None and not job.is_sweep_job:
        with contextlib.suppress(OSError):
            disk.remove_folder(job.folder)  # Hydra made it; the first rank claims another
        job.is_unclaimed = True
        job.is_folder_fixed = _is_folder_fixed(HydraConfig.get().overrides.hydra)
    return partial(elastic.run_workers, job, num_local)


def _is_same_run(cfg: DictConfig, folder: Path) -> bool:
    """Returns whether a folder holds this job of a sweep already, which a scheduler has started again.

    Raises:
        ConfigError: it holds another run.
    """
    if not (folder / "run.json").exists():
        return False
    with contextlib.suppress(OSError, ValueError):
        if read_bounded(folder / ".hydra" / "config.yaml", 1 << 20).decode() == OmegaConf.to_yaml(cfg):
            return True
    raise ConfigError(f"{folder}: holds another run already; give the sweep another hydra.sweep.dir")


def join_group() -> int | None:
    """Connects this process with the others if several were started; returns the exit status of a rank but the first.

    Raises:
        ConfigError: the environment has no valid rank, world size or address.
    """
    global _group
    if not is_distributed_launch():
        return None
    _group = worker.WorkerGroup()
    if not _group.is_rank_zero:
        return _group.run_received_jobs()
    if (job := _group.find_kept_job()) is None:
        return None
    _group.channel.send(job)
    return worker.run_job(job, _group)


def end_group(status: int) -> None:
    """Ends the other processes, which wait for another job."""
    if _group is not None and _group.is_rank_zero:
        _group.channel.end(status)


def _check_job(cfg: DictConfig, folder: Path, is_signed: bool) -> None:
    try:
        pin_unstable_values(cfg, run_folder.read_config(folder) if is_signed else None)
        pin_unstable_values(cast(DictConfig, HydraConfig.instance().cfg))
        if OmegaConf.select(cfg, "resume") is not None:
            raise ConfigError("resume: a sweep makes new runs; resume each of its folders by itself")
        _check(cfg)
    except ConfigError:
        with contextlib.suppress(OSError):  # unless it has files of an earlier start of this job
            disk.remove_folder(folder)
        raise


def prepare_arguments(arguments: list[str]) -> list[str]:
    """Returns the command line for Hydra: paths are quoted, and `resume=` sets the folder of that run.

    Raises:
        ConfigError: there is nothing to resume at that path.
    """
    global _resumption
    arguments, _resumption = find_resumption(arguments)
    return arguments


def find_resumption(arguments: list[str]) -> tuple[list[str], Resumption | None]:
    """Returns the command line as `prepare_arguments` does, and the run that it resumes."""
    arguments = [resume.quote_path(argument) for argument in arguments]
    folders = [resume.read_path(a) for a in arguments if a.startswith("hydra.run.dir=")]
    if import_path.is_requeued() and folders and any(Path(folders[-1], "checkpoints").glob("step_*")):
        others = [a for a in arguments if not a.startswith("hydra.run.dir=") and not resume.sets_init_from(a)]
        arguments = [*others, f"resume={quote(folders[-1])}"]
    resumption = resume.find_resumption(arguments)
    return (arguments, None) if resumption is None else (resumption.arguments, resumption)
