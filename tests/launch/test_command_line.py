"""The command line composes the config of a single run once, with the result of Hydra's two compositions."""

import sys

import pytest
from hydra import compose, initialize_config_dir
from hydra._internal.hydra import Hydra
from hydra._internal.utils import create_config_search_path
from hydra.core.global_hydra import GlobalHydra
from hydra.types import RunMode
from omegaconf import OmegaConf

from runner.config import checks
from runner.config.composition import source
from runner.launch.command_line import _composing_once, _SingleRunHydra

SWEEP_IN_CONFIG = """
hydra:
  mode: MULTIRUN
  sweep: {dir: sweep, subdir: "${hydra.job.num}"}
  sweeper: {params: {seed: "1,2"}}
"""


@pytest.fixture
def compose_run(monkeypatch):
    """Composes a run as `hydra.main` does, by a class; returns the mode, the config and the files that were read."""
    checks.register_with_hydra()
    monkeypatch.setattr(sys, "argv", ["runner"])
    load_config = source.FileConfigSource.load_config

    def compose(kind, overrides):
        read = []

        def load_and_record(self, config_path):
            read.append(config_path)
            return load_config(self, config_path)

        monkeypatch.setattr(source.FileConfigSource, "load_config", load_and_record)
        GlobalHydra.instance().clear()
        hydra = kind.create_main_hydra2("runner", create_config_search_path(str(checks.CONF_DIR)))
        mode = hydra.get_mode("config", overrides)
        cfg = hydra.compose_config("config", overrides, run_mode=RunMode.RUN, with_log_configuration=True)
        return mode, OmegaConf.to_container(cfg, resolve=False), read

    yield compose
    GlobalHydra.instance().clear()


@pytest.mark.parametrize("overrides", [[], ["experiment=digits", "seed=3"], ["hydra.mode=RUN", "trainer.steps=5"]])
def test_a_single_run_reads_each_file_once_and_has_the_config_of_hydra(compose_run, overrides):
    _, expected, read_by_hydra = compose_run(Hydra, overrides)
    mode, found, read = compose_run(_SingleRunHydra, overrides)
    assert (mode, found) == (RunMode.RUN, expected)
    assert len(read) == len(set(read))
    assert read_by_hydra == 2 * read


def test_a_config_that_sweeps_without_a_flag_still_sweeps(project):
    experiment = project.folder / "conf" / "experiment" / "mine.yaml"
    experiment.write_text(experiment.read_text() + SWEEP_IN_CONFIG)
    project.run("trainer.steps=1", "trainer.eval_every=0")
    assert sorted(path.name for path in (project.folder / "sweep").iterdir() if path.is_dir()) == ["0", "1"]


@pytest.mark.parametrize("flag", ["-m", "--multirun"])
def test_a_flag_sweeps_where_the_config_would_not(project, flag):
    project.run(
        flag,
        "seed=1,2",
        "trainer.steps=1",
        "trainer.eval_every=0",
        "hydra.sweep.dir=sweep",
        "hydra.sweep.subdir=${hydra.job.num}",
    )
    assert sorted(path.name for path in (project.folder / "sweep").iterdir() if path.is_dir()) == ["0", "1"]


def test_a_choice_in_a_defaults_list_may_name_another_choice(tmp_path):
    for name, content in {
        "config": "defaults:\n  - nested: c\n  - model: a\n  - size: ${model}_large\n",
        "model/a": "x: 1\n",
        "model/b": "x: 2\n",
        "size/a_large": "y: 3\n",
        "size/b_large": "y: 4\n",
        "nested/c": "defaults:\n  - /size@of: ${model}_large\nz: 5\n",
    }.items():
        file = tmp_path / f"{name}.yaml"
        file.parent.mkdir(exist_ok=True)
        file.write_text(content)
    with initialize_config_dir(str(tmp_path), version_base="1.3"):
        expected = compose("config", ["model=b"])
        with _composing_once([]):
            found = compose("config", ["model=b"])
    assert found == expected == {"model": {"x": 2}, "size": {"y": 4}, "nested": {"of": {"y": 4}, "z": 5}}
