import importlib
import json
import subprocess
import sys
from collections import Counter, defaultdict

import pytest
import safetensors.torch
import torch
from torch import nn

from runner import evaluate, export
from runner.config.schema import ExportConfig, ExportFormat, Ties
from runner.engines import Engine, Engines
from runner.run import exports
from runner.utils import io
from runner.utils.modules.weights import load_weights
from runner.utils.wrapper import optimize
from runner.utils.wrapper.built_in import Lora
from runner.utils.wrapper.lora import add_lora


def test_an_export_of_a_checkpoint_is_the_file_that_the_run_exported_itself(at_home, capsys):
    live = at_home.folder / "run" / "exports" / "model.safetensors"
    export.main(["run", "--output", "after", "--allow-targets", "own"])
    assert capsys.readouterr().out == "after/model.safetensors\n"
    after = at_home.folder / "after" / "model.safetensors"
    signed = io.read_metadata(live)
    assert signed.pop("signature")  # the run was signed where it began, and was copied here
    assert io.read_metadata(after) == signed
    assert safetensors.torch.load_file(after).keys() == safetensors.torch.load_file(live).keys()
    for name, tensor in safetensors.torch.load_file(after).items():
        assert torch.equal(tensor, safetensors.torch.load_file(live)[name])


def test_it_holds_the_checkpoints_weights_and_tells_where_they_are_from(at_home, capsys):
    step = at_home.folder / "run" / "checkpoints" / "step_00000008"
    export.main([str(step), "--allow-targets", "own"])
    path = at_home.folder / "run" / "exports" / "model.safetensors"
    exported, saved = safetensors.torch.load_file(path), io.load(step / "model.safetensors")
    assert exported
    assert exported.keys() == saved.keys()
    assert all(torch.equal(exported[name], saved[name]) for name in saved)
    facts = io.read_metadata(path)
    assert facts.keys() == {"config", "step", "commit", "metrics", "engine", "runner_version"}
    assert (facts["step"], facts["engine"]) == ("8", "model")
    record = json.loads((at_home.folder / "run" / "run.json").read_text())
    assert facts["commit"] == ((record["git"] or {}).get("commit") or "")
    config = json.loads(facts["config"])
    assert (config["model"], config["scheduler"]["total_steps"]) == ({"_target_": "own.Model"}, 12)
    assert not {"resume", "resume_allow_changes", "allow_targets"} & config.keys()
    metrics = json.loads(facts["metrics"])
    assert metrics["evaluation"]["step"] == 8
    assert metrics["best"]["name"] == "eval/loss"


def test_what_is_not_allowed_is_refused_and_writes_nothing(at_home, capsys):
    with pytest.raises(SystemExit):
        export.main(["run", "--output", "after"])
    assert capsys.readouterr().err.endswith("--allow-targets own\n")
    assert not (at_home.folder / "after").exists()


def test_a_file_is_no_run(at_home, capsys):
    with pytest.raises(SystemExit):
        export.main(["own.py"])
    assert capsys.readouterr().err == "own.py: neither a run folder nor a checkpoint\n"


@pytest.mark.parametrize(
    ("output", "expected"),
    [
        ("own.py", "own.py: expected a folder, found a file\n"),
        ("own.py/inside", "own.py: expected a folder, found a file\n"),
        ("/proc/inside", "/proc/inside: can't be written (No such file or directory)\n"),
    ],
)
def test_an_output_that_can_be_no_folder_is_named(at_home, capsys, output, expected):
    before = (at_home.folder / "own.py").read_bytes()
    with pytest.raises(SystemExit):
        export.main(["run", "--output", output, "--allow-targets", "own"])
    assert capsys.readouterr().err.endswith(expected)
    assert (at_home.folder / "own.py").read_bytes() == before


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(5, 3), nn.Linear(3, 5, bias=False)
        self.head.weight = self.embed.weight
        self.register_buffer("count", torch.tensor(3))
        self.register_buffer("empty", torch.empty(0))
        self.register_buffer("empty_too", torch.empty(0))


def settings(dtype=None, ties="each"):
    return ExportConfig(ExportFormat.sft, dtype, Ties[ties])


@pytest.mark.parametrize("ties", ["each", "once"])
@pytest.mark.parametrize("name", [None, *exports.DTYPES])
def test_ties_stay_ties_in_any_dtype_and_the_file_loads_into_the_model(tmp_path, name, ties):
    dtype = exports.DTYPES[name] if name else None
    module, other, third = Tied(), Tied(), Tied()
    engines = Engines(model=Engine(module))
    (path,) = exports.write_exports(engines, tmp_path, {"step": "3"}, settings(name, ties))
    loaded = io.load(path)
    assert loaded.keys() == module.state_dict().keys()
    assert loaded["embed.weight"].data_ptr() == loaded["head.weight"].data_ptr()
    stored = safetensors.torch.load_file(path)
    assert ("head.weight" in stored) is (ties == "each")
    assert torch.equal(loaded["embed.weight"], module.embed.weight.detach().to(dtype))
    assert loaded["count"].dtype == torch.int64
    if ties == "each":  # `load_model` refuses a second name of a tied weight, and strict loading needs it
        other.load_state_dict(stored)
    else:
        assert safetensors.torch.load_model(other, path) == (set(), [])
    load_weights(third, loaded)
    for net in (other, third):
        assert net.head.weight is net.embed.weight
        assert torch.equal(net.head.weight, module.head.weight.detach().to(dtype).float())
    assert io.read_metadata(path) == {"step": "3", "engine": "model"}


