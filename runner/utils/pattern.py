"""Codebook patterns: which interleaved layout K streams of audio codes get, whatever their length.

Owns the layouts, each a pure function of (num_codebooks, settings, timesteps), without a loop over timesteps. What a
layout does with tensors is `Pattern`'s, in `runner.utils.pattern`. Must not import a config or a model.

`Delayed(4, delays=[0, 1, 2, 3])(timesteps)` is a `Pattern`. In the docstrings, T is the number of timesteps, K that
of codebooks, S that of sequence steps, the start step included. A layout of no timesteps is the start alone: S = 1.

Source: the layouts and their names are those of MusicGen, https://arxiv.org/abs/2306.05284, and of
audiocraft.modules.codebooks_patterns, https://github.com/facebookresearch/audiocraft (MIT); no code is taken.
"""

from __future__ import annotations

import itertools
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, final

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from runner.utils.utils import checked_int


@final
@dataclass(frozen=True, eq=False, repr=False)
class Pattern:
    """An immutable layout of K codebooks of T timesteps over S sequence steps.

    `steps` [K, T] says in which step each coordinate stands, so each stands in exactly one; it is copied, and kept
    read-only. Steps may stay empty. What the methods return is new, on the device of what they got. Masks are shared
    by the batch.

    Training: the model gets `sequence[..., :-1]`, its logits are those of `sequence[..., 1:]`, and the loss compares
    `revert_logits(logits)` with the codes. Generation from the first n timesteps fills one step after another:

        sequence, missing = pattern.build_prefix(codes, special)
        for s in range(pattern.first_step(n), pattern.num_steps):
            drawn = ...  # [B, K], from sequence[..., :s]
            sequence[..., s] = torch.where(missing[:, s], drawn, sequence[..., s])
        codes, mask = pattern.revert(sequence, special)

    Raises:
        TypeError: `steps` holds no integers, or has not two axes.
        ValueError: a coordinate stands outside of steps 1 ... S - 1, or not after the timestep before it.
    """

    steps: NDArray[np.int64]
    num_steps: int
    _indexes: dict[torch.device, Tensor] = field(init=False, default_factory=dict)

    def __post_init__(self) -> None:
        num_steps = checked_int("Pattern: num_steps", self.num_steps, 1)
        object.__setattr__(self, "num_steps", num_steps)
        object.__setattr__(self, "steps", _checked_steps(self.steps, num_steps))

    @classmethod
    def from_layout(cls, layout: Sequence[Iterable[tuple[int, int]]], num_codebooks: int, timesteps: int) -> Pattern:
        """Returns the pattern whose step s holds the coordinates (t, k) in `layout[s]`, in any order.

        Raises:
            TypeError: a coordinate is no pair of integers.
            ValueError: one is missing, stands twice, is out of range, in step 0, or descends in its codebook.
        """
        num_codebooks = checked_int("Pattern.from_layout: num_codebooks", num_codebooks, 1)
        timesteps = checked_int("Pattern.from_layout: timesteps", timesteps, 0)
        placed = [(s, coordinate) for s, held in enumerate(layout) for coordinate in held]
        times, codebooks = _checked_coordinates([each for _, each in placed], num_codebooks, timesteps)
        at = np.array([s for s, _ in placed], np.int64)
        keys = codebooks * timesteps + times
        counts = np.bincount(keys, minlength=num_codebooks * timesteps)
        if (counts != 1).any():
            key = int((counts != 1).argmax())
            found = f"in steps {at[keys == key].tolist()}" if counts[key] else "missing"
            where = _name(key % timesteps, key // timesteps)
            raise ValueError(f"Pattern.from_layout: {where}: expected in one step, found {found}.")
        steps = np.empty(num_codebooks * timesteps, np.int64)
        steps[keys] = at
        return cls(steps.reshape(num_codebooks, timesteps), len(layout))

    @property
    def num_codebooks(self) -> int:
        """K."""
        return self.steps.shape[0]

    @property
    def timesteps(self) -> int:
        """T."""
        return self.steps.shape[1]

    @property
    def layout(self) -> list[list[tuple[int, int]]]:
        """The coordinates (t, k) of each step, codebook by codebook: to look at, and what `from_layout` takes."""
        held: list[list[tuple[int, int]]] = [[] for _ in range(self.num_steps)]
        for k, row in enumerate(self.steps.tolist()):
            for t, s in enumerate(row):
                held[s].append((t, k))
        return held

    def steps_of(self, t: int) -> list[int]:
        """Returns the sequence steps that hold timestep t, each once, ascending."""
        found: list[int] = np.unique(
            self.steps[:, checked_int("Pattern.steps_of: t", t, 0, self.timesteps - 1)]
        ).tolist()
        return found

    def first_step(self, t: int) -> int:
        """Returns the first step that holds timestep t, where generation from the first t goes on; S for t = T."""
        t = checked_int("Pattern.first_step: t", t, 0, self.timesteps)
        return self.num_steps if t == self.timesteps else int(self.steps[:, t].min())

    def build(self, codes: Tensor, special: int) -> tuple[Tensor, Tensor]:
        """Returns the sequence [B, K, S] of codes [B, K, T], and the mask [K, S] of where they stand.

        All the rest is `special`.

        Raises:
            ValueError: another shape, or a `special` that the codes' dtype can't hold.
        """
        self._check("codes", codes, self.timesteps, self.timesteps)
        sequence, _ = self._lay(codes, special)
        is_held = torch.zeros(sequence.shape[1:], dtype=torch.bool, device=codes.device)
        return sequence, is_held.scatter_(1, self._index(codes.device), True)

    def build_prefix(self, codes: Tensor, special: int, unknown: int = -1) -> tuple[Tensor, Tensor]:
        """Returns the sequence [B, K, S] of the first n timesteps [B, K, n], and the mask [K, S] of what is missing.

        A coordinate of a later timestep is `unknown`; all the rest is as `build` would have it of the final codes:
        everything before `first_step(n)`, and what is known already of the steps after it.

        Raises:
            ValueError: another shape, more than T timesteps, or a token that the codes' dtype can't hold.
        """
        self._check("codes", codes, 0, self.timesteps)
        sequence, later = self._lay(codes, special)
        is_missing = torch.zeros(sequence.shape[1:], dtype=torch.bool, device=codes.device)
        is_missing.scatter_(1, later, True)
        _check_token("unknown", unknown, codes.dtype)
        return sequence.masked_fill_(is_missing, unknown), is_missing

    def revert(self, sequence: Tensor, special: int) -> tuple[Tensor, Tensor]:
        """Returns the codes [B, K, T] of a sequence [B, K, S], and the mask [K, T] of where they were found.

        Of a sequence that ends early, what stands beyond its end is `special`, and False in the mask.

        Raises:
            ValueError: another shape, or a `special` that is needed and that the dtype can't hold.
        """
        self._check("sequence", sequence, 0, self.num_steps)
        return self._collect(sequence, 0, special)

    def revert_logits(self, logits: Tensor, special: float = math.nan) -> tuple[Tensor, Tensor]:
        """Returns the logits [B, card, K, T] of those of a sequence [B, card, K, S], and the mask [K, T] of them.

        The logits at s are those of the tokens at step s + 1. So S - 1 steps hold them all; those of an S-th step
        predict nothing. Of logits that end early, what is beyond their end is `special`, and False in the mask.

        Raises:
            ValueError: another shape, or a `special` that is needed and that the dtype can't hold.
        """
        self._check("logits", logits, 0, self.num_steps)
        return self._collect(logits, 1, special)

    def _lay(self, codes: Tensor, special: int) -> tuple[Tensor, Tensor]:
        """Returns the sequence of codes [B, K, n], and the steps [K, T - n] of the later ones."""
        _check_token("special", special, codes.dtype)
        known, later = self._index(codes.device).tensor_split([codes.shape[2]], dim=1)
        sequence = codes.new_full((*codes.shape[:2], self.num_steps), special)
        return sequence.scatter_(2, known.expand_as(codes), codes), later

    def _collect(self, laid: Tensor, shift: int, special: float) -> tuple[Tensor, Tensor]:
        """Returns [..., K, T] of [..., K, any], with step s at s - shift, and the mask [K, T] of what is there."""
        index = self._index(laid.device) - shift
        num_laid = laid.shape[-1]
        is_found = index < num_laid
        if num_laid + shift < self.num_steps:
            _check_token("special", special, laid.dtype)
            laid = torch.cat([laid, laid.new_full((*laid.shape[:-1], 1), special)], dim=-1)
            index = index.clamp_(max=num_laid)
        return laid.gather(-1, index.expand(*laid.shape[:-1], self.timesteps)), is_found

    def _index(self, device: torch.device) -> Tensor:
        """Returns `steps` [K, T] on a device: kept, so neither to be changed nor handed out."""
        if device not in self._indexes:
            # One made in inference mode could not be saved for backward later.
            with torch.inference_mode(False):
                made = torch.from_numpy(self.steps.copy()).to(device)
            if type(made) is not Tensor:  # of a tracer's own: not to be found by others
                return made
            self._indexes[device] = made
        return self._indexes[device]

    def _check(self, name: str, tensor: Tensor, fewest: int, most: int) -> None:
        """Checks [B, K, length], or [B, card, K, length], with a length from `fewest` to `most`."""
        axes = ("B", "card")[: 2 if name == "logits" else 1]
        shape = tensor.shape
        is_right = len(shape) == len(axes) + 2 and shape[-2] == self.num_codebooks and fewest <= shape[-1] <= most
        if not is_right:
            length = most if fewest == most else f"{fewest} to {most}"
            expected = ", ".join([*axes, str(self.num_codebooks), str(length)])
            raise ValueError(f"Pattern: {name}: expected [{expected}], found {list(shape)}, with {self!r}.")

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Pattern):
            return NotImplemented
        return self.num_steps == other.num_steps and np.array_equal(self.steps, other.steps)

    def __hash__(self) -> int:
        return hash((self.num_steps, self.steps.shape, self.steps.tobytes()))

    def __repr__(self) -> str:
        return f"Pattern(num_codebooks={self.num_codebooks}, timesteps={self.timesteps}, num_steps={self.num_steps})"

    def __reduce__(self) -> tuple[type[Pattern], tuple[NDArray[np.int64], int]]:
        return Pattern, (self.steps, self.num_steps)


