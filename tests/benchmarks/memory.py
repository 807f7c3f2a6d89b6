"""Memory and step time of recomputed and offloaded blocks, compared with torch's checkpointing.

    python tests/benchmarks/memory.py [--only CASE] [--rows ROW ...] [--json FILE] [--budget SECONDS] [--overhead]
    python tests/benchmarks/memory.py --tiny    # all cases on the CPU, much smaller, to test the benchmark

A GPU case runs in a new process (memory_rows.py). The rows of a case share parameters, gradients and input. Memory is
measured row by row, then steps are timed in turns. The cases run in order of value until the budget is spent.

Columns:
- kept: device memory that a forward adds, when the device is idle.
- peak: device memory of a step above parameters, gradients and input.
- host: page-locked memory.
- step: forward and backward, median of the turns. Its ratio to checkpoint's is the median of the ratios of the turns.
- blocks moved: blocks whose inputs offload=auto moves.
- inputs off the GPU: bytes that checkpoint keeps and ours does not, divided by the bytes of the blocks' inputs.
- longest sequence: within a limit on the process's device memory, to 1/32.

The CPU case uses a new process for each row and turn. Its peak is the growth of the resident set in one step. Overhead
is in us per block, for 20 tiny blocks on one CPU thread, contenders in turns.
"""

import argparse
import contextlib
import json
import math
import os
import queue
import statistics
import subprocess
import sys
import threading
import traceback
from pathlib import Path

import torch
from figures import Budget, Figures
from memory_rows import BASE, MIB, NEVER, NONE, ON_CPU, OURS, ROWS, Case

STYLES = ("positional", "keyword")
ANSWER_TIMEOUT_S = 45  # a process without an answer for this long counts as hung
MIN_LEFT_S = 5  # minimum left of the budget to start a case
OUT_OF_TIME = "out of time"

CPU = Case("cpu", 256, 512, layers=12, batch=4, goal=None, device="cpu", task="resident")
CASES = (  # in order of value
    Case("2048 x 8192", 2048, 8192),
    Case("longest", 2048, 512, task="longest", limit=8 << 30),
    Case("4096 x 8192", 4096, 8192),
    Case("1024 x 8192", 1024, 8192),
    Case("2048 x 32768", 2048, 32768),
    Case("4096 x 2048", 4096, 2048),
    Case("2048 x 2048", 2048, 2048),
    Case("1024 x 32768", 1024, 32768),
    Case("1024 x 2048", 1024, 2048),
    Case("convolutional", 64, 1024, batch=64, goal=1.10, is_image=True),
    Case("4096 x 32768", 4096, 32768),
)
OVERHEAD = Case("overhead", 8, 4, layers=20, goal=60, device="cpu", task="overhead", max_turns=300)
ALL = (CPU, *CASES, OVERHEAD)


class Child:
    """A process of memory_rows.py."""

    def __init__(self, **environ):
        command = [sys.executable, str(Path(__file__).with_name("memory_rows.py"))]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self.process = subprocess.Popen(command, **pipes, env={**os.environ, **environ})
        self._lines = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self):
        for line in self.process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def run(self, request, budget, on_answer):
        """Calls `on_answer` with each answer; returns why the process was ended or failed, or None."""
        try:
            with contextlib.suppress(BrokenPipeError), self.process.stdin as pipe:
                pipe.write(json.dumps(request))
            while (line := self._lines.get(timeout=max(min(budget.left(), ANSWER_TIMEOUT_S), 0))) is not None:
                on_answer(json.loads(line))
            status = self.process.wait(ANSWER_TIMEOUT_S)
        except queue.Empty:
            return OUT_OF_TIME if budget.left() <= 0 else f"hung: silent for {ANSWER_TIMEOUT_S} s"
        finally:
            self.close()
        return f"the process ended with status {status}" if status else None

    def close(self):
        self.process.kill()
        self.process.wait()


