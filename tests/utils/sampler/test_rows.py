"""Batches of a TensorDataset are indexed; they equal what torch collates of its samples."""

import multiprocessing
import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, Subset, TensorDataset, default_collate
from torch.utils.data._utils.collate import default_collate_fn_map

from runner.utils.distributed import seed_all
from runner.utils.sampler import OrderedSampler, RandomSampler
from runner.utils.sampler.batches import Batches, EvaluationData
from runner.utils.sampler.rows import _DTYPES, MOST_IDENTIFIED_BYTES, fetch_rows, has_rows, identify_rows

SIZES = st.lists(st.integers(0, 3), max_size=4)


def layout(tensor):
    return tensor.dtype, tensor.shape, tensor.stride(), tensor.storage_offset(), tensor.requires_grad, type(tensor)


def assert_same(found, expected):
    assert type(found) is type(expected) is list
    assert list(map(layout, found)) == list(map(layout, expected))
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one.contiguous().view(-1).view(torch.uint8), other.contiguous().view(-1).view(torch.uint8))


def noise(sizes, dtype):
    return torch.randint(0, 256, (*sizes, 16), dtype=torch.uint8).view(dtype)[..., 0].clone()


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(sorted(_DTYPES, key=str)), SIZES, st.lists(st.integers(0, 8), min_size=1, max_size=6))
def test_rows_are_the_collated_samples_bit_for_bit(dtype, sizes, indices):
    tensor = torch.zeros(9, *sizes, dtype=dtype) if dtype is torch.bool else noise((9, *sizes), dtype)
    dataset = TensorDataset(tensor, torch.arange(9))
    found = fetch_rows(dataset, indices)
    assert found is not None
    assert_same(found, default_collate([dataset[index] for index in indices]))


def offset(tensor):
    return torch.cat([tensor, tensor])[9:]


LAYOUTS = {
    "in the memory of another": offset,
    "channels last": lambda tensor: tensor.to(memory_format=torch.channels_last),
    "with a gradient": lambda tensor: tensor.clone().requires_grad_(),
    "transposed": lambda tensor: tensor.transpose(1, 3),
    "expanded": lambda tensor: tensor[:1].expand(9, -1, -1, -1),
    "a parameter": torch.nn.Parameter,
    "conjugated": lambda tensor: tensor.to(torch.complex64).conj(),
    "sparse": lambda tensor: tensor.to_sparse(),
    "one channel with a stride of its own": lambda tensor: (
        tensor[:, :1].clone().as_strided((9, 1, 4, 4), (16, 7, 4, 1))
    ),
}


@pytest.mark.parametrize("kind", LAYOUTS)
def test_batches_of_any_tensor_are_those_of_torchs_loader(kind):
    tensor = LAYOUTS[kind](torch.randn(9, 2, 4, 4))
    dataset = TensorDataset(tensor, torch.arange(9))
    batches = Batches(dataset, OrderedSampler(9), 3, seed_samples=False)
    try:
        expected = list(DataLoader(dataset, 3))
    except Exception as error:
        with pytest.raises(type(error)):
            next(batches)
        return
    for batch in expected:
        found = next(batches)
        assert list(map(layout, found)) == list(map(layout, batch))
        assert all(torch.equal(*parts) for parts in zip(found, batch, strict=True))


def double(samples):
    return default_collate(samples)


class Doubled(TensorDataset):
    def __getitem__(self, index):
        return tuple(2 * part for part in super().__getitem__(index))


def test_only_what_torch_defines_is_indexed(monkeypatch):
    rows = TensorDataset(torch.arange(6.0))
    assert has_rows(rows, default_collate)
    assert has_rows(Subset(Subset(rows, [5, 3, 1]), range(2)), default_collate)
    assert not has_rows(Doubled(torch.arange(6.0)), default_collate)
    assert not has_rows(Subset(Doubled(torch.arange(6.0)), [1]), default_collate)
    assert not has_rows(ConcatDataset([rows]), default_collate)
    assert not has_rows(rows, double)
    monkeypatch.setitem(default_collate_fn_map, tuple, lambda batch, *, collate_fn_map: "their own")
    assert not has_rows(rows, default_collate)
    assert next(Batches(rows, OrderedSampler(6), 2)) == "their own"


@pytest.mark.parametrize("index", [-1, torch.tensor(3), True, slice(0, 2), np.int64(3)], ids=repr)
def test_indices_that_are_no_plain_positions_select_what_the_dataset_gives_for_them(index):
    dataset = TensorDataset(torch.arange(12.0).view(6, 2))
    (batch,) = next(Batches(dataset, Fixed([index]), 1, seed_samples=False))
    (expected,) = default_collate([dataset[index]])
    assert torch.equal(batch, expected)


class Fixed:
    """A sampler that yields the same indices in each epoch."""

    def __init__(self, indices):
        self.indices = indices

    def __iter__(self):
        return iter(self.indices)

    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize("dataset", [TensorDataset(torch.arange(6)), Subset(TensorDataset(torch.arange(9)), range(6))])
