"""Texts from elsewhere, as a terminal and a log show them."""

import unicodedata

from hypothesis import given
from hypothesis import strategies as st

from runner.utils.utils import encodable, escape_controls, one_line

TEXTS = st.text(st.characters()) | st.text(st.characters(categories=("Cc", "Cf", "Cs", "Zl", "Zp", "L")))
TURNS = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # marks of direction


@given(TEXTS)
def test_no_control_character_surrogate_or_mark_of_direction_is_left(text):
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
def test_every_text_can_be_encoded_and_what_could_stays(text):
    shown = encodable(text)
    assert shown.encode().decode() == shown
    assert encodable(shown) == shown
