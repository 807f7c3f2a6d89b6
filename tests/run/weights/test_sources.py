"""`runner.run.weights.sources`: weights of other programs, written by them, and files that are refused."""

import contextlib
import json
import os
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from torch import nn

from runner import evaluate, export
from runner.config.errors import ConfigError
from runner.run.weights.initial_weights import find_initial_weights
from runner.run.weights.sources import find_source, read_source
from runner.utils.wrapper.lora import add_lora


def make_net(width=8):
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 1))


def start(path, make=make_net, **settings):
    """Builds a model with initial weights; returns it, and the lines for the log."""
    builder = find_initial_weights({"engines": {}, "init_from": None, "init": {"path": str(path), **settings}})
    module = builder.build("model", "model", None, lambda node: make())
    builder.finish("model", module)
    return module, builder.lines


def are_equal(one, other):
    one, other = one.state_dict(), other.state_dict()
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


class Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


@pytest.fixture(autouse=True)
def inside(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["a.pt", "a.pth", "a.bin", "a.ckpt", "a.safetensors"])
@pytest.mark.parametrize("nesting", ["", "state_dict", "model", "module", "model_state_dict"])
def test_a_file_of_any_suffix_and_nesting_is_read(name, nesting):
    net = make_net()
    if name == "a.safetensors":
        save_file({f"{nesting}.{key}".lstrip("."): value for key, value in net.state_dict().items()}, name)
    else:
        optimizer = torch.optim.AdamW(net.parameters())
        net(torch.ones(2, 4)).sum().backward()
        optimizer.step()
        content = (
            net.state_dict()
            if not nesting
            else {nesting: net.state_dict(), "epoch": 3, "optimizer": optimizer.state_dict()}
        )
        torch.save(content, name)
    found, lines = start(name)
    assert are_equal(found, net)
    assert lines[0] == f"init.path={name}: weights of {name}"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_checkpoint_of_lightning_is_read():
    lightning = pytest.importorskip("lightning")

    class Lit(lightning.LightningModule):
        def __init__(self, width=8):
            super().__init__()
            self.save_hyperparameters()
            self.model = make_net(width)

        def training_step(self, batch, index):
            return self.model(batch[0]).square().mean()

        def configure_optimizers(self):
            return torch.optim.AdamW(self.parameters())

    data = torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.ones(4, 4)))
    trainer = lightning.Trainer(
        max_steps=2, accelerator="cpu", logger=False, enable_progress_bar=False, enable_model_summary=False
    )
    module = Lit()
    trainer.fit(module, data)
    trainer.save_checkpoint("last.ckpt", weights_only=False)
    found, lines = start("last.ckpt")
    assert are_equal(found, module.model)
    assert lines[1] == "  names: those under 'state_dict', prefix 'model.' removed"


