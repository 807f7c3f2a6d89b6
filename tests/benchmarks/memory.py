"""What recomputing and offloading save and cost, beside torch's own and torchtune's way.

    python tests/benchmarks/memory.py [--only CASE] [--rows ROW ...] [--overhead] [--tiny]

A row runs in fresh processes, which take turns; a step is forward and backward. Peak: the device's own; on the CPU, of
one step, what the resident set grew to above that before it, with a malloc told to give memory back at once. Host: what
is page-locked. Step: median of all; its ratio to checkpoint's is the median over turns. Longest sequence: by doubling
and bisection to an eighth, within `limit` bytes of the device; the CPU has none of its own to run out of. Without an
accelerator, rows that only move are left out ("no device"), and ours recomputes. --tiny: all cases on the CPU, far
smaller, to see that they run. Overhead: us a block, of 20 tiny ones on one thread of the CPU, contenders in turns,
differences as medians of those of a turn; goal: 60 us above torch's checkpoint.
"""

import argparse
import collections
import contextlib
import dataclasses
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from runner.utils import unsloth

KEEP_LAST, IN_FLIGHT = 1, 2
ROWS = ("none", "checkpoint", "checkpoint + save_on_cpu", "checkpoint + side stream", "ours")
PEERS = ROWS[2:4]


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    layers: int
    width: int
    batch: int
    time: int
    goal: float | None = None  # of our step over torch checkpoint's
    device: str = "cuda"
    kind: str = "transformer"
    warm: int = 5  # steps, in which offload=auto makes up its mind
    steps: int = 5
    turns: int = 3
    limit: int = 0  # bytes within which the longest sequence is searched; 0 leaves it out

    @property
    def dtype(self):
        return torch.bfloat16 if self.device == "cuda" else torch.float32


CPU = Case("cpu", 12, 256, 4, 512, device="cpu", warm=1, steps=1, turns=2)
CASES = (
    Case("wide", 24, 2048, 8, 4096, goal=1.02, limit=16 << 30),
    Case("long", 24, 2048, 1, 131072, goal=1.02, warm=4, steps=2, turns=1),
    Case("narrow", 24, 1024, 64, 1024, goal=1.10),
    Case("convolutional", 24, 64, 64, 1024, goal=1.10, kind="convolutional"),
)
TINY = {"device": "cpu", "layers": 5, "width": 64, "batch": 2, "time": 128, "warm": 1, "steps": 1, "turns": 1}


class Transformer(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.first, self.second = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x):
        q, k, v = (part.unflatten(-1, (-1, 64)).transpose(1, 2) for part in self.qkv(self.first(x)).chunk(3, -1))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(gelu(self.up(self.second(x))))


class Model(nn.Module):
    def __init__(self, case):
        super().__init__()
        is_image, width = case.kind == "convolutional", case.width
        project = functools.partial(nn.Conv2d, kernel_size=1) if is_image else nn.Linear
        self.stem, self.head = project(16, width), project(width, 16)
        make = (lambda width: nn.Sequential(nn.Conv2d(width, width, 3), nn.ZeroPad2d(1))) if is_image else Transformer
        self.blocks = nn.ModuleList(make(width) for _ in range(case.layers))
        self.call, self.around = (lambda block, x: block(x)), contextlib.nullcontext

    def forward(self, x):
        x = self.stem(x)
        with self.around():
            for block in self.blocks:
                x = self.call(block, x)
        return self.head(x).float().square().mean()


class SideStream:
    """Moves what is saved, all but the last; as torchtune does (https://github.com/meta-pytorch/torchtune, BSD-3)."""

    def __init__(self, device, num_blocks):
        self.device, self.num_blocks, self.module = device, num_blocks, torch.get_device_module(device)
        self.side, self.under_way, self.count = self.module.Stream(), collections.deque(), 0

    def __call__(self):
        self.count = 0
        return saved_tensors_hooks(self.pack, self.unpack)

    def wait(self, num_left):
        while len(self.under_way) > num_left:
            self.under_way.popleft()[0].wait(self.module.current_stream())

    def pack(self, tensor):
        self.count += tensor.numel() > 0  # checkpoint has an empty one saved, too
        if self.count >= self.num_blocks or not tensor.numel():
            return tensor, None
        copy, event = torch.empty_like(tensor, device="cpu", pin_memory=tensor.is_cuda), self.module.Event()
        self.side.wait_stream(self.module.current_stream())
        with torch.no_grad(), self.module.stream(self.side):
            copy.copy_(tensor, non_blocking=True)
            event.record(self.side)
        self.under_way.append((event, tensor))  # held until its copy has ended
        self.wait(5)
        return None, copy

    def unpack(self, packed):
        tensor, copy = packed
        self.wait(0)
        if tensor is None:
            with self.module.stream(self.side):
                tensor = copy.to(self.device, non_blocking=True)
            self.module.current_stream().wait_stream(self.side)
            if tensor.is_cuda:  # its memory is the side stream's
                tensor.record_stream(self.module.current_stream())
        return tensor


