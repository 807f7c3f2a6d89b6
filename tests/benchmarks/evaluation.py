"""Microseconds per batch of an evaluation, beside a bare loop: `python tests/benchmarks/evaluation.py`.

20,000 batches in memory of the MLP of `loop.py`, and of a larger one, with the mean loss over the samples: medians of
processor time, in turns. Then short evaluations of a `TensorDataset` with 2 loader workers, in wall time to the first
batch.
"""

import statistics
import time

import torch
from loop import BATCH
from torch import nn
from torch.utils.data import TensorDataset

from runner.engines import Engine, Engines
from runner.utils.sampler.batches import EvaluationData

NUM_BATCHES, ROUNDS = 20_000, 5
NUM_PASSES, NUM_SAMPLES, NUM_WORKERS = 10, 1024, 2


class MLP(nn.Module):
    """Returns the mean squared error, as the model of `loop.py` does."""

    def __init__(self, width):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(16, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU(), nn.Linear(width, 1)
        )

    def forward(self, x, y):
        return ((self.layers(x) - y) ** 2).mean()


def make_batches(count=64):
    generator = torch.Generator().manual_seed(0)
    shapes = (BATCH, 16), (BATCH, 1)
    return [tuple(torch.randn(shape, generator=generator) for shape in shapes) for _ in range(count)]


def evaluate_bare(model, batches):
    model.eval()
    total, count = 0.0, 0
    with torch.no_grad():
        for x, y in batches:
            total += model(x, y).item() * len(x)
            count += len(x)
    model.train()
    return total / count


def evaluate_ours(engines, batches):
    return engines.evaluate(batches)["loss"]


def compare(contenders):
    """Returns the median seconds by name, in turns; all must return equal numbers."""
    seconds = {name: [] for name in contenders}
    for turn in range(ROUNDS + 1):
        results = set()
        for name, run in contenders.items():
            began = time.thread_time()
            results.add(run())
            if turn:
                seconds[name].append(time.thread_time() - began)
        assert len(results) == 1, results
    return {name: statistics.median(values) for name, values in seconds.items()}


def compare_loops(model, num_batches):
    engines = Engines(model=Engine(model, torch.optim.SGD(model.parameters(), lr=1e-3)))
    few = make_batches()
    batches = [few[number % len(few)] for number in range(num_batches)]
    numbered = [(number, batch, BATCH) for number, batch in enumerate(batches)]
    loops = {"bare loop": lambda: evaluate_bare(model, batches), "runner": lambda: evaluate_ours(engines, numbered)}
    medians = compare(loops)
    for name, taken_s in medians.items():
        ratio = taken_s / medians["bare loop"]
        print(f"{name:40} {taken_s / num_batches * 1e6:7.1f} us per batch, ratio {ratio:.2f}")


def time_first_batches(is_persistent):
    """Returns the median milliseconds from the start of an evaluation to its first batch."""
    dataset = TensorDataset(torch.randn(NUM_SAMPLES, 16), torch.randn(NUM_SAMPLES, 1))
    data = EvaluationData(dataset, BATCH, NUM_WORKERS, None, None, is_persistent=is_persistent)
    taken_ms = []
    for _ in range(NUM_PASSES):
        began = time.perf_counter()
        batches = iter(data)
        next(batches)
        taken_ms.append((time.perf_counter() - began) * 1000)
        for _ in batches:
            pass
    data.close()
    return statistics.median(taken_ms)


def main():
    print(f"the MLP of loop.py, {NUM_BATCHES:,} batches")
    compare_loops(MLP(64), NUM_BATCHES)
    print(f"an MLP of width 512, {NUM_BATCHES:,} batches")
    compare_loops(MLP(512), NUM_BATCHES)
    print(f"to the first batch of an evaluation with {NUM_WORKERS} workers")
    for name, is_persistent in {"new workers": False, "kept workers": None}.items():
        print(f"{name:40} {time_first_batches(is_persistent):7.1f} ms")


if __name__ == "__main__":
    main()