@pytest.fixture(scope="module")
def gpt2():
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(
        vocab_size=32, n_embd=16, n_layer=2, n_head=2, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    return lambda kind="GPT2LMHeadModel": getattr(transformers, kind)(config)


def test_folders_of_hugging_face_are_read(gpt2):
    model = gpt2()
    model.save_pretrained("whole")
    model.save_pretrained("sharded", max_shard_size="20KB")
    assert Path("sharded/model.safetensors.index.json").exists()
    model.transformer.save_pretrained("base")
    for folder in ("whole", "sharded", "sharded/model.safetensors.index.json", "base"):
        found, lines = start(folder, gpt2)
        assert are_equal(found, model)
        assert any("1 tied to them" in line for line in lines)  # the head, which is not stored
        assert ("  names: prefix 'transformer.' added" in lines) == (folder == "base")
    found, _ = start("whole", lambda: gpt2("GPT2Model"))
    assert are_equal(found, model.transformer)
    with pytest.raises(ConfigError, match=r"(?s)missing: score.weight.*init.strict=false"):
        start("whole", lambda: gpt2("GPT2ForSequenceClassification"))
    found, lines = start("whole", lambda: gpt2("GPT2ForSequenceClassification"), strict=False)
    assert are_equal(found.transformer, model.transformer)
    assert "  missing     1: score.weight" in lines


@pytest.mark.slow
def test_a_checkpoint_of_hugging_faces_trainer_is_read(gpt2):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = gpt2()
    rows = [{"input_ids": torch.arange(8), "labels": torch.arange(8)}] * 4
    arguments = transformers.TrainingArguments(
        "trained",
        max_steps=1,
        save_steps=1,
        use_cpu=True,
        report_to=[],
        disable_tqdm=True,
        per_device_train_batch_size=2,
    )
    transformers.Trainer(model, arguments, train_dataset=rows).train()
    found, _ = start("trained/checkpoint-1", gpt2)
    assert are_equal(found, model)
    with pytest.raises(ConfigError, match=r"init.path=trained: holds several checkpoints; name one: checkpoint-1"):
        start("trained", gpt2)


def test_adapters_that_peft_has_written_are_loaded_into_a_module_with_adapters():
    peft = pytest.importorskip("peft")
    theirs = peft.get_peft_model(make_net(), peft.LoraConfig(r=2, lora_alpha=8, target_modules=["0", "2"]))
    for parameter in theirs.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    theirs.save_pretrained("adapter")

    def load(**options):
        builder = find_initial_weights({"engines": {}, "init": {"path": "adapter", **options}})
        module = builder.build("model", "model", None, lambda node: make_net())
        add_lora(module, rank=2, alpha=8)
        builder.finish("model", module)
        return module, builder.lines

    with pytest.raises(ConfigError, match=r"It holds adapters alone.*init.include=\['\*.lora_\?'\]"):
        load()
    module, lines = load(include=["*.lora_?"])
    assert lines[1] == "  its adapters were trained with optimizations.lora.rank=2 optimizations.lora.alpha=8"
    assert torch.equal(
        module[2].lora_b, load_file("adapter/adapter_model.safetensors")["base_model.model.2.lora_B.weight"]
    )


def write_shards(files):
    Path("shards").mkdir(exist_ok=True)
    net = make_net()
    save_file(net.state_dict(), "shards/a.safetensors")
    names = dict.fromkeys(net.state_dict(), "a.safetensors") | files
    Path("shards/model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


@pytest.mark.parametrize("file", ["../a.safetensors", "/etc/a.bin", "..", "a.py", "", "b\\a.bin", "a.bin\0"])
def test_an_index_names_files_of_weights_beside_it(file):
    torch.save({}, "a.bin")
    write_shards({"0.weight": file})
    with pytest.raises(ConfigError, match="expected files of weights beside it, found"):
        start("shards")


def test_a_shard_that_lacks_a_tensor_and_one_that_is_missing_are_named():
    write_shards({"absent": "a.safetensors"})
    with pytest.raises(
        ConfigError, match=r"a.safetensors: lacks absent, which model.safetensors.index.json says it has"
    ):
        start("shards")
    write_shards({"0.weight": "b.safetensors"})
    with pytest.raises(ConfigError, match=r"init.path=shards: shards/b.safetensors: can't be read \(No such file"):
        start("shards")
    for content in ("{}", '{"weight_map": 3}', '{"weight_map": {"a": 1}}', "[1]"):
        Path("shards/model.safetensors.index.json").write_text(content)
        with pytest.raises(ConfigError, match="expected weight_map, a mapping of tensors to files"):
            start("shards")


@pytest.mark.parametrize("name", ["a.pt", "a.bin", "a.ckpt"])
def test_a_pickle_that_would_run_code_is_refused_with_what_to_do(name):
    torch.save({"state_dict": make_net().state_dict(), "more": Canary()}, name)
    with pytest.raises(ConfigError) as caught:
        start(name)
    assert "would run posix.mkdir to be read; if you trust its origin to run code here, convert it" in str(caught.value)
    assert not Path("canary").exists()
    Path(name).write_bytes(Path(name).read_bytes()[:500])
    with pytest.raises(ConfigError) as caught:  # damaged: there is nothing to convert
        start(name)
    assert "not read" in str(caught.value)
    assert "convert it" not in str(caught.value)


def test_nothing_loaded_is_an_error_always():
    torch.save(make_net().state_dict(), "a.pt")
    for options in ({"strict": False}, {"include": ["x*"]}, {"strict": False, "exclude": ["*"]}):
        with pytest.raises(ConfigError, match="loaded: nothing"):
            start("a.pt", (lambda: nn.Linear(9, 9)) if "include" not in options else make_net, **options)
    torch.save({"epoch": 3}, "b.pt")
    with pytest.raises(ConfigError, match="expected a state dict, tensors by name, found none in it"):
        start("b.pt")


ATOMS = st.none() | st.integers(-9, 9) | st.text(max_size=3) | st.builds(torch.ones, st.integers(0, 3))
NESTS = st.recursive(
    ATOMS,
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3) | st.integers(0, 3), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(max_examples=int(os.environ.get("RUNNER_FUZZ", "50")), deadline=None, suppress_health_check=list(HealthCheck))
@given(NESTS, st.sampled_from(["a.pt", "a.bin", "a.ckpt"]))
def test_any_pickled_value_is_loaded_or_refused_by_the_documented_error(value, name):
    torch.save(value, name)
    with contextlib.suppress(ConfigError):
        start(name, strict=False)


@settings(max_examples=int(os.environ.get("RUNNER_FUZZ", "50")), deadline=None, suppress_health_check=list(HealthCheck))
@given(
    st.binary(max_size=200),
    st.sampled_from([".pt", ".bin", ".ckpt", ".safetensors", ".index.json"]),
    st.integers(0, 400),
)
def test_any_bytes_are_refused_by_the_documented_error(content, suffix, cut):
    torch.save({"a": torch.ones(3)}, "whole.bin")
    with tempfile.TemporaryDirectory() as folder:
        for number, text in enumerate((content, Path("whole.bin").read_bytes()[:cut] + content)):
            path = Path(folder, f"{number}{suffix}")
            path.write_bytes(text)
            with contextlib.suppress(ValueError, OSError):
                read_source(find_source("init.path", str(path)))


NEEDS_NO_SOURCE = ["trainer.steps=2", "trainer.save_every=1", "hydra.run.dir=new"]


@pytest.mark.parametrize("kind", ["pickle", "sharded"])
def test_resume_evaluate_and_export_do_not_need_a_file_of_another_program(at_home, kind):
    state = load_file("run/exports/model.safetensors")
    Path("source").mkdir()
    if kind == "pickle":
        path = "source/last.ckpt"
        torch.save({"state_dict": {f"model.{name}": value for name, value in state.items()}}, path)
    else:
        path = "source"
        save_file(state, "source/a.safetensors")
        index = {"weight_map": dict.fromkeys(state, "a.safetensors")}
        Path("source/model.safetensors.index.json").write_text(json.dumps(index))
    printed = at_home.run(f"init.path={path}", *NEEDS_NO_SOURCE, "optimizer.lr=0", "optimizer.weight_decay=0")
    assert re.search(r"loaded +4: first.weight", printed)
    weights = load_file("new/checkpoints/step_00000002/model.safetensors")
    assert all(torch.equal(weights[name], state[name]) for name in state)
    shutil.rmtree("source")
    evaluate.main(["new", "--allow-targets", "own"])
    export.main(["new", "--allow-targets", "own"])
    assert "loaded " not in at_home.run("resume=new", "trainer.steps=3")
    printed = at_home.run("resume=new", "init.path=source", status=2)
    assert printed.startswith("init.path=source: expected it of a new run alone")
