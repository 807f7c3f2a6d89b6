import sys

import pytest
import yaml
from composition import composed
from conftest import EXPERIMENT
from own_callbacks import RECORDER, add_callbacks

from runner.config import checks, errors
from runner.config.hparams import run_label
from runner.config.targets import check_targets


def plain(*overrides):
    return checks.check_config(composed(*overrides)).plain["callbacks"]


def test_a_list_chooses_callbacks_and_values_are_set_by_their_keys():
    assert plain() == {}
    chosen = plain("callbacks=[histograms,early_stopping]", "callbacks.early_stopping.patience=9")
    assert list(chosen) == ["histograms", "early_stopping"]
    assert chosen["early_stopping"]["patience"] == 9
    assert list(plain("callbacks=early_stopping", "+callbacks.mine={_target_: own.Recorder}")) == [
        "early_stopping", "mine",
    ]  # fmt: skip
    assert plain("callbacks=[early_stopping]", "~callbacks.early_stopping") == {}
    assert plain("callbacks=[early_stopping]", "callbacks.early_stopping=null") == {"early_stopping": None}


@pytest.mark.parametrize(
    ("overrides", "expected"),
    [
        (["callbacks=[early_stopin]"], "callbacks/early_stopin: there is no such file"),
        (["callbacks=null"], "callbacks=null: expected a list of choices; for none: callbacks=[]"),
        (["trackers=[csv,null]"], "trackers: expected a list of the names of choices, found null in it"),
        (["callbacks=[1]"], "callbacks: expected a list of the names of choices, found 1 in it"),
        (["+callbacks.x=3"], "callbacks.x=3: expected a mapping with _target_"),
        (["+callbacks.a-b={_target_: own.A}"], "callbacks.a-b: expected a name of letters, digits and '_'"),
        (["callbacks=[early_stopping]", "callbacks.early_stopping.patince=1"], "did you mean patience?"),
        (["callbacks.early_stopping.patience=1"], "callbacks.early_stopping: no such key"),
        (["+callbacks.early_stopping.patience=1"], "has no _target_; choose it: callbacks=[early_stopping]"),
    ],
)
def test_a_mistake_is_one_message_that_names_the_key(overrides, expected):
    with pytest.raises(Exception) as raised:  # noqa: PT011  Hydra's own, too
        checks.check_config(composed(*overrides))
    assert expected in (errors.format_error(raised.value) or str(raised.value))


def test_arguments_of_a_callback_are_checked_before_anything_is_built():
    stop = "runner.callbacks.early_stopping.EarlyStopping"
    spec = checks.check_config(composed(f"+callbacks.a={{_target_: {stop}, patience: many, depth: 1}}"))
    with pytest.raises(errors.ConfigError) as raised:
        check_targets(spec.plain)
    assert f"callbacks.a.depth: {stop} takes no such argument" in str(raised.value)
    assert "callbacks.a.patience=many: expected a whole number" in str(raised.value)


def test_a_job_of_a_sweep_is_named_after_its_callbacks():
    overrides = ["callbacks=[early_stopping,histograms]", "callbacks.early_stopping.patience=3"]
    assert run_label(overrides) == "callbacks=early_stopping,histograms,patience=3"


def test_experiments_compose_and_a_sweep_varies_the_list(project):
    add_callbacks(project)
    experiment = EXPERIMENT.replace("name: mine", "  - override /callbacks: [early_stopping]\nname: mine")
    experiment += "callbacks: {recorder: {_target_: own.Recorder}}\n"
    (project.folder / "conf" / "experiment" / "mine.yaml").write_text(experiment)
    project.run("-m", "callbacks=[early_stopping],[]", "trainer.steps=1", "hydra.sweep.dir=sweep")
    runs = sorted(project.folder.glob("sweep/*/.hydra/config.yaml"))
    found = [list(yaml.safe_load(path.read_text())["callbacks"]) for path in runs]
    assert found == [["early_stopping", "recorder"], ["recorder"]]


def test_a_run_is_evaluated_and_exported_without_its_callbacks(project, monkeypatch):
    from runner.run.evaluation import evaluate
    from runner.run.saved_model import open_checkpoint

    add_callbacks(project)
    project.run("trainer.steps=2", RECORDER, "hydra.run.dir=run")
    path = project.folder / "own.py"
    path.write_text(path.read_text().replace("class Recorder", "class Gone"))
    monkeypatch.syspath_prepend(project.folder)
    monkeypatch.delitem(sys.modules, "own", raising=False)
    numbers, _ = evaluate(open_checkpoint(project.folder / "run"))
    sys.modules.pop("own", None)
    assert "eval/loss" in numbers


def test_an_untrusted_run_may_name_the_runners_callbacks_and_no_others(project):
    add_callbacks(project)
    project.run("trainer.steps=2", RECORDER, "callbacks=[early_stopping]", "hydra.run.dir=run")
    (project.folder / "run" / ".hydra" / "signature.json").unlink()
    printed = project.run("resume=run", "allow_targets=[own.Model,own.Data,own.report]", status=2)
    assert "callbacks.recorder._target_=own.Recorder: its module is not on the allow-list" in printed
    assert "early_stopping" not in printed
