"""Costs of two ranks on the CPU: a step against torch's DDP and FSDP2 by hand, and the start against torchrun.

    python tests/benchmarks/distributed.py

Steps: two gloo processes, each with all loops over the same batches, in turns, with and without gradient clipping;
medians of the turns, and the median ratio to the loop by hand. By hand, FSDP2 shards the same modules. All update by
AdamW's default kernel, and the runner also by the fused one, which it chooses by itself.
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
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

sys.path.insert(0, str(Path(__file__).parent.parent))

from conftest import Project
from ranks import run_ranks

from runner.engines import Engine, Engines
from runner.engines.dynamo import step_without_dynamo
from runner.engines.fsdp import FSDP
from runner.engines.optim.fused import use_fused_kernels
from runner.engines.strategies import DDP
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.train import Loop

TURNS, STEPS, LOG_EVERY = 5, 100, 10


class Net(nn.Module):
    def __init__(self, width, depth):
        super().__init__()
        self.first = nn.Linear(64, width)
        # A list of blocks, each of which FSDP2 shards by itself.
        self.blocks = nn.Sequential(*(nn.Sequential(nn.Linear(width, width), nn.GELU()) for _ in range(depth)))
        self.head = nn.Linear(width, 1)

    def forward(self, x, y):
        return (self.head(self.blocks(self.first(x))) - y).square().mean()


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


def wrap_ddp(module):
    return nn.parallel.DistributedDataParallel(module, gradient_as_bucket_view=True)


def wrap_fsdp(module):
    mesh = init_device_mesh("cpu", (dist.get_world_size(),))
    for block in module.blocks:
        fully_shard(block, mesh=mesh)
    return fully_shard(module, mesh=mesh, reshard_after_forward=False)


def by_hand(width, depth, size, clip_norm, wrap):
    torch.manual_seed(0)
    module = wrap(Net(width, depth))
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    batches = Batches(size)

    def turn():
        losses = []
        for step in range(STEPS):
            loss = module(**next(batches))
            loss.backward()
            if clip_norm:
                nn.utils.clip_grad_norm_(module.parameters(), clip_norm)
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.detach())
            if step % LOG_EVERY == LOG_EVERY - 1:
                mean = torch.stack(losses).mean()
                dist.all_reduce(mean)
                mean.item()
                losses.clear()

    return turn


def by_runner(width, depth, size, clip_norm, strategy, is_fused=False):
    torch.manual_seed(0)
    module = Net(width, depth)
    coordinator = Coordinator()
    strategy.attach_coordinator(coordinator, "model", True)
    strategy.shard(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=1e-4)
    if is_fused:
        use_fused_kernels(optimizer, module)
    step_without_dynamo(optimizer)  # as `build` does
    engine = Engine(module, optimizer, clip_norm=clip_norm, on_nonfinite="stop", strategy=strategy)
    settings = {"log_every": LOG_EVERY, "log": lambda step, values: None, "coordinator": coordinator}
    loop = Loop(Engines(model=engine), Batches(size), steps=0, **settings)

    def turn():
        loop.steps += STEPS
        loop.run()

    return turn


def measure(*settings):
    """Returns the seconds per step of each contender's turns, on this rank."""
    turns = {
        "torch's DDP by hand": by_hand(*settings, wrap_ddp),
        "runner, DDP": by_runner(*settings, DDP()),
        "runner, DDP, fused": by_runner(*settings, DDP(), is_fused=True),
        "torch's FSDP2 by hand": by_hand(*settings, wrap_fsdp),
        "runner, FSDP2": by_runner(*settings, FSDP()),
        "runner, FSDP2, fused": by_runner(*settings, FSDP(), is_fused=True),
    }
    times = {name: [] for name in turns}
    for number in range(TURNS + 2):
        # The order alternates, because caches and clock rates may differ for the second one.
        for name in sorted(turns, reverse=number % 2 == 1):
            dist.barrier()
            began = time.perf_counter()
            turns[name]()
            if number >= 2:
                times[name].append((time.perf_counter() - began) / STEPS)
    return times


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


def print_steps(found):
    for names in ((name for name in found if "DDP" in name), (name for name in found if "FSDP2" in name)):
        bare, *others = names
        print(f"  {bare:<22}{statistics.median(found[bare]) * 1e6:9.0f} us a step")
        for name in others:
            ratio = statistics.median(own / base for own, base in zip(found[name], found[bare], strict=True))
            print(f"  {name:<22}{statistics.median(found[name]) * 1e6:9.0f} us a step   {ratio:.3f} x")


def main():
    for width, depth, size in ((64, 2, 32), (256, 4, 64), (512, 8, 64)):
        for clip_norm in (1.0, 0.0):
            found = run_ranks(2, measure, width, depth, size, clip_norm, timeout_s=600)[0]
            clipping = "gradients clipped" if clip_norm else "no clipping"
            print(f"{depth} layers of {width}, {size} samples a rank, {clipping}", flush=True)
            print_steps(found)
    found = start_up()
    bare = found["torchrun, by hand"]
    print("start, to the end of the first step")
    for name, seconds in found.items():
        print(f"  {name:<22}{seconds:6.2f} s   {seconds - bare:+.2f} s")


if __name__ == "__main__":
    main()
