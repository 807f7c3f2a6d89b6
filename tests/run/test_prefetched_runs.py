"""A run whose batches are prefetched to a device is the same run, wherever it is interrupted; on a simulated device."""

import os
import signal

import pytest
import torch
from run_comparison import assert_same_run
from small_run import CONFIG_FILES, small_config
from torch import nn

from runner.config.run_folder import claim_folder
from runner.config.spec import ExperimentSpec
from runner.launch.job import Job
from runner.run.build import data as build_data
from runner.run.run import run
from runner.utils.sampler.device_copies import BatchCopier
from runner.utils.train.loop import Loop
from tests.lazy_device import LazyCopyStream

STEPS = 8


class Model(nn.Module):
    """Two weights; their loss depends on dropout and on the sample's own draw."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        assert not x.isnan().any()
        return {"loss": (nn.functional.dropout(self.weight * x) - 1).square().mean()}


class Data:
    """Seven samples `x`, float32 [2], each with a draw."""

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return {"x": torch.tensor([index + 1.0, torch.rand(()).item()])}


def train(folder, resume=None, num_workers=2):
    plain = small_config(STEPS, resume)
    plain["trainer"] |= {"accumulate": 2, "keep_last": 9}
    plain["model"] = {"_target_": f"{__name__}.Model"}
    data = {"_target_": f"{__name__}.Data"}
    plain["data"] |= {"train": data, "eval": data, "batch_size": 4, "num_workers": num_workers, "seed_samples": True}
    if resume is None:
        folder, _ = claim_folder(folder, is_asked_for=True)
    job = Job(ExperimentSpec.from_plain(plain), folder, CONFIG_FILES)
    return run(job.spec, folder, job.write_config)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("whole") / "run"
    assert train(folder, num_workers=0) == 0
    return folder


@pytest.fixture
def streams(monkeypatch):
    """Has runs copy their batches with simulated streams, which are returned."""
    made = []

    def make_copier(device):
        made.append(LazyCopyStream())
        return BatchCopier(made[-1])

    monkeypatch.setattr(build_data, "make_copier", make_copier)
    return made


def at_boundary(monkeypatch, step, act):
    """Calls a function at the boundary after a step, with a prefetched batch at hand."""
    finish_step = Loop._finish_step

    def finish(loop):
        if loop.step == step:
            assert loop.batches._ahead is not None
            act(loop)
        finish_step(loop)

    monkeypatch.setattr(Loop, "_finish_step", finish)


def test_an_uninterrupted_run_is_the_same(whole, streams, tmp_path):
    assert train(tmp_path / "run") == 0
    assert_same_run(tmp_path / "run", whole, STEPS)
    assert streams[0].num_delivered == 2 * STEPS
    assert streams[0].num_copies == 2 * STEPS  # none for a step after the last


@pytest.mark.parametrize("step", [3])
def test_a_run_stopped_with_a_prefetched_batch_resumes_as_the_same_run(whole, streams, tmp_path, step):
    folder = tmp_path / "run"
    with pytest.MonkeyPatch.context() as patch:
        at_boundary(patch, step, lambda loop: os.kill(os.getpid(), signal.SIGTERM))
        train(folder)
    assert (folder / f"checkpoints/step_{step:08d}").is_dir()
    assert train(folder, str(folder / f"checkpoints/step_{step:08d}")) == 0
    assert_same_run(folder, whole, STEPS)


def test_commands_typed_with_a_prefetched_batch_at_hand_act_as_without_a_device(tmp_path, request):
    lines = ["lr 0.003", "save", "eval"]
    folders = [tmp_path / "plain", tmp_path / "copied"]
    for folder in folders:
        if folder.name == "copied":
            request.getfixturevalue("streams")
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(Loop, "_finish_step", typing_at(3, lines, Loop._finish_step))
            assert train(folder) == 0
        assert (folder / "checkpoints/step_00000003").is_dir()
    assert_same_run(*folders, STEPS)


def typing_at(step, lines, finish_step):
    def finish(loop):
        if loop.step == step:
            for line in lines:
                assert loop._queue.submit(line)
        finish_step(loop)

    return finish
