"""Helpers for text, numbers, seeds, errors, arguments and processes; standard library only."""

import contextlib
import difflib
import math
import operator
import os
import re
import sys
from collections.abc import Iterable, Sequence
from typing import Any, TypeGuard

_MASK = 2**64 - 1
_LARGEST_IN_FULL = 10**15
# Control characters except newline and tab, line and paragraph separators, lone surrogates, and marks that change the
# direction of text.
_CONTROLS = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff\ufeff]")
_NEWLINE_AND_TAB = str.maketrans({"\n": "\\n", "\t": "\\t"})


def escape_controls(text: str) -> str:
    """Returns a text with control characters escaped as in code, except newlines and tabs.

    A terminal or log then shows the text itself instead of executing it.
    """
    return _CONTROLS.sub(_escape, text)


def one_line(text: str) -> str:
    """Returns a text with all control characters escaped, newlines and tabs too, so that it fits in one line."""
    return escape_controls(text).translate(_NEWLINE_AND_TAB)


def _escape(match: re.Match[str]) -> str:
    code = ord(match.group())
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}"


def encodable(text: str) -> str:
    """Returns a text with lone surrogates escaped, so that UTF-8 can encode it."""
    return text.encode("utf-8", "backslashreplace").decode() if not text.isascii() else text


def derive_seed(*values: int) -> int:
    """Returns a hash of integers and their order, 0 <= x < 2**63, for seeding a generator.

    Each value, of any sign, counts modulo 2**64. Similar values give unrelated seeds, so `derive_seed(seed, step)` can
    seed one generator per step. The hash is not cryptographic.

    Source: the SplitMix64 finalizer, https://prng.di.unimi.it/splitmix64.c (public domain), applied once per value.
    """
    state = 0
    for value in values:
        state = ((state ^ value) + 0x9E3779B97F4A7C15) & _MASK
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & _MASK
        state ^= state >> 31
    return state >> 1


def derive_seeds(seed: int, numbers: range, *others: int) -> list[int]:
    """Returns `derive_seed(seed, number, *others)` for each number of a range, in a tenth of the time.

    Args:
        numbers: consecutive, 0 or more.
        others: 0 or more.
    """
    import numpy as np  # here: a command begins without it

    array: Any = np.arange(numbers.start, numbers.stop, dtype=np.uint64)  # its arithmetic is modulo 2**64
    seeds: list[int] = derive_seed(seed, array, *others).tolist()  # type: ignore[attr-defined]
    return seeds


def format_number(number: float) -> str:
    """Returns a number for a reader: integers in full, others with four significant digits.

    Numbers from 1000 to a million keep all digits before the point. Larger ones, and those below 0.0001, have a short
    exponent: 3e-6.
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
    """Returns whether an error ends the program at once: a `KeyboardInterrupt` with the number of a signal.

    A `KeyboardInterrupt` without a number was raised by the user's code and is treated like any other error.
    """
    return isinstance(error, KeyboardInterrupt) and bool(error.args) and isinstance(error.args[0], int)


def signal_with_parent(number: int, parent: int) -> None:
    """Has the kernel send this process a signal when its parent ends (Linux); sends it now if it has ended.

    Args:
        number: of the signal.
        parent: the pid of the process that started this one.
    """
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG: sent once for each thread of the parent
    if os.getppid() != parent:  # it ended before that call, which then sends nothing
        os.kill(os.getpid(), number)


def message_of(error: BaseException) -> str:
    """Returns an error's message and its one-line notes; the `repr` for an error without a message."""
    try:
        message = "" if type(error) is KeyError else str(error)  # a key alone explains nothing
        message = message or repr(error)
    except Exception:
        message = f"{type(error).__name__} without a printable message"
    notes = [note for note in getattr(error, "__notes__", ()) if "\n" not in str(note)]
    return "; ".join([message, *map(str, notes)])


def add_note(error: BaseException, note: str) -> None:
    """Adds a note to an error, shown below its traceback; does nothing for an error class that refuses notes."""
    with contextlib.suppress(Exception):
        error.add_note(note)


def describe(error: BaseException) -> str:
    """Returns an error's type and message, like the last line of a traceback."""
    name, message = type(error).__name__, message_of(error)
    return message if message.startswith(name) else f"{name}: {message}"


def checked_int(name: str, value: Any, lowest: int | None = None, highest: int | None = None) -> int:
    """Returns an integer of any type as an int, after checking that it is from `lowest` to `highest`.

    Args:
        name: of the argument, for the message.
    Raises:
        TypeError: the value is a bool or no integer.
        ValueError: the value is out of range.
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
    """Returns the value, after checking that it equals one of the choices in value and type: 0 is not False.

    Raises:
        ValueError: the value is none of the choices.
    """
    if not any(type(value) is type(choice) and value == choice for choice in choices):
        raise ValueError(f"{name}: expected one of {choices}, found {value!r}.")
    return value


def check_fraction(name: str, value: float) -> None:
    """Checks a share of a whole, such as a dropout or a decay.

    Raises:
        ValueError: it isn't at least 0 and less than 1.
    """
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value}: expected at least 0 and less than 1")


def check_choice(name: str, value: str, choices: Sequence[str]) -> None:
    """Checks a text that has a few allowed values.

    Raises:
        ValueError: it has another value.
    """
    if value not in choices:
        raise ValueError(f"{name}={value}: expected one of {', '.join(choices)}")


def find_nearest(name: str, choices: Iterable[str]) -> str | None:
    """Returns the choice that is spelt most like a name; None if none is similar."""
    return next(iter(difflib.get_close_matches(name, list(choices), n=1, cutoff=0.5)), None)


def suggest(name: str, choices: list[str]) -> str:
    """Returns a hint for an unknown name: the most similar choice, if there is one, and all choices."""
    listed = one_line(", ".join(choices)) or "none"
    nearest = find_nearest(name, choices)
    return f"there are: {listed}" if nearest is None else f"did you mean {one_line(nearest)}? (there are: {listed})"


def list_nearest(name: str, choices: Iterable[str], limit: int = 8) -> str:
    """Returns the choices that are spelt most like a name, and the number of the others; for long lists."""
    distinct = list(dict.fromkeys(choice for choice in choices if choice))
    nearest = sorted(distinct, key=lambda choice: -difflib.SequenceMatcher(None, name, choice).ratio())[:limit]
    more = f" and {len(distinct) - len(nearest)} more" if len(distinct) > len(nearest) else ""
    return (", ".join(nearest) or "none") + more
