"""Codebook patterns: valid for any settings and length, exactly reversible, and equal to a plain loop."""

import copy
import itertools
import json
import pickle
import re
import warnings
from collections.abc import Iterator
from dataclasses import FrozenInstanceError
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hydra.utils import instantiate
from hypothesis import given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from torch import Tensor

from runner.utils.pattern import (
    VALLE,
    CoarseFirst,
    Delayed,
    MusicLM,
    Parallel,
    Pattern,
    PatternProvider,
    Unrolled,
)

CONFS = sorted((Path(__file__).parents[2] / "conf" / "pattern").glob("*.yaml"))
SPECIAL = 10**9
pytestmark = pytest.mark.filterwarnings("ignore:Unrolled. flattening")

KINDS = [Parallel, Delayed, Unrolled, CoarseFirst, VALLE, MusicLM]
any_kind = pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
any_length = given(
    num_codebooks=st.integers(1, 9), timesteps=st.integers(0, 50), batch=st.integers(0, 2), data=st.data()
)
Layout = list[list[tuple[int, int]]]


def with_gap(*arguments: Any) -> Unrolled:
    """Makes a provider with an inner step without a codebook, and ignores its warning."""
    with pytest.warns(UserWarning, match="without a codebook"):
        return Unrolled(*arguments)


def drawn(kind: type[PatternProvider], num_codebooks: int, data: st.DataObject) -> Any:
    """Draws valid settings of a pattern class."""

    def some(highest: int, count: int) -> list[int] | None:
        return data.draw(st.none() | st.lists(st.integers(0, highest), min_size=count, max_size=count))

    if kind is Delayed:
        return Delayed(num_codebooks, some(60, num_codebooks))
    if kind is CoarseFirst:
        return CoarseFirst(num_codebooks, some(60, num_codebooks - 1))
    if kind is MusicLM:
        return MusicLM(num_codebooks, data.draw(st.integers(1, 11)))
    if kind is Unrolled:
        flattening = some(num_codebooks + 2, num_codebooks)
        late = some(60, num_codebooks + 3)
        inner = range(num_codebooks) if flattening is None else flattening
        return Unrolled(num_codebooks, flattening, late and [late[step] for step in inner])
    return kind(num_codebooks)


def steps_by_loop(provider: Any, timesteps: int) -> Iterator[list[tuple[int, int]]]:
    """Yields the coordinates of each step after the start, by the definition of the layout."""
    count = provider.num_codebooks
    if isinstance(provider, MusicLM):
        for first in range(0, count, provider.group_by):
            for t in range(timesteps):
                for k in range(first, min(first + provider.group_by, count)):
                    yield [(t, k)]
    elif isinstance(provider, Unrolled):
        late = dict(zip(provider.flattening, provider.delays, strict=True))
        for slot in range(timesteps + max(provider.delays)):
            inner_steps = [(slot - late.get(i, 0), i) for i in range(max(provider.flattening) + 1)]
            for t, i in sorted(inner_steps):
                if 0 <= t < timesteps:
                    yield [(t, k) for k in range(count) if provider.flattening[k] == i]
    else:
        is_coarse_first = isinstance(provider, CoarseFirst | VALLE)
        delays = getattr(provider, "delays", (0,) * (count - is_coarse_first))
        if is_coarse_first:
            yield from ([(t, 0)] for t in range(timesteps))
        if delays:
            for s in range(timesteps + max(delays)):
                yield [(s - d, k + is_coarse_first) for k, d in enumerate(delays) if 0 <= s - d < timesteps]


def layout_by_loop(provider: Any, timesteps: int) -> Layout:
    return [[], *(steps_by_loop(provider, timesteps) if timesteps else [])]


def built_by_loop(layout: Layout, codes: Tensor, special: int) -> tuple[Tensor, Tensor]:
    sequence = torch.full((*codes.shape[:2], len(layout)), special)
    mask = torch.zeros(codes.shape[1], len(layout), dtype=torch.bool)
    for s, held in enumerate(layout):
        for t, k in held:
            sequence[:, k, s] = codes[:, k, t]
            mask[k, s] = True
    return sequence, mask


