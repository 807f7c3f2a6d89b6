"""`runner.config.hparams`: which values of a run the HPARAMS page shows, and the names of a sweep's folders."""

import json
import re
from pathlib import Path

import pytest
from conftest import read_metrics
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.plugins.hparams import plugin_data_pb2

from runner.config import checks, hparams
from runner.config.hparams import run_label

checks.register_with_hydra()
ABSENT = "(none)"


def composed(*overrides, is_sweep=False):
    mode = RunMode.MULTIRUN if is_sweep else RunMode.RUN
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        return loader.load_configuration("config", [f"hydra.mode={mode.name}", *overrides], run_mode=mode)


def select_hyperparameters(*overrides):
    root = composed(*overrides)
    plain = OmegaConf.create({key: root._get_node(key) for key in root if key != "hydra"})
    return hparams.select_hyperparameters(root, checks.to_plain(plain))


def read_recorded(folder):
    return json.loads((folder / "run.json").read_text())["hparams"]


def read_event_hparams(folder):
    """Returns what TensorBoard reads: numbers, bools and texts, by name."""
    accumulator = EventAccumulator(str(folder))
    accumulator.Reload()
    content = accumulator.PluginTagToContent("hparams")["_hparams_/session_start_info"]
    values = plugin_data_pb2.HParamsPluginData.FromString(content).session_start_info.hparams
    return {name: getattr(value, value.WhichOneof("kind")) for name, value in values.items()}


def jobs_of(project, *arguments):
    """Returns the folders of a sweep's jobs, by number."""
    project.run("-m", "hydra.sweep.dir=sweep", "trainer.eval_every=0", "trainer.steps=1", *arguments)
    return sorted((path.parent for path in project.folder.glob("sweep/*/run.json")), key=lambda path: path.name)


SWEPT = {
    "seed=1,2": ["seed"],
    "trainer.clip_norm=range(1,4)": ["trainer.clip_norm"],
    "sampler=choice(pool,random)": ["sampler"],
    "+model.extra=1,2": ["model.extra"],
    "++model.width=1,2": ["model.width"],
    "scheduler=glob(*)": ["scheduler"],
    "optimizer.lr=interval(0.1,1)": ["optimizer.lr"],
    "optimizer.betas=[0.9,0.95],[0.8,0.9]": ["optimizer.betas"],
    "+optimizer@engines.a.optimizer=sgd,adamw": ["optimizer@engines.a.optimizer"],
    "trainer={steps:1},{steps:2,log_every:1}": ["trainer.steps", "trainer.log_every"],
    "name='a,b'": [],
    "trainer.accumulate=1": [],
    "data={batch_size:4}": [],
    "+hydra.sweeper.search_space={model.depth:{type:int,low:1,high:2}}": ["model.depth"],
    "+hydra.sweeper.ax_config.params={model.dropout:{type:range,bounds:[0.1,1]}}": ["model.dropout"],
}


def test_swept_keys_come_from_the_command_line_and_the_sweeper():
    keys = hparams.find_keys(composed(*SWEPT, is_sweep=True))
    assert sorted(keys.swept) == sorted(key for keys in SWEPT.values() for key in keys)
    assert keys.fixed == ["name", "trainer.accumulate", "data.batch_size"]
    assert keys.constant == ["name", "trainer.accumulate", "data"]


@pytest.mark.parametrize(
    ("params", "overrides", "swept"),
    [
        ("{optimizer.lr: 'interval(0.1,1)', model.width: 8}", ["seed=1,2"], ["optimizer.lr", "seed"]),
        ("{optimizer.lr: '1,2'}", ["optimizer.lr=3"], []),
        ("{optimizer.lr: 'interval('}", [], ["optimizer.lr"]),
    ],
)
def test_the_search_space_of_an_experiment_is_swept_too(tmp_path, params, overrides, swept):
    (tmp_path / "experiment").mkdir()
    text = f"# @package _global_\nhydra: {{sweeper: {{params: {params}}}}}\n"
    (tmp_path / "experiment" / "search.yaml").write_text(text)
    place = f"hydra.searchpath=[file://{tmp_path}]"
    assert hparams.find_keys(composed(place, "experiment=search", *overrides, is_sweep=True)).swept == swept


def test_hyperparameters_are_the_keys_that_the_command_line_sets():
    found = select_hyperparameters(
        "optimizer.lr=1e-3", "trainer.steps=9", "sampler=pool", "+model.tied=true", "data.eval=null"
    )
    expected = {"optimizer.lr": 1e-3, "trainer.steps": 9, "sampler": "pool", "model.tied": True, "data.eval": "null"}
    assert found == expected
    assert list(map(type, found.values())) == [float, int, str, bool, str]


