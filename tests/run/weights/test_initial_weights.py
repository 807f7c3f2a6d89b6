import json
import os
import pickle
import re
import shlex
import shutil
from pathlib import Path

import pytest
import torch
from conftest import read_metrics, read_numbers
from omegaconf import OmegaConf
from safetensors.torch import load_file, save_file

from runner import evaluate, export
from runner.checkpoint import checkpoints as checkpoint
from runner.config import optimizations
from runner.config.errors import ConfigError
from runner.config.spec import ExperimentSpec
from runner.run import saved_model
from runner.run.build.engines import build_engines
from runner.run.weights import initial_weights

CPU = torch.device("cpu")
NONE_ELSE = ["  missing     0", "  unused      0", "  mismatched  0"]
UNTRAINED = ["trainer.steps=1", "trainer.save_every=1", "optimizer.lr=0", "optimizer.weight_decay=0"]


def weights_of(path):
    return load_file(Path(path) / "model.safetensors")


def are_equal(one, other):
    return one.keys() == other.keys() and all(torch.equal(one[name], other[name]) for name in one)


@pytest.fixture
def plain(at_home):
    """The resolved config of the finished run, for a new run."""
    return saved_model.open_checkpoint(Path("run"), prefixes=["own"]).plain


def start(plain, text="run", **changes):
    """Builds a new run's engines with `init_from`; returns the weights of each, and the lines for its log."""
    settings = plain | {"init_from": text} | changes
    other_run = initial_weights.find_initial_weights(settings)
    engines = build_engines(ExperimentSpec.from_plain(settings), CPU, builder=other_run)
    return {name: engine.module.state_dict() for name, engine in engines.items()}, other_run.lines


def with_lora(plain, rank=2):
    return optimizations.expand(plain | {"optimizations": {**plain["optimizations"], "lora": {"rank": rank}}})


@pytest.mark.parametrize(
    ("text", "source", "line"),
    [
        ("run", "run/checkpoints/step_00000012", "init_from=run: weights of step 12 of run"),
        ("run/checkpoints/step_00000008", "run/checkpoints/step_00000008", "weights of step 8 of "),
        ("run/exports/model.safetensors", "run/exports", "weights of step 12 of run/exports/model.safetensors"),
    ],
)
def test_a_new_run_starts_with_the_weights_of_a_run_a_checkpoint_or_an_export(plain, text, source, line):
    found, lines = start(plain, text)
    assert are_equal(found["model"], weights_of(source))
    assert line in lines[0]
    assert lines[1:] == ["  loaded      4: first.weight, first.bias ... second.bias", *NONE_ELSE]


def test_config_and_log_of_the_new_run_name_the_source(trained):
    printed = trained.run("init_from=run", "hydra.run.dir=new", *UNTRAINED)
    assert printed.count("init_from=run: weights of step 12 of run\n") == 1
    found = weights_of(trained.folder / "new/checkpoints/step_00000001")
    assert are_equal(found, weights_of(trained.folder / "run/checkpoints/step_00000012"))
    assert [line["step"] for line in read_numbers(trained.folder / "new")] == [0, 1, 1]
    state = json.loads((trained.folder / "new/checkpoints/step_00000001/trainer.json").read_text())
    assert state["loop"]["step"] == 1
    assert OmegaConf.load(trained.folder / "new/.hydra/config.yaml").init_from == "run"


def test_resume_evaluate_and_export_do_not_need_the_source(at_home, monkeypatch):
    source = at_home.folder.resolve() / "source"
    shutil.copytree("run", source)
    at_home.run(f"init_from={source}", "hydra.run.dir=new", "trainer.steps=2", "trainer.save_every=1")
    shutil.rmtree(source)
    evaluate.main(["new", "--allow-targets", "own"])
    export.main(["new", "--allow-targets", "own"])
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")  # a scheduler starts the same command again
    assert "weights of" not in at_home.run(f"init_from={source}", "hydra.run.dir=new", "trainer.steps=3")
    assert OmegaConf.load("new/.hydra/config.yaml").init_from == str(source)
    assert [line["step"] for line in read_metrics(at_home.folder / "new") if "train/loss" in line] == [1, 2, 3]


