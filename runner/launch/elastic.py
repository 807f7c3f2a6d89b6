"""Several workers on this machine, through torch's elastic agent, which restarts all of them when one dies.

The launcher and its workers share a temporary folder, for the job, their process ids and the exit status.
"""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import tempfile
import threading
from collections.abc import Iterator
from pathlib import Path
from types import FrameType
from typing import Any

from runner.config.errors import ConfigError, print_message
from runner.config.schema import DistributedConfig
from runner.control import signals, terminal
from runner.launch.job import MISTAKE_NAME, Job

_GRACE_S = 5.0  # from a second signal until workers are killed
_KEEP_ALIVE_S = 3600
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def count_workers(distributed: DistributedConfig) -> int:
    """Returns the number of processes that this machine runs.

    Raises:
        ConfigError: this machine has fewer accelerators.
    """
    wanted = distributed.nproc_per_node
    if wanted == 1 or distributed.strategy is None:
        return 1
    import torch

    is_cpu = distributed.device == "cpu" or not torch.accelerator.is_available()
    count = 0 if is_cpu else torch.accelerator.device_count()
    if wanted == "auto":
        return max(count, 1)
    is_shared = ":" in distributed.device  # the name of one accelerator
    if not is_cpu and not is_shared and wanted > count:
        raise ConfigError(
            f"distributed.nproc_per_node={wanted}: this machine has {count} accelerators, one a process; let the "
            "processes share one: distributed.device=cuda:0; or train on the CPU: distributed.device=cpu"
        )
    return int(wanted)


def run_workers(job: Job, num_local: int, *, raises: bool = False) -> int:
    """Runs a job in `num_local` workers; returns the exit status of the run.

    Args:
        raises: a mistake in the config that a worker has found is raised here, too.
    Raises:
        ConfigError: the rendezvous of the machines failed.
    """
    with tempfile.TemporaryDirectory(prefix="runner-") as name, _unchanged_environment():
        folder = Path(name)
        (folder / "job").write_bytes(job.encode())
        relay = _SignalRelay(folder)
        with signals.install_handlers(relay.forward):
            failure = _run_agent(job, num_local, folder)
        relay.kill_timer.cancel()
        status_file = folder / "status"
        status = int(status_file.read_text()) if status_file.is_file() else None
        if status is None and relay.received:
            status = signals.EXIT_STATUSES[signals.STATUS_BY_SIGNAL[relay.received[0]]]
        if status is None and failure is not None:
            print_message(failure)
        mistake = folder / MISTAKE_NAME
        if raises and status == 2 and mistake.is_file():
            raise ConfigError(mistake.read_text())
        return 1 if status is None else status


def _run_agent(job: Job, num_local: int, folder: Path) -> str | None:
    """Runs the workers until they end; returns a message if one failed for good."""
    distributed = job.spec.distributed
    endpoint = f"distributed.rdzv_endpoint={distributed.rdzv_endpoint}"
    if distributed.rdzv_endpoint is not None:
        host, _, port = distributed.rdzv_endpoint.rpartition(":")
        try:
            socket.getaddrinfo(host, int(port))
        except OSError as error:
            raise ConfigError(f"{endpoint}: there is no such host ({error.strerror})") from error
    os.environ.setdefault("LOGLEVEL", "ERROR")  # of the agent, which would report how a worker failed
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if job.has_file_store:
        rendezvous = _make_file_rendezvous(folder)
    else:
        rendezvous = {"run_id": "runner", "rdzv_endpoint": distributed.rdzv_endpoint, "rdzv_configs": {}}
    timeout_s = int(distributed.rdzv_timeout_s)
    rendezvous["rdzv_configs"] |= {"timeout": timeout_s, "join_timeout": timeout_s}
    config = LaunchConfig(
        min_nodes=distributed.nnodes,
        max_nodes=distributed.nnodes,
        nproc_per_node=num_local,
        rdzv_backend="c10d",
        max_restarts=distributed.max_restarts,
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",  # must not be empty, nor name a signal that is relayed
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),  # by default a folder that is never removed
        **rendezvous,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-c", _RUN_WORKER, str(folder), str(os.getpid()))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"exit status {failure.exitcode}" if failure.exitcode >= 0 else signal.Signals(-failure.exitcode).name
        number = distributed.max_restarts
        return f"rank {rank} ended with {how}, after {number} restarts; go on with resume={job.folder}"
    except RendezvousError as error:
        raise ConfigError(f"{endpoint}: the machines did not meet ({error})") from error
    return None


def _make_file_rendezvous(folder: Path) -> dict[str, Any]:
    """Returns the rendezvous settings of one machine, where no process opens a port that others can reach.

    The stores are files in `folder`, which this user alone can open. Tensors are exchanged on the loopback interface.
    """
    # By default the agent starts a TCPStore for its workers, which listens on all interfaces whatever its address.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, _LOOPBACK)
    return {
        "run_id": folder.name,
        "rdzv_endpoint": str(folder / "rendezvous"),
        # Rare heartbeats: a FileStore only grows, and no other agent waits for them.
        "rdzv_configs": {"store_type": "file", "keep_alive_interval": _KEEP_ALIVE_S},
        # By default the agent looks up this machine's host name, which need not resolve.
        "local_addr": "127.0.0.1",
    }


# `-P` keeps the current directory off `sys.path`, unless the job adds it. The directory of this package comes last.
_RUN_WORKER = (
    f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); "
    "from runner.launch import worker; worker.run_and_exit()"
)


@contextlib.contextmanager
def _unchanged_environment() -> Iterator[None]:
    """Restores the environment variables and the handler of SIGQUIT, which a job must not leave to the next."""
    before, handler = dict(os.environ), signal.getsignal(signal.SIGQUIT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGQUIT, handler)


class _SignalRelay:
    """Forwards the signals of this process to its workers, each once; the workers have sessions of their own."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.received: list[signal.Signals] = []
        self.kill_timer = threading.Timer(_GRACE_S, self._send, (signal.SIGKILL,))  # runs from a second signal on

    def forward(self, number: int, frame: FrameType | None) -> None:
        """Handles a signal: forwards it; after a second one, kills workers that do not end in time."""
        if number == signal.SIGHUP:
            terminal.redirect_closed_streams()
        if number in signals.NEVER_SECOND and self.received:
            return
        self.received.append(signal.Signals(number))
        (self._folder / "ended").touch()
        if not self._worker_pids():
            raise KeyboardInterrupt(number)
        self._send(number)
        if len(self.received) == 2:
            self.kill_timer.start()

    def _worker_pids(self) -> list[int]:
        """Returns the process ids of the newest attempt, from files named `pid.ATTEMPT.PID`."""
        found = [tuple(map(int, path.name.split(".")[1:])) for path in self._folder.glob("pid.*")]
        return [pid for attempt, pid in found if attempt == max(found)[0]]

    def _send(self, number: int) -> None:
        for pid in self._worker_pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
