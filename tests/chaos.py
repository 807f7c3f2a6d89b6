"""Kills runs at random times, resumes them, and compares them with the uninterrupted run."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from runner.checkpoint import checkpoints as checkpoint
from runner.checkpoint.checkpoints import Checkpoints

STEPS = 12
TIMES = ("time_s", "train/step_time_s", "train/samples_per_s", "train/tokens_per_s", "train/memory_gb")
OVERRIDES = [
    "--config-dir", "conf", "experiment=mine", "model._target_=own.Heavy", "sampler=pool", "trainer.accumulate=2",
    "trainer.precision=bf16", "trainer.save_every=2", "trainer.keep_last=2", "trainer.export_every=0",
    "+data.train.sleep_s=0.002",
]  # fmt: skip

HEAVY = """

class Heavy(Model):
    def __init__(self):
        super().__init__()
        self.register_buffer("ballast", torch.arange(2_000_000.0))  # a save takes a while
"""


class Zygote:
    """Starts runs by forking a process that has imported everything (`zygote.py`)."""

    def __init__(self, *modules: str) -> None:
        script = Path(__file__).with_name("zygote.py")
        pipe = subprocess.PIPE
        self._process = subprocess.Popen([sys.executable, script], stdin=pipe, stdout=pipe, text=True)
        if modules:
            self.load([*modules])

    def start(
        self,
        cwd: Path,
        argv: list[str],
        crash_at: int = 0,
        environment: dict | None = None,
        typed: Path | None = None,
        forks_workers: bool = False,
        finalizes: bool = False,
        output: Path | None = None,
        program: str = "runner.__main__",
    ) -> int:
        request = {"cwd": str(cwd), "argv": argv, "output": str(output or cwd / "printed.txt"), "crash_at": crash_at}
        request |= {"environment": environment or {}, "typed": str(typed) if typed else None, "program": program}
        return int(self._ask(request | {"forks_workers": forks_workers, "finalizes": finalizes}))

    def load(self, modules: list[str]) -> None:
        """Imports more modules before the next fork."""
        self._ask({"load": modules})

    def wait(self, pid: int) -> int:
        """Waits for the end of a run; returns its exit status, negative for a signal."""
        return os.waitstatus_to_exitcode(int(self._ask({"wait": pid})))

    def poll(self, pid: int) -> int | None:
        """Returns the exit status of a run as `wait` does, or None while it runs."""
        answer = self._ask({"poll": pid}).strip()
        return None if answer == "running" else os.waitstatus_to_exitcode(int(answer))

    def _ask(self, request: dict) -> str:
        self._process.stdin.write(json.dumps(request) + "\n")
        self._process.stdin.flush()
        return self._process.stdout.readline()

    def close(self) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()

    def kill(self) -> None:
        """Kills the process even while it handles a request, for a test that was interrupted."""
        self._process.kill()
        self.close()


class Chaos:
    """One experiment in a folder of its own: runs it uninterrupted once, then repeatedly with kills."""

    def __init__(self, folder: Path, zygote: Zygote, overrides: list[str]) -> None:
        self.folder, self.zygote, self.overrides = folder, zygote, overrides
        began = time.monotonic()
        assert self._session("whole", []) == 0, self.printed
        self.whole_s = time.monotonic() - began
        self.num_operations = int((folder / "printed.txt.count").read_text())
        self.expected = self.content("whole")
        self.num_kills = self.num_lost = 0

    @property
    def printed(self) -> str:
        return (self.folder / "printed.txt").read_text()[-3000:]

    def _session(self, run: str, extra: list[str], crash_at: int = 0, kill_after_s: float | None = None) -> int:
        has_begun = (self.folder / run / "checkpoints").is_dir() and any(
            (self.folder / run / "checkpoints").glob("step_*")
        )
        if not has_begun:
            shutil.rmtree(self.folder / run, ignore_errors=True)
        where = f"resume={run}" if has_begun else f"hydra.run.dir={run}"
        pid = self.zygote.start(self.folder, [*self.overrides, where, *extra], crash_at)
        if kill_after_s is not None:
            time.sleep(kill_after_s)
            os.killpg(pid, signal.SIGKILL)
        return self.zygote.wait(pid)

    def run_with_kills(self, run: str, generator: random.Random) -> int:
        """Kills the run a few times, during a save or at any time, then lets it end; returns the number of kills."""
        newest, before = 0, self.num_kills
        for _ in range(generator.randint(1, 4)):
            workers = [f"data.num_workers={generator.choice((0, 0, 0, 2))}"]
            if generator.random() < 0.5:
                status = self._session(run, workers, crash_at=generator.randint(1, self.num_operations))
            else:
                status = self._session(run, workers, kill_after_s=generator.uniform(0.1, self.whole_s))
            self.num_kills += status == -signal.SIGKILL
            found = self._newest(run)
            self.num_lost += found < newest
            newest = found
        if self.num_kills == before:  # each kill came after the end: start again, with a kill in the middle
            shutil.rmtree(self.folder / run)
            self.num_kills += self._session(run, [], crash_at=self.num_operations // 2) == -signal.SIGKILL
        status = self._session(run, [])
        assert status == 0, self.printed
        return self.num_kills - before

    def _newest(self, run: str) -> int:
        checkpoints = Checkpoints(self.folder / run / "checkpoints")
        if checkpoints.folder.is_dir():
            checkpoints.recover()
        path, faults = checkpoints.newest()
        assert not faults, faults
        return int(path.name.partition("_")[2]) if path else 0

    def content(self, run: str) -> tuple[dict, list[dict]]:
        """Returns the last checkpoint, and the metrics without times."""
        folder = self.folder / run
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        state = checkpoint.load(folder / "checkpoints" / f"step_{STEPS:08d}")
        return state, [{key: value for key, value in line.items() if key not in TIMES} for line in lines]


def find_difference(one: object, other: object, place: str = "state") -> str | None:
    """Returns the first difference of two nests, compared bit for bit, or None."""
    if type(one) is not type(other):
        return f"{place}: {type(one)} and {type(other)}"
    if isinstance(one, dict):
        if list(one) != list(other):
            return f"{place}: keys {list(one)} and {list(other)}"
        pairs = [(one[key], other[key], f"{place}[{key!r}]") for key in one]
    elif isinstance(one, (list, tuple)):
        if len(one) != len(other):
            return f"{place}: {len(one)} and {len(other)} entries"
        pairs = [(a, b, f"{place}[{i}]") for i, (a, b) in enumerate(zip(one, other, strict=True))]
    else:
        is_same = torch.equal(one, other) if isinstance(one, torch.Tensor) else one == other
        return None if is_same else f"{place}: {one} and {other}"
    return next((found for a, b, where in pairs if (found := find_difference(a, b, where))), None)
