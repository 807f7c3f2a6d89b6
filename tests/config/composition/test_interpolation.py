import itertools
import operator
import os
import sys

import pytest
from conftest import Project, shared_zygote
from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.utils import setup_globals
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from ranks import Ranks

from runner import evaluate, export
from runner.config.composition.interpolation import (
    calls_other_resolvers,
    escape,
    mask_other_resolvers,
    pin_unstable_values,
    quote_nested,
    use_hydra_config,
)
from runner.config.run_folder import read_overrides
from runner.utils import io

LOGGING = """
import json
import os
from own import Data, Model, report


def record_arguments(role, arguments):
    with open(os.environ["OWN_LOG"], "a") as file:
        print(role, repr(arguments), file=file)


class Recording(Model):
    def __init__(self, **arguments):
        super().__init__()
        record_arguments("model", arguments)


class RecordingData(Data):
    def __init__(self, length=50, **arguments):
        super().__init__(length)
        record_arguments(f"data {length}", arguments)


class Collate:
    def __init__(self, **arguments):
        record_arguments("collate", arguments)

    def __call__(self, samples):
        from torch.utils.data import default_collate

        return default_collate(samples)


class Report:
    def __init__(self, **arguments):
        record_arguments("report", arguments)

    def __call__(self, module, dataset):
        return {}


class Part:
    def __init__(self, **arguments):
        self.arguments = arguments

    def __repr__(self):
        return f"Part({self.arguments})"


class Linear(__import__("torch").nn.Linear):
    pass


def convert(module, **arguments):
    record_arguments("rule", arguments)
    return Linear(module.in_features, module.out_features)
"""
TOLD = r"""
# @package _global_
defaults: [base]
model:
  _target_: recording.Recording
  text: '\${user} says \\\${x} and π\${名}'
  name: '\${name} is not ${name}'
  list: ['\${a}', {deep: '\${b}', 3: ['\\\${oc.env:HOME}']}]
  keys: {0: 1.0, 1: 3.5, -2: a, 1.5: half, '${not}': key, 'nan': 1}
  bools: {true: 1, false: 0}
  plain: ['$${seed}', '\\${seed}', '$(x) {x} $ {y}', 'C:\dir\', '1e5', '', null, 1.0e-3, .inf, !!binary AGhp]
  shared: &shared {k: '\${k}', 0: 1}
  anchored: *shared
  taken: ${model.text}
  taken_list: ${model.list}
  part: {_target_: recording.Part, t: '\${q}', k: {0: x}}
  parts: [{_target_: recording.Part, _recursive_: false, inner: {_target_: recording.Part, t: '\${q}'}}]
  choice: ${hydra:runtime.choices.optimizer}
data:
  train: {_target_: recording.RecordingData, pattern: '^\${[a-z]+}$', weights: {0: 1, 1: 2}}
  eval: {_target_: recording.RecordingData, pattern: '\${x', weights: {0: 1, 1: 2}}
  collate: {_target_: recording.Collate, t: '\${q}', k: {0: x}}
report: {_target_: recording.Report, t: '\${q}', k: {0: x}}
optimizations:
  replace: [{match: torch.nn.Linear, with: recording.convert, arguments: {t: '\${q}', k: {0: x}}}]
trainer: {steps: 1, eval_at_start: false}
"""
ARGUMENTS = {
    "text": r"${user} says \${x} and π${名}",
    "name": "${name} is not mine",
    "list": ["${a}", {"deep": "${b}", 3: [r"\${oc.env:HOME}"]}],
    "keys": {0: 1.0, 1: 3.5, -2: "a", 1.5: "half", "${not}": "key", "nan": 1},
    "bools": {True: 1, False: 0},
    "plain": ["$0", r"\0", "$(x) {x} $ {y}", "C:\\dir\\", "1e5", "", None, 1e-3, float("inf"), b"\0hi"],
    "shared": {"k": "${k}", 0: 1},
    "anchored": {"k": "${k}", 0: 1},
    "taken": r"${user} says \${x} and π${名}",
    "taken_list": ["${a}", {"deep": "${b}", 3: [r"\${oc.env:HOME}"]}],
}


CHOICE = "adamw"  # of the group optimizer

texts = st.text(st.sampled_from("\\\\${}ab:'\",.[]\u03c0 \n"))
keys = st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False), texts)
scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(allow_nan=False), texts)
nests = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner), st.dictionaries(keys, inner)), max_leaves=8)