def arrange(model, row, device):
    if row == "ours":
        return unsloth.apply(model, keep_last=KEEP_LAST, in_flight=IN_FLIGHT)
    if row != "none":
        model.call = functools.partial(checkpoint, use_reentrant=False)
    if row == "checkpoint + save_on_cpu":
        model.around = functools.partial(save_on_cpu, pin_memory=device.type == "cuda")
    elif row == "checkpoint + side stream":
        model.around = SideStream(device, len(model.blocks))


def status(key):
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


def take_steps(case, row, limit):
    device, is_cuda = torch.device(case.device), case.device == "cuda"
    torch.manual_seed(0)
    shape = (case.batch, 16, 32, case.time // 32) if case.kind == "convolutional" else (case.batch, case.time, 16)
    model, x = Model(case).to(device, case.dtype), torch.randn(shape, device=device, dtype=case.dtype)
    report = arrange(model, row, device)
    checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=False).backward()  # its imports: 70 MiB
    if limit and is_cuda:
        torch.cuda.set_per_process_memory_fraction(limit / torch.cuda.get_device_properties(device).total_memory)
    before, times = status("VmRSS"), []
    for step in range(case.warm + case.steps):
        if is_cuda and step == case.warm:
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        model(x).backward()
        if is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - began)
        model.zero_grad()
        report and report.check()
    peak = torch.cuda.max_memory_allocated() if is_cuda else status("VmHWM") - before
    host = torch.cuda.host_memory_stats().get("allocated_bytes.peak", 0) if is_cuda else 0
    host += sum(engine.memory.peak_bytes for engine in report.engines) if report else 0
    gauges = [block.gauge for block in report.blocks.values() if block.gauge] if report else []
    moved = sum(gauge.moved_bytes > 0 and gauge.is_worth_it for gauge in gauges)
    return {"times": times[case.warm :], "peak": peak, "host": host, "moved": moved}


def start(case, row, limit=0, **changes):
    """Returns what a fresh process finds, or None where memory ran out."""
    case = dataclasses.replace(case, **changes)
    command = [sys.executable, __file__, "--request", json.dumps([vars(case), row, limit])]
    exact = {} if case.warm else {"MALLOC_MMAP_THRESHOLD_": str(1 << 20)}  # else the heap's holes are counted
    ran = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env={**os.environ, **exact})
    return json.loads(ran.stdout)


