"""Saving and resuming a model of many small tensors: `python tests/benchmarks/many_tensors.py [TENSORS ...]`.

    python tests/benchmarks/many_tensors.py [TENSORS ...] [--rounds N] [--json FILE]

Each state is a model of linear layers of width 19 in nested modules, and that of its AdamW: four tensors for each
parameter. A save is measured beside a copy of the same tensors one by one, with a step before each, and a resume beside
torch's: reading the file and loading both states. Everything in turns; seconds of this thread, which other processes do
not change as they do the time on the clock, and medians of ratios.
"""

import argparse
import gc
import statistics
import tempfile
import time
from pathlib import Path

import torch
from figures import Figures
from torch import nn

from runner.checkpoint import checkpoints
from runner.checkpoint.checkpoints import FACTS, Checkpoints
from runner.checkpoint.saver import Saver
from runner.engines.engine import Engine
from runner.engines.engines import Engines

WIDTH = 19
MAX_COPIES = 2.0  # goal: a later save, in units of copying the tensors one by one
MAX_LOADS = 1.0  # goal: a resume, in units of torch's


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)


class Model(nn.Module):
    """Blocks of four tensors. The forward touches each with little work, like a step of a model of small layers."""

    def __init__(self, num_tensors):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(num_tensors // 4))

    def forward(self, x):
        for block in self.blocks:
            x = x + 0.01 * block.second(block.first(x))
        return x.square().mean()


def make(num_tensors):
    torch.manual_seed(0)
    model = Model(num_tensors)
    optimizer = torch.optim.AdamW(model.named_parameters())
    return model, optimizer, Engines(model=Engine(model, optimizer))


def timed(function):
    """Returns the seconds that this thread has computed, and the result."""
    began = time.thread_time()
    result = function()
    return time.thread_time() - began, result


def tensors_of(state):
    """Returns the tensors of a state, at any depth."""
    if isinstance(state, torch.Tensor):
        return [state]
    items = state.values() if isinstance(state, dict) else state if isinstance(state, (list, tuple)) else ()
    return [tensor for item in items for tensor in tensors_of(item)]


class Contest:
    """One size: a model that trains, and the folder of its checkpoints."""

    def __init__(self, num_tensors, folder):
        self.num_tensors, self.folder = num_tensors, folder
        self.model, self.optimizer, self.engines = make(num_tensors)
        self.saver = Saver(
            Checkpoints(folder / "checkpoints", keep_last=1),
            before_commit=lambda: None, saved=lambda step, path: None, failed=lambda step, error: print(error),
        )  # fmt: skip
        self.num_saves = 0

    def train(self):
        self.engines.micro_step(torch.ones(2, WIDTH))
        self.engines.step()

    def copy(self):
        return [tensor.clone() for tensor in self.tensors]

    def save(self):
        self.num_saves += 1
        self.saver.save(self.num_saves, self.engines.state_dict(), {"step": self.num_saves})

    def measure_save(self):
        """Returns the seconds of a copy one by one, and those for which a save holds the loop."""
        self.train()
        self.tensors = tensors_of(self.engines.state_dict())
        copy_s, _ = timed(self.copy)
        self.train()
        save_s, _ = timed(self.save)
        self.saver.close()
        return copy_s, save_s

    def measure_load(self):
        """Returns the seconds of torch's resume and of the runner's, each into a new model and optimizer."""
        state = {"model": self.model.state_dict(), "optimizer": self.optimizer.state_dict()}
        torch.save(state, self.folder / "state.pt")
        model, optimizer, _ = make(self.num_tensors)
        torch_s, _ = timed(lambda: self.resume_torch(model, optimizer))
        _, _, engines = make(self.num_tensors)
        runner_s, _ = timed(lambda: self.resume(engines))
        loaded = engines["model"].module.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in model.state_dict().items())
        return torch_s, runner_s

    def resume_torch(self, model, optimizer):
        state = torch.load(self.folder / "state.pt", weights_only=True)
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])

    def resume(self, engines):
        (path,) = (self.folder / "checkpoints").glob("step_*")
        parts = checkpoints.load(path)  # verifies it
        parts.pop(FACTS)
        engines.load_state_dict(parts)


def compare(num_tensors, rounds, figures):
    table = f"speed: {num_tensors:,} parameters of a model with AdamW"
    with tempfile.TemporaryDirectory() as name:
        contest = Contest(num_tensors, Path(name))
        copy_s, save_s = contest.measure_save()
        figures.add(table, "the first save holds the loop", "time", 1e3 * save_s, "ms")
        figures.add(table, "the first save holds the loop", "ratio to a copy one by one", save_s / copy_s, "x")
        gc.collect()
        gc.freeze()  # as a run does
        saves = [contest.measure_save() for _ in range(rounds)]
        loads = [contest.measure_load() for _ in range(max(2, rounds // 3))]
        gc.unfreeze()
    num_bytes = sum(tensor.nbytes for tensor in contest.tensors)
    figures.add(table, "the state", "size", num_bytes / 1e6, "MB")
    add(table, "a save holds the loop", "copy one by one", saves, MAX_COPIES, figures)
    add(table, "verify, load and resume", "torch.load + load_state_dict", loads, MAX_LOADS, figures)


def add(table, row, base, pairs, most, figures):
    """Adds the medians of pairs: the seconds of the base, and ours."""
    figures.add(table, base, "time", 1e3 * statistics.median(other for other, _ in pairs), "ms")
    figures.add(table, row, "time", 1e3 * statistics.median(ours for _, ours in pairs), "ms")
    ratio = statistics.median(ours / other for other, ours in pairs)
    figures.add(table, row, f"ratio to {base}", ratio, "x", at_most=most)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tensors", type=int, nargs="*", default=[100, 1000, 10_000], help="numbers of parameters")
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", help="file for the figures")
    asked = parser.parse_args()
    torch.set_num_threads(1)
    figures = Figures(asked.json)
    for num_tensors in asked.tensors:
        compare(num_tensors, asked.rounds, figures)


if __name__ == "__main__":
    main()
