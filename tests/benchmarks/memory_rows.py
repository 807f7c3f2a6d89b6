"""A process of memory.py: imports everything, reads one request, and answers in lines of JSON."""

import contextlib
import copy
import dataclasses
import functools
import gc
import json
import math
import sys
import time
import traceback
from pathlib import Path

import torch
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.nn.functional import gelu, scaled_dot_product_attention
from torch.utils.checkpoint import checkpoint

from runner.utils import unsloth
from runner.utils.distributed.memory import is_out_of_memory

BASE, OURS, NEVER, ON_CPU, NONE = ROWS = (
    "checkpoint", "ours", "ours, no offload", "checkpoint + save_on_cpu", "none",
)  # fmt: skip
WARM_STEPS = {OURS: 5}  # offload=auto times four calls of a block; other rows need one step
SLOW_TURN_S, TIMED_S, MIN_TURNS = 3, 8, 3
GRAIN, MAX_PROBES = 64, 12  # of the search for the longest sequence
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Case:
    name: str
    width: int
    time: int  # tokens or pixels; of the first probe, where the longest sequence is searched
    layers: int = 24
    batch: int = 1
    goal: float | None = 1.02  # of our step over that of torch's checkpoint
    device: str = "cuda"
    task: str = "rows"
    is_image: bool = False
    limit: int = 0  # bytes
    max_turns: int = 7

    @property
    def dtype(self):
        return torch.float32 if self.device == "cpu" else torch.bfloat16

    @property
    def input_bytes(self):
        return self.layers * self.batch * self.time * self.width * self.dtype.itemsize

    @property
    def title(self):
        if self.task == "overhead":
            return f"memory: overhead of a block, {self.layers} tiny blocks on one thread of the CPU"
        if self.is_image:
            return f"memory: {self.layers} convolutions of {self.width} channels, {self.batch} x {self.time} pixels"
        size = {"longest": f"within {self.limit // MIB} MiB", "resident": f"{self.batch} x {self.time} tokens, CPU"}
        return f"memory: {self.layers} blocks of width {self.width}, {size.get(self.task, f'{self.time} tokens')}"

    def shrunk(self):
        """Returns a small case for a quick run on the CPU."""
        shortest = 32 if self.task == "rows" and not self.is_image else 128
        small = {"width": max(self.width // 16, 64), "time": max(self.time // 64, shortest), "limit": self.limit >> 8}
        less = {"layers": 3, "batch": min(self.batch, 2), "max_turns": 2, "device": "cpu", "goal": None}
        return dataclasses.replace(self, **small, **less)


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
        project = functools.partial(nn.Conv2d, kernel_size=1) if case.is_image else nn.Linear
        convolution = lambda width: nn.Sequential(nn.Conv2d(width, width, 3), nn.ZeroPad2d(1))  # noqa: E731
        make_block = convolution if case.is_image else Transformer
        self.stem, self.head = project(16, case.width), project(case.width, 16)
        self.blocks = nn.ModuleList(make_block(case.width) for _ in range(case.layers))
        self.call, self.around = (lambda block, x: block(x)), contextlib.nullcontext

    def forward(self, x):
        x = self.stem(x)
        with self.around():
            for block in self.blocks:
                x = self.call(block, x)
        return self.head(x).float().square().mean()


def build(case):
    """Returns a model, built on its device, because the widest takes half a minute on the CPU."""
    torch.manual_seed(0)
    with torch.device(case.device):
        return Model(case).to(case.dtype)


def make_input(case, length):
    shape = (case.batch, 16, 32, length // 32) if case.is_image else (case.batch, length, 16)
    return torch.randn(shape, device=case.device, dtype=case.dtype)


def hold_gradients(model):
    """Allocates the gradients, so that every row finds them there."""
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)


class Memory:
    """The memory that a device has allocated; on the CPU, the resident set of the process."""

    def __init__(self, device):
        self.is_cuda = device == "cuda"

    def synchronize(self):
        if self.is_cuda:
            torch.cuda.synchronize()

    def allocated(self):
        return torch.cuda.memory_allocated() if self.is_cuda else resident("VmRSS")

    def peak(self):
        return torch.cuda.max_memory_allocated() if self.is_cuda else resident("VmHWM")

    def reset_peak(self):
        if self.is_cuda:
            torch.cuda.reset_peak_memory_stats()

    def num_segments(self):
        """Returns how often torch has asked the device for memory so far."""
        return torch.cuda.memory_stats().get("segment.all.allocated", 0) if self.is_cuda else 0

    def locked(self):
        """Returns the bytes of host memory that torch has page-locked, in use or cached."""
        return torch.cuda.host_memory_stats().get("allocated_bytes.current", 0) if self.is_cuda else 0

    def set_limit(self, num_bytes):
        """Limits what the process may take of the device."""
        if self.is_cuda:
            torch.cuda.set_per_process_memory_fraction(num_bytes / torch.cuda.get_device_properties(0).total_memory)

    def release(self):
        """Gives unused memory back; raises an error where the device is lost."""
        self.synchronize()  # no copy is under way when its buffers go
        gc.collect()
        if self.is_cuda:
            torch.cuda.empty_cache()


def resident(key):
    return int(Path("/proc/self/status").read_text().split(f"{key}:")[1].split()[0]) * 1024


class Row:
    """A model that works as one row says; its parameters are those of the other rows, too."""

    def __init__(self, model, name, memory):
        self.model = copy.deepcopy(model, {id(parameter): parameter for parameter in model.parameters()})
        self.memory, self.report, self.locked_before = memory, None, memory.locked()
        if name in (OURS, NEVER):
            self.report = unsloth.apply(self.model, offload="auto" if name == OURS else "never")
        elif name != NONE:
            self.model.call = functools.partial(checkpoint, use_reentrant=False)
        if name == ON_CPU:
            self.model.around = functools.partial(save_on_cpu, pin_memory=memory.is_cuda)

    def step(self, x):
        """Makes a step; returns its seconds."""
        self.memory.synchronize()
        began = time.perf_counter()
        self.model(x).backward()
        self.memory.synchronize()
        seconds = time.perf_counter() - began
        self.model.zero_grad(set_to_none=False)
        if self.report is not None:
            self.report.check()
        return seconds

    def step_again(self, x):
        """Returns the seconds of a step in which torch does not ask the device for memory, if the second is one."""
        num_segments = self.memory.num_segments()
        seconds = self.step(x)
        return seconds if self.memory.num_segments() == num_segments else self.step(x)

    def measure(self, x):
        """Makes a step; returns the bytes that it keeps and takes, and what was moved."""
        gc.collect()
        self.memory.synchronize()
        self.memory.reset_peak()
        before = self.memory.allocated()
        loss = self.model(x)
        self.memory.synchronize()
        kept = self.memory.allocated() - before
        loss.backward()
        self.memory.synchronize()
        peak = self.memory.peak() - before
        self.model.zero_grad(set_to_none=False)
        # Our buffers are page-locked by us, or by torch if that failed: never both.
        registered = sum(engine.pool.peak_bytes for engine in self.report.engines) if self.report else 0
        host = max(registered, self.memory.locked() - self.locked_before)
        moved = sum(timer.is_worth_it and timer.moved_bytes > 0 for timer in self._timers())
        return {"kept": kept, "peak": peak, "host": host, "moved": moved}

    def _timers(self):
        blocks = self.report.blocks.values() if self.report is not None else ()
        return [block.timer for block in blocks if block.timer is not None]


def send(**answer):
    """Sends an answer to the parent; the name of a row alone means that it is still running."""
    print(json.dumps(answer), flush=True)


def attempt(name, memory, function, *args):
    """Calls a function and returns its result; if it fails, reports the row as failed and returns None."""
    try:
        return function(*args)
    except Exception as error:
        text = "out of memory" if is_out_of_memory(error) else f"{type(error).__name__}: {error}".splitlines()[0]
        if text != "out of memory":
            traceback.print_exc()
    # The error was deleted, and with its frames the tensors that they held.
    send(row=name, error=text)
    memory.release()


def measure_rows(case, names):
    """Measures the memory of each row, then times all of them."""
    memory, model = Memory(case.device), build(case)
    hold_gradients(model)
    x = make_input(case, case.time)
    memory.release()
    rows = {name: attempt(name, memory, start_row, model, name, memory, x) for name in names}
    time_rows(case, {name: row for name, row in rows.items() if row is not None}, memory, x)


def start_row(model, name, memory, x):
    send(row=name)
    row = Row(model, name, memory)
    for _ in range(WARM_STEPS.get(name, 1)):
        row.step(x)
        send(row=name)
    send(row=name, memory=row.measure(x))
    return row


def time_rows(case, rows, memory, x):
    """Times steps in turns; if a turn of all rows is slow, later turns are only of ours and checkpoint."""
    seconds_so_far, is_slow = 0, False
    for turn in range(case.max_turns):
        names = [name for name in rows if not is_slow or name in (BASE, OURS)]
        shift = turn % max(len(names), 1)
        began = time.perf_counter()
        for name in names[shift:] + names[:shift]:
            send(row=name)
            seconds = attempt(name, memory, rows[name].step_again, x)
            if seconds is None:
                del rows[name]
            else:
                send(row=name, turn=turn, seconds=seconds)
        turn_s = time.perf_counter() - began
        is_slow |= turn_s > SLOW_TURN_S
        seconds_so_far += turn_s
        if seconds_so_far > TIMED_S and turn + 1 >= MIN_TURNS:
            break


def measure_longest(case, names):
    """Searches for the longest sequence that fits, row by row."""
    memory, model = Memory(case.device), build(case)
    hold_gradients(model)
    memory.release()
    for name in names:
        attempt(name, memory, search, case, model, name, memory)
        memory.release()


def search(case, model, name, memory):
    send(row=name)
    memory.set_limit(case.limit)
    row = Row(model, name, memory)
    peaks, failed = {}, []
    for _ in range(MAX_PROBES):
        length = next_length(peaks, failed, case.limit, case.time)
        if length is None:
            break
        peak = probe(case, row, length)
        if peak is None or peak > case.limit:
            failed.append(length)
        else:
            peaks[length] = peak
        send(row=name, fits=max(peaks, default=0), is_last=False)
    send(row=name, fits=max(peaks, default=0), is_last=True)


def next_length(peaks, failed, limit, first):
    """Returns the length to try next, or None once the longest is known to a 32nd.

    The peak is nearly linear in the length, so it is predicted from two lengths that fit. A prediction goes no further
    than eight times the longest; where it proves too long, the steps back double.
    """
    if not failed and len(peaks) < 2:
        return first * (1 + len(peaks))
    longest = max(peaks, default=0)
    step = max(longest // 32 // GRAIN, 1) * GRAIN
    too_long = min(failed, default=math.inf)
    if too_long - longest <= step:
        return None
    # Two similar lengths do not show the growth.
    shorter = max((length for length in peaks if length < 0.9 * longest), default=0)
    growth = (peaks[longest] - peaks[shorter]) / (longest - shorter) if shorter else 0
    predicted = longest + (limit - peaks[longest]) / growth if growth > 0 else math.inf
    length = max(int(min(predicted, 8 * longest)) // GRAIN * GRAIN, longest + step)
    if length < too_long:
        return length
    return max(too_long - step * 2 ** (len(failed) - 1), (longest + too_long) // 2 // GRAIN * GRAIN)


def probe(case, row, length):
    """Returns the peak of a step in bytes, or None if it runs out of memory."""
    peak = None
    row.memory.reset_peak()
    try:
        row.step(make_input(case, length))
        # On the CPU an invented peak tests the search.
        peak = row.memory.peak() if row.memory.is_cuda else length * MIB // 32
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    row.memory.release()
    return peak


def measure_resident(case, names, turn):
    """Measures the peak of a first step, or, in a turn, the time of a second step."""
    (name,) = names
    row, x = Row(build(case), name, Memory(case.device)), make_input(case, case.time)
    before = resident("VmRSS")
    row.step(x)
    if turn is None:
        send(row=name, resident=resident("VmHWM") - before)
    else:
        send(row=name, turn=turn, seconds=row.step(x))


def measure_overhead(case, names):
    """Times calls of tiny blocks on one thread; `case.layers` blocks, `case.max_turns` turns."""
    torch.set_num_threads(1)
    bare, ours = (nn.ModuleList(nn.Bilinear(8, 8, 8) for _ in range(case.layers)) for _ in range(2))
    report, again = unsloth.apply(ours, include=["*"]), functools.partial(checkpoint, use_reentrant=False)
    contenders = {NONE: bare, BASE: [functools.partial(again, block) for block in bare], OURS: ours}
    other, x = torch.randn(4, 8), torch.randn(4, 8, requires_grad=True)
    for style in names:
        times, order = {name: [] for name in contenders}, list(contenders)
        for _ in range(case.max_turns + 10):
            for name in order:
                began, y = time.perf_counter(), x
                for call in contenders[name]:
                    y = call(y, other) if style == "positional" else call(input1=y, input2=other)
                y.sum().backward()
                times[name].append((time.perf_counter() - began) / case.layers * 1e6)
            order = order[1:] + order[:1]
            report.check()
        send(row=style, overhead={name: values[10:] for name, values in times.items()})


TASKS = {"rows": measure_rows, "longest": measure_longest, "resident": measure_resident, "overhead": measure_overhead}


def main():
    # Disabled, because cuDNN builds a plan for each new length; all rows then use the same kernel.
    torch.backends.cuda.enable_cudnn_sdp(False)
    # Done before the measurement: the imports of the first checkpoint take 70 MiB and a second.
    checkpoint(torch.sin, torch.ones(1, requires_grad=True), use_reentrant=False).backward()
    if line := sys.stdin.readline():
        request = json.loads(line)
        case = Case(**request.pop("case"))
        TASKS[case.task](case, **request)


if __name__ == "__main__":
    main()
