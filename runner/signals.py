"""The signals that end a run: the first asks it to save and end, the second ends it at once; and the exit statuses.

Owns what a handler may do: it sets a flag, or raises. Imports the standard library alone.
"""

from __future__ import annotations

import contextlib
import signal
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


class Signals:
    """What has come, and what to do about it: `ask` is called with its meaning, once.

    Before there is a run to ask, the first one ends the program; once it `is_over`, the first one has nothing to do.
    """

    def __init__(self) -> None:
        self.ask: Callable[[str], None] | None = None
        self.is_over = False
        self.first: str | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Takes the signals for the length of a block."""
        with taken(self._take):
            yield

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == REPEATED and self.first is not None:
            return
        if self.first is not None or (self.ask is None and not self.is_over):
            raise KeyboardInterrupt(number)
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
