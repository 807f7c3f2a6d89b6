"""`runner.tracking.console`: output to a terminal, output to a pipe, and the log file of each message."""

import logging
import os
import pty
import re
import subprocess
import sys
import termios
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

import pytest

from runner.tracking import console as console_module
from runner.tracking.console import Console, describe_numbers, open_log

ROOT = Path(__file__).parents[2]


class Terminal:
    """A pseudo-terminal: `stream` is the program's end, `read` returns the output at the other end."""

    def __init__(self, num_columns: int) -> None:
        self._master, slave = pty.openpty()
        termios.tcsetwinsize(slave, (24, num_columns))
        self.stream: TextIO = os.fdopen(slave, "w", encoding="utf-8")
        os.set_blocking(self._master, False)

    def read(self) -> str:
        received = b""
        while True:
            try:
                received += os.read(self._master, 65536)
            except (BlockingIOError, OSError):
                return received.decode()

    def hang_up(self) -> None:
        os.close(self._master)
        self._master = -1

    def close(self) -> None:
        self.stream.close()
        if self._master >= 0:
            self.hang_up()


class Clock:
    """A clock that a test moves."""

    def __init__(self) -> None:
        self.now_s = 100.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture(params=[100, 0], ids=["100 columns", "unknown width"])
def terminal(request: pytest.FixtureRequest) -> Iterator[Terminal]:
    terminal = Terminal(request.param)
    yield terminal
    terminal.close()


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(console_module, "perf_counter", clock)
    return clock


def shown_lines(received: str) -> list[str]:
    """Returns the lines that a terminal shows: text after a carriage return overwrites the line."""
    lines = []
    for line in received.replace("\r\n", "\n").split("\n"):
        shown = ""
        for part in line.split("\r"):
            shown = part + shown[len(part) :]
        lines.append(shown.rstrip())
    return lines


def test_the_bar_shows_steps_and_values(terminal: Terminal, clock: Clock) -> None:
    console = Console(300, stream=terminal.stream)
    console.update(30, {"train/loss": 2.34567, "train/tokens_per_s": 123456.7, "train/lr": 0.1})
    received = terminal.read()
    console.close()
    assert "30/300" in received
    assert "loss=2.346, tok/s=123457" in received
    assert "<" in received  # the time that is left


def test_a_resumed_bar_begins_where_the_run_does(terminal: Terminal, clock: Clock) -> None:
    console = Console(300, first_step=100, stream=terminal.stream)
    assert "100/300" in terminal.read()
    console.close()


def test_values_are_read_only_when_a_draw_is_due(terminal: Terminal, clock: Clock) -> None:
    num_reads = 0

    class Loss:
        def __float__(self) -> float:
            nonlocal num_reads
            num_reads += 1
            return 1.0

    console = Console(100, stream=terminal.stream)
    for step in range(1, 51):
        clock.now_s += 0.01
        num_reads_before = num_reads
        console.update(step, {"train/loss": Loss()})
        assert num_reads - num_reads_before == (step % 10 == 1)
    console.close()
    assert num_reads == 5


def test_the_bar_ends_at_the_last_step_even_between_draws(terminal: Terminal, clock: Clock) -> None:
    console = Console(100, stream=terminal.stream)
    console.update(1, {"train/loss": 1.0})
    console.update(57, {"train/loss": 1.0})
    terminal.read()
    console.close()
    console.close()
    received = terminal.read()
    assert "57/100" in received
    assert received.endswith("\n")


def test_a_bar_starts_no_thread(terminal: Terminal) -> None:
    before = threading.active_count()
    console = Console(100, stream=terminal.stream)
    console.update(1, {"train/loss": 1.0})
    assert threading.active_count() == before
    console.close()