def codes_of(batch: int, num_codebooks: int, timesteps: int) -> Tensor:
    """Returns codes that are all different."""
    return torch.arange(batch * num_codebooks * timesteps).reshape(batch, num_codebooks, timesteps)


def grid(pattern: Pattern) -> str:
    """Returns the sequence as text: a line per codebook, timesteps counted from 1, a dot for the special token."""
    times = torch.arange(1, pattern.timesteps + 1).expand(1, pattern.num_codebooks, -1)
    rows = pattern.build(times, 0)[0][0].tolist()
    return "\n".join("".join(str(t or ".") for t in row) for row in rows)


FIGURES = {
    # The four patterns of figure 1 of https://arxiv.org/abs/2306.05284, from the start step on.
    "parallel": (Parallel(4), ".1234 .1234 .1234 .1234"),
    "delay": (Delayed(4), ".1234... ..1234.. ...1234. ....1234"),
    "flattening": (Unrolled(4), ".1...2...3...4... ..1...2...3...4.. ...1...2...3...4. ....1...2...3...4"),
    "coarse first (VALL-E)": (VALLE(4), ".1234.... .....1234 .....1234 .....1234"),
    # From its appendix and its public implementation.
    "coarse first, without delays": (CoarseFirst(4), ".1234.... .....1234 .....1234 .....1234"),
    "coarse first, delayed": (CoarseFirst(4, [0, 1, 2]), ".1234...... .....1234.. ......1234. .......1234"),
    "partial delay": (Delayed(4, [0, 1, 1, 1]), ".1234. ..1234 ..1234 ..1234"),
    "partial flattening": (Unrolled(4, [0, 1, 1, 1]), ".1.2.3.4. ..1.2.3.4 ..1.2.3.4 ..1.2.3.4"),
    "partial flattening, delayed": (Unrolled(3, [0, 1, 1], [0, 3, 3]), ".123.4... ....1.234 ....1.234"),
    "MusicLM": (MusicLM(3), ".1.2.3.4..... ..1.2.3.4.... .........1234"),
    "MusicLM, one by one": (MusicLM(2, 1), ".1234.... .....1234"),
    "MusicLM, one group": (MusicLM(2, 5), ".1.2.3.4. ..1.2.3.4"),
    # Cases that no figure shows.
    "delayed in any order": (Delayed(3, [2, 0, 2]), "...1234 .1234.. ...1234"),
    "delayed from the first": (Delayed(2, [1, 2]), "..1234. ...1234"),
    "flattened backwards": (Unrolled(2, [1, 0]), "..1.2.3.4 .1.2.3.4."),
    "an empty inner step": (with_gap(2, [0, 2]), ".1..2..3..4.. ...1..2..3..4"),
    "an empty inner step, delayed": (with_gap(2, [1, 2], [0, 1]), "..1..2..3..4. ...1..2..3..4"),
}


@pytest.mark.parametrize(("provider", "expected"), FIGURES.values(), ids=FIGURES.keys())
def test_the_worked_examples_of_the_paper(provider: PatternProvider, expected: str) -> None:
    assert grid(provider(4)).split() == expected.split()


