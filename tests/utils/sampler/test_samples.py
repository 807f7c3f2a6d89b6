"""`runner.utils.sampler.samples`: generators created after the first sample are seeded, or warned of."""

import threading
import warnings
import zipfile

import numpy as np
import pytest

from runner.utils.modules.generators import ObjectGenerators
from runner.utils.sampler import OrderedSampler
from runner.utils.sampler.batches import Batches
from runner.utils.sampler.samples import SampleFetcher, is_same

MADE = None


class Source:
    """A dataset whose samples are numbers of a generator, created in a given way."""

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
    samples = SampleFetcher(dataset, 7)
    found = {}
    for first, last in draws:
        found |= dict(zip(range(first, last), samples[first, list(range(first, last))], strict=True))
    return found, samples.pop_notes()


@pytest.mark.parametrize("make", [LazyOnce, Added, Global, Fresh, OwnSeed])
def test_a_generator_created_by_a_sample_is_seeded_from_that_sample_on(make):
    global MADE
    MADE = None
    whole, notes = fetch(make(), [(0, 24)])
    MADE = None
    part, more = fetch(make(), [(14, 19), (1, 5), (5, 9), (20, 24)])
    assert not notes + more
    assert part == {ordinal: whole[ordinal] for ordinal in part}
    assert len(set(whole.values())) >= 8


def test_a_generator_found_by_a_later_full_search_is_warned_of():
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


def test_a_generator_replaced_in_each_sample_is_warned_of_once():
    class Entropy(Source):
        def prepare(self, index):
            self.generator = np.random.default_rng()

    _, notes = fetch(Entropy(), [(0, 9)])
    assert [note.partition(":")[0] for note in notes] == ["dataset.generator"]
    assert "replaced in each sample" in notes[0]


def test_a_dataset_that_sets_attributes_in_each_sample_is_searched_a_few_times(monkeypatch):
    class Growing(Source):
        def prepare(self, index):
            setattr(self, f"cache_{self.calls}", index)

    samples, searches = SampleFetcher(Growing(), 7), []
    monkeypatch.setattr(
        "runner.utils.sampler.samples.ObjectGenerators",
        lambda **roots: searches.append(1) or ObjectGenerators(**roots),
    )
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
def test_a_dataset_that_cannot_be_seeded_is_warned_of_once(make, warned, num_workers):
    dataset = make()
    batches = Batches(dataset, OrderedSampler(24), 2, seed=3, num_workers=num_workers, collate=list)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            next(batches)
    batches.close()
    found = [str(each.message) for each in caught if "can't be seeded" in str(each.message)]
    assert len(found) == warned
    assert all(message.startswith(f"data.train ({make.__name__}): expected the same sample") for message in found)
    if not num_workers:
        assert dataset.calls == 2 * 3 + 1  # the first is fetched twice


def test_without_seeding_samples_are_not_compared():
    dataset = Entropy()
    next(Batches(dataset, OrderedSampler(24), 2, seed_samples=False, collate=list))
    assert dataset.calls == 2


class Reused(Fixed):
    """A dataset that always returns the same array, which contains the number of calls."""

    def __init__(self):
        super().__init__()
        self.array = np.zeros(3)

    def __getitem__(self, index):
        self.calls += 1
        self.array[:] = self.calls
        return self.array


class Once(Fixed):
    """A dataset that returns each sample only once."""

    def __getitem__(self, index):
        if self.calls:
            raise KeyError(index)
        return super().__getitem__(index)


class Uncopied(Fixed):
    """A dataset whose samples can't be copied."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "lock": threading.Lock()}


def test_the_first_sample_is_that_of_its_first_fetch():
    samples = SampleFetcher(Reused(), 3, is_repeated=True)
    (first,) = samples[0, [0]]
    assert first.tolist() == [1.0, 1.0, 1.0]
    (note,) = samples.pop_notes()
    assert "expected the same sample" in note
    for kind in (Once, Uncopied):
        samples = SampleFetcher(kind(), 3, is_repeated=True)
        (first,) = samples[0, [7]]
        assert first["x"].tolist() == [7, 7, 7]
        assert samples.pop_notes() == []


class Stored(Fixed):
    """A dataset that reads from a file opened once."""

    def __init__(self, path):
        super().__init__()
        with zipfile.ZipFile(path, "w") as archive:
            for index in range(24):
                archive.writestr(str(index), np.full(20_000, index, np.float32).tobytes())
        self.archive = zipfile.ZipFile(path)

    def __getitem__(self, index):
        return float(np.frombuffer(self.archive.read(str(index)), np.float32).mean())


@pytest.mark.parametrize("num_workers", [0, 1, 2])
def test_no_process_moves_the_offset_of_a_file_that_another_reads(tmp_path, num_workers):
    dataset = Stored(tmp_path / "samples.zip")
    for _ in range(5):
        batches = Batches(dataset, OrderedSampler(24), 2, num_workers=num_workers, collate=list)
        assert [next(batches) for _ in range(12)] == [[float(i), i + 1.0] for i in range(0, 24, 2)]
        batches.close()
    dataset.archive.close()


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
def test_samples_are_compared_by_content(one, other, same):
    assert is_same(one, other) is same
