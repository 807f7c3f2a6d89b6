"""`runner.utils.files.strict_json`: any invalid or deep JSON raises ValueError, and nothing else."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.utils.files.strict_json import parse_json

VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
)


@given(VALUES)
def test_json_is_read_as_python_reads_it(value):
    assert parse_json(json.dumps(value)) == parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    "text",
    ["", "{", "[1,]", "9" * 5000, "[" * 101 + "]" * 101, '{"a":' * 101 + "1" + "}" * 101, "[" * 1_000_000, b"\xff",
     '{"a": 1, "a": 2}', '[{"b": 1, "c": 2, "b": 3}]', "nan", "\x00", '"\n"'],
    ids=lambda text: str(text[:8]),
)  # fmt: skip
def test_invalid_or_deep_json_is_a_value_error(text):
    with pytest.raises(ValueError, match=r"\w"):
        parse_json(text)


def test_the_depth_is_that_of_the_deepest_value():
    deep = "[" * 100 + "]" * 100
    parse_json(f"[{','.join(['[]'] * 500)}]")
    parse_json(deep)
    parse_json('"' + "[" * 500 + '"')
    for text in (f"[{deep}]", f'{{"a": 1, "b": [1, {deep}]}}'):
        with pytest.raises(ValueError, match="nested over 100 deep"):
            parse_json(text)


def test_many_keys_are_compared_in_little_time():
    keys = ",".join(f'"{i}": 1' for i in range(20_000))
    with pytest.raises(ValueError, match="the key '19999' is twice"):
        parse_json("{" + keys + ',"19999": 2}')
