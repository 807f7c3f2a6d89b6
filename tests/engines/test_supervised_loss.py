"""A loss of the config: `loss(output, target)` for a module that returns its output alone."""

import pytest
import torch
from conftest import WORKER_MODULES, read_metrics, shared_zygote
from ranks import Ranks
from run_comparison import assert_same_run
from torch import nn

from runner.engines import Engine
from runner.engines.losses.output_errors import EarlyOutputError
from runner.engines.losses.supervised_loss import SupervisedLoss
from runner.engines.metric_objects.collection import MetricCollection

X = torch.randn(6, 4, generator=torch.Generator().manual_seed(0))
LABELS = torch.tensor([0, 2, -100, 1, 2, -100])
NETWORK = """


class Labelled(Data):
    # (input, target) pairs; every third label is ignored
    def __getitem__(self, index):
        return self.x[index], torch.tensor(index % 3 if index % 4 else -100)


class Network(nn.Sequential):
    def __init__(self):
        super().__init__(nn.Linear(4, 8), nn.BatchNorm1d(8), nn.Dropout(0.1), nn.Linear(8, 3))


class Affine(nn.Linear):
    def __init__(self):
        super().__init__(4, 3)


class Mapped(Labelled):
    def __getitem__(self, index):
        x, label = super().__getitem__(index)
        return {"input": x, "labels": label, "name": str(index)}


class Weighted:
    def __call__(self, output, target):
        terms = (target != -100).sum()
        loss = torch.nn.functional.cross_entropy(output, target, reduction="sum")
        return {"loss": loss / terms, "weight": terms, "confidence": output.softmax(-1).amax(-1).mean()}
"""
MLP = "model._target_=own.Network"
PLAIN = [MLP, "data.train._target_=own.Labelled", "data.eval._target_=own.Labelled", "loss=cross_entropy"]


def make_network():
    torch.manual_seed(0)
    return nn.Linear(4, 3)


@pytest.fixture
def labelled(project):
    with open(project.folder / "own.py", "a") as file:
        file.write(NETWORK)
    return project


@pytest.mark.parametrize("class_weights", [None, torch.tensor([0.5, 1.0, 4.0])])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_micro_steps_of_a_cross_entropy_are_the_mean_over_all_terms(class_weights, smoothing):
    criterion = nn.CrossEntropyLoss(weight=class_weights, label_smoothing=smoothing)
    expected, network = make_network(), make_network()
    whole = criterion(expected(X), LABELS)
    whole.backward()
    engine = Engine(network, torch.optim.SGD(network.parameters(), lr=0), accumulate=2, loss=SupervisedLoss(criterion))
    engine.micro_step((X[:1], LABELS[:1]))
    engine.micro_step((X[1:], LABELS[1:]))
    engine.prepare()
    torch.testing.assert_close(network.weight.grad, expected.weight.grad)
    engine.update()
    assert engine.take_metrics()["loss"] == pytest.approx(whole.item())


def test_probabilities_have_as_many_terms_as_positions():
    loss = SupervisedLoss(nn.CrossEntropyLoss())
    output = torch.randn(2, 3, 5)
    assert loss(lambda x: x, (output, output.softmax(1)))["weight"] == 10
    assert int(loss(lambda x: x, (output, torch.zeros(2, 5, dtype=torch.int64)))["weight"]) == 10


def test_a_mapping_is_split_by_the_keys_of_target_and_input():
    batch = {"x": X, "mask": 1, "labels": LABELS}

    def returns(*arguments, **keywords):
        return arguments, keywords

    def loss(output, target):
        assert target is LABELS
        return output

    assert SupervisedLoss(loss, "labels")(returns, batch)["loss"] == ((), {"x": X, "mask": 1})
    assert SupervisedLoss(loss, "labels", ["mask", "x"])(returns, batch)["loss"] == ((1, X), {})
    assert SupervisedLoss(loss)(returns, (1, X, LABELS))["loss"] == ((1, X), {})


@pytest.mark.parametrize(
    ("criterion", "batch", "expected"),
    [
        (nn.MSELoss(), (X, LABELS.float()), r"loss=MSELoss: the output, a Tensor of shape \[6, 3\] .* equal shapes"),
        (nn.CrossEntropyLoss(), (X, LABELS.float()), r"loss=CrossEntropyLoss: .*target, a Tensor of shape \[6\] and"),
        (nn.CrossEntropyLoss(), {"x": X, "label": LABELS}, r"data.target=null: expected the key .* Tensor of shape"),
        (nn.CrossEntropyLoss(), X, r"expected batches \(input, \.\.\., target\), .* found Tensor of shape \[6, 4\]"),
        (nn.CrossEntropyLoss(), (X, X, LABELS), r"Linear.forward can't be called with tuple of \(Tensor of shape"),
        (lambda output, target: output, (X, LABELS), r"its loss is a Tensor of shape \[6, 3\]: expected a tensor with"),
    ],
)
def test_a_batch_that_does_not_fit_is_described(criterion, batch, expected):
    engine = Engine(make_network(), loss=SupervisedLoss(criterion))
    with pytest.raises(EarlyOutputError, match=expected):
        engine.micro_step(batch)


