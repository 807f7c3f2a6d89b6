"""Mixes: their proportions, the order within each dataset, and any position computed alone."""

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.utils.sampler.batches import Batches
from runner.utils.sampler.mix import Mix, MixSampler

SIZES = st.lists(st.integers(1, 300), min_size=1, max_size=5)
WEIGHTS = st.floats(0.001, 100, allow_nan=False).map(lambda weight: round(weight, 3))


@st.composite
def mixes(draw):
    sizes = draw(SIZES)
    weights = draw(st.lists(WEIGHTS, min_size=len(sizes), max_size=len(sizes)))
    return Mix([range(size) for size in sizes], weights)


def take(sampler, count):
    return list(itertools.islice(itertools.chain.from_iterable(itertools.repeat(sampler)), count))


def choices_of(mix, indices):
    return [mix._locate(index) for index in indices]


@settings(max_examples=60, deadline=None)
@given(mix=mixes(), seed=st.integers(0, 9), num_blocks=st.integers(1, 4))
def test_each_block_has_every_dataset_in_proportion_to_its_weight(mix, seed, num_blocks):
    count = 1024 * num_blocks
    numbers = [number for number, _ in choices_of(mix, take(MixSampler(mix, seed), count))]
    for number, weight in enumerate(mix.weights):
        assert abs(numbers.count(number) - count * weight / sum(mix.weights)) < len(mix.weights)


@settings(max_examples=60, deadline=None)
@given(mix=mixes(), seed=st.integers(0, 9))
def test_each_pass_of_a_dataset_has_every_sample_once(mix, seed):
    chosen = choices_of(mix, take(MixSampler(mix, seed), 1500))
    for number, size in enumerate(mix.sizes):
        own = [index for found, index in chosen if found == number]
        for start in range(0, len(own) - size + 1, size):
            assert sorted(own[start : start + size]) == list(range(size))


@settings(max_examples=60, deadline=None)
@given(mix=mixes(), seed=st.integers(0, 9), cut=st.integers(0, 3000), count=st.integers(1, 1200))
def test_a_sampler_resumed_anywhere_yields_exactly_the_rest(mix, seed, cut, count):
    expected = take(MixSampler(mix, seed), cut + count)
    epoch, position = divmod(cut, len(mix))
    resumed = MixSampler(mix, seed)
    resumed.load_state_dict({**resumed.state_dict(), "epoch": epoch, "position": position})
    assert take(resumed, count) == expected[cut:]


def test_the_proportions_hold_exactly_in_the_long_run_also_for_weights_that_no_block_holds():
    mix = Mix([range(10), range(10), range(10)], [0.1, 0.0003, 0.8997])
    counts = MixSampler(mix)._count(10_000_000)
    assert counts == [1_000_000, 3_000, 8_997_000]


def test_orders_depend_on_the_seed_and_each_pass_has_its_own():
    mix = Mix([range(50), range(50)])
    first, other = take(MixSampler(mix, 1), 300), take(MixSampler(mix, 2), 300)
    assert first != other
    own = [index for number, index in choices_of(mix, first) if number == 0]
    assert own[:50] != own[50:100]


def test_another_weight_or_dataset_refuses_the_state():
    state = MixSampler(Mix({"code": range(9), "text": range(5)}, {"code": 2, "text": 1})).state_dict()
    with pytest.raises(ValueError, match="mix='code 9 x 2, text 5 x 1', this sampler has mix='code 9 x 1, text 5 x 1'"):
        MixSampler(Mix({"code": range(9), "text": range(5)})).load_state_dict(state)


@settings(max_examples=20, deadline=None)
@given(cut=st.integers(0, 12), world_size=st.integers(1, 3), num_after=st.integers(1, 3))
def test_batches_of_a_mix_resume_on_any_number_of_ranks(cut, world_size, num_after):
    def make(count):
        mix = Mix({"a": [f"a{i}" for i in range(9)], "b": [f"b{i}" for i in range(5)]}, {"a": 1, "b": 3})
        return [
            Batches(mix, MixSampler(mix), 6, collate=list, rank=rank, world_size=count, seed_samples=rank == 0)
            for rank in range(count)
        ]

    def read(streams, count):
        return [[sample for stream in streams for sample in next(stream)] for _ in range(count)]

    expected = read(make(1), cut + 4)
    before, after = make(world_size), make(num_after)
    assert read(before, cut) == expected[:cut]
    for stream in after:
        stream.load_state_dict(before[0].state_dict())
    assert read(after, 4) == expected[cut:]


class Whole(list):
    num_calls = 0

    def __getitems__(self, indices):
        self.num_calls += 1
        return [self[index] for index in indices]


def test_samples_are_fetched_with_one_call_for_each_dataset_that_can():
    whole = Whole(range(10))
    mix = Mix([whole, range(100, 105)])
    assert mix.__getitems__([3, 14, 0, 10]) == [3, 104, 0, 100] == [mix[index] for index in (3, 14, 0, 10)]
    assert whole.num_calls == 1
    assert len(mix) == 15


def test_an_error_names_the_index_and_the_dataset():
    class Broken(list):
        def __getitem__(self, index):
            raise OSError("the disk")

    mix = Mix({"good": range(4), "broken": Broken([0, 0])})
    with pytest.raises(OSError, match="the disk") as caught:
        mix[5]
    assert caught.value.__notes__ == ["at index 1 of the dataset broken"]


@pytest.mark.parametrize(
    ("datasets", "weights", "message"),
    [
        ({}, None, "expected one dataset or more, found none"),
        ({"a": []}, None, "the dataset a is empty"),
        ({"a": [1]}, {"b": 1}, "expected weights of a, found those of b"),
        ([[1], [2]], [1], "expected weights of 0, 1, found those of 0"),
        ({"a": [1]}, {"a": 0}, "weight of a: expected a finite number above 0, found 0"),
        ({"a": [1]}, {"a": float("nan")}, "weight of a: expected a finite number above 0, found nan"),
        ({"a": [1]}, {"a": True}, "weight of a: expected a finite number above 0, found True"),
    ],
)
def test_a_mix_that_cannot_be_drawn_is_an_error(datasets, weights, message):
    with pytest.raises(ValueError, match=message):
        Mix(datasets, weights)


def test_the_fingerprint_is_that_of_the_datasets_which_have_one():
    class Codes(list):
        fingerprint = "codec 1"

    assert Mix({"a": Codes([1]), "b": [2]}).fingerprint == "a: codec 1"
    assert Mix([[1]]).fingerprint is None
