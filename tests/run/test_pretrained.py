"""Exports by a model's `save_pretrained` load with `from_pretrained` of the other library, with equal logits."""

import json

import pytest
import torch
from conftest import WORKER_MODULES, shared_zygote
from ranks import Ranks

from runner.checkpoint import checkpoints
from runner.run.pretrained import write_pretrained
from runner.utils import io
from runner.utils.files import disk

transformers = pytest.importorskip("transformers")

MODELS = """
import torch
from transformers import BertConfig, BertForSequenceClassification, GPT2Config, GPT2LMHeadModel


def gpt2():
    small = {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 8, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=32, **small))


def bert():
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    return BertForSequenceClassification(BertConfig(vocab_size=32, max_position_embeddings=8, num_labels=3, **sizes))


def peft_gpt2(folder):
    from peft import LoraConfig, get_peft_model

    model = GPT2LMHeadModel.from_pretrained(folder)
    return get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True))


class Tokens:
    def __init__(self, length=16, num_labels=None):
        generator = torch.Generator().manual_seed(0)
        self.tokens = torch.randint(32, (length, 8), generator=generator)
        self.num_labels = num_labels

    def __len__(self):
        return len(self.tokens)

    def __getitem__(self, index):
        tokens = self.tokens[index]
        return {"input_ids": tokens, "labels": tokens if self.num_labels is None else tokens[0] % self.num_labels}
"""
LIBRARIES = ("transformers.models.gpt2.modeling_gpt2", "transformers.models.bert.modeling_bert", "peft")
CHOSEN = ["experiment=hf", "trainer.steps=2", "trainer.eval_every=0", "trainer.export_every=2", "hydra.run.dir=run"]
CHOSEN += ["export.format=huggingface"]
X = torch.arange(8)[None]


@pytest.fixture
def own(project):
    (project.folder / "hf.py").write_text(MODELS)
    experiment = project.folder / "conf" / "experiment" / "hf.yaml"
    text = (project.folder / "conf" / "experiment" / "mine.yaml").read_text().replace("name: mine", "name: hf")
    text = text.replace("own.Model", "hf.gpt2").replace("{_target_: own.Data, length: 50}", "{_target_: hf.Tokens}")
    text = text.replace("{_target_: own.Data, length: 20}", "{_target_: hf.Tokens}")
    text = text.replace("report: {_target_: own.report}", "report: null")
    experiment.write_text(text)
    project.loaded = LIBRARIES
    return project


def run(own, *overrides, **settings):
    return own.run(*CHOSEN, *overrides, **settings)


def logits_of(model):
    with torch.no_grad():
        return model.eval()(input_ids=X).logits


def make(own, name, *arguments):
    namespace = {}
    exec(compile((own.folder / "hf.py").read_text(), "hf.py", "exec"), namespace)
    return namespace[name](*arguments)


