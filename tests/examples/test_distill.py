"""Distillation: exact resume, ranks, and the teacher from an export."""

import shutil

import pytest
import torch
import torch.nn.functional as F
from choices import Choices, assert_resumes_exactly, load_parts

from runner import evaluate
from runner.examples.digits import Digits, DigitsNet
from runner.examples.distill import Distillation
from runner.utils import io

TEACHER = ["experiment=digits", "trainer.steps=2", "trainer.export_every=2", "trainer.eval_every=0"]
TEACHER += ["distributed.device=cpu", "hydra.run.dir=teacher"]
SMALL = ["experiment=distill", "engines.teacher.init_from=teacher/exports/model.safetensors"]
SMALL += ["engines.student.model.width=4", "data.batch_size=15", "distributed.device=cpu"]
SMALL += ["trainer.steps=5", "trainer.save_every=5", "trainer.eval_every=5", "trainer.log_every=1"]


@pytest.fixture(scope="module")
def teacher(tmp_path_factory):
    """The folder of a run of the teacher, with an export."""
    project = Choices(tmp_path_factory.mktemp("teacher"))
    project.run(*TEACHER)
    return project.folder / "teacher"


@pytest.mark.parametrize("count", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_an_interrupted_run_equals_the_uninterrupted_one(tmp_path, teacher, count):
    shutil.copytree(teacher, tmp_path / "teacher")
    distributed = ["distributed=ddp", "trainer.accumulate=3"] if count > 1 else []
    assert_resumes_exactly(Choices(tmp_path), count, 5, *SMALL, *distributed)
    exported = io.load(teacher / "exports" / "model.safetensors")
    saved = load_parts(tmp_path / "cut", 5)["teacher"]
    assert all(torch.equal(saved[name], value) for name, value in exported.items())


def test_a_resume_and_an_evaluation_need_the_export_no_more(tmp_path, teacher, monkeypatch, capsys):
    shutil.copytree(teacher, tmp_path / "teacher")
    project = Choices(tmp_path)
    project.run(*SMALL, "hydra.run.dir=run", typed="quit@2\n")
    shutil.rmtree(tmp_path / "teacher")
    project.run("resume=run", "trainer.export_every=5")
    monkeypatch.chdir(tmp_path)
    printed = []
    for path in ("run", "run/exports/student.safetensors"):  # the export of a student has no teacher
        evaluate.main([path, "distributed.device=cpu"])
        printed.append(capsys.readouterr().out)
    assert "eval/student/loss" in printed[0]
    loss, exported_loss = (text.partition("loss")[2].split()[0] for text in printed)
    assert loss == exported_loss


def test_the_export_has_to_be_given(tmp_path):
    printed = Choices(tmp_path).run("experiment=distill", status=2)
    assert "engines.teacher.init_from: has no value" in printed


def test_the_loss_is_that_of_labels_and_teacher_in_training_and_that_of_labels_in_an_evaluation():
    torch.manual_seed(0)
    student, teacher = DigitsNet(width=2, dropout=0.0), DigitsNet(width=4).eval()
    data = Digits("train", max_samples=8)
    batch = {"image": data.images, "label": data.labels}
    logits, target = student.logits(data.images), teacher.logits(data.images)
    labels = F.cross_entropy(logits, data.labels)
    soft = F.kl_div((logits / 2).log_softmax(1), (target / 2).softmax(1), reduction="batchmean") * 4
    feeder = Distillation(temperature=2.0, weight=0.75)
    trained = feeder(student, batch, {"teacher": teacher})["loss"]
    torch.testing.assert_close(trained, 0.25 * labels + 0.75 * soft)
    torch.testing.assert_close(feeder(student.eval(), batch, {})["loss"], labels)
    with pytest.raises(ValueError, match="weight from 0 to 1"):
        Distillation(weight=2.0)
