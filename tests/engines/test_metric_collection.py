"""Metrics of the config: torchmetrics' objects and one's own, in evaluations and on training steps."""

import json
import subprocess
import sys

import pytest
import torch
from conftest import WORKER_MODULES, read_metrics, shared_zygote
from ranks import Ranks
from run_comparison import assert_same_run, read_untimed_metrics

from runner.engines.metric_objects.results import flatten, to_plain

pytest.importorskip("torchmetrics")

OWN = """


class Pairs(Plain):
    def __getitem__(self, index):
        return self.x[index], torch.tensor(int(self.x[index].sum() > 0) + int(self.x[index, 0] > 1))


class Network(nn.Sequential):
    def __init__(self, dropout=0.0):
        super().__init__(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(dropout), nn.Linear(8, 3))


class Record:
    # the order of the batches, as a sum of floats that depends on it
    def __init__(self):
        self.reset()

    def reset(self):
        self.total, self.sizes = 0.0, []

    def update(self, output, target):
        assert not output.requires_grad
        self.total = self.total * 0.7 + output.double().mean().item()
        self.sizes.append(float(len(target)))

    def compute(self):
        return {"total": self.total, "sizes": self.sizes}


class Saved(Record):
    def state_dict(self):
        return {"total": self.total, "sizes": self.sizes}

    def load_state_dict(self, state):
        self.total, self.sizes = state["total"], list(state["sizes"])


class Forgets(Record):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


class Fails(Record):
    def update(self, output, target):
        super().update(output, target)
        if len(self.sizes) == 2:
            raise KeyError("its own mistake")


class Holds(Record):
    # has a metric of torchmetrics that would synchronize itself
    def __init__(self):
        import torchmetrics

        self.inner = torchmetrics.MeanMetric()
        super().__init__()

    def reset(self):
        self.inner.reset()

    def update(self, output, target):
        self.inner.update(output)

    def compute(self):
        return self.inner.compute()


class Both(Model):
    def forward(self, x, y):
        found = super().forward(x, y)
        return found | {"output": self.second(torch.tanh(self.first(x))), "target": y}
"""
CLASSES = "num_classes: 3"
METRICS = (
    f"++metrics={{accuracy: {{_target_: torchmetrics.classification.MulticlassAccuracy, {CLASSES}, average: micro}}, "
    f"f1: {{_target_: torchmetrics.classification.MulticlassF1Score, {CLASSES}}}, "
    f"confusion: {{_target_: torchmetrics.classification.MulticlassConfusionMatrix, {CLASSES}}}, "
    f"auroc: {{_target_: torchmetrics.classification.MulticlassAUROC, {CLASSES}}}, "
    "collection: {_target_: torchmetrics.MetricCollection, metrics: "
    f"{{recall: {{_target_: torchmetrics.classification.MulticlassRecall, {CLASSES}, average: none}}}}}}, "
    "holds: {_target_: own.Holds}, record: {_target_: own.Record}}"
)
PLAIN = ["model._target_=own.Network", "loss=cross_entropy", "data.train._target_=own.Pairs"]
PLAIN += ["data.eval._target_=own.Pairs", "data.eval.length=21"]
STATES = METRICS.replace("own.Record", "own.Saved").replace("holds: {_target_: own.Holds}, ", "")


@pytest.fixture
def labelled(project):
    shared_zygote("torchmetrics.classification")
    with open(project.folder / "own.py", "a") as file:
        file.write(OWN)
    return project


@pytest.fixture
def zygote():
    return shared_zygote(*WORKER_MODULES, "torchmetrics.classification")


def evaluations(folder):
    lines = read_untimed_metrics(folder)
    return [{k: v for k, v in line.items() if k.startswith("eval/")} for line in lines if "eval/loss" in line]


def test_metrics_equal_those_of_torchmetrics_and_of_runner_evaluate(labelled):
    labelled.run(*PLAIN, METRICS, "hydra.run.dir=run", "trainer.best_metric=eval/accuracy", "trainer.best_mode=max")
    last = evaluations(labelled.folder / "run")[-1]
    assert last["eval/record/sizes_0"] == 8
    assert last["eval/record/sizes_2"] == 5
    confusion = torch.tensor([[last[f"eval/confusion_{i}_{j}"] for j in range(3)] for i in range(3)])
    assert confusion.sum() == 21
    assert last["eval/accuracy"] == pytest.approx(confusion.diag().sum().item() / 21)
    recall = confusion.diag() / confusion.sum(1)
    assert [last[f"eval/collection/recall_{i}"] for i in range(3)] == pytest.approx(recall.tolist())
    assert json.loads((labelled.folder / "run" / "run.json").read_text())["best"]["name"] == "eval/accuracy"
    command = [sys.executable, "-m", "runner.evaluate", "run", "--allow-targets", "own,torchmetrics"]
    done = subprocess.run(command, cwd=labelled.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split() for line in done.stdout.splitlines() if line.startswith("eval/") and " " in line)
    assert {name: float(value) for name, value in printed.items()} == last


