"""Each optimization in whole runs of the default experiment: it trains, resumes exactly, exports, evaluates alike."""

import json
import shutil
import sys

import pytest
from conftest import CANARY, Project, read_numbers

from runner import evaluate, export
from runner.run import evaluation, saved_model
from runner.utils import io

SMALL = [
    "model.width=32", "model.depth=3", "model.heads=2", "model.dropout=0.1", "data.train.context=32",
    "data.eval.max_windows=8", "data.batch_size=4", "report.num_bytes=2", "trainer.steps=4", "trainer.save_every=2",
    "trainer.eval_every=4", "trainer.eval_at_start=false", "trainer.export_every=4", "trainer.log_every=1",
    "distributed.device=cpu", "tracking.tensorboard=false",
]  # fmt: skip
OWN = """
from torch import nn


class Norm(nn.RMSNorm):
    pass


def make_norm(old, gain=1.0):
    new = Norm(old.normalized_shape, eps=old.eps)
    new.weight = old.weight
    return new
"""
UNSLOTH = "optimizations.unsloth=true"
FULL = "optimizations.checkpointing=full"
LORA = "optimizations.lora={rank:2,dropout:0.1,exclude:[head]}"
EMA = "optimizations.ema.decay=0.5"
BLOCKS = "optimizations.compile={scope:blocks,backend:aot_eager}"
TRACED = "optimizations.compile={scope:blocks,backend:eager}"
REPLACE = "optimizations.replace=[{match:torch.nn.RMSNorm,with:own.Norm,include:[blocks.*.*]}]"
FP8 = "optimizations.fp8={enabled:true,emulate:true,exclude:[head]}"
CASES = {
    "unsloth": [UNSLOTH],
    "checkpointing": [FULL],
    "every other block": ["optimizations.checkpointing={every:2}"],
    "compile blocks": [BLOCKS],
    "compile the whole": ["optimizations.compile={scope:whole,backend:eager}"],
    "memory budget": [BLOCKS, "optimizations.checkpointing={memory_budget:0.5}"],
    "replace": [REPLACE],
    "freeze": ["optimizations.freeze=[embedding.*,blocks.0.*]"],
    "lora": [LORA],
    "adapter": [LORA, "optimizations.lora.export=adapter"],
    "ema": [EMA],
    "fp8": [FP8],
    "device map": ["optimizations.device_map.budgets={cpu:null}"],
    "unsloth, compile": [UNSLOTH, TRACED],
    "unsloth, lora": [UNSLOTH, LORA],
    "unsloth, ema, replace": [UNSLOTH, EMA, REPLACE],
    "lora, ema": [LORA, EMA],
    "checkpointing, fp8": [FULL, FP8],
    "compile, lora": [TRACED, LORA],
}
SAME_NUMBERS = ("unsloth", "checkpointing", "every other block", "replace", "device map")  # as without, to the bit
MERGED = [case for case, given in CASES.items() if LORA in given and case != "adapter"]  # rounded in another order


class Default(Project):
    """The default experiment, made small."""

    command = property(lambda self: [sys.executable, "-m", "runner", *SMALL])
    loaded = ("torch._dynamo",)


@pytest.fixture
def project(tmp_path, monkeypatch):
    made = Default(tmp_path)
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    sys.modules.pop("own", None)
    yield made
    sys.modules.pop("own", None)
    made.close()


@pytest.fixture(scope="module")
def plain_run(tmp_path_factory):
    project = Default(tmp_path_factory.mktemp("plain"))
    project.run("hydra.run.dir=run")
    return project.folder / "run"


