"""The chapters of Python's reference as data, and experiment=finetune: adapters on an export of a GPT."""

import pickle
import shutil

import pytest
import torch
from choices import Choices, assert_resumes_exactly, load_parts

from runner.examples.documentation import Documentation, read_chapters
from runner.utils import io

SIZE = ["model.width=16", "model.depth=1", "model.heads=2", "data.train.context=32", "distributed.device=cpu"]
BASE = [*SIZE, "trainer.steps=2", "trainer.export_every=2", "trainer.eval_every=0", "hydra.run.dir=base"]
TUNED = ["experiment=finetune", "init.path=base/exports/model.safetensors", *SIZE, "data.eval.max_windows=4"]
TUNED += ["trainer.steps=5", "trainer.save_every=5", "trainer.eval_every=5", "trainer.log_every=1", "data.batch_size=4"]


@pytest.mark.parametrize("split", ["train", "validation"])
def test_windows_hold_exactly_the_bytes_of_the_chapters(split):
    dataset = Documentation(split, 256)
    stream = bytes(torch.cat([dataset[index]["window"][:-1] for index in range(len(dataset))]).tolist())
    chapters = [text.encode() for text in read_chapters().values()]
    parts = stream.split(b"\0")
    assert len(parts) > 5
    assert all(any(chapter.startswith(part) for chapter in chapters) for part in parts)
    assert pickle.loads(pickle.dumps(dataset))[3]["window"].equal(dataset[3]["window"])


def test_the_splits_share_no_chapter_and_hold_all():
    sizes = [len(Documentation(split, 1)) + 1 for split in ("train", "validation")]
    assert sum(sizes) == sum(len(text.encode()) + 1 for text in read_chapters().values())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"split": "test"}, "split is one of train, validation"),
        ({"context": 0}, "context is a whole number from 1"),
        ({"max_windows": 0}, "max_windows is a whole number from 1"),
        ({"validation_fraction": 2}, "validation_fraction is 0 to 1"),
        ({"validation_fraction": 1}, "less than one window"),
    ],
)
def test_a_mistake_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        Documentation(**settings)


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The folder of a run of the default experiment, with an export."""
    project = Choices(tmp_path_factory.mktemp("base"))
    project.run(*BASE)
    return project.folder / "base"


def test_an_interrupted_fine_tuning_equals_the_uninterrupted_one_and_trains_adapters_alone(tmp_path, base):
    shutil.copytree(base, tmp_path / "base")
    assert_resumes_exactly(Choices(tmp_path), 1, 5, *TUNED)
    exported = io.load(base / "exports" / "model.safetensors")
    saved = load_parts(tmp_path / "cut", 5)["model"]
    assert all(torch.equal(saved[name], value) for name, value in exported.items())
    assert saved["blocks.0.qkv.lora_b"].any()


def test_the_path_is_needed(tmp_path):
    printed = Choices(tmp_path).run("experiment=finetune", status=2)
    assert "init.path: has no value; set it in the YAML or on the command line" in printed
