"""A keyed permutation of range(length), computed block by block, without a list of all positions."""

from typing import Any

import numpy as np
from numpy.typing import NDArray

from runner.utils.utils import derive_seed

_NUM_ROUNDS = 8
_LARGEST_SORTED = 1024


def shuffled(length: int, seed: int, epoch: int, start: int, count: int) -> list[int]:
    """Returns positions start ... start + count - 1 of a permutation of range(length).

    The permutation is a Feistel network over the next power of two. An image outside range(length) passes through it
    again until it is inside, which keeps the map one-to-one.

    Args:
        length: 0 to 2**62.
        seed, epoch: select the permutation.

    Source: cycle-walking, Black and Rogaway 2002, https://web.cs.ucdavis.edu/~rogaway/papers/subset.pdf
    """
    key = derive_seed(seed, epoch)
    if length <= _LARGEST_SORTED:
        # A network of a few bits prefers some orders; sorting by a hash does not.
        return random_bits(0, length, key).argsort(kind="stable")[start : start + count].tolist()
    num_bits = (length - 1).bit_length()
    keys = [derive_seed(key, i) for i in range(_NUM_ROUNDS)]
    images = _feistel(np.arange(start, start + count, dtype=np.uint64), num_bits, keys)
    outside = np.flatnonzero(images >= length)
    while outside.size:
        walked = _feistel(images[outside], num_bits, keys)
        images[outside] = walked
        outside = outside[walked >= length]
    return images.tolist()


def random_bits(start: int, count: int, key: int) -> NDArray[Any]:
    """Returns 64 random bits for each of start ... start + count - 1, uint64 [count]."""
    return _hash(_hash(np.arange(start, start + count, dtype=np.uint64), key), derive_seed(key))


def _feistel(values: NDArray[Any], num_bits: int, keys: list[int]) -> NDArray[Any]:
    right_bits = num_bits // 2
    left_bits = num_bits - right_bits
    left, right = values >> right_bits, values & ((1 << right_bits) - 1)
    for left_key, right_key in zip(keys[::2], keys[1::2], strict=True):
        left ^= _hash(right, left_key) >> (64 - left_bits)
        right ^= _hash(left, right_key) >> (64 - right_bits)
    return (left << right_bits) | right


def _hash(values: NDArray[Any], key: int) -> NDArray[Any]:
    hashed = values + key
    hashed *= 0xBF58476D1CE4E5B9
    hashed ^= hashed >> 32
    hashed *= 0x94D049BB133111EB
    hashed ^= hashed >> 31
    return hashed
