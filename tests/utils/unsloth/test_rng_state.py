"""`runner.utils.unsloth.rng_state`: the states of Python's and NumPy's generators, read and set officially."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.utils.unsloth import rng_state
from runner.utils.unsloth.rng_state import find_generators, get_global_states, get_state, set_global_states, set_state

DRAWS = {
    "random": random.random,
    "getrandbits": lambda: random.getrandbits(7),
    "gauss": lambda: random.gauss(0, 1),  # every second one is kept from the one before
    "rand": np.random.rand,
    "randint": lambda: np.random.randint(5),
    "randn": np.random.randn,  # likewise
    "permutation": lambda: tuple(np.random.permutation(3)),
}


@pytest.fixture(autouse=True)
def global_generators():
    """Restores both global generators after the test."""
    python, numpy = random.getstate(), np.random.get_state()
    yield
    random.setstate(python)
    np.random.set_state(numpy)


def test_the_states_are_read_from_memory_where_this_python_and_numpy_are_known():
    assert rng_state._python_state()._raw is not None
    assert rng_state._numpy_state(rng_state._bit_generator())._raw is not None


@settings(deadline=None)
@given(st.lists(st.sampled_from(sorted(DRAWS)), max_size=5), st.sampled_from(sorted(DRAWS)), st.integers(0, 700))
def test_any_draw_makes_another_state_and_setting_it_back_repeats_the_draws(before, name, num_skipped):
    for _ in range(num_skipped):
        random.random(), np.random.rand()
    for each in before:
        DRAWS[each]()
    states = get_global_states()
    official = random.getstate(), np.random.get_state(legacy=False)
    drawn = [DRAWS[name]() for _ in range(3)]
    assert get_global_states() != states
    set_global_states(states)
    assert get_global_states() == states
    assert random.getstate() == official[0]
    np.testing.assert_equal(np.random.get_state(legacy=False), official[1])
    assert [DRAWS[name]() for _ in range(3)] == drawn


@pytest.mark.parametrize("draw", [lambda: random.getrandbits(32), lambda: np.random.bytes(4)])
@pytest.mark.parametrize("num_draws", [1, 624, 1248])  # a whole key of words leaves the position where it was
def test_the_same_states_are_the_same_objects_and_any_number_of_words_drawn_makes_others(draw, num_draws):
    states = get_global_states()
    assert all(each is state for each, state in zip(get_global_states(), states, strict=True))
    first = [draw() for _ in range(num_draws)]
    assert get_global_states() != states
    set_global_states(states)
    assert get_global_states() == states
    assert [draw() for _ in range(num_draws)] == first


@pytest.mark.parametrize("name", ["random", "gauss", "randn", "rand"])
def test_where_the_layout_is_not_known_the_states_are_read_officially(monkeypatch, name):
    python, numpy = rng_state._PythonState(), rng_state._NumpyState(rng_state._bit_generator())
    python._raw = numpy._raw = None
    monkeypatch.setattr(rng_state, "_python_state", lambda: python)
    monkeypatch.setattr(rng_state, "_numpy_state", lambda bits: numpy)
    states = get_global_states()
    assert get_global_states() == states
    drawn = [DRAWS[name]() for _ in range(3)]
    assert get_global_states() != states
    set_global_states(states)
    assert [DRAWS[name]() for _ in range(3)] == drawn


def test_another_bit_generator_put_into_numpy_is_read_and_set():
    own = rng_state._bit_generator()
    np.random.set_bit_generator(np.random.PCG64(3))
    try:
        states = get_global_states()
        drawn = np.random.rand()
        assert get_global_states() != states
        set_global_states(states)
        assert np.random.rand() == drawn
    finally:
        np.random.set_bit_generator(own)


@pytest.mark.parametrize(
    ("generator", "draw"),
    [
        (torch.Generator().manual_seed(1), lambda each: torch.rand((), generator=each).item()),
        (random.Random(1), lambda each: each.gauss(0, 1)),
        (np.random.default_rng(1), lambda each: each.standard_normal()),
        (np.random.Generator(np.random.Philox(1)), lambda each: each.random()),
        (np.random.RandomState(1), lambda each: each.randn()),
        (np.random.RandomState(np.random.PCG64(1)), lambda each: each.randn()),
        (np.random.PCG64(1), lambda each: each.random_raw()),
    ],
)
def test_a_generator_that_is_held_repeats_its_draws(generator, draw):
    state = get_state(generator)
    drawn = [draw(generator) for _ in range(3)]
    set_state(generator, state)
    assert [draw(generator) for _ in range(3)] == drawn


def test_generators_are_found_in_nests_and_behind_methods_once_and_global_ones_are_not():
    own = [torch.Generator(), random.Random(0), np.random.default_rng(0), np.random.RandomState(0)]
    nest = [own[:1], {"a": (own[1].random, own[1])}, own[2].normal, own[3].rand, "text", None, own[3]]
    nest.append(nest)  # which holds itself
    shared = [random.random, np.random.rand, torch.default_generator, random, np.random]
    found = find_generators([nest, *shared])
    assert {id(each) for each in found} == {id(each) for each in own}
    assert len(found) == 4
