"""Samplers: which index, or which batch of indices, comes next. Imports no torch."""

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
