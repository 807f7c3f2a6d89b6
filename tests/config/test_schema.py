"""Every key of the schema, with a value of a wrong type and with a wrong name: one message that names the key."""

import dataclasses
import typing

import pytest
from composition import composed
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from runner.config import checks, errors, targets
from runner.config.errors import exit_on_config_error
from runner.config.schema import Config, EmaConfig

COMPOSED = composed()
WRONG = {  # of keys that may be of several types
    "data.input": "3",
    "tracking.stdin": "pipe",
    "distributed.nproc_per_node": "many",
    "optimizations.device_map.budgets": "3",
    "optimizations.unsloth": "3",
    "optimizations.checkpointing": "3",
}


def schema_keys(kind=Config, place=""):
    """Yields every key with its type, sections included."""
    for name, hint in typing.get_type_hints(kind).items():
        yield f"{place}{name}", hint
        if dataclasses.is_dataclass(hint):
            yield from schema_keys(hint, f"{place}{name}.")


def optimization_keys():
    """Yields the keys of the optimizations with the types of their classes."""
    for path in (checks.CONF_DIR / "optimization").glob("*.yaml"):
        kind = targets.locate(OmegaConf.load(path)["_target_"])
        hints = typing.get_type_hints(kind)
        yield f"optimizations.{path.stem}", typing.Any
        for field in dataclasses.fields(kind):
            yield f"optimizations.{path.stem}.{field.name}", hints[field.name]
    for name, hint in typing.get_type_hints(EmaConfig).items():
        yield f"optimizations.ema.{name}", hint


KEYS = dict(schema_keys()) | dict(optimization_keys())
GROUPS = {path.name for path in checks.CONF_DIR.iterdir() if path.is_dir()}


def wrong_value(key, hint):
    if key in WRONG:
        return WRONG[key]
    kinds = typing.get_args(hint) or (hint,)
    return "{a: 1}" if str in kinds or list in (hint, typing.get_origin(hint)) else "no_such"


def check(override):
    """Composes and checks a config with an override as the command does."""
    if override.partition("=")[0].strip("+") in GROUPS:
        cfg = composed(override)
    else:
        cfg = OmegaConf.create(COMPOSED)
        ConfigLoaderImpl._apply_overrides_to_config(OverridesParser.create().parse_overrides([override]), cfg)
    checks.check_config(cfg)
    targets.check_targets(checks.to_plain(cfg))


def told(override, capsys):
    with pytest.raises(SystemExit) as ended, exit_on_config_error():
        check(override)
    printed = capsys.readouterr()
    assert printed.out == ""
    assert ended.value.code == 2
    return printed.err


@pytest.mark.parametrize("key", KEYS)
def test_a_value_of_a_wrong_type_is_told_in_one_message_that_names_the_key(key, capsys):
    message = told(f"{key}={wrong_value(key, KEYS[key])}", capsys)
    assert key in message
    assert message.count("\n") == 1
    assert "Traceback" not in message


@pytest.mark.parametrize("key", KEYS)
def test_a_misspelt_key_is_told_in_one_message_that_names_it_and_the_right_one(key, capsys):
    section, _, name = key.rpartition(".")
    misspelt = f"{section}.{name[:-1]}x{name[-1]}".lstrip(".")
    for override in (f"{misspelt}=1", f"+{misspelt}=1"):
        message = told(override, capsys)
        assert misspelt in message
        assert name in message
        assert message.count("\n") == 1
        assert "Traceback" not in message


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("engines=[1]", "engines: expected a mapping, found a list"),
        ("metrics=[]", "metrics: expected a mapping, found a list"),
        ("allow_targets={a:b}", "allow_targets: expected a list of texts, found a mapping"),
        ("optimizer.groups={match:x}", "optimizer.groups: expected a list, found a mapping"),
        ("+optimizer.groups={match:x}", "optimizer.groups: expected a list, found a mapping"),
        ("callbacks=[early_stoping]", "no such file in the config folders; did you mean early_stopping?"),
        ("trackers=[csv,tensorbord]", "no such file in the config folders; did you mean tensorboard?"),
        ("callbacks=[../early_stopping]", "callbacks/../early_stopping: there is no such file in the config folders\n"),
        ("trainer=[1]", "trainer: expected the name of a choice, found a list"),
        ("data.mix={a:null}", "data.mix.a=null: expected datasets by name"),
        ("trainer.steps=None", "trainer.steps=None: expected a whole number, found a text"),
    ],
)
def test_a_message_says_what_was_found_as_yaml_has_it(override, expected, capsys):
    message = told(override, capsys)
    assert expected in message
    assert message.count("\n") == 1


def test_every_type_of_the_schema_is_described_as_a_person_says_it():
    described = {errors.describe_type(hint) for hint in KEYS.values() if hint is not typing.Any}
    assert not [text for text in described if "another" in text or "<" in text]
