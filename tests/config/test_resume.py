import os
import re
import shlex
import time
from dataclasses import replace
from pathlib import Path

import pytest
from conftest import CANARY, read_metrics
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from runner.config import checks, resume, run_folder
from runner.config.errors import ConfigError
from runner.config.trust.signature import Origin
from runner.launch import launcher


def edit(path, old, new):
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))


def config_of(project):
    return OmegaConf.load(project.folder / "run" / ".hydra" / "config.yaml")


def rates(project):
    return {line["step"]: line["train/lr"] for line in read_metrics(project.folder / "run") if "train/lr" in line}


def test_the_runs_own_config_wins_over_changed_yaml_and_typed_values_are_set_and_printed(trained):
    edit(trained.folder / "conf" / "experiment" / "mine.yaml", "{lr: 1.0e-2}", "{lr: 7.0, eps: 1.0}")
    edit(trained.folder / "conf" / "experiment" / "mine.yaml", "batch_size: 8", "batch_size: 4")
    typed = ["trainer.steps=14", "data.num_workers=1", "scheduler.final_factor=1.0", "trainer.keep_last=0"]
    printed = trained.run("resume=run", *typed)
    assert printed.startswith(
        "data.num_workers: 0 -> 1\nscheduler.final_factor: 0.1 -> 1.0\ntrainer.steps: 12 -> 14\nGoing on after step 12"
    )
    cfg = config_of(trained)
    assert (cfg.optimizer.lr, cfg.optimizer.eps, cfg.data.batch_size) == (0.01, 1e-8, 8)
    assert (cfg.trainer.steps, cfg.data.num_workers, cfg.scheduler.total_steps) == (14, 1, 14)
    assert OmegaConf.is_interpolation(cfg.scheduler, "total_steps")
    assert rates(trained)[14] == 0.01
    trained.run("resume=latest", "trainer.steps=15", status=2)  # it lies in no outputs/


def test_every_change_that_makes_another_run_is_named_in_one_message_and_nothing_is_written(trained):
    changes = [
        ("seed=3", "seed: 0 -> 3"),
        ("data.batch_size=4", "data.batch_size: 8 -> 4"),
        ("data.train.length=51", "data.train.length: 50 -> 51"),
        ("data.collate={_target_: own.feed}", "data.collate: null -> {_target_: own.feed}"),
        ("data.seed_samples=false", "data.seed_samples: true -> false"),
        ("sampler=pool", "sampler._target_: runner.utils.sampler.RandomSampler -> runner.utils.sampler.PoolSampler"),
        ("trainer.accumulate=2", "trainer.accumulate: 1 -> 2"),
        ("trainer.precision=bf16", "trainer.precision: fp32 -> bf16"),
        ("+model.width=4", "model.width: (none) -> 4"),
        ("+engines.a.freeze=[x]", 'engines.a.freeze: (none) -> ["x"]'),
        ("feeder={_target_: own.feed}", "feeder: null -> {_target_: own.feed}"),
        (
            "optimizations.freeze=[x]",
            "optimizations.freeze: false -> "
            '{_target_: runner.utils.wrapper.built_in.Freeze, patterns: ["x"], mode: eval}',
        ),
        ("optimizer=sgd", "optimizer._target_: torch.optim.AdamW -> torch.optim.SGD"),
    ]
    before = {path: path.read_bytes() for path in (trained.folder / "run").rglob("*") if path.is_file()}
    printed = trained.run("resume=run", *(typed for typed, _ in changes), "scheduler=constant", status=2)
    for _, line in changes:
        assert f"  {line}\n" in printed
    assert "scheduler" not in printed
    assert "accept that with resume_allow_changes=true, or start a new run from its weights: init_from=run " in printed
    assert {path: path.read_bytes() for path in (trained.folder / "run").rglob("*") if path.is_file()} == before


def test_with_allowed_changes_data_of_another_length_goes_on_with_the_next_epoch(trained):
    printed = trained.run("resume=run", "data.train.length=60", "resume_allow_changes=true", "trainer.steps=14")
    assert "data.train.length: 50 -> 60" in printed
    assert "warning: The samples go on with the beginning of epoch 2: " in printed  # after 96 of 50 an epoch
    assert [line["step"] for line in read_metrics(trained.folder / "run") if "train/loss" in line] == [*range(1, 15)]
    printed = trained.run("resume=run", "seed=1", status=2)  # what was allowed once is not allowed for ever
    assert "seed: 0 -> 1" in printed


