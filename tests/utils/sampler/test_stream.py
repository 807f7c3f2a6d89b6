"""Streams: resumed anywhere, with other numbers of ranks and loader workers, they yield exactly the rest."""

import itertools
import json
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import IterableDataset

from runner.utils.sampler import RandomSampler
from runner.utils.sampler.batches import EvaluationData
from runner.utils.sampler.stream import StreamBatches, StreamError, StreamEvaluation, find_shuffle_buffer, is_stream

LENGTH = 11
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital'")  # in torchdata 0.11 with torch 2.13


class Numbers(IterableDataset):
    """Yields its epoch, a number, and a draw of each global generator; has no state."""

    def __init__(self, length=LENGTH):
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for number in range(self.length):
            yield self.epoch, number, torch.rand(()).item(), random.random(), np.random.rand()


class Counting:
    """Continues where its state says; the order of each pass is drawn from a generator that belongs to the state."""

    def __init__(self, length=LENGTH):
        self.length = length
        self.random = random.Random(3)
        self.order, self.position = [], 0

    def __iter__(self):
        if self.position == len(self.order):
            self.order, self.position = self.random.sample(range(self.length), self.length), 0
        while self.position < self.length:
            self.position += 1
            yield self.order[self.position - 1], random.random()

    def state_dict(self):
        version, state, gauss = self.random.getstate()
        return {"order": self.order, "position": self.position, "random": [version, list(state), gauss]}

    def load_state_dict(self, state):
        version, random_state, gauss = state["random"]
        self.random.setstate((version, tuple(random_state), gauss))
        self.order, self.position = list(state["order"]), state["position"]


def from_hugging_face(length=LENGTH):
    datasets = pytest.importorskip("datasets")
    data = datasets.Dataset.from_dict({"n": list(range(length))}).to_iterable_dataset(num_shards=3)
    return data.map(add_draw).filter(is_wanted)


def interleaved(length=LENGTH):
    datasets = pytest.importorskip("datasets")
    first, second, third = (
        datasets.Dataset.from_dict({"n": list(range(count))}).to_iterable_dataset(num_shards=3)
        for count in (length, 4, 5)
    )
    # Interleaving reads a sample ahead of each stream, so that draws must come after it.
    mixed = datasets.interleave_datasets([first.filter(is_wanted), second], probabilities=[0.7, 0.3], seed=1)
    return datasets.concatenate_datasets([mixed, third.map(as_is, batched=True, batch_size=2)]).map(add_draw)


def as_is(samples):
    return samples


def add_draw(sample):
    return {"double": 2 * sample["n"], "draw": random.random()}


def is_wanted(sample):
    return sample["n"] % 4 != 1


def from_torchdata(length=LENGTH):
    nodes = pytest.importorskip("torchdata.nodes")
    return nodes.Loader(nodes.Mapper(nodes.IterableWrapper(range(length)), double))


def from_sampler_node(length=LENGTH):
    nodes = pytest.importorskip("torchdata.nodes")
    sampler = nodes.SamplerWrapper(RandomSampler(length, seed=3), epoch_updater=lambda epoch: epoch + 1)
    return nodes.Loader(nodes.Mapper(sampler, double))


def from_stateful_loader(length=LENGTH):
    loader = pytest.importorskip("torchdata.stateful_dataloader").StatefulDataLoader
    return loader(list(range(length)), batch_size=None)


def double(number):
    return 2 * number, random.random()


STREAMS = {
    "skipping": (Numbers, True),
    "skipping, Hugging Face": (from_hugging_face, True),
    "own state": (Counting, False),
    "Hugging Face": (from_hugging_face, False),
    "Hugging Face, interleaved": (interleaved, False),
    "torchdata": (from_torchdata, False),
    "torchdata, sampled": (from_sampler_node, False),
    "torchdata, StatefulDataLoader": (from_stateful_loader, False),
}


def make(kind, batch_size=4, num_workers=0, length=LENGTH, **changes):
    make_dataset, skips = STREAMS[kind]
    changes = {"skips": skips, "seed": 7, "collate": list} | changes
    return StreamBatches(make_dataset(length), batch_size, num_workers=num_workers, **changes)


def take(batches, count):
    return [next(batches) for _ in range(count)]


def counts_of(batches):
    """Returns a position without the dataset's own state, which may hold the same position in several ways."""
    state = batches.state_dict()
    return state["sampler"]["epoch"], state["sampler"]["position"], state["ordinal"]


def through_json(state):
    return json.loads(json.dumps(state))


