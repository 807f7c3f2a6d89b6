import math
import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from runner.utils.utils import (
    derive_seed,
    derive_seeds,
    encodable,
    escape_controls,
    find_nearest,
    format_number,
    list_nearest,
    one_line,
    suggest,
)


@pytest.mark.parametrize(
    ("number", "expected"),
    [
        (3e-6, "3e-6"), (-3.14159e-6, "-3.142e-6"), (0.00012345, "0.0001234"), (0.001, "0.001"), (1.70912, "1.709"),
        (98.7654, "98.77"), (999.96, "1000"), (1234.5, "1234"), (123456.7, "123457"), (1234567.8, "1.235e6"),
        (1.5e300, "1.5e300"), (0.0, "0"), (-0.0, "0"), (3, "3"), (3.0, "3"), (1234567, "1234567"),
        (10**14, "1" + 14 * "0"),
        (1e15, "1e15"), (True, "1"), (math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf"),
    ],
)  # fmt: skip
def test_a_number_has_four_significant_digits_and_a_whole_one_all(number, expected):
    assert format_number(number) == expected


@given(st.floats(-1e308, 1e308) | st.integers(-(10**18), 10**18))
def test_a_formatted_number_differs_by_less_than_a_thousandth(number):
    text = format_number(number)
    assert math.isclose(float(text), number, rel_tol=1e-3, abs_tol=1e-320)
    assert len(text) <= 16


TEXTS = st.text(st.characters()) | st.text(st.characters(categories=("Cc", "Cf", "Cs", "Zl", "Zp", "L")))
TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # direction marks


@given(TEXTS)
def test_control_characters_surrogates_and_direction_marks_are_escaped(text):
    shown = escape_controls(text)
    left = [c for c in shown if c not in "\n\t"]
    assert not [c for c in left if unicodedata.category(c) in ("Cc", "Cs", "Zl", "Zp")]
    assert not [c for c in left if unicodedata.bidirectional(c) in TURNS]
    assert shown.encode().decode() == shown
    assert escape_controls(shown) == shown
    assert one_line(text).splitlines() in ([], [one_line(text)])


@given(st.text(st.characters(categories=("L", "N", "P", "Zs"))))
def test_other_texts_stay_as_they_are(text):
    assert escape_controls(text) == one_line(text) == encodable(text) == text


def test_a_character_is_escaped_as_in_code():
    assert escape_controls("\x1b[31m\x00\x7f\x9b\u202e\ud800\n\t") == "\\x1b[31m\\x00\\x7f\\x9b\\u202e\\ud800\n\t"
    assert one_line("a\n\tb\r") == "a\\n\\tb\\x0d"


@given(TEXTS)
def test_every_text_becomes_encodable_and_encodable_ones_stay(text):
    shown = encodable(text)
    assert shown.encode().decode() == shown
    assert encodable(shown) == shown


def test_a_misspelt_name_gets_the_nearest_choice_and_all_choices():
    assert suggest("adma", ["sgd", "adam", "muon"]) == "did you mean adam? (there are: sgd, adam, muon)"
    assert suggest("zzz", ["sgd", "adam"]) == "there are: sgd, adam"
    assert suggest("a", ["a\nb"]) == "did you mean a\\nb? (there are: a\\nb)"
    assert find_nearest("zzz", ["sgd", "adam"]) is None


def test_of_many_choices_the_nearest_are_listed_and_the_others_counted():
    assert (
        list_nearest("layer.3", [f"layer.{index}" for index in (1, 2, 3, 3)], limit=2) == "layer.3, layer.1 and 1 more"
    )
    assert list_nearest("a", ["", ""]) == "none"


@given(st.integers(), st.integers(0, 2**62), st.integers(0, 300), st.lists(st.integers(0, 2**63), max_size=3))
def test_seeds_that_are_derived_together_are_those_of_each_number(seed, start, count, others):
    numbers = range(start, start + count)
    assert derive_seeds(seed, numbers, *others) == [derive_seed(seed, number, *others) for number in numbers]
