import sys

import pytest
import torch
from conftest import read_metrics
from own_callbacks import add_callbacks
from run_comparison import assert_equal, assert_same_run, load_weights

from runner.callbacks.weight_averaging import WeightAveraging
from runner.run.evaluation import evaluate
from runner.run.saved_model import open_export
from runner.utils import io

TORCH_SWA = """

class TorchSWA:
    # the same averages by torch's own classes
    def on_start(self, view):
        average = torch.optim.swa_utils.get_swa_multi_avg_fn()
        self.module = torch.optim.swa_utils.AveragedModel(view.engines["model"].module, multi_avg_fn=average)

    def on_step(self, view):
        if view.step >= 5 and (view.step - 5) % 2 == 0:
            self.module.update_parameters(view.engines["model"].module)

    def on_end(self, view, status):
        class Adapter(nn.Module):
            def __init__(self, module):
                super().__init__()
                self.module = module

            def forward(self, batch):
                return self.module(**batch)

        torch.optim.swa_utils.update_bn(view.training_batches(), Adapter(self.module))
        torch.save(dict(self.module.module.state_dict()), view.folder / "torch_swa.pt")
"""
SWA = ["callbacks=[weight_averaging]", "callbacks.weight_averaging.start=5", "callbacks.weight_averaging.every=2"]
SWA += ["model={_target_: own.Normed}", "trainer.eval_at_start=false"]


def load_export(run):
    return dict(io.load(run / "exports" / "model_swa.safetensors"))


def swa_numbers(run):
    return [line for line in read_metrics(run) if any(name.startswith("eval/swa/") for name in line)]


def test_averages_and_statistics_equal_torchs_and_training_is_the_same(project):
    add_callbacks(project)
    path = project.folder / "own.py"
    path.write_text(path.read_text() + TORCH_SWA)
    project.run(*SWA, "+callbacks.torch={_target_: own.TorchSWA}", "hydra.run.dir=run")
    project.run(*SWA[-2:], "hydra.run.dir=plain")
    run = project.folder / "run"
    expected = torch.load(run / "torch_swa.pt", weights_only=True)
    assert_equal(load_export(run), expected)
    for averaged, plain in zip(load_weights(run, 12)[:2], load_weights(project.folder / "plain", 12), strict=True):
        assert_equal(averaged, plain)
    (line,) = swa_numbers(run)
    assert line["step"] == 12
    assert line["eval/swa/loss"] != read_metrics(run)[-1].get("eval/loss")


def test_the_export_evaluates_to_the_numbers_that_the_run_logged(project, monkeypatch):
    add_callbacks(project)
    project.run(*SWA, "hydra.run.dir=run")
    monkeypatch.syspath_prepend(project.folder)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    numbers, _ = evaluate(open_export(project.folder / "run" / "exports" / "model_swa.safetensors"))
    sys.modules.pop("own", None)
    (line,) = swa_numbers(project.folder / "run")
    assert numbers["eval/loss"] == line["eval/swa/loss"]


def test_an_interrupted_run_has_the_same_averages_and_a_resume_of_the_finished_one_adds_nothing(project):
    add_callbacks(project)
    project.run(*SWA, "hydra.run.dir=whole")
    project.run(*SWA, "tracking.stdin=true", "hydra.run.dir=cut", typed="quit@8\n")
    project.run("resume=cut", "tracking.stdin=false")
    whole, cut = project.folder / "whole", project.folder / "cut"
    assert_same_run(whole, cut, 12)
    assert_equal(load_export(cut), load_export(whole))
    before = (cut / "metrics.jsonl").read_bytes()
    assert "no longer counts" not in project.run("resume=cut")  # eval/swa/loss does not replace the metric of the best
    assert (cut / "metrics.jsonl").read_bytes() == before


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_two_ranks_average_as_one_process_does(project, strategy):
    add_callbacks(project)
    alone = [*SWA, "model={_target_: own.Model}", "+model.dropout=0"]
    project.run(*alone, "hydra.run.dir=one")
    ranks = [f"distributed={strategy}", "distributed.nproc_per_node=2"]
    project.run(*alone, *ranks, "hydra.run.dir=two", forks_workers=True)
    for name, value in load_export(project.folder / "one").items():
        torch.testing.assert_close(load_export(project.folder / "two")[name], value, rtol=0, atol=1e-5)


def test_an_ema_of_the_same_weights_is_refused(project):
    printed = project.run(*SWA[:1], "ema.decay=0.9", status=2)
    expected = "expected no other average of the weights of engine model, found that of ema; set its ema=null"
    assert f"callbacks.weight_averaging: {expected}, or leave this callback out" in printed


@pytest.mark.parametrize("arguments", [{"start": -1}, {"start": 1.5}, {"every": 0}, {"bn_batches": 0}])
def test_an_argument_out_of_its_range_is_an_error(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        WeightAveraging(**arguments)