def test_values_are_resolved():
    found = select_hyperparameters("seed=7", "model.width=${seed}", "+model.text='${name}-${seed}'")
    assert found == {"seed": 7, "model.width": 7, "model.text": "byte_gpt-7"}


def test_a_mapping_on_the_command_line_is_split_into_its_keys():
    found = select_hyperparameters("+model.weights={0:1.0,1:2.0}", "trainer={steps:3}", "optimizer.betas=[0.9,0.95]")
    expected = {"model.weights.0": 1.0, "model.weights.1": 2.0, "trainer.steps": 3, "optimizer.betas": "[0.9, 0.95]"}
    assert found == expected


def test_the_keys_of_an_experiment_and_of_its_base_are_hyperparameters():
    expected = {
        "experiment": "digits", "model": "digits_net", "data": "digits", "report": "hardest_mistakes",
        "sampler": "random", "trainer": "digits",
    }  # fmt: skip
    found = select_hyperparameters("experiment=digits")
    text = (checks.CONF_DIR / "experiment" / "digits.yaml").read_text()
    for group in re.findall(r"override /(\w+)", text):
        assert found[group] in text
    assert found.items() >= {key: value for key, value in expected.items() if f"/{key}:" in text}.items()
    assert found["name"] == "digits"


def test_an_experiment_in_another_folder_includes_its_base(tmp_path):
    folder = tmp_path / "experiment"
    folder.mkdir()
    base = "# @package _global_\ndefaults: [override /sampler: pool]\nseed: 3\noptimizer: {lr: 0.5}\n"
    (folder / "base.yaml").write_text(base)
    (folder / "own.yaml").write_text("# @package _global_\ndefaults: [base, _self_]\nmodel: {width: 8}\n")
    found = select_hyperparameters(f"hydra.searchpath=[file://{tmp_path}]", "experiment=own", "seed=4")
    expected = {"experiment": "own", "seed": 4, "model.width": 8, "sampler": "pool", "optimizer.lr": 0.5}
    assert found == expected


def test_paths_and_resume_settings_are_no_hyperparameters():
    of_the_runner = ["resume_allow_changes=true", "allow_targets=[own]", "hydra.run.dir=x", "hydra/launcher=basic"]
    by_name = ["+data.train.path=data", "+data.train.files=[a,b]", "+model.cache_dir=b"]
    by_value = ["+model.a=/a/b.sft", "+model.b='~/b'", "+model.c=./b", "+model.d=[/a,/b]"]
    assert select_hyperparameters(*of_the_runner, *by_name, *by_value, "seed=1") == {"seed": 1}


def test_an_existing_path_is_left_out_but_a_name_with_a_slash_is_not(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "b").touch()
    assert select_hyperparameters("+model.start=a/b", "+model.from=owner/name") == {"model.from": "owner/name"}


def test_the_jobs_of_a_sweep_are_named_by_swept_keys_and_log_the_same_ones(project):
    constant = ["+model.width=4", "data.batch_size=4", "scheduler.warmup_steps=2", "trainer.log_every=1", "seed=3"]
    varied = ["optimizer.lr=1e-3,3e-4", "sampler=pool,random"]
    jobs = jobs_of(project, *constant, *varied)
    labels = [f"lr={lr},sampler={sampler}" for lr in (1e-3, 3e-4) for sampler in ("pool", "random")]
    assert [job.name for job in jobs] == [f"{number}-{label}" for number, label in enumerate(labels)]
    found = [read_recorded(job) for job in jobs]
    assert [list(each.items())[:2] for each in found] == [
        [("optimizer.lr", lr), ("sampler", sampler)] for lr in (1e-3, 3e-4) for sampler in ("pool", "random")
    ]
    assert len({tuple(each) for each in found}) == 1
    assert {"model.width", "seed", "experiment", "model._target_"} < set(found[0])
    assert not {"resume", "hydra.sweep.dir"} & set(found[0])
    assert [read_event_hparams(job) for job in jobs] == found
    numbers = [read_metrics(job) for job in jobs]
    assert jobs_of(project, *constant, *varied) == jobs  # the same command goes on in the same folders
    assert [read_metrics(job) for job in jobs] == numbers


def test_a_sweep_over_experiments_logs_the_keys_of_all_experiments_in_each_job(project):
    folder = project.folder / "conf" / "experiment"
    text = (folder / "mine.yaml").read_text()
    (folder / "a.yaml").write_text(text.replace("lr: 1.0e-2", "lr: 0.25"))
    other = text.replace("override /report: null", "override /report: null\n  - override /sampler: pool")
    (folder / "b.yaml").write_text(other.replace("{_target_: own.Model}", "{_target_: own.Model, width: 5}"))
    jobs = jobs_of(project, "experiment=a,b")
    assert [job.name for job in jobs] == ["0-experiment=a", "1-experiment=b"]
    found = [read_event_hparams(job) for job in jobs]
    assert len({tuple(sorted(each)) for each in found}) == 1
    names = ["experiment", "sampler", "optimizer.lr", "model.width"]
    expected = [["a", "random", 0.25, ABSENT], ["b", "pool", 0.01, 5]]
    assert [[each[name] for name in names] for each in found] == expected


