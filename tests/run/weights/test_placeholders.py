import contextlib
import json
import math
import os
import re
import resource
import shutil
import sys

import numpy as np
import pytest
import torch
from conftest import MODEL as MODEL_SOURCE
from conftest import Project, read_numbers
from safetensors.torch import load_file, save_file
from torch import nn

from runner import evaluate, export
from runner.config.errors import ConfigError
from runner.config.trust import signature
from runner.run.weights import placeholders
from runner.utils import io
from runner.utils.serialization import structure

WARM = """
import time
import numpy as np
import torch
from torch import nn
from pathlib import Path
from safetensors.torch import load_file
from own import Model


def read(path):
    return load_file(path) if str(path).endswith(".safetensors") else torch.load(path, weights_only=True)


def warm(path, width=8, prefix=None):
    model, state = Model(width), read(path)
    model.load_state_dict(state if prefix is None else state[prefix])
    return model


class Held(Model):
    # a tensor that no checkpoint holds, of the file that it starts from
    def __init__(self, path, name):
        super().__init__()
        self.load_state_dict(read(path))
        self.held = read(path)[name] * 2

    def forward(self, x, y):
        return super().forward(x, y)["loss"] + self.held.square().mean()


class Frozen(Model):
    # beside a teacher that is hidden in a list
    def __init__(self, path):
        super().__init__()
        self.teacher = [warm(path)]


class Folder(Model):
    def __init__(self, folder):
        import json
        config = json.loads((Path(folder) / "config.json").read_text())
        super().__init__(config["width"])
        for part in sorted(Path(folder).glob("part-*.safetensors")):
            self.load_state_dict(load_file(part), strict=False)


class Embedding(nn.Module):
    def __init__(self, path):
        super().__init__()
        table = torch.from_numpy(np.load(Path(path).expanduser()))
        self.table = nn.Embedding.from_pretrained(table, freeze=False)


class Normed(Model):
    def __init__(self, path):
        super().__init__()
        self.load_state_dict(read(path))
        torch.nn.utils.spectral_norm(self.second)
        self.began = time.time()
"""


def write_start(folder, name="start.safetensors", width=40):
    """Writes weights of `own.Model`, too large to be recorded with their values."""
    torch.manual_seed(3)
    first, second = nn.Linear(4, width), nn.Linear(width, 1)
    state = {f"first.{key}": value.detach() for key, value in first.state_dict().items()}
    state |= {f"second.{key}": value.detach() for key, value in second.state_dict().items()}
    if name.endswith(".safetensors"):
        save_file(state, folder / name)
    elif name.endswith(".old.pth"):
        torch.save(state, folder / name, _use_new_zipfile_serialization=False)
    elif name.endswith(".ckpt"):
        torch.save({"state_dict": state, "epoch": 7, "betas": (0.9, 0.99)}, folder / name)
    else:
        torch.save(state, folder / name)


def node(target="warm.warm", **arguments):
    given = ", ".join(f"{key}: {value}" for key, value in arguments.items())
    return f"{{_target_: {target}, {given}}}"


def put_model(folder, model):
    path = folder / "conf" / "experiment" / "mine.yaml"
    path.write_text(path.read_text().replace("{_target_: own.Model}", model))


MODEL = node(path="start.safetensors", width=40)


def make_project(folder, model, *overrides, name="start.safetensors", width=40):
    project = Project(folder)
    (folder / "warm.py").write_text(WARM)
    write_start(folder, name, width)
    put_model(folder, model)
    project.run("hydra.run.dir=run", "trainer.steps=6", "trainer.save_every=3", "trainer.eval_every=3", *overrides)
    return project


@pytest.fixture(scope="session")
def warm_run(tmp_path_factory):
    """A project with a run of 6 steps that started from a weights file, which still exists."""
    return make_project(tmp_path_factory.mktemp("warm"), MODEL, "trainer.export_every=6").folder


@pytest.fixture
def warm_copy(warm_run, tmp_path, monkeypatch):
    shutil.copytree(warm_run, tmp_path, dirs_exist_ok=True)
    project = build_placeholder_project(tmp_path, monkeypatch)
    signature.sign_present(tmp_path / "run")
    return project


