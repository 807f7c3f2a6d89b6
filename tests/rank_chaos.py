"""Kills a rank or the launcher of a run on several ranks at random times, and compares with the uninterrupted run.

Ranks are started as torchrun's agent starts them (`by_ranks`), or by the runner's launcher (`by_launcher`). The
launcher is forked and forks its workers, or is a new interpreter that executes them.
"""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

from chaos import OVERRIDES, TIMES, Zygote
from processes import descendants_of, running_in, workers_of
from ranks import Ranks

from runner.checkpoint import checkpoints as checkpoint
from runner.checkpoint.checkpoints import Checkpoints

STEPS = 20
PATIENCE_S = 25.0  # for the remaining processes of a run to end by themselves
LOADER_S = 12.0  # in addition, for a killed rank's DataLoader workers, which look for their parent every 5 s
OPTIONS = [
    *(override for override in OVERRIDES if not override.startswith("trainer.precision")),
    f"trainer.steps={STEPS}",
    "distributed.timeout_s=10",
]
MODULES = [
    "runner.launch.elastic",
    "runner.launch.worker",
    "runner.checkpoint.sharded",
    "torch.distributed.launcher.api",
]
MODULES += ["torch.distributed.elastic.agent.server.local_elastic_agent", "runner.engines.fsdp"]
EXPECTED = {0, 1, 75, -signal.SIGKILL, -signal.SIGTERM, -signal.SIGUSR2}


