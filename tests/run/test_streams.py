"""Runs on streams and mixes: resumed bit for bit, on other numbers of ranks and loader workers."""

import json

import pytest
import torch
from conftest import WORKER_MODULES, shared_zygote
from ranks import Ranks
from run_comparison import assert_same_run, read_untimed_metrics

STREAMS = """
import random

import torch


class Stream(torch.utils.data.IterableDataset):
    # yields the sample of a number, with a draw; shuffled by the epoch
    def __init__(self, length=21):
        self.length = length
        self.epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        for number in random.Random(self.epoch).sample(range(self.length), self.length):
            yield make_sample(number)


class Loader(torch.utils.data.DataLoader):
    def __init__(self, length):
        super().__init__(list(range(length)), batch_size=4)


class Short(Stream):
    def __iter__(self):
        return iter(())


def make_sample(number):
    x = torch.tensor([number, number % 2, number % 3, 1.0]) / 10
    return {"x": x + 0.01 * random.random(), "y": x.sum()[None]}


def from_hugging_face(files, shuffled=False):
    import datasets

    data = datasets.load_dataset("json", data_files=files, split="train", streaming=True)
    if shuffled:
        data = data.shuffle(seed=1, buffer_size=4)
    return data.map(add_tensors, remove_columns=["number"]).filter(is_wanted)


def add_tensors(row):
    sample = make_sample(row["number"])
    return {"x": sample["x"].numpy(), "y": sample["y"].numpy()}


def is_wanted(row):
    return row["y"][0] < 3.5


def split(files):
    from datasets.distributed import split_dataset_by_node

    return split_dataset_by_node(from_hugging_face(files), 0, 2)


def from_torchdata(length=21):
    from torchdata import nodes

    return nodes.Loader(nodes.Mapper(nodes.IterableWrapper(range(length)), make_sample))


def node(length=21):
    from torchdata import nodes

    return nodes.IterableWrapper(range(length))


class Numbers:
    def __init__(self, first, length):
        self.first, self.length = first, length

    def __len__(self):
        return self.length

    def __getitem__(self, index):
        assert 0 <= index < self.length
        return make_sample(self.first + index)


class Ordered(Numbers, torch.utils.data.IterableDataset):
    def __init__(self):
        super().__init__(0, 21)

    def __iter__(self):
        return map(self.__getitem__, range(21))


def plain(samples):
    # of samples without their draw
    batch = collate(samples)
    return {key: (10 * value).round() for key, value in batch.items()}


def collate(samples):
    # of tensors, arrays and lists, as the streams have them
    return {key: torch.stack([torch.as_tensor(sample[key], dtype=torch.float32) for sample in samples]) for key in "xy"}
"""
KINDS = {
    "own": ["data.train={_target_: streams.Stream}", "data.resume=skip"],
    "Hugging Face": ["data.train={_target_: streams.from_hugging_face, files: [a.jsonl, b.jsonl]}"],
    "torchdata": ["data.train={_target_: streams.from_torchdata}"],
    "mix": [
        "data.train=null",
        "data.mix={a: {dataset: {_target_: streams.Numbers, first: 0, length: 9}, weight: 3}, "
        "b: {dataset: {_target_: streams.Numbers, first: 50, length: 5}}}",
    ],
}
SLOW = ["own", "torchdata"]
EXTRAS = {"Hugging Face": "datasets", "torchdata": "torchdata"}
HEADER = """# @package _global_
defaults: [override /model: null, override /data: null, override /report: null]
name: mine
model: {_target_: own.Model, dropout: 0}
data: {eval: null, collate: {_target_: streams.collate}, batch_size: 8, num_workers: 0}
optimizer: {lr: 1.0e-2}
scheduler: {warmup_steps: 3}
trainer: {steps: 12, log_every: 1, save_every: 12, eval_every: 0, export_every: 0, keep_last: 0}
"""
STARTS = ["--config-dir", "conf", "experiment=mine", "distributed.timeout_s=60"]


@pytest.fixture
def streaming(project):
    (project.folder / "streams.py").write_text(STREAMS)
    for name, numbers in (("a", range(11)), ("b", range(11, 30))):
        lines = [json.dumps({"number": number}) for number in numbers]
        (project.folder / f"{name}.jsonl").write_text("\n".join(lines))
    (project.folder / "conf" / "experiment" / "mine.yaml").write_text(HEADER)
    return project


@pytest.mark.parametrize(
    "kind", ["Hugging Face", "mix", *(pytest.param(kind, marks=pytest.mark.slow) for kind in SLOW)]
)
def test_a_run_resumes_bit_for_bit_with_other_numbers_of_workers(streaming, kind):
    pytest.importorskip(EXTRAS.get(kind, "torch"))
    streaming.run("hydra.run.dir=whole", *KINDS[kind])
    streaming.run("hydra.run.dir=cut", *KINDS[kind], "data.num_workers=2", typed="quit@4\n")
    streaming.run("resume=cut", "data.num_workers=0", typed="quit@9\n")
    streaming.run("resume=cut", "data.num_workers=1")
    assert_same_run(streaming.folder / "whole", streaming.folder / "cut", 12)


