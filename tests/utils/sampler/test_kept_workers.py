"""Workers that an evaluation keeps return what new workers would, or they are not kept."""

import mmap
import os
import random

import numpy as np
import pytest
import torch
from torch import nn

from runner.utils.sampler import kept_workers
from runner.utils.sampler.batches import EvaluationData


class Indices:
    """The base of the datasets below; a sample begins with the process that fetched it."""

    offset = 0

    def __len__(self):
        return 9

    def __getitem__(self, index):
        return os.getpid(), index + self.offset, self.value()

    def value(self):
        return 0


class Counting(Indices):
    def __init__(self):
        self.count, self.seen = 0, [torch.zeros(2), np.zeros(2)]

    def value(self):
        self.count += 1
        self.seen[0] += 1
        self.seen[1] += self.count
        return self.count, self.seen[0].sum().item(), self.seen[1].sum().item()


class Drawing(Indices):
    def value(self):
        return random.random(), np.random.rand(), torch.rand(()).item()


class Generating(Indices):
    def __init__(self):
        self.generator = np.random.default_rng(3)

    def value(self):
        return self.generator.random()


class Transforming(Counting):
    """Has an attribute of torch's own way of pickling."""

    def __init__(self):
        super().__init__()
        self.transform = nn.Linear(1, 1)

    def value(self):
        with torch.no_grad():
            self.transform.bias += 1
            return *super().value(), (self.transform.bias - self.transform(torch.zeros(1))).item()


class Forgetful(Counting):
    def __getstate__(self):
        return {"count": 0}


class Removing(Indices):
    def __del__(self):
        pass


def with_attribute(make_value):
    def make():
        dataset = Counting()
        dataset.other = make_value()
        return dataset

    return make


def run_passes(dataset, seed, is_persistent, num_passes=3):
    """Returns the batches of each pass, without the processes, and the processes of each pass."""
    data = EvaluationData(dataset, 2, 2, list, seed, is_persistent=is_persistent)
    passes, processes = [], []
    try:
        for _ in range(num_passes):
            batches = list(data)
            passes.append([(number, [sample[1:] for sample in batch], size) for number, batch, size in batches])
            processes.append({sample[0] for _, batch, _ in batches for sample in batch})
            dataset.offset += 10  # by this process, as a report may
    finally:
        data.close()
    return passes, processes


@pytest.mark.parametrize("seed", [None, 5])
@pytest.mark.parametrize("kind", [Counting, Drawing, Transforming])
def test_kept_workers_begin_each_pass_as_new_workers_do(kind, seed):
    expected, new = run_passes(kind(), seed, is_persistent=False)
    found, kept = run_passes(kind(), seed, is_persistent=None)
    assert found == expected
    assert kept[0] == kept[1] == kept[2]
    assert not new[0] & new[1]


def test_generators_that_are_reseeded_for_each_sample_do_not_keep_workers_from_being_kept():
    expected, _ = run_passes(Generating(), 5, is_persistent=False)
    found, kept = run_passes(Generating(), 5, is_persistent=None)
    assert found == expected
    assert kept[0] == kept[1]


@pytest.mark.parametrize(
    "make",
    [
        Generating,
        Forgetful,
        Removing,
        with_attribute(lambda: lambda: None),
        with_attribute(lambda: torch.zeros(2000)),
        with_attribute(lambda: torch.zeros(2000)[:1]),
        with_attribute(lambda: torch.zeros(2).share_memory_()),
        with_attribute(lambda: np.zeros(2000)),
        with_attribute(lambda: np.frombuffer(mmap.mmap(-1, 8))),
        with_attribute(lambda: [str(number) for number in range(2000)]),
    ],
    ids=["generator", "getstate", "del", "lambda", "tensor", "view", "shared", "array", "mapped", "texts"],
)
def test_workers_are_not_kept_if_a_copy_of_the_dataset_may_differ_or_is_large(make, monkeypatch):
    monkeypatch.setattr(kept_workers, "MOST_BYTES", 6000)
    expected, _ = run_passes(make(), None, is_persistent=False, num_passes=2)
    found, processes = run_passes(make(), None, is_persistent=None, num_passes=2)
    assert found == expected
    assert not processes[0] & processes[1]