class RankChaos:
    """One experiment on several ranks in its own folder: runs it uninterrupted once, then repeatedly with kills."""

    def __init__(self, folder: Path, zygote: Zygote, how: str, num_ranks: int = 2) -> None:
        self.folder, self.zygote, self.ranks = folder, zygote, Ranks(zygote)
        self.num_ranks = num_ranks
        self.overrides = [*OPTIONS, f"distributed={how}", f"distributed.nproc_per_node={num_ranks}"]
        zygote.load(MODULES)
        began = time.monotonic()
        self.ranks.run(folder, self.num_ranks, *self.overrides, f"hydra.run.dir=whole_{how}")
        self.whole_s = time.monotonic() - began
        counts = [folder / f"printed.txt.count{rank}" for rank in range(self.num_ranks)]
        self.num_operations = [int(path.read_text()) for path in counts]
        self.expected = self.content(f"whole_{how}")
        self.num_kills = self.num_starts = self.num_lost = self.num_troubles = 0
        self.slowest_s = 0.0  # from a kill to the end of the last process
        self.troubles: list[str] = []

    @property
    def printed(self) -> str:
        return (self.folder / "printed.txt").read_text()

    def by_ranks(self, run: str, generator: random.Random) -> None:
        """Kills a rank a few times, in a save or at any time, and restarts all ranks each time until the run ends."""
        self._forget_printed()
        run_id, count = f"chaos-{run}", generator.randint(1, 4)
        for restarts in range(count + 1):
            kill = generator.random() if restarts < count else 1.0
            if self._attempt(run, run_id, restarts, kill, generator) == [0] * self.num_ranks:
                break
        else:
            self._trouble(run, "did not end")
        self._look_back(run)

    def _attempt(self, run: str, run_id: str, restarts: int, kill: float, generator: random.Random) -> list[int]:
        victim, crashes, is_last = generator.randrange(self.num_ranks), {}, kill == 1.0
        total = self.num_operations[victim]
        if total and kill < 0.4:
            crashes = {victim: generator.randint(1, total)}
        argv = [f"hydra.run.dir={run}", f"data.num_workers={generator.choice((0, 0, 0, 2))}"]
        self.num_starts += 1
        pids = self.ranks.start(
            self.folder,
            self.num_ranks,
            *self.overrides,
            *argv,
            restarts=restarts,
            run_id=run_id,
            crashes=crashes,
            finalizes=generator.random() < 0.2,
        )
        if not crashes and not is_last:
            time.sleep(generator.uniform(0.05, self.whole_s))
            os.kill(pids[victim], signal.SIGKILL)
        statuses, began = self._await_end(pids)
        if len(statuses) < self.num_ranks:  # as torchrun's agent does when a rank has died
            time.sleep(generator.choice((0.0, 0.05, 0.1, 3.0)))
            for pid in set(pids) & running_in(set(pids)).keys():
                os.killpg(pid, signal.SIGTERM)
        self._await_nobody(run, set(pids), began)
        statuses = [statuses[pid] if pid in statuses else self.zygote.wait(pid) for pid in pids]
        self.num_kills += statuses[victim] == -signal.SIGKILL
        self._judge(run, statuses)
        return statuses

    def _await_end(self, pids: list[int]) -> tuple[dict[int, int], float]:
        """Waits until a rank has failed, or all have ended; returns their statuses so far, and the time."""
        deadline, statuses = time.monotonic() + 3 * PATIENCE_S, dict[int, int]()
        while time.monotonic() < deadline and len(statuses) < len(pids) and not any(statuses.values()):
            left = running_in(set(pids))
            statuses |= {pid: self.zygote.wait(pid) for pid in pids if pid not in left and pid not in statuses}
            time.sleep(0.01)
        return statuses, time.monotonic()

    def _await_nobody(self, run: str, sessions: set[int], began: float) -> None:
        """Waits until no process of these sessions runs; reports and kills those that do not end."""
        while left := running_in(sessions):
            now = time.monotonic()
            has_leader = bool(sessions & left.keys())
            if now - began > (PATIENCE_S if has_leader else PATIENCE_S + LOADER_S):
                self._trouble(run, f"left {left} behind")
                for pid in left:
                    os.kill(pid, signal.SIGKILL)
                time.sleep(0.5)
                return
            if has_leader:
                self.slowest_s = max(self.slowest_s, now - began)
            time.sleep(0.02)

    def by_launcher(self, run: str, generator: random.Random, is_real: bool = False) -> None:
        """Kills workers and launchers at random, resumes by hand after a launcher's death, then lets the run end."""
        self._forget_printed()
        whole_s = self.whole_s + (4.0 if is_real else 0.5)
        for number in range(generator.randint(1, 3) + 1):
            is_last = number == 3 or (number and generator.random() < 0.3)
            if self._launch(run, generator, whole_s, is_real, ends=is_last) == 0:
                break
        else:
            if self._launch(run, generator, whole_s, is_real, ends=True) != 0:
                self._trouble(run, "did not end")
        self._look_back(run)

    def _launch(self, run: str, generator: random.Random, whole_s: float, is_real: bool, ends: bool) -> int:
        has_begun = any((self.folder / run / "checkpoints").glob("step_*"))
        before = self._newest(run) if has_begun else 0
        if not has_begun:
            shutil.rmtree(self.folder / run, ignore_errors=True)
        argv = [f"resume={run}" if has_begun else f"hydra.run.dir={run}"]
        argv += [f"data.num_workers={generator.choice((0, 0, 0, 2))}"]
        self.num_starts += 1
        pid, process = self._start_launcher([*self.overrides, *argv], is_real)
        sessions = {pid}
        for number in range(generator.randint(0 if has_begun else 1, 2)):  # within max_restarts
            needs_workers = not number and not has_begun
            time.sleep(generator.uniform(0.1, whole_s / 2 if needs_workers else whole_s))
            while not (workers := workers_of(pid)) and needs_workers and running_in({pid}):
                time.sleep(0.02)
            sessions |= {*workers}
            if workers:
                os.kill(generator.choice(workers), signal.SIGKILL)
                self.num_kills += 1
        if not ends:
            time.sleep(generator.uniform(0.1, whole_s))
            if pid in running_in({pid}):
                os.kill(pid, signal.SIGSTOP)  # so that it starts no process after they are listed
                sessions |= {*descendants_of(pid)}
                os.kill(pid, signal.SIGKILL)
                self.num_kills += 1
                self._await_nobody(run, sessions, time.monotonic())
        status = process.wait(timeout=120) if process else self.zygote.wait(pid)
        self._await_nobody(run, sessions, time.monotonic())
        self._judge(run, [status])
        if status not in (0, -signal.SIGKILL):
            self._trouble(run, f"the launcher ended with {status}")
        found = self._newest(run) if (self.folder / run / "checkpoints").is_dir() else 0
        if found < before:
            self.num_lost += 1
            self._trouble(run, f"step {found} after {before}")
        return status

    def _start_launcher(self, argv: list[str], is_real: bool) -> tuple[int, subprocess.Popen | None]:
        if not is_real:
            return self.zygote.start(self.folder, argv, forks_workers=True), None
        command = [sys.executable, "-m", "runner", *argv]
        with open(self.folder / "printed.txt", "ab") as output:
            process = subprocess.Popen(
                command, cwd=self.folder, stdin=subprocess.DEVNULL, stdout=output, stderr=output, start_new_session=True
            )
        return process.pid, process

    def _judge(self, run: str, statuses: list[int]) -> None:
        if unexpected := [status for status in statuses if status not in EXPECTED]:
            self._trouble(run, f"ended with {unexpected}")
        for word in ("terminate called", "Fatal Python error", "Segmentation fault", "Passed over"):
            if word in self.printed:
                self._trouble(run, f"printed {word!r}")

    def _look_back(self, run: str) -> None:
        """Checks in log.txt that no session started from an older step than an earlier session had saved."""
        saved = start = 0
        for line in (self.folder / run / "log.txt").read_text().splitlines():
            if match := re.search(r"Saved .*/step_(\d{8})", line):
                saved = max(saved, int(match[1]))
            elif match := re.search(r"Going on after step (\d+)", line):
                start = int(match[1])
            elif re.search(rf"{STEPS} steps on {self.num_ranks} ranks into", line):
                if start < saved:
                    self.num_lost += 1
                    self._trouble(run, f"step {saved} was saved, and it went on from {start}")
                start = 0

    def _newest(self, run: str) -> int:
        checkpoints = Checkpoints(self.folder / run / "checkpoints")
        checkpoints.recover()
        path, faults = checkpoints.newest()
        if faults:
            self._trouble(run, f"{faults}")
        return int(path.name.partition("_")[2]) if path else 0

    def _trouble(self, run: str, what: str) -> None:
        self.troubles.append(f"{run}: {what}")

    def _forget_printed(self) -> None:
        (self.folder / "printed.txt").write_text("")

    def content(self, run: str) -> tuple[dict, list[dict]]:
        """Returns the last checkpoint, and the metrics without times."""
        folder = self.folder / run
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        state = checkpoint.load(folder / "checkpoints" / f"step_{STEPS:08d}")
        return state, [{key: value for key, value in line.items() if key not in TIMES} for line in lines]