@given(nests)
def test_an_escaped_value_resolves_to_itself(value):
    cfg = OmegaConf.create({"value": escape(value)})
    assert OmegaConf.to_container(cfg, resolve=True) == {"value": value}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("${oc.env:SECRET}", True),
        (r"\\${oc.env:SECRET}", True),
        ("${now:'${oc.env:SECRET}'}", True),
        (r"${now:\${oc.env:SECRET}}", True),
        ("${not closed", True),
        (r"\${oc.env:SECRET}", False),
        (r"\\\${oc.env:SECRET}", False),
        (r"${now:'\${oc.env:SECRET}'}", False),
        ("${hydra:runtime.output_dir} ${a.${b}}", False),
    ],
)
def test_calls_other_resolvers_agrees_with_omegaconf(text, expected):
    assert calls_other_resolvers(text) == expected
    assert mask_other_resolvers({"a": [text, 1]}) == {"a": ["???" if expected else text, 1]}


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("a=${oc.decode:${oc.env:X}}", "${oc.decode:${oc.env:X}}"),
        ("+a.b=${oc.decode:${oc.env:X,'3'}}", "${oc.decode:${oc.env:X,'3'}}"),
        ('a=${oc.decode:"${oc.env:X}"}', '${oc.decode:"${oc.env:X}"}'),
        ("a=${oc.decode:${oc.env:${b}}}", "${oc.decode:${oc.env:${b}}}"),
        ("a=${oc.create:{b: 1}}", "${oc.create:{b: 1}}"),
        ("a=[${b.${c}}, '${d.${e}}', 2]", ["${b.${c}}", "${d.${e}}", 2]),
        ("a={b: ${c.${d}}, e: ${f}}", {"b": "${c.${d}}", "e": "${f}"}),
        ("a=${b}", "${b}"),
        (r"a=\${b}", r"\${b}"),
        ("a='x ${b.${c}}'", "x ${b.${c}}"),
        ("a=3", 3),
    ],
)
def test_an_interpolation_inside_another_one_needs_no_quotes(override, expected):
    assert OverridesParser.create().parse_override(quote_nested(override)).value() == expected


def test_only_interpolations_with_braces_are_quoted_and_each_element_of_a_sweep():
    for argument in ("--config-dir=${a.${b}}", "a=${b},${c}", "a={b:{c:1}}", "a", r"a=\${b}"):
        assert quote_nested(argument) == argument
    assert quote_nested("a=${b.${c}},3") == 'a="${b.${c}}",3'


def test_use_hydra_config_replaces_hydras_section_within_the_block(tmp_path):
    setup_globals()  # Hydra's resolver
    before = HydraConfig.instance().cfg
    cfg = OmegaConf.create({"name": "x", "a": "${hydra:job.name}", "b": "${hydra:runtime.output_dir}"})
    with use_hydra_config(cfg, lambda: {"job": {"name": "${name}-1"}}, tmp_path):
        assert OmegaConf.to_container(cfg, resolve=True) == {"name": "x", "a": "x-1", "b": str(tmp_path)}
    assert HydraConfig.instance().cfg is before


@pytest.fixture
def count():
    """Registers resolvers: one that counts its calls, as one with a random or current value would, and a product."""
    setup_globals()  # Hydra's resolver
    numbers = itertools.count(1)
    OmegaConf.register_new_resolver("count", lambda *_: next(numbers))
    OmegaConf.register_new_resolver("kept_count", lambda *_: next(numbers), use_cache=True)
    OmegaConf.register_new_resolver("product", operator.mul)
    OmegaConf.register_new_resolver("pair", lambda: {"text": r"\${x}", "list": [1]})
    yield numbers
    for name in ("count", "kept_count", "product", "pair"):
        OmegaConf.clear_resolver(name)


