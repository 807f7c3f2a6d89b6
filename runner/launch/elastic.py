"""N workers on this machine, through torch's elastic agent, which starts them all again where one dies.

Owns what passes between this process and its workers: the hand-over, signals, the status. Must not import torch at the
top.
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

from runner.config.errors import ConfigError, tell
from runner.control import signals, terminal
from runner.launch.job import Job

_GRACE_S = 5.0  # for workers to end after a second signal
_LOOPBACK = "lo0" if sys.platform == "darwin" else "lo"


def num_workers(settings: Any) -> int:
    """Returns how many processes this machine is to run.

    Raises:
        ConfigError: it is no number, or this machine has fewer accelerators.
    """
    wanted = settings.nproc_per_node
    if wanted == 1 or settings.strategy is None:
        return 1
    import torch

    is_cpu = settings.device == "cpu" or not torch.accelerator.is_available()
    count = 0 if is_cpu else torch.accelerator.device_count()
    if wanted == "auto":
        return max(count, 1)
    is_shared = ":" in settings.device  # the name of one accelerator
    if not is_cpu and not is_shared and wanted > count:
        raise ConfigError(
            f"distributed.nproc_per_node={wanted}: this machine has {count} accelerators, one a process; let the "
            "processes share one: distributed.device=cuda:0; or train on the CPU: distributed.device=cpu"
        )
    return int(wanted)


def start(handover: Job, num_local: int) -> int:
    """Runs a hand-over in workers; returns the exit status of the run.

    Raises:
        ConfigError: the machines did not meet.
    """
    with tempfile.TemporaryDirectory(prefix="runner-") as name, _unchanged_environment():
        folder = Path(name)
        (folder / "handover").write_bytes(handover.encode())
        relay = _Relay(folder)
        with signals.taken(relay.take):
            problem = _run_agent(handover, num_local, folder)
        relay.close()
        status = _read_status(folder)
        if status is None and relay.seen:
            status = signals.STATUSES[signals.MEANINGS[relay.seen[0]]]
        if status is None and problem is not None:
            tell(problem)
        return 1 if status is None else status


def _run_agent(handover: Job, num_local: int, folder: Path) -> str | None:
    """Runs the workers to their end; returns what a person should know where that is not how they ended."""
    settings = handover.distributed
    if settings.rdzv_endpoint is not None:
        host, _, port = settings.rdzv_endpoint.rpartition(":")
        try:
            socket.getaddrinfo(host, int(port))
        except OSError as error:
            where = f"distributed.rdzv_endpoint={settings.rdzv_endpoint}"
            raise ConfigError(f"{where}: there is no such host ({error.strerror})") from error
    os.environ.setdefault("LOGLEVEL", "ERROR")  # the agent's own words: which worker failed, and how
    from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous.api import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if handover.has_file_store:
        meeting = _meet_in_files(folder)
    else:
        meeting = {"run_id": "runner", "rdzv_endpoint": settings.rdzv_endpoint, "rdzv_configs": {}}
    timeout_s = int(settings.rdzv_timeout_s)
    meeting["rdzv_configs"] |= {"timeout": timeout_s, "join_timeout": timeout_s}
    config = LaunchConfig(
        min_nodes=settings.nnodes,
        max_nodes=settings.nnodes,
        nproc_per_node=num_local,
        rdzv_backend="c10d",
        max_restarts=settings.max_restarts,
        monitor_interval=0.1,
        signals_to_handle="SIGQUIT",  # a list that is not empty, and without those that are relayed
        logs_specs=DefaultLogsSpecs(log_dir=str(folder)),  # it makes a folder of its own, and would leave it behind
        **meeting,
    )
    try:
        elastic_launch(config, sys.executable)("-P", "-c", _START, str(folder), str(os.getpid()))
    except ChildFailedError as error:
        rank, failure = error.get_first_failure()
        how = f"exit status {failure.exitcode}" if failure.exitcode >= 0 else signal.Signals(-failure.exitcode).name
        number = settings.max_restarts
        return f"rank {rank} ended with {how}, after {number} restarts; go on with resume={handover.folder}"
    except RendezvousError as error:
        where = f"distributed.rdzv_endpoint={settings.rdzv_endpoint}"
        raise ConfigError(f"{where}: the machines did not meet ({error})") from error
    return None


def _meet_in_files(folder: Path) -> dict[str, Any]:
    """Returns the settings of an agent that is alone: neither it nor its workers open a port that others can reach.

    The stores are files in `folder`, which this user alone can open. What carries tensors listens on loopback.
    """
    # Else the agent starts a TCPStore for its workers, which listens on all interfaces whatever its address.
    os.environ["TORCH_DISABLE_SHARE_RDZV_TCP_STORE"] = "1"
    for name in ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME"):
        os.environ.setdefault(name, _LOOPBACK)
    return {
        "run_id": folder.name,
        "rdzv_endpoint": str(folder / "rendezvous"),
        # A FileStore only grows, and nobody waits for the heartbeats of an agent that is alone.
        "rdzv_configs": {"store_type": "file", "keep_alive_interval": _KEEP_ALIVE_S},
        # Else the agent looks up this machine's host name, which need not resolve.
        "local_addr": "127.0.0.1",
    }


_KEEP_ALIVE_S = 3600


# `-P`: no module is imported from the current directory, unless the run says so. The package lies last on the path.
_START = (
    f"import sys; sys.path.append({str(Path(__file__).parents[2])!r}); from runner.launch import worker; worker.start()"
)


def _read_status(folder: Path) -> int | None:
    path = folder / "status"
    return int(path.read_text()) if path.is_file() else None


@contextlib.contextmanager
def _unchanged_environment() -> Iterator[None]:
    """Leaves nothing of one job to the next: no variable, no signal handler."""
    before, handler = dict(os.environ), signal.getsignal(signal.SIGQUIT)
    try:
        yield
    finally:
        os.environ.clear()
        os.environ.update(before)
        signal.signal(signal.SIGQUIT, handler)


class _Relay:
    """Passes the signals of this process on to its workers, which have sessions of their own, each signal once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.seen: list[signal.Signals] = []
        self._last: threading.Timer | None = None

    def close(self) -> None:
        """Ends the waiting."""
        if self._last is not None:
            self._last.cancel()

    def take(self, number: int, frame: FrameType | None) -> None:
        """Passes a signal on; after a second one, workers that do not end are killed."""
        if number == signal.SIGHUP:
            terminal.leave_closed()
        if number in signals.NEVER_SECOND and self.seen:
            return
        self.seen.append(signal.Signals(number))
        (self._folder / "ended").touch()
        pids = self._pids()
        if not pids:
            raise KeyboardInterrupt(number)
        self._send(number)
        if len(self.seen) == 2:
            self._last = threading.Timer(_GRACE_S, self._send, (signal.SIGKILL,))
            self._last.start()

    def _pids(self) -> list[int]:
        found = [tuple(map(int, path.name.split(".")[1:])) for path in self._folder.glob("pid.*")]
        return [pid for attempt, pid in found if attempt == max(found)[0]]

    def _send(self, number: int) -> None:
        for pid in self._pids():
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.kill(pid, number)
