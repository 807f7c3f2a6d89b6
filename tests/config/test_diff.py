import shlex
from pathlib import Path

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from runner.config import diff
from runner.config.errors import ConfigError

SAVED = {
    "seed": 0,
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.003, "foo": 1},
    "trainer": {"steps": 12, "precision": "fp32"},
    "engines": {},
    "report": None,
}
# What the YAML files say by now: another rate, one argument less, more steps.
COMPOSED = SAVED | {
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.1},
    "trainer": {"steps": 99, "precision": "fp32"},
}


def applied(beside, *typed):
    return diff.apply(SAVED, COMPOSED, COMPOSED | beside, list(typed))


def test_a_yaml_that_changed_since_changes_nothing():
    assert applied({}) == SAVED


def test_a_value_typed_is_taken_and_what_stands_beside_it_stays():
    wanted = applied({"optimizer": COMPOSED["optimizer"] | {"lr": 0.5}}, "optimizer.lr=0.5")
    assert wanted["optimizer"] == SAVED["optimizer"] | {"lr": 0.5}
    assert diff.describe(SAVED, wanted) == ["optimizer.lr: 0.003 -> 0.5"]


def test_a_value_typed_counts_even_where_the_yaml_says_it_by_now():
    assert applied({}, "optimizer.lr=0.1", "trainer={steps: 99}")["optimizer"]["lr"] == 0.1
    assert applied({}, "trainer={steps: 99}")["trainer"] == {"steps": 99, "precision": "fp32"}


def test_another_choice_of_a_group_replaces_the_node_whole():
    sgd = {"_target_": "torch.optim.SGD", "lr": 0.1}
    wanted = applied({"optimizer": sgd}, "optimizer=sgd")
    assert wanted["optimizer"] == sgd
    assert "optimizer.foo: 1 -> (none)" in diff.describe(SAVED, wanted)


def test_a_choice_that_is_the_default_by_now_is_taken_too():
    saved = SAVED | {"optimizer": {"_target_": "torch.optim.SGD", "lr": 1.0}}
    wanted = diff.apply(saved, COMPOSED, COMPOSED, ["optimizer=adamw", "experiment=mine"])
    assert wanted["optimizer"] == COMPOSED["optimizer"]


def test_a_key_added_or_deleted_is_added_or_deleted():
    assert applied({"optimizer": COMPOSED["optimizer"] | {"eps": 1}}, "+optimizer.eps=1")["optimizer"]["eps"] == 1
    without = {key: value for key, value in COMPOSED["optimizer"].items() if key != "lr"}
    assert "lr" not in applied({"optimizer": without}, "~optimizer.lr")["optimizer"]


def test_a_node_where_there_was_none_is_taken_whole():
    report = {"_target_": "own.report", "count": 3}
    assert applied({"report": report}, "+report.count=3")["report"] == report


def test_a_number_is_another_key_than_the_text_of_it():
    saved = {"model": {"weights": {0: 1.0, 1: 3.5}}}
    composed = {"model": {"weights": {0: 9.0, 1: 3.5}}}
    typed = ["model.weights={0: 9.0}"]
    assert diff.apply(saved, composed, composed, typed) == composed
    assert diff.apply(saved, saved, composed, typed) == composed
    assert diff.describe(saved, composed) == ["model.weights.0: 1.0 -> 9.0"]
    assert diff.describe({"a": {0: 1}}, {"a": {"0": 1}}) == ["a.0: 1 -> (none)", "a.0: (none) -> 1"]


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1}, {"model": {"width": 2}}, {"data": {"batch_size": 3}}, {"data": {"train": {"length": 3}}},
        {"data": {"collate": {"_target_": "own.f"}}}, {"data": {"seed_samples": False}}, {"sampler": {"seed": 2}},
        {"trainer": {"accumulate": 2}}, {"trainer": {"precision": "bf16"}}, {"feeder": {"_target_": "own.f"}},
        {"optimizations": {"freeze": ["*"]}}, {"optimizer": {"_target_": "own.Other"}}, {"seed": True},
        {"engines": {"a": {"model": 3}}}, {"engines": {"a": {"optimizer": {"_target_": "own.Other"}}}},
    ],
    ids=str,
)  # fmt: skip
def test_a_change_that_makes_another_run_is_refused_with_its_values_and_the_remedy(change):
    with pytest.raises(ConfigError, match=r"(?s) -> .*resume_allow_changes=true"):
        diff.check_same_run({}, change)


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"lr": 1}}, {"scheduler": {"_target_": "own.s", "a": 1}}, {"trainer": {"steps": 3}},
        {"trainer": {"save_every": 3, "keep_last": 2}}, {"data": {"num_workers": 3}}, {"tracking": {"jsonl": False}},
        {"data": {"eval": {"length": 3}}}, {"engines": {"a": {"optimizer": {"lr": 1}, "scheduler": {"a": 1}}}},
        {"init_from": "run"}, {"engines": {"a": {"init_from": "run"}}},
        {"distributed": {"device": "cpu"}}, {"report": None},
    ],
    ids=str,
)  # fmt: skip
def test_more_steps_another_rate_and_more_workers_are_taken(change):
    diff.check_same_run({}, change)


def test_all_that_is_refused_is_named_in_one_message():
    with pytest.raises(ConfigError) as caught:
        diff.check_same_run({"seed": 0, "model": {"width": 8}}, {"seed": 1, "model": {"width": None}})
    assert "  seed: 0 -> 1\n  model.width: 8 -> null\n" in str(caught.value)


def remedy_for(source):
    with pytest.raises(ConfigError) as caught:
        diff.check_same_run({"seed": 0}, {"seed": 1}, source)
    return str(caught.value).rpartition("its weights: ")[2].partition(" (without resume=)")[0]


@pytest.mark.parametrize("source", ["outputs/2026-11-23/15-04-05-a", "a b", "it's", "ü", 'a"b', "a,b", "$HOME", "[a]"])
def test_what_is_refused_may_begin_as_a_new_run_by_an_argument_that_shell_and_hydra_read(source):
    (argument,) = shlex.split(remedy_for(Path(source)))
    override = OverridesParser.create().parse_override(argument)
    assert (override.key_or_group, override.value()) == ("init_from", source)


def test_the_argument_is_quoted_only_where_it_must_be():
    assert remedy_for(Path("outputs/a")) == "init_from=outputs/a"
    assert remedy_for(None) == "init_from=<run>"