@pytest.mark.slow
@pytest.mark.parametrize("length", [21, 5])  # batches of 8: of 8, 8, 5, or one only, so that a rank has none
def test_metrics_of_two_and_three_ranks_have_the_bits_of_one_process(labelled, zygote, length):
    project, ranks = labelled, Ranks(zygote)
    argv = ["--config-dir", "conf", "experiment=mine", *PLAIN, METRICS, f"data.eval.length={length}"]
    argv += ["trainer.steps=1", "optimizer.lr=0", "trainer.save_every=0"]
    project.run(*argv[3:], "hydra.run.dir=one")
    for count, how in ((2, "ddp"), (2, "fsdp"), (3, "ddp"))[: 3 if length == 21 else 1]:
        name = f"{how}_{count}"
        ranks.run(project.folder, count, *argv, f"distributed={how}", f"hydra.run.dir={name}")
        found, expected = evaluations(project.folder / name), evaluations(project.folder / "one")
        assert found[0] == expected[0], name  # before the first step, which sums gradients in another order
        assert len(found) == len(expected) == 2


def test_metrics_that_count_do_not_depend_on_the_batch_size(labelled):
    labelled.run(*PLAIN, METRICS, "hydra.run.dir=run")
    command = [sys.executable, "-m", "runner.evaluate", "run", "--allow-targets", "own,torchmetrics"]
    done = subprocess.run([*command, "data.batch_size=5"], cwd=labelled.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    printed = dict(line.split() for line in done.stdout.splitlines() if line.startswith("eval/") and " " in line)
    last = evaluations(labelled.folder / "run")[-1]
    for name in ("accuracy", "f1", "auroc", "confusion_0_0", "confusion_2_1"):
        assert float(printed[f"eval/{name}"]) == last[f"eval/{name}"]


def test_without_a_loss_metrics_get_the_output_and_target_of_the_forward(labelled):
    mean = "+metrics.mse={_target_: torchmetrics.MeanSquaredError}"
    labelled.run("model._target_=own.Both", "+model.dropout=0", mean, "hydra.run.dir=run")
    last = evaluations(labelled.folder / "run")[-1]
    assert last["eval/mse"] == pytest.approx(last["eval/loss"])
    printed = labelled.run(mean, status=2)
    assert "Model.forward returned dict of (loss: Tensor of shape [], error: Tensor of shape []" in printed
    assert "the metrics need its output and target; return a mapping with loss, output and target" in printed


def test_engines_have_copies_of_a_metric_and_may_have_others(labelled):
    (labelled.folder / "conf" / "experiment" / "two.yaml").write_text(
        "# @package _global_\ndefaults: [mine]\nengines:\n  a: {}\n"
        "  b: {metrics: {record: null, other: {_target_: own.Record}}}\n"
    )
    labelled.run(*PLAIN, "+metrics.record={_target_: own.Record}", "experiment=two", "hydra.run.dir=run")
    last = evaluations_of(labelled.folder / "run")[-1]
    assert {name for name in last if name.endswith("total")} == {"eval/a/record/total", "eval/b/other/total"}


def evaluations_of(folder):
    return [line for line in read_metrics(folder) if any(name.startswith("eval/") for name in line)]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["single", "ddp", "fsdp"])
def test_metrics_of_training_steps_resume_bit_for_bit(labelled, zygote, how):
    argv = [*PLAIN, STATES, "train_metrics=true", "trainer.log_every=5", "trainer.accumulate=2", "model.dropout=0.2"]
    argv = [argument.replace("model.dropout", "+model.dropout") for argument in argv]
    if how == "single":
        labelled.run(*argv, "hydra.run.dir=whole")
        labelled.run(*argv, "hydra.run.dir=cut", typed="quit@7\n")
        labelled.run("resume=cut")
    else:
        ranks, start = Ranks(zygote), ["--config-dir", "conf", "experiment=mine", *argv, f"distributed={how}"]
        ranks.run(labelled.folder, 2, *start, "hydra.run.dir=whole")
        ranks.run(labelled.folder, 2, *start, "hydra.run.dir=cut", typed="quit@7\n")
        ranks.run(labelled.folder, 2, *start[:2], "resume=cut", f"distributed={how}")
    whole, cut = (read_untimed_metrics(labelled.folder / name) for name in ("whole", "cut"))
    assert whole == cut
    if how == "single":
        assert_same_run(labelled.folder / "whole", labelled.folder / "cut", 12)
    logged = [line for line in whole if "train/accuracy" in line]
    assert [line["step"] for line in logged] == [5, 10, 12]
    confusions = [sum(v for k, v in line.items() if k.startswith("train/confusion")) for line in logged]
    assert confusions == [40, 40, 16]  # every sample of the steps since the last line