@pytest.mark.parametrize(
    ("text", "is_fixed"),
    [
        ("${now:%f}", True),
        (r"a ${now:${format}} \${b}", True),
        ("${oc.decode:${now:1%f}}", True),
        ("${count:}", True),
        ("${count:${size}}", True),
        ("${kept_count:${size}}", True),
        ("${product:2,3}", True),
        ("${pair:}", True),
        ("${product:2,${size}}", False),
        ("${oc.decode:'${size}'}", False),
        ("${oc.env:HOME}", False),
        ("${size} ${hydra:job.name}", False),
        ("${missing:}", False),
        (r"\${now:%f}", False),
        ("12:30 ${size}", False),
    ],
)
def test_only_texts_that_may_resolve_to_another_value_later_are_pinned(count, text, is_fixed):
    texts = {"a": {"b": [text, {"k.l": text}], 3: text}, "taken": "${a.b.0}", "size": 3, "format": "%f"}
    cfg = OmegaConf.create(texts)
    OmegaConf.set_readonly(cfg, True)
    pin_unstable_values(cfg)
    found = OmegaConf.to_container(cfg, resolve=False)
    assert found.keys() == texts.keys()
    if not is_fixed:
        assert found == texts
        return
    values = OmegaConf.to_container(cfg, resolve=True)
    assert text not in (found["a"]["b"][0], found["a"]["b"][1]["k.l"], found["a"][3])
    assert values["taken"] == values["a"]["b"][0]
    assert OmegaConf.to_container(OmegaConf.create(OmegaConf.to_yaml(cfg)), resolve=True) == values
    other = OmegaConf.create(texts)
    pin_unstable_values(other, found)
    assert OmegaConf.to_container(other, resolve=False) == found


class Recording(Project):
    """A project whose objects record their arguments."""

    def run_ranks(self, *overrides):
        """Runs on two ranks."""
        ranks, log = Ranks(shared_zygote()), {"OWN_LOG": os.environ["OWN_LOG"]}
        arguments = [*self.command[3:], "distributed=ddp", "distributed.device=cpu", *overrides]
        ranks.run(self.folder, 2, *arguments, environment=log)


@pytest.fixture
def recording(tmp_path, monkeypatch):
    project = Recording(tmp_path)
    monkeypatch.setenv("OWN_LOG", str(project.folder / "recorded.txt"))
    (project.folder / "recording.py").write_text(LOGGING)
    experiments = project.folder / "conf" / "experiment"
    (experiments / "mine.yaml").rename(experiments / "base.yaml")
    (experiments / "mine.yaml").write_text(TOLD)
    yield project
    for name in ("own", "recording"):
        sys.modules.pop(name, None)


def read_recorded(project):
    """Returns the arguments recorded since the last call, each line once."""
    path = project.folder / "recorded.txt"
    lines = set(path.read_text().splitlines())
    path.unlink()
    return lines


def evaluated(project, place):
    """Evaluates a saved model in this process; returns the recorded arguments."""
    for name in ("own", "recording"):
        sys.modules.pop(name, None)
    evaluate.main([place, "--allow-targets", "own,recording"])
    return read_recorded(project)


@pytest.mark.slow
def test_texts_and_keys_reach_every_object_unchanged(recording, monkeypatch, capsys):
    monkeypatch.chdir(recording.folder)
    monkeypatch.syspath_prepend(recording.folder)
    recording.run("hydra.run.dir=run", "trainer.export_every=1")
    first = read_recorded(recording)
    (model,) = [line for line in first if line.startswith("model ")]
    arguments = eval(model.removeprefix("model "), {"Part": lambda given: ("Part", given), "inf": float("inf")})
    assert {key: arguments[key] for key in ARGUMENTS} == ARGUMENTS
    assert [type(key) for key in arguments["bools"]] == [bool, bool]
    assert arguments["part"] == ("Part", {"t": "${q}", "k": {0: "x"}})
    assert arguments["parts"] == [("Part", {"inner": {"_target_": "recording.Part", "t": "${q}"}})]
    assert arguments["choice"] == CHOICE
    others = {
        "data 50 {'pattern': '^${[a-z]+}$', 'weights': {0: 1, 1: 2}}",
        "data 20 {'pattern': '${x', 'weights': {0: 1, 1: 2}}",
        *(f"{role} {{'t': '${{q}}', 'k': {{0: 'x'}}}}" for role in ("collate", "report", "rule")),
    }
    assert first == {model} | others
    for steps in (2, 3):
        recording.run("resume=run", f"trainer.steps={steps}", "allow_targets=[own,recording]")
        assert read_recorded(recording) == first
    in_training = {"data 50 {'pattern': '^${[a-z]+}$', 'weights': {0: 1, 1: 2}}"}
    assert evaluated(recording, "run") == first - in_training
    export.main(["run", "--output", "later", "--allow-targets", "own,recording"])
    read_recorded(recording)
    assert io.read_metadata(recording.folder / "later/model.safetensors") == io.read_metadata(
        recording.folder / "run/exports/model.safetensors"
    )
    assert evaluated(recording, "later/model.safetensors") == first - in_training
    recording.run_ranks("hydra.run.dir=two")
    assert read_recorded(recording) == first


