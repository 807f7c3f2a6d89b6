"""Each optimization in whole runs of the default experiment: it trains, resumes exactly, exports, evaluates alike."""

import itertools
import json
import re
import shutil
import subprocess
import sys

import pytest
import yaml
from conftest import CANARY, Project, read_numbers
from test_checks import composed

from runner import evaluate, export
from runner.config import checks, optimizations
from runner.config.errors import ConfigError
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


class Damp:
    def __init__(self, ratio):
        self.ratio = ratio

    def apply(self, module, context):
        from runner.utils.wrapper import Applied, Purpose

        if context.purpose is Purpose.use:  # the exported weights are damped already
            return None
        name = "blocks.0.mlp_in"
        hook = module.get_submodule(name).register_forward_hook(lambda part, given, output: output * self.ratio)

        def export(state):
            return {key: value * self.ratio if key.startswith(name + ".") else value for key, value in state.items()}

        return Applied([("damp", f"by {self.ratio}")], undo=hook.remove, expected=[name], export=export)
"""
UNSLOTH = "optimizations.unsloth=true"
FULL = "optimizations.checkpointing=full"
LORA = "optimizations.lora={rank:2,dropout:0.1,exclude:[head]}"
EMA = "optimizations.ema.decay=0.5"
BLOCKS = "optimizations.compile={scope:blocks,backend:aot_eager}"
TRACED = "optimizations.compile={scope:blocks,backend:eager}"
REPLACE = "optimizations.replace=[{match:torch.nn.RMSNorm,with:own.Norm,include:[blocks.*.*]}]"
FP8 = "optimizations.fp8={enabled:true,emulate:true,exclude:[head]}"
MINE = "+optimizations.mine={_target_:own.Damp,ratio:0.5}"
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
    "own": [MINE],
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
        (["optimizations.unsloth={offload:sometimes}"], 2, "optimizations.unsloth.offload=sometimes: expected one of"),
        (["optimizations.checkpointing=some"], 2, "checkpointing=some: expected true, false, full, none, or a mapping"),
        (["optimizations.unsloth={host_limit:-1}"], 2, "host_limit=-1: expected 0 or more"),
        ([TRACED, "optimizations.checkpointing={memory_budget:0.5}"], 2, "the backend eager compiles nothing"),
        (["optimizations.replace=[{with:own.Norm}]"], 2, "optimizations.replace.rules[0].match: expected the path"),
        (["optimizations.replace=[{match:torch.relu,with:own.Norm}]"], 2, "expected a class of modules"),
        ([REPLACE.replace("include:[blocks.*.*]", "arguments:{foo:1}")], 2, "blocks.0.attention_norm"),
        (["optimizations.device_map.budgets={meta:null}"], 2, "device_map.budgets.meta: nothing is computed there"),
        (["optimizations.device_map.budgets={cuda:null}"], 2, "there is no device cuda here"),
        (["optimizations.device_map.bytes_factor=-1"], 2, "device_map.bytes_factor=-1.0: expected more than 0"),
        (["optimizations.lora.dropout=1.5"], 2, "optimizations.lora.dropout=1.5: expected at least 0 and less than 1"),
        ([UNSLOTH, FULL], 2, "optimizations.checkpointing: unsloth recomputes the blocks already"),
        ([UNSLOTH, "optimizations.compile.scope=whole"], 2, "optimizations.compile.scope=whole: recomputed blocks"),
        (["optimizations.compile={scope:blocks,backend:fast}"], 2, "backend='fast': expected one of"),
        (["optimizations.checkpointing={memory_budget:0.5}"], 2, "memory_budget=0.5: is of compiled blocks"),
        (["optimizations.replace=[{match:torch.nn.Conv2d,with:own.Norm}]"], 2, "Conv2d"),
        (["optimizations.replace=[{match:torch.nn.Conv9,with:own.Norm}]"], 2, "torch.nn has no 'Conv9'; did you mean"),
        (["optimizations.replace=[{match:torch.nn.RMSNorm}]"], 2, "optimizations.replace.rules[0]: expected {match:"),
        (["optimizations.lora='true'"], 2, "lora=true: expected true, false, or a mapping of values, found a text"),
        (["optimizations.lora.rank=x"], 2, "optimizations.lora.rank=x: expected a whole number, found a text"),
        (["optimizations.lora.include=x"], 2, "optimizations.lora.include=x: expected a list of texts or null"),
        (["optimizations.unsloth.keep_last=null"], 2, "unsloth.keep_last=null: expected a whole number"),
        (["optimizations.unsloth=${nope}"], 2, "Interpolation key 'nope' not found"),
        (["optimizations.freeze=true"], 2, "optimizations.freeze.patterns=[]: expected one or more"),
        (["optimizations.freeze.mode=train"], 2, "optimizations.freeze.patterns=[]: expected one or more"),
        (["optimizations.replace=true"], 2, "optimizations.replace.rules=[]: expected one or more"),
        (["+engines.a.freeze=true"], 2, "engines.a.optimizations.freeze.patterns=[]: expected one or more"),
        (["optimizations.freeze_mode=trian"], 2, "optimizations.freeze_mode=trian: expected one of eval, train"),
        (["ema.decay=x"], 2, "ema.decay=x: expected a number, found a text"),
        (["+optimizations.mine=true"], 2, "one of your own: +optimizations.mine={_target_: own.Class}"),
        (["optimizations.lora.rank=-1"], 2, "optimizations.lora.rank=-1: expected a whole number, 1 or more"),
        (["optimizations.lora={rank:2,include:[blocks.*]}"], 2, "lora"),
        (["optimizations.ema.decay=1"], 2, "ema.decay=1.0: expected at least 0"),
        ([EMA, "optimizer=schedulefree"], 2, "ema: AdamWScheduleFree evaluates an average of its own"),
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
    assert "  ema: null -> {_target_: runner.engines.ema.EMA, decay: 0.5, warmup: false}\n" in printed


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
    config.write_text(config.read_text().replace("replace: false", f"replace: [{json.dumps(rule)}]"))
    (project.folder / "evil.py").write_text(CANARY + "touch = Evil\n")
    expected = f"optimizations.replace.rules.0.{key}={path}: {reason}"
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
        .replace("fp8: false", "fp8: true")
        .replace("device_map: false", "device_map: {budgets: {'cuda:0': null}}")
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
    assert ("built_in.Unsloth" in printed) is (preset == "low_vram")
    assert ("scope: blocks" in printed) is (preset == "fast")


def test_every_trained_parameter_is_held_by_the_optimizer(project):
    (project.folder / "own.py").write_text(
        "import torch\n"
        "def some(params, lr, **rest):\n"
        "    return torch.optim.SGD([p for n, p in params if 'norm' in n], lr=lr)\n"
    )
    printed = project.run("optimizer={_target_:own.some,lr:0.1}", "hydra.run.dir=run", status=2)
    assert "optimizer: it lacks parameters that are trained: embedding.weight, blocks.0.qkv.weight" in printed


OFF = dict.fromkeys(["freeze", "lora", "replace", "fp8", "device_map", "compile", "unsloth", "checkpointing"], False)


def switched(*overrides):
    return checks.to_plain(composed(*overrides))["optimizations"]


def preset(name, **values):
    return yaml.safe_load((checks.CONF_DIR / "optimization" / f"{name}.yaml").read_text()) | values


def test_nothing_is_on_by_default():
    assert switched() == OFF
    assert checks.to_plain(composed())["ema"] is None


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["unsloth=true"], {"unsloth": preset("unsloth")}),
        (["lora={rank: 4}"], {"lora": preset("lora", rank=4)}),
        (["lora.rank=4", "lora.alpha=2"], {"lora": preset("lora", rank=4, alpha=2.0)}),
        (["unsloth.keep_last=2", "unsloth=true"], {"unsloth": preset("unsloth", keep_last=2)}),
        (["lora=true", "lora={rank: 4}", "lora.alpha=2"], {"lora": preset("lora", rank=4, alpha=2.0)}),
        (["checkpointing=full"], {"checkpointing": preset("checkpointing")}),
        (["checkpointing={every: 2}"], {"checkpointing": preset("checkpointing", every=2)}),
        (["freeze=[a]", "freeze=true"], {"freeze": preset("freeze", patterns=["a"])}),
        (["freeze=[a]", "freeze.mode=train"], {"freeze": preset("freeze", patterns=["a"], mode="train")}),
        (["lora.rank=0", "lora.alpha=2"], {}),
        (["freeze=[a]", "freeze_mode=train"], {"freeze": preset("freeze", patterns=["a"], mode="train")}),
        (["fp8.enabled=true", "fp8.emulate=true"], {"fp8": preset("fp8", emulate=True)}),
        (["compile.scope=whole"], {"compile": preset("compile", scope="whole")}),
        (["lora={rank: 0}", "fp8={enabled: false}", 'compile={scope: "off"}', "freeze=[]", "replace=[]"], {}),
        (["checkpointing=none", "device_map.budgets=null", "unsloth=false"], {}),
    ],
)
def test_each_way_to_enable_gives_the_same_in_any_order(overrides, expected):
    for order in itertools.islice(itertools.permutations(overrides), 6):
        found = switched(*(f"optimizations.{override}" for override in order))
        assert {name: found[name] for name in OFF} == {**OFF, **expected}


def test_values_are_added_to_a_preset_and_false_switches_it_off():
    assert switched("optimizations=low_vram", "optimizations.unsloth.keep_last=2")["unsloth"]["keep_last"] == 2
    assert switched("optimizations=low_vram", "optimizations.unsloth=true")["unsloth"] == preset("unsloth")
    assert switched("optimizations=low_vram", "optimizations.unsloth=false") == OFF


@pytest.mark.parametrize("off", ["lora=false", "lora=null", "lora={rank: 0}", "~lora"])
@pytest.mark.parametrize("value", ["lora.rank=4", "lora={rank: 4}", "lora=true"])
def test_an_optimization_that_is_off_and_has_a_value_on_one_command_line_contradicts(off, value):
    off = f"~optimizations.{off[1:]}" if off.startswith("~") else f"optimizations.{off}"
    for order in itertools.permutations([off, f"optimizations.{value}"]):
        with pytest.raises(ConfigError, match=f"{re.escape(off)}: it is switched off, and optimizations"):
            composed(*order)


def test_true_and_a_value_that_switches_off_contradict():
    for name, value in (("lora", "rank=0"), ("fp8", "enabled=false"), ("ema", "decay=0"), ("freeze", "patterns=[]")):
        for order in itertools.permutations([f"optimizations.{name}=true", f"optimizations.{name}.{value}"]):
            with pytest.raises(ConfigError, match=f"optimizations.{name}.*: it is switched off"):
                composed(*order)
    with pytest.raises(ConfigError, match="checkpointing=none: it is switched off"):
        composed("optimizations.checkpointing=none", "optimizations.checkpointing=full")


@pytest.mark.parametrize("key", ["optimizations", "+engines.a.optimizations"])
def test_a_misspelt_name_is_an_error_where_it_switches_off(key):
    with pytest.raises(ConfigError, match=r"optimizations\.lorra: no such key; did you mean lora"):
        composed(f"{key}.lorra=false")


def test_values_over_a_list_keep_it_and_a_list_replaces_it(tmp_path):
    (tmp_path / "optimizations").mkdir()
    (tmp_path / "optimizations" / "mine.yaml").write_text("defaults: [default]\nfreeze: [a]\n")
    mine = (f"hydra.searchpath=[file://{tmp_path}]", "optimizations=mine")
    assert switched(*mine)["freeze"] == preset("freeze", patterns=["a"])
    assert switched(*mine, "optimizations.freeze=true")["freeze"] == preset("freeze", patterns=["a"])
    train = preset("freeze", patterns=["a"], mode="train")
    assert switched(*mine, "optimizations.freeze.mode=train")["freeze"] == train
    assert switched(*mine, "optimizations.freeze=[b]")["freeze"] == preset("freeze", patterns=["b"])
    assert switched(*mine, "optimizations.freeze=[]")["freeze"] is False


@pytest.mark.parametrize("value", ["true", "false"])
def test_a_switch_may_be_an_interpolation(value):
    found = switched("optimizations.unsloth=${trainer.eval_at_start}", f"trainer.eval_at_start={value}")
    assert found["unsloth"] == (preset("unsloth") if value == "true" else False)


def test_ema_is_a_group_and_has_its_earlier_shorthand():
    ema = {"_target_": "runner.engines.ema.EMA", "decay": 0.999, "warmup": False}
    for overrides, expected in (
        (["ema=default"], ema),
        (["ema.decay=0.5"], {**ema, "decay": 0.5}),
        (["optimizations.ema.decay=0.5"], {**ema, "decay": 0.5}),
        (["ema=default", "optimizations.ema={decay: 0.5, warmup: true}"], {**ema, "decay": 0.5, "warmup": True}),
        (["ema.decay=0.5", "optimizations.ema=true"], {**ema, "decay": 0.5}),
        (["optimizations.ema.decay=0"], None),
        (["ema.decay=0"], None),
        (["ema=default", "optimizations.ema=false"], None),
    ):
        plain = checks.to_plain(composed(*overrides))
        assert plain["ema"] == expected
        assert plain["optimizations"] == OFF


def test_an_engines_own_are_on_top_of_the_shared():
    engines = "+engines={a: {}, b: {optimizations: {lora: {alpha: 1}, unsloth: false, ema: {decay: 0.5}}, freeze: [x]}}"
    cfg = composed(
        engines, "optimizations.lora.rank=4", "optimizations.unsloth=true", "optimizations.freeze_mode=train"
    )
    plain = checks.to_plain(cfg)
    assert optimizations.of_engine(plain, "a") == ({"lora": preset("lora", rank=4), "unsloth": preset("unsloth")}, None)
    nodes, ema = optimizations.of_engine(plain, "b")
    assert nodes == {
        "lora": preset("lora", rank=4, alpha=1.0),
        "freeze": preset("freeze", patterns=["x"], mode="train"),
    }
    assert ema["decay"] == 0.5
    typed = ["++engines.a.optimizations.unsloth.keep_last=3", "++engines.a.optimizations.unsloth=true"]
    nodes, _ = optimizations.of_engine(checks.to_plain(composed("+engines={a: {optimizations: {}}}", *typed)), "a")
    assert nodes == {"unsloth": preset("unsloth", keep_last=3)}


# Of the config of a run that was made before the optimizations were objects.
BEFORE = """
freeze: []
freeze_mode: eval
lora: {rank: 2, alpha: null, dropout: 0.1, include: null, exclude: [head], also_train: [], export: merged}
replace: []
fp8: {enabled: false, include: null, exclude: [], recipe: tensorwise, emulate: false}
device_map: {budgets: null, bytes_factor: 4.0}
compile: {scope: 'off', backend: inductor, mode: null, dynamic: null}
unsloth: true
checkpointing: none
ema: {decay: 0.5, warmup: false}
"""


def test_a_run_of_before_goes_on_as_it_would_have(project):
    project.run(LORA, EMA, UNSLOTH, "hydra.run.dir=run")
    folder = project.folder / "run"
    before = read_numbers(folder)
    config = folder / ".hydra/config.yaml"
    content = yaml.safe_load(config.read_text())
    expanded = {key: content[key] for key in ("optimizations", "ema")}
    content["optimizations"] = yaml.safe_load(BEFORE)
    del content["ema"]
    plain = optimizations.expand(content)
    assert plain["optimizations"] == {**expanded["optimizations"], "freeze_mode": "eval"}
    assert plain["ema"] == expanded["ema"]
    assert optimizations.expand(plain) == plain
    config.write_text(yaml.safe_dump(content))
    last = before[-1] if "eval/loss" in before[-1] else next(line for line in before if "eval/loss" in line)
    assert evaluated(folder)["eval/loss"] == last["eval/loss"]
    project.run("resume=run/checkpoints/step_00000002", "optimizations.unsloth=false")
    assert read_numbers(folder) == before
    resumed = yaml.safe_load(config.read_text())
    assert resumed["optimizations"]["unsloth"] is False
    assert resumed["optimizations"]["lora"] == expanded["optimizations"]["lora"]


def test_an_own_optimization_of_an_untrusted_run_is_refused(project, plain_run):
    shutil.copytree(plain_run, project.folder / "run")
    config = project.folder / "run/.hydra/config.yaml"
    config.write_text(config.read_text().replace("unsloth: false", "unsloth: false\n  mine: {_target_: own.Damp}"))
    printed = project.run("resume=run", "trainer.steps=6", status=2)
    assert "optimizations.mine._target_=own.Damp: its module is not on the allow-list" in printed


def test_an_own_preset_needs_one_file(project):
    (project.folder / "mine/optimization").mkdir(parents=True)
    (project.folder / "mine/optimization/damp.yaml").write_text("_target_: own.Damp\nratio: 0.5\n")
    place = f"hydra.searchpath=[file://{project.folder}/mine]"
    printed = project.run(place, "optimizations.damp=true", "hydra.run.dir=run")
    assert "damp        by 0.5" in printed
    for given, expected in (
        ("optimizations.damp.ratoi=1", "optimizations.damp.ratoi: own.Damp takes no such argument; did you mean ratio"),
        ("optimizations.dampp=true", "optimizations.dampp: no such key; did you mean damp?"),
    ):
        assert expected in project.run(place, given, "hydra.run.dir=other", status=2)


def test_mistakes_are_found_without_torch():
    code = (
        "import sys\n"
        "from runner.config import optimizations\n"
        "node = optimizations.expand({'optimizations': {'lora': {'rank': -1}}})['optimizations']['lora']\n"
        "try:\n"
        "    optimizations.make_built_in(node)\n"
        "except ValueError as error:\n"
        "    print(error)\n"
        "assert 'torch' not in sys.modules\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "rank=-1: expected a whole number, 1 or more\n"
