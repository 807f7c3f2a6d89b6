"""A batch on its way from a loader worker arrives as it was made."""

import pickle
from multiprocessing.reduction import ForkingPickler
from typing import NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.utils.sampler import OrderedSampler, packing
from runner.utils.sampler.batches import Batches, EvaluationData
from runner.utils.sampler.packing import MAX_BYTES, PackedBatch
from runner.utils.sampler.stream import StreamBatches

DTYPES = [torch.bool, torch.uint8, torch.int64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64]


def send(batch):
    return pickle.loads(pickle.dumps(PackedBatch(batch)))


def layout(tensor):
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.requires_grad, type(tensor)


def bits(tensor):
    return bytes(tensor.detach().untyped_storage())


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(DTYPES), st.lists(st.integers(0, 3), max_size=3), st.booleans())
def test_tensors_arrive_with_their_bits_and_strides(dtype, sizes, is_transposed):
    tensor = torch.randint(0, 2, (*sizes, 16), dtype=torch.uint8).view(dtype)
    tensor = tensor[1:].t() if is_transposed and tensor.dim() == 2 else tensor
    (found,) = send([tensor])
    assert layout(found) == layout(tensor)
    assert bits(found) == bits(tensor)


def test_tensors_that_share_memory_go_on_sharing_it():
    whole = torch.arange(8.0)
    batch = send({"ids": whole, "labels": whole, "tail": whole[3:]})
    assert batch["ids"] is batch["labels"]
    batch["ids"][3] = -1
    assert batch["tail"][0] == -1


def test_tensors_are_aligned_as_torch_aligns_them():
    batch = send([torch.arange(length, dtype=torch.uint8) for length in range(1, 40)])
    assert {tensor.data_ptr() % 64 for tensor in batch} == {0}


def test_only_small_tensors_are_part_of_the_message():
    small, large = torch.arange(4), torch.zeros(MAX_BYTES + 1, dtype=torch.uint8)
    found = send([small, large, large[:1], torch.zeros(MAX_BYTES - 32, dtype=torch.uint8), small + 1])
    assert [tensor.is_shared() for tensor in found] == [False, True, True, False, True]
    assert found[1].untyped_storage().data_ptr() == found[2].data_ptr()
    assert len(pickle.dumps(PackedBatch([large]))) < 1000


def test_a_large_storage_at_the_address_of_a_small_one_is_no_part_of_the_message():
    large = torch.zeros(MAX_BYTES + 1, dtype=torch.uint8)
    small = torch.from_numpy(large.numpy()[:4])  # a storage of its own, in the memory of the large one
    assert small.data_ptr() == large.data_ptr()
    assert [tensor.is_shared() for tensor in send([small, large])] == [False, True]


def test_large_arrays_arrive_as_they_were_and_are_copied_once():
    array = np.arange(2**19, dtype=np.float32).reshape(2, -1)
    batch = [array, array, array[:, ::2], array.T, np.ones(3)]
    packed = PackedBatch(batch)
    assert len(packed._message) < 1.2 * array[:, ::2].nbytes  # only an array with gaps is part of it
    expected = [part.copy(order="K") for part in batch]
    array += 1
    found = pickle.loads(pickle.dumps(packed))
    assert found[0] is found[1]
    for part, other in zip(found, expected, strict=True):
        assert np.array_equal(part, other)
        assert (part.dtype, part.flags.writeable) == (other.dtype, True)


class Point(NamedTuple):
    x: torch.Tensor
    y: np.ndarray


KINDS = {
    "a named tuple": lambda: Point(torch.ones(2), np.ones(2)),
    "a gradient": lambda: torch.ones(2, requires_grad=True),
    "a parameter": lambda: torch.nn.Parameter(torch.ones(2)),
    "conjugated": lambda: torch.ones(2, dtype=torch.complex64).conj(),
    "sparse": lambda: torch.eye(2).to_sparse(),
    "empty": lambda: torch.empty(0, 3),
    "texts": lambda: {"text": ["one", "two"], "number": 3},
}


@pytest.mark.filterwarnings("ignore:.*:UserWarning", "ignore:.*:DeprecationWarning")
@pytest.mark.parametrize("kind", KINDS)
def test_other_parts_arrive_as_torch_sends_them(kind):
    batch = KINDS[kind]()
    found, expected = send(batch), pickle.loads(ForkingPickler.dumps(batch))
    assert type(found) is type(expected)
    assert repr(found) == repr(expected)
    assert getattr(found, "requires_grad", None) == getattr(expected, "requires_grad", None)


class Unsendable:
    def __init__(self, length=4):
        self.length = length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        return lambda: index


def test_a_batch_that_cannot_be_sent_is_an_error_at_its_delivery():
    batches = Batches(Unsendable(), OrderedSampler(4), 2, num_workers=1, collate=list)
    try:
        with pytest.raises(Exception, match="lambda") as raised:
            next(batches)
        assert any("in sending a batch from its loader worker" in note for note in raised.value.__notes__)
        assert batches.state_dict()["ordinal"] == 0
    finally:
        batches.close()


def test_small_tensors_of_workers_need_no_shared_memory():
    """Also those of streams and evaluations."""
    numbers = [torch.full((2,), float(number)) for number in range(8)]

    class Stream:
        def __iter__(self):
            return iter(numbers)

    training = Batches(numbers, OrderedSampler(8), 4, num_workers=1)
    stream = StreamBatches(Stream(), 4, skips=True, num_workers=1)
    evaluation = EvaluationData(numbers, 4, 1, None, 0)
    try:
        batches = [next(training), next(stream), next(iter(evaluation))[1]]
    finally:
        training.close()
        stream.close()
    for batch in batches:
        assert torch.equal(batch, torch.stack(numbers[:4]))
        assert not batch.is_shared()


def test_the_limit_is_of_all_small_tensors_of_a_batch(monkeypatch):
    monkeypatch.setattr(packing, "MAX_BYTES", 64)
    assert [tensor.is_shared() for tensor in send([torch.zeros(8) for _ in range(4)])] == [False, False, True, True]