def evaluated(place):
    opening = saved_model.open_export if place.is_file() else saved_model.open_checkpoint
    numbers, _ = evaluation.evaluate(opening(place, ["report.num_bytes=0"], ["own"]))
    return numbers


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:The .grad attribute")
@pytest.mark.parametrize("case", CASES)
def test_it_trains_resumes_exactly_exports_and_evaluates_to_the_same_number(case, project, plain_run):
    printed = project.run(*CASES[case], "hydra.run.dir=run")
    folder = project.folder / "run"
    assert "optimizations:" in printed
    (last,) = [line for line in read_numbers(folder) if "eval/loss" in line]
    if case in SAME_NUMBERS:
        assert read_numbers(folder) == read_numbers(plain_run)

    shutil.copytree(folder, project.folder / "again")
    project.run("resume=again/checkpoints/step_00000002", "allow_targets=[own]")
    assert read_numbers(project.folder / "again") == read_numbers(folder)
    for name in ("model.safetensors", "model.optimizer.safetensors"):
        one, other = (each / "checkpoints/step_00000004" / name for each in (folder, project.folder / "again"))
        assert one.read_bytes() == other.read_bytes()

    assert evaluated(folder)["eval/loss"] == last["eval/loss"]
    export = folder / "exports/model.safetensors"
    assert evaluated(export)["eval/loss"] == (
        pytest.approx(last["eval/loss"], rel=1e-5) if case in MERGED else last["eval/loss"]
    )
    names = set(io.load(export))
    if case == "adapter":
        assert all(name.endswith((".lora_a", ".lora_b")) for name in names)
    else:
        assert names == set(io.load(plain_run / "exports/model.safetensors"))


def test_what_was_done_is_told_before_and_after_the_first_step(project):
    printed = project.run(UNSLOTH, "trainer=debug", "hydra.run.dir=run")
    assert "unsloth     3: blocks.0, blocks.1, blocks.2, recomputed in the backward pass" in printed
    assert "there is no accelerator to move them from" in printed
    assert "block     calls  inputs" in printed
    assert "blocks.0  1      0.02 MiB" in printed  # and not what the evaluation before it called
    assert "Memory of a step: parameters 0.20 MiB, gradients 0.20 MiB, optimizer 0.41 MiB, block inputs" in printed


@pytest.mark.parametrize(
    ("given", "status", "expected"),
    [
        (["optimizations.unsloth=maybe"], 2, "optimizations.unsloth=maybe: expected true, false, or a mapping"),
        (["optimizations.unsloth={keep:2}"], 2, "optimizations.unsloth.keep: no such key; did you mean keep_last"),
        (["optimizations.unsloth={include:[layers.*]}"], 2, "blocks: 'layers.*' matches no module; blocks are:"),
        (["optimizations.unsloth={offload:sometimes}"], 2, "optimizations.unsloth.offload: Invalid value 'sometimes'"),
        (["optimizations.checkpointing=some"], 2, "optimizations.checkpointing=some: expected none, full, or a"),
        (["optimizations.unsloth={host_limit:-1}"], 2, "host_limit=-1: expected 0 or more"),
        ([TRACED, "optimizations.checkpointing={memory_budget:0.5}"], 2, "the backend eager compiles nothing"),
        (["optimizations.replace=[{with:own.Norm}]"], 2, "optimizations.replace[0].match: expected the path"),
        (["optimizations.replace=[{match:torch.relu,with:own.Norm}]"], 2, "expected a class of modules"),
        ([REPLACE.replace("include:[blocks.*.*]", "arguments:{foo:1}")], 2, "blocks.0.attention_norm"),
        (["optimizations.device_map.budgets={meta:null}"], 2, "device_map.budgets.meta: nothing is computed there"),
        (["optimizations.device_map.budgets={cuda:null}"], 2, "there is no device cuda here"),
        (["optimizations.device_map.bytes_factor=-1"], 2, "device_map.bytes_factor=-1.0: expected more than 0"),
        (["optimizations.lora.dropout=1.5"], 2, "optimizations.lora.dropout=1.5: expected at least 0 and less than 1"),
        ([UNSLOTH, FULL], 2, "optimizations.checkpointing: unsloth recomputes the blocks already"),
        ([UNSLOTH, "optimizations.compile.scope=whole"], 2, "optimizations.compile.scope=whole: recomputed blocks"),
        (["optimizations.compile={scope:blocks,backend:fast}"], 2, "compile: backend='fast': expected one of"),
        (["optimizations.checkpointing={memory_budget:0.5}"], 2, "memory_budget=0.5: expected 0 to 1, where compile"),
        (["optimizations.replace=[{match:torch.nn.Conv2d,with:own.Norm}]"], 2, "Conv2d"),
        (["optimizations.replace=[{match:torch.nn.Conv9,with:own.Norm}]"], 2, "torch.nn has no 'Conv9'; did you mean"),
        (["optimizations.replace=[{match:torch.nn.RMSNorm}]"], 2, "optimizations.replace[0]: expected {match:"),
        (["optimizations.lora.rank=-1"], 2, "optimizations.lora.rank=-1: expected 1 or more, or 0"),
        (["optimizations.lora={rank:2,include:[blocks.*]}"], 2, "lora"),
        (["optimizations.ema.decay=1"], 2, "optimizations.ema.decay=1.0: expected at least 0"),
        ([EMA, "optimizer=schedulefree"], 2, "optimizations.ema: AdamWScheduleFree evaluates an average of its own"),
        (["optimizations.fp8.enabled=true"], 2, "fp8 needs a GPU of compute capability 8.9 or more; set emulate=true"),
        (["optimizations.device_map.budgets={cpu:1KB}"], 2, "optimizations: "),
        (["+engines={a:{optimizations:{unslot:true}}}"], 2, "engines.a.optimizations.unslot: no such key"),
    ],
)  # fmt: skip
def test_a_mistake_is_told_before_anything_is_written(project, given, status, expected):
    assert expected in project.run(*given, "hydra.run.dir=run", status=status)
    assert not (project.folder / "run").exists()