@pytest.mark.parametrize("kind", STREAMS)
@settings(max_examples=15, deadline=None)
@given(length=st.integers(3, 13), batch_size=st.integers(1, 6), cut=st.integers(0, 7), again=st.integers(0, 4))
def test_a_stream_resumed_anywhere_yields_exactly_the_rest(kind, length, batch_size, cut, again):
    whole = make(kind, batch_size, length=length)
    expected = take(whole, cut + again + 4)
    streams = [make(kind, batch_size, length=length) for _ in range(3)]
    assert take(streams[0], cut) == expected[:cut]
    streams[1].load_state_dict(through_json(streams[0].state_dict()))
    assert take(streams[1], again) == expected[cut : cut + again]
    streams[2].load_state_dict(through_json(streams[1].state_dict()))
    assert take(streams[2], 4) == expected[cut + again :]
    assert counts_of(streams[2]) == counts_of(whole)


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize(("before", "after"), [(0, 2), (2, 0)])
def test_a_stream_resumes_with_another_number_of_workers(kind, before, after):
    whole = make(kind)
    expected = take(whole, 9)
    first, second = make(kind, num_workers=before), make(kind, num_workers=after)
    try:
        assert take(first, 5) == expected[:5]
        second.load_state_dict(through_json(first.state_dict()))
        assert take(second, 4) == expected[5:]
        assert counts_of(second) == counts_of(whole)
    finally:
        first.close()
        second.close()


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("count", [2, 3, 7])
def test_slices_of_all_ranks_are_the_batches_of_one_process(kind, count):
    expected = take(make(kind, 5), 6)
    ranks = [make(kind, 5, rank=rank, world_size=count) for rank in range(count)]
    for number, batch in enumerate(expected):
        if number == 3:  # resumed on as many ranks, each from the state of another one
            state = through_json(ranks[0].state_dict())
            ranks = [make(kind, 5, rank=rank, world_size=count) for rank in range(count)]
            for each in ranks:
                each.load_state_dict(state)
        found = [next(each) for each in ranks]
        counted = [samples for samples, each in zip(found, ranks, strict=True) if each.weight]
        assert list(itertools.chain(*counted)) == batch
        assert sum(each.weight for each in ranks) == pytest.approx(count)
        assert all(found)  # every rank runs every step
        assert len({str(each.state_dict()) for each in ranks}) == 1


@pytest.mark.parametrize("kind", STREAMS)
@pytest.mark.parametrize("num_workers", [0, 1])
def test_seeking_delivers_the_same_batches_again_also_from_the_start(kind, num_workers):
    expected = take(make(kind), 5)
    batches = make(kind, num_workers=num_workers)
    try:
        start = batches.position()
        assert take(batches, 2) == expected[:2]
        second = batches.position()
        assert take(batches, 3) == expected[2:]
        batches.seek(second)
        assert batches.num_samples_total == 8
        assert take(batches, 2) == expected[2:4]
        batches.seek(start)
        assert take(batches, 5) == expected
    finally:
        batches.close()


def test_set_epoch_is_called_before_each_pass():
    batches = make("skipping", LENGTH)
    assert [{sample[0] for sample in batch} for batch in take(batches, 3)] == [{0}, {1}, {2}]
    assert batches.epoch == 3


def test_random_numbers_of_a_sample_do_not_depend_on_the_batch_size():
    def samples(size):
        return [sample for batch in take(make("skipping", size), 24 // size) for sample in batch]

    assert samples(2) == samples(4) == samples(12)
    assert len({sample[2] for sample in samples(2)}) == 24


def test_without_seeding_the_global_generators_are_left_alone():
    torch.manual_seed(0)
    expected = torch.rand(3)
    torch.manual_seed(0)
    take(StreamBatches(range(9), 3, skips=True, seed_samples=False), 4)
    assert torch.equal(torch.rand(3), expected)


JITTER = random.Random(0)


def jitter(samples):
    return [(*sample, JITTER.random()) for sample in samples]


def test_a_generator_of_collate_gives_the_same_numbers_after_a_resume():
    first, second = make("skipping", collate=jitter), make("skipping", collate=jitter)
    take(first, 2)
    second.load_state_dict(first.state_dict())
    after = take(first, 2)
    assert take(second, 2) == after


class Reusing:
    """Yields the same array each time, with the next number written to it."""

    def __iter__(self):
        array = np.zeros(1)
        for number in range(8):
            array[0] = number
            yield array


def test_a_sample_read_ahead_does_not_overwrite_the_last_of_a_batch():
    batches = StreamBatches(Reusing(), 1, skips=True, collate=lambda samples: float(samples[0][0]))
    assert take(batches, 9) == [*range(8), 0]


class Failing(Numbers):
    is_broken = True

    def __iter__(self):
        for number in range(self.length):
            if number == 5 and self.is_broken:
                raise OSError("the disk")
            yield number


def test_an_error_of_the_stream_names_its_position_and_leaves_that_of_the_batches():
    dataset = Failing()
    batches = StreamBatches(dataset, 5, skips=True, collate=list)
    assert next(batches) == [0, 1, 2, 3, 4]  # the error shows only when its sample is needed
    state = batches.state_dict()
    with pytest.raises(OSError, match="the disk") as caught:
        next(batches)
    assert caught.value.__notes__ == ["at position 5 of the stream Failing"]
    assert batches.state_dict() == state
    dataset.is_broken = False
    assert next(batches) == [5, 6, 7, 8, 9]


def test_an_error_in_a_worker_has_its_traceback():
    batches = StreamBatches(Failing(), 4, skips=True, collate=list, num_workers=1)
    next(batches)
    with pytest.raises(OSError, match="the disk") as caught:
        next(batches)
    assert "in a loader worker" in "".join(caught.value.__notes__)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (Numbers(0), "the stream is empty"),
        (iter(range(9)), "expected a stream that iter.. begins anew, found an iterator"),
    ],
)
def test_a_stream_that_cannot_be_read_is_an_error(dataset, message):
    with pytest.raises(ValueError, match=message):
        next(StreamBatches(dataset, 2, skips=True))