@any_kind
@settings(max_examples=60, deadline=None)
@any_length
def test_any_arguments_and_length_equal_a_plain_loop(
    kind: type[PatternProvider], num_codebooks: int, timesteps: int, batch: int, data: st.DataObject
) -> None:
    provider = drawn(kind, num_codebooks, data)
    pattern = provider(timesteps)
    layout = layout_by_loop(provider, timesteps)
    assert pattern.layout == layout
    assert Pattern.from_layout(layout, num_codebooks, timesteps) == pattern
    assert (pattern.num_codebooks, pattern.timesteps) == (num_codebooks, timesteps)
    assert pattern.num_steps == len(layout) == provider.num_steps(timesteps)
    codes = codes_of(batch, num_codebooks, timesteps)
    sequence, mask = pattern.build(codes, SPECIAL)
    expected, expected_mask = built_by_loop(layout, codes, SPECIAL)
    assert torch.equal(sequence, expected)
    assert torch.equal(mask, expected_mask)
    assert mask.sum() == num_codebooks * timesteps
    reverted, found = pattern.revert(sequence, SPECIAL)
    assert torch.equal(reverted, codes)
    assert found.shape == (num_codebooks, timesteps)
    assert found.all()


def closed_form(provider: Any, timesteps: int) -> int:
    """The number of steps by the formula in the docstrings."""
    count = provider.num_codebooks
    match provider:
        case Parallel():
            return 1 + timesteps
        case Delayed():
            return 1 + timesteps + max(provider.delays)
        case Unrolled():
            return 1 + timesteps * (max(provider.flattening) + 1)
        case CoarseFirst() if count > 1:
            return 1 + 2 * timesteps + max(provider.delays)
        case VALLE() if count > 1:
            return 1 + 2 * timesteps
        case MusicLM():
            return 1 + count * timesteps
        case _:
            return 1 + timesteps


@any_kind
@settings(max_examples=40, deadline=None)
@any_length
def test_num_steps_is_the_closed_form_and_one_without_timesteps(
    kind: type[PatternProvider], num_codebooks: int, timesteps: int, batch: int, data: st.DataObject
) -> None:
    provider = drawn(kind, num_codebooks, data)
    assert provider(timesteps).num_steps == (closed_form(provider, timesteps) if timesteps else 1)
    last = provider(timesteps).layout[-1]
    assert last or not timesteps


@any_kind
@settings(max_examples=60, deadline=None)
@any_length
def test_generation_step_by_step_equals_build(
    kind: type[PatternProvider], num_codebooks: int, timesteps: int, batch: int, data: st.DataObject
) -> None:
    pattern = drawn(kind, num_codebooks, data)(timesteps)
    codes = codes_of(batch, num_codebooks, timesteps)
    n = data.draw(st.integers(0, timesteps))
    whole, _ = pattern.build(codes, SPECIAL)
    sequence, missing = pattern.build_prefix(codes[..., :n], SPECIAL)
    start = pattern.first_step(n)
    assert torch.equal(sequence, torch.where(missing, -1, whole))
    assert missing.sum() == num_codebooks * (timesteps - n)
    assert not missing[:, :start].any()
    assert n == timesteps or missing[:, start].any()
    layout = pattern.layout
    for s in range(start, pattern.num_steps):
        assert torch.equal(sequence[..., :s], whole[..., :s])
        drawn_tokens = torch.full((batch, num_codebooks), -7)  # -7: no code at s, to be ignored
        for t, k in layout[s]:
            drawn_tokens[:, k] = codes[:, k, t]
        sequence[..., s] = torch.where(missing[:, s], drawn_tokens, sequence[..., s])
    assert torch.equal(sequence, whole)


@any_kind
@settings(max_examples=40, deadline=None)
@any_length
def test_reverted_logits_are_those_that_predict_each_token(
    kind: type[PatternProvider], num_codebooks: int, timesteps: int, batch: int, data: st.DataObject
) -> None:
    pattern = drawn(kind, num_codebooks, data)(timesteps)
    codes = codes_of(batch, num_codebooks, timesteps)
    sequence, _ = pattern.build(codes, SPECIAL)
    logits = torch.stack([sequence[..., 1:] * factor for factor in (1.0, 0.5)], 1).double()
    beyond = torch.full_like(logits[..., :1], 3.0) if timesteps else torch.zeros(batch, 2, num_codebooks, 1)
    for given_logits in (logits, torch.cat([logits, beyond], -1)):
        reverted, found = pattern.revert_logits(given_logits)
        assert torch.equal(reverted[:, 0], codes.double())
        assert torch.equal(reverted[:, 1], codes / 2.0)
        assert found.all()
        assert found.shape == (num_codebooks, timesteps)


