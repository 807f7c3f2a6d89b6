"""One process of a run: alone, started by `agent`, or one of those that torchrun or srun have started.

Owns joining: where this process stands, its group, and what its end means to whoever started it. Must not import torch
at the top.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from runner.config import errors, run_folder
from runner.config.errors import ConfigError
from runner.config.trust import import_path
from runner.control import signals, terminal
from runner.launch.environment import ProcessEnvironment, read_environment
from runner.launch.job import Job, JobChannel, JobError

if TYPE_CHECKING:
    from torch.distributed import Store

_CONNECT_S = 300.0


class WorkerGroup:
    """This process among several that something else has started.

    Args:
        store_file: where they meet; "" where the environment has an address for that.
    """

    def __init__(self, store_file: str = "") -> None:
        from torch.distributed import PrefixStore

        from runner.utils import distributed

        try:
            self.place = read_environment(store_file=store_file)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        whole = distributed.connect(self.place, _CONNECT_S)
        self._store = PrefixStore(f"runner/{self.place.run_id}", whole)
        self.channel = JobChannel(PrefixStore(f"attempt/{self.place.restarts}", self._store), self.place)
        self._num_jobs = 0

    @property
    def is_rank_zero(self) -> bool:
        """Whether this process composes for all."""
        return self.place.rank == 0

    def follow(self) -> int:
        """Runs the jobs that the leader composes; returns the exit status."""
        while isinstance(handover := self.channel.receive(), Job):
            with contextlib.suppress(ConfigError):  # the leader tells it
                self.work(handover)
        return handover

    def remember(self, handover: Job) -> None:
        """Keeps the hand-over of the only job, for all to go on with after a restart."""
        self._store.set("only", handover.encode())  # type: ignore[arg-type]  # torch's stub lacks bytes

    def recall(self) -> Job | None:
        """Returns the hand-over that was kept before a restart.

        Raises:
            HandoverError: something else lies there.
        """
        if not self.place.restarts or not self._store.check(["only"]):
            return None
        return Job.decode(self._store.get("only"))

    def work(self, handover: Job) -> int:
        """Runs this process's share of a job; returns the exit status."""
        from torch.distributed import PrefixStore

        self._num_jobs += 1
        job = f"job/{self._num_jobs}"
        store = PrefixStore(f"attempt/{self.place.restarts}/{job}", self._store)
        return work(handover, self.place, store, PrefixStore(job, self._store))


def work(
    handover: Job, place: ProcessEnvironment | None = None, store: Store | None = None, lasting: Store | None = None
) -> int:
    """Runs this process's share of a run; returns the exit status.

    Args:
        store: of this start of all ranks.
        lasting: of the job, over all its starts.
    Raises:
        ConfigError: a mistake of the user's, on whichever rank.
        LostError: another rank is gone.
    """
    from torch.distributed import PrefixStore

    from runner.run import run
    from runner.utils.distributed import RankError, init_process_group

    errors.hide_tracebacks(not handover.origin)
    import_path.prepend(handover.python_path)
    settings, given = handover.distributed, (handover.settings, handover.folder, handover.write_config)
    start = partial(
        run.run,
        launch=handover.name,
        is_job=handover.is_job,
        hparams=handover.hparams,
        links=handover.links,
    )
    if place is None or store is None:
        with errors.told_where_started(handover.origin.get("directory")):
            return start(*given, goes_on=handover.goes_on)
    goes_on = handover.goes_on or place.restarts > 0
    with init_process_group(place, PrefixStore("group", store), _pick_backend(settings, place), settings.timeout_s):
        try:
            words = PrefixStore("words", store)
            return start(*given, words, goes_on=goes_on, lasting=lasting)
        except RankError as error:
            if isinstance(error.__cause__, ConfigError):
                raise error.__cause__ from None
            raise ConfigError(str(error)) from error


