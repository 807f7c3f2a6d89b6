"""`init`: its mistakes are reported before torch is loaded, and an engine's own overrides the common one."""

import pytest
from composition import composed

from runner.config import checks
from runner.config.errors import ConfigError
from runner.config.resume import sets_init_from
from runner.config.spec import InitSpec, find_init


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["init=3"],
            "init=3: expected a mapping of path, rename, include, exclude, strict; for a path alone: init_from=3",
        ),
        (["init_from=x", "init.path=y"], "init_from=x: expected one of init_from and init, found both"),
        (["init.strict=false"], "init.path: expected a run, a checkpoint, or a file or folder of weights; found null"),
        (["init.path=x", "init.strict=maybe"], "init.strict=maybe: expected true or false"),
        (["init.path=x", "init.include=head"], "init.include=head: expected a list of texts or null"),
        (["init.path=3"], "init.path: expected a text, found 3; put it into quotes"),
        (["init={path: x, rename: {head: 3}}"], "init.rename: expected a text, found 3; put it into quotes"),
        (["init={path: x, exclude: [a, 3]}"], "init.exclude: expected a text, found 3; put it into quotes"),
        (["init={path: x, pth: 3}"], "init.pth: no such key; did you mean path?"),
        (["+engines.a.init.path=null"], "engines.a.init.path: expected a run, a checkpoint"),
        (["+engines.a={init: x}"], "engines.a.init=x: expected a mapping of .*: engines.a.init_from=x"),
        (["+engines.a={init_from: x, init: {path: y}}"], "engines.a.init_from=x: expected one of init_from and init"),
        (["experiment=finetune"], "init.path: has no value; set it in the YAML or on the command line"),
    ],
)
def test_a_mistake_is_named_with_its_key(overrides, message):
    with pytest.raises(ConfigError, match=message):
        checks.check_config(composed(*overrides))


@pytest.mark.parametrize("rule", [{"a[": "b"}, {"a": "\\9"}, {"(" * 5000: ""}])
def test_a_rule_that_is_no_regular_expression_is_named(rule):
    cfg = composed("init.path=x")
    cfg.init.rename = rule
    with pytest.raises(ConfigError, match=r"init.rename: .*: expected a regular expression and its replacement"):
        checks.check_config(cfg)


def test_an_engines_own_overrides_the_common_one():
    engines = "+engines={a: {}, b: {init: {path: y, strict: false}}, c: {init_from: z}, d: {init: null}}"
    plain = checks.check_config(composed("init.path=x", "init.exclude=[head.*]", engines)).plain
    assert find_init(plain, "a") == InitSpec("init.path", "x", exclude=["head.*"])
    assert find_init(plain, "b") == InitSpec("engines.b.init.path", "y", strict=False)
    assert find_init(plain, "c") == InitSpec("engines.c.init_from", "z")
    assert find_init(plain, "d") is None
    del plain["init"], plain["init_from"]  # the config of an earlier run
    assert find_init(plain, "a") is None


def test_each_form_is_recorded_with_all_keys_as_a_resumed_run_records_it():
    inits = [checks.check_config(composed(override)).plain["init"] for override in ("init={path: x}", "init.path=x")]
    assert inits == [{"path": "x", "rename": {}, "include": None, "exclude": [], "strict": True}] * 2


@pytest.mark.parametrize("key", ["init", "init.path", "init_from", "engines.a.init", "+engines.a.init.path", "~init"])
def test_each_form_is_known_as_initial_weights(key):
    assert sets_init_from(f"{key}=x")
    assert not sets_init_from(f"model.{key.lstrip('+~')}=x")
    assert not sets_init_from("initial=x")