@any_kind
@settings(max_examples=40, deadline=None)
@any_length
def test_the_mask_of_a_short_sequence_marks_the_present_codes(
    kind: type[PatternProvider], num_codebooks: int, timesteps: int, batch: int, data: st.DataObject
) -> None:
    pattern = drawn(kind, num_codebooks, data)(timesteps)
    codes = codes_of(batch, num_codebooks, timesteps)
    sequence, _ = pattern.build(codes, SPECIAL)
    end = data.draw(st.integers(0, pattern.num_steps))
    reverted, found = pattern.revert(sequence[..., :end], -5)
    assert torch.equal(found, torch.tensor(pattern.steps < end))
    assert torch.equal(reverted, torch.where(found, codes, -5))
    logits, found_too = pattern.revert_logits(sequence[:, None, :, 1:end].double())
    expected = torch.where(found, codes.double(), torch.nan)
    assert torch.equal(found_too, found)
    assert torch.allclose(logits[:, 0], expected, rtol=0, atol=0, equal_nan=True)


def test_the_steps_of_a_timestep() -> None:
    pattern = Delayed(4, [0, 2, 2, 1])(3)
    assert [pattern.steps_of(t) for t in range(3)] == [[1, 2, 3], [2, 3, 4], [3, 4, 5]]
    assert [pattern.first_step(t) for t in range(4)] == [1, 2, 3, 6]
    pattern = MusicLM(3, 2)(2)
    assert pattern.steps_of(1) == [3, 4, 6]
    assert type(pattern.steps_of(1)[0]) is type(pattern.first_step(0)) is int
    for t in (-1, 2):
        with pytest.raises(ValueError, match="steps_of: t: expected an integer"):
            pattern.steps_of(t)
    with pytest.raises(ValueError, match="first_step: t: expected an integer <= 2, found 3"):
        pattern.first_step(3)


LAYOUTS: dict[str, tuple[Layout, str]] = {
    "missing": ([[], [(0, 0), (0, 1)], [(1, 1)]], r"\(t=1, k=0\): expected in one step, found missing"),
    "twice": ([[], [(0, 0), (0, 1)], [(1, 0), (1, 1)], [(1, 0)]], r"\(t=1, k=0\).*found in steps \[2, 3\]"),
    "twice in a step": ([[], [(0, 0), (0, 1), (0, 1)], [(1, 0), (1, 1)]], r"\(t=0, k=1\).*found in steps \[1, 1\]"),
    "timestep too large": ([[], [(0, 0), (0, 1)], [(1, 0), (1, 1)], [(2, 0)]], r"\(t=2, k=0\): out of range"),
    "negative timestep": ([[], [(-1, 0)]], r"\(t=-1, k=0\): out of range"),
    "codebook too large": ([[], [(0, 2)]], r"\(t=0, k=2\): out of range, expected t below 2 and k below 2"),
    "descending": ([[], [(0, 0)], [(1, 0), (1, 1)], [(0, 1)]], r"\(t=1, k=1\).*after step 3 of timestep 0.*step 2"),
    "two of a codebook in a step": ([[], [(0, 0), (1, 0)], [(0, 1)], [(1, 1)]], r"\(t=1, k=0\).*ascend.*step 1"),
    "in the start": ([[(0, 0)], [(1, 0), (0, 1)], [(1, 1)]], r"\(t=0, k=0\).*step 0 is the start, found step 0"),
    "nothing": ([], r"\(t=0, k=0\): expected in one step, found missing"),
}