def _pick_backend(settings: object, place: ProcessEnvironment) -> str:
    """Returns the backend for this rank's device; makes that device the current one."""
    import torch

    from runner.utils.distributed import pick_device

    try:
        device = pick_device(settings.device, place.local_rank)  # type: ignore[attr-defined]
    except ValueError as error:
        raise ConfigError(f"distributed.{error}") from error
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if device.type == "cpu" and "OMP_NUM_THREADS" not in os.environ:
        torch.set_num_threads(max((os.cpu_count() or 1) // place.local_world_size, 1))
    backend: str = settings.backend  # type: ignore[attr-defined]
    if backend != "auto":
        return backend
    is_shared = ":" in settings.device and place.local_world_size > 1  # type: ignore[attr-defined]
    return "nccl" if device.type == "cuda" and not is_shared else "gloo"  # nccl refuses two ranks on one GPU


@contextlib.contextmanager
def _quick_to_import() -> Iterator[None]:
    gc.disable()  # `run` enables it
    try:
        yield
    finally:
        gc.enable()


def main(folder: Path, launcher: int) -> int:
    """Runs one of the workers of `agent`, which left the hand-over in `folder`; returns what the agent is to see.

    That is 0 where the run has ended, however, with its status in a file; anything else starts all workers again.
    """
    terminal.outlive()
    for number in signals.MEANINGS:  # until there is a run to ask
        if not signals.is_ignored(number):
            signal.signal(number, lambda *_: os._exit(0 if (folder / "ended").exists() else 1))
    (folder / f"pid.{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}.{os.getpid()}").touch()
    if (folder / "ended").exists():  # a signal has come: there is nothing to start again for
        return 0
    signals.report_to(folder / "status")
    # Until it has joined there is nothing to save, and torch waits for a store whose host is gone without a look at
    # signals.
    _end_with(launcher, signal.SIGKILL)
    with _quick_to_import():
        try:
            handover = Job.decode((folder / "handover").read_bytes())
        except JobError as error:  # such as a runner that was installed anew meanwhile
            print(error, file=sys.stderr)
            (folder / "status").write_text("2")
            return 0
        sys.argv = handover.command
        joined = WorkerGroup(str(folder / "store") if handover.has_file_store else "")
        _end_with(launcher, signals.REPEATED)
        status = _run_told(joined, handover, folder)
    if status is None:
        return 1
    if joined.place.local_rank == 0:
        (folder / "status").write_text(str(status))
    return 0


def _run_told(joined: WorkerGroup, handover: Job, folder: Path) -> int | None:
    """Runs; returns the status, or None where starting again may help."""
    from runner.utils.distributed import is_connection_error

    try:
        found = _agree_on(joined, handover)
        return joined.work(found) if isinstance(found, Job) else found
    except KeyboardInterrupt as interrupt:
        if not (folder / "ended").exists():  # the agent's own signal, for all to start again
            return None
        return signals.STATUSES[signals.meaning_of(interrupt)[0]]
    except SystemExit as end:
        return int(str(end.code))
    except Exception as error:
        if is_connection_error(error):
            errors.tell(f"rank {joined.place.rank}: {error}")
            return None
        message = errors.format_error(error)
        if joined.is_rank_zero or isinstance(error, JobError):
            errors.tell_traceback(error) if message is None else errors.tell(message)
        return 1 if message is None else 2


def _agree_on(joined: WorkerGroup, handover: Job) -> Job | int:
    """Returns the hand-over of the first rank, of several machines that have composed one each; or a status."""
    if not joined.is_rank_zero:
        return joined.channel.receive()
    if handover.is_unclaimed and not joined.place.restarts:
        try:
            handover.folder, _ = run_folder.claim(handover.folder, is_asked_for=handover.is_asked_for)
        except ConfigError:
            joined.channel.end(2)
            raise
        joined.remember(handover)
    handover = joined.recall() or handover
    joined.channel.send(handover)
    return handover


def _end_with(launcher: int, number: signal.Signals) -> None:
    """Has the kernel send a signal to this process when the one that started it dies, however."""
    if sys.platform != "linux":
        return
    import ctypes

    ctypes.CDLL(None).prctl(1, number)  # PR_SET_PDEATHSIG: it comes as often as the launcher had threads
    if os.getppid() != launcher:  # it has died before
        os.kill(os.getpid(), number)


def start() -> None:
    """Runs the worker that the command line of this process describes, and ends the process."""
    ended = main(Path(sys.argv[1]), int(sys.argv[2]))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(ended)  # all is closed: libraries that take themselves apart beside a group's threads may abort


if __name__ == "__main__":
    start()
