import contextlib
import json
import math
import pickle
from collections import namedtuple
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.utils.files import message

TEXTS = st.text(st.characters(codec=None, exclude_categories=()))  # lone surrogates too
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | TEXTS | st.binary()
PATHS = TEXTS.filter(lambda text: "\0" not in text).map(Path)
KEYS = SCALARS | st.tuples(TEXTS, st.integers()) | st.sampled_from(["_tuple_", "_bytes_", "_path_", "_items_"])


def nests(children):
    return st.lists(children) | st.lists(children).map(tuple) | st.dictionaries(KEYS, children)


def exactly(value):
    """Returns a text that is equal for values of equal type and content, including NaN and the sign of 0."""
    if isinstance(value, dict):
        return "{" + ",".join(f"{exactly(key)}:{exactly(child)}" for key, child in value.items()) + "}"
    if isinstance(value, (list, tuple)):
        return f"{type(value).__name__}[" + ",".join(map(exactly, value)) + "]"
    return f"{type(value).__name__} {value!a}"


@settings(max_examples=50)
@given(st.recursive(SCALARS | PATHS | st.lists(st.floats()), nests))
def test_decoding_a_message_gives_the_value(value):
    assert exactly(message.decode(message.encode(value))) == exactly(value)


def test_numbers_of_numpy_and_torch_and_named_tuples_arrive_as_pythons():
    Pair = namedtuple("Pair", "a b")
    value = Pair(np.float32(0.1), [np.int64(3), np.float64(math.inf), torch.tensor(0.1), torch.ones(1), np.bool_(True)])
    third = torch.tensor(0.1).item()
    assert exactly(message.decode(message.encode(value))) == exactly((third, [3, math.inf, third, 1.0, True]))


@pytest.mark.parametrize("value", [object(), {1, 2}, [ValueError("mistake")], {"a": np.zeros(2)}, torch.ones(2)])
def test_unsupported_types_are_refused_by_name(value):
    with pytest.raises(TypeError, match="a message can't hold a "):
        message.encode(value)


def test_values_that_contain_themselves_are_refused():
    endless = []
    endless.append(endless)
    with pytest.raises(ValueError, match="nested too deeply"):
        message.encode(endless)
    with pytest.raises(ValueError, match="nested too deeply"):
        message.decode(b"[" * 1_000_000)


@given(
    st.binary()
    | st.recursive(
        st.none() | st.integers() | st.text(),
        lambda children: st.lists(children) | st.dictionaries(st.sampled_from(sorted(message._MARKS)), children),
    ).map(lambda value: json.dumps(value).encode())
)
def test_anything_else_is_a_value_error_or_a_value(data):
    with contextlib.suppress(ValueError):
        message.decode(data)


def test_a_pickle_is_no_message():
    with pytest.raises(ValueError, match="can't decode byte"):
        message.decode(pickle.dumps({"a": 1}))
