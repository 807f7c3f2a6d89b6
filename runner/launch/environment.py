"""Rank, world size and store address of this process, from the environment variables of torch's launchers or srun."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class ProcessEnvironment:
    """Rank, world size and store address of one process of a run."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    address: str = "127.0.0.1"
    port: int = 0
    has_external_store: bool = False  # another program serves the store, such as torchrun's agent
    restarts: int = 0
    run_id: str = ""
    store_file: str = ""  # a store in a private folder, used in place of the address


def read_environment(environ: Mapping[str, str] = os.environ, store_file: str = "") -> ProcessEnvironment:
    """Returns the environment of this process, from variables of torch's launchers or else of Slurm's srun.

    A Slurm batch script is one process, whatever its allocation. So is a script that was submitted from within a step,
    whose variables it inherits.

    Args:
        store_file: the store that the launcher has chosen.
    Raises:
        ValueError: a variable is no number, two contradict each other, or the address of the store is missing.
    """
    is_step = _is_step(environ)
    numbers = {}
    for name, (of_torch, of_slurm, default) in _VARIABLES.items():
        text = environ.get(of_torch, environ.get(of_slurm, default) if is_step else default)
        match = re.match(r"\d+", text)  # Slurm writes tasks a node as 2(x3) or 2,1
        if match is None:
            raise ValueError(f"the environment has {of_torch} or {of_slurm}={text!r}: expected a number")
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


_VARIABLES = {  # a field: torch's variable, Slurm's, and the default
    "rank": ("RANK", "SLURM_PROCID", "0"),
    "world_size": ("WORLD_SIZE", "SLURM_STEP_NUM_TASKS", "1"),
    "local_rank": ("LOCAL_RANK", "SLURM_LOCALID", "0"),
    "local_world_size": ("LOCAL_WORLD_SIZE", "SLURM_STEP_TASKS_PER_NODE", "1"),
    "restarts": ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT", "0"),
}


def _first_host(hosts: str) -> str:
    """Returns the first host of Slurm's list, such as node-3 of `node-[3-5,8],other`."""
    match = re.match(r"([^,\[]+)(?:\[(\d+))?", hosts)
    return match[1] + (match[2] or "") if match else ""


def _is_step(environ: Mapping[str, str]) -> bool:
    """Returns whether srun has started this process as a task of a step."""
    count = environ.get("SLURM_STEP_NUM_TASKS")
    return count is not None and count == environ.get("SLURM_NTASKS", count)


def is_distributed_launch(environ: Mapping[str, str] = os.environ) -> bool:
    """Returns whether torch's launchers or srun have started this process as one of several."""
    of_slurm = environ.get("SLURM_STEP_NUM_TASKS") if _is_step(environ) else None
    return environ.get("WORLD_SIZE", of_slurm) not in (None, "", "1")