def test_a_skipped_step_is_not_measured(labelled):
    feeder = "feeder={_target_: own.fail_at_call}"
    with open(labelled.folder / "own.py", "a") as file:
        file.write("\n\ndef fail_at_call(module, batch, count=[0]):\n    count[0] += module.training\n")
        file.write("    return module(batch[0]) * (float('nan') if module.training and count[0] == 3 else 1)\n")
    argv = [*PLAIN, STATES, "train_metrics=true", "trainer.log_every=12", "trainer.on_nonfinite=skip"]
    labelled.run(*argv, feeder, "hydra.run.dir=run")
    line = read_metrics(labelled.folder / "run")[-2]
    assert sum(value for name, value in line.items() if name.startswith("train/confusion")) == 11 * 8


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["+metrics.loss={_target_: own.Record}"], "metrics.loss: the runner logs a number of this name itself"),
        (["+metrics.f1=3"], "metrics.f1=3: expected a mapping with _target_"),
        (["++metrics={a/b: {_target_: own.Record}}"], "metrics.a/b: expected a name of letters"),
        (["+metrics.f1={_target_: own.Recorder}"], "metrics.f1._target_=own.Recorder: own has no 'Recorder'"),
        (["+metrics.f1={_target_: own.Record, size: 3}"], "metrics.f1.size: own.Record takes no such argument"),
        (["+metrics.f1={_target_: own.Data}"], "metrics: metrics.f1: Data has no update, compute, reset"),
        (
            ["+metrics.f1={_target_: own.Record}", "train_metrics=true"],
            "metrics.f1: expected state_dict() and load_state_dict(), so that a resumed run is exact; found Record",
        ),
        (
            ["+metrics.f1={_target_: torchmetrics.classification.MulticlassF1Score, num_classes: 5}"],
            "metrics.f1, of the output, a Tensor of shape [8, 3], and the target, a Tensor of shape [8]",
        ),
        (
            ["+metrics.confidence={_target_: own.Record}", "+loss={_target_: own.confident}"],
            "metrics.confidence: expected a name of its own, found that the forward returns a number 'confidence",
        ),
    ],
)
def test_a_mistake_is_one_message(labelled, overrides, expected):
    with open(labelled.folder / "own.py", "a") as file:
        file.write("\n\ndef confident(output, target):\n")
        file.write("    loss = nn.functional.cross_entropy(output, target)\n")
        file.write("    return {'loss': loss, 'confidence/total': loss.detach()}\n")
    plain = [override for override in PLAIN if not ("loss" in override and "confident" in str(overrides))]
    printed = labelled.run(*plain, *overrides, status=2)
    assert expected in printed
    assert "Traceback" not in printed


def test_a_metric_whose_state_lacks_what_update_changes_is_refused(labelled):
    printed = labelled.run(*PLAIN, "+metrics.f1={_target_: own.Forgets}", "train_metrics=true", status=1)
    assert "metrics.f1: expected a state_dict() that changes with an update" in printed


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 1])
def test_an_error_of_a_metric_or_a_forward_on_one_rank_ends_all_ranks(labelled, zygote, rank):
    fails = "own.Fails" if rank == 0 else "own.Record"
    with open(labelled.folder / "own.py", "a") as file:
        file.write("\n\nclass Breaks(Network):\n    def forward(self, x):\n")
        file.write("        if not self.training and os.environ['RANK'] == '1':\n            {}['its own mistake']\n")
        file.write("        return super().forward(x)\n")
    argv = ["--config-dir", "conf", "experiment=mine", *PLAIN, f"+metrics.record={{_target_: {fails}}}"]
    argv += ["model._target_=own.Breaks"] if rank == 1 else []
    printed = Ranks(zygote).run(labelled.folder, 2, *argv, "distributed=ddp", "hydra.run.dir=run", status=1)
    assert printed.count("Traceback (most recent call last)") == 1
    assert "its own mistake" in printed


def test_results_are_numbers_by_name_and_large_ones_a_picture_and_a_text():
    assert flatten("a", to_plain(torch.tensor(2))) == {"a": 2.0}
    assert flatten("a", to_plain({"x": torch.tensor([1, 2]), "y": True})) == {"a/x_0": 1, "a/x_1": 2, "a/y": 1}
    assert flatten("a", to_plain(torch.eye(2))) == {"a_0_0": 1, "a_0_1": 0, "a_1_0": 0, "a_1_1": 1}
    large = flatten("a", to_plain(torch.eye(9)))
    assert large["a"].shape == (252, 252, 3)
    assert large["a"].dtype is torch.uint8
    assert large["a_values"].splitlines()[1] == "0 1 0 0 0 0 0 0 0"
    assert flatten("a", to_plain(torch.arange(65.0)))["a"].endswith("63 64")
    assert "minimum 0, mean 1" in flatten("a", to_plain(torch.arange(3000.0) % 3))["a"]
    with pytest.raises(TypeError, match="expected numbers, tensors or texts"):
        to_plain(object())