def test_data_that_changed_under_the_run_is_refused_with_both_lengths_and_the_config_stays(trained):
    edit(trained.folder / "own.py", "range(length)", "range(length + 3)")
    edit(trained.folder / "own.py", "randn(length,", "randn(length + 3,")
    before = (trained.folder / "run" / ".hydra" / "config.yaml").read_bytes()
    printed = trained.run("resume=run", "optimizer.lr=0.5", "trainer.steps=14", status=2)
    assert re.search(r"length=50, this sampler has length=53.*resume_allow_changes=true", printed)
    assert (trained.folder / "run" / ".hydra" / "config.yaml").read_bytes() == before


def test_a_resume_that_stands_in_yaml_is_refused(trained):
    edit(trained.folder / "conf" / "experiment" / "mine.yaml", "name: mine", "name: mine\nresume: run")
    assert "give it on the command line" in trained.run("hydra.run.dir=run", status=2)


@pytest.fixture
def hostile(trained, monkeypatch):
    """A project with a finished run to harm, and a module `evil` that nobody may import."""
    monkeypatch.setenv("HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE", "evil.Evil:os.system")
    monkeypatch.setenv("SECRET", "s3cr3t")
    (trained.folder / "evil.py").write_text(CANARY)
    yield trained
    assert not (trained.folder / "canary").exists()


def harm(project, **values):
    """Sets dotted keys (`__` for `.`) of the run's config."""
    cfg = config_of(project)
    for key, value in values.items():
        OmegaConf.update(cfg, key.replace("__", "."), value, force_add=True)
    OmegaConf.save(cfg, project.folder / "run" / ".hydra" / "config.yaml")


def test_a_hostile_target_in_a_runs_config_is_refused_before_anything_is_imported(hostile):
    nested = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.ReLU"}, {"_target_": "evil.Evil"}]}
    harm(hostile, model___target_="evil.Evil", report=nested, allow_targets=["evil"], resume_allow_changes=True)
    printed = hostile.run("resume=run", status=2)
    assert printed.startswith("run/.hydra/config.yaml: a config from a file is data")
    assert "  model._target_=evil.Evil: its module is not on the allow-list\n" in printed
    assert "  report._args_.1._target_=evil.Evil: " in printed
    assert printed.endswith("allow_targets=[evil]\n")
    assert "own.Data" not in printed  # this command line's own experiment names it


def test_a_hostile_target_through_another_module_is_refused(hostile):
    harm(hostile, report={"_target_": "runner.examples.digits.importlib.import_module", "name": "evil"})
    printed = hostile.run("resume=run", "allow_targets=[own]", status=2)
    assert "report._target_=runner.examples.digits.importlib.import_module: it goes through the module" in printed


def test_what_reads_the_machine_is_refused(hostile):
    harm(hostile, report={"_target_": "own.report", "words": "${oc.env:SECRET}"})
    printed = hostile.run("resume=run", status=2)
    assert "  report.words=${oc.env:SECRET}: a resolver other than hydra, now or run_label\n" in printed
    assert "s3cr3t" not in printed


def test_a_hostile_override_of_a_run_is_not_followed(hostile):
    run = hostile.folder / "run"
    overrides = [
        "hydra.callbacks.x={_target_: evil.Evil}",
        "+hydra/launcher=evil",
        "+model@hydra.callbacks=digits_net",
        "hydra.searchpath=[pkg://evil]",
        "experiment=../../evil",
        "model=/evil",
        "name=${oc.env:SECRET}",
        "feeder={_target_: evil.Evil}",
        "+allow_targets=[evil]",
    ]
    (run / ".hydra" / "overrides.yaml").write_text("".join(f"- '{text}'\n" for text in overrides))
    printed = hostile.run("resume=run", "trainer.steps=13", "allow_targets=[own]")
    assert "Finished at step 13" in printed
    cfg = config_of(hostile)
    assert (cfg.name, cfg.feeder, cfg.model._target_) == ("mine", None, "own.Model")
    assert "evil" not in printed
    assert not any(b"s3cr3t" in path.read_bytes() for path in run.rglob("*") if path.is_file())


@pytest.mark.parametrize("override", ["--config-dir=/evil", "seed=range(1000000000000)"])
def test_an_override_of_a_run_that_is_none_of_one_run_is_refused_with_its_file(trained, override):
    (trained.folder / "run" / ".hydra" / "overrides.yaml").write_text(f"- '{override}'\n")
    printed = trained.run("resume=run", status=2)
    assert printed.startswith(f"run/.hydra/overrides.yaml: {'Sweep parameters' if '=r' in override else override}")
    assert printed.count("\n") == 1


def test_a_model_of_its_own_is_allowed_by_prefix_where_the_command_line_does_not_name_it(trained, monkeypatch):
    command = [word for word in trained.command if word != "experiment=mine"]
    monkeypatch.setattr(type(trained), "command", command)
    printed = trained.run("resume=run", status=2)
    assert printed.endswith("allow_targets=[own]\n")
    printed = trained.run("resume=run", "allow_targets=[own]", "trainer.steps=13")
    assert "Finished at step 13" in printed