def _name(t: Any, k: Any) -> str:
    return f"coordinate (t={t}, k={k})"


def _checked_steps(steps: Any, num_steps: int) -> NDArray[np.int64]:
    """Returns a read-only copy of the steps [K, T] of a valid layout."""
    found = np.array(steps)
    if found.ndim != 2 or not len(found) or (found.size and found.dtype.kind not in "iu"):
        kind = f"{list(found.shape)} of {found.dtype}"
        raise TypeError(f"Pattern: steps: expected integers [num_codebooks, timesteps], found {kind}.")
    checked = found.astype(np.int64, copy=False)
    is_outside = (checked < 1) | (checked >= num_steps)
    if is_outside.any():
        k, t = np.argwhere(is_outside)[0]
        expected = f"expected a step from 1 to {num_steps - 1}, as step 0 is the start"
        raise ValueError(f"Pattern: {_name(t, k)}: {expected}, found step {found[k, t]}.")
    is_descending = checked[:, 1:] <= checked[:, :-1]
    if is_descending.any():
        k, t = np.argwhere(is_descending)[0]
        expected = f"expected after step {checked[k, t]} of timestep {t}, as the timesteps of a codebook ascend"
        raise ValueError(f"Pattern: {_name(t + 1, k)}: {expected}, found step {checked[k, t + 1]}.")
    return np.frombuffer(checked.tobytes(), np.int64).reshape(checked.shape)  # which can't be made writable again