def test_a_resumed_run_rejects_another_init_from(trained):
    printed = trained.run("resume=run", "init_from=run", "trainer.steps=13", status=2)
    assert printed == "init_from=run: expected it of a new run alone, found resume=run; leave one of the two out\n"
    printed = trained.run("resume=run", "+engines.a.init_from=run", status=2)
    assert printed.startswith("+engines.a.init_from=run: expected it of a new run alone")


def test_the_remedy_for_a_rejected_change_starts_a_new_run_from_the_weights(trained):
    folder = trained.folder / "a run's folder"
    (trained.folder / "run").rename(folder)
    printed = trained.run(f'resume="{folder.name}"', "seed=3", status=2)
    assert "or start a new run from its weights: " in printed
    assert "(without resume=) with the same overrides\n" in printed
    remedy = shlex.split(printed.rpartition("its weights: ")[2].partition(" (without")[0])
    printed = trained.run(*remedy, "seed=3", "hydra.run.dir=new", *UNTRAINED)
    assert "weights of step 12 of a run's folder" in printed
    found = weights_of(trained.folder / "new/checkpoints/step_00000001")
    assert are_equal(found, weights_of(folder / "checkpoints/step_00000012"))


def test_mismatching_weights_are_listed_in_one_message_and_no_folder_is_left(trained):
    state = load_file(trained.folder / "run/exports/model.safetensors")
    state["third.weight"] = state.pop("second.weight")
    save_file(state, trained.folder / "other.safetensors")
    printed = trained.run("init_from=other.safetensors", "+model.width=16", "hydra.run.dir=new", status=2)
    assert printed.splitlines() == [
        "init_from=other.safetensors: engine model: expected the weights of its model, found others",
        "  missing: second.weight",
        "  unused: third.weight",
        "  mismatched: first.weight (expected [16, 4], found [8, 4]), first.bias (expected [16], found [8])",
        "Name what differs in init.rename or init.exclude, or load what fits with init.strict=false",
    ]
    assert not (trained.folder / "new").exists()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nowhere", "init_from=nowhere: no such folder; expected a run's folder, one of its checkpoints/step_*, an"),
        ("conf", "init_from=conf: neither a run folder nor a checkpoint; expected"),
        ("own.py", "init_from=own.py: expected a run's folder, one of its checkpoints/step_*, an export"),
        ("broken.safetensors", "init_from=broken.safetensors: broken.safetensors: not a whole safetensors file"),
        ("empty", "init_from=empty: has no whole checkpoint"),
    ],
)
def test_a_path_without_run_checkpoint_or_export_is_reported(plain, text, message):
    Path("broken.safetensors").write_bytes(b"no header")
    Path("empty/checkpoints").mkdir(parents=True)
    with pytest.raises(ConfigError) as caught:
        start(plain, text)
    assert str(caught.value).startswith(message)


def test_an_engines_own_init_from_overrides_the_common_one(plain):
    engines = {"a": {}, "b": {"init_from": "run/checkpoints/step_00000004"}, "c": {"init_from": None}}
    with pytest.raises(ConfigError, match="init_from=run: expected weights of engine 'a', found those of model"):
        start(plain, engines={"a": {}, "b": {}})
    engines["a"]["init_from"] = "run/exports/model.safetensors"
    found, lines = start(plain, None, engines=engines)
    assert are_equal(found["a"], weights_of("run/exports"))
    assert are_equal(found["b"], weights_of("run/checkpoints/step_00000004"))
    fresh, _ = start(plain, None, engines={"a": {}, "b": {"init_from": "run"}, "c": {}})
    assert are_equal(found["c"], fresh["c"])
    assert [line.partition(":")[0] for line in lines if line.startswith("engines.")] == [
        "engines.a.init_from=run/exports/model.safetensors",
        "engines.b.init_from=run/checkpoints/step_00000004",
    ]