class Collector:
    """Turns the answers of a case's processes into figures."""

    def __init__(self, figures, case, names):
        self.figures, self.case, self.names = figures, case, names
        self.current = None  # the row that the process measures
        self.errors, self.memory, self.fits, self.longest = {}, {}, {}, {}
        self.seconds = {name: {} for name in names}
        self._measured = set()

    def add(self, name, column, value, unit="", **goal):
        self._measured.add(name)
        self.figures.add(self.case.title, name, column, value, unit, **goal)

    def handle(self, answer):
        """Handles a line of JSON: a measurement of a row, or only its name if it is still running."""
        self.current = name = answer.pop("row")
        handlers = {
            "error": self._handle_error, "memory": self._handle_memory, "seconds": self._handle_seconds,
            "fits": self._handle_fits, "resident": self._handle_resident, "overhead": self._handle_overhead,
        }  # fmt: skip
        for key in handlers.keys() & answer.keys():
            handlers[key](name, **answer)

    def _handle_error(self, name, error):
        self.errors[name] = error
        self.add(name, "outcome", error)

    def _handle_seconds(self, name, turn, seconds):
        self.seconds[name][turn] = seconds

    def _handle_fits(self, name, fits, is_last):
        if self.case.device == "cpu":  # there only the code is tested
            return self._measured.add(name)
        self.fits[name] = fits
        if is_last:
            self.longest[name] = fits
            self.add(name, "longest sequence", fits, "tokens")

    def _handle_resident(self, name, resident):
        self.add(name, "peak", resident / MIB, "MiB")

    def _handle_overhead(self, name, overhead):
        """Adds medians; the median of differences is that of the differences within a turn."""
        for contender, values in overhead.items():
            self.add(name, contender, statistics.median(values), "us")
        for base, goal in ((BASE, self.case.goal), (NONE, None)):
            above = [a - b for a, b in zip(overhead[OURS], overhead[base], strict=True)]
            self.add(name, f"ours above {base}", statistics.median(above), "us", at_most=goal)

    def _handle_memory(self, name, memory):
        case = self.case
        if case.device == "cpu" or name in self.memory:  # on the CPU only the code is tested
            return
        self.memory[name] = memory
        for column in ("kept", "peak", "host"):
            self.add(name, column, memory[column] / MIB, "MiB")
        if name != OURS:
            return
        self.add(name, "blocks moved", memory["moved"], f"of {case.layers}", at_most=0 if case.is_image else None)
        if BASE in self.memory and not case.is_image:
            share = (self.memory[BASE]["kept"] - memory["kept"]) / case.input_bytes
            self.add(name, "inputs off the GPU", share, "of their bytes", at_least=0.85)

    def finish(self, reason):
        """Adds comparisons of rows, and the reason for each row that was not measured."""
        for name in self.names:
            self._add_times(name)
            if name not in self.longest and name in self.fits and name not in self.errors:
                self.add(name, "longest sequence", f"at least {self.fits[name]}", "tokens")
            if name != BASE and self.longest.get(name) and self.longest.get(BASE):
                self.add(name, "longest / checkpoint's", self.longest[name] / self.longest[BASE], "x")
            if name not in self._measured:
                self.figures.skip(f"{self.case.title}, {name}", reason or "it gave no answer")
            elif not self.seconds[name] and name not in self.errors and self.case.task in ("rows", "resident"):
                self.figures.skip(f"{self.case.title}, {name}: step", reason or "it was not timed")

    def _add_times(self, name):
        goal = {"at_most": self.case.goal} if name == OURS else {}
        base = self.seconds.get(BASE, {})
        ratios = [seconds / base[turn] for turn, seconds in self.seconds[name].items() if turn in base]
        if self.seconds[name]:
            self.add(name, "step", statistics.median(self.seconds[name].values()) * 1e3, "ms")
        if ratios and name != BASE:
            self.add(name, "step / checkpoint's", statistics.median(ratios), "x", **goal)
        elif name == OURS and name in self.errors and self.case.task == "rows":
            self.add(name, "step / checkpoint's", self.errors[name], **goal)


