import json
import re
import struct
import subprocess
import sys

import pytest
from conftest import CANARY, read_metrics
from omegaconf import OmegaConf

from runner import evaluate, export
from runner.utils import io


def logged(folder, step):
    """The numbers that training logged of an evaluation."""
    (line,) = [line for line in read_metrics(folder) if line["step"] == step and "eval/loss" in line]
    return {name: value for name, value in line.items() if name.startswith("eval/")}


def printed_numbers(text):
    return {name: float(value) for name, value in re.findall(r"^(eval/\w+) (\S+)$", text, re.MULTILINE)}


def told(capsys, *arguments):
    """The one message for a command line that is a mistake."""
    with pytest.raises(SystemExit) as caught:
        evaluate.main([*map(str, arguments), "--allow-targets", "own"])
    assert caught.value.code == 2
    return capsys.readouterr().err


@pytest.mark.parametrize(("place", "step"), [("run", 12), ("run/checkpoints/step_00000008", 8)])
def test_a_saved_model_evaluates_to_what_training_logged_bit_for_bit(at_home, capsys, place, step):
    evaluate.main([place, "--allow-targets", "own"])
    out = capsys.readouterr().out
    assert printed_numbers(out) == logged(at_home.folder / "run", step)
    assert out.endswith("eval/words:\nsome `text`\n")


def test_an_export_evaluates_to_the_same(at_home, capsys):
    evaluate.main(["run/exports/model.safetensors", "--allow-targets", "own"])
    assert printed_numbers(capsys.readouterr().out) == logged(at_home.folder / "run", 12)


def test_overrides_are_set_on_the_saved_config(at_home, capsys):
    evaluate.main(["run", "--allow-targets", "own", "data.eval.length=7", "distributed.device=cpu", "report=null"])
    out = capsys.readouterr().out
    assert printed_numbers(out).keys() == {"eval/loss", "eval/error"}
    assert printed_numbers(out)["eval/loss"] != logged(at_home.folder / "run", 12)["eval/loss"]


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.stepz=3", "trainer.stepz: no such key; did you mean steps?"),
        ("report=sample_code", "report=sample_code: a choice of conf/ can't be made here"),
        ("~report", "~report: expected key=value"),
        ("data.eval.lenght=3", "data.eval.lenght: no such key; did you mean length?"),
        ("+data.eval.lenght=3", "data.eval.lenght: own.Data takes no such argument"),
        ("data.batch_size=0", "data.batch_size=0: expected 1 or more"),
        ("distributed.device=cuda:9", "distributed.device='cuda:9': this machine has"),
        ("data.eval.length=0", "data.eval: the dataset is empty"),
        ("+model.width=3", "its saved weights do not fit"),
    ],
)
def test_an_override_that_is_a_mistake_is_told(at_home, capsys, override, expected):
    assert expected in told(capsys, "run", override)


def test_without_a_dataset_there_is_nothing_to_evaluate_on(at_home, capsys):
    assert "data.eval has no dataset" in told(capsys, "run", "data.eval=null", "trainer.eval_every=0")


@pytest.mark.parametrize(
    ("place", "expected"),
    [
        ("nowhere", "nowhere: no such folder"),
        ("conf", "conf: neither a run folder nor a checkpoint"),
        ("own.py", "own.py: neither a run folder, nor a checkpoint, nor an export"),
        ("run/checkpoints/step_00000012/model.safetensors", "no export of python -m runner.export"),
        ("run/checkpoints/step_00000012/model.optimizer.safetensors", "no export of python -m runner.export"),
    ],
)
def test_what_is_no_saved_model_is_told(at_home, capsys, place, expected):
    message = told(capsys, place)
    assert expected in message
    assert len(message.splitlines()) == 1


def test_a_harmed_checkpoint_is_passed_over_in_a_run_and_an_end_by_itself(at_home, capsys):
    step = at_home.folder / "run" / "checkpoints" / "step_00000012"
    (step / "model.safetensors").write_bytes((step / "model.safetensors").read_bytes()[:-3])
    assert re.search(r"step_00000012: model.safetensors has \d+ bytes, MANIFEST.json says \d+", told(capsys, step))
    evaluate.main(["run", "--allow-targets", "own"])
    out, err = capsys.readouterr()
    assert re.match(r"Passed over: .*step_00000012: model.safetensors has \d+ bytes", err)
    assert printed_numbers(out) == logged(at_home.folder / "run", 8)


def test_a_run_whose_process_is_gone_is_told_as_crashed(at_home, capsys):
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    path = at_home.folder / "run" / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"status": "running", "pid": gone.pid}))
    evaluate.main(["run", "--allow-targets", "own"])
    assert f"crashed: run.json says running, but its process {gone.pid} is gone" in capsys.readouterr().err