@pytest.mark.parametrize("criterion", [nn.MSELoss(reduction="sum"), nn.Linear(2, 2)])
def test_a_loss_that_is_no_mean_or_has_parameters_is_refused(criterion):
    with pytest.raises(ValueError, match=r"expected mean|no optimizer would train"):
        SupervisedLoss(criterion)


def test_a_plain_network_trains_on_pairs_and_resumes_bit_for_bit(labelled):
    argv = [*PLAIN, "trainer.accumulate=2"]
    labelled.run(*argv, "hydra.run.dir=whole")
    labelled.run(*argv, "hydra.run.dir=cut", typed="quit@6\n")
    labelled.run("resume=cut")
    assert_same_run(labelled.folder / "whole", labelled.folder / "cut", 12)
    lines = read_metrics(labelled.folder / "whole")
    evaluated = [line["eval/loss"] for line in lines if "eval/loss" in line]
    assert evaluated[-1] < evaluated[0]


@pytest.mark.slow
@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_with_unequal_numbers_of_ignored_labels_train_as_one_process(labelled, how):
    argv = [*PLAIN, "model._target_=own.Affine", "data.batch_size=6", "trainer.accumulate=2"]
    argv += ["trainer.log_every=5"]
    labelled.run(*argv, "hydra.run.dir=one")
    labelled.run(*argv, "hydra.run.dir=cut", typed="quit@7\n")
    ranks = Ranks(shared_zygote(*WORKER_MODULES))
    start = ["--config-dir", "conf", "experiment=mine", *argv, f"distributed={how}", "hydra.run.dir=two"]
    ranks.run(labelled.folder, 2, *start)
    ranks.run(labelled.folder, 2, "resume=cut", f"distributed={how}")
    one, two, cut = (read_metrics(labelled.folder / name) for name in ("one", "two", "cut"))
    for name in ("train/loss", "train/grad_norm", "eval/loss"):
        expected = [line[name] for line in one if name in line]
        for lines in (two, cut):
            assert [line[name] for line in lines if name in line] == pytest.approx(expected, abs=1e-5)


def test_mappings_and_a_loss_with_numbers_of_its_own_give_the_same_run_as_pairs(labelled):
    labelled.run(*PLAIN, "hydra.run.dir=pairs")
    mapped = [MLP, "data.train._target_=own.Mapped", "data.eval._target_=own.Mapped"]
    mapped += ["loss={_target_: own.Weighted}", "data.target=labels", "data.input=input"]
    labelled.run(*mapped, "hydra.run.dir=mapped")
    pairs, mapped = (read_metrics(labelled.folder / name) for name in ("pairs", "mapped"))
    losses = [[line["train/loss"] for line in lines if "train/loss" in line] for lines in (pairs, mapped)]
    assert losses[0] == pytest.approx(losses[1], abs=1e-6)
    assert "eval/confidence" in mapped[0]


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        ([MLP, *PLAIN[1:3]], "Network.forward can't be called with tuple of (Tensor of shape [8, 4], Tensor of shape"),
        ([MLP, *PLAIN[1:3]], "choose loss=cross_entropy, mse"),
        ([*PLAIN, "loss=mse"], "loss=MSELoss: the output, a Tensor of shape [8, 3] and torch.float32"),
        ([*PLAIN, "+loss.reduction=sum"], "loss: reduction=sum: expected mean"),
        ([*PLAIN, "loss.label_smooth=1"], "loss.label_smooth: no such key; did you mean label_smoothing?"),
        ([*PLAIN, "data.input=3"], "data.input=3: expected a key of the batch, a list of keys, or null"),
        (["loss=cross_entropy"], "data.target=null: expected the key of the target, there are: x, y"),
        (["loss=cross_entropy", "data.target=z"], "data.target=z: expected the key of the target"),
    ],
)
def test_a_model_or_loss_that_does_not_fit_is_one_message(labelled, overrides, expected):
    printed = labelled.run(*overrides, status=2)
    assert expected in printed
    assert "Traceback" not in printed


@pytest.mark.slow
def test_a_classifier_of_transformers_is_trained_on_its_logits_and_measured_with_its_own_loss():
    transformers = pytest.importorskip("transformers")
    settings = {"vocab_size": 11, "hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "num_labels": 3}
    config = transformers.BertConfig(intermediate_size=16, **settings)
    model = transformers.BertForSequenceClassification(config).eval()
    batch = {"input_ids": torch.arange(10).view(2, 5), "attention_mask": torch.ones(2, 5, dtype=torch.int64)}
    labels = torch.tensor([0, 2])
    expected = model(**batch, labels=labels)
    loss = SupervisedLoss(nn.CrossEntropyLoss(), "labels")
    engine = Engine(model, loss=loss)
    with engine.evaluating():
        output = engine.forward({**batch, "labels": labels})
        assert output.loss.item() == expected.loss.item()
    engine = Engine(model, metrics=MetricCollection({"record": Record()}, torch.device("cpu")), target="labels")
    with engine.evaluating():
        engine.forward({**batch, "labels": labels})
        logits, target = engine.take_output({**batch, "labels": labels})
    assert torch.equal(logits, expected.logits)
    assert target is labels


class Record:
    def update(self, output, target): ...
    def compute(self): ...
    def reset(self): ...
