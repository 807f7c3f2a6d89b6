"""Milliseconds per step on a GPU with batches copied by the step or beside it: `python tests/benchmarks/copies.py`.

Batches of 64 MB lie in pinned memory, so that neither reading nor pinning them takes time. Both variants run in turns.
"""

import argparse
import statistics
import time

import torch
from figures import Budget, BudgetSpentError, Figures

from runner.utils.distributed import move
from runner.utils.sampler import OrderedSampler
from runner.utils.sampler.batches import Batches
from runner.utils.sampler.device_copies import make_copier

ROWS, WIDTH, STEPS, ROUNDS = 4096, 4096, 40, 5
TABLE = "speed: a step with a batch of 64 MB in pinned memory"


def take_one(samples):
    return samples[0]


def measure(batches, weight, device):
    """Returns the milliseconds per step of a loop that waits for the device only at its end."""
    for is_timed in (False, True):
        torch.cuda.synchronize(device)
        began = time.perf_counter()
        for _ in range(STEPS if is_timed else 5):
            x = move(next(batches), device)
            for _ in range(4):
                x = torch.tanh(x @ weight)
        torch.cuda.synchronize(device)
    return (time.perf_counter() - began) / STEPS * 1e3


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--json", help="file for the figures")
    parser.add_argument("--budget", type=float, default=60.0, help="seconds; what is left then is skipped")
    asked = parser.parse_args()
    budget, figures = Budget(asked.budget), Figures(asked.json)
    if not torch.cuda.is_available():
        figures.skip(TABLE, "needs a CUDA GPU")
        return
    device = torch.device("cuda", 0)
    weight = torch.randn(WIDTH, WIDTH, device=device) / WIDTH**0.5
    pinned = [torch.randn(ROWS, WIDTH).pin_memory() for _ in range(4)]
    variants = {}
    for name, copier in (("by the step", None), ("beside it", make_copier(device))):
        variants[name] = Batches(pinned, OrderedSampler(len(pinned)), 1, collate=take_one, seed_samples=False)
        variants[name].copy_with(copier)
    found = {name: [] for name in variants}
    try:
        for _ in range(ROUNDS):
            budget.check()
            for name, batches in variants.items():
                found[name].append(measure(batches, weight, device))
    except BudgetSpentError as reason:
        figures.skip(TABLE, str(reason))
    if not found["beside it"]:
        return
    for name, values in found.items():
        figures.add(TABLE, f"copied {name}", "step", statistics.median(values), "ms")
    pairs = zip(found["beside it"], found["by the step"], strict=True)
    ratio = statistics.median(beside / before for beside, before in pairs)
    figures.add(TABLE, "copied beside it", "step time", ratio, "x", at_most=1.0)


if __name__ == "__main__":
    main()
