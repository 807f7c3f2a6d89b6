"""Signals that end a run: the first requests a save and the end, the second ends the process at once.

A handler only sets a flag, raises, or ends the process. Also holds the exit statuses of a run.
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

EXIT_STATUSES = {  # by the status of a run
    "finished": 0,
    "quit": 0,
    "interrupted": 130,
    "preempted": 75,  # try again (EX_TEMPFAIL)
    "failed": 1,
}
STATUS_BY_SIGNAL = {
    signal.SIGINT: "interrupted",
    signal.SIGTERM: "preempted",
    signal.SIGHUP: "preempted",
    signal.SIGUSR1: "preempted",
    signal.SIGUSR2: "preempted",
}
REPEATED = signal.SIGUSR2  # the kernel may send it more than once after a launcher has died
NEVER_SECOND = (REPEATED, signal.SIGHUP)  # a terminal that closes sends SIGHUP, and its shell sends it again
_PATIENCE_S = 0.7  # for the main thread to end after a second signal
_FINISH_S = 0.3  # for writing the end of a run whose main thread does not

_clean_ups: list[Callable[[int], None]] = []  # of the blocks of `exit_on_interrupt`, the outermost first


@contextlib.contextmanager
def exit_on_interrupt(clean_up: Callable[[int], None] | None = None) -> Iterator[None]:
    """Makes Ctrl-C end the process inside the signal handler, during a block with nothing to save.

    `KeyboardInterrupt` is not enough there: it aborts the process when C++ code is importing a module, and some code
    drops it. A handler other than Python's own stays, and so do the handlers of other signals, whose default action
    ends a process even while C++ code waits.

    Args:
        clean_up: called with the exit status before the process ends.
    """
    is_default = signal.getsignal(signal.SIGINT) is signal.default_int_handler
    if is_default:
        signal.signal(signal.SIGINT, _handle_interrupt)
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
    """Makes Ctrl-C raise `KeyboardInterrupt` again, inside a block of `exit_on_interrupt`."""
    if signal.getsignal(signal.SIGINT) is _handle_interrupt:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _handle_interrupt(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_DFL)  # a second one does not wait for the clean-up
    _exit_now(EXIT_STATUSES[STATUS_BY_SIGNAL[signal.Signals(number)]])


def _exit_now(status: int) -> None:
    try:
        for clean_up in reversed(_clean_ups):
            clean_up(status)
        sys.stdout.flush()
    finally:
        os._exit(status)


class StopSignals:
    """Handles the signals of a run: `request_stop` is called once, with the status that the run ends with.

    Before a run is connected, the first signal ends the program. Once `is_finished`, the first signal has no effect.
    In a thread beside the main one, no signal arrives.

    Args:
        ends_process: whether a second signal ends the process even if the main thread does not react; otherwise it
            only raises KeyboardInterrupt there.
    """

    def __init__(self, ends_process: bool = True) -> None:
        self._ends_process = ends_process
        self.request_stop: Callable[[str], None] | None = None
        self.is_finished = False
        self.first_signal: str | None = None
        self._raised: int | None = None  # by a signal before a run was connected

    @contextlib.contextmanager
    def install(self) -> Iterator[None]:
        """Handles the signals during a block."""
        if threading.current_thread() is not threading.main_thread():  # Python lets no other thread handle them
            yield
            return
        with install_handlers(self._handle), self._watch_in_thread():
            yield

    def connect(
        self,
        request_stop: Callable[[str], None],
        announce: Callable[[str], None] = lambda name: None,
        abort: Callable[[int], None] = lambda number: None,
    ) -> None:
        """Connects a run; a signal that came before and was dropped by the code it interrupted counts now.

        Args:
            announce: called with the first signal's name, in a thread, whatever the main thread does.
            abort: called with the second signal, in a thread, before that ends a process whose main thread does not.
        """
        self._announce = announce
        self._abort = abort
        self.request_stop = request_stop
        if self._raised is not None:
            self._request_stop(self._raised)

    @contextlib.contextmanager
    def _watch_in_thread(self) -> Iterator[None]:
        """Starts a thread that receives signals at once: the main thread runs no handler while it waits in C code."""
        read_fd, write_fd = os.pipe()
        os.set_blocking(write_fd, False)
        is_past = threading.Event()
        before = signal.set_wakeup_fd(write_fd, warn_on_full_buffer=False)
        threading.Thread(target=self._watch, args=(read_fd, is_past), name="signals", daemon=True).start()
        _wakeup_fds.append(write_fd)
        try:
            yield
        finally:
            is_past.set()
            _wakeup_fds.remove(write_fd)
            signal.set_wakeup_fd(before)
            os.close(write_fd)  # if a forked process has it open too, the thread stays and waits

    def _watch(self, fd: int, is_past: threading.Event) -> None:
        count = 0
        while (received := os.read(fd, 1)) and not is_past.is_set():
            number = received[0]
            is_connected = self.request_stop is not None and not self.is_finished
            if number not in STATUS_BY_SIGNAL or not is_connected or (count and number in NEVER_SECOND):
                continue
            count += 1
            if count == 1:
                with contextlib.suppress(Exception):  # the terminal or log may be gone
                    self._announce(signal.Signals(number).name)
            elif self._ends_process and not is_past.wait(_PATIENCE_S):
                last = threading.Thread(target=self._abort, args=(number,), daemon=True)
                last.start()
                last.join(_FINISH_S)
                os._exit(_report_exit_status(128 + number))
        os.close(fd)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGHUP:
            terminal.redirect_closed_streams()
        is_second = self.first_signal is not None
        if is_second and number in NEVER_SECOND:
            return
        if is_second and self._ends_process:
            _aborting_signals.append(number)
        if is_second or (self.request_stop is None and not self.is_finished):
            self._raised = number
            raise KeyboardInterrupt(number)
        self._request_stop(number)

    def _request_stop(self, number: int) -> None:
        self.first_signal = signal.Signals(number).name
        if self.request_stop is not None and not self.is_finished:
            self.request_stop(STATUS_BY_SIGNAL[signal.Signals(number)])


_aborting_signals: list[int] = []  # second signals, which ended a run without a save


def exit_if_aborted(status: int) -> None:
    """Ends the process after a second signal: the interpreter's own shutdown may take seconds with torch in it."""
    if _aborting_signals:
        _exit_now(status)