class Benchmark:
    """Runs cases, one process after another, until the budget is spent."""

    def __init__(self, figures, budget_s):
        self.figures, self.budget = figures, Budget(budget_s)
        self.hung = set()  # rows that hung in one case are left out of the next
        self._spare = None

    @property
    def spent(self):
        return f"the budget of {self.budget.seconds:g} s was spent"

    def run(self, case, names):
        """Runs a case. Whatever fails in it is told, and the next case runs."""
        if self.budget.left() < MIN_LEFT_S:
            return self.figures.skip(case.title, self.spent)
        collector = Collector(self.figures, case, names)
        try:
            end = (self._run_resident if case.task == "resident" else self._run)(case, collector)
        except Exception as error:
            traceback.print_exc()
            end = f"{type(error).__name__}: {error}"
        collector.finish(self.spent if end == OUT_OF_TIME else end)

    def _run(self, case, collector):
        for name in self.hung.intersection(collector.names):
            collector.handle({"row": name, "error": "left out: it hung in an earlier case"})
        collector.current = None
        while names := [name for name in collector.names if name not in collector.errors]:
            end = self._next_child().run({"case": vars(case), "names": names}, self.budget, collector.handle)
            if end is None or end == OUT_OF_TIME or collector.current is None:
                return end
            # The process died or hung, and its row with it. A fresh process measures the other rows.
            if collector.current not in collector.errors:
                collector.handle({"row": collector.current, "error": end})
            if end.startswith("hung"):
                self.hung.add(collector.current)

    def _run_resident(self, case, collector):
        """Runs a fresh process a row, first for the peak, then for each of two turns."""
        for turn in (None, 0, 1):
            # Else the heap's holes are counted.
            environ = {"MALLOC_MMAP_THRESHOLD_": str(MIB)} if turn is None else {}
            for name in collector.names[:: -1 if turn == 1 else 1]:
                request = {"case": vars(case), "names": [name], "turn": turn}
                end = Child(**environ).run(request, self.budget, collector.handle)
                if end == OUT_OF_TIME:
                    return end
                if end is not None:
                    collector.handle({"row": name, "error": end})

    def _next_child(self):
        """Returns a process, and starts the next one, whose imports are done by the time it is needed."""
        child = self._spare or Child()
        self._spare = Child()
        return child

    def close(self):
        if self._spare is not None:
            self._spare.close()


def names_of(case, rows):
    """Returns the rows of a case; without a GPU there is no device to move inputs from."""
    if case.task == "overhead":
        return list(STYLES)
    return [name for name in ROWS if name in rows and (case.device == "cuda" or name not in (NEVER, ON_CPU))]


def choose(asked, has_cuda):
    """Returns the cases to run, in order."""
    if asked.overhead:
        return [OVERHEAD]
    if asked.only is not None:
        return [case for case in ALL if case.name == asked.only]
    return [*CASES, OVERHEAD] if has_cuda and not asked.tiny else list(ALL)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[case.name for case in ALL])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    parser.add_argument("--json", help="file that the figures are written to")
    parser.add_argument("--budget", type=float, default=math.inf, help="seconds")
    for flag in ("--overhead", "--tiny"):
        parser.add_argument(flag, action="store_true")
    asked, has_cuda = parser.parse_args(), torch.cuda.is_available()
    figures = Figures(asked.json)
    with contextlib.closing(Benchmark(figures, asked.budget)) as benchmark:
        for case in choose(asked, has_cuda):
            if case.device == "cuda" and not has_cuda and not asked.tiny:
                figures.skip(case.title, "needs a CUDA GPU")
            else:
                benchmark.run(case.shrunk() if asked.tiny else case, names_of(case, asked.rows))


if __name__ == "__main__":
    main()
