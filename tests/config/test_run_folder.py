import json
import os
import socket
import subprocess
import sys

import pytest
from hydra import compose, initialize_config_dir

from runner.config import checks, run_folder
from runner.config.errors import ConfigError


def test_the_run_of_a_checkpoint_is_the_folder_that_it_is_in(tmp_path):
    step = tmp_path / "run" / "checkpoints" / "step_00000012"
    step.mkdir(parents=True)
    assert run_folder.find_run(step) == run_folder.find_run(tmp_path / "run") == tmp_path / "run"


@pytest.mark.parametrize(("name", "message"), [("nothing", "no such folder"), (".", "neither a run folder nor a ")])
def test_another_folder_is_refused(tmp_path, name, message):
    with pytest.raises(ConfigError, match=message):
        run_folder.find_run(tmp_path / name)


@pytest.mark.parametrize(
    "text", ["- a\n", "a: [", "\xff\xfe", "hydra: {callbacks: {}}", "a: !!python/object/apply:os.system [touch canary]"]
)
def test_another_text_than_a_config_is_refused_and_runs_nothing(tmp_path, monkeypatch, text):
    monkeypatch.chdir(tmp_path)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_bytes(text.encode("latin-1"))
    with pytest.raises(ConfigError, match=r"config\.yaml: "):
        run_folder.read_config(tmp_path)
    assert not (tmp_path / "canary").exists()


def test_a_config_is_read_unresolved_and_a_missing_one_is_reported(tmp_path):
    with pytest.raises(ConfigError, match=r"config\.yaml: no such file"):
        run_folder.read_config(tmp_path)
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("a: ${b}\nb: 1\n")
    assert run_folder.read_config(tmp_path) == {"a": "${b}", "b": 1}
    assert run_folder.read_overrides(tmp_path) == []


def composed():
    checks.register_with_hydra()
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        return compose("config")


def test_put_keeps_the_types_of_the_schema_and_replaces_other_nodes():
    cfg = composed()
    run_folder.put_values(
        cfg, {"trainer": {"steps": "7", "precision": "bf16"}, "model": {"_target_": "own.Model"}, "seed": 3}
    )
    assert (cfg.trainer.steps, cfg.trainer.precision.name, cfg.seed) == (7, "bf16", 3)
    assert cfg.trainer.log_every == 10  # what a newer schema has and the values lack
    assert dict(cfg.model) == {"_target_": "own.Model"}


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"trainer": {"stepz": 3}}, "trainer.stepz: no such key; did you mean steps"),
        ({"trainer": {"steps": "many"}}, "trainer.steps=many: expected a whole number"),
        ({"trainer": None}, "trainer"),
        ({"seed": [1]}, "seed"),
    ],
)
def test_put_refuses_what_does_not_fit_the_schema(values, message):
    with pytest.raises(ConfigError, match=message):
        run_folder.put_values(composed(), values)


def test_a_run_whose_process_is_gone_has_crashed():
    gone = subprocess.Popen([sys.executable, "-c", ""])
    gone.wait()
    record = {"status": "running", "host": socket.gethostname(), "pid": gone.pid}
    assert run_folder.is_crashed(record)
    for other in ({"status": "finished"}, {"host": "elsewhere"}, {"pid": os.getpid()}, {"pid": "1"}, {"pid": -1}):
        assert not run_folder.is_crashed(record | other)


def test_a_damaged_record_is_read_as_empty(tmp_path):
    assert run_folder.read_record(tmp_path) == {}
    (tmp_path / "run.json").write_text("[1]")
    assert run_folder.read_record(tmp_path) == {}
    (tmp_path / "run.json").write_text(json.dumps({"status": "finished"}))
    assert run_folder.read_record(tmp_path) == {"status": "finished"}


@pytest.mark.parametrize("name", ["metrics.jsonl", ".hydra/config.yaml", "checkpoints/step_00000004", "exports"])
def test_a_link_in_a_runs_folder_is_refused_by_name(tmp_path, name):
    run = tmp_path / "run"
    (run / ".hydra").mkdir(parents=True)
    (run / "checkpoints").mkdir()
    run_folder.refuse_links(run)
    (run / name).symlink_to(tmp_path / "elsewhere")
    with pytest.raises(ConfigError, match=f"{name}: a link"):
        run_folder.refuse_links(run)


def test_a_recorded_link_is_allowed_while_it_has_the_recorded_target(tmp_path):
    run, storage = tmp_path / "run", tmp_path / "storage"
    for folder in (run, storage):
        folder.mkdir()
    (run / "checkpoints").symlink_to("../storage")
    (storage / "best").symlink_to("step_00000004")  # not entered
    run_folder.refuse_links(run, {"checkpoints": str(storage)})
    for links in ({"checkpoints": str(tmp_path)}, {"exports": str(storage)}):
        with pytest.raises(ConfigError, match="checkpoints: a link"):
            run_folder.refuse_links(run, links)


def test_a_link_of_a_launcher_that_stays_in_the_sweep_is_allowed(tmp_path):
    sweep = tmp_path / "sweep"
    (sweep / ".submitit" / "1").mkdir(parents=True)
    (sweep / ".submitit" / "submission.sh").symlink_to(sweep / ".submitit" / "1" / "submission.sh")
    run_folder.refuse_links_of_sweep(sweep)
    (sweep / ".submitit" / "2").symlink_to("../../elsewhere")
    with pytest.raises(ConfigError, match=r"\.submitit/2: a link"):
        run_folder.refuse_links_of_sweep(sweep)


def test_a_pipe_in_a_runs_folder_is_refused_by_name_and_not_opened(tmp_path):
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(ConfigError, match=r"metrics\.jsonl: expected a file or a folder, found a pipe"):
        run_folder.refuse_links(tmp_path)


def test_a_checkpoint_that_is_a_link_is_of_the_run_that_has_the_link(tmp_path):
    other = tmp_path / "other" / "checkpoints" / "step_00000012"
    other.mkdir(parents=True)
    (tmp_path / "run" / "checkpoints").mkdir(parents=True)
    (tmp_path / "run" / "checkpoints" / "step_00000012").symlink_to(other)
    (tmp_path / "newest").symlink_to(other)
    assert run_folder.find_run(tmp_path / "run" / "checkpoints" / "step_00000012") == tmp_path / "run"
    assert run_folder.find_run(tmp_path / "newest") == tmp_path / "other"


def test_an_alias_is_refused_before_it_is_expanded(tmp_path):
    bomb = "a: &a [x,x,x,x,x,x,x,x,x,x]\n" + "".join(
        f"{b}: &{b} [{','.join(['*' + a] * 10)}]\n" for a, b in zip("abcdefgh", "bcdefghi", strict=True)
    )
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text(bomb)
    with pytest.raises(ConfigError, match="has an alias"):
        run_folder.read_config(tmp_path)