@pytest.fixture
def zygote():
    return shared_zygote(*WORKER_MODULES)


@pytest.mark.parametrize("kind", [pytest.param("Hugging Face", marks=pytest.mark.slow), "mix"])
def test_a_run_of_one_process_resumes_on_two_ranks(streaming, zygote, kind):
    pytest.importorskip(EXTRAS.get(kind, "torch"))
    streaming.run("hydra.run.dir=whole", *KINDS[kind])
    streaming.run("hydra.run.dir=cut", *KINDS[kind], typed="quit@5\n")
    Ranks(zygote).run(streaming.folder, 2, *STARTS, "resume=cut", "distributed=ddp", "data.num_workers=1")
    numbers = [
        torch.tensor([line["train/loss"] for line in read_untimed_metrics(streaming.folder / run)])
        for run in ("whole", "cut")
    ]
    torch.testing.assert_close(*numbers, rtol=0, atol=1e-5)
    facts = [json.loads((streaming.folder / run / CHECKPOINT).read_text())["batches"] for run in ("whole", "cut")]
    assert facts[0]["ordinal"] == facts[1]["ordinal"] == 96
    assert facts[0]["sampler"]["position"] == facts[1]["sampler"]["position"]


CHECKPOINT = "checkpoints/step_00000012/trainer.json"


def test_notes_at_the_start_name_what_a_stream_does_not_do(streaming):
    pytest.importorskip("datasets")
    stream = "data.train={_target_: streams.from_hugging_face, files: a.jsonl, shuffled: true}"
    printed = streaming.run(stream, "trainer.steps=1", "data.num_workers=2")
    assert "data.train (IterableDataset) is a stream: it is read in its own order, and sampler is not used" in printed
    assert "data.num_workers=2: one worker reads the stream, because it has one order" in printed
    assert "its state lacks the samples in its shuffle buffer, up to 4 (datasets#7444)" in printed
    printed = streaming.run(stream, "trainer.steps=1", "data.resume=skip")
    assert "data.resume=skip: a resumed run reads data.train (IterableDataset) again up to its position" in printed
    assert "shuffle buffer" not in printed


def test_a_stream_is_evaluated_in_batches_of_its_own_order(streaming):
    evaluated = []
    nodes = {"map": "{_target_: streams.Numbers, first: 0, length: 21}", "stream": "{_target_: streams.Ordered}"}
    for name, node in nodes.items():
        settings = ["data.seed_samples=false", "trainer.steps=2", "trainer.eval_every=2", f"hydra.run.dir={name}"]
        streaming.run(*KINDS["mix"], f"data.eval={node}", "data.collate={_target_: streams.plain}", *settings)
        evaluated.append(read_untimed_metrics(streaming.folder / name))
    assert evaluated[0] == evaluated[1]
    assert any("eval/loss" in line for line in evaluated[0])


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["data.train={_target_: streams.Stream}"], "found Stream without them; add them, or set data.resume=skip"),
        (["data.train={_target_: streams.node}"], "found IterableWrapper without them; wrap this node of torchdata"),
        (["data.train={_target_: streams.Loader, length: 9}"], "expected samples, found the batches of a Loader"),
        (
            ["data.train={_target_: streams.split, files: a.jsonl}"],
            "expected the whole stream, found the share of one rank",
        ),
        (["data.train={_target_: streams.Short}", "data.resume=skip"], "the stream is empty"),
        (
            [*KINDS["torchdata"], "data.eval={_target_: streams.Short}", "trainer.eval_every=5"],
            "data.eval: the dataset is empty",
        ),
        ([*KINDS["torchdata"], "sampler=pool"], "sampler=PoolSampler: expected sampler=random, the default, which is"),
        ([*KINDS["mix"], "sampler=batched_ordered"], "data.mix (Mix) has its own order"),
        ([*KINDS["mix"], "data.mix.a.weight=0"], "data.mix.a.weight=0: expected a finite number above 0"),
        ([*KINDS["mix"], "data.mix.a.wieght=2"], "data.mix.a.wieght: no such key; did you mean weight?"),
        (
            [*KINDS["mix"], "data.mix.a.dataset._target_=streams.Nombers"],
            "streams has no 'Nombers'; did you mean Numbers?",
        ),
        ([*KINDS["mix"], "data.mix.a.dataset.length=0"], "data.mix.a.dataset: the dataset is empty"),
        (
            ["data.train=null", "data.mix={a: {dataset: {_target_: streams.Stream}}}"],
            "found the stream Stream; mix streams",
        ),
        ([KINDS["mix"][1], "data.train={_target_: streams.Stream}"], "data.mix: it takes the place of data.train"),
        (["data.train=null"], "data.train: nothing is chosen"),
        ([*KINDS["torchdata"], "data.prefetch_factor=4"], "data.prefetch_factor=4: data.num_workers=0 has no worker"),
        ([*KINDS["torchdata"], "data.resume=skipp"], "data.resume=skipp: expected one of state, skip"),
    ],
)
def test_a_mistake_is_one_message(streaming, overrides, expected):
    printed = streaming.run(*overrides, status=(1, 2))
    assert expected in printed
    assert "Traceback" not in printed
