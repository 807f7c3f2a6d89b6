"""Pure helpers that two or more modules call; imports no sibling and nothing beyond the standard library."""

import contextlib
import math
import operator
import re
from typing import Any, TypeGuard

_MASK = 2**64 - 1
_LARGEST_IN_FULL = 10**15
# Control characters but newline and tab, line and paragraph separators, lone surrogates, and marks that turn the
# direction of what follows.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_NEWLINE_AND_TAB = str.maketrans({"\n": "\\n", "\t": "\\t"})


def escape_controls(text: str) -> str:
    """Returns a text that a terminal and a log show as it stands: control characters are escaped as in code.

    Newlines and tabs stay.
    """
    return _CONTROLS.sub(_escape, text)


def one_line(text: str) -> str:
    """Returns a text that was found somewhere as a part of one line: with newlines and tabs escaped, too."""
    return escape_controls(text).translate(_NEWLINE_AND_TAB)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def encodable(text: str) -> str:
    """Returns a text that UTF-8 can encode: lone surrogates are escaped."""
    return text.encode("utf-8", "backslashreplace").decode() if not text.isascii() else text


def derive_seed(*values: int) -> int:
    """Returns one well-spread integer, 0 <= x < 2**63, a pure function of the values and their order.

    Each value, of any sign, counts modulo 2**64. Near values give unrelated results, so `mix(seed, step)` is
    fit to seed a generator. It is not cryptographic.

    Source: the SplitMix64 finalizer, https://prng.di.unimi.it/splitmix64.c (public domain), once a value.
    """
    state = 0
    for value in values:
        state = ((state ^ value) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def format_number(number: float) -> str:
    """Returns a number as a person reads it: whole numbers in full, others with four significant digits.

    Numbers from 1000 to a million keep all digits before the point; beyond, and below 0.0001, the exponent is as short
    as it is typed: 3e-6.
    """
    if not math.isfinite(number):
        return str(float(number))
    if number == int(number) and abs(number) < _LARGEST_IN_FULL:
        return str(int(number))
    if 1000 <= abs(number) < 1e6:
        return f"{number:.0f}"
    digits, _, exponent = f"{number:.4g}".partition("e")
    return f"{digits}e{int(exponent)}" if exponent else digits


def is_signal(error: BaseException) -> TypeGuard[KeyboardInterrupt]:
    """Says whether an error ends the program at once: a `KeyboardInterrupt` with the number of a signal.

    A `KeyboardInterrupt` without one was raised by a program, and is an error like any other.
    """
    return isinstance(error, KeyboardInterrupt) and bool(error.args) and isinstance(error.args[0], int)


def message_of(error: BaseException) -> str:
    """Returns an error's message with its notes of one line; an error without a message is shown as in code."""
    try:
        message = "" if type(error) is KeyError else str(error)  # a key alone says nothing
        message = message or repr(error)
    except Exception:
        message = f"{type(error).__name__} without a printable message"
    notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in str(note)]
    return "; ".join([message, *map(str, notes)])


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to an error, to be shown below its traceback, if it takes one: one that is frozen refuses."""
    with contextlib.suppress(Exception):
        error.add_note(note)


def describe(error: BaseException) -> str:
    """Returns an error's type and message, as a traceback ends."""
    name, message = type(error).__name__, message_of(error)
    return message if message.startswith(name) else f"{name}: {message}"


def checked_int(name: str, value: Any, lowest: int | None = None, highest: int | None = None) -> int:
    """Returns an integer of any kind as an int, if it lies from `lowest` to `highest`.

    Raises:
        TypeError: it is a bool, or no integer.
        ValueError: it lies outside.
    """
    if type(value).__name__ in ("bool", "bool_") or not hasattr(value, "__index__"):
        raise TypeError(f"{name}: expected an integer, found {value!r}, a {type(value).__name__}.")
    number = operator.index(value)
    if lowest is not None and number < lowest:
        raise ValueError(f"{name}: expected an integer >= {lowest}, found {number}.")
    if highest is not None and number > highest:
        raise ValueError(f"{name}: expected an integer <= {highest}, found {number}.")
    return number


def checked_choice(name: str, value: Any, choices: tuple[Any, ...]) -> Any:
    """Returns the value if it is one of the choices, type and all: 0 is no False.

    Raises:
        ValueError: it is none of them.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name}: expected one of {choices}, found {value!r}.")
    return value