def test_a_tied_language_model_is_loaded_with_the_averaged_weights_of_evaluations(own):
    run(own, "ema=default")
    folder = own.folder / "run" / "exports" / "model"
    loaded = transformers.GPT2LMHeadModel.from_pretrained(folder)
    assert loaded.lm_head.weight is loaded.transformer.wte.weight
    state = io.load(own.folder / "run" / "checkpoints" / "step_00000002" / "model.optimizer.safetensors")
    averages = state["averages"]["weights"]
    assert all(torch.equal(loaded.state_dict()[name], averages[name]) for name in averages)
    expected = make(own, "gpt2")
    expected.load_state_dict(averages, strict=False)
    assert torch.equal(logits_of(loaded), logits_of(expected))
    assert json.loads((folder / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    facts = json.loads((folder / "runner.json").read_text())
    assert (facts["step"], facts["engine"]) == ("2", "model")
    assert [path.name for path in folder.parent.iterdir()] == ["model"]


def test_the_export_command_writes_the_format_and_dtype_that_it_is_given_and_replaces_a_folder(own, capsys):
    from runner import evaluate, export

    run(own, "model._target_=hf.bert", "+data.train.num_labels=3", "+data.eval.num_labels=3", "export.format=sft")
    path = own.folder / "run"
    base = transformers.BertForSequenceClassification
    export.main([str(path), "--format", "huggingface", "--allow-targets", "hf"])
    loaded = base.from_pretrained(path / "exports" / "model")
    weights = io.load(path / "exports" / "model.safetensors")
    expected = make(own, "bert")
    expected.load_state_dict(weights)
    assert all(torch.equal(value, weights[key]) for key, value in loaded.state_dict().items())
    torch.testing.assert_close(logits_of(loaded), logits_of(expected), rtol=0, atol=1e-6)
    (path / "exports" / "model" / "left.txt").write_text("")
    export.main([str(path), "--format", "huggingface", "--dtype", "bf16", "--allow-targets", "hf"])
    assert not (path / "exports" / "model" / "left.txt").exists()
    halved = base.from_pretrained(path / "exports" / "model")
    assert halved.dtype is torch.bfloat16
    name = "classifier.weight"
    assert torch.equal(halved.state_dict()[name], weights[name].bfloat16())
    capsys.readouterr()
    with pytest.raises(SystemExit):
        evaluate.main([str(path / "exports" / "model")])
    assert "an export for from_pretrained, from which nothing is built here; name the run" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore::FutureWarning")  # of peft, about transformers
def test_a_peft_model_writes_an_adapter(own):
    peft = pytest.importorskip("peft")
    base = make(own, "gpt2")
    base.save_pretrained(own.folder / "base")
    run(own, "model._target_=hf.peft_gpt2", "+model.folder=base")
    folder = own.folder / "run" / "exports" / "model"
    assert not (folder / "model.safetensors").exists()
    loaded = peft.PeftModel.from_pretrained(transformers.GPT2LMHeadModel.from_pretrained(own.folder / "base"), folder)
    trained = io.load(own.folder / "run" / "checkpoints" / "step_00000002" / "model.safetensors")
    expected = make(own, "peft_gpt2", own.folder / "base")
    expected.load_state_dict(trained)
    assert torch.equal(logits_of(loaded), logits_of(expected))
    assert not torch.equal(logits_of(loaded), logits_of(base))


@pytest.mark.parametrize("how", ["ddp", "fsdp"])
def test_two_ranks_write_one_folder_that_equals_the_weights_of_the_run(own, how):
    Ranks(shared_zygote(*LIBRARIES, *WORKER_MODULES)).run(
        own.folder, 2, "--config-dir", "conf", *CHOSEN, f"distributed={how}"
    )
    folder = own.folder / "run" / "exports"
    assert [path.name for path in folder.iterdir()] == ["model"]
    loaded = transformers.GPT2LMHeadModel.from_pretrained(folder / "model")
    assert json.loads((folder / "model" / "config.json").read_text())["architectures"] == ["GPT2LMHeadModel"]
    trained = checkpoints.load(own.folder / "run" / "checkpoints" / "step_00000002")["model"]
    assert trained.keys() == loaded.state_dict().keys()
    assert all(torch.equal(value, trained[key]) for key, value in loaded.state_dict().items())


def test_a_module_without_save_pretrained_is_refused_before_training(project):
    printed = project.run("export.format=huggingface", "hydra.run.dir=run", status=2)
    expected = "expected a model with save_pretrained(folder, state_dict=...), such as one of transformers"
    assert f"export.format=huggingface: {expected}, found engine model: Model; set export.format=sft" in printed
    assert not (project.folder / "run" / "checkpoints").exists()
    printed = project.run("export.dtype=fp8", status=2)
    assert "export.dtype=fp8: did you mean fp32? (there are: bf16, fp16, fp32), or null" in printed


def test_an_interrupt_or_kill_between_two_folders_leaves_the_earlier_one(tmp_path, monkeypatch):
    class Saves(torch.nn.Linear):
        def save_pretrained(self, folder, state_dict):
            io.save(state_dict, folder / "model.safetensors")

    def interrupt(old, new):
        if old.name == ".model.new":
            raise KeyboardInterrupt
        return rename(old, new)

    model, folder, rename = Saves(2, 2), tmp_path / "exports" / "model", disk.rename
    first = {"weight": torch.ones(2, 2)}
    write_pretrained(model, first, folder, {}, None)
    monkeypatch.setattr(disk, "rename", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_pretrained(model, {"weight": torch.zeros(2, 2)}, folder, {}, None)
    assert [path.name for path in folder.parent.iterdir()] == ["model"]
    folder.rename(folder.parent / ".model.old")  # as a kill leaves it
    with pytest.raises(KeyboardInterrupt):
        write_pretrained(model, {"weight": torch.zeros(2, 2)}, folder, {}, None)
    assert torch.equal(io.load(folder / "model.safetensors")["weight"], first["weight"])