def test_a_block_that_is_never_called_ends_the_run_within_ten_steps(project):
    (project.folder / "own.py").write_text(
        "from runner.examples.byte_gpt import ByteGPT\n"
        "class Skips(ByteGPT):\n"
        "    def logits(self, inputs):\n"
        "        kept, self.blocks = self.blocks, self.blocks[:2]\n"
        "        try:\n"
        "            return super().logits(inputs)\n"
        "        finally:\n"
        "            self.blocks = kept\n"
    )
    for given, expected in (
        (UNSLOTH, "blocks never called so far: blocks.2; leave them out with exclude"),
        (LORA, "never called so far: lora: blocks.2.attention_out, blocks.2.mlp_in ... blocks.2.qkv"),
    ):
        printed = project.run("model._target_=own.Skips", given, "trainer.steps=12", "hydra.run.dir=run", status=1)
        assert "not called in the first step, and waited for" in printed
        assert "Saved" in printed
        assert f"The run ends: optimizations of model: {expected}" in printed
        shutil.rmtree(project.folder / "run")


def test_an_engines_own_optimizations_stand_on_top(project):
    printed = project.run(
        "+engines={a:{},b:{optimizations:{lora:{rank:0},unsloth:true}}}", LORA, "trainer.steps=1", "hydra.run.dir=run"
    )
    assert "a, optimizations:\n  lora (rank 2)" in printed
    assert "b, optimizations:\n  unsloth" in printed


def test_memory_may_change_on_resume_and_what_changes_the_numbers_may_not(project, plain_run):
    shutil.copytree(plain_run, project.folder / "run")
    project.run("resume=run/checkpoints/step_00000002", UNSLOTH)
    assert read_numbers(project.folder / "run") == read_numbers(plain_run)
    printed = project.run("resume=run", EMA, "trainer.steps=6", status=2)
    assert "optimizations.ema.decay: 0.0 -> 0.5" in printed


THROUGH = "torch.nn.modules.module.torch.save"  # of a module that another brings in


