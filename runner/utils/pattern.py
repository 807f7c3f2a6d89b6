"""Codebook patterns: which interleaved layout K streams of audio codes get, whatever their length.

Owns the layouts, each a pure function of (num_codebooks, settings, timesteps), without a loop over timesteps. What a
layout does with tensors is `Pattern`'s, in `runner.utils.layout`. Must not import a config or a model.

`Delayed(4, delays=[0, 1, 2, 3])(timesteps)` is a `Pattern`. In the docstrings, T is the number of timesteps, K that
of codebooks, S that of sequence steps, the start step included. A layout of no timesteps is the start alone: S = 1.

Source: the layouts and their names are those of MusicGen, https://arxiv.org/abs/2306.05284, and of
audiocraft.modules.codebooks_patterns, https://github.com/facebookresearch/audiocraft (MIT); no code is taken.
"""

import itertools
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from runner.utils.layout import Pattern as Pattern
from runner.utils.utils import checked_int

_LARGEST = 2**31 - 1  # of a setting: what is computed of two stays inside of int64

Steps = NDArray[np.int64]


@dataclass(frozen=True, init=False)
class PatternProvider(ABC):
    """Makes a `Pattern` of `num_codebooks` for any length; immutable, equal where its settings are.

    Raises:
        TypeError, ValueError: a setting is not what it should be.
    """

    num_codebooks: int

    def __init__(self, num_codebooks: int) -> None:
        self._keep("num_codebooks", checked_int(f"{self._where}: num_codebooks", num_codebooks, 1, _LARGEST))

    def _keep(self, name: str, value: int | tuple[int, ...]) -> None:
        object.__setattr__(self, name, value)

    @property
    def _where(self) -> str:
        return type(self).__name__

    def __call__(self, timesteps: int) -> Pattern:
        """Returns the layout of a length, `timesteps` >= 0."""
        num_steps = self.num_steps(timesteps)
        return Pattern(self._steps(np.arange(timesteps)), num_steps)

    def num_steps(self, timesteps: int) -> int:
        """Returns S in closed form, without making a layout."""
        timesteps = checked_int(f"{self._where}: timesteps", timesteps, 0, _LARGEST)
        return 1 + (self._num_held(timesteps) if timesteps else 0)

    @abstractmethod
    def _num_held(self, timesteps: int) -> int:
        """Returns S - 1 of one timestep or more."""

    @abstractmethod
    def _steps(self, times: Steps) -> Steps:
        """Returns the step [K, T] of each of the timesteps 0 ... T - 1, which are `times` [T]."""


@dataclass(frozen=True, init=False)
class Parallel(PatternProvider):
    """All codebooks of a timestep in one step. S = 1 + T."""

    def _num_held(self, timesteps: int) -> int:
        return timesteps

    def _steps(self, times: Steps) -> Steps:
        return np.broadcast_to(1 + times, (self.num_codebooks, len(times)))


@dataclass(frozen=True, init=False)
class Delayed(PatternProvider):
    """Codebook k comes `delays[k]` steps late, by default k. S = 1 + T + max(delays)."""

    delays: tuple[int, ...]

    def __init__(self, num_codebooks: int, delays: Iterable[int] | None = None) -> None:
        super().__init__(num_codebooks)
        delays = range(self.num_codebooks) if delays is None else delays
        self._keep("delays", _checked(f"{self._where}: delays", delays, self.num_codebooks))

    def _num_held(self, timesteps: int) -> int:
        return timesteps + max(self.delays)

    def _steps(self, times: Steps) -> Steps:
        return 1 + times + _column(self.delays)


