import pytest

from runner.config import diff
from runner.config.errors import ConfigError

SAVED = {
    "seed": 0,
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.003, "foo": 1},
    "trainer": {"steps": 12, "precision": "fp32"},
    "engines": {"a": {"model": 1}},
    "report": None,
}
DEFAULTS = SAVED | {
    "optimizer": {"_target_": "torch.optim.AdamW", "lr": 0.1},
    "trainer": {"steps": 99, "precision": "fp32"},
    "engines": {},
}
SGD = {"_target_": "torch.optim.SGD", "lr": 0.1}


def chosen(composed, *paths):
    return diff.replace_nodes(SAVED, DEFAULTS, DEFAULTS | composed, paths)


def test_another_choice_of_a_group_replaces_the_node_whole():
    wanted = chosen({"optimizer": SGD}, ("optimizer",))
    assert wanted == SAVED | {"optimizer": SGD}
    assert "optimizer.foo: 1 -> (none)" in diff.describe_changes(SAVED, wanted)


def test_a_choice_that_is_the_default_by_now_is_taken_too():
    assert chosen({}, ("optimizer",)) == SAVED | {"optimizer": DEFAULTS["optimizer"]}


def test_a_choice_that_is_deleted_deletes_the_node_or_leaves_the_default():
    without = {key: value for key, value in DEFAULTS.items() if key != "optimizer"}
    assert "optimizer" not in diff.replace_nodes(SAVED, DEFAULTS, without, [("optimizer",)])
    assert diff.replace_nodes(SAVED | {"report": 1}, DEFAULTS, DEFAULTS, [("report",)]) == SAVED


def test_a_choice_for_a_package_replaces_the_node_there():
    wanted = chosen({"engines": {"a": {"optimizer": SGD}}}, ("engines", "a", "optimizer"))
    assert wanted == SAVED | {"engines": {"a": {"model": 1, "optimizer": SGD}}}
    wanted = chosen({"engines": {"b": {"optimizer": SGD}}}, ("engines", "b", "optimizer"))
    assert wanted["engines"] == {"a": {"model": 1}, "b": {"optimizer": SGD}}


def test_an_experiment_sets_what_it_changes_of_the_defaults():
    composed = {"optimizer": SGD, "trainer": {"steps": 5, "precision": "fp32"}}
    wanted = chosen(composed, ("experiment",))
    assert wanted == SAVED | {"optimizer": SGD, "trainer": {"steps": 5, "precision": "fp32"}}
    assert chosen({}, ("experiment",)) == SAVED


def test_a_number_is_another_key_than_the_text_of_it():
    before, after = {"model": {"weights": {0: 1.0, 1: 3.5}}}, {"model": {"weights": {0: 9.0, 1: 3.5}}}
    assert diff.replace_nodes(before, before, after, [("model", "weights", 0)]) == after
    assert diff.describe_changes(before, after) == ["model.weights.0: 1.0 -> 9.0"]
    assert diff.describe_changes({"a": {0: 1}}, {"a": {"0": 1}}) == ["a.0: 1 -> (none)", "a.0: (none) -> 1"]


OFFLOAD = {"_target_": "own.Offload", "include": None, "keep": ["a", 1]}
ADAM = {"_target_": "torch.optim.Adam", "lr": 0.1}


@pytest.mark.parametrize("off", [False, None])
def test_a_switch_is_one_line_on_or_off_and_a_line_a_key_where_it_stays_on(off):
    on, other = {"optimizations": {"unsloth": OFFLOAD}}, {"optimizations": {"unsloth": OFFLOAD | {"include": ["b"]}}}
    shown, shown_off = '{_target_: own.Offload, include: null, keep: ["a", 1]}', "null" if off is None else "false"
    was_off = {"optimizations": {"unsloth": off}}
    assert diff.describe_changes(on, was_off) == [f"optimizations.unsloth: {shown} -> {shown_off}"]
    assert diff.describe_changes(was_off, on) == [f"optimizations.unsloth: {shown_off} -> {shown}"]
    assert diff.describe_changes({}, on) == [f"optimizations.unsloth: (none) -> {shown}"]
    assert diff.describe_changes(on, other) == ['optimizations.unsloth.include: null -> ["b"]']
    engines = [{"engines": {"a": each}} for each in (on, was_off)]
    assert diff.describe_changes(*engines) == [f"engines.a.optimizations.unsloth: {shown} -> {shown_off}"]
    diff.check_same_run(*engines, "init_from=run")


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({"optimizer": ADAM}, {"optimizer": None}), ({"optimizer": None}, {"optimizer": ADAM}),
        ({"engines": {"a": {"optimizer": ADAM}}}, {"engines": {"a": {"optimizer": False}}}),
        ({"optimizations": {"lora": OFFLOAD}}, {"optimizations": {"lora": False}}),
        ({"engines": {"a": {"ema": OFFLOAD}}}, {"engines": {"a": {"ema": None}}}), ({"ema": None}, {"ema": OFFLOAD}),
    ],
    ids=str,
)  # fmt: skip
def test_a_node_that_comes_or_goes_as_a_whole_is_refused_like_its_target(before, after):
    with pytest.raises(ConfigError, match=r"\n  \S+: \S.* -> .*\n"):
        diff.check_same_run(before, after, "init_from=run")


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
        diff.check_same_run({}, change, "init_from=run")


@pytest.mark.parametrize(
    "change",
    [
        {"optimizer": {"lr": 1}}, {"scheduler": {"_target_": "own.s", "a": 1}}, {"trainer": {"steps": 3}},
        {"trainer": {"save_every": 3, "keep_last": 2}}, {"data": {"num_workers": 3}}, {"tracking": {"jsonl": False}},
        {"data": {"eval": {"length": 3}}}, {"engines": {"a": {"optimizer": {"lr": 1}, "scheduler": {"a": 1}}}},
        {"optimizations": {"unsloth": OFFLOAD, "checkpointing": OFFLOAD, "device_map": OFFLOAD}},
        {"init_from": "run"}, {"engines": {"a": {"init_from": "run"}}},
        {"distributed": {"device": "cpu"}}, {"report": None},
    ],
    ids=str,
)  # fmt: skip
def test_more_steps_another_rate_and_more_workers_are_taken(change):
    diff.check_same_run({}, change, "init_from=run")


def test_all_that_is_refused_is_named_in_one_message():
    with pytest.raises(ConfigError) as caught:
        diff.check_same_run({"seed": 0, "model": {"width": 8}}, {"seed": 1, "model": {"width": None}}, "init_from=run")
    assert "  seed: 0 -> 1\n  model.width: 8 -> null\n" in str(caught.value)
    assert str(caught.value).endswith("start a new run from its weights: init_from=run")
