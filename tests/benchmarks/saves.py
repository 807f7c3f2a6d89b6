"""Saving and loading a state beside torch and safetensors: `python tests/benchmarks/saves.py [GIGABYTES] [FOLDER]`.

How long the loop is held, how long until it is durable, and how long loading takes; medians of rounds in turn. All
write new files: what the round before wrote is removed first, by the clock of nobody.
"""

import os
import shutil
import statistics
import sys
import tempfile
import time
from pathlib import Path

import safetensors.torch
import torch

from runner import checkpoint
from runner.checkpoint import Checkpoints
from runner.saver import Saver

ROUNDS = 5


def make_state(gigabytes):
    """Some 60 tensors, as of a small transformer and its optimizer."""
    count = 60
    generator = torch.Generator().manual_seed(0)
    size = int(gigabytes * 1e9 / 4 / count)
    return {f"block.{i}.weight": torch.randn(size, generator=generator) for i in range(count)}


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
    (path,) = (folder / "checkpoints").iterdir()
    loaded = checkpoint.load(path)["model"]
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
        self.saver.close()


def timed(function, state, folder):
    began = time.perf_counter()
    function(state, folder)
    return time.perf_counter() - began


def main():
    gigabytes = float(sys.argv[1]) if len(sys.argv) > 1 else 1.0
    state = make_state(gigabytes)
    with tempfile.TemporaryDirectory(dir=sys.argv[2] if len(sys.argv) > 2 else None) as name:
        folder = Path(name)
        ours = Ours(folder)
        found: dict[str, list[float]] = {}
        for round_number in range(ROUNDS + 1):
            for path in folder.iterdir():
                shutil.rmtree(path) if path.is_dir() else path.unlink()
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
            if not round_number:  # it warms up
                first_s = held / row["one memory copy (clone)"], row["ours: until durable"] / row["raw write + fsync"]
                continue
            for name, seconds in row.items():
                found.setdefault(name, []).append(seconds)
    print(f"{gigabytes} GB in {len(state)} tensors, median of {ROUNDS} rounds, torch {torch.__version__}")
    for name, seconds in found.items():
        print(f"{name:28}{statistics.median(seconds):8.2f} s   ({min(seconds):.2f} to {max(seconds):.2f})")
    for what, base in [
        ("ours: the loop is held", "one memory copy (clone)"),
        ("ours: until durable", "raw write + fsync"),
        ("ours: verify and load", "torch.load"),
    ]:
        ratio = statistics.median(a / b for a, b in zip(found[what], found[base], strict=True))
        print(f"{what} / {base}: {ratio:.2f}")
    print(f"the first save of a run, into memory that is not there yet: {first_s[0]:.2f} and {first_s[1]:.2f}")


if __name__ == "__main__":
    main()
