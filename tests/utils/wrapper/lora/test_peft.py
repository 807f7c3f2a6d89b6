"""`runner.utils.wrapper.lora.peft`: folders that PEFT loads with equal outputs, and PEFT's folders read."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from runner.utils.wrapper.lora import add_lora
from runner.utils.wrapper.lora.peft import CONFIG_NAME, WEIGHTS_NAME, PeftFormat, read_names

SETTINGS = {"rank": 3, "alpha": 6.0, "dropout": 0.0}


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding = nn.Embedding(9, 4)
        self.convolution = nn.Conv1d(4, 4, 3, padding=1)
        self.body = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 4))
        self.inner = nn.ModuleDict({"body": nn.Sequential(nn.Linear(4, 4))})
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        x = self.convolution(self.embedding(x).transpose(1, 2)).transpose(1, 2)
        return self.head(self.inner["body"](self.body(x)))


def train(module):
    with torch.no_grad():
        for parameter in module.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


def write(form, state, folder):
    folder.mkdir()
    (folder / CONFIG_NAME).write_text(json.dumps(form.config))
    save_file({name: value.contiguous() for name, value in form.weights(state).items()}, folder / WEIGHTS_NAME)


def make(include=("embedding", "convolution", "body.*"), **settings):
    torch.manual_seed(0)
    module = Net()
    adapted = add_lora(module, **SETTINGS, include=include, **settings)
    form = PeftFormat(module, adapted, **SETTINGS)
    train(module)
    return module, form


def test_a_written_folder_is_loaded_by_peft_with_equal_outputs(tmp_path):
    peft = pytest.importorskip("peft")
    module, form = make(also_train=["head.*"])
    write(form, module.state_dict(), tmp_path / "adapter")
    torch.manual_seed(0)
    loaded = peft.PeftModel.from_pretrained(Net(), tmp_path / "adapter")
    x = torch.arange(8).reshape(2, 4)
    torch.testing.assert_close(loaded(x), module(x), rtol=1e-6, atol=1e-6)
    assert type(loaded.base_model.model.inner["body"][0]) is nn.Linear  # `body.0` ends its name, too
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(merged(x), module(x), rtol=1e-5, atol=1e-5)


@pytest.mark.filterwarnings("ignore")
def test_adapters_of_a_gpt2_are_loaded_by_peft_with_equal_logits(tmp_path):
    transformers = pytest.importorskip("transformers")
    peft = pytest.importorskip("peft")
    config = transformers.GPT2Config(
        vocab_size=16, n_embd=8, n_layer=2, n_head=2, n_positions=8, bos_token_id=0, eos_token_id=0
    )
    model = transformers.GPT2LMHeadModel(config).eval()
    model.save_pretrained(tmp_path / "base")
    adapted = add_lora(model, **SETTINGS)
    form = PeftFormat(model, adapted, **SETTINGS)
    train(model)
    write(form, model.state_dict(), tmp_path / "adapter")
    base = transformers.GPT2LMHeadModel.from_pretrained(tmp_path / "base")
    loaded = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    x = torch.arange(8)[None]
    torch.testing.assert_close(loaded(x).logits, model(x).logits, rtol=1e-5, atol=1e-6)


def test_a_folder_that_peft_has_written_has_the_names_of_an_adapted_module(tmp_path):
    peft = pytest.importorskip("peft")
    targets = ["embedding", "convolution", "head"]
    theirs = peft.get_peft_model(Net(), peft.LoraConfig(r=3, target_modules=targets, modules_to_save=["body.2"]))
    train(theirs)
    theirs.save_pretrained(tmp_path)
    found = read_names(load_file(tmp_path / WEIGHTS_NAME))
    module, _ = make(include=targets)
    adapters = {name for name in module.state_dict() if ".lora_" in name}
    assert found.keys() == adapters | {"body.2.weight", "body.2.bias"}
    module.load_state_dict(theirs.unload().state_dict() | found, strict=False)
    assert torch.equal(module.head.lora_b, found["head.lora_b"])


def test_what_peft_cannot_represent_is_refused():
    with pytest.raises(
        ValueError, match=r"lora.export=peft: also_train: expected whole modules, found head without head"
    ):
        make(also_train=["head.bias"])
    for layer, reason in [
        (nn.MultiheadAttention(4, 2), "adds the adapter of an attention's out_proj twice"),
        (nn.Conv1d(4, 4, 3, dilation=2), "ignores the dilation"),
        (nn.Conv1d(4, 4, 3, padding=1, padding_mode="circular"), "ignores the padding_mode"),
    ]:
        module = nn.Sequential(layer)
        adapted = add_lora(module, **SETTINGS, include=["0"])
        with pytest.raises(ValueError, match=rf"lora.export=peft: 0: PEFT \(0.21\) {reason}"):
            PeftFormat(module, adapted, **SETTINGS)