_status_files: list[Path] = []  # of a worker whose exit status its launcher returns


def write_exit_status_to(file: Path) -> None:
    """Makes a second signal write the run's exit status to a file and end the process itself with 0.

    The elastic agent takes any other status for a failure, which it logs, and it ends the other workers first.
    """
    _status_files.append(file)


def _report_exit_status(status: int) -> int:
    """Writes the exit status of a run to the files; returns the status of the process."""
    for file in _status_files:
        file.write_text(str(status))
    return 0 if _status_files else status


_wakeup_fds: list[int] = []  # descriptors that the interpreter writes signals to


def _ignore_wakeup_fd_in_child() -> None:
    """Keeps signals of a forked process from being taken for signals of this one."""
    if _wakeup_fds:
        with contextlib.suppress(ValueError):  # forked by a thread
            signal.set_wakeup_fd(-1)


os.register_at_fork(after_in_child=_ignore_wakeup_fd_in_child)


def is_ignored(number: int) -> bool:
    """Returns whether a signal stays ignored: SIGHUP does if the program was started so, as by nohup."""
    return number == signal.SIGHUP and signal.getsignal(number) is signal.SIG_IGN


@contextlib.contextmanager
def install_handlers(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    """Calls `handler` for each signal during a block.

    SIGUSR2, which makes submitit requeue a job, then also goes to the handler that was there before.
    """
    received: list[int] = []

    def record_and_handle(number: int, frame: FrameType | None) -> None:
        received.append(number)
        handler(number, frame)

    before = {number: signal.signal(number, record_and_handle) for number in STATUS_BY_SIGNAL if not is_ignored(number)}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)
    requeue = before[signal.SIGUSR2]
    if signal.SIGUSR2 in received and callable(requeue):
        requeue(signal.SIGUSR2, None)


def status_of_interrupt(interrupt: KeyboardInterrupt) -> tuple[str, int]:
    """Returns the status of a run that a signal ended at once, and the signal's number."""
    number = signal.Signals(interrupt.args[0]) if interrupt.args else signal.SIGINT
    return STATUS_BY_SIGNAL[number], int(number)
