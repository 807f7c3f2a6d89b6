"""Samplers: the order of indices, or of batches of indices. Imports no torch."""

from runner.utils.sampler.samplers import (
    BatchedOrderedSampler,
    OrderedSampler,
    PoolSampler,
    RandomSampler,
    Setting,
)

__all__ = [
    "BatchedOrderedSampler",
    "OrderedSampler",
    "PoolSampler",
    "RandomSampler",
    "Setting",
]
