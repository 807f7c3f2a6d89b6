import os
import signal

import pytest

from runner.signals import Signals, meaning_of


def test_the_first_signal_asks_and_the_second_ends_at_once():
    signals, asked = Signals(), []
    signals.ask = asked.append
    with signals.taken():
        os.kill(os.getpid(), signal.SIGUSR1)
        assert (asked, signals.first) == (["preempted"], "SIGUSR1")
        with pytest.raises(KeyboardInterrupt) as caught:
            os.kill(os.getpid(), signal.SIGINT)
    assert meaning_of(caught.value) == ("interrupted", signal.SIGINT)
    assert asked == ["preempted"]


def test_before_there_is_a_run_the_first_ends_and_after_it_has_nothing_to_do():
    signals = Signals()
    with signals.taken():
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
        signals.is_over = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert signals.first == "SIGTERM"


def test_handlers_are_as_they_were_afterwards():
    before = [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)]
    with Signals().taken():
        pass
    assert [signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)] == before