def test_a_missing_path_is_reported_with_its_key(trained):
    printed = trained.run("+engines.a={init_from:3}", status=2)
    assert printed == "engines.a.init_from=3: expected a path or null\n"


def test_adapters_are_new_on_base_weights_and_loaded_from_a_run_with_the_same_adapters(plain):
    source = weights_of("run/checkpoints/step_00000012")
    found, _ = start(with_lora(plain))
    adapted = {name for name in found["model"] if ".lora_" in name}
    assert adapted
    assert are_equal({name: value for name, value in found["model"].items() if name not in adapted}, source)
    assert all(not found["model"][name].any() for name in adapted if name.endswith("lora_b"))
    found["model"]["first.lora_b"].fill_(3.0)
    checkpoints = checkpoint.Checkpoints(Path("adapted/checkpoints").resolve())
    Path("adapted").mkdir()
    checkpoints.save(5, {"model": found["model"], "model.optimizer": {}}, {"loop": {"step": 5}})
    again, lines = start(with_lora(plain), "adapted")
    assert are_equal(again["model"], found["model"])
    assert lines[0] == "init_from=adapted: weights of step 5 of adapted"
    with pytest.raises(ConfigError, match=r"(?s)unused: first.lora_a, .*runner.export RUN"):
        start(plain, "adapted")


def test_with_ema_a_checkpoint_has_the_trained_weights_and_an_export_the_averages(at_home, plain):
    at_home.run("hydra.run.dir=ema", "optimizations.ema.decay=0.9", "trainer.export_every=12")
    trained, _ = start(plain, "ema")
    averages, _ = start(plain, "ema/exports/model.safetensors")
    assert are_equal(trained["model"], weights_of("ema/checkpoints/step_00000012"))
    assert are_equal(averages["model"], weights_of("ema/exports"))
    assert not are_equal(trained["model"], averages["model"])


def test_shards_are_read_and_two_ranks_share_the_weights(at_home, plain):
    two = ["distributed=fsdp", "distributed.nproc_per_node=2"]
    at_home.run("init_from=run", "hydra.run.dir=new", *two, *UNTRAINED, forks_workers=True)
    source = weights_of("run/checkpoints/step_00000012")
    path = Path("new/checkpoints/step_00000001")
    assert (path / "shards").is_dir()
    assert checkpoint.load(path, lambda part: "." not in part).keys() == {"model"}
    assert are_equal(checkpoint.load(path, lambda part: "." not in part)["model"], source)
    assert are_equal(start(plain, "new")[0]["model"], source)


class Canary:
    def __reduce__(self):
        return os.mkdir, ("canary",)


def test_an_untrusted_checkpoint_is_read_without_its_config_and_executes_nothing(plain):
    shutil.rmtree("run/.hydra")
    found, _ = start(plain)
    assert are_equal(found["model"], weights_of("run/checkpoints/step_00000012"))
    newest = Path("run/checkpoints/step_00000012")
    (newest / "model.safetensors").write_bytes(b"changed")
    found, _ = start(plain)
    assert are_equal(found["model"], weights_of("run/checkpoints/step_00000008"))
    with pytest.raises(
        ConfigError, match=re.escape("step_00000012: model.safetensors has 7 bytes, MANIFEST.json says")
    ):
        start(plain, str(newest))
    hostile = checkpoint.Checkpoints(Path("run/checkpoints").resolve(), format="pt")
    for step, value in enumerate([["no mapping"], {3: torch.ones(1)}, {"first.weight": "text"}], 20):
        hostile.save(step, {"model": value}, {})
        with pytest.raises(ConfigError, match="init_from=run: "):
            start(plain)
    partial = hostile.begin(30)
    (partial / "model.pt").write_bytes(pickle.dumps(Canary()))
    hostile.commit(partial, 30, {})
    with pytest.raises(ConfigError, match="init_from=run: "):
        start(plain)
    assert not Path("canary").exists()
