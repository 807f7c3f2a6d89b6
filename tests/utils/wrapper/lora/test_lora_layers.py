"""`runner.utils.wrapper.lora.layers`: each kind of adapted layer computes what PEFT computes."""

import copy
import pickle

import pytest
import torch
from torch import nn

from runner.utils.wrapper.lora import add_lora

RANK, ALPHA = 4, 6.0


class Attends(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        self.inner = nn.MultiheadAttention(8, 2, batch_first=batch_first)

    def forward(self, x):
        return self.inner(x, x, x)[0]


class Wrapped(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        return self.inner(x)


def make_gpt2_layer():
    return pytest.importorskip("transformers").pytorch_utils.Conv1D(6, 8)


X = torch.Generator().manual_seed(1)
CASES = {
    "linear": (lambda: nn.Linear(8, 6), torch.randn(3, 8, generator=X)),
    "conv1d_of_transformers": (make_gpt2_layer, torch.randn(3, 8, generator=X)),
    "embedding": (lambda: nn.Embedding(10, 6, padding_idx=2), torch.tensor([[1, 2, 3], [9, 1, 0]])),
    "conv1d": (lambda: nn.Conv1d(8, 6, 3, stride=2, padding=1), torch.randn(2, 8, 9, generator=X)),
    "conv2d": (lambda: nn.Conv2d(8, 6, (3, 2), padding=1), torch.randn(2, 8, 5, 5, generator=X)),
    "conv2d_1x1": (lambda: nn.Conv2d(8, 6, 1, bias=False), torch.randn(2, 8, 5, 5, generator=X)),
    "conv3d": (lambda: nn.Conv3d(8, 6, 2), torch.randn(2, 8, 3, 3, 3, generator=X)),
    "attention": (None, torch.randn(2, 5, 8, generator=X)),
}


def make(case):
    torch.manual_seed(0)
    make_layer, x = CASES[case]
    return (Attends() if make_layer is None else Wrapped(make_layer())), x


def adapt(module, dropout=0.0):
    adapted = add_lora(module, rank=RANK, alpha=ALPHA, include=["inner"], dropout=dropout)
    with torch.no_grad():
        for name, parameter in module.named_parameters():
            if ".lora_" in name:
                parameter.normal_(std=0.3)
    return adapted


def name_as_peft(module):
    """Returns the adapters of a module, or their gradients, by PEFT's names."""
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight"}
    if isinstance(module.inner, nn.Embedding):
        names = {"lora_a": "lora_embedding_A", "lora_b": "lora_embedding_B"}
    named = {}
    for name, parameter in module.named_parameters():
        layer, _, own = name.rpartition(".")
        if own in names:
            place = layer.replace(".out_proj", ".base_layer.out_proj")
            named[f"base_model.model.{place}.{names[own]}"] = parameter
    return named


@pytest.mark.parametrize("case", CASES)
def test_outputs_and_gradients_are_those_of_peft(case):
    peft = pytest.importorskip("peft")
    module, x = make(case)
    adapt(module)
    if case == "attention":  # PEFT 0.21 adds this adapter twice
        nn.init.zeros_(module.inner.out_proj.lora_b)
    theirs, _ = make(case)
    config = peft.LoraConfig(r=RANK, lora_alpha=ALPHA, target_modules=["inner"], fan_in_fan_out="transformers" in case)
    theirs = peft.get_peft_model(theirs, config)
    result = peft.set_peft_model_state_dict(theirs, name_as_peft(module))
    assert not result.unexpected_keys
    ours_out, theirs_out = module(x), theirs(x)
    torch.testing.assert_close(ours_out, theirs_out, rtol=1e-6, atol=1e-6)
    (ours_out.square().sum()).backward()
    (theirs_out.square().sum()).backward()
    trained = [(name, each) for name, each in theirs.named_parameters() if each.requires_grad]
    gradients = {name.replace(".default", ""): each.grad for name, each in trained}
    ours = name_as_peft(module)
    assert ours.keys() == gradients.keys()
    for name, parameter in ours.items():
        torch.testing.assert_close(parameter.grad, gradients[name], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("case", CASES)
def test_nothing_changes_until_a_step_and_merged_weights_compute_the_same(case):
    module, x = make(case)
    before = module(x)
    state_before = {name: value.clone() for name, value in module.state_dict().items()}
    adapted = add_lora(module, rank=RANK, alpha=ALPHA, include=["inner"])
    torch.testing.assert_close(module(x), before, rtol=0, atol=1e-6)
    adapted.undo()
    adapted = adapt(module)
    assert not torch.allclose(module(x), before)
    merged, _ = make(case)
    merged.load_state_dict(adapted.merged(module.state_dict()))
    torch.testing.assert_close(merged(x), module(x), rtol=1e-5, atol=1e-5)
    assert adapted.names == ["inner"]
    adapted.undo()
    assert all(torch.equal(value, state_before[name]) for name, value in module.state_dict().items())
    assert type(module.inner) is type(make(case)[0].inner)


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_has_the_adapters_too(case, duplicate):
    module, x = make(case)
    adapt(module)
    if case == "attention":
        module.eval()
    assert torch.equal(duplicate(module)(x), module(x))


@pytest.mark.parametrize("grad", [True, False])
def test_an_attention_within_torchs_encoder_layer_has_its_adapters_in_every_mode(grad):
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    x = torch.randn(2, 5, 8)
    adapted = add_lora(layer, rank=2, include=["self_attn"])
    nn.init.normal_(layer.self_attn.lora_b)
    nn.init.normal_(layer.self_attn.out_proj.lora_b)
    trained = layer(x)
    merged = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)
    merged.load_state_dict(adapted.merged(layer.state_dict()))
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(layer.eval()(x), merged.eval()(x), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(layer(x), trained, rtol=1e-5, atol=1e-5)


def test_dropout_of_a_convolution_is_on_the_adapter_alone_and_only_in_training():
    module, x = make("conv2d")
    adapt(module, dropout=0.5)
    assert not torch.equal(module(x), module(x))
    module.eval()
    assert torch.equal(module(x), module(x))


@pytest.mark.parametrize(
    ("layer", "dropout", "reason"),
    [
        (nn.Conv2d(4, 4, 3, groups=2), 0.0, "it has several groups"),
        (nn.MultiheadAttention(8, 2, kdim=4), 0.0, "its keys or values have a size of their own"),
        (nn.MultiheadAttention(8, 2), 0.5, "its projections have no inputs to drop; set dropout to 0"),
    ],
)
def test_a_layer_that_cannot_be_adapted_is_named_with_the_reason(layer, dropout, reason):
    with pytest.raises(ValueError, match=f"skipped: inner, as {reason}"):
        add_lora(Wrapped(layer), rank=2, dropout=dropout, include=["inner"])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_an_adapter_that_is_not_finite_is_not_merged(value):
    module, _ = make("linear")
    adapted = adapt(module)
    module.inner.lora_b.data[0, 0] = value
    with pytest.raises(ValueError, match="merged: inner: its adapter would make the weight infinite or NaN"):
        adapted.merged(module.state_dict())
    module.inner.lora_b.data.fill_(1e38)  # finite, but their product is not
    module.inner.lora_a.data.fill_(1e38)
    with pytest.raises(ValueError, match="would make the weight infinite or NaN"):
        adapted.merged(module.state_dict())


def test_by_default_linear_layers_of_transformers_models_are_adapted():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=8, n_layer=1, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config)
    adapted = add_lora(model, rank=2)
    kinds = {"attn.c_attn", "attn.c_proj", "mlp.c_fc", "mlp.c_proj"}
    assert set(adapted.names) == {f"transformer.h.0.{kind}" for kind in kinds}
    assert set(adapted.skipped) == {"lm_head"}  # tied to the embedding
