"""Transformers models count their labels; without transformers, a stand-in with its interface is tested."""

import sys
import types

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from runner.engines import Engine, Engines
from runner.engines.losses.transformers_loss_terms import count_terms

VOCABULARY, SIZE, TIME = 31, 16, 12


def cross_entropy(logits, targets, num_items_in_batch, ignore_index):
    reduction = "mean" if num_items_in_batch is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, -2), targets.flatten(), ignore_index=ignore_index, reduction=reduction)
    return loss if num_items_in_batch is None else loss / num_items_in_batch


def ForCausalLMLoss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100, shift_labels=None):
    shifted = F.pad(labels, (0, 1), value=ignore_index)[..., 1:] if shift_labels is None else shift_labels
    return cross_entropy(logits, shifted, num_items_in_batch, ignore_index)


def ForMaskedLMLoss(logits, labels, vocab_size, num_items_in_batch=None, ignore_index=-100):
    return cross_entropy(logits, labels, num_items_in_batch, ignore_index)


class PreTrainedModel(nn.Module):
    loss_type = None

    @property
    def loss_function(self):
        return getattr(self, "_loss_function", None) or LOSS_MAPPING.get(self.loss_type, ForCausalLMLoss)

    @loss_function.setter
    def loss_function(self, value):
        self._loss_function = value


class ModelOutput(dict):
    __module__ = "transformers.utils.generic"

    @property
    def loss(self):
        return self["loss"]


LOSS_MAPPING = {"ForCausalLM": ForCausalLMLoss, "ForMaskedLM": ForMaskedLMLoss}


class LM(PreTrainedModel):
    """A model with one table. With `computes` it computes its loss itself, shifted or not like the others."""

    def __init__(self, loss_type=None, computes=False):
        super().__init__()
        torch.manual_seed(0)
        self.loss_type, self.computes = loss_type, computes
        self.table = nn.Embedding(VOCABULARY, VOCABULARY, dtype=torch.float64)

    def forward(self, input_ids, labels, **settings):
        logits = self.table(input_ids)
        loss = self.loss_function(logits=logits, labels=labels, vocab_size=VOCABULARY, **settings)
        if self.computes:
            loss = F.cross_entropy(logits.flatten(0, 1), labels.flatten())
        return ModelOutput(loss=loss, logits=logits, past_key_values=None)


class Wrapped(nn.Module):
    """A user's module that adds a term to a model's loss, which is then not a mean over labels alone."""

    def __init__(self):
        super().__init__()
        self.model = LM()

    def forward(self, input_ids, labels):
        return {"loss": self.model(input_ids, labels).loss + self.model.table.weight.square().mean()}


@pytest.fixture
def stand_in(monkeypatch):
    for name, values in (
        ("modeling_utils", {"PreTrainedModel": PreTrainedModel}),
        ("loss.loss_utils", {"LOSS_MAPPING": LOSS_MAPPING, "ForCausalLMLoss": ForCausalLMLoss}),
    ):
        module = types.ModuleType(f"transformers.{name}")
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, module.__name__, module)


def make_batch():
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(VOCABULARY, (SIZE, TIME), generator=generator)
    labels = ids.clone()
    for index in range(SIZE):
        labels[index, (index * 7) % (TIME + 1) :] = -100
    return {"input_ids": ids, "labels": labels}


def train(module, accumulate, feeder=None):
    """Returns weights and mean loss after a step of several micro-steps."""
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=1.0), accumulate=accumulate, feeder=feeder)
    batch = make_batch()
    for part in zip(*(value.chunk(accumulate) for value in batch.values()), strict=True):
        engine.micro_step(dict(zip(batch, part, strict=True)))
    assert engine.step() is None
    return torch.cat([p.detach().flatten() for p in module.parameters()]), engine.take_metrics()["loss"]


def assert_parts_do_not_matter(make, feeder=None, tolerance=1e-10):
    whole, loss = train(make(), 1, feeder)
    for accumulate in (4, 8, 16):
        weights, mean = train(make(), accumulate, feeder)
        torch.testing.assert_close(weights, whole, rtol=0, atol=tolerance)
        assert mean == pytest.approx(loss, rel=tolerance)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize("loss_type", [None, "ForCausalLM", "ForMaskedLM"])
def test_labels_that_count_are_the_weight(loss_type, caplog):
    assert_parts_do_not_matter(lambda: LM(loss_type))
    assert_parts_do_not_matter(lambda: LM(loss_type), feeder=lambda module, batch: module(**batch))
    assert caplog.records == []  # its outputs are no metrics, as everyone knows


@pytest.mark.usefixtures("stand_in")
def test_shifted_labels_of_the_callers_own_are_counted():
    def feed(module, batch):
        return module(**batch, shift_labels=F.pad(batch["labels"], (0, 1), value=-100)[..., 1:])

    assert_parts_do_not_matter(LM, feed)


@pytest.mark.usefixtures("stand_in")
@pytest.mark.parametrize(
    ("make", "feeder"),
    [
        (Wrapped, None),
        (LM, lambda module, batch: module(**batch).loss),
        (LM, lambda module, batch: module(**batch, num_items_in_batch=7)),
        (LM, lambda module, batch: module(**batch) and module(**batch)),
    ],
)
def test_a_loss_that_is_no_mean_over_labels_has_no_weight(make, feeder):
    module = make()
    output = Engine(module, feeder=feeder).forward(make_batch())
    assert output.weight is None


@pytest.mark.usefixtures("stand_in")
def test_a_loss_function_of_the_users_own_is_left_alone():
    module = LM()
    module.loss_function = own = lambda logits, labels, vocab_size: logits.mean()
    assert count_terms(module) is None
    assert module.loss_function is own


@pytest.mark.usefixtures("stand_in")
def test_a_second_engine_of_a_model_counts_too():
    module = LM()
    for _ in range(2):
        output = Engines(model=Engine(module))["model"].forward(make_batch())
        assert output.weight.terms == (make_batch()["labels"][:, 1:] != -100).sum()


@pytest.mark.parametrize("kind", ["Llama", "GPT2"])
def test_real_causal_models_train_alike_in_any_number_of_parts(kind):
    transformers = pytest.importorskip("transformers")
    names = {"Llama": "LlamaForCausalLM", "GPT2": "GPT2LMHeadModel"}
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    own = {"Llama": {"intermediate_size": 16}, "GPT2": {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}}
    config = getattr(transformers, f"{kind}Config")(vocab_size=VOCABULARY, **sizes, **own[kind])

    def make():
        torch.manual_seed(0)
        return getattr(transformers, names[kind])(config).double().train()

    assert_parts_do_not_matter(make, tolerance=1e-6)  # it computes its loss in fp32
