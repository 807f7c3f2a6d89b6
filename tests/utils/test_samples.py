"""`runner.utils.samples`: generators made or replaced after the first sample are seeded, or warned of."""

import time
import warnings

import numpy as np
import pytest

from runner.utils.batches import Batches
from runner.utils.repeated import Repeated, is_same
from runner.utils.sampler import OrderedSampler
from runner.utils.samples import Samples

MADE = None


class Source:
    """A dataset whose samples are draws of a generator that it makes in a way of its own."""

    def __init__(self):
        self.generator, self.calls = None, 0

    def __len__(self):
        return 24

    def __getitem__(self, index):
        self.calls += 1
        self.prepare(index)
        return 0.0 if self.generator is None else float(self.generator.normal())

    def prepare(self, index):
        pass


class Lazy(Source):
    def prepare(self, index):
        if index % 3 == 2 and self.generator is None:
            self.generator = np.random.default_rng()


class Added(Lazy):
    def prepare(self, index):
        if index % 3 == 2 and not hasattr(self, "own"):
            self.own = np.random.default_rng()

    def __getitem__(self, index):
        self.prepare(index)
        return float(self.own.normal()) if index % 3 == 2 else 0.0


class Global(Lazy):
    def __getitem__(self, index):
        global MADE
        if index % 3 == 2 and MADE is None:
            MADE = np.random.default_rng()
        return float(MADE.normal()) if index % 3 == 2 else 0.0


class Fresh(Source):
    def __init__(self):
        super().__init__()
        self.parts = {"noise": [np.random.default_rng()]}
        self.generator = np.random.default_rng()

    def prepare(self, index):
        if self.calls % 5 == 0:
            self.generator = np.random.default_rng()


class LazyOnce(Lazy):
    def __getitem__(self, index):
        drawn = super().__getitem__(index)
        return drawn if index % 3 == 2 else 0.0


class OwnSeed(Source):
    def prepare(self, index):
        self.generator = np.random.default_rng(index)


def fetch(dataset, draws):
    samples = Samples(dataset, 7)
    found = {}
    for first, last in draws:
        found |= dict(zip(range(first, last), samples[first, list(range(first, last))], strict=True))
    return found, samples.take_notes()


@pytest.mark.parametrize("make", [LazyOnce, Added, Global, Fresh, OwnSeed])
def test_a_generator_made_or_replaced_by_any_sample_is_seeded_for_that_one_and_all_later(make):
    global MADE
    MADE = None
    whole, notes = fetch(make(), [(0, 24)])
    MADE = None
    part, more = fetch(make(), [(14, 19), (1, 5), (5, 9), (20, 24)])
    assert not notes + more
    assert part == {ordinal: whole[ordinal] for ordinal in part}
    assert len(set(whole.values())) >= 8


def test_a_generator_found_later_where_none_is_looked_for_is_named():
    class Hidden(Source):
        def __init__(self):
            super().__init__()
            self.kept = []

        def prepare(self, index):
            if self.calls == 3:
                self.kept.append(np.random.default_rng())

    _, notes = fetch(Hidden(), [(0, 9)])
    assert len(notes) == 1
    assert notes[0].startswith("dataset.kept[0]: found after 4 samples")


def test_a_generator_that_each_sample_replaces_by_one_without_a_seed_is_named_once():
    class Entropy(Source):
        def prepare(self, index):
            self.generator = np.random.default_rng()

    _, notes = fetch(Entropy(), [(0, 9)])
    assert [note.partition(":")[0] for note in notes] == ["dataset.generator"]
    assert "replaced in each sample" in notes[0]


def test_a_dataset_that_sets_attributes_of_its_own_in_each_sample_is_searched_a_few_times_only():
    class Growing(Source):
        def prepare(self, index):
            setattr(self, f"cache_{self.calls}", index)

    samples, searches = Samples(Growing(), 7), []
    find = samples._find
    samples._find = lambda: searches.append(1) or find()
    for number in range(200):
        samples[number, [number % 24]]
    assert len(searches) < 20


class Fixed(Source):
    def __getitem__(self, index):
        self.calls += 1
        return {"x": np.full(3, index), "y": [float("nan"), "text"]}


class Entropy(Fixed):
    def __getitem__(self, index):
        return super().__getitem__(index) | {"x": np.random.default_rng().normal(size=3)}


@pytest.mark.parametrize("num_workers", [0, 1])
@pytest.mark.parametrize(("make", "warned"), [(Entropy, 1), (Fixed, 0)])
def test_a_dataset_that_draws_from_what_no_seed_decides_is_warned_of_once(make, warned, num_workers):
    dataset = make()
    batches = Batches(dataset, OrderedSampler(24), 2, seed=3, num_workers=num_workers, collate=list)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        end, count = time.monotonic() + (10 if warned else 1), 0
        while len(caught) == 0 and time.monotonic() < end:
            next(batches)
            count += 1
            time.sleep(0.01)
        for _ in range(3):
            next(batches)
    batches.close()
    found = [str(each.message) for each in caught if "can't be seeded" in str(each.message)]
    assert len(found) == warned
    assert all(message.startswith(f"data.train ({make.__name__}): expected the same sample") for message in found)
    if not num_workers:
        assert dataset.calls == 2 * (count + 3)  # the comparison counts in no dataset of this process


@pytest.mark.parametrize("num_workers", [0])
def test_without_seeding_nothing_is_compared(num_workers, monkeypatch):
    monkeypatch.setattr(Repeated, "start", lambda self, *rest: pytest.fail("it was started"))
    next(Batches(Entropy(), OrderedSampler(24), 2, seed_samples=False, collate=list))


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ({"a": [1, "b"]}, {"a": [1, "b"]}, True),
        ({"a": [1, "b"]}, {"a": [1, "c"]}, False),
        (np.array([1.0, np.nan]), np.array([1.0, np.nan]), True),
        (np.array([1.0]), np.array([2.0]), False),
        ((1, 2), (1, 2, 3), False),
        ({"a": 1}, {"b": 1}, False),
        (float("nan"), float("nan"), True),
        (object(), object(), True),
    ],
)
def test_samples_are_compared_by_what_they_hold(one, other, same):
    assert is_same(one, other) is same
