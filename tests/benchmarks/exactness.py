"""The cost of exactness in microseconds per step, part by part: `python tests/benchmarks/exactness.py`.

The model is that of loop.py, whose step in a bare loop takes about 150 us.
"""

import random
import timeit

import numpy as np
import torch
from loop import BATCH, make_model
from torch import nn

from runner.engines.gradients import BufferSnapshot, FiniteCheck
from runner.utils.distributed import seed_all
from runner.utils.modules.generators import ObjectGenerators
from runner.utils.sampler import RandomSampler
from runner.utils.sampler.batches import Batches
from runner.utils.sampler.samples import SampleFetcher
from runner.utils.utils import derive_seed

NUMBER, REPEATS = 20_000, 7


class HoldsGenerators:
    def __init__(self):
        self.generators = [np.random.default_rng(0), torch.Generator(), random.Random(0)]

    def __getitem__(self, index):
        return index


def measure(function):
    function()
    return min(timeit.repeat(function, number=NUMBER, repeat=REPEATS)) / NUMBER * 1e6


def main():
    torch.set_num_threads(1)
    model, _ = make_model()
    model(torch.randn(BATCH, 16), torch.randn(BATCH, 1)).backward()
    parameters = list(model.parameters())
    cpu = torch.device("cpu")
    check, none = FiniteCheck(parameters), BufferSnapshot(model)
    normed = BufferSnapshot(nn.Sequential(*(nn.BatchNorm1d(64) for _ in range(10))))
    sampler = RandomSampler(10**9)
    data = torch.utils.data.TensorDataset(torch.zeros(1000, 16))
    batches = Batches(data, RandomSampler(1000), BATCH, seed_samples=False)
    next(batches)
    samples = SampleFetcher(data, 1)
    holding, unseeded = SampleFetcher(HoldsGenerators(), 1), SampleFetcher(HoldsGenerators(), None)
    rows = {
        "a step's randomness from (seed, step, micro-step, rank)": lambda: seed_all(derive_seed(0, 7, 0, 0), cpu),
        "the position before the step, to return to": batches.position,
        "the sampler's state after each batch": sampler.state_dict,
        "gradients checked for NaN and infinity": check,
        "buffers saved, a model without any": none.keep,
        "buffers saved, ten BatchNorm layers": normed.keep,
        "a sample by its index": lambda: data[5],
        "the same, its randomness from (seed, ordinal)": lambda: samples[12345, [5]],
        "a sample of a dataset with three generators": lambda: unseeded[12345, [5]],
        "the same, these reseeded too": lambda: holding[12345, [5]],
        "search for generators, once per DataLoader worker": lambda: ObjectGenerators(data=holding),
        "for comparison: torch.manual_seed": lambda: torch.manual_seed(12345),
    }
    print(f"torch {torch.__version__}, one thread, best of {REPEATS} times {NUMBER:,}")
    for name, function in rows.items():
        print(f"{name:58}{measure(function):8.2f} us")


if __name__ == "__main__":
    main()