def test_what_is_not_allowed_is_refused_and_not_imported(at_home, capsys):
    (at_home.folder / "evil.py").write_text(CANARY)
    path = at_home.folder / "run" / ".hydra" / "config.yaml"
    path.write_text(path.read_text().replace("own.report", "evil.Evil"))
    message = told(capsys, "run")
    assert "report._target_=evil.Evil: its module is not on the allow-list" in message
    assert message.endswith("--allow-targets evil\n")
    assert not (at_home.folder / "canary").exists()
    evaluate.main(["run", "--allow-targets", "own", "report={_target_: own.report}"])  # typed here, so the user's own


@pytest.mark.parametrize(
    ("key", "value", "expected"),
    [
        ("model._target_", "evil.Evil", "model._target_=evil.Evil: its module is not on the allow-list"),
        ("data.eval", [{"_target_": "evil.Evil"}], "data.eval.0._target_=evil.Evil: its module is not on the"),
        ("report._target_", "runner.examples.digits.importlib.import_module", "goes through the module importlib"),
        ("engines", {"../../x": {}}, "engines.../../x: expected a letter"),
        ("hydra", {"run": 1}, "hydra: no such key"),
    ],
)
def test_hostile_metadata_of_an_export_is_refused(at_home, capsys, monkeypatch, key, value, expected):
    monkeypatch.setenv("HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE", "evil.Evil")
    (at_home.folder / "evil.py").write_text(CANARY)
    path = at_home.folder / "run" / "exports" / "model.safetensors"
    facts = io.read_metadata(path)
    cfg = OmegaConf.create(json.loads(facts["config"]))
    OmegaConf.update(cfg, key, value, merge=False, force_add=True)
    io.save(io.load(path), path, facts | {"config": json.dumps(OmegaConf.to_container(cfg))})
    assert expected in told(capsys, path)
    assert not (at_home.folder / "canary").exists()


@pytest.mark.parametrize("facts", [{"config": "{"}, {"config": "[]"}, {"engine": "other"}, {"step": "x"}])
def test_metadata_that_is_broken_is_told(at_home, capsys, facts):
    path = at_home.folder / "run" / "exports" / "model.safetensors"
    io.save(io.load(path), path, io.read_metadata(path) | facts)
    assert len(told(capsys, path).splitlines()) == 1


def test_a_header_of_a_gigabyte_is_refused(at_home, capsys):
    path = at_home.folder / "huge.safetensors"
    with path.open("wb") as stream:
        stream.write(struct.pack("<Q", 10**9))
        stream.truncate(8 + 10**9)  # a hole: it takes no room on the disk
    message = told(capsys, path)
    assert "huge.safetensors: not a whole safetensors file" in message
    assert "too large" in message.lower() or "HeaderTooLarge" in message


@pytest.mark.parametrize("module", [evaluate, export])
def test_help_does_not_import_torch(module):
    script = f"import sys; sys.argv[1:] = ['--help']; from {module.__name__} import main\n"
    script += "try: main()\nexcept SystemExit: assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert done.stdout.startswith(f"usage: python -m {module.__name__}")


def test_from_the_command_line_a_model_of_ones_own_is_found_where_one_stands(trained):
    command = [sys.executable, "-m", "runner.evaluate", "run"]
    done = subprocess.run([*command, "--allow-targets", "own"], cwd=trained.folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert printed_numbers(done.stdout) == logged(trained.folder / "run", 12)
    done = subprocess.run(command, cwd=trained.folder, capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr.endswith("--allow-targets own\n")


@pytest.mark.slow
def test_a_schedule_free_model_and_two_engines_evaluate_to_what_training_logged(project):
    (project.folder / "conf" / "experiment" / "two.yaml").write_text(
        "# @package _global_\ndefaults: [mine, override /optimizer: schedulefree, override /scheduler: constant]\n"
        "engines:\n  a: {}\n  b: {optimizer: {_target_: torch.optim.SGD, lr: 0.05}}\n"
    )
    edited = project.folder / "conf" / "experiment" / "mine.yaml"
    edited.write_text(edited.read_text().replace("scheduler: {warmup_steps: 3}\n", ""))
    project.run("experiment=two", "hydra.run.dir=run", "trainer.export_every=12", "trainer.precision=bf16")
    for place in ("run", "run/exports/a.safetensors", "run/exports/b.safetensors"):
        command = [sys.executable, "-m", "runner.evaluate", place, "--allow-targets", "own"]
        out = subprocess.run(command, cwd=project.folder, capture_output=True, text=True, check=True).stdout
        found = dict(re.findall(r"^eval/(\S+) (\S+)$", out, re.MULTILINE))
        expected = {name.removeprefix("eval/"): v for name, v in logged_all(project.folder / "run").items()}
        if place != "run":
            engine = place[-len("a.safetensors")]
            expected = {n.partition("/")[2]: v for n, v in expected.items() if n.startswith(f"{engine}/")}
        assert {name: float(value) for name, value in found.items()} == expected


def logged_all(folder):
    line = [line for line in read_metrics(folder) if any(name.startswith("eval/") for name in line)][-1]
    return {name: value for name, value in line.items() if name.startswith("eval/")}
