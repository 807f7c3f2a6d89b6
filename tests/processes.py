"""Finds the running processes below a process or in sessions, from one listing of `/proc` (Linux)."""

import time
from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One line of `/proc/<pid>/stat`."""

    pid: int
    name: str
    parent: int
    session: int
    started_at: int  # clock ticks since the machine was started


def descendants_of(pid: int) -> list[int]:
    """Returns the pids of a process' children, their children and so on, in the order that they were started."""
    return [process.pid for process in _select_descendants(pid, _list())]


def workers_of(launcher: int) -> list[int]:
    """Returns the pids of a launcher's workers by rank: its descendants that lead a session."""
    return [process.pid for process in _select_descendants(launcher, _list()) if process.session == process.pid]


def started_by(pid: int) -> set[int]:
    """Returns the pids of a process' descendants and of the other processes in its session."""
    processes = _list()
    descendants = {process.pid for process in _select_descendants(pid, processes)}
    return descendants | {process.pid for process in processes if process.session == pid} - {pid}


def running_in(sessions: set[int]) -> dict[int, str]:
    """Returns pid and name of the processes that run in these sessions, with their leaders."""
    return {process.pid: process.name for process in _list() if {process.pid, process.session} & sessions}


def is_running(pid: int) -> bool:
    """Whether a process runs."""
    return _read(pid) is not None


def wait_for_end(pids: list[int], timeout_s: float = 120.0) -> None:
    """Waits until none of these processes runs."""
    deadline = time.monotonic() + timeout_s
    while left := [pid for pid in pids if is_running(pid)]:
        assert time.monotonic() < deadline, left
        time.sleep(0.05)


def _list() -> list[Process]:
    """Lists the running processes of this machine in the order that they were started."""
    found = [_read(int(folder.name)) for folder in Path("/proc").glob("[0-9]*")]
    return sorted(filter(None, found), key=lambda process: (process.started_at, process.pid))


def _read(pid: int) -> Process | None:
    """Returns None for a process that has ended, or is a zombie."""
    try:
        name, _, rest = Path(f"/proc/{pid}/stat").read_text().partition("(")[2].rpartition(")")
    except (FileNotFoundError, ProcessLookupError):
        return None
    state, parent, _, session, *fields = rest.split()
    return None if state in "ZX" else Process(pid, name, int(parent), int(session), int(fields[15]))


def _select_descendants(pid: int, processes: list[Process]) -> list[Process]:
    family, before = {pid}, 0
    while len(family) > before:  # a parent may stand after its child: pids start again at 1
        before = len(family)
        family |= {process.pid for process in processes if process.parent in family}
    return [process for process in processes if process.pid in family - {pid}]
