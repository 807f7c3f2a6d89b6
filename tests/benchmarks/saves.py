"""Saving and loading a state, compared with torch and safetensors: `python tests/benchmarks/saves.py [GIGABYTES ...]`.

    python tests/benchmarks/saves.py [GIGABYTES ...] [--device cpu|cuda] [--held-only] [--rounds N] [--folder FOLDER]
                                     [--json FILE] [--budget SECONDS]

Measures the time that a save blocks the loop, the time until it is durable, and the time to load it: medians of rounds
in turns. Each contender writes new files; the files of the round before are removed outside the timing. `--held-only`
leaves out torch.save, safetensors and loading, and so does `--device cuda`, a state in GPU memory.
"""

import argparse
import os
import shutil
import statistics
import sys
import tempfile
import time
import traceback
from pathlib import Path

import safetensors.torch
import torch
from figures import Budget, BudgetSpentError, Figures

from runner.checkpoint import checkpoints
from runner.checkpoint.checkpoints import Checkpoints
from runner.checkpoint.saver import Saver

ROUNDS = {"cpu": 5, "cuda": 2}
MAX_COPIES = 1.3  # goal: a later save, which reuses the memory of the save before, in units of a memory copy
NUM_TENSORS = 60
IN_MEMORY = Path(
    "/dev/shm"
)  # used if the disk is too slow for the budget; only the time that a save blocks the loop counts then


def make_state(gigabytes, device="cpu"):
    """Returns 60 tensors of equal size, with `gigabytes` in total."""
    generator = torch.Generator(device).manual_seed(0)
    size = int(gigabytes * 1e9 / 4 / NUM_TENSORS)
    return {f"block.{i}.weight": torch.randn(size, generator=generator, device=device) for i in range(NUM_TENSORS)}


def synced(path):
    fd = os.open(path, os.O_RDONLY)
    os.fsync(fd)
    os.close(fd)


def clone(state, folder):
    copies = {name: tensor.clone() for name, tensor in state.items()}
    return len(copies)


def write_raw(state, folder):
    with open(folder / "raw", "wb", buffering=0) as file:
        for tensor in state.values():
            file.write(tensor.numpy().data)
        os.fsync(file.fileno())


def save_torch(state, folder):
    torch.save(state, folder / "state.pt")
    synced(folder / "state.pt")


def save_safetensors(state, folder):
    safetensors.torch.save_file(state, folder / "state.safetensors")
    synced(folder / "state.safetensors")


def load_torch(state, folder):
    loaded = torch.load(folder / "state.pt", weights_only=True)
    return sum(float(tensor[0]) for tensor in loaded.values())


def load_safetensors(state, folder):
    loaded = safetensors.torch.load_file(folder / "state.safetensors")
    into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    for name, tensor in loaded.items():
        into[name].copy_(tensor)


def load_torch_into(state, folder):
    loaded = torch.load(folder / "state.pt", weights_only=True)
    into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    for name, tensor in loaded.items():
        into[name].copy_(tensor)


def load_ours(state, folder):
    (path,) = (folder / "checkpoints").glob("step_*")
    loaded = checkpoints.load(path)["model"]
    into = {name: torch.empty_like(tensor) for name, tensor in state.items()}
    for name, tensor in loaded.items():
        into[name].copy_(tensor)


class Ours:
    def __init__(self, folder):
        self.saver = Saver(
            Checkpoints(folder / "checkpoints", keep_last=0),
            before_commit=lambda: None, saved=lambda step, path: None, failed=lambda step, error: print(error),
        )  # fmt: skip
        self.step = 0

    def hold(self, state, folder):
        self.step += 1
        self.saver.save(self.step, {"model": state}, {"step": self.step})

    def finish(self, state, folder):
        self.saver.close()  # raises the error of a failed save


def timed(function, state, folder):
    began = time.perf_counter()
    function(state, folder)
    return time.perf_counter() - began


def clear(folder):
    for path in folder.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()


# --- everything, of a state on the CPU ---


