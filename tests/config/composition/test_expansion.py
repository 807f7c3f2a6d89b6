"""`runner.config.composition.expansion`: what interpolations expand to is counted before anything is resolved."""

import pytest
from omegaconf import OmegaConf

from runner.config import checks
from runner.config.composition import expansion
from runner.config.composition.expansion import check_expansion, check_resolved_size
from runner.config.errors import ConfigError


def tenfold(reference):
    """Eight lists of ten interpolations each of the one before: 10^8 values."""
    return {"a0": "x"} | {f"a{i}": [reference.format(i - 1)] * 10 for i in range(1, 9)}


BOMBS = {
    "lists": {"model": {"b": tenfold("${{model.b.a{}}}")}},
    "relative": {"model": {"b": tenfold("${{..a{}}}")}},
    "brackets": {"model": {"b": tenfold("${{model[b].a{}}}")}},
    "through another": {"z": "${b}", "b": tenfold("${{z.a{}}}")},
    "nested keys": tenfold("${{${{m{}}}}}") | {f"m{i}": f"a{i}" for i in range(8)},
    "keys of two parts": tenfold("${{${{m{}}}}}") | {f"m{i}": "${n}" + str(i) for i in range(8)} | {"n": "a"},
    "a resolver": tenfold("${{oc.select:a{}}}"),
    "mappings": {"a0": "x"} | {f"a{i}": dict.fromkeys("abcdefghij", f"${{a{i - 1}}}") for i in range(1, 9)},
    "a text that doubles": {"a0": "x"} | {f"a{i}": f"${{a{i - 1}}}${{a{i - 1}}}" for i in range(1, 40)},
    "a text that doubles, relative": {"a0": "x"} | {f"a{i}": f"${{.a{i - 1}}}${{.a{i - 1}}}" for i in range(1, 40)},
    "a container in a text": tenfold("x${{a{}}}"),
    "a long text": {"a": "x" * 10_000, "b": ["${a}"] * 1000},
    "far too much": {"a0": "x"} | {f"a{i}": [f"${{a{i - 1}}}"] * 300 for i in range(1, 50)},
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_large_expansion_is_rejected_with_its_key(name):
    with pytest.raises(
        ConfigError, match=r"^[\w.]+: its interpolations expand to .* values and .* characters; expected"
    ):
        check_expansion(BOMBS[name])
    with pytest.raises(ConfigError, match="its interpolations expand to"):
        checks.to_plain(OmegaConf.create(BOMBS[name]))


@pytest.mark.parametrize(
    ("plain", "message"),
    [
        ({"a": "${a}"}, "a: its interpolation leads back to itself"),
        ({"a": "${b}", "b": "${a}"}, r"leads back to itself \(a -> b -> a\)"),
        ({"a": {"b": "${a}"}}, r"leads back to itself \(a -> a.b -> a\)"),
        ({"a": {"b": "x${..a}"}}, "leads back to itself"),
        ({"a": "${b.c}", "b": "${a}"}, r"nested over 60 deep|leads back"),
        ({f"a{i}": f"${{a{i + 1}}}" for i in range(5000)}, "nested over 60 deep"),
        ({f"a{i}": f"${{a{i + 1}}}" for i in range(70)} | {"a70": 1}, "nested over 60 deep"),
        ({f"a{i}": [[f"${{a{i + 1}}}"]] for i in range(30)} | {"a30": 1}, "nested over 60 deep"),
        ({f"a{i}": f"${{a{i + 1}.b}}" for i in range(5000)}, "nested over 60 deep"),
        ({"a": "${oc.select:a.x}"}, "nested over 60 deep"),
        ({"a": "${oc.select:b.x}", "b": "${oc.select:a.x}"}, "nested over 60 deep"),
        ({"a": "${" * 100_000}, "has 200,000 characters"),
        ({"a": "${" + "[" * 30}, "nested over 20 deep"),
        ({"a": ["${b}" + "x" * 9000] * 20, "b": 1}, "texts with interpolations have"),
    ],
)
def test_deep_nesting_and_slow_texts_are_rejected(plain, message):
    with pytest.raises(ConfigError, match=message):
        check_expansion(plain)


def test_a_deeply_nested_value_is_rejected_fast():
    nest = "x"
    for _ in range(100_000):
        nest = [nest]
    with pytest.raises(ConfigError, match="nested over 60 deep"):
        check_expansion({"a": nest})


@pytest.mark.parametrize(
    "plain",
    [
        {"a": {"b": "${a.c}", "c": 1}, "d": "${a}"},
        {"a": "${b}", "b": {"c": [1, 2]}, "d": "${a.c[1]}", "e": "${a.c.0}", "f": "x${b[c][0]}y"},
        {"a": "\\${b}", "c": "\\\\\\${d}"},
        {"sizes": {"small": {"width": 8}}, "size": "small", "model": "${sizes.${size}}"},
        {"a": {1: "x"}, "b": ["${a}"] * 50},
        {f"a{i}": f"${{a{i + 1}}}" for i in range(50)} | {"a50": 1},
    ],
)
def test_ordinary_interpolations_are_accepted(plain):
    cfg = OmegaConf.create(plain)
    resolved = {str(k): v for k, v in OmegaConf.to_container(cfg, resolve=True).items()}
    assert {key: value for key, value in checks.to_plain(cfg).items() if key in resolved} == resolved
    check_expansion(plain, is_strict=True)


def test_a_key_from_a_resolver_is_rejected_if_strict(monkeypatch):
    plain = {"a": "${b.${now:%S}}", "b": tenfold("${{b.a{}}}")}
    with pytest.raises(ConfigError, match="a: expected an interpolation whose key other keys tell"):
        check_expansion({**plain, "b": {"c": 1}}, is_strict=True)
    monkeypatch.setenv("PLACE", "c")
    check_expansion({"a": "${b.${oc.env:PLACE}}", "b": {"c": 1}}, is_strict=True)
    check_expansion({"a": "${b.${hydra:job.x}}", "b": {"c": 1}}, {"job": {"x": "c"}}, is_strict=True)


def test_values_of_hydra_are_counted():
    hydra = {"x": {"a": "y" * 600_000, "b": ["${hydra:x.a}", "${hydra:x.a}"]}}
    check_expansion({"a": 1}, hydra)
    with pytest.raises(ConfigError, match=r"hydra\.x\.b: its interpolations expand to"):
        check_expansion({"a": "${hydra:x.b}"}, hydra)


def test_a_resolved_config_has_a_bounded_size():
    check_resolved_size({"a": ["${b}", 1, None, b"x"]})
    for plain, message in [
        ({"a": [0] * (expansion.MAX_VALUES + 1)}, "values"),
        ({"a": "x" * (expansion.MAX_CHARACTERS + 1)}, "characters"),
        ({"a": "${" * 10_000}, "a: has 20,000 characters"),
    ]:
        with pytest.raises(ConfigError, match=message):
            check_resolved_size(plain)