def test_an_index_out_of_range_is_named_with_its_position(dataset):
    batches = Batches(dataset, Fixed([1, 2, 3, 7]), 4)
    with pytest.raises(IndexError) as raised:
        next(batches)
    assert raised.value.__notes__ == [f"at index 7 of the dataset {type(dataset).__name__}, position 3 of the order"]
    assert batches.state_dict()["ordinal"] == 0


def test_tensors_that_are_exchanged_or_written_to_are_read_as_they_are():
    dataset = TensorDataset(torch.zeros(4))
    batches = Batches(dataset, OrderedSampler(4), 2)
    assert next(batches)[0].tolist() == [0, 0]
    dataset.tensors[0].fill_(1)
    assert next(batches)[0].tolist() == [1, 1]
    dataset.tensors = (torch.full((4,), 2.0, requires_grad=True),)
    assert next(batches)[0].requires_grad


def test_batches_own_their_memory():
    dataset = TensorDataset(torch.zeros(4))
    next(Batches(dataset, OrderedSampler(4), 2))[0].fill_(1)
    assert dataset.tensors[0].tolist() == [0, 0, 0, 0]


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("width", [3, 40_000], ids=["small", "large"])
def test_batches_resume_alike_with_and_without_workers(num_workers, width):
    dataset = Subset(TensorDataset(torch.arange(7.0 * width).view(7, width), torch.arange(7)), [6, 0, 2, 4, 5])

    def make(count):
        return Batches(dataset, RandomSampler(5, seed=1), 3, num_workers=count)

    plain = Batches(dataset, RandomSampler(5, seed=1), 3, collate=double)
    expected = [next(plain) for _ in range(5)]
    first, second = make(num_workers), make(2 - num_workers)
    try:
        found = [next(first) for _ in range(2)]
        second.load_state_dict(first.state_dict())
        found += [next(second) for _ in range(3)]
    finally:
        first.close()
        second.close()
    for one, other in zip(found, expected, strict=True):
        assert_same(one, other)


def test_no_generator_is_moved():
    seed_all(1, torch.device("cpu"))
    expected = torch.rand(()).item(), random.random(), np.random.rand()
    seed_all(1, torch.device("cpu"))
    next(Batches(TensorDataset(torch.arange(4)), OrderedSampler(4), 2))
    assert (torch.rand(()).item(), random.random(), np.random.rand()) == expected


def test_evaluations_are_indexed_alike():
    dataset = TensorDataset(torch.arange(5.0))
    plain, indexed = (list(EvaluationData(dataset, 2, 0, collate, 3)) for collate in (double, None))
    assert [(number, count) for number, _, count in indexed] == [(number, count) for number, _, count in plain]
    for (_, one, _), (_, other, _) in zip(indexed, plain, strict=True):
        assert_same(one, other)


def write_with_numpy(dataset, array):
    array[5] = -1


def write_to_data(dataset, array):
    dataset.dataset.tensors[0].data[5] = -1


def write_in_place(dataset, array):
    dataset.dataset.tensors[0][5] = -1


def replace_tensors(dataset, array):
    dataset.dataset.tensors = (torch.zeros(9, 2),)


def change_indices(dataset, array):
    dataset.indices[2] = 0


def do_nothing(dataset, array):
    pass


@pytest.mark.parametrize(
    "change", [do_nothing, write_with_numpy, write_to_data, write_in_place, replace_tensors, change_indices]
)
def test_workers_of_an_evaluation_are_kept_until_a_row_changes(change):
    array = np.arange(18, dtype=np.float32).reshape(9, 2)
    dataset = Subset(TensorDataset(torch.from_numpy(array)), [8, 7, 5, 5, 1])
    data = EvaluationData(dataset, 2, 2, None, 5, is_persistent=None)
    try:
        first = [batch for _, batch, _ in data]
        workers = multiprocessing.active_children()
        change(dataset, array)
        second = [batch for _, batch, _ in data]
        assert (multiprocessing.active_children() == workers) == (change is do_nothing)
    finally:
        data.close()
    expected = [batch for _, batch, _ in EvaluationData(dataset, 2, 0, None, 5)]
    for found, batch in zip(second, expected, strict=True):
        assert_same(found, batch)
    is_equal = all(torch.equal(one[0], other[0]) for one, other in zip(first, second, strict=True))
    assert is_equal == (change is do_nothing)


@pytest.mark.parametrize(
    ("dataset", "collate"),
    [
        (TensorDataset(torch.zeros(MOST_IDENTIFIED_BYTES // 4 + 1)), None),
        (Subset(TensorDataset(torch.zeros(2)), [0] * (MOST_IDENTIFIED_BYTES // 8)), None),
        (Subset(TensorDataset(torch.zeros(2)), np.arange(2)), None),
        (Subset(TensorDataset(torch.zeros(2)), [True]), None),
        (TensorDataset(torch.nn.Parameter(torch.zeros(2))), None),
        (TensorDataset(torch.zeros(2)), list),
        (ConcatDataset([TensorDataset(torch.zeros(2))]), None),
    ],
    ids=["large", "many indices", "array of indices", "other indices", "parameter", "collate", "other dataset"],
)
def test_rows_that_are_large_or_may_run_code_are_not_identified(dataset, collate):
    assert identify_rows(dataset, collate) is None