def test_a_sweep_over_paths_shows_their_last_parts(project):
    text = (
        (project.folder / "own.py").read_text().replace("length=50, sleep_s=0.0", "length=50, sleep_s=0.0, path=None")
    )
    (project.folder / "own.py").write_text(text)
    jobs = jobs_of(project, "+data.train.path=/data/a,/data/b")
    assert [job.name for job in jobs] == ["0-path=-data-a", "1-path=-data-b"]
    assert [read_recorded(job)["data.train.path"] for job in jobs] == ["a", "b"]


def test_null_and_absent_values_are_logged_in_a_sweep(project):
    jobs = jobs_of(
        project, "trainer.best_metric=null,eval/error", "data={batch_size: 5}", "+model={width:3},{dropout:0}"
    )
    found = [read_event_hparams(job) for job in jobs]
    values = [[each[key] for key in ("trainer.best_metric", "model.width", "model.dropout")] for each in found]
    assert values == [["null", 3, ABSENT], ["null", ABSENT, 0], ["eval/error", 3, ABSENT], ["eval/error", ABSENT, 0]]
    assert [each["data.batch_size"] for each in found] == [5] * 4
    assert not {"model", "data"} & set(found[0])
    assert jobs[1].name == "1-best_metric=null,model=dropout-0"


def test_a_resumed_run_keeps_its_hyperparameters_and_updates_changed_ones(project):
    project.run("hydra.run.dir=run", "+model.width=4", "trainer.steps=4", "trainer.eval_every=0", "sampler=pool")
    folder = project.folder / "run"
    before = read_recorded(folder)
    project.run("resume=run", "trainer.steps=6", "optimizer.weight_decay=0.1")
    first = read_recorded(folder)
    assert first == before | {"trainer.steps": 6, "optimizer.weight_decay": 0.1}
    assert list(first)[: len(before)] == list(before)
    project.run("resume=run", "trainer.steps=7")
    assert read_recorded(folder) == read_event_hparams(folder) == first | {"trainer.steps": 7}


@pytest.mark.parametrize("record", [None, 3, ["a"], {"a": None}, {"seed": [1]}, {"resume": "/x"}, {1: 2.0}])
def test_invalid_entries_of_a_record_are_left_out(record):
    assert set(hparams.merge_hyperparameters(record, {"seed": 2}, {"seed": 2})) <= {"seed", 1}


def test_a_recorded_value_is_the_current_one_or_the_one_of_the_start():
    merged = hparams.merge_hyperparameters({"sampler": "pool", "seed": 1, "gone": 5}, {"new": 2}, {"seed": 3, "new": 2})
    assert merged == {"sampler": "pool", "seed": 3, "gone": 5, "new": 2}


@pytest.mark.parametrize(
    ("overrides", "constant", "expected"),
    [
        (["optimizer.lr=0.001", "sampler=pool", "seed=1"], ["seed"], "lr=0.001,sampler=pool"),
        (["optimizer.lr=1", "engines.a.optimizer.lr=2"], [], "optimizer.lr=1,a.optimizer.lr=2"),
        (["model._target_=own.A"], [], "model._target_=own.A"),
        (["+model.text='a b/c'", "optimizer.betas=[0.9,0.95]"], [], "text=a-b-c,betas=0.9,0.95"),
        (["seed=1"], ["seed"], "seed=1"),
        (["seed=1", "model.width=2"], None, "seed=1,width=2"),
        ([], [], "job"),
        ("sampler=pool,seed=1", None, "sampler=pool,seed=1"),
        ([f"data.train.path=/{'x' * 50}/{'y' * 50}", "seed=1"], [], None),
        ([f"model.a_rather_long_name_{i}={i}" for i in range(9)], [], None),
    ],
)
def test_a_label_shows_the_swept_keys(overrides, constant, expected):
    label = run_label(overrides, constant)
    assert label == expected if expected else len(label) <= 72
    assert expected or "seed=1" not in overrides or label.endswith("yyyyyyyyy,seed=1")


@given(st.lists(st.text(), max_size=8) | st.text(), st.lists(st.text()) | st.none())
def test_a_label_is_a_folder_name_of_at_most_72_characters(overrides, constant):
    label = run_label(overrides, constant)
    assert 0 < len(label) <= 72
    assert len(label.encode()) <= 200
    assert Path(f"0-{label}").name == f"0-{label}"
    assert re.fullmatch(r"[\w.,=+-]+", label)
