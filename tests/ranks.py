"""Starts ranks of one process group in real processes: functions, or runs started as torchrun starts them."""

import contextlib
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
import warnings
from pathlib import Path

import torch
import torch.distributed as dist

from runner.launch.environment import ProcessEnvironment
from runner.utils.distributed import init_process_group, wait_for_keys

LIMIT_S = 180.0
_MAX_WAIT_S = 2.0  # for the other ranks at the end, some of which may have been killed


def run_ranks(count, function, *args, timeout_s=LIMIT_S):
    """Calls `function(*args)` in `count` ranks; returns the results by rank. An error in a rank is raised here."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        context = multiprocessing.get_context("fork")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # about forking with threads, which are idle
            processes = [
                context.Process(target=_run, args=(folder, rank, count, function, args)) for rank in range(count)
            ]
            for process in processes:
                process.start()
        deadline = time.monotonic() + timeout_s
        for process in processes:
            process.join(max(deadline - time.monotonic(), 0))
        late = [rank for rank, process in enumerate(processes) if process.is_alive()]
        for process in processes:
            process.kill()
            process.join()
        results = []
        for rank in range(count):
            path = folder / f"result.{rank}"
            if not path.exists():
                raise AssertionError(f"rank {rank} has no result; late: {late}; {[p.exitcode for p in processes]}")
            error, result = pickle.loads(path.read_bytes())
            assert error is None, f"rank {rank}: {error}"
            results.append(result)
        return results


def _run(folder, rank, count, function, args):
    torch.set_num_threads(1)
    error = result = None
    try:
        store = dist.FileStore(str(folder / "store"), count)
        place = ProcessEnvironment(rank=rank, world_size=count, local_rank=rank, local_world_size=count)
        with init_process_group(place, dist.PrefixStore("group", store), "gloo", 20.0):
            result = function(*args)
            # A rank that ends first closes its connections, from which another may not have read the last exchange.
            ends = dist.PrefixStore("end", store)
            ends.set(str(rank), "")
            wait_for_keys(ends, [str(number) for number in range(count)], _MAX_WAIT_S)
    except BaseException:
        error = traceback.format_exc()
    (folder / f"partial.{rank}").write_bytes(pickle.dumps((error, result)))
    os.rename(folder / f"partial.{rank}", folder / f"result.{rank}")
    os._exit(0)


class Ranks:
    """Starts `python -m runner` in several processes that rendezvous at a store here, as torchrun's agent does."""

    def __init__(self, zygote):
        self.zygote = zygote
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.number = 0

    def start(self, cwd, count, *argv, typed=None, environment=None, by_rank=None, restarts=0, run_id=None,
        crashes=None, finalizes=False,
    ):  # fmt: skip
        self.number += run_id is None
        shared = {
            "WORLD_SIZE": str(count),
            "LOCAL_WORLD_SIZE": str(count),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self.store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
            "TORCHELASTIC_RUN_ID": run_id or f"test-{self.number}",
            "TORCHELASTIC_RESTART_COUNT": str(restarts),
            "OMP_NUM_THREADS": "1",
        }
        pids = []
        for rank in range(count):
            keyboard = None
            if typed is not None and rank == 0:
                keyboard = Path(cwd) / "typed.txt"
                keyboard.write_text(typed)
            variables = shared | (environment or {}) | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            variables |= (by_rank or {}).get(rank, {})
            crash_at = (crashes or {}).get(rank, 0)
            pids.append(self.zygote.start(Path(cwd), list(argv), crash_at, variables, keyboard, finalizes=finalizes))
        return pids

    def wait(self, pids):
        return [self.zygote.wait(pid) for pid in pids]

    def run(self, cwd, count, *argv, status=0, **settings):
        """Runs to the end; returns the output."""
        printed = Path(cwd) / "printed.txt"
        with contextlib.suppress(FileNotFoundError):
            printed.unlink()
        statuses = self.wait(self.start(cwd, count, *argv, **settings))
        text = printed.read_text()
        assert statuses == [status] * count, (statuses, text[-4000:])
        return text
