"""The signals that end a run: the first asks it to save and end, the second ends it at once; and the exit statuses.

Owns what a handler may do: it sets a flag, raises, or ends the process. Imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
from collections.abc import Callable, Iterator
from types import FrameType

STATUSES = {"finished": 0, "quit": 0, "interrupted": 130, "preempted": 75, "failed": 1}  # 75: try again (EX_TEMPFAIL)
MEANINGS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "preempted",
    signal.SIGUSR1: "preempted",
    signal.SIGUSR2: "preempted",
}
REPEATED = signal.SIGUSR2  # comes more than once, from a kernel whose launcher has died: it is no second one

_clean_ups: list[Callable[[int], None]] = []  # of the blocks of `exit_on_interrupt`, the outermost first


@contextlib.contextmanager
def exit_on_interrupt(clean_up: Callable[[int], None] | None = None) -> Iterator[None]:
    """Has Ctrl-C end the process inside the signal handler, for the length of a block with nothing to save.

    `KeyboardInterrupt` isn't enough there: it aborts the process when C++ code is importing a module, and some code
    drops it. A handler other than Python's own is left alone, and so are the other signals, whose default action ends a
    process even while C++ code waits.

    Args:
        clean_up: called with the exit status before the process ends.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, _exit)
    if clean_up is not None:
        _clean_ups.append(clean_up)
    try:
        yield
    finally:
        if is_default:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if clean_up is not None:
            _clean_ups.remove(clean_up)


def raise_on_interrupt() -> None:
    """Has Ctrl-C raise `KeyboardInterrupt` again, inside a block of `exit_on_interrupt`."""
    if signal.getsignal(signal.SIGINT) is _exit:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _exit(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one does not wait for the clean-up
    status = STATUSES[MEANINGS[signal.Signals(number)]]
    try:
        for clean_up in reversed(_clean_ups):
            clean_up(status)
        sys.stdout.flush()
    finally:
        os._exit(status)


class Signals:
    """What has come, and what to do about it: `ask` is called with its meaning, once.

    Before there is a run to ask, the first one ends the program; once it `is_over`, the first one has nothing to do.
    """

    def __init__(self) -> None:
        self.ask: Callable[[str], None] | None = None
        self.is_over = False
        self.first: str | None = None
        self._raised: int | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Takes the signals for the length of a block."""
        with taken(self._take):
            yield

    def connect(self, ask: Callable[[str], None]) -> None:
        """Has `ask` called from now on: at once where a signal came before and the code it interrupted dropped it."""
        self.ask = ask
        if self._raised is not None:
            self._ask(self._raised)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == REPEATED and self.first is not None:
            return
        if self.first is not None or (self.ask is None and not self.is_over):
            self._raised = number
            raise KeyboardInterrupt(number)
        self._ask(number)

    def _ask(self, number: int) -> None:
        self.first = signal.Signals(number).name
        if self.ask is not None and not self.is_over:
            self.ask(MEANINGS[signal.Signals(number)])


@contextlib.contextmanager
def taken(take: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has `take` called with the signals for the length of a block.

    SIGUSR2, which asks a job of submitit to be queued again, then goes on to the handler that was there before.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        take(number, frame)

    before = {number: signal.signal(number, note) for number in MEANINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    handler = before[signal.SIGUSR2]
    if signal.SIGUSR2 in came and callable(handler):
        handler(signal.SIGUSR2, None)


def meaning_of(interrupt: KeyboardInterrupt) -> tuple[str, int]:
    """Returns what the signal means that ended a program at once, and its number."""
    number = signal.Signals(interrupt.args[0]) if interrupt.args else signal.SIGINT
    return MEANINGS[number], int(number)
