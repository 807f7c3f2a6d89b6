"""One process of a run: alone, started by the elastic agent, or one of those that torchrun or srun have started.

torch is imported only once there is a job, so that a mistake in a config is reported first.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config import errors, run_folder
from runner.config.errors import ConfigError
from runner.config.schema import DistributedConfig
from runner.config.trust import import_path
from runner.control import signals, terminal
from runner.launch.environment import ProcessEnvironment, read_environment
from runner.launch.job import MISTAKE_NAME, Job, JobChannel, JobError
from runner.utils.utils import signal_with_parent

if TYPE_CHECKING:
    from torch.distributed import Store

_CONNECT_S = 300.0


class WorkerGroup:
    """This process among the several of a run that a launcher has started, and the store that they share.

    Args:
        store_file: of their store; "" if it is at the address in the environment.
    """

    def __init__(self, store_file: str = "") -> None:
        from torch.distributed import PrefixStore

        from runner.utils import distributed

        try:
            self.environment = read_environment(store_file=store_file)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        store = distributed.create_store(self.environment, _CONNECT_S)
        self._store = PrefixStore(f"runner/{self.environment.run_id}", store)
        self._attempt = f"attempt/{self.environment.restarts}"
        self.channel = JobChannel(PrefixStore(self._attempt, self._store), self.environment)
        self._num_jobs = 0

    @property
    def is_rank_zero(self) -> bool:
        """True if this process composes the jobs of all."""
        return self.environment.rank == 0

    def run_received_jobs(self) -> int:
        """Runs the jobs that rank 0 composes; returns the exit status."""
        while isinstance(job := self.channel.receive(), Job):
            with contextlib.suppress(ConfigError):  # rank 0 reports it
                run_job(job, self)
        return job

    def keep_job(self, job: Job) -> None:
        """Stores the only job of this launch, which all ranks run again after a restart."""
        self._store.set("only", job.encode())  # type: ignore[arg-type]  # torch's stub lacks bytes

    def find_kept_job(self) -> Job | None:
        """Returns the job that was stored before a restart.

        Raises:
            JobError: something else is stored.
        """
        if not self.environment.restarts or not self._store.check(["only"]):
            return None
        return Job.decode(self._store.get("only"))

    def make_job_stores(self) -> tuple[Store, Store, Store]:
        """Returns the stores of the next job: for its process group, for its messages, and one for all restarts."""
        from torch.distributed import PrefixStore

        self._num_jobs += 1
        job = f"job/{self._num_jobs}"
        attempt = PrefixStore(f"{self._attempt}/{job}", self._store)
        return PrefixStore("group", attempt), PrefixStore("messages", attempt), PrefixStore(job, self._store)


def run_job(job: Job, group: WorkerGroup | None = None, *, raises: bool = False) -> int:
    """Runs this process's share of a job; returns the exit status.

    Args:
        raises: as of `run.run`.
    Raises:
        ConfigError: a mistake of the user's, on whichever rank.
        RankLostError: another rank is gone.
    """
    from runner.run import run
    from runner.utils.distributed import RankError, init_process_group

    errors.hide_tracebacks(not job.origin)
    import_path.prepend(job.python_path)
    is_restart = job.is_restart
    messages = persistent = None
    with contextlib.ExitStack() as stack:
        if group is None:
            stack.enter_context(errors.mention_start_directory(job.origin.get("directory")))
        else:
            environment, distributed = group.environment, job.spec.distributed
            is_restart = is_restart or environment.restarts > 0
            group_store, messages, persistent = group.make_job_stores()
            backend = _pick_backend(distributed, environment)
            stack.enter_context(init_process_group(environment, group_store, backend, distributed.timeout_s))
        try:
            return run.run(
                job.spec,
                job.folder,
                job.write_config,
                messages,
                persistent=persistent,
                is_restart=is_restart,
                launch_id=job.launch_id,
                is_sweep_job=job.is_sweep_job,
                hparams=job.hparams,
                links=job.links,
                raises=raises,
            )
        except RankError as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            raise ConfigError(str(error)) from error


def _pick_backend(distributed: DistributedConfig, environment: ProcessEnvironment) -> str:
    """Returns the backend for this rank's device; makes that device the current one."""
    import torch

    from runner.utils.distributed import pick_device

    try:
        device = pick_device(distributed.device, environment.local_rank)
    except ValueError as error:
        raise ConfigError(f"distributed.{error}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // environment.local_world_size, 1))
    if distributed.backend != "auto":
        return distributed.backend
    is_shared = ":" in distributed.device and environment.local_world_size > 1
    return "nccl" if device.type == "cuda" and not is_shared else "gloo"  # nccl refuses two ranks on one GPU


def main(folder: Path, launcher: int) -> int:
    """Runs a worker of the elastic agent; returns the exit status for the agent.

    It is 0 when the run has ended, whatever its own status, which is in a file. With any other the agent starts all
    workers again.

    Args:
        folder: temporary, with the file `job`.
        launcher: the process id of the agent.
    """
    terminal.survive_closed_terminal()
    for number in signals.STATUS_BY_SIGNAL:  # until there is a run that can stop
        if not signals.is_ignored(number):
            signal.signal(number, lambda *_: os._exit(0 if (folder / "ended").exists() else 1))
    (folder / f"pid.{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{os.getpid()}").touch()
    if (folder / "ended").exists():  # a signal came before this restart
        return 0
    signals.write_exit_status_to(folder / "status")
    # Until it is connected there is nothing to save, and torch ignores signals while it waits for a lost store.
    signal_with_parent(signal.SIGKILL, launcher)
    gc.disable()  # importing torch makes no garbage; `Trainer.fit` enables it
    try:
        job = Job.decode((folder / "job").read_bytes())
    except JobError as error:  # such as of a runner that was updated meanwhile
        print(error, file=sys.stderr)
        (folder / "status").write_text("2")
        return 0
    sys.argv = job.command
    group = WorkerGroup(str(folder / "store") if job.has_file_store else "")
    signal_with_parent(signals.REPEATED, launcher)
    status: int | None
    try:
        received = _agree_on_job(group, job)
        status = run_job(received, group) if isinstance(received, Job) else received
    except BaseException as error:
        status = _report_failure(error, group, folder)
    if status is None:
        return 1
    if group.environment.local_rank == 0:
        (folder / "status").write_text(str(status))
    return 0


def _report_failure(error: BaseException, group: WorkerGroup, folder: Path) -> int | None:
    """Prints the error that ended a worker; returns the exit status of the run, or None if a restart may help."""
    from runner.utils.distributed import is_connection_error

    if isinstance(error, KeyboardInterrupt):
        if not (folder / "ended").exists():  # a signal of the agent, which starts all workers again
            return None
        return signals.EXIT_STATUSES[signals.status_of_interrupt(error)[0]]
    if isinstance(error, SystemExit):
        return int(str(error.code))
    if not isinstance(error, Exception):
        raise error
    if is_connection_error(error):
        errors.print_message(f"rank {group.environment.rank}: {error}")
        return None
    if not group.is_rank_zero and not isinstance(error, JobError):  # rank 0 reports it
        return 1 if errors.format_error(error) is None else 2
    if (message := errors.format_error(error)) is not None:
        (folder / MISTAKE_NAME).write_text(message)
    return errors.print_error(error)


def _agree_on_job(group: WorkerGroup, job: Job) -> Job | int:
    """Returns the job of rank 0, where several machines have composed one each; or an exit status."""
    if not group.is_rank_zero:
        return group.channel.receive()
    if job.is_unclaimed and not group.environment.restarts:
        try:
            job.folder, _ = run_folder.claim_folder(job.folder, is_asked_for=job.is_folder_fixed)
        except ConfigError:
            group.channel.end(2)
            raise
        group.keep_job(job)
    job = group.find_kept_job() or job
    group.channel.send(job)
    return job


def run_and_exit() -> None:
    """Runs the worker that the command line of this process describes, and ends the process."""
    status = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)  # all files are closed; the exit handlers of libraries may abort beside a group's threads


if __name__ == "__main__":
    run_and_exit()