def test_an_error_that_nobody_foresaw_ends_the_program_before_anything_is_built(trained, monkeypatch, capsys):
    def fail(*_):
        raise RuntimeError("unforeseen")

    monkeypatch.setattr(launcher, "restore", fail)
    monkeypatch.setattr(launcher, "_resumption", object())
    with pytest.raises(SystemExit) as caught:  # Hydra would warn, and go on with what is unchecked
        launcher.RunFolder().on_run_start(OmegaConf.create({}), config_name="config")
    assert caught.value.code == 1
    assert "unforeseen" in capsys.readouterr().err


def shown(project, *overrides):
    """The config that a resumed run would have."""
    return OmegaConf.create(project.run(*overrides, "resume=run", "resume_allow_changes=true", "--cfg", "job"))


def test_a_value_counts_even_where_the_yaml_says_it_by_now_and_what_is_beside_it_stays(trained):
    edit(trained.folder / "conf" / "experiment" / "mine.yaml", "{lr: 1.0e-2}", "{lr: 7.0, eps: 1.0}")
    cfg = shown(trained, "optimizer.lr=7.0", "scheduler={final_factor: 1.0}", "+model.width=16", "++model.dropout=0.5")
    assert (cfg.optimizer.lr, cfg.optimizer.eps) == (7.0, 1e-8)
    assert (cfg.scheduler.final_factor, cfg.scheduler.warmup_steps) == (1.0, 3)
    assert dict(cfg.model) == {"_target_": "own.Model", "width": 16, "dropout": 0.5}


def test_a_key_is_deleted_of_the_runs_config(trained):
    cfg = shown(trained, "~optimizer.eps", "~report", "feeder={_target_: own.feed}")
    assert "eps" not in cfg.optimizer
    assert (cfg.report, cfg.feeder._target_) == (None, "own.feed")
    harm(trained, feeder={"_target_": "own.feed"})
    assert shown(trained, "~feeder", "allow_targets=[own]").feeder is None
    assert "~optimizer.epz: there is no such key to delete" in trained.run("resume=run", "~optimizer.epz", status=2)


def test_the_command_line_of_the_start_may_be_typed_again(trained):
    typed = [
        "+model.width=8",
        "+optimizer.maximize=false",
        "~optimizer.eps",
        "sampler=random",
        "scheduler.warmup_steps=4",
    ]
    trained.run("resume=run", "resume_allow_changes=true", "trainer.steps=13", *typed)
    assert trained.run("resume=run", "trainer.steps=14", *typed).startswith("trainer.steps: 13 -> 14\nGoing on after")
    assert shown(trained, *typed, "+model.width=16").model.width == 16
    assert "An item is already at 'optimizer.lr'" in trained.run("resume=run", "+optimizer.lr=1", status=2)


def test_a_choice_of_a_group_keeps_no_argument_and_one_that_the_run_made_changes_nothing(trained):
    sgd = OmegaConf.load(checks.CONF_DIR / "optimizer" / "sgd.yaml")
    assert shown(trained, "optimizer=sgd").optimizer == sgd
    assert shown(trained, "optimizer=sgd", "optimizer.lr=0.5").optimizer == {**sgd, "lr": 0.5}
    saved = config_of(trained)
    edit(trained.folder / "conf" / "experiment" / "mine.yaml", "batch_size: 8", "batch_size: 4")
    saved.resume, saved.resume_allow_changes = "run", True
    assert shown(trained, "optimizer=adamw", "sampler=random") == saved
    trained.run("resume=run", "optimizer=sgd", "optimizer.lr=0.5", "resume_allow_changes=true", "trainer.steps=13")
    assert "optimizer.lr=0.5" in run_folder.read_overrides(trained.folder / "run")
    assert shown(trained, "optimizer=sgd", "optimizer.momentum=0.5").optimizer.lr == 0.5
    trained.run("resume=run", "optimizer=adamw", "resume_allow_changes=true", "trainer.steps=14")
    assert "optimizer.lr=0.5" not in run_folder.read_overrides(trained.folder / "run")
    trained.run("resume=run", "optimizer=sgd", "optimizer.lr=0.5", "resume_allow_changes=true", "trainer.steps=15")
    assert shown(trained, "optimizer=adamw").optimizer.lr == OmegaConf.load(checks.CONF_DIR / "optimizer/adamw.yaml").lr