def test_skipping_ahead_in_a_stream_that_has_become_shorter_is_an_error():
    first, second = make("skipping"), make("skipping", length=5)
    take(first, 2)
    second.load_state_dict(first.state_dict())
    with pytest.raises(StreamError, match="the stream ended after 5 samples of epoch 0, expected more than the 8"):
        next(second)


def test_a_position_saved_with_skip_needs_skip_again_and_one_with_a_state_can_be_skipped_to():
    skipped, state = make("skipping, Hugging Face"), make("Hugging Face")
    expected = take(state, 4)
    take(skipped, 1)
    with pytest.raises(ValueError, match=r"data\.resume=skip"):
        make("Hugging Face").load_state_dict(skipped.state_dict())
    second = make("Hugging Face")
    take(second, 1)
    skipped.load_state_dict(second.state_dict())
    assert take(skipped, 3) == expected[1:]


def test_the_state_of_a_sampler_is_refused_and_the_next_epoch_can_be_begun():
    batches = make("skipping")
    state = {"sampler": {"epoch": 2, "position": 3, "sampler": "RandomSampler"}, "ordinal": 25}
    with pytest.raises(ValueError, match="expected the state of a stream, found that of a sampler"):
        batches.load_state_dict(state)
    batches.start_next_epoch(state)
    assert (batches.epoch, batches.num_samples_total) == (3, 25)
    assert [sample[:2] for sample in next(batches)] == [(3, 0), (3, 1), (3, 2), (3, 3)]


def test_a_shuffle_buffer_is_found_anywhere_in_the_chain():
    data = pytest.importorskip("datasets").Dataset.from_dict({"n": list(range(9))}).to_iterable_dataset(3)
    assert find_shuffle_buffer(data.map(add_draw)) is None
    assert find_shuffle_buffer(data.shuffle(seed=1, buffer_size=5).map(add_draw).filter(is_wanted)) == 5
    assert find_shuffle_buffer(Numbers()) is None


def test_a_hugging_face_stream_with_a_shuffle_buffer_is_exact_by_skipping():
    data = pytest.importorskip("datasets").Dataset.from_dict({"n": list(range(20))}).to_iterable_dataset(3)

    def make_batches():
        return StreamBatches(data.shuffle(seed=1, buffer_size=5), 3, skips=True, collate=list)

    expected = take(make_batches(), 12)
    first, second = make_batches(), make_batches()
    assert take(first, 8) == expected[:8]
    second.load_state_dict(first.state_dict())
    assert take(second, 4) == expected[8:]
    assert expected[:7] != [[{"n": n} for n in range(start, start + 3)] for start in range(0, 21, 3)]


class MapStyle:
    def __getitem__(self, index):
        return index

    def __len__(self):
        return 3


def test_streams_are_told_from_map_style_datasets():
    assert is_stream(Numbers())
    assert is_stream(range(3).__iter__())
    assert not is_stream(MapStyle())
    assert not is_stream([1, 2])
    assert not is_stream(torch.utils.data.TensorDataset(torch.zeros(2)))


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("length", [1, 8, 9, 37])
def test_an_evaluation_of_a_stream_has_the_batches_of_a_map_style_dataset(count, length):
    def passes(kind, dataset):
        return [list(kind(dataset, 4, 0, list, None, rank, count)) for rank in range(count)]

    streamed = passes(StreamEvaluation, Numbers(length))
    expected = passes(EvaluationData, list(range(length)))
    for stream, indexed in zip(streamed, expected, strict=True):
        assert [(number, size) for number, _, size in stream] == [(number, size) for number, _, size in indexed]
        for (_, samples, size), (_, indices, _) in zip(stream, indexed, strict=True):
            assert not size or [sample[1] for sample in samples] == indices


def test_passes_of_an_evaluation_are_equal_with_and_without_a_worker():
    data = [StreamEvaluation(Numbers(9), 4, num_workers, list, 5) for num_workers in (0, 2)]
    passes = [list(each) for each in data for _ in range(2)]
    assert passes[0] == passes[1] == passes[2] == passes[3]


def test_an_error_in_an_evaluation_names_the_batch():
    with pytest.raises(OSError, match="the disk") as caught:
        list(StreamEvaluation(Failing(), 4, 0, list, None))
    assert caught.value.__notes__ == ["in batch 1 of the stream Failing"]