def compare_all(gigabytes, asked, budget, figures):
    """Saves and loads in turn with torch and safetensors, and prints the medians."""
    rounds = asked.rounds or ROUNDS["cpu"]
    budget.check()
    state = make_state(gigabytes)
    with tempfile.TemporaryDirectory(dir=asked.folder) as name:
        folder = Path(name)
        found, first = measure_all(state, folder, rounds, budget)
    some = next(iter(found.values()), [])
    if not some:
        raise BudgetSpentError(f"the budget of {budget.seconds:g} s is spent before a round after the warm-up")
    print(f"{gigabytes} GB in {len(state)} tensors, median of {len(some)} rounds, torch {torch.__version__}")
    for name, seconds in found.items():
        print(f"{name:28}{statistics.median(seconds):8.2f} s   ({min(seconds):.2f} to {max(seconds):.2f})")
    ratios = {}
    for what, base in [
        ("ours: the loop is held", "one memory copy (clone)"),
        ("ours: until durable", "raw write + fsync"),
        ("ours: verify and load", "torch.load"),
    ]:
        ratios[what, base] = statistics.median(a / b for a, b in zip(found[what], found[base], strict=True))
        print(f"{what} / {base}: {ratios[what, base]:.2f}")
    print(f"the first save of a run, into memory that is not there yet: {first[0]:.2f} and {first[1]:.2f}")
    if asked.json:
        write_figures(table_of(gigabytes, "cpu"), found, ratios, figures)


def measure_all(state, folder, rounds, budget):
    """Returns the seconds of each round by name, and the ratios of the first save."""
    ours = Ours(folder)
    found, first = {}, None
    longest_s = 0.0
    for round_number in range(rounds + 1):
        if budget.left() < longest_s:
            print(f"{rounds - round_number + 1} rounds are left out: the budget of {budget.seconds:g} s is spent")
            break
        began = time.monotonic()
        clear(folder)
        row = {"one memory copy (clone)": timed(clone, state, folder)}
        held = timed(ours.hold, state, folder)
        row["ours: the loop is held"] = held
        row["ours: until durable"] = held + timed(ours.finish, state, folder)
        row["raw write + fsync"] = timed(write_raw, state, folder)
        row["torch.save + fsync"] = timed(save_torch, state, folder)
        row["safetensors + fsync"] = timed(save_safetensors, state, folder)
        row["ours: verify and load"] = timed(load_ours, state, folder)
        row["torch.load"] = timed(load_torch_into, state, folder)
        row["safetensors load"] = timed(load_safetensors, state, folder)
        longest_s = max(longest_s, time.monotonic() - began)
        if not round_number:  # it warms up
            first = held / row["one memory copy (clone)"], row["ours: until durable"] / row["raw write + fsync"]
            continue
        for name, seconds in row.items():
            found.setdefault(name, []).append(seconds)
    return found, first


def write_figures(table, found, ratios, figures):
    """Adds the medians of seconds by name, and of ratios by (name, base)."""
    for name, seconds in found.items():
        figures.add(table, name, "time", statistics.median(seconds), "s")
    for (name, base), ratio in ratios.items():
        figures.add(table, name, f"ratio to {base}", ratio, "x")


# --- how long a save blocks the loop, of a state on the CPU or a GPU ---


class Copies:
    """Plain copies of a state to the host, to compare a save with."""

    def __init__(self, state, device):
        self._state, self._device = state, device
        self.numel = sum(tensor.numel() for tensor in state.values())
        self.num_bytes = sum(tensor.nbytes for tensor in state.values())

    def synchronize(self):
        """Waits for the device, so that a clock that is started now measures what follows alone."""
        if self._device == "cuda":
            torch.cuda.synchronize()

    def timed(self, function, *arguments, waits=True):
        """Returns a function's seconds, with its work on the device where it `waits`, and what it returned."""
        self.synchronize()
        began = time.perf_counter()
        returned = function(*arguments)
        if waits:
            self.synchronize()
        return time.perf_counter() - began, returned

    def to_host(self):
        """Returns the state in pageable memory that is allocated for it."""
        return {name: tensor.to("cpu", copy=True) for name, tensor in self._state.items()}

    def over(self, copies):
        """Copies the state over an earlier copy of it."""
        for name, tensor in self._state.items():
            copies[name].copy_(tensor)

    def pin(self):
        """Returns pinned memory for the state, one float32 tensor: many of them are rounded up to twice their size."""
        return torch.empty(self.numel, dtype=torch.float32, pin_memory=True)

    def into_pinned(self, buffer):
        """Enqueues a copy of the state into pinned memory."""
        start = 0
        for tensor in self._state.values():
            end = start + tensor.numel()
            buffer[start:end].copy_(tensor, non_blocking=True)
            start = end