@pytest.mark.parametrize(("layout", "message"), LAYOUTS.values(), ids=LAYOUTS.keys())
def test_an_invalid_layout_says_which_coordinate_and_why(layout: Layout, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pattern.from_layout(layout, 2, 2)


@pytest.mark.parametrize(
    ("steps", "num_steps", "message"),
    [
        ([[1, 2], [1, 1]], 3, r"\(t=1, k=1\).*after step 1 of timestep 0.*found step 1"),
        ([[1, 2], [2, 3]], 3, r"\(t=1, k=1\): expected a step from 1 to 2, .*found step 3"),
        ([[1, 2], [-1, 3]], 4, r"\(t=0, k=1\): expected a step from 1 to 3, .*found step -1"),
        ([[1]], 0, "num_steps: expected an integer >= 1, found 0"),
    ],
)
def test_invalid_steps_say_which_coordinate_and_why(steps: list[list[int]], num_steps: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Pattern(np.array(steps), num_steps)


@pytest.mark.parametrize("steps", [[1, 2], [[1.0, 2.0]], np.empty((0, 3), np.int64), [[True, False]]])
def test_steps_that_are_no_integers_of_two_axes_are_refused(steps: Any) -> None:
    with pytest.raises(TypeError, match=r"Pattern: steps: expected integers \[num_codebooks, timesteps\], found"):
        Pattern(steps, 9)


@pytest.mark.parametrize("coordinate", [(0,), (0, 0, 0), (0.5, 0), ("a", "b")])
def test_a_coordinate_that_is_no_pair_of_integers_is_refused(coordinate: Any) -> None:
    with pytest.raises(TypeError, match=r"from_layout: expected coordinates"):
        Pattern.from_layout([[], [coordinate]], 1, 1)


@settings(max_examples=100, deadline=None)
@given(num_codebooks=st.integers(1, 4), timesteps=st.integers(0, 6), data=st.data())
def test_any_valid_layout_by_hand_is_built_and_reverted(
    num_codebooks: int, timesteps: int, data: st.DataObject
) -> None:
    places = st.sets(st.integers(1, 12), min_size=timesteps, max_size=timesteps).map(sorted)
    steps = np.array([data.draw(places) for _ in range(num_codebooks)], np.int64).reshape(num_codebooks, timesteps)
    pattern = Pattern(steps, 13)
    codes = codes_of(2, num_codebooks, timesteps)
    sequence, mask = pattern.build(codes, SPECIAL)
    expected, expected_mask = built_by_loop(pattern.layout, codes, SPECIAL)
    assert torch.equal(sequence, expected)
    assert torch.equal(mask, expected_mask)
    assert torch.equal(pattern.revert(sequence, SPECIAL)[0], codes)
    assert Pattern.from_layout(pattern.layout, num_codebooks, timesteps) == pattern
    shuffled = [data.draw(st.permutations(held)) for held in pattern.layout]
    assert Pattern.from_layout(shuffled, num_codebooks, timesteps) == pattern


BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "no codebooks": (lambda: Parallel(0), ValueError, "Parallel: num_codebooks: expected an integer >= 1, found 0"),
    "half a codebook": (lambda: VALLE(1.5), TypeError, "VALLE: num_codebooks: expected an integer, found 1.5"),
    "one delay too few": (lambda: Delayed(3, [0, 1]), ValueError, r"Delayed: delays: expected 3 integers, found 2: \["),
    "negative delay": (lambda: Delayed(2, [0, -1]), ValueError, r"Delayed: delays\[1\]: expected an integer >= 0"),
    "half a delay": (lambda: Delayed(2, [0, 0.5]), TypeError, r"Delayed: delays\[1\]: expected an integer, found 0.5"),
    "one number": (lambda: Delayed(2, 1), TypeError, "Delayed: delays: expected 2 integers, found 1"),
    "text": (lambda: Delayed(2, "01"), TypeError, "Delayed: delays: expected 2 integers, found '01'"),
    "a delay for the first": (lambda: CoarseFirst(2, [0, 1]), ValueError, "CoarseFirst: delays: expected 1 integers"),
    "flattening": (lambda: Unrolled(2, [0]), ValueError, "Unrolled: flattening: expected 2 integers, found 1"),
    "inner step apart": (
        lambda: Unrolled(3, [0, 1, 1], [0, 1, 2]),
        ValueError,
        r"Unrolled: delays\[2\]: expected 1, as delays\[1\] of the same inner step 1, found 2",
    ),
    "no group": (lambda: MusicLM(2, 0), ValueError, "MusicLM: group_by: expected an integer >= 1, found 0"),
    "negative length": (lambda: Parallel(2)(-1), ValueError, "Parallel: timesteps: expected an integer >= 0"),
}


@pytest.mark.parametrize(("make", "error", "message"), BAD.values(), ids=BAD.keys())
def test_a_bad_setting_says_which_what_was_expected_and_found(make: Any, error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        make()


def test_a_wrong_shape_says_what_was_expected_and_found() -> None:
    pattern = Delayed(2)(3)
    for call, message in [
        (
            lambda: pattern.build(torch.zeros(1, 2, 4), 0),
            r"codes: expected \[B, 2, 3\], found \[1, 2, 4\], with Pattern",
        ),
        (lambda: pattern.build(torch.zeros(2, 3), 0), r"codes: expected \[B, 2, 3\], found \[2, 3\]"),
        (lambda: pattern.build_prefix(torch.zeros(1, 2, 4), 0), r"codes: expected \[B, 2, 0 to 3\], found"),
        (lambda: pattern.revert(torch.zeros(1, 2, 6), 0), r"sequence: expected \[B, 2, 0 to 5\], found \[1, 2, 6\]"),
        (lambda: pattern.revert_logits(torch.zeros(1, 2, 5)), r"logits: expected \[B, card, 2, 0 to 5\], found"),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


@pytest.mark.parametrize("special", [256, -1, float("nan"), 0.5])
def test_a_token_that_the_dtype_cannot_hold_is_refused(special: Any) -> None:
    pattern = Delayed(2)(3)
    codes = torch.zeros(1, 2, 3, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"special: expected an integer that torch.uint8 holds, found"):
        pattern.build(codes, special)
    with pytest.raises(ValueError, match=r"unknown: expected an integer that torch.uint8 holds, found"):
        pattern.build_prefix(codes, 0, special)


# Mistakes of known implementations.


@any_kind
@pytest.mark.parametrize("num_codebooks", range(1, 10))
def test_one_codebook_and_groups_that_do_not_divide_are_legal(kind: type[PatternProvider], num_codebooks: int) -> None:
    providers = [kind(num_codebooks)]
    if kind is MusicLM:
        providers = [MusicLM(num_codebooks, group_by) for group_by in range(1, 11)]
    for provider, timesteps in itertools.product(providers, (1, 2, 5)):
        pattern = provider(timesteps)
        assert sorted(itertools.chain(*pattern.layout)) == [
            (t, k) for t in range(timesteps) for k in range(num_codebooks)
        ]
        assert num_codebooks > 1 or pattern == Parallel(1)(timesteps)


def test_delays_longer_than_the_audio_keep_every_coordinate_and_add_none() -> None:
    assert grid(Delayed(2, [0, 4])(2)) == ".12....\n.....12"
    assert grid(Unrolled(2, [0, 1], [0, 4])(2)) == ".12..\n...12"
    assert grid(CoarseFirst(3, [0, 4])(2)) == ".12......\n...12....\n.......12"


def layout_of_audiocraft(flattening: list[int], timesteps: int) -> list[list[tuple[int, int]]]:
    """The layout of audiocraft's rule without delays: the steps of a timestep sorted by their coordinates."""
    layout: list[list[tuple[int, int]]] = [[]]
    for t in range(timesteps):
        inner_steps = range(max(flattening) + 1)
        layout += sorted([(t, k) for k, step in enumerate(flattening) if step == inner] for inner in inner_steps)
    return layout


@given(flattening=st.lists(st.integers(0, 6), min_size=1, max_size=5).map(sorted), timesteps=st.integers(0, 5))
def test_an_inner_step_without_a_codebook_warns_with_audiocrafts_setting(flattening: list[int], timesteps: int) -> None:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        layout = Unrolled(len(flattening), flattening)(timesteps).layout
    expected = layout_of_audiocraft(flattening, timesteps)
    if told:
        assert timesteps == 0 or layout != expected
        (remedy,) = re.findall(r"set flattening=(\[.*\])", str(told[0].message))
        layout = Unrolled(len(flattening), json.loads(remedy))(timesteps).layout
    assert layout == expected


def test_an_empty_inner_step_with_delays_has_no_setting_of_audiocraft() -> None:
    with pytest.warns(UserWarning, match="leave out no inner step"):
        Unrolled(2, [1, 2], [0, 1])


def test_an_empty_inner_step_stays_at_its_place() -> None:
    layout = Unrolled(2, [0, 2])(2).layout
    assert layout == [[], [(0, 0)], [], [(0, 1)], [(1, 0)], [], [(1, 1)]]


@any_kind
def test_a_pattern_that_has_been_used_is_pickled_without_its_tensors(kind: type[PatternProvider]) -> None:
    provider = kind(4)
    pattern = provider(30)
    before = pickle.dumps(pattern)
    codes = codes_of(2, 4, 30)
    expected, _ = pattern.build(codes, SPECIAL)
    assert pickle.dumps(pattern) == before
    for loaded in (pickle.loads(before), copy.deepcopy(pattern), pickle.loads(pickle.dumps(provider))(30)):
        assert loaded == pattern
        assert hash(loaded) == hash(pattern)
        assert torch.equal(loaded.build(codes, SPECIAL)[0], expected)
        assert not loaded.steps.flags.writeable
    assert pickle.loads(pickle.dumps(provider)) == provider


def test_patterns_are_equal_where_their_layouts_are() -> None:
    assert Delayed(3, [0, 0, 0])(4) == Parallel(3)(4) != Delayed(3)(4)
    assert Parallel(3)(0) != Parallel(4)(0)
    assert Parallel(3)(4) != "a pattern"
    assert repr(Delayed(3)(4)) == "Pattern(num_codebooks=3, timesteps=4, num_steps=7)"
    assert len({Delayed(3), Delayed(3, [0, 1, 2]), Delayed(3, (0, 1, 3))}) == 2


def test_nothing_is_shared_between_callers() -> None:
    pattern = Delayed(3)(5)
    codes = codes_of(2, 3, 5)
    first, second = pattern.build(codes, SPECIAL), pattern.build_prefix(codes, SPECIAL)
    kept = [each.clone() for each in (*first, *second)]
    reverted = pattern.revert(first[0], SPECIAL)
    logits = pattern.revert_logits(first[0][:, None].double())
    for each in (*first, *second, *reverted, *logits):
        each.zero_()
    again = (*pattern.build(codes, SPECIAL), *pattern.build_prefix(codes, SPECIAL))
    assert all(torch.equal(a, b) for a, b in zip(again, kept, strict=True))
    assert torch.equal(codes, codes_of(2, 3, 5))
    assert torch.equal(pattern.revert(again[0], SPECIAL)[0], codes)
    pattern.layout[1].clear()
    assert pattern == Delayed(3)(5)


def test_a_pattern_and_its_provider_do_not_change() -> None:
    steps, delays = np.array([[1, 2], [2, 3]]), [0, 1]
    pattern, provider = Pattern(steps, 4), Delayed(2, delays)
    steps[:] = 3
    delays[:] = [5, 5]
    assert pattern == provider(2) == Delayed(2)(2)
    with pytest.raises(ValueError, match="read-only"):
        pattern.steps[0, 0] = 3
    with pytest.raises(FrozenInstanceError):
        pattern.num_steps = 9  # type: ignore[misc]
    with pytest.raises(FrozenInstanceError):
        provider.delays = (3, 3)  # type: ignore[misc]


@any_kind
def test_non_contiguous_input_equals_a_contiguous_copy(kind: type[PatternProvider]) -> None:
    pattern = kind(3)(6)
    codes = codes_of(4, 6, 3).transpose(1, 2)[::2]
    sequence, _ = pattern.build(codes, SPECIAL)
    assert torch.equal(sequence, pattern.build(codes.contiguous(), SPECIAL)[0])
    assert torch.equal(pattern.build_prefix(codes[..., :4], SPECIAL)[0][..., :2], sequence[..., :2])
    turned = sequence.transpose(0, 2).contiguous().transpose(0, 2)
    assert torch.equal(pattern.revert(turned, SPECIAL)[0], codes)
    logits = torch.randn(2, 3, pattern.num_steps, 5).permute(0, 3, 1, 2)
    expected, _ = pattern.revert_logits(logits.contiguous())
    assert torch.equal(pattern.revert_logits(logits)[0], expected)
    assert torch.equal(pattern.revert_logits(logits[:1].expand(3, -1, -1, -1))[0], expected[:1].expand(3, -1, -1, -1))


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int32, torch.int64, torch.bfloat16, torch.float64])
def test_the_dtype_is_preserved(dtype: torch.dtype) -> None:
    pattern = Delayed(3)(5)
    codes = codes_of(2, 3, 5).to(dtype)
    sequence, mask = pattern.build(codes, 99)
    reverted, found = pattern.revert(sequence[..., :-1], 99)
    assert sequence.dtype == reverted.dtype == dtype
    assert mask.dtype == found.dtype == torch.bool
    assert torch.equal(reverted, torch.where(found, codes, torch.tensor(99, dtype=dtype)))


def test_gradients_of_reverted_logits_reach_their_source() -> None:
    with torch.inference_mode():
        pattern = Delayed(2)(3)
        pattern.build(torch.zeros(1, 2, 3, dtype=torch.int64), 7)
    logits = torch.zeros(1, 1, 2, 4, requires_grad=True)
    weights = torch.arange(1.0, 7).reshape(1, 1, 2, 3)
    (pattern.revert_logits(logits)[0] * weights).sum().backward()
    assert logits.grad is not None
    assert logits.grad[0, 0].tolist() == [[1, 2, 3, 0], [0, 4, 5, 6]]


@pytest.mark.parametrize("at", ["meta", pytest.param("cuda", marks=pytest.mark.gpu)])
def test_results_are_on_the_device_of_the_input(at: str) -> None:
    if at == "cuda" and not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    pattern = Unrolled(3, [0, 1, 1])(5)
    codes = codes_of(2, 3, 5)
    results = {}
    for device in ("cpu", at, "cpu"):
        sequence, mask = pattern.build(codes.to(device), 99)
        prefix, missing = pattern.build_prefix(codes[..., :2].to(device), 99)
        results[device] = (
            *(sequence, mask, prefix, missing),
            *pattern.revert(sequence[..., :-2], 99),
            *pattern.revert_logits(sequence[:, None, :, 1:].double()),
        )
    for ours, expected in zip(results[at], results["cpu"], strict=True):
        assert ours.device.type == at
        assert ours.shape == expected.shape
        assert at == "meta" or torch.equal(ours.cpu(), expected)


def test_there_is_a_config_for_each_layout() -> None:
    kinds = {type(instantiate(OmegaConf.load(path), num_codebooks=4)) for path in CONFS}
    assert kinds == set(KINDS)
    for path in CONFS:
        assert instantiate(OmegaConf.load(path), num_codebooks=1)(3) == Parallel(1)(3)
    chosen = OmegaConf.create({"_target_": "runner.utils.pattern.Delayed", "num_codebooks": 2, "delays": [0, 3]})
    assert instantiate(chosen) == Delayed(2, [0, 3])
