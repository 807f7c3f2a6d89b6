import os
import signal
import subprocess
import sys

import pytest

from runner.control.signals import (
    EXIT_STATUSES,
    StopSignals,
    exit_on_interrupt,
    raise_on_interrupt,
    status_of_interrupt,
)


def test_the_first_signal_asks_and_the_second_ends_at_once():
    signals, asked = StopSignals(), []
    signals.connect(asked.append)
    with signals.install():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (asked, signals.first_signal) == (["preempted"], "SIGUSR1")
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert status_of_interrupt(caught.value) == ("interrupted", signal.SIGINT)
    assert asked == ["preempted"]


def test_before_there_is_a_run_the_first_ends_and_after_it_has_nothing_to_do():
    signals = StopSignals()
    with signals.install():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        signals.is_finished = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.first_signal == "SIGTERM"


def test_handlers_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with StopSignals().install():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before


def test_a_signal_that_was_dropped_before_there_was_a_run_asks_it_as_soon_as_there_is_one():
    signals, asked = StopSignals(), []
    with signals.install():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        signals.connect(asked.append)
        assert (asked, signals.first_signal) == (["preempted"], "SIGTERM")
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)


EXITING = """
import os, signal, sys
from runner.control import signals

number = int(sys.argv[1])
outer, inner = lambda status: print("outer", status), lambda _: print("inner")
with signals.exit_on_interrupt(outer), signals.exit_on_interrupt(inner):
    print("began", flush=True)
    try:
        os.kill(os.getpid(), number)
    except BaseException:
        print("raised")
print("ended")
"""


def run_exiting(number, *prefix):
    done = subprocess.run([*prefix, sys.executable, "-c", EXITING, str(int(number))], stdout=subprocess.PIPE, text=True)
    return done.returncode, done.stdout.split()


def test_ctrl_c_ends_the_process_after_the_clean_ups_the_innermost_first():
    status = EXIT_STATUSES["interrupted"]
    assert run_exiting(signal.SIGINT) == (status, ["began", "inner", "outer", str(status)])


def test_other_signals_keep_their_default_action():
    assert run_exiting(signal.SIGTERM) == (-signal.SIGTERM, ["began"])


def test_a_ctrl_c_that_is_ignored_from_outside_stays_ignored():
    assert run_exiting(signal.SIGINT, "sh", "-c", 'trap "" INT; exec "$@"', "sh") == (0, ["began", "ended"])


def test_ctrl_c_can_be_left_to_somebody_else_inside_such_a_block():
    before = signal.getsignal(signal.SIGINT)
    assert before is signal.default_int_handler
    with exit_on_interrupt():
        assert signal.getsignal(signal.SIGINT) is not before
        raise_on_interrupt()
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_a_closed_terminal_asks_once_however_often_its_signal_comes():
    signals, asked = StopSignals(), []
    signals.connect(asked.append)
    with signals.install():
        for _ in range(3):  # by the kernel, by a shell
            os.kill(os.getpid(), signal.SIGHUP)
    assert (asked, signals.first_signal) == (["preempted"], "SIGHUP")


def test_a_sighup_that_is_ignored_from_outside_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopSignals().install():
            os.kill(os.getpid(), signal.SIGHUP)
            assert signal.getsignal(signal.SIGHUP) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


BLOCKED = """
import ctypes, os, signal, sys
from runner.control.signals import StopSignals

signals = StopSignals()
announce = lambda name: print("announced", name, flush=True)
abort = lambda number: print("aborted", number, flush=True)
signals.connect(bool, announce, abort)
with signals.install():
    if not os.fork():
        signals.request_stop = lambda status: None
        os.kill(os.getpid(), signal.SIGTERM)  # what a forked process gets is its own
        os._exit(0)
    os.wait()
    print("began", flush=True)
    libc, mutex = ctypes.CDLL(None), ctypes.create_string_buffer(64)
    libc.pthread_mutex_lock(mutex)
    libc.pthread_mutex_lock(mutex)  # waits for ever, and goes on waiting after a signal
"""


def test_a_program_that_waits_in_c_announces_the_first_signal_and_is_ended_by_the_second():
    process = subprocess.Popen([sys.executable, "-c", BLOCKED], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "began\n"
    process.send_signal(signal.SIGINT)
    assert process.stdout.readline() == "announced SIGINT\n"
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert (process.returncode, printed) == (130, "aborted 2\n")
