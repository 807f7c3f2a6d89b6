"""Where a process stands among those of its run, as its environment tells. Imports the standard library alone."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessEnvironment:
    """Where a process stands among those of its run, and where they meet."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    has_external_store: bool = False  # the store is another program's, such as torchrun's agent
    restarts: int = 0
    run_id: str = ""
    store_file: str = ""  # in a private folder, where they meet there instead of at the address


def read_environment(environ: Mapping[str, str] = os.environ, store_file: str = "") -> ProcessEnvironment:
    """Returns this process's place, from the variables of torch's launchers or, where one is missing, of Slurm's srun.

    A Slurm batch script is no task of its own: outside a step it is one process, whatever its allocation; and so is a
    script that was submitted from within a step, whose variables it inherits.

    Args:
        store_file: where whoever started the processes has them meet.
    Raises:
        ValueError: variables that are no numbers, contradict each other, or do not say where to meet.
    """
    is_step = _is_step(environ)
    numbers = {}
    for name, (own, of_slurm, default) in _VARIABLES.items():
        text = environ.get(own, environ.get(of_slurm, default) if is_step else default)
        match = re.match(r"\d+", text)  # Slurm writes tasks a node as 2(x3) or 2,1
        if match is None:
            raise ValueError(f"the environment has {own} or {of_slurm}={text!r}: expected a number")
        numbers[name] = int(match[0])
    if not 0 <= numbers["rank"] < numbers["world_size"]:
        raise ValueError(f"the environment has rank {numbers['rank']} of {numbers['world_size']} processes")
    address, port = environ.get("MASTER_ADDR"), environ.get("MASTER_PORT")
    if numbers["world_size"] > 1 and is_step:
        address = address or _first_host(environ.get("SLURM_JOB_NODELIST", environ.get("SLURM_STEP_NODELIST", "")))
        port = port or str(20000 + (int(environ.get("SLURM_JOB_ID", 0)) * 7 + int(environ["SLURM_STEP_ID"])) % 20000)
    if numbers["world_size"] > 1 and not (address and port):
        raise ValueError(f"the environment says {numbers['world_size']} processes, but no MASTER_ADDR and MASTER_PORT")
    return ProcessEnvironment(
        **numbers,
        address=address or "127.0.0.1",
        port=int(port or 0),
        has_external_store=environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True",
        run_id=environ.get("TORCHELASTIC_RUN_ID", ""),
        store_file=store_file,
    )


_VARIABLES = {  # a place's number: torch's variable, Slurm's, and what holds without them
    "rank": ("RANK", "SLURM_PROCID", "0"),
    "world_size": ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "1"),
    "local_rank": ("LOCAL_RANK", "SLURM_LOCALID", "0"),
    "local_world_size": ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "1"),
    "restarts": ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "0"),
}


def _first_host(hosts: str) -> str:
    """Returns the first host of Slurm's list: node-3 of node-[3-5,8],other."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", hosts)
    return match[1] + (match[2] or "") if match else ""


def _is_step(environ: Mapping[str, str]) -> bool:
    count = environ.get("SLURM_STEP_NUM_TASKS")
    return count is not None and count == environ.get("SLURM_NTASKS", count)


def is_distributed_launch(environ: Mapping[str, str] = os.environ) -> bool:
    """Says whether this process was started as one of several, by torch's launchers or by srun."""
    of_slurm = environ.get("SLURM_STEP_NUM_TASKS") if _is_step(environ) else None
    return environ.get("WORLD_SIZE", of_slurm) not in (None, "", "1")