def build_placeholder_project(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.syspath_prepend(folder)
    for name in ("own", "warm"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    project = Project.__new__(Project)
    project.folder, project.started = folder, []
    return project


@pytest.fixture(autouse=True)
def forgets_modules():
    yield
    for name in ("own", "warm"):
        sys.modules.pop(name, None)


def evaluated(capsys, place="run", *arguments):
    capsys.readouterr()
    evaluate.main([place, *arguments, "--allow-targets", "own,warm"])
    return capsys.readouterr().out


def exported(place="run"):
    export.main([place, "--output", "out", "--allow-targets", "own,warm"])
    return load_file("out/model.safetensors")


def refused(capsys, run, *arguments):
    with pytest.raises(SystemExit) as caught:
        run([*arguments, "--allow-targets", "own,warm"])
    assert caught.value.code == 2
    printed = capsys.readouterr().err
    assert "Traceback" not in printed
    return printed


def put_older_weights():
    """Replaces the run's weights file with one of other shapes."""
    save_file({"first.weight": torch.zeros(2, 2)}, "start.safetensors")


LOSSES = {"gone": lambda: os.remove("start.safetensors"), "of other shapes": put_older_weights}


@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_is_evaluated_and_exported_without_its_weights_file_to_the_same_numbers(warm_copy, capsys, loss):
    whole, weights = evaluated(capsys), exported()
    LOSSES[loss]()
    assert evaluated(capsys) == whole
    assert evaluated(capsys, "run/checkpoints/step_00000006") == whole
    assert evaluated(capsys, "run/exports/model.safetensors") == whole
    found = exported()
    assert found.keys() == weights.keys()
    assert all(torch.equal(found[name], weights[name]) for name in weights)


def test_for_an_untrusted_run_no_existing_file_is_replaced(warm_copy, capsys):
    whole = evaluated(capsys)
    os.remove("run/.hydra/signature.json")
    assert evaluated(capsys) == whole
    put_older_weights()
    with pytest.raises(SystemExit):
        evaluate.main(["run", "--allow-targets", "own,warm"])
    assert "size mismatch" in capsys.readouterr().err


def test_a_run_resumes_without_its_weights_file_as_the_same_run(warm_copy):
    shutil.copytree("run", "other")
    warm_copy.run("resume=run", "trainer.steps=9")
    os.remove("start.safetensors")
    warm_copy.run("resume=other", "trainer.steps=9")
    assert read_numbers(warm_copy.folder / "other") == read_numbers(warm_copy.folder / "run")
    one, two = (load_file(f"{run}/checkpoints/step_00000009/model.safetensors") for run in ("run", "other"))
    assert all(torch.equal(one[name], two[name]) for name in one)
    hydra = warm_copy.folder / "other" / ".hydra"
    assert (hydra / "weights.json").read_bytes() == (warm_copy.folder / "run" / ".hydra" / "weights.json").read_bytes()
    assert "path: start.safetensors" in (hydra / "config.yaml").read_text()


def test_an_export_keeps_the_path_and_no_temporary_file_is_left(warm_copy, capsys, monkeypatch, tmp_path_factory):
    temporary = tmp_path_factory.mktemp("temporary")
    monkeypatch.setattr("tempfile.tempdir", str(temporary))
    os.remove("start.safetensors")
    evaluated(capsys)
    exported()
    metadata = io.read_metadata("out/model.safetensors")
    assert json.loads(metadata["config"])["model"]["path"] == "start.safetensors"
    assert metadata["weights"] == (warm_copy.folder / "run" / ".hydra" / "weights.json").read_text()
    found = structure.describe_weights_files("out/model.safetensors")["files"]["model.safetensors"]
    assert found["metadata"].keys() >= {"config", "step"}
    assert "weights" not in found["metadata"]  # or each warm start from an export would hold all before
    assert [*temporary.iterdir()] == []


def test_an_older_run_without_a_record_builds_from_its_own_weights(warm_copy, capsys):
    whole = evaluated(capsys)
    os.remove("start.safetensors")
    os.remove("run/.hydra/weights.json")
    assert evaluated(capsys) == whole


def make(node):
    """Builds the object of a config node; reports mistakes as the runner does."""
    import warm

    arguments = {key: value for key, value in node.items() if key != "_target_"}
    try:
        return getattr(warm, node["_target_"])(**arguments)
    except Exception as error:
        raise ConfigError(f"model: {error!r}") from error


class Recorded:
    """A model that was built from a file that is now gone, and the run folder with its record."""

    def __init__(self, tmp_path, monkeypatch, target, forget_values=False, **arguments):
        folder = tmp_path
        (folder / "own.py").write_text(MODEL_SOURCE)
        (folder / "warm.py").write_text(WARM)
        build_placeholder_project(folder, monkeypatch)
        self.node = {"_target_": target, **arguments}
        self.whole = make(self.node)
        self.record = json.loads(placeholders.record_weights_files({"engines": {}, "model": self.node}))
        if forget_values:  # as of larger tensors
            for entry in self.record["entries"].values():
                for file in entry["files"].values():
                    for tensor in file["tensors"].values():
                        del tensor[2:]
        self.run = folder / "run"
        (self.run / ".hydra").mkdir(parents=True)
        (self.run / ".hydra" / "weights.json").write_text(json.dumps(self.record))

    def build(self):
        state = {name: value.clone() for name, value in self.whole.state_dict().items()}
        made = placeholders.PlaceholderBuilder(self.run, {"model": state}, is_signed=True).build(
            "model", "model", self.node, make
        )
        made.load_state_dict(state)
        return made


@pytest.mark.parametrize("name", ["start.pt", "start.old.pth", "start.bin", "start.ckpt"])
def test_pickled_weights_are_recorded_with_their_nesting(tmp_path, monkeypatch, name):
    write_start(tmp_path, name)
    extra = {"prefix": "state_dict"} if name.endswith(".ckpt") else {}
    recorded = Recorded(tmp_path, monkeypatch, "warm", path=name, width=40, **extra)
    os.remove(name)
    assert recorded.build().first.weight.equal(recorded.whole.first.weight)


def test_an_array_of_numpy_is_recorded_also_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    np.save(tmp_path / "table.npy", np.random.default_rng(0).random((40, 8), dtype=np.float32))
    recorded = Recorded(tmp_path, monkeypatch, "Embedding", path="~/table.npy")
    os.remove(tmp_path / "table.npy")
    assert recorded.build().table.weight.equal(recorded.whole.table.weight)


def test_an_export_does_not_build_a_feeder_whose_file_is_gone(at_home, capsys):
    (at_home.folder / "teacher.py").write_text(
        "import torch\nclass Feeder:\n    def __init__(self, path): self.teacher = torch.load(path)\n"
    )
    path = at_home.folder / "run" / ".hydra" / "config.yaml"
    saved = path.read_text()
    assert "feeder: null\n" in saved
    path.write_text(saved.replace("feeder: null\n", "feeder: {_target_: teacher.Feeder, path: gone.pt}\n"))
    export.main(["run", "--output", "out", "--allow-targets", "own,teacher"])
    with pytest.raises(SystemExit):
        evaluate.main(["run", "--allow-targets", "own,teacher"])
    assert "feeder: [Errno 2] No such file or directory: 'gone.pt'" in capsys.readouterr().err


def test_a_pickle_that_would_run_code_is_not_recorded(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "whole.pt")
    plain = {"engines": {}, "model": {"path": str(tmp_path / "whole.pt")}}
    assert placeholders.record_weights_files(plain) is None


def test_a_folder_of_weights_and_small_json_is_recorded(tmp_path, monkeypatch):
    (tmp_path / "start").mkdir()
    write_start(tmp_path)
    state = load_file(tmp_path / "start.safetensors")
    save_file({name: state[name] for name in state if name.startswith("first")}, tmp_path / "start/part-1.safetensors")
    save_file({name: state[name] for name in state if name.startswith("second")}, tmp_path / "start/part-2.safetensors")
    (tmp_path / "start" / "config.json").write_text('{"width": 40}')
    (tmp_path / "start" / "code.py").write_text("raise SystemExit(3)")
    recorded = Recorded(tmp_path, monkeypatch, "Folder", folder="start")
    files = recorded.record["entries"]["model.folder"]["files"]
    assert sorted(files) == ["config.json", "part-1.safetensors", "part-2.safetensors"]
    shutil.rmtree("start")
    assert recorded.build().first.weight.shape == (40, 4)


def test_a_small_tensor_that_no_checkpoint_holds_is_kept(tmp_path, monkeypatch):
    write_start(tmp_path, width=8)
    recorded = Recorded(tmp_path, monkeypatch, "Held", path="start.safetensors", name="second.weight")
    os.remove("start.safetensors")
    assert recorded.build().held.equal(recorded.whole.held)


@pytest.mark.parametrize(
    ("target", "arguments", "message"),
    [
        ("Held", {"name": "first.weight"}, "model: held: read from start.safetensors, and no checkpoint holds"),
        ("Frozen", {}, "model: teacher.0.first.bias, teacher.0.first.weight"),
    ],
)
def test_values_that_no_checkpoint_holds_are_reported_if_the_file_is_gone(
    tmp_path, monkeypatch, target, arguments, message
):
    write_start(tmp_path, width=8)
    recorded = Recorded(tmp_path, monkeypatch, target, forget_values=True, path="start.safetensors", **arguments)
    recorded.build()  # with the file
    os.remove("start.safetensors")
    with pytest.raises(ConfigError) as caught:
        recorded.build()
    assert str(caught.value).startswith(message)
    assert "put start.safetensors back" in str(caught.value)


def test_values_computed_from_parameters_or_the_clock_are_not_attributed_to_the_file(tmp_path, monkeypatch):
    write_start(tmp_path, width=8)
    recorded = Recorded(tmp_path, monkeypatch, "Normed", forget_values=True, path="start.safetensors")
    os.remove("start.safetensors")
    recorded.build()


def test_an_unchanged_file_is_read_again(tmp_path, monkeypatch):
    write_start(tmp_path, width=8)
    recorded = Recorded(
        tmp_path, monkeypatch, "Held", forget_values=True, path="start.safetensors", name="first.weight"
    )
    shutil.copy("start.safetensors", "copy.safetensors")
    os.replace("copy.safetensors", "start.safetensors")
    assert recorded.build().held.equal(recorded.whole.held)


def test_lora_ema_and_several_engines_need_no_file_either(tmp_path, monkeypatch, capsys):
    engines = ["+engines.a={optimizations:{lora:{rank:2}}}", "+engines.b={optimizations:{ema:{decay:0.5}}}"]
    make_project(tmp_path, MODEL, *engines)
    build_placeholder_project(tmp_path, monkeypatch)
    whole = evaluated(capsys)
    os.remove("start.safetensors")
    assert evaluated(capsys) == whole


def test_an_exported_adapter_still_needs_the_file_of_its_base(tmp_path, monkeypatch, capsys):
    overrides = ["optimizations.lora.rank=2", "optimizations.lora.export=adapter", "trainer.export_every=6"]
    make_project(tmp_path, MODEL, *overrides)
    build_placeholder_project(tmp_path, monkeypatch)
    evaluated(capsys, "run/exports/model.safetensors")
    os.remove("start.safetensors")
    assert "start.safetensors" in refused(capsys, evaluate.main, "run/exports/model.safetensors")
    evaluated(capsys)


def test_two_ranks_resume_without_the_file(warm_copy):
    os.remove("start.safetensors")
    warm_copy.run(
        "resume=run", "trainer.steps=8", "distributed=ddp", "distributed.nproc_per_node=2", forks_workers=True
    )
    assert read_numbers(warm_copy.folder / "run")[-1]["step"] == 8


HUGE = {"kind": "safetensors", "bytes": 1, "sha256": "", "metadata": {}, "tensors": {"a": ["float32", [1 << 40]]}}


def entry(files, is_folder=False):
    return {
        "format": 1,
        "entries": {"model.path": {"path": "start.safetensors", "is_folder": is_folder, "files": files}},
    }


def pt(document, tensors):
    return {"kind": "pt", "bytes": 1, "sha256": "", "document": document, "tensors": tensors}


HOSTILE = {
    "no JSON": "{",
    "deep": "[" * 100_000,
    "a list": "[]",
    "another format": json.dumps({"format": 9, "entries": {}}),
    "a number for a file": json.dumps(entry({"start.safetensors": 3})),
    "a path that leads out": json.dumps(entry({"../../canary": HUGE | {"tensors": {}}}, is_folder=True)),
    "an absolute path": json.dumps(entry({"/tmp/canary": HUGE | {"tensors": {}}}, is_folder=True)),
    "a module's source": json.dumps(entry({"modeling.py": {"kind": "text", "text": ""}}, is_folder=True)),
    "a huge tensor": json.dumps(entry({"start.safetensors": HUGE})),
    "a negative size": json.dumps(entry({"start.safetensors": HUGE | {"tensors": {"a": ["float32", [-4]]}}})),
    "no dtype": json.dumps(entry({"start.safetensors": HUGE | {"tensors": {"a": ["system", [4]]}}})),
    "a dtype the format lacks": json.dumps(
        entry({"start.safetensors": HUGE | {"tensors": {"a": ["complex128", [4]]}}})
    ),
    "values of another size": json.dumps(entry({"start.safetensors": HUGE | {"tensors": {"a": ["int8", [4], "00"]}}})),
    "a pickle of a huge tensor": json.dumps(entry({"start.safetensors": pt({}, {"a": ["float32", [1 << 40]]})})),
    "a document that is none": json.dumps(entry({"start.safetensors": pt({"version": "x"}, {})})),
    "a deep document": '{"format":1,"entries":{"model.path":{"path":"start.safetensors","is_folder":false,"files":'
    '{"start.safetensors":{"kind":"pt","bytes":1,"sha256":"","tensors":{},"document":{"version":2,"raw":{},"objects":[],'
    f'"tree":{"[" * 400}{"]" * 400}' + "}}}}}}",
}


@pytest.fixture
def recorded(tmp_path, monkeypatch):
    """A model whose file is gone, with a valid record."""
    write_start(tmp_path, width=8)
    made = Recorded(tmp_path, monkeypatch, "warm", path="start.safetensors")
    os.remove("start.safetensors")
    return made


@pytest.mark.parametrize("harm", HOSTILE)
def test_a_hostile_record_ends_in_one_message_or_is_ignored(recorded, harm):
    (recorded.run / ".hydra" / "weights.json").write_text(HOSTILE[harm])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with contextlib.suppress(ConfigError):
        recorded.build()
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # KB
    assert not list(recorded.run.parent.glob("**/canary"))


def test_a_hostile_record_is_reported_without_a_traceback(warm_copy, capsys):
    os.remove("start.safetensors")
    (warm_copy.folder / "run" / ".hydra" / "weights.json").write_text(HOSTILE["a huge tensor"])
    printed = refused(capsys, evaluate.main, "run")
    assert "model.path=start.safetensors is gone, and the run's own weights can't replace it; put it back" in printed


@pytest.mark.parametrize("kind", ["fifo", "link", "folder"])
def test_a_record_that_is_no_regular_file_is_ignored(recorded, kind):
    path = recorded.run / ".hydra" / "weights.json"
    path.unlink()
    {"fifo": lambda: os.mkfifo(path), "link": lambda: path.symlink_to("/dev/zero"), "folder": path.mkdir}[kind]()
    recorded.build()


def test_the_record_is_bounded_and_holds_no_large_tensor(tmp_path):
    save_file({f"a.{i}": torch.rand(100, 100) for i in range(3)}, tmp_path / "a.safetensors")
    found = placeholders.record_weights_files(
        {"engines": {}, "model": {"deep": [{"path": str(tmp_path / "a.safetensors")}]}}
    )
    assert len(found) < 600
    tensors = json.loads(found)["entries"]["model.deep.0.path"]["files"]["a.safetensors"]["tensors"]
    assert tensors == {f"a.{i}": ["float32", [100, 100]] for i in range(3)}


def test_a_placeholder_has_the_recorded_structure_and_small_values(tmp_path):
    value = {
        "state": {"w": torch.rand(30, 30), "count": torch.tensor(5), "half": torch.rand(100).bfloat16()},
        "extra": [1, 2.5, math.inf, None, "text", b"bytes", (True, 1j), torch.float16],
        "parameters": {"p": nn.Parameter(torch.rand(80))},
    }
    torch.save(value, tmp_path / "a.pt")
    described = {"path": "a.pt"} | structure.describe_weights_files(str(tmp_path / "a.pt"))
    structure.check_description(json.loads(json.dumps(described)))
    (tmp_path / "made").mkdir()
    own = {"w": torch.full((30, 30), 2.0)}
    found = torch.load(structure.write_placeholder(tmp_path / "made", "a.pt", described, own), weights_only=True)
    assert torch.equal(found["state"]["w"], own["w"])  # under a prefix
    assert torch.equal(found["state"]["count"], torch.tensor(5))
    assert torch.equal(found["state"]["half"], torch.zeros(100, dtype=torch.bfloat16))
    assert found["extra"] == value["extra"]
    assert type(found["parameters"]["p"]) is nn.Parameter


def test_a_real_model_of_transformers_is_built_again_without_its_folder(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    config = transformers.GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=16)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "hf")
    project = Project(tmp_path)
    (tmp_path / "warm.py").write_text(
        "import torch\nclass Tokens:\n    def __len__(self): return 40\n"
        "    def __getitem__(self, i): t = torch.arange(i, i + 8) % 64; return {'input_ids': t, 'labels': t}\n"
    )
    put_model(tmp_path, node("transformers.AutoModelForCausalLM.from_pretrained", pretrained_model_name_or_path="hf"))
    path = tmp_path / "conf" / "experiment" / "mine.yaml"
    experiment = re.sub(r"own.Data, length: \d+", "warm.Tokens", path.read_text())
    path.write_text(experiment.replace("report: {_target_: own.report}\n", ""))
    project.run("hydra.run.dir=run", "trainer.steps=4")
    build_placeholder_project(tmp_path, monkeypatch)
    arguments = ["run", "--allow-targets", "own,warm,transformers"]
    evaluate.main(arguments)
    whole = capsys.readouterr().out
    shutil.rmtree("hf")
    evaluate.main(arguments)
    assert capsys.readouterr().out == whole
    project.run("resume=run", "trainer.steps=6")


def test_the_total_size_of_placeholders_is_bounded(tmp_path):
    entries = {
        f"model.a{i}": {"path": f"gone{i}.npy", "is_folder": False, "files": {"x.npy": HUGE | {"kind": "npy"}}}
        for i in range(12)
    }
    for each in entries.values():
        each["files"]["x.npy"] = {**each["files"]["x.npy"], "tensors": {"array": ["float32", [1 << 23]]}}
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "weights.json").write_text(json.dumps({"format": 1, "entries": entries}))
    node = {f"a{i}": f"gone{i}.npy" for i in range(12)}
    with pytest.raises(ConfigError, match=r"of 12 has over 268,435,456 bytes .*gone0\.npy is gone.*put it back"):
        placeholders.PlaceholderBuilder(tmp_path, {}, is_signed=True).build("model", "model", node, nn.Identity)


def test_a_record_has_at_most_a_hundred_entries(tmp_path):
    paths = [str(tmp_path / f"{number:03}.npy") for number in range(101)]
    for path in paths:
        np.save(path, np.zeros(1))
    record = json.loads(placeholders.record_weights_files({"engines": {}, "model": {"paths": paths}}))
    assert list(record["entries"]) == [f"model.paths.{number}" for number in range(100)]
