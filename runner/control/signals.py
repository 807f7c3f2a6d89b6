"""The signals that end a run: the first asks it to save and end, the second ends it at once; and the exit statuses.

Owns what a handler may do: it sets a flag, raises, or ends the process. Imports the standard library and `terminal`.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType

from runner.control import terminal

STATUSES = {"finished": 0, "quit": 0, "interrupted": 130, "preempted": 75, "failed": 1}  # 75: try again (EX_TEMPFAIL)
MEANINGS = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "preempted",
    signal.SIGHUP: "preempted",
    signal.SIGUSR1: "preempted",
    signal.SIGUSR2: "preempted",
}
REPEATED = signal.SIGUSR2  # comes more than once, from a kernel whose launcher has died: it is no second one
NEVER_SECOND = (REPEATED, signal.SIGHUP)  # a terminal that closes sends SIGHUP, and its shell sends it again
_PATIENCE_S = 0.7  # for the main thread to end after a second signal
_FINISH_S = 0.3  # for what is written of a run whose main thread does not

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
    _leave(STATUSES[MEANINGS[signal.Signals(number)]])


def _leave(status: int) -> None:
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
        self._tell: Callable[[str], None] = lambda name: None
        self._give_up: Callable[[int], None] = lambda number: None
        self.is_over = False
        self.first: str | None = None
        self._raised: int | None = None

    @contextlib.contextmanager
    def taken(self) -> Iterator[None]:
        """Takes the signals for the length of a block."""
        with taken(self._take), self._heard():
            yield

    def connect(
        self,
        ask: Callable[[str], None],
        tell: Callable[[str], None] | None = None,
        give_up: Callable[[int], None] | None = None,
    ) -> None:
        """Has `ask` called from now on: at once where a signal came before and the code it interrupted dropped it.

        Args:
            tell: called with the first signal's name, in a thread, whatever the main thread does.
            give_up: called with the second signal, in a thread, before it ends a process whose main thread does not.
        """
        self._tell, self._give_up = tell or self._tell, give_up or self._give_up
        self.ask = ask
        if self._raised is not None:
            self._ask(self._raised)

    @contextlib.contextmanager
    def _heard(self) -> Iterator[None]:
        """Has a thread learn of signals at once: the main thread runs no handler while it waits in C code."""
        ours, theirs = os.pipe()
        os.set_blocking(theirs, False)
        is_past = threading.Event()
        before = signal.set_wakeup_fd(theirs, warn_on_full_buffer=False)
        thread = threading.Thread(target=self._hear, args=(ours, is_past), name="signals", daemon=True)
        thread.start()
        _heard_by.append(theirs)
        try:
            yield
        finally:
            is_past.set()
            _heard_by.remove(theirs)
            signal.set_wakeup_fd(before)
            os.close(theirs)  # where a forked process has it open, too, the thread stays and waits

    def _hear(self, fd: int, is_past: threading.Event) -> None:
        count = 0
        while (found := os.read(fd, 1)) and not is_past.is_set():
            number = found[0]
            if number not in MEANINGS or self.ask is None or self.is_over or (count and number in NEVER_SECOND):
                continue
            count += 1
            if count == 1:
                with contextlib.suppress(Exception):  # who is told has gone
                    self._tell(signal.Signals(number).name)
            elif not is_past.wait(_PATIENCE_S):
                last = threading.Thread(target=self._give_up, args=(number,), daemon=True)
                last.start()
                last.join(_FINISH_S)
                os._exit(_report(128 + number))
        os.close(fd)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            terminal.leave_closed()
        if number in NEVER_SECOND and self.first is not None:
            return
        if self.first is not None or (self.ask is None and not self.is_over):
            if self.first is not None:
                _cut.append(number)
            self._raised = number
            raise KeyboardInterrupt(number)
        self._ask(number)

    def _ask(self, number: int) -> None:
        self.first = signal.Signals(number).name
        if self.ask is not None and not self.is_over:
            self.ask(MEANINGS[signal.Signals(number)])


_cut: list[int] = []  # second signals, which ended a run without a save


def leave_if_cut(status: int) -> None:
    """Ends the process after a second signal: the interpreter's own end may take seconds, with torch in it."""
    if _cut:
        _leave(status)


_reports: list[Path] = []  # of a process whose status another one returns


def report_to(file: Path) -> None:
    """Has the status of a run that a second signal ends written to a file; the process itself then ends with 0.

    The agent of several processes takes any other status for a failure, which it logs, and ends the others first.
    """
    _reports.append(file)


def _report(status: int) -> int:
    for file in _reports:
        file.write_text(str(status))
    return 0 if _reports else status


_heard_by: list[int] = []  # descriptors that the interpreter writes signals to


def _forget_in_child() -> None:
    """Has signals of a forked process not be taken for this one's."""
    if _heard_by:
        with contextlib.suppress(ValueError):  # forked by a thread
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_forget_in_child)


def is_ignored(number: int) -> bool:
    """Says whether a signal stays ignored: SIGHUP is, where the program was started so, as by nohup."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


@contextlib.contextmanager
def taken(take: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Has `take` called with the signals for the length of a block.

    SIGUSR2, which asks a job of submitit to be queued again, then goes on to the handler that was there before.
    """
    came: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        came.append(number)
        take(number, frame)

    before = {number: signal.signal(number, note) for number in MEANINGS if not is_ignored(number)}
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
