"""Start, memory, state and speed of the samplers, each in its own process: `python tests/benchmarks/samplers.py`."""

import subprocess
import sys

PRELUDE = """
import json, resource, time
import numpy, torch
from runner.utils.sampler import BatchedOrderedSampler, PoolSampler, RandomSampler
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
warm = next(iter(RandomSampler(10)))
before, began = peak(), time.perf_counter()
"""
FIRST = """
sampler = {sampler}(10**9, seed=1)
{position}
index = next(iter(sampler))
print(f"{{(time.perf_counter() - began) * 1e3:.1f}} ms, {{peak() - before:.1f}} MB, "
      f"state {{len(json.dumps(sampler.state_dict()))}} bytes")
"""
RESUME = 'sampler.load_state_dict(sampler.state_dict() | {"epoch": 2, "position": 777_777_777})'
EVERY = """
sampler = {sampler}
began = time.perf_counter()
for index in sampler: pass
print(f"{{(time.perf_counter() - began) / len(sampler) * 1e9:.0f}} ns an index")
"""
BATCHED = """
lengths = numpy.random.default_rng(0).integers(1, 1000, 10**7)
began = time.perf_counter()
sampler = BatchedOrderedSampler(lengths, max_cost=20_000, shuffle=True)
index = next(iter(sampler))
print(f"{{time.perf_counter() - began:.2f}} s, {{len(sampler):,}} batches")
"""

MEASURES = {
    "RandomSampler(1e9), first index": FIRST.format(sampler="RandomSampler", position=""),
    "PoolSampler(1e9), first index": FIRST.format(sampler="PoolSampler", position=""),
    "RandomSampler(1e9), resumed at 777,777,777": FIRST.format(sampler="RandomSampler", position=RESUME),
    "PoolSampler(1e9), resumed at 777,777,777": FIRST.format(sampler="PoolSampler", position=RESUME),
    "torch's RandomSampler(1e7), every index": EVERY.format(sampler="torch.utils.data.RandomSampler(range(10**7))"),
    "RandomSampler(1e7), every index": EVERY.format(sampler="RandomSampler(10**7, seed=1)"),
    "PoolSampler(1e7), every index": EVERY.format(sampler="PoolSampler(10**7, seed=1)"),
    "BatchedOrderedSampler of 1e7 lengths, first batch": BATCHED.format(),
}


def main():
    for name, script in MEASURES.items():
        done = subprocess.run([sys.executable, "-c", PRELUDE + script], capture_output=True, text=True)
        print(f"{name:52}{done.stdout.strip() or done.stderr.strip().splitlines()[-1]}")


if __name__ == "__main__":
    main()
