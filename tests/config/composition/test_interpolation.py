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
    escape,
    fix_values,
    quote_nested,
    reads_elsewhere,
    told_by_hydra,
    without_elsewhere,
)
from runner.config.run_folder import read_overrides
from runner.utils import io

LOGGING = """
import json
import os
from own import Data, Model, report


def note(role, arguments):
    with open(os.environ["OWN_LOG"], "a") as file:
        print(role, repr(arguments), file=file)


class Told(Model):
    def __init__(self, **arguments):
        super().__init__()
        note("model", arguments)


class ToldData(Data):
    def __init__(self, length=50, **arguments):
        super().__init__(length)
        note(f"data {length}", arguments)


class Collate:
    def __init__(self, **arguments):
        note("collate", arguments)

    def __call__(self, samples):
        from torch.utils.data import default_collate

        return default_collate(samples)


class Report:
    def __init__(self, **arguments):
        note("report", arguments)

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
    note("rule", arguments)
    return Linear(module.in_features, module.out_features)
"""
TOLD = r"""
# @package _global_
defaults: [base]
model:
  _target_: told.Told
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
  part: {_target_: told.Part, t: '\${q}', k: {0: x}}
  parts: [{_target_: told.Part, _recursive_: false, inner: {_target_: told.Part, t: '\${q}'}}]
  choice: ${hydra:runtime.choices.optimizer}
data:
  train: {_target_: told.ToldData, pattern: '^\${[a-z]+}$', weights: {0: 1, 1: 2}}
  eval: {_target_: told.ToldData, pattern: '\${x', weights: {0: 1, 1: 2}}
  collate: {_target_: told.Collate, t: '\${q}', k: {0: x}}
report: {_target_: told.Report, t: '\${q}', k: {0: x}}
optimizations:
  replace: [{match: torch.nn.Linear, with: told.convert, arguments: {t: '\${q}', k: {0: x}}}]
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
def test_a_text_reads_elsewhere_if_omegaconf_would_call_a_resolver_for_it(text, expected):
    assert reads_elsewhere(text) == expected
    assert without_elsewhere({"a": [text, 1]}) == {"a": ["???" if expected else text, 1]}


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


def test_what_needs_no_quotes_is_left_alone_and_a_sweep_is_quoted_by_element():
    for argument in ("--config-dir=${a.${b}}", "a=${b},${c}", "a={b:{c:1}}", "a", r"a=\${b}"):
        assert quote_nested(argument) == argument
    assert quote_nested("a=${b.${c}},3") == 'a="${b.${c}}",3'


def test_hydras_own_config_is_told_for_a_while_with_the_runs_folder(tmp_path):
    setup_globals()  # Hydra's resolver
    before = HydraConfig.instance().cfg
    cfg = OmegaConf.create({"name": "x", "a": "${hydra:job.name}", "b": "${hydra:runtime.output_dir}"})
    with told_by_hydra(cfg, lambda: {"job": {"name": "${name}-1"}}, tmp_path):
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
def test_a_text_that_may_resolve_to_another_value_later_is_fixed_and_no_other(count, text, is_fixed):
    texts = {"a": {"b": [text, {"k.l": text}], 3: text}, "taken": "${a.b.0}", "size": 3, "format": "%f"}
    cfg = OmegaConf.create(texts)
    OmegaConf.set_readonly(cfg, True)
    fix_values(cfg)
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
    fix_values(other, found)
    assert OmegaConf.to_container(other, resolve=False) == found


class Told(Project):
    """A project whose objects note the arguments that they are given."""

    def run_ranks(self, *overrides):
        """Runs on two ranks."""
        ranks, log = Ranks(shared_zygote()), {"OWN_LOG": os.environ["OWN_LOG"]}
        arguments = [*self.command[3:], "distributed=ddp", "distributed.device=cpu", *overrides]
        ranks.run(self.folder, 2, *arguments, environment=log)


@pytest.fixture
def told(tmp_path, monkeypatch):
    project = Told(tmp_path)
    monkeypatch.setenv("OWN_LOG", str(project.folder / "noted.txt"))
    (project.folder / "told.py").write_text(LOGGING)
    experiments = project.folder / "conf" / "experiment"
    (experiments / "mine.yaml").rename(experiments / "base.yaml")
    (experiments / "mine.yaml").write_text(TOLD)
    yield project
    for name in ("own", "told"):
        sys.modules.pop(name, None)


def noted(project):
    """The arguments that were noted since the last time, each line once."""
    path = project.folder / "noted.txt"
    lines = set(path.read_text().splitlines())
    path.unlink()
    return lines


def evaluated(project, place):
    """The arguments noted in the evaluation of a saved model, in this process."""
    for name in ("own", "told"):
        sys.modules.pop(name, None)
    evaluate.main([place, "--allow-targets", "own,told"])
    return noted(project)


@pytest.mark.slow
def test_texts_and_keys_reach_the_objects_as_they_are_wherever_they_are_built(told, monkeypatch, capsys):
    monkeypatch.chdir(told.folder)
    monkeypatch.syspath_prepend(told.folder)
    told.run("hydra.run.dir=run", "trainer.export_every=1")
    first = noted(told)
    (model,) = [line for line in first if line.startswith("model ")]
    arguments = eval(model.removeprefix("model "), {"Part": lambda given: ("Part", given), "inf": float("inf")})
    assert {key: arguments[key] for key in ARGUMENTS} == ARGUMENTS
    assert [type(key) for key in arguments["bools"]] == [bool, bool]
    assert arguments["part"] == ("Part", {"t": "${q}", "k": {0: "x"}})
    assert arguments["parts"] == [("Part", {"inner": {"_target_": "told.Part", "t": "${q}"}})]
    assert arguments["choice"] == CHOICE
    others = {
        "data 50 {'pattern': '^${[a-z]+}$', 'weights': {0: 1, 1: 2}}",
        "data 20 {'pattern': '${x', 'weights': {0: 1, 1: 2}}",
        *(f"{role} {{'t': '${{q}}', 'k': {{0: 'x'}}}}" for role in ("collate", "report", "rule")),
    }
    assert first == {model} | others
    for steps in (2, 3):
        told.run("resume=run", f"trainer.steps={steps}", "allow_targets=[own,told]")
        assert noted(told) == first
    in_training = {"data 50 {'pattern': '^${[a-z]+}$', 'weights': {0: 1, 1: 2}}"}
    assert evaluated(told, "run") == first - in_training
    export.main(["run", "--output", "later", "--allow-targets", "own,told"])
    noted(told)
    assert io.read_metadata(told.folder / "later/model.safetensors") == io.read_metadata(
        told.folder / "run/exports/model.safetensors"
    )
    assert evaluated(told, "later/model.safetensors") == first - in_training
    told.run_ranks("hydra.run.dir=two")
    assert noted(told) == first


@pytest.mark.slow
def test_hydras_values_stay_those_of_the_start_and_the_folder_is_where_the_run_lies(told, monkeypatch):
    monkeypatch.chdir(told.folder)
    monkeypatch.syspath_prepend(told.folder)
    where, number = "+model.where=${hydra:runtime.output_dir}", "+model.number=${hydra:job.num}"
    sweep = ["hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}"]
    told.run("-m", where, number, "seed=1,2", *sweep)
    first, second = (line for line in sorted(noted(told)) if line.startswith("model "))
    assert f"'where': '{told.folder}/sweep/0', 'number': 0" in first
    assert f"'where': '{told.folder}/sweep/1', 'number': 1" in second
    (told.folder / "sweep" / "1").rename(told.folder / "moved")
    moved = second.replace(f"{told.folder}/sweep/1", f"{told.folder}/moved")
    for steps in (2, 3):
        told.run("resume=moved", f"trainer.steps={steps}", "allow_targets=[own,told]")
        assert moved in noted(told)
    assert moved in evaluated(told, "moved")
    told.run_ranks(where, "hydra.run.dir=two")
    assert {f"'where': '{told.folder}/two'" in line for line in noted(told) if line.startswith("model ")} == {True}


@pytest.mark.slow
def test_the_moment_is_that_of_the_start_on_each_rank_in_each_job_and_on_resume(told, monkeypatch):
    monkeypatch.chdir(told.folder)
    monkeypatch.syspath_prepend(told.folder)
    moment = ["+model.moment='${now:%f}'", "+model.sweep='${hydra:sweep.dir}-${now:%f}'"]
    told.run(*moment, "hydra.run.dir=run")
    (model,) = [line for line in noted(told) if line.startswith("model ")]
    for steps in (2, 3):
        told.run("resume=run", f"trainer.steps={steps}", "allow_targets=[own,told]")
        assert model in noted(told)
    assert model in evaluated(told, "run")
    assert set(moment) < set(read_overrides(told.folder / "run"))
    assert "model.moment: " in told.run("resume=run", *moment, "allow_targets=[own,told]", status=2)
    sweep = ["-m", *moment, "seed=1,2", "hydra.sweep.dir=sweep", "hydra.sweep.subdir=${hydra.job.num}"]
    told.run(*sweep)
    jobs = [line.partition("'moment': ")[2] for line in noted(told) if line.startswith("model ")]
    assert len(set(jobs)) == 1
    told.run(*sweep)  # as where a scheduler starts its jobs again
    assert {line.partition("'moment': ")[2] for line in noted(told) if line.startswith("model ")} == set(jobs)
    told.run_ranks(*moment, "hydra.run.dir=two")
    assert len([line for line in noted(told) if line.startswith("model ")]) == 1


def test_numbers_of_the_environment_are_numbers_by_decode_and_a_text_is_told(project, monkeypatch):
    monkeypatch.setenv("WIDTH", "24")
    project.run("hydra.run.dir=run", "+model.width=${oc.decode:${oc.env:WIDTH}}", "trainer.steps=1")
    assert io.load(project.folder / "run/checkpoints/step_00000001/model.safetensors")["second.weight"].shape == (1, 24)
    printed = project.run("+model.width=${oc.env:WIDTH}", status=2)
    assert printed.startswith("model: ")
    assert printed.endswith("; width='24': a text; ${oc.decode:...} makes it a number\n")
    assert printed.count("\n") == 1


def test_an_exports_texts_are_no_interpolations_whoever_wrote_it(told, monkeypatch, capsys):
    monkeypatch.chdir(told.folder)
    monkeypatch.syspath_prepend(told.folder)
    monkeypatch.setenv("SECRET", "s3cr3t")
    told.run("hydra.run.dir=run", "trainer.export_every=1")
    noted(told)
    path = told.folder / "run" / "exports" / "model.safetensors"
    facts = io.read_metadata(path)
    facts["config"] = facts["config"].replace("${user} says", "${oc.env:SECRET} says")
    io.save(io.load(path), path, facts)
    (model,) = [line for line in evaluated(told, str(path)) if line.startswith("model ")]
    assert "'${oc.env:SECRET} says" in model
    assert "s3cr3t" not in model