def test_a_line_stands_above_the_bar_on_its_own(
    terminal: Terminal, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    console = Console(100, stream=terminal.stream)
    for step in range(1, 4):
        clock.now_s += 1
        console.update(step * 10, {"train/loss": 1.0})
        console.print(f"line {step}")
    console.close()
    lines = shown_lines(terminal.read())
    assert lines[:3] == ["line 1", "line 2", "line 3"]
    assert "30/100" in lines[3]


def test_lines_of_two_threads_never_mix(terminal: Terminal, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    out = open(tmp_path / "out", "w+")  # noqa: SIM115
    monkeypatch.setattr(sys, "stdout", out)
    console = Console(10_000, stream=terminal.stream)
    draining = threading.Event()

    def drain() -> None:
        while not draining.wait(0.001):
            terminal.read()

    def speak(letter: str) -> None:
        for _ in range(200):
            console.print(letter * 50)

    threads = [threading.Thread(target=speak, args=(letter,)) for letter in "ab"]
    reader = threading.Thread(target=drain)
    for thread in [reader, *threads]:
        thread.start()
    for thread in threads:
        thread.join()
    console.close()
    draining.set()
    reader.join()
    out.seek(0)
    assert sorted(out.read().splitlines()) == ["a" * 50] * 200 + ["b" * 50] * 200
    out.close()


def test_without_a_terminal_only_lines_are_written(
    tmp_path: Path, clock: Clock, capsys: pytest.CaptureFixture[str]
) -> None:
    with open(tmp_path / "stderr", "w+") as stream:
        console = Console(100, stream=stream)
        for step in range(100):
            clock.now_s += 1
            console.update(step, {"train/loss": None})  # float(None) would raise: without a bar, values are not read
        console.print("a line")
        console.close()
        assert stream.tell() == 0
    assert capsys.readouterr() == ("a line\n", "")


def test_the_bar_may_be_forbidden(terminal: Terminal, clock: Clock) -> None:
    console = Console(100, stream=terminal.stream, enabled=False)
    console.update(1, {"train/loss": 1.0})
    console.close()
    assert terminal.read() == ""


@pytest.mark.parametrize("act", ["update", "print", "close"])
def test_a_terminal_that_hangs_up_does_not_end_the_run(
    terminal: Terminal, clock: Clock, monkeypatch: pytest.MonkeyPatch, act: str
) -> None:
    monkeypatch.setattr(sys, "stdout", terminal.stream)
    console = Console(100, stream=terminal.stream)
    console.update(1, {"train/loss": 1.0})
    clock.now_s += 1
    terminal.hang_up()
    {
        "update": lambda: console.update(2, {"train/loss": 1.0}),
        "print": lambda: console.print("x"),
        "close": console.close,
    }[act]()
    clock.now_s += 1
    console.update(3, {"train/loss": 1.0})
    console.print("y")
    console.close()
    monkeypatch.undo()
    with pytest.raises(OSError, match="Input/output error"):
        terminal.stream.close()


@pytest.mark.parametrize("redirect", ["| head -c 1 >/dev/null", ">&- 2>&-", ">/dev/null 2>&1"])
def test_a_run_goes_on_when_nobody_reads(tmp_path: Path, redirect: str) -> None:
    code = """
import sys
from pathlib import Path
from runner.tracking.console import Console
console = Console(2000)
for step in range(2000):
    console.update(step, {"train/loss": 1.0})
    console.print("x" * 100)
console.close()
Path(sys.argv[1]).write_text("whole")
"""
    script, witness = tmp_path / "script.py", tmp_path / "witness"
    script.write_text(code)
    command = f"'{sys.executable}' '{script}' '{witness}' {redirect}"
    environ = {**os.environ, "PYTHONPATH": str(ROOT)}
    subprocess.run(command, shell=True, env=environ, stderr=subprocess.DEVNULL, check=False, timeout=60)
    assert witness.read_text() == "whole"


def test_a_line_that_the_encoding_lacks_is_escaped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "out", "w", encoding="ascii") as stream:
        monkeypatch.setattr(sys, "stdout", stream)
        Console(1).print("é \udc80")
    assert (tmp_path / "out").read_text() == "\\xe9 \\udc80\n"


def test_messages_go_to_the_console_and_with_time_and_level_to_the_file(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for text in ("first", "resumed é"):
        with open_log(tmp_path, Console(1)) as log:
            assert log is logging.getLogger("runner")
            log.info("%s", text)
            logging.getLogger("runner.engines").warning("careful")
            log.debug("not shown")
    assert capsys.readouterr().out == "first\nwarning: careful\nresumed é\nwarning: careful\n"
    lines = (tmp_path / "log.txt").read_text(encoding="utf-8").splitlines()
    time = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d,\d{3}"
    expected = ["INFO first", "WARNING careful", "INFO resumed é", "WARNING careful"]
    assert all(re.fullmatch(f"{time} {text}", line) for text, line in zip(expected, lines, strict=True))


def test_the_second_job_of_a_sweep_leaves_the_first_jobs_log_alone(tmp_path: Path) -> None:
    logger = logging.getLogger("runner")
    before: Any = (logger.level, logger.propagate, list(logger.handlers))

    def fail(log: logging.Logger, job: str) -> None:
        log.info("job %s", job)
        raise RuntimeError

    for job in ("a", "b"):
        (tmp_path / job).mkdir()
        with pytest.raises(RuntimeError), open_log(tmp_path / job, Console(1)) as log:
            fail(log, job)
        assert (logger.level, logger.propagate, list(logger.handlers)) == before
    for job in ("a", "b"):
        [line] = (tmp_path / job / "log.txt").read_text().splitlines()
        assert line.endswith(f"INFO job {job}")


def test_messages_are_not_repeated_by_the_root_logger(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    handler = logging.StreamHandler(sys.stdout)
    logging.getLogger().addHandler(handler)
    try:
        with open_log(tmp_path, Console(1)) as log:
            log.info("once")
    finally:
        logging.getLogger().removeHandler(handler)
    assert capsys.readouterr().out == "once\n"


HOSTILE = "a\x1b]0;owned\x07\r\u202e\ud800\x9b31m\x7f"
ESCAPED = r"a\x1b]0;owned\x07\x0d\u202e\ud800\x9b31m\x7f"


def test_control_characters_reach_neither_the_terminal_nor_the_log(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with open_log(tmp_path, Console(1)) as log:
        log.warning("%s", HOSTILE)
        try:
            raise RuntimeError(HOSTILE)
        except RuntimeError:
            log.error("failed", exc_info=True)
    assert capsys.readouterr().out == f"warning: {ESCAPED}\nerror: failed\n"
    written = (tmp_path / "log.txt").read_text()
    assert written.splitlines()[0].endswith(f"WARNING {ESCAPED}")
    assert written.splitlines()[-1] == f"    RuntimeError: {ESCAPED}"


def test_the_lines_of_a_text_pass_for_no_message_of_their_own(tmp_path: Path) -> None:
    with open_log(tmp_path, Console(1)) as log:
        log.info("%s", "sample:\n2026-01-01 00:00:00,000 ERROR forged\n\tand more")
        log.info("next")
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert lines[1:3] == ["    2026-01-01 00:00:00,000 ERROR forged", "    \tand more"]
    assert [line[:2] for line in lines] == ["20", "  ", "  ", "20"]


def test_a_message_for_the_file_alone_is_not_printed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with open_log(tmp_path, Console(1)) as log:
        log.error("a job failed", extra={"is_for_file": True})
    assert capsys.readouterr().out == ""
    assert "a job failed" in (tmp_path / "log.txt").read_text()


def test_thousands_of_numbers_are_one_short_line() -> None:
    rates = {"lr": 0.001, **{f"lr_{index}": index * 1e-5 for index in range(1, 2000)}}
    assert describe_numbers({"loss": 0.5, **rates, "grad_norm": 1.0}) == (
        "loss 0.5, grad_norm 1, lr 1e-5 to 0.01999 (2000 groups)"
    )
    many = describe_numbers({f"m{index}": index for index in range(2000)} | rates)
    assert many.startswith("m0 0, m1 1, ")
    assert many.endswith("m19 19, lr 1e-5 to 0.01999 (2000 groups), ... (4000 in all)")
    assert describe_numbers({"a\nb": 1.0, "lr": 2.0, "lr_1": 3.0}) == "a\\nb 1, lr 2, lr_1 3"
    assert len(describe_numbers({"x" * 10_000: 1.0})) < 200
