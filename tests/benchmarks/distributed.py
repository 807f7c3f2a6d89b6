"""Costs of two ranks on the CPU: a step against hand-written DDP, and the start against torchrun.

    python tests/benchmarks/distributed.py

Steps: two gloo processes, each with both loops over the same batches, in turns; medians of the turns, and their ratio.
Start: from the command to the end of the first step, in turns.
"""

import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import Project
from ranks import run_ranks

from runner.engines import Engine, Engines
from runner.engines.fsdp import FSDP
from runner.engines.strategies import DDP
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.train import Loop

TURNS, STEPS, LOG_EVERY = 15, 30, 10


class Net(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        layers = [layer for _ in range(depth) for layer in (nn.Linear(width, width), nn.GELU())]
        self.layers = nn.Sequential(nn.Linear(64, width), *layers, nn.Linear(width, 1))

    def forward(self, x, y):
        return (self.layers(x) - y).square().mean()


class Batches:
    weight = 1.0
    num_samples_total = 0

    def __init__(self, size):
        generator = torch.Generator().manual_seed(dist.get_rank())
        self.batches = [{"x": torch.randn(size, 64, generator=generator), "y": torch.ones(size, 1)} for _ in range(8)]

    def __next__(self):
        self.num_samples_total += 1
        return self.batches[self.num_samples_total % 8]

    def position(self):
        return self.num_samples_total


def by_hand(width, depth, size):
    torch.manual_seed(0)
    module = nn.parallel.DistributedDataParallel(Net(width, depth), gradient_as_bucket_view=True)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    batches = Batches(size)

    def turn():
        losses = []
        for step in range(STEPS):
            loss = module(**next(batches))
            loss.backward()
            nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if step % LOG_EVERY == LOG_EVERY - 1:
                mean = torch.stack(losses).mean()
                dist.all_reduce(mean)
                mean.item()
                losses.clear()

    return turn


def by_runner(width, depth, size, strategy):
    torch.manual_seed(0)
    module = Net(width, depth)
    coordinator = Coordinator()
    strategy.join(coordinator, "model", True)
    strategy.shard(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    engine = Engine(module, optimizer, clip_norm=1.0, on_nonfinite="stop", strategy=strategy)
    settings = {"log_every": LOG_EVERY, "log": lambda step, values: None, "coordinator": coordinator}
    loop = Loop(Engines(model=engine), Batches(size), steps=0, **settings)

    def turn():
        loop.steps += STEPS
        loop.run()

    return turn


def measure(width, depth, size):
    turns = {
        "torch's DDP by hand": by_hand(width, depth, size),
        "runner, DDP": by_runner(width, depth, size, DDP()),
        "runner, FSDP2": by_runner(width, depth, size, FSDP()),
    }
    times = {name: [] for name in turns}
    for number in range(TURNS + 2):
        for name, turn in turns.items():
            dist.barrier()
            began = time.perf_counter()
            turn()
            if number >= 2:
                times[name].append((time.perf_counter() - began) / STEPS)
    return {name: statistics.median(each) for name, each in times.items()}


BY_HAND = """
import os, torch, torch.distributed as dist, own
dist.init_process_group("gloo")
module = torch.nn.parallel.DistributedDataParallel(own.Model())
optimizer = torch.optim.AdamW(module.parameters())
data = torch.utils.data.DataLoader(own.Data(), batch_size=4)
module(**next(iter(data)))["loss"].backward()
optimizer.step()
dist.destroy_process_group()
os._exit(0)  # torch 2.13 sometimes aborts if gloo's threads run while the interpreter ends
"""


def start_up(turns=5):
    with tempfile.TemporaryDirectory() as name:
        project = Project(Path(name))
        (project.folder / "by_hand.py").write_text(BY_HAND)
        ranks = ["distributed=ddp", "distributed.nproc_per_node=2"]
        short = ["trainer.steps=1", "trainer.save_every=0", "trainer.eval_every=0"]
        commands = {
            "torchrun, by hand": ["torchrun", "--nproc-per-node", "2", "by_hand.py"],
            "python -m runner": [*project.command, *ranks, *short],
            "torchrun -m runner": [
                "torchrun",
                "--nproc-per-node",
                "2",
                *project.command[1:],
                "distributed=ddp",
                *short[:3],
            ],
        }
        times = {name: [] for name in commands}
        for _ in range(turns):
            for name, command in commands.items():
                began = time.perf_counter()
                subprocess.run(command, cwd=project.folder, check=True, capture_output=True, stdin=subprocess.DEVNULL)
                times[name].append(time.perf_counter() - began)
        return {name: statistics.median(each) for name, each in times.items()}


def main():
    for width, depth, size in ((64, 2, 32), (256, 4, 64), (512, 8, 64)):
        found = run_ranks(2, measure, width, depth, size, timeout_s=600)[0]
        bare = found["torch's DDP by hand"]
        print(f"{depth} layers of {width}, {size} samples a rank")
        for name, seconds in found.items():
            print(f"  {name:<22}{seconds * 1e6:9.0f} us a step   {seconds / bare:.3f} x")
    found = start_up()
    bare = found["torchrun, by hand"]
    print("start, to the end of the first step")
    for name, seconds in found.items():
        print(f"  {name:<22}{seconds:6.2f} s   {seconds - bare:+.2f} s")


if __name__ == "__main__":
    main()