def compare_held(gigabytes, asked, budget, figures, disk):
    """Measures the time that a save blocks the loop, and until it is durable, beside plain copies and a raw write."""
    table, rounds = table_of(gigabytes, asked.device), asked.rounds or ROUNDS[asked.device]
    budget.check()
    parent, is_durable = disk.choose(gigabytes, asked, budget, figures)
    state = make_state(gigabytes, asked.device)
    copies = Copies(state, asked.device)
    measure_pageable(table, copies, figures)
    if asked.device == "cuda":
        try:
            measure_pinned(table, copies, figures)
        except RuntimeError as error:  # the host refuses to pin as much
            figures.skip(f"{table}: plain copy into pinned memory", str(error).splitlines()[0])
    with tempfile.TemporaryDirectory(dir=parent) as name:
        measure_saves(table, state, copies, Path(name), rounds, is_durable, budget, figures, disk)


def measure_saves(table, state, copies, folder, rounds, is_durable, budget, figures, disk):
    """Adds the figures of the first save, and of as many later ones as the budget allows."""
    ours, found = Ours(folder), []
    try:
        for number in range(rounds + 1):
            try:
                budget.check(max((row["round"] for row in found), default=0.0))
            except BudgetSpentError as reason:
                figures.skip(f"{table}: save {number + 1} of {rounds + 1}", str(reason))
                return
            found.append(measure_round(ours, state, copies, folder, is_durable))
            if number == 0:
                add_save(table, "the first save", found, is_durable, copies, figures)
                if is_durable:
                    disk.seconds_per_gb = found[0]["round"] / (copies.num_bytes / 1e9)
    finally:
        if len(found) > 1:
            add_save(table, "a later save", found[1:], is_durable, copies, figures, MAX_COPIES)


def measure_pageable(table, copies, figures):
    """Adds the figures of a copy over memory that is there already; the copy before it warms up."""
    _, copied = copies.timed(copies.to_host)
    seconds, _ = copies.timed(copies.over, copied)
    add_copy(table, "plain copy over an earlier one", seconds, copies, figures)


def measure_pinned(table, copies, figures):
    """Adds the figures of copies into pinned memory, which a device makes by itself."""
    row = "plain copy into pinned memory"
    seconds, buffer = copies.timed(copies.pin)
    figures.add(table, row, "allocating the memory", seconds, "s")
    copies.timed(copies.into_pinned, buffer)
    seconds, _ = copies.timed(copies.into_pinned, buffer)
    add_copy(table, row, seconds, copies, figures)
    seconds, _ = copies.timed(copies.into_pinned, buffer, waits=False)
    figures.add(table, row, "enqueueing alone", seconds, "s")
    copies.synchronize()


def add_copy(table, row, seconds, copies, figures):
    figures.add(table, row, "time", seconds, "s")
    figures.add(table, row, "rate", copies.num_bytes / seconds / 1e9, "GB/s")


def measure_round(ours, state, copies, folder, is_durable):
    """Returns the seconds of a plain copy, of a save, and, where the files lie on a disk, of a raw write.

    The state changes as soon as the loop goes on: the checkpoint must hold what it was before.
    """
    began = time.monotonic()
    clear(folder)
    row = {}
    row["copy"], copied = copies.timed(copies.to_host)
    save_began = time.perf_counter()
    row["held"], _ = copies.timed(ours.hold, state, folder)
    for tensor in state.values():
        tensor.add_(1)
    ours.finish(state, folder)
    row["durable"] = time.perf_counter() - save_began
    row["differ"] = count_different(copied, folder)
    if is_durable:
        clear(folder)
        row["raw"] = timed(write_raw, copied, folder)
    row["round"] = time.monotonic() - began
    return row