@dataclass(frozen=True, init=False)
class Unrolled(PatternProvider):
    """Codebook k at inner step `flattening[k]` of its timestep, by default k. S = 1 + T x (max(flattening) + 1).

    Those of one inner step stand in parallel. An inner step that no codebook has is an empty step in its place, where
    audiocraft puts it first in its timestep: without delays [1, 2] is what audiocraft makes of [0, 2]. `delays[k]`, by
    default 0, and alike for the codebooks of one inner step, puts an inner step off by timesteps: those that meet at
    a timestep then come in the order of the timesteps they hold, and those of one timestep by their inner step. A
    step that has nothing to hold yet, or any longer, is left out, so that delays do not lengthen the sequence.

    Warns:
        UserWarning: an inner step without a codebook makes another layout than audiocraft's.
    """

    flattening: tuple[int, ...]
    delays: tuple[int, ...]

    def __init__(
        self, num_codebooks: int, flattening: Iterable[int] | None = None, delays: Iterable[int] | None = None
    ) -> None:
        super().__init__(num_codebooks)
        count = self.num_codebooks
        inner = _checked(f"{self._where}: flattening", range(count) if flattening is None else flattening, count)
        late = _checked(f"{self._where}: delays", [0] * count if delays is None else delays, count)
        for k, step in enumerate(inner):
            first = inner.index(step)
            if late[k] != late[first]:
                expected = f"expected {late[first]}, as delays[{first}] of the same inner step {step}"
                raise ValueError(f"{self._where}: delays[{k}]: {expected}, found {late[k]}.")
        self._keep("flattening", inner)
        self._keep("delays", late)
        self._warn_of_gaps()

    def _warn_of_gaps(self) -> None:
        """Tells of inner steps without a codebook that audiocraft puts elsewhere: first in their timestep."""
        used = sorted(set(self.flattening))
        num_empty = max(used) + 1 - len(used)
        same = [num_empty + used.index(step) for step in self.flattening]
        if not num_empty or (same == list(self.flattening) and not any(self.delays)):
            return
        remedy = "leave out no inner step" if any(self.delays) else f"set flattening={same}"
        warnings.warn(
            f"{self._where}: flattening={list(self.flattening)}: an inner step without a codebook is an empty step in "
            f"its place; audiocraft puts it first in its timestep; for audiocraft's layout {remedy}.",
            stacklevel=3,
        )

    def _num_held(self, timesteps: int) -> int:
        return timesteps * (max(self.flattening) + 1)

    def _steps(self, times: Steps) -> Steps:
        late = [0] * (max(self.flattening) + 1)
        for inner, delay in zip(self.flattening, self.delays, strict=True):
            late[inner] = delay
        # Inner steps of one delay stand together, as a group: in what place of it each, and how many there are.
        sizes = dict.fromkeys(sorted(late), 0)
        places = []
        for delay in late:
            places.append(sizes[delay])
            sizes[delay] += 1
        # Groups that are a whole length apart, or more, never meet: how far apart is all the same.
        gaps = (min(after - before, len(times)) for before, after in itertools.pairwise(sizes))
        slots = list(itertools.accumulate(gaps, initial=0))
        # The steps of each group at each slot, the latest group first: it holds the earliest timestep.
        counts = np.zeros((slots[-1] + len(times), len(sizes)), np.int64)
        windows = {d: (slice(s, s + len(times)), -1 - g) for g, (s, d) in enumerate(zip(slots, sizes, strict=True))}
        for delay, size in sizes.items():
            counts[windows[delay]] = size
        starts = (counts.cumsum() - counts.ravel()).reshape(counts.shape)
        return np.stack([starts[windows[late[inner]]] + (1 + places[inner]) for inner in self.flattening])


@dataclass(frozen=True, init=False)
class CoarseFirst(PatternProvider):
    """Codebook 0 over all timesteps, then the others, codebook k + 1 `delays[k]` steps late, by default 0.

    S = 1 + 2 T + max(delays), and 1 + T where there is no other codebook. What follows the first codebook stands
    elsewhere at another length: generate what was trained.
    """

    delays: tuple[int, ...]

    def __init__(self, num_codebooks: int, delays: Iterable[int] | None = None) -> None:
        super().__init__(num_codebooks)
        delays = [0] * (self.num_codebooks - 1) if delays is None else delays
        self._keep("delays", _checked(f"{self._where}: delays", delays, self.num_codebooks - 1))

    def _num_held(self, timesteps: int) -> int:
        return 2 * timesteps + max(self.delays) if self.delays else timesteps

    def _steps(self, times: Steps) -> Steps:
        return np.concatenate([1 + times[None], 1 + len(times) + times + _column(self.delays)])


@dataclass(frozen=True, init=False)
class VALLE(PatternProvider):
    """Codebook 0 over all timesteps, then all others in parallel. S = 1 + 2 T, and 1 + T where there is no other.

    Source: https://arxiv.org/abs/2301.02111; it is `CoarseFirst` without delays.
    """

    def _num_held(self, timesteps: int) -> int:
        return CoarseFirst(self.num_codebooks)._num_held(timesteps)

    def _steps(self, times: Steps) -> Steps:
        return CoarseFirst(self.num_codebooks)._steps(times)


@dataclass(frozen=True, init=False)
class MusicLM(PatternProvider):
    """Groups of `group_by` codebooks, one after the other; in a group by timestep, then codebook. S = 1 + K x T.

    The last group is smaller where `group_by` does not divide K.

    Source: https://arxiv.org/abs/2301.11325, where the groups are the coarse and the fine acoustic tokens.
    """

    group_by: int

    def __init__(self, num_codebooks: int, group_by: int = 2) -> None:
        super().__init__(num_codebooks)
        self._keep("group_by", checked_int(f"{self._where}: group_by", group_by, 1, _LARGEST))

    def _num_held(self, timesteps: int) -> int:
        return self.num_codebooks * timesteps

    def _steps(self, times: Steps) -> Steps:
        codebooks = np.arange(self.num_codebooks)[:, None]
        firsts = codebooks - codebooks % self.group_by
        sizes = np.minimum(self.group_by, self.num_codebooks - firsts)
        return 1 + len(times) * firsts + times * sizes + codebooks - firsts


def _column(values: tuple[int, ...]) -> Steps:
    return np.array(values, np.int64)[:, None]


def _checked(name: str, values: Any, count: int) -> tuple[int, ...]:
    """Returns `count` integers >= 0."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected {count} integers, found {values!r}.")
    found = tuple(values)
    if len(found) != count:
        raise ValueError(f"{name}: expected {count} integers, found {len(found)}: {list(found)}.")
    return tuple(checked_int(f"{name}[{i}]", value, 0, _LARGEST) for i, value in enumerate(found))