@pytest.mark.parametrize(
    ("path", "reason"),
    [("evil.touch", "its module is not on the allow-list"), (THROUGH, "it goes through the module torch")],
)
@pytest.mark.parametrize("key", ["with", "match"])
def test_a_rule_of_a_strangers_config_is_refused_before_it_is_imported(project, plain_run, path, reason, key, capsys):
    shutil.copytree(plain_run, project.folder / "run")
    config = project.folder / "run/.hydra/config.yaml"
    rule = {"match": "torch.nn.RMSNorm", "with": "torch.nn.LayerNorm", "arguments": {"f": "canary"}} | {key: path}
    config.write_text(config.read_text().replace("replace: []", f"replace: [{json.dumps(rule)}]"))
    (project.folder / "evil.py").write_text(CANARY + "touch = Evil\n")
    expected = f"optimizations.replace.0.{key}={path}: {reason}"
    assert expected in project.run("resume=run", "trainer.steps=6", status=2)
    for main in (evaluate.main, export.main):
        with pytest.raises(SystemExit):
            main(["run"])
        assert expected in capsys.readouterr().err
    assert not (project.folder / "canary").exists()


def test_a_rule_of_an_exports_metadata_is_refused(project, plain_run, capsys):
    path = project.folder / "model.safetensors"
    facts, weights = (
        io.read_metadata(plain_run / "exports/model.safetensors"),
        io.load(plain_run / "exports/model.safetensors"),
    )
    config = json.loads(facts["config"])
    config["optimizations"]["replace"] = [{"match": "torch.nn.RMSNorm", "with": THROUGH, "arguments": {"f": "canary"}}]
    io.save(weights, path, {**facts, "config": json.dumps(config)})
    with pytest.raises(SystemExit):
        evaluate.main([str(path)])
    assert "it goes through the module torch" in capsys.readouterr().err
    assert not (project.folder / "canary").exists()


def test_weights_are_exported_where_their_hardware_is_not(project, plain_run):
    shutil.copytree(plain_run, project.folder / "run")
    config = project.folder / "run/.hydra/config.yaml"
    text = (
        config.read_text()
        .replace("enabled: false", "enabled: true")
        .replace("budgets: null", "budgets: {'cuda:0': null}")
    )
    config.write_text(text)
    export.main(["run", "--output", "out"])
    assert (
        io.load(project.folder / "out/model.safetensors").keys()
        == io.load(plain_run / "exports/model.safetensors").keys()
    )


def test_an_adapter_that_reaches_nothing_ends_the_run_before_its_backward(project):
    (project.folder / "own.py").write_text(
        "import torch\nfrom runner.examples.byte_gpt import ByteGPT\n"
        "class Reads(ByteGPT):\n"
        "    def __init__(self, **rest):\n"
        "        super().__init__(**rest)\n"
        "        self.extra = torch.nn.Linear(4, 4)\n"
    )
    given = "optimizations.lora={rank:2,include:[extra]}"
    printed = project.run("model._target_=own.Reads", given, "hydra.run.dir=run", status=1)
    assert "The run ends: optimizations of model: never called so far: lora: extra" in printed


@pytest.mark.parametrize("preset", ["low_vram", "fast"])
def test_presets_compose(project, preset):
    printed = project.run(f"optimizations={preset}", "--cfg", "job", "--package", "optimizations")
    assert ("unsloth: true" in printed) is (preset == "low_vram")
    assert ("scope: blocks" in printed) is (preset == "fast")


def test_every_trained_parameter_is_held_by_the_optimizer(project):
    (project.folder / "own.py").write_text(
        "import torch\n"
        "def some(params, lr, **rest):\n"
        "    return torch.optim.SGD([p for n, p in params if 'norm' in n], lr=lr)\n"
    )
    printed = project.run("optimizer={_target_:own.some,lr:0.1}", "hydra.run.dir=run", status=2)
    assert "optimizer: it lacks parameters that are trained: embedding.weight, blocks.0.qkv.weight" in printed