def _checked_coordinates(
    coordinates: list[Any], num_codebooks: int, timesteps: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the timesteps [count] and the codebooks [count] of coordinates that are all in range."""
    for each in coordinates:
        if len(each) != 2:
            raise TypeError(f"Pattern.from_layout: expected coordinates (t, k), found {each!r}.")
    found = np.array(coordinates or np.empty((0, 2), np.int64))
    if found.dtype.kind not in "iu":
        raise TypeError(f"Pattern.from_layout: expected coordinates of two integers, found {found.dtype}.")
    pairs = found.astype(np.int64, copy=False)
    is_outside = (pairs < 0) | (pairs >= (timesteps, num_codebooks))
    if is_outside.any():
        t, k = pairs[is_outside.any(axis=1).argmax()]
        expected = f"expected t below {timesteps} and k below {num_codebooks}, none of them negative"
        raise ValueError(f"Pattern.from_layout: {_name(t, k)}: out of range, {expected}.")
    return pairs[:, 0], pairs[:, 1]


def _check_token(name: str, token: float, dtype: torch.dtype) -> None:
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return
    limits = torch.iinfo(dtype)
    if not limits.min <= token <= limits.max or token != int(token):
        raise ValueError(f"Pattern: {name}: expected an integer that {dtype} holds, found {token}.")


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
