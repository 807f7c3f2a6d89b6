"""One layout of K codebooks over an interleaved sequence, and the tensors that follow from it.

Owns what makes a layout valid, and sequences built of codes and reverted. Which layout it is, its maker decides:
`runner.utils.pattern`. Must not import a config or a model.

Terms: timestep t (0 ... T - 1), codebook k (0 ... K - 1), coordinate (t, k), sequence step s (0 ... S - 1).
Step 0 is the start: it holds no coordinate, and counts in S.

Source: the idea and the terms are those of MusicGen, https://arxiv.org/abs/2306.05284, and of
audiocraft.modules.codebooks_patterns, https://github.com/facebookresearch/audiocraft (MIT); no code is taken.
"""

from __future__ import annotations

import math
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