def search(case, row):
    """Returns the longest sequence that fits, to an eighth: doubles it until one does not, then takes half steps."""
    longest, gap, is_doubling = 0, case.time // 8, True
    while is_doubling or gap >= max(longest // 8, 1):
        found = start(case, row, case.limit, time=longest + gap, warm=0, steps=1)
        if found is not None and found["peak"] <= case.limit:
            longest += gap
            gap = longest if is_doubling else gap // 2
        else:
            gap, is_doubling = gap // 2, False
    return longest


def measure(case, rows):
    turns = {row: [] for row in rows}
    for number in range(case.turns):
        for row in rows[number % len(rows) :] + rows[: number % len(rows)]:
            turns[row].append(start(case, row))
    for row in rows if case.device == "cpu" else ():
        turns[row][0]["peak"] = start(case, row, warm=0, steps=1)["peak"]
    return {row: None if None in found else found for row, found in turns.items()}


def ratio(found, base):
    seconds = [[statistics.median(each["times"]) for each in turns or ()] for turns in (found, base)]
    return statistics.median([a / b for a, b in zip(*seconds, strict=False)] or [float("nan")])


def tell(case, rows, is_tiny):
    print(f"\n{case.name}: {case.layers} layers of {case.width}, {case.batch} x {case.time}, {case.turns} turns")
    if case.device == "cuda" and not torch.cuda.is_available():
        return print("  not measured: no accelerator")
    measured = [row for row in rows if row not in PEERS or case.device == "cuda" or is_tiny]
    figures = measure(case, measured)
    print(f"  {'':26}{'peak MiB':>10}{'host MiB':>10}{'step ms':>10}{'ratio':>8}  longest in {case.limit >> 20} MiB")
    for row in rows:
        found, cells = figures.get(row), f"{'out of memory' if row in measured else 'no device':>38}"
        if found is not None:
            seconds = statistics.median(each for turn in found for each in turn["times"])
            cells = f"{found[0]['peak'] / 2**20:10.0f}{found[0]['host'] / 2**20:10.0f}{seconds * 1e3:10.1f}"
            cells += f"{ratio(found, figures.get('checkpoint')):8.3f}"
        longest = search(case, row) if case.limit and row in measured else "not measured"
        print(f"  {row:26}{cells}  {longest}", flush=True)
    if figures.get("ours") and figures.get("checkpoint") and (case.device == "cuda" or is_tiny):
        judge(case, figures)


def judge(case, figures):
    base, ours = figures["checkpoint"], figures["ours"]
    goal = 0 if case.kind == "convolutional" else case.layers - KEEP_LAST
    print(f"  inputs are moved of {ours[0]['moved']} blocks (goal with offload=auto: {goal})")
    freed, size = base[0]["peak"] - ours[0]["peak"], case.dtype.itemsize * case.batch * case.time * case.width
    if goal:
        share = freed / size / (goal - IN_FLIGHT)
        print(f"  freed {freed / 2**20:.0f} MiB, {share:.3f} of what is to be (goal: within 0.03 of 1)")
    for row, most in (("checkpoint", case.goal), *((peer, 1) for peer in PEERS)):
        print(f"  step over that of {row}: {ratio(ours, figures.get(row)):.3f} (goal: at most {most})")


def tell_overhead(num_blocks=20, turns=300):
    torch.set_num_threads(1)
    bare, ours = (nn.ModuleList(nn.Bilinear(8, 8, 8) for _ in range(num_blocks)) for _ in range(2))
    report, again = unsloth.apply(ours, include=["*"]), functools.partial(checkpoint, use_reentrant=False)
    contenders = {"bare": bare, "checkpoint": [functools.partial(again, block) for block in bare], "ours": ours}
    other, x = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)
    print(f"\noverhead: us a block, {num_blocks} tiny blocks, one thread, median of {turns} turns")
    print(f"  {'call':12}{'bare':>8}{'checkpoint':>12}{'ours':>8}{'above checkpoint':>18}{'above bare':>12}")
    for style in ("positional", "keyword"):
        times, names = {name: [] for name in contenders}, list(contenders)
        for _ in range(turns + 10):
            for name in names:
                began, y = time.perf_counter(), x
                for call in contenders[name]:
                    y = call(y, other) if style == "positional" else call(input1=y, input2=other)
                y.sum().backward()
                times[name].append((time.perf_counter() - began) / num_blocks * 1e6)
            names = names[1:] + names[:1]
            report.check()
        kept = [each[10:] for each in times.values()]
        above = [[a - b for a, b in zip(kept[2], base, strict=True)] for base in (kept[1], kept[0])]
        cells = zip(map(statistics.median, [*kept, *above]), (8, 12, 8, 18, 12), strict=True)
        print(f"  {style:12}" + "".join(f"{value:{width}.1f}" for value, width in cells))


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=[case.name for case in (CPU, *CASES)])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=ROWS)
    for flag in ("--overhead", "--tiny"):
        parser.add_argument(flag, action="store_true")
    parser.add_argument("--request", help=argparse.SUPPRESS)
    asked, has_device = parser.parse_args(), torch.cuda.is_available()
    if asked.request:
        found, (case, row, limit) = None, json.loads(asked.request)
        with contextlib.suppress(torch.OutOfMemoryError):
            found = take_steps(Case(**case), row, limit)
        return print(json.dumps(found))
    print(f"torch {torch.__version__}, {torch.cuda.get_device_name() if has_device else 'no accelerator'}")
    for case in () if asked.overhead else (CPU, *CASES):
        if asked.only == case.name or (asked.only is None and not (case is CPU and has_device)):
            small = dataclasses.replace(case, **TINY, limit=min(case.limit, 24 << 20))
            tell(small if asked.tiny else case, list(asked.rows), asked.tiny)
    if asked.overhead or asked.only is None:
        tell_overhead()


if __name__ == "__main__":
    main()
