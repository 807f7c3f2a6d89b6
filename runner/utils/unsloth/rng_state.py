"""Gets and sets the state of random generators.

They are a user's generators, and the global ones of Python and NumPy.

The official functions convert a global state to 625 integers (15 us in Python, 45 us in NumPy). If CPython and NumPy
store it in the expected layout, it is read as 2500 bytes from memory, and only if the first or last 20 bytes have
changed: each draw moves the position in the key or makes another key. It is only written by the official functions.
"""

import ctypes
import functools
import pickle
import random
import struct
import types
from collections.abc import Iterable
from typing import Any

import numpy as np
import torch

Generator = torch.Generator | random.Random | np.random.Generator | np.random.RandomState | np.random.BitGenerator
# The global generators. NumPy's may be given another bit generator, which the function returns.
_PYTHON: random.Random = random.random.__self__  # type: ignore[attr-defined]
_NUMPY: np.random.RandomState = np.random.random.__self__  # type: ignore[attr-defined]
_bit_generator = np.random.mtrand.get_bit_generator
_METHODS = (types.MethodType, types.BuiltinMethodType)
_WORDS = struct.Struct("=625I")  # the state of a Mersenne twister: a key of 624 words, and a position in it
_STAMP_SIZE = 20  # bytes: the position, and four words of the key
_NORMAL = struct.Struct("@id")  # has_gauss and gauss: normal numbers are drawn in pairs, and the second is kept


def find_generators(values: Iterable[Any]) -> list[Generator]:
    """Returns the generators in nests of lists, tuples and dicts.

    A bound method counts as its object. Global generators are left out.
    """
    seen = {id(torch.default_generator), id(_PYTHON), id(_NUMPY)}
    generators: list[Generator] = []
    pending = list(values)
    while pending:
        value = pending.pop()
        if isinstance(value, _METHODS):
            value = value.__self__
        if id(value) in seen:
            continue
        if isinstance(value, Generator):
            seen.add(id(value))
            generators.append(value)
        elif isinstance(value, (list, tuple, dict)):
            seen.add(id(value))
            pending += value.values() if isinstance(value, dict) else value
    return generators


def get_state(generator: Generator) -> Any:
    """Returns a generator's state."""
    if isinstance(generator, random.Random):
        return generator.getstate()
    if isinstance(generator, np.random.Generator):
        return generator.bit_generator.state
    if isinstance(generator, np.random.BitGenerator):
        return generator.state
    if isinstance(generator, np.random.RandomState):
        return generator.get_state(legacy=False)
    return generator.get_state()


def set_state(generator: Generator, state: Any) -> None:
    """Sets a generator's state."""
    if isinstance(generator, random.Random):
        generator.setstate(state)
    elif isinstance(generator, np.random.Generator):
        generator.bit_generator.state = state
    elif isinstance(generator, np.random.BitGenerator):
        generator.state = state
    else:
        generator.set_state(state)


def get_global_states() -> tuple[Any, Any]:
    """Returns the states of the global generators of Python's `random` and of NumPy.

    The result compares unequal after any draw; until then, the same objects are returned.
    """
    return _python_state().get(), _numpy_state(_bit_generator()).get()


def set_global_states(states: tuple[Any, Any]) -> None:
    """Sets the states of both global generators."""
    _python_state().set(states[0])
    _numpy_state(_bit_generator()).set(states[1])


class _PythonState:
    def __init__(self) -> None:
        self._generator: Any = _PYTHON
        self._raw: Any = None  # the position, then the key
        self._latest: tuple[Any, Any] = (None, None)  # stamp and state of the last read
        base = type(self._generator).__base__
        if base is not None and base.__basicsize__ >= object.__basicsize__ + _WORDS.size:
            address = id(self._generator) + object.__basicsize__
            raw = _bytes_at(address, _WORDS.size)
            self._raw = raw if _rotated(raw.raw) == self._generator.getstate()[1] else None
            self._stamp = _bytes_at(address, _STAMP_SIZE)

    def get(self) -> Any:
        if self._raw is None:
            return self._generator.getstate()
        stamp = self._stamp.raw, self._generator.gauss_next
        if stamp != self._latest[0]:
            self._latest = stamp, (self._raw.raw, stamp[1])
        return self._latest[1]

    def set(self, state: Any) -> None:
        if self._raw is not None:
            state = (self._generator.VERSION, _rotated(state[0]), state[1])
        self._generator.setstate(state)


def _bytes_at(address: int, size: int) -> Any:
    return (ctypes.c_char * size).from_address(address)


def _rotated(raw: bytes) -> tuple[int, ...]:
    position, *key = _WORDS.unpack(raw)
    return (*key, position)


class _NumpyState:
    """Reads and writes the state of NumPy's global generator.

    Args:
        bits: its bit generator; the reference keeps the memory that is read alive.
    """

    def __init__(self, bits: Any) -> None:
        self._generator, self._bits = _NUMPY, bits
        self._raw: Any = None  # the key, then the position
        self._latest: tuple[Any, Any] = (None, None)  # stamp and state of the last read
        offset = _find_normal_offset()
        if offset is not None and isinstance(bits, np.random.MT19937):
            address = bits.ctypes.state_address
            raw = _bytes_at(address, _WORDS.size)
            official = dict(self._generator.get_state(legacy=False))["state"]
            if _WORDS.unpack(raw.raw) == (*official["key"].tolist(), official["pos"]):
                self._raw = raw
                self._stamp = _bytes_at(address + _WORDS.size - _STAMP_SIZE, _STAMP_SIZE)
                self._normal = _bytes_at(id(self._generator) + offset, _NORMAL.size)

    def get(self) -> Any:
        if self._raw is None:
            return pickle.dumps(self._generator.get_state(legacy=False))  # bytes can be compared, arrays can't
        stamp = self._stamp.raw, self._normal.raw
        if stamp != self._latest[0]:
            self._latest = stamp, (self._raw.raw, stamp[1])
        return self._latest[1]

    def set(self, state: Any) -> None:
        if self._raw is None:
            self._generator.set_state(pickle.loads(state))
            return
        words = np.frombuffer(state[0], dtype=np.uint32)
        has_normal, normal = _NORMAL.unpack(state[1])
        self._generator.set_state(("MT19937", words[:-1], int(words[-1]), has_normal, normal))


def _find_normal_offset() -> int | None:
    """Returns the offset of the kept normal number in a RandomState.

    None if it is not found for certain. NumPy has no cheap function that reads that number, so its offset is searched
    in a generator of known content.
    """
    probe, number = np.random.RandomState(0), 0.12345678901234567
    state: Any = probe.get_state()
    probe.set_state((*state[:3], 1, number))
    content = ctypes.string_at(id(probe), np.random.RandomState.__basicsize__)
    offset = content.find(struct.pack("@d", number)) - struct.calcsize("@d")
    return offset if offset > 0 and _NORMAL.unpack_from(content, offset) == (1, number) else None


_python_state = functools.cache(_PythonState)
_numpy_state = functools.lru_cache(1)(_NumpyState)  # a user may set another bit generator