def test_a_number_that_the_dtype_cannot_hold_is_named(tmp_path):
    module = Tied()
    with torch.no_grad():
        module.embed.weight[0, 0] = 1e6
    with pytest.raises(ValueError, match=r"embed.weight: holds a number that torch.float16 can't"):
        exports.write_exports(Engines(model=Engine(module)), tmp_path, {}, settings("fp16"))
    assert list(tmp_path.iterdir()) == []


def test_the_last_evaluation_is_the_newest_up_to_the_step(tmp_path):
    assert exports.last_evaluation(tmp_path, 9) is None
    lines = [
        '{"step": 4, "eval/loss": 1.5}',
        '{"step": 6, "train/loss": 1}',
        '{"step": 8, "eval/loss": null}',
        "[",
        "{",
    ]
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert exports.last_evaluation(tmp_path, 7) == {"step": 4, "eval/loss": 1.5}
    assert exports.last_evaluation(tmp_path, 8) == {"step": 8, "eval/loss": None}
    (tmp_path / "metrics.jsonl").write_text("\n".join([*lines, '{"step": 8, "eval/swa/loss": 1}']))  # of a callback
    assert exports.last_evaluation(tmp_path, 8) == {"step": 8, "eval/loss": None}


def test_from_the_command_line_the_dtype_is_chosen(trained):
    command = [sys.executable, "-m", "runner.export", "run", "--dtype", "bf16", "--allow-targets", "own"]
    subprocess.run(command, cwd=trained.folder, check=True)
    exported = safetensors.torch.load_file(trained.folder / "run" / "exports" / "model.safetensors")
    assert {tensor.dtype for tensor in exported.values()} == {torch.bfloat16}
    done = subprocess.run([*command, "--dtype", "fp8"], cwd=trained.folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert "invalid choice: 'fp8'" in done.stderr


class Kept(nn.Module):
    """Holds what only its extra state tells, and a buffer of 8-bit floats."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)
        self.register_buffer("f8", torch.tensor([1.5, -2.0]).to(torch.float8_e4m3fn))
        self.seen = defaultdict(list, {"a": [torch.ones(2)]})

    def get_extra_state(self):
        return {"seen": self.seen, "counts": Counter({3: 1})}

    def set_extra_state(self, state):
        self.seen = state["seen"]


def test_extra_state_and_8_bit_floats_are_exported_in_any_dtype(tmp_path):
    engines = Engines(model=Engine(Kept()))
    for dtype in (None, "bf16"):
        (path,) = exports.write_exports(engines, tmp_path, {}, settings(dtype))
        found = io.load(path)
        assert found["f8"].float().tolist() == [1.5, -2.0]
        assert found["_extra_state"]["counts"] == Counter({3: 1})
        assert found["_extra_state"]["seen"].default_factory is list
        assert found["_extra_state"]["seen"]["a"][0].tolist() == [1.0, 1.0]


def test_a_run_with_frozen_parameters_is_exported_after_it_as_in_it(project):
    project.run("optimizations.freeze=[first.*]", "trainer.steps=2", "trainer.export_every=2", "hydra.run.dir=run")
    run = project.folder / "run"
    export.main([str(run), "--output", str(project.folder / "after"), "--allow-targets", "own"])
    within = safetensors.torch.load_file(run / "exports" / "model.safetensors")
    after = safetensors.torch.load_file(project.folder / "after" / "model.safetensors")
    assert within.keys() == after.keys()
    assert all(torch.equal(within[name], after[name]) for name in within)


def test_an_export_in_pefts_format_is_loaded_by_peft_with_equal_outputs(at_home, monkeypatch, capsys):
    peft = pytest.importorskip("peft")
    printed = at_home.run(
        "init.path=run/exports/model.safetensors", "hydra.run.dir=new", "optimizations.lora.rank=2",
        "optimizations.lora.export=peft", "optimizer.lr=0.1", "trainer.steps=4", "trainer.export_every=4",
    )  # fmt: skip
    assert "new/exports/model_adapter" in printed
    monkeypatch.syspath_prepend(at_home.folder)
    own = importlib.import_module("own")
    base, trained = own.Model(), own.Model()
    base.load_state_dict(safetensors.torch.load_file("run/exports/model.safetensors"))
    loaded = peft.PeftModel.from_pretrained(base, "new/exports/model_adapter").eval()
    add_lora(trained, rank=2)
    trained.load_state_dict(safetensors.torch.load_file("new/checkpoints/step_00000004/model.safetensors"))
    assert trained.first.lora_b.any()
    x, y = torch.randn(5, 4), torch.zeros(5, 1)
    torch.testing.assert_close(loaded(x=x, y=y)["loss"], trained.eval()(x, y)["loss"])
    evaluate.main(["new/exports/model.safetensors", "--allow-targets", "own"])  # its other file


def test_adapters_that_are_not_finite_are_not_merged_and_nothing_is_written(tmp_path):
    module = nn.Sequential(nn.Linear(2, 2))
    applied = optimize(module, {"lora": Lora(2, None, 0.0, None, [], [], "merged")})
    engine = Engine(
        module, torch.optim.SGD([p for p in module.parameters() if p.requires_grad], 0.1), None, applied=applied
    )
    module[0].lora_b.data.fill_(float("nan"))
    with pytest.raises(ValueError, match="0: its adapter would make the weight infinite or NaN"):
        exports.write_exports(Engines(model=engine), tmp_path / "exports", {})
    assert not (tmp_path / "exports").exists()