def count_different(copied, folder):
    """Returns the number of differing tensors in a checkpoint, of the first, middle and last one."""
    (path,) = (folder / "checkpoints").glob("step_*/model.safetensors")
    names = list(copied)
    looked_at = {names[0], names[len(names) // 2], names[-1]}
    with safetensors.safe_open(path, framework="pt") as file:
        return sum(not torch.equal(file.get_tensor(name), copied[name]) for name in looked_at)


def add_save(table, save, rows, is_durable, copies, figures, most=None):
    """Adds the figures of a save, medians over its rounds, and of the plain copies before it."""

    def median_of(value):
        return statistics.median(value(row) for row in rows)

    name = f"runner: {save}"
    add_copy(table, f"plain copy to the host, before {save}", median_of(lambda row: row["copy"]), copies, figures)
    figures.add(table, name, "blocks the loop", median_of(lambda row: row["held"]), "s")
    ratio = median_of(lambda row: row["held"] / row["copy"])
    figures.add(table, name, "ratio to a plain copy to the host", ratio, "x", at_most=most)
    if is_durable:
        figures.add(table, name, "until durable", median_of(lambda row: row["durable"]), "s")
        figures.add(table, f"raw write + fsync, after {save}", "time", median_of(lambda row: row["raw"]), "s")
        ratio = median_of(lambda row: row["durable"] / row["raw"])
        figures.add(table, name, "until durable, ratio to a raw write", ratio, "x")
    differ = max(row["differ"] for row in rows)
    figures.add(table, name, "tensors that differ from the state, of 3", differ, at_most=0)
    figures.add(table, name, "rounds", len(rows))


class Disk:
    """Chooses the folder for files: on disk, or in memory if the disk is too slow for the budget."""

    def __init__(self):
        self.seconds_per_gb = None  # of a round, as an earlier size has shown it

    def choose(self, gigabytes, asked, budget, figures):
        """Returns the folder for a state of this size, and whether files in it are durable."""
        needed_s = 2.5 * gigabytes * (self.seconds_per_gb or 0.0)  # plain copies, the first save and one later
        if needed_s <= budget.left():
            return asked.folder, True
        reason = f"about {needed_s:.0f} s needed, {budget.left():.0f} s left of {budget.seconds:g} s"
        if not IN_MEMORY.is_dir() or shutil.disk_usage(IN_MEMORY).free < 1.2e9 * gigabytes:
            raise BudgetSpentError(f"{reason}, and {IN_MEMORY} has no room for it")
        figures.skip(f"{table_of(gigabytes, asked.device)}: until durable", f"{reason}; saved to {IN_MEMORY} instead")
        return IN_MEMORY, False


def table_of(gigabytes, device):
    return f"speed: a save of {gigabytes:g} GB" + (" from the GPU" if device == "cuda" else "")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("gigabytes", type=float, nargs="*", default=[1.0], help="sizes of the state; by default 1")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cpu", help="device of the state")
    parser.add_argument(
        "--held-only", action="store_true", help="only the time that a save blocks the loop, and until it is durable"
    )
    parser.add_argument("--rounds", type=int, help=f"after the first; by default {ROUNDS}")
    parser.add_argument("--folder", help="where to write; by default a temporary folder")
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--budget", type=float, default=600.0, help="seconds; what is left then is skipped")
    asked = parser.parse_args()
    budget, figures, disk = Budget(asked.budget), Figures(asked.json), Disk()
    has_failed = False
    for gigabytes in asked.gigabytes:
        table = table_of(gigabytes, asked.device)
        if asked.device == "cuda" and not torch.cuda.is_available():
            figures.skip(table, "needs a CUDA GPU")
            continue
        try:
            if asked.held_only or asked.device == "cuda":
                compare_held(gigabytes, asked, budget, figures, disk)
            else:
                compare_all(gigabytes, asked, budget, figures)
        except BudgetSpentError as reason:
            figures.skip(table, str(reason))
        except Exception as error:
            traceback.print_exc()
            figures.skip(table, f"{type(error).__name__}: {error}")
            has_failed = True
    sys.exit(has_failed)


if __name__ == "__main__":
    main()