def test_another_experiment_sets_what_its_file_sets_and_one_that_is_gone_is_the_runs_own(trained):
    (trained.folder / "conf" / "experiment" / "other.yaml").write_text(
        "# @package _global_\ndefaults:\n  - override /scheduler: constant\ntrainer: {steps: 20}\n"
    )
    cfg = shown(trained, "experiment=other", "allow_targets=[own]")
    assert (cfg.trainer.steps, cfg.trainer.log_every, cfg.optimizer.lr) == (20, 1, 0.01)
    assert cfg.scheduler == OmegaConf.load(checks.CONF_DIR / "scheduler" / "constant.yaml")
    assert cfg.model._target_ == "own.Model"
    (trained.folder / "conf" / "experiment" / "mine.yaml").write_text("- [")
    assert shown(trained, "allow_targets=[own]", "trainer.steps=15").trainer.steps == 15
    assert "experiment=third: no such choice" in trained.run("resume=run", "experiment=third", status=2)


def test_a_sweep_of_a_run_that_goes_on_is_refused(trained):
    printed = trained.run("resume=run", "optimizer.lr=1,2", status=2)
    assert "add --multirun to your command line" in printed


@pytest.mark.parametrize("source", ["outputs/2026-11-23/15-04-05-a", "a b", "it's", "ü", 'a"b', "a,b", "$HOME", "[a]"])
def test_what_is_refused_may_begin_as_a_new_run_by_an_argument_that_shell_and_hydra_read(source):
    asked = resume.Resumption(Path(source), Path(source), ["seed=1"], [], [], [])
    kept = ["experiment=a", "init_from=b"]
    text, _, rest = resume._describe_new_run(asked, kept).partition(" (without resume=) ")
    assert rest == "with the same overrides"
    for command in (text, resume._describe_new_run(replace(asked, origin=Origin("/")), kept)):
        override = OverridesParser.create().parse_override(shlex.split(command)[-1])
        assert (override.key_or_group, override.value()) == ("init_from", source)
    assert command.startswith("python -m runner experiment=a seed=1 ")
    assert (text == f"init_from={source}") == (source == "outputs/2026-11-23/15-04-05-a")


@pytest.fixture
def outputs(tmp_path, monkeypatch):
    """Makes runs under outputs/, each older than the next."""
    monkeypatch.chdir(tmp_path)
    clock = iter(range(1000, 9000, 100))

    def make(place, *overrides, step="step_00000001"):
        run = tmp_path / "outputs" / place
        (run / ".hydra").mkdir(parents=True)
        (run / ".hydra" / "overrides.yaml").write_text("".join(f"- {override}\n" for override in overrides) or "[]\n")
        (run / "checkpoints" / step).mkdir(parents=True)
        (run / "checkpoints" / step / "MANIFEST.json").touch()
        os.utime(run / "checkpoints" / step, (now := time.time() + next(clock), now))
        return run.relative_to(tmp_path)

    return make


def test_latest_is_the_newest_run_with_a_checkpoint_or_that_of_the_experiment_typed(outputs):
    first = outputs("2026-01-01/a", "experiment=a")
    second = outputs("2026-01-01/b", "experiment=b")
    swept = outputs("multirun/2026-01-02/0-x", "experiment=b", "seed=1")
    (outputs("2026-01-03/c", "experiment=a") / "checkpoints" / "step_00000001" / "MANIFEST.json").unlink()
    (second / ".hydra" / "overrides.yaml").write_text("- [")  # another run's fault
    assert resume.find_resumption(["resume=latest"]).run == swept
    found = resume.find_resumption(["experiment=a", "resume=latest"])
    assert (found.run, found.overrides, found.run_overrides) == (first, ["experiment=a"], ["experiment=a"])
    with pytest.raises(ConfigError, match="no run of experiment=z with a checkpoint"):
        resume.find_resumption(["experiment=z", "resume=latest"])


def test_hydra_gets_the_runs_folder_and_its_own_overrides_and_the_others_are_kept_apart(outputs):
    run = outputs("d/run", "seed=1", "+model.width=3", "resume_allow_changes=true", "allow_targets=[a]", "resume=x")
    for flags in (["--config-dir", "conf"], []):
        typed = ["seed=2", f"resume={run}", "hydra.verbose=true"]
        for arguments in ([*flags, *typed], [*typed, *flags]):
            found = resume.find_resumption(arguments)
            expected = ["hydra.verbose=true", f"resume='{run}'", f"hydra.run.dir='{run}'"]
            assert found.arguments == ([*flags, *expected] if arguments[0] != "seed=2" else [*expected, *flags])
            assert (found.run_overrides, found.overrides) == (["seed=1", "+model.width=3"], ["seed=2"])
    step = run / "checkpoints" / "step_00000001"
    assert resume.find_resumption([f"resume={step}"]).checkpoint == step


@pytest.mark.parametrize("arguments", [[], ["seed=1"], ["resume=null"], ["-m", "resume=latest"]])
def test_nothing_is_resumed_where_nothing_is_asked_for(arguments):
    assert resume.find_resumption(arguments) is None
