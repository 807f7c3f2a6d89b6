"""Finds the running processes below a process or in sessions, from one listing of `/proc` (Linux)."""

from pathlib import Path
from typing import NamedTuple


class Process(NamedTuple):
    """One line of `/proc/<pid>/stat`."""

    pid: int
    name: str
    parent: int
    session: int
    started_at: int  # clock ticks since the machine was started


def list_processes() -> list[Process]:
    """Lists the running processes of this machine in the order that they were started, without zombies."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            name, _, rest = (folder / "stat").read_text().partition("(")[2].rpartition(")")
        except (FileNotFoundError, ProcessLookupError):  # it has ended meanwhile
            continue
        state, parent, _, session, *fields = rest.split()
        if state not in "ZX":
            found.append(Process(int(folder.name), name, int(parent), int(session), int(fields[15])))
    return sorted(found, key=lambda process: (process.started_at, process.pid))


def descendants_of(pid: int) -> list[int]:
    """Returns the pids of a process' children, their children and so on, in the order that they were started."""
    processes = list_processes()
    family, before = {pid}, 0
    while len(family) > before:  # a parent may stand after its child: pids start again at 1
        before = len(family)
        family |= {process.pid for process in processes if process.parent in family}
    return [process.pid for process in processes if process.pid in family - {pid}]


def workers_of(launcher: int) -> list[int]:
    """Returns the pids of a launcher's workers by rank: its descendants that lead a session."""
    family = {*descendants_of(launcher)}
    return [process.pid for process in list_processes() if process.pid in family and process.session == process.pid]


def running_in(sessions: set[int]) -> dict[int, str]:
    """Returns pid and name of the processes that run in these sessions, with their leaders."""
    return {process.pid: process.name for process in list_processes() if {process.pid, process.session} & sessions}


def is_running(pid: int) -> bool:
    """Whether a process runs."""
    return any(process.pid == pid for process in list_processes())
