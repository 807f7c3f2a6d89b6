"""Experiments of a newcomer: an empty folder, YAML alone, and libraries from PyPI. Each is cut and resumed.

The files are in `newcomer/`, beside programs that do the same with Lightning and with Hugging Face's Trainer.
"""

import csv
import importlib
import shutil
import sys
import warnings
from pathlib import Path

import pytest
import torch
from conftest import Project, read_metrics
from run_comparison import assert_same_run

FILES = Path(__file__).parent / "newcomer"
QUIET = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_DISABLE_PROGRESS_BARS": "1", "WANDB_SILENT": "true"}

# For a machine whose torch has no torchvision: the model and the images of classifier.yaml in torch alone.
PLAIN_MODEL = """{_target_: torch.nn.Sequential, _args_: [
  {_target_: torch.nn.Conv2d, in_channels: 3, out_channels: 8, kernel_size: 3},
  {_target_: torch.nn.BatchNorm2d, num_features: 8}, {_target_: torch.nn.ReLU},
  {_target_: torch.nn.AdaptiveAvgPool2d, output_size: 1}, {_target_: torch.nn.Flatten},
  {_target_: torch.nn.Linear, in_features: 8, out_features: 10}]}"""
PLAIN_IMAGES = """{_target_: torch.utils.data.TensorDataset, _args_: [
  {_target_: torch.rand, size: [%d, 3, 32, 32]}, {_target_: torch.randint, high: 10, size: [%d]}]}"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, value in QUIET.items():
        monkeypatch.setenv(name, value)
    shutil.copytree(FILES / "experiment", tmp_path / "conf" / "experiment")
    return tmp_path


class Newcomer(Project):
    """A folder with the YAML of an experiment alone; runs are forked after slow imports."""

    command = property(lambda self: [sys.executable, "-m", "runner", "--config-dir", "conf"])

    def __init__(self, folder, *modules):
        self.folder, self.loaded = folder, modules

    def run_whole_and_cut(self, name, at_step):
        """Runs an experiment twice: in `whole` to its end, and in `cut` with an interruption."""
        self.run(f"experiment={name}", "hydra.run.dir=whole")
        printed = self.run(f"experiment={name}", "hydra.run.dir=cut", typed=f"quit@{at_step}\n")
        assert f"Quit at step {at_step}" in printed
        self.run("resume=cut")
        return self.folder / "whole", self.folder / "cut"


def require(*modules):
    for module in modules:
        try:
            importlib.import_module(module)
        # RuntimeError: torchvision beside a torch that it was not built for
        except (ImportError, RuntimeError) as error:
            pytest.skip(f"{module} can't be imported: {error}")


def use_plain_images(folder):
    path = folder / "conf" / "experiment" / "classifier.yaml"
    lines = path.read_text().splitlines()
    kept = [line for line in lines if not line.lstrip().startswith(("model:", "train:", "eval:"))]
    images = {size: PLAIN_IMAGES % (size, size) for size in (512, 90, 70)}
    position = kept.index("data:") + 1
    kept[position:position] = [f"  train: {images[512]}", f"  eval: {{near: {images[90]}, far: {images[70]}}}"]
    path.write_text("\n".join([*kept, f"model: {PLAIN_MODEL}"]))


@pytest.mark.slow
@pytest.mark.parametrize("is_plain", [True, False], ids=["torch", "timm"])
def test_a_classifier_with_metrics_on_two_evaluation_sets_early_stopping_and_trackers(folder, is_plain):
    modules = ["torchmetrics.classification", *([] if is_plain else ["timm", "torchvision"])]
    require("wandb", *modules)
    if is_plain:
        use_plain_images(folder)
    whole, cut = Newcomer(folder, *modules).run_whole_and_cut("classifier", 7)
    evaluations = [line for line in read_metrics(whole) if "eval/near/f1" in line]
    scores = [line["eval/near/f1"] for line in evaluations]
    best = scores.index(max(scores))
    last_step = evaluations[-1]["step"]
    # It stops three evaluations after the best one, and that one's checkpoint is kept.
    assert len(scores) == best + 4 or last_step == 60
    assert (whole / "checkpoints" / f"step_{evaluations[best]['step']:08d}").is_dir()
    assert {"eval/far/accuracy", "eval/far/f1", "eval/near/loss"} <= evaluations[0].keys()
    assert_same_run(whole, cut, last_step)
    with (cut / "metrics.csv").open() as file:
        rows = [float(row["eval/near/f1"]) for row in csv.DictReader(file) if row["eval/near/f1"]]
    assert rows == scores
    assert list(cut.glob("wandb/offline-run-*/*.wandb"))
    assert list(cut.glob("events.out.tfevents.*"))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lm", "adapter"])
def test_a_language_model_on_a_stream_is_exported_for_from_pretrained(folder, name):
    modules = ["transformers.models.gpt2.modeling_gpt2", "datasets.iterable_dataset", "peft.tuners.lora"]
    require(*modules)
    whole, cut = Newcomer(folder, *modules).run_whole_and_cut(name, 17)
    assert_same_run(whole, cut, 40)
    tokens = torch.tensor([[40, 50, 60, 70]])
    loaded = load(name, cut / "exports" / "model")
    expected = build_from_checkpoint(cut)
    with torch.no_grad():
        assert torch.equal(loaded(input_ids=tokens).logits, expected(input_ids=tokens).logits)


def load(name, export):
    """Returns the model that transformers or peft loads from an export."""
    from transformers import AutoModelForCausalLM, GPT2Config

    if name == "lm":
        return AutoModelForCausalLM.from_pretrained(export).eval()
    from peft import PeftModel

    torch.manual_seed(0)  # the seed of the run: its base model was not trained
    config = GPT2Config(vocab_size=384, n_embd=32, n_layer=2, n_head=2, n_positions=128, bos_token_id=0, eos_token_id=1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # peft reads a name that transformers will remove
        return PeftModel.from_pretrained(AutoModelForCausalLM.from_config(config), export).eval()


def build_from_checkpoint(run_folder):
    """Returns the trained model of a run in evaluation mode."""
    import runner

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return runner.open(run_folder).engines()["model"].module


def test_the_readme_counts_the_lines_of_the_experiments_and_of_the_programs():
    readme = (FILES.parent.parent / "README.md").read_text()
    for name in ("experiment/classifier.yaml", "experiment/lm.yaml", "classifier_lightning.py", "lm_hf_trainer.py"):
        lines = (FILES / name).read_text().splitlines()
        counted = [line for line in lines if line.strip() and not line.lstrip().startswith(("#", '"""'))]
        assert f"{len(counted)} lines (`tests/newcomer/{name}`)" in readme
