"""Codebook patterns: interleaved layouts of K streams of audio codes, for any length.

`Delayed(4, delays=[0, 1, 2, 3])(timesteps)` is a `Pattern`, which lays codes out as a sequence and reverts it. Layouts
are pure functions of (num_codebooks, settings, timesteps), computed without a loop over timesteps.

In the docstrings, B is the batch size, T the number of timesteps, K of codebooks, S of sequence steps including the
start step. A layout of no timesteps has the start step only: S = 1. A *coordinate* (t, k) is codebook k at timestep t.

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

    Methods return new tensors on the device of their argument. All samples of a batch share one mask.

    Training: the model gets `sequence[..., :-1]` and returns the logits of `sequence[..., 1:]`; the loss compares
    `revert_logits(logits)` with the codes. Generation after the first n timesteps fills one step after another:

        sequence, missing = pattern.build_prefix(codes, special)
        for s in range(pattern.first_step(n), pattern.num_steps):
            drawn = ...  # [B, K], from sequence[..., :s]
            sequence[..., s] = torch.where(missing[:, s], drawn, sequence[..., s])
        codes, mask = pattern.revert(sequence, special)

    Args:
        steps: the sequence step of each coordinate, int64 [K, T]; copied and kept read-only. A step may be empty.
        num_steps: S.
    Raises:
        TypeError: `steps` has no integers, or not two axes.
        ValueError: a step is not from 1 to S - 1, or not after that of the timestep before.
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
            ValueError: a coordinate is missing, occurs twice, is out of range, in step 0, or descends in its codebook.
        """
        num_codebooks = checked_int("Pattern.from_layout: num_codebooks", num_codebooks, 1)
        timesteps = checked_int("Pattern.from_layout: timesteps", timesteps, 0)
        placed = [(s, coordinate) for s, coordinates in enumerate(layout) for coordinate in coordinates]
        at = np.array([s for s, _ in placed], np.int64)
        times, codebooks = _checked_coordinates([coordinate for _, coordinate in placed], num_codebooks, timesteps)
        keys = codebooks * timesteps + times
        counts = np.bincount(keys, minlength=num_codebooks * timesteps)
        if (counts != 1).any():
            key = int((counts != 1).argmax())
            found = f"in steps {at[keys == key].tolist()}" if counts[key] else "missing"
            where = _format_coordinate(key % timesteps, key // timesteps)
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
        """The coordinates (t, k) of each step, codebook by codebook: for inspection, and accepted by `from_layout`."""
        layout: list[list[tuple[int, int]]] = [[] for _ in range(self.num_steps)]
        for k, row in enumerate(self.steps.tolist()):
            for t, s in enumerate(row):
                layout[s].append((t, k))
        return layout

    def steps_of(self, t: int) -> list[int]:
        """Returns the sequence steps that contain timestep t, each once, ascending."""
        t = checked_int("Pattern.steps_of: t", t, 0, self.timesteps - 1)
        return np.unique(self.steps[:, t]).tolist()

    def first_step(self, t: int) -> int:
        """Returns the first step that contains timestep t, where generation after t timesteps begins; S for t = T."""
        t = checked_int("Pattern.first_step: t", t, 0, self.timesteps)
        return self.num_steps if t == self.timesteps else int(self.steps[:, t].min())

    def build(self, codes: Tensor, special: int) -> tuple[Tensor, Tensor]:
        """Returns the sequence [B, K, S] of codes [B, K, T], and the mask [K, S] of the entries that are codes.

        All other entries are `special`.

        Raises:
            ValueError: the shape does not fit, or the codes' dtype can't represent `special`.
        """
        self._check("codes", codes, self.timesteps, self.timesteps)
        sequence, _ = self._scatter(codes, special)
        is_code = torch.zeros(sequence.shape[1:], dtype=torch.bool, device=codes.device)
        return sequence, is_code.scatter_(1, self._index(codes.device), True)

    def build_prefix(self, codes: Tensor, special: int, unknown: int = -1) -> tuple[Tensor, Tensor]:
        """Returns the sequence [B, K, S] of the first n timesteps [B, K, n], and the mask [K, S] of missing codes.

        Codes of later timesteps are `unknown`. All other entries are as `build` would return them for the final codes.

        Raises:
            ValueError: the shape does not fit, or the codes' dtype can't represent `special` or `unknown`.
        """
        self._check("codes", codes, 0, self.timesteps)
        sequence, later = self._scatter(codes, special)
        is_missing = torch.zeros(sequence.shape[1:], dtype=torch.bool, device=codes.device)
        is_missing.scatter_(1, later, True)
        _check_token("unknown", unknown, codes.dtype)
        return sequence.masked_fill_(is_missing, unknown), is_missing

    def revert(self, sequence: Tensor, special: int) -> tuple[Tensor, Tensor]:
        """Returns the codes [B, K, T] of a sequence [B, K, S], and the mask [K, T] of the codes it contains.

        The sequence may be shorter than S. Codes beyond its end are `special`, and False in the mask.

        Raises:
            ValueError: the shape does not fit, or `special` is needed and the dtype can't represent it.
        """
        self._check("sequence", sequence, 0, self.num_steps)
        return self._gather(sequence, 0, special)

    def revert_logits(self, logits: Tensor, special: float = math.nan) -> tuple[Tensor, Tensor]:
        """Returns the logits of the codes [B, card, K, T], given those of a sequence [B, card, K, S - 1].

        The logits at s predict the tokens of step s + 1; an S-th step is ignored. The logits may be shorter as well:
        those beyond the end are `special`, and False in the mask [K, T], which is returned too.

        Raises:
            ValueError: the shape does not fit, or `special` is needed and the dtype can't represent it.
        """
        self._check("logits", logits, 0, self.num_steps)
        return self._gather(logits, 1, special)

    def _scatter(self, codes: Tensor, special: int) -> tuple[Tensor, Tensor]:
        """Returns the sequence [B, K, S] of codes [B, K, n], and the steps [K, T - n] of the later codes."""
        _check_token("special", special, codes.dtype)
        known, later = self._index(codes.device).tensor_split([codes.shape[2]], dim=1)
        sequence = codes.new_full((*codes.shape[:2], self.num_steps), special)
        return sequence.scatter_(2, known.expand_as(codes), codes), later

    def _gather(self, sequence: Tensor, shift: int, special: float) -> tuple[Tensor, Tensor]:
        """Returns [..., K, T] of [..., K, length] with step s at s - shift, and the mask [K, T] of present entries."""
        index = self._index(sequence.device) - shift
        length = sequence.shape[-1]
        is_present = index < length
        if length + shift < self.num_steps:
            _check_token("special", special, sequence.dtype)
            # One more entry, to which all missing ones point.
            sequence = torch.cat([sequence, sequence.new_full((*sequence.shape[:-1], 1), special)], dim=-1)
            index = index.clamp_(max=length)
        return sequence.gather(-1, index.expand(*sequence.shape[:-1], self.timesteps)), is_present

    def _index(self, device: torch.device) -> Tensor:
        """Returns `steps` [K, T] on a device; cached, so callers must not change or return it."""
        if device not in self._indexes:
            # A tensor made in inference mode could not be saved for backward later.
            with torch.inference_mode(False):
                index = torch.from_numpy(self.steps.copy()).to(device)
            if type(index) is not Tensor:  # a tracer's own class, which must not outlive the trace
                return index
            self._indexes[device] = index
        return self._indexes[device]

    def _check(self, name: str, tensor: Tensor, shortest: int, longest: int) -> None:
        """Checks the shape [B, K, length], or for logits [B, card, K, length]."""
        axes = ("B", "card")[: 2 if name == "logits" else 1]
        shape = tensor.shape
        is_right = len(shape) == len(axes) + 2 and shape[-2] == self.num_codebooks and shortest <= shape[-1] <= longest
        if not is_right:
            length = longest if shortest == longest else f"{shortest} to {longest}"
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


def _format_coordinate(t: Any, k: Any) -> str:
    return f"coordinate (t={t}, k={k})"


def _checked_steps(steps: Any, num_steps: int) -> NDArray[np.int64]:
    """Returns a read-only copy of steps [K, T], after checking that they are a valid layout."""
    array = np.array(steps)
    if array.ndim != 2 or not len(array) or (array.size and array.dtype.kind not in "iu"):
        found = f"{list(array.shape)} of {array.dtype}"
        raise TypeError(f"Pattern: steps: expected integers [num_codebooks, timesteps], found {found}.")
    checked = array.astype(np.int64, copy=False)
    is_outside = (checked < 1) | (checked >= num_steps)
    if is_outside.any():
        k, t = np.argwhere(is_outside)[0]
        expected = f"expected a step from 1 to {num_steps - 1}, as step 0 is the start"
        raise ValueError(f"Pattern: {_format_coordinate(t, k)}: {expected}, found step {array[k, t]}.")
    is_descending = checked[:, 1:] <= checked[:, :-1]
    if is_descending.any():
        k, t = np.argwhere(is_descending)[0]
        expected = f"expected after step {checked[k, t]} of timestep {t}, as the timesteps of a codebook ascend"
        raise ValueError(f"Pattern: {_format_coordinate(t + 1, k)}: {expected}, found step {checked[k, t + 1]}.")
    return np.frombuffer(checked.tobytes(), np.int64).reshape(checked.shape)  # its buffer can't be made writable again


def _checked_coordinates(
    coordinates: list[Any], num_codebooks: int, timesteps: int
) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Returns the timesteps [count] and codebooks [count] of coordinates, after checking that all are in range."""
    for coordinate in coordinates:
        if len(coordinate) != 2:
            raise TypeError(f"Pattern.from_layout: expected coordinates (t, k), found {coordinate!r}.")
    array = np.array(coordinates or np.empty((0, 2), np.int64))
    if array.dtype.kind not in "iu":
        raise TypeError(f"Pattern.from_layout: expected coordinates of two integers, found {array.dtype}.")
    pairs = array.astype(np.int64, copy=False)
    is_outside = (pairs < 0) | (pairs >= (timesteps, num_codebooks))
    if is_outside.any():
        t, k = pairs[is_outside.any(axis=1).argmax()]
        expected = f"expected t below {timesteps} and k below {num_codebooks}, none of them negative"
        raise ValueError(f"Pattern.from_layout: {_format_coordinate(t, k)}: out of range, {expected}.")
    return pairs[:, 0], pairs[:, 1]


def _check_token(name: str, token: float, dtype: torch.dtype) -> None:
    if dtype.is_floating_point or dtype.is_complex or dtype == torch.bool:
        return
    limits = torch.iinfo(dtype)
    if not limits.min <= token <= limits.max or token != int(token):
        raise ValueError(f"Pattern: {name}: expected an integer that {dtype} holds, found {token}.")


_MAX_SETTING = 2**31 - 1  # of a setting: products of two stay within int64

Steps = NDArray[np.int64]


@dataclass(frozen=True, init=False)
class PatternProvider(ABC):
    """Base class of the patterns: a call with the number of timesteps returns a `Pattern`.

    Instances are immutable, and equal if their settings are.

    Raises:
        TypeError, ValueError: a setting has the wrong type or is out of range.
    """

    num_codebooks: int

    def __init__(self, num_codebooks: int) -> None:
        self._set_field("num_codebooks", checked_int(f"{self._where}: num_codebooks", num_codebooks, 1, _MAX_SETTING))

    def _set_field(self, name: str, value: int | tuple[int, ...]) -> None:
        object.__setattr__(self, name, value)

    @property
    def _where(self) -> str:
        return type(self).__name__

    def __call__(self, timesteps: int) -> Pattern:
        """Returns the layout of `timesteps` >= 0."""
        num_steps = self.num_steps(timesteps)
        return Pattern(self._steps(np.arange(timesteps)), num_steps)

    def num_steps(self, timesteps: int) -> int:
        """Returns S, without computing a layout."""
        timesteps = checked_int(f"{self._where}: timesteps", timesteps, 0, _MAX_SETTING)
        return 1 + (self._num_steps_after_start(timesteps) if timesteps else 0)

    @abstractmethod
    def _num_steps_after_start(self, timesteps: int) -> int:
        """Returns S - 1, for one timestep or more."""

    @abstractmethod
    def _steps(self, times: Steps) -> Steps:
        """Returns the sequence steps [K, T] of the timesteps 0 ... T - 1, given as `times` [T]."""


@dataclass(frozen=True, init=False)
class Parallel(PatternProvider):
    """All codebooks of a timestep in one step. S = 1 + T."""

    def _num_steps_after_start(self, timesteps: int) -> int:
        return timesteps

    def _steps(self, times: Steps) -> Steps:
        return np.broadcast_to(1 + times, (self.num_codebooks, len(times)))


@dataclass(frozen=True, init=False)
class Delayed(PatternProvider):
    """Codebook k delayed by `delays[k]` steps, by default k. S = 1 + T + max(delays)."""

    delays: tuple[int, ...]

    def __init__(self, num_codebooks: int, delays: Iterable[int] | None = None) -> None:
        super().__init__(num_codebooks)
        delays = range(self.num_codebooks) if delays is None else delays
        self._set_field("delays", _checked_integers(f"{self._where}: delays", delays, self.num_codebooks))

    def _num_steps_after_start(self, timesteps: int) -> int:
        return timesteps + max(self.delays)

    def _steps(self, times: Steps) -> Steps:
        return 1 + times + np.array(self.delays, np.int64)[:, None]


@dataclass(frozen=True, init=False)
class Unrolled(PatternProvider):
    """Each timestep unrolled into inner steps. S = 1 + T x (max(flattening) + 1).

    Delayed inner steps that meet at a timestep are ordered by the timestep of their codes, then by inner step. Those
    without codes, at the start or end of a delayed sequence, are left out: delays do not lengthen the sequence.

    Args:
        flattening: the inner step of each codebook, by default k for codebook k. Codebooks of one inner step are
            parallel. An inner step without a codebook stays where it is as an empty step. audiocraft puts it first in
            its timestep instead: without delays, [1, 2] here equals audiocraft's [0, 2].
        delays: the delay of each codebook in timesteps, by default 0; equal for the codebooks of one inner step.
    Warns:
        UserWarning: an inner step without a codebook makes the layout differ from audiocraft's.
    """

    flattening: tuple[int, ...]
    delays: tuple[int, ...]

    def __init__(
        self, num_codebooks: int, flattening: Iterable[int] | None = None, delays: Iterable[int] | None = None
    ) -> None:
        super().__init__(num_codebooks)
        count = self.num_codebooks
        inner = _checked_integers(
            f"{self._where}: flattening", range(count) if flattening is None else flattening, count
        )
        delays = _checked_integers(f"{self._where}: delays", [0] * count if delays is None else delays, count)
        for k, step in enumerate(inner):
            first = inner.index(step)
            if delays[k] != delays[first]:
                expected = f"expected {delays[first]}, as delays[{first}] of the same inner step {step}"
                raise ValueError(f"{self._where}: delays[{k}]: {expected}, found {delays[k]}.")
        self._set_field("flattening", inner)
        self._set_field("delays", delays)
        self._warn_of_gaps()

    def _warn_of_gaps(self) -> None:
        """Warns of inner steps without a codebook if audiocraft, which puts them first in their timestep, differs."""
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

    def _num_steps_after_start(self, timesteps: int) -> int:
        return timesteps * (max(self.flattening) + 1)

    def _steps(self, times: Steps) -> Steps:
        inner_delays = [0] * (max(self.flattening) + 1)
        for inner, delay in zip(self.flattening, self.delays, strict=True):
            inner_delays[inner] = delay
        # Inner steps of equal delay form a group: its size, and the rank of each inner step in its group.
        sizes = dict.fromkeys(sorted(inner_delays), 0)
        ranks = []
        for delay in inner_delays:
            ranks.append(sizes[delay])
            sizes[delay] += 1
        # Groups that are T timesteps or more apart never meet, so their distance is capped at T.
        gaps = (min(after - before, len(times)) for before, after in itertools.pairwise(sizes))
        offsets = list(itertools.accumulate(gaps, initial=0))
        # The steps of each group at each slot; the most delayed group comes first, with the earliest timestep.
        counts = np.zeros((offsets[-1] + len(times), len(sizes)), np.int64)
        windows = {}  # by delay: the slots and the column of a group
        for group, (offset, delay) in enumerate(zip(offsets, sizes, strict=True)):
            windows[delay] = slice(offset, offset + len(times)), -1 - group
            counts[windows[delay]] = sizes[delay]
        starts = (counts.cumsum() - counts.ravel()).reshape(counts.shape)
        return np.stack([starts[windows[inner_delays[inner]]] + (1 + ranks[inner]) for inner in self.flattening])


@dataclass(frozen=True, init=False)
class CoarseFirst(PatternProvider):
    """Codebook 0 over all timesteps, then the others, codebook k + 1 delayed by `delays[k]` steps, by default 0.

    S = 1 + 2 T + max(delays); 1 + T for a single codebook. The steps of the other codebooks depend on T, so generate at
    the length of training.
    """

    delays: tuple[int, ...]

    def __init__(self, num_codebooks: int, delays: Iterable[int] | None = None) -> None:
        super().__init__(num_codebooks)
        delays = [0] * (self.num_codebooks - 1) if delays is None else delays
        self._set_field("delays", _checked_integers(f"{self._where}: delays", delays, self.num_codebooks - 1))

    def _num_steps_after_start(self, timesteps: int) -> int:
        return 2 * timesteps + max(self.delays) if self.delays else timesteps

    def _steps(self, times: Steps) -> Steps:
        delays = np.array(self.delays, np.int64)[:, None]
        return np.concatenate([1 + times[None], 1 + len(times) + times + delays])


@dataclass(frozen=True, init=False)
class VALLE(PatternProvider):
    """Codebook 0 over all timesteps, then all others in parallel. S = 1 + 2 T; 1 + T for a single codebook.

    Source: https://arxiv.org/abs/2301.02111; it is `CoarseFirst` without delays.
    """

    def _num_steps_after_start(self, timesteps: int) -> int:
        return CoarseFirst(self.num_codebooks)._num_steps_after_start(timesteps)

    def _steps(self, times: Steps) -> Steps:
        return CoarseFirst(self.num_codebooks)._steps(times)


@dataclass(frozen=True, init=False)
class MusicLM(PatternProvider):
    """Groups of `group_by` codebooks, one after the other; within a group by timestep, then codebook. S = 1 + K x T.

    The last group is smaller if `group_by` does not divide K.

    Source: https://arxiv.org/abs/2301.11325, with groups of coarse and fine acoustic tokens.
    """

    group_by: int

    def __init__(self, num_codebooks: int, group_by: int = 2) -> None:
        super().__init__(num_codebooks)
        self._set_field("group_by", checked_int(f"{self._where}: group_by", group_by, 1, _MAX_SETTING))

    def _num_steps_after_start(self, timesteps: int) -> int:
        return self.num_codebooks * timesteps

    def _steps(self, times: Steps) -> Steps:
        codebooks = np.arange(self.num_codebooks)[:, None]
        firsts = codebooks - codebooks % self.group_by
        sizes = np.minimum(self.group_by, self.num_codebooks - firsts)
        return 1 + len(times) * firsts + times * sizes + codebooks - firsts


def _checked_integers(name: str, values: Any, count: int) -> tuple[int, ...]:
    """Returns the values as `count` integers from 0 to 2**31 - 1, after checking them."""
    if isinstance(values, str | bytes) or not isinstance(values, Iterable):
        raise TypeError(f"{name}: expected {count} integers, found {values!r}.")
    items = tuple(values)
    if len(items) != count:
        raise ValueError(f"{name}: expected {count} integers, found {len(items)}: {list(items)}.")
    return tuple(checked_int(f"{name}[{i}]", item, 0, _MAX_SETTING) for i, item in enumerate(items))