@pytest.mark.slow
def test_hydra_values_stay_those_of_the_start_but_the_output_dir_is_current(recording, monkeypatch):
    monkeypatch.chdir(recording.folder)
    monkeypatch.syspath_prepend(recording.folder)
    where, number = "+model.where=${hydra:runtime.output_dir}", "+model.number=${hydra:job.num}"
    sweep = ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}"]
    recording.run("-m", where, number, "seed=1,2", *sweep)
    first, second = (line for line in sorted(read_recorded(recording)) if line.startswith("model "))
    assert f"'where': '{recording.folder}/sweep/0', 'number': 0" in first
    assert f"'where': '{recording.folder}/sweep/1', 'number': 1" in second
    (recording.folder / "sweep" / "1").rename(recording.folder / "moved")
    moved = second.replace(f"{recording.folder}/sweep/1", f"{recording.folder}/moved")
    for steps in (2, 3):
        recording.run("resume=moved", f"trainer.steps={steps}", "allow_targets=[own,recording]")
        assert moved in read_recorded(recording)
    assert moved in evaluated(recording, "moved")
    recording.run_ranks(where, "hydra.run.dir=two")
    assert {
        f"'where': '{recording.folder}/two'" in line for line in read_recorded(recording) if line.startswith("model ")
    } == {True}


@pytest.mark.slow
def test_now_is_the_start_on_all_ranks_in_all_jobs_and_on_resume(recording, monkeypatch):
    monkeypatch.chdir(recording.folder)
    monkeypatch.syspath_prepend(recording.folder)
    moment = ["+model.moment='${now:%f}'", "+model.sweep='${hydra:sweep.dir}-${now:%f}'"]
    recording.run(*moment, "hydra.run.dir=run")
    (model,) = [line for line in read_recorded(recording) if line.startswith("model ")]
    for steps in (2, 3):
        recording.run("resume=run", f"trainer.steps={steps}", "allow_targets=[own,recording]")
        assert model in read_recorded(recording)
    assert model in evaluated(recording, "run")
    assert set(moment) < set(read_overrides(recording.folder / "run"))
    assert "model.moment: " in recording.run("resume=run", *moment, "allow_targets=[own,recording]", status=2)
    sweep = ["-m", *moment, "seed=1,2", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}"]
    recording.run(*sweep)
    jobs = [line.partition("'moment': ")[2] for line in read_recorded(recording) if line.startswith("model ")]
    assert len(set(jobs)) == 1
    recording.run(*sweep)  # as where a scheduler starts its jobs again
    assert {line.partition("'moment': ")[2] for line in read_recorded(recording) if line.startswith("model ")} == set(
        jobs
    )
    recording.run_ranks(*moment, "hydra.run.dir=two")
    assert len([line for line in read_recorded(recording) if line.startswith("model ")]) == 1


def test_oc_decode_makes_an_environment_variable_a_number_and_a_text_is_reported(project, monkeypatch):
    monkeypatch.setenv("WIDTH", "24")
    project.run("hydra.run.dir=run", "+model.width=${oc.decode:${oc.env:WIDTH}}", "trainer.steps=1")
    assert io.load(project.folder / "run/checkpoints/step_00000001/model.safetensors")["second.weight"].shape == (1, 24)
    printed = project.run("+model.width=${oc.env:WIDTH}", status=2)
    assert printed.startswith("model: ")
    assert printed.endswith("; width='24': a text; ${oc.decode:...} makes it a number\n")
    assert printed.count("\n") == 1


def test_texts_of_an_export_are_not_interpolated(recording, monkeypatch, capsys):
    monkeypatch.chdir(recording.folder)
    monkeypatch.syspath_prepend(recording.folder)
    monkeypatch.setenv("SECRET", "s3cr3t")
    recording.run("hydra.run.dir=run", "trainer.export_every=1")
    read_recorded(recording)
    path = recording.folder / "run" / "exports" / "model.safetensors"
    facts = io.read_metadata(path)
    facts["config"] = facts["config"].replace("${user} says", "${oc.env:SECRET} says")
    io.save(io.load(path), path, facts)
    (model,) = [line for line in evaluated(recording, str(path)) if line.startswith("model ")]
    assert "'${oc.env:SECRET} says" in model
    assert "s3cr3t" not in model
