"""`runner.control`: parsing and scheduling of commands, their handlers, and standard input of every kind."""

import io
import json
import math
import os
import pty
import re
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from runner.control import commands as module
from runner.control import stdin as reader_module
from runner.control.commands import Command, CommandError, CommandQueue, CommandSpec, parse
from runner.control.handlers import COMMANDS, HELP, CommandHandlers, describe_events, describe_time

ROOT = Path(__file__).resolve().parents[2]
STEPS = st.integers(1, 10**18 - 1)
NAMES = ("save", "export", "eval", "quit", "lr", "time", "events", "help")
PLAIN = st.builds(Command, st.sampled_from([name for name in NAMES if name != "lr"]))
RATES = st.builds(Command, st.just("lr"), st.floats(0, 1e9, exclude_min=True))
TIMES_TO = st.builds(Command, st.just("time"), STEPS)
ANY_COMMAND = st.builds(
    lambda command, step: Command(command.name, command.argument, step),
    PLAIN | RATES | TIMES_TO,
    st.none() | STEPS,
)


@given(ANY_COMMAND)
@settings(deadline=None)
def test_the_typed_form_parses_back_to_the_command(command):
    assert parse(str(command), COMMANDS) == command


@given(ANY_COMMAND, st.sampled_from(["", " ", "\t", "   "]), st.sampled_from(["", "# why", " #@2 quit"]))
@settings(deadline=None)
def test_case_blanks_and_comments_do_not_count(command, blank, comment):
    typed = str(command).upper().replace(" ", f" {blank}").replace("@", f"{blank}@{blank}")
    assert parse(f"{blank}{typed}{blank}{comment}", COMMANDS) == command


@given(st.text() | st.text("abcdeilqrstuvx @#.0123456789+-\r\n\x00\x1b", max_size=30))
@settings(max_examples=500, deadline=None)
def test_any_text_is_a_command_or_one_line_of_error(text):
    message = None
    try:
        command = parse(text, COMMANDS)
    except CommandError as error:
        message = str(error)
    if message is None:
        assert command.name in text.lower()
        assert parse(str(command), COMMANDS) == command
    else:
        assert message.splitlines() == [message]
        assert message.isprintable()
        assert message.endswith('type "help" to see all')


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("evla@20", """'evla@20' is no command; the nearest is "eval@20"; type "help" """),
        ("qiut", 'the nearest is "quit"'),
        ("saev 5", 'the nearest is "save"'),
        ("lr=3e-4@50", 'the nearest is "lr 0.0003@50"'),
        ("lr3e-4", 'the nearest is "lr 0.0003"'),
        ("nonsense", "'nonsense' is no command; there are save, export, eval, quit, lr, time, events, help"),
        ("sav", "'sav' is no command"),
        ("saves", "'saves' is no command"),
        ("s", "'s' is no command"),
        ("", "'' is no command"),
        ("@20", "'@20' is no command"),
        ("lr", """'lr': "lr" lacks its number; write lr 3e-4"""),
        ("lr@50", """'lr@50': "lr" lacks its number"""),
        ("lr 0", "one finite number above 0, found '0'"),
        ("lr -1e-4", "found '-1e-4'"),
        ("lr nan", "found 'nan'"),
        ("lr inf", "found 'inf'"),
        ("lr 1e999", "found '1e999'"),
        ("lr 1e10", "expected at most 1e+09, found '1e10'"),
        ("lr 1e-999", "found '1e-999'"),
        ("lr 1_0", "found '1_0'"),
        ("lr 1 2", "found '1 2'"),
        ("lr 1e-4@0", "a whole number from 1 on, found '0'"),
        ("eval@", "found ''"),
        ("eval@-3", "found '-3'"),
        ("eval@2.5", "found '2.5'"),
        ("eval@2@3", "found '2@3'"),
        ("eval@" + "9" * 5000, "found '9999"),
        ("eval@٣", "a whole number from 1 on"),
        ("save now", """'save now': "save" takes nothing but @STEP, found 'now'"""),
        ("save\rquit", "found 'quit'"),
        ("time 2000", """"time" takes nothing, or "to" and a step; write time, or time to 2000"""),
        ("time to", '"time" takes nothing, or "to" and a step'),
        ("time to 0", "a whole number from 1 on"),
        ("save" + " " * 70_000 + "x", "is too long, over 16384 characters"),
    ],
)
def test_the_error_of_an_invalid_line_has_the_remedy(line, said):
    with pytest.raises(CommandError, match=re.escape(said.strip())):
        parse(line, COMMANDS)


def test_help_names_every_command():
    assert [line.split()[0].rstrip(",") for line in HELP.splitlines()] == [*NAMES, "COMMAND@STEP"]


def test_a_row_of_the_table_is_all_that_parsing_needs():
    table = {**COMMANDS, "warm": CommandSpec("warm 3", "warm up", lambda words: int(words[0]), print)}
    assert parse("warm 3@20", table) == Command("warm", 3, 20)
    with pytest.raises(CommandError, match='the nearest is "warm 3"; type "help"'):
        parse("wrm 3", table)


def test_the_table_is_read_without_torch():
    script = "import sys, runner.control.handlers; print('torch' in sys.modules)"
    assert output_of(python(script)) == ["False"]


def typed(*lines, step=0):
    """Returns a queue to which these lines were submitted after `step` steps, and its list of answers."""
    answers = []
    commands = CommandQueue(COMMANDS, answers.append)
    commands.due(step)
    for line in lines:
        commands.submit(line)
    return commands, answers


def test_immediate_commands_are_due_at_the_next_boundary_once_and_in_order():
    commands, answers = typed("save", "lr 1e-4", "eval")
    assert commands.due(1) == [Command("save"), Command("lr", 1e-4), Command("eval")]
    assert commands.due(2) == []
    assert answers == []


def test_scheduled_commands_wait_for_their_step_and_are_acknowledged():
    commands, answers = typed("quit@40", "eval@20", "lr 1e-4@20", "time to 90@20")
    assert answers == ["quit at step 40", "eval at step 20", "lr 0.0001 at step 20", "time to 90 at step 20"]
    assert [str(c) for c in commands.pending] == ["eval@20", "lr 0.0001@20", "time to 90@20", "quit@40"]
    found = {step: [str(c) for c in due] for step in range(1, 50) if (due := commands.due(step))}
    assert found == {20: ["eval@20", "lr 0.0001@20", "time to 90@20"], 40: ["quit@40"]}
    assert commands.pending == ()


def test_due_commands_keep_the_order_typed_whether_scheduled_or_not():
    commands, _ = typed("eval@2", "save", "quit@2", "help")
    commands_at_two, _ = typed("eval@2", "save", "quit@2", "help")
    assert [str(c) for c in commands.due(1)] == ["save", "help"]
    assert [str(c) for c in commands.due(2)] == ["eval@2", "quit@2"]
    assert [str(c) for c in commands_at_two.due(2)] == ["eval@2", "save", "quit@2", "help"]


@pytest.mark.parametrize("step", [1, 20, 57])
def test_a_step_that_has_passed_is_answered_and_not_done(step):
    commands, answers = typed(f"eval@{step}", step=57)
    assert answers == [f'step {step} has passed; now at 57: type "eval" to do it now']
    assert commands.due(58) == []
    assert commands.pending == ()


def test_start_answers_scheduled_steps_that_a_resumed_run_has_passed():
    answers = []
    with tempfile.TemporaryFile() as file:
        file.write(b"eval@20\nquit@60\n")
        file.seek(0)
        commands = CommandQueue(COMMANDS, answers.append, stream=file)
        commands.start(step=57)
        commands.close()
    assert answers == ['step 20 has passed; now at 57: type "eval" to do it now', "quit at step 60"]


def test_a_boundary_that_was_skipped_does_not_lose_its_commands():
    commands, answers = typed("eval@20")
    assert commands.due(25) == [Command("eval", step=20)]
    assert answers[1:] == ["step 20 has passed; now at 25: eval@20 is done now"]


def test_of_many_commands_whose_step_has_passed_the_first_are_answered():
    commands, answers = typed()
    commands.load_state_dict({"pending": [f"time to {step}@{step}" for step in range(1, 31)]})
    assert len(commands.due(50)) == 30
    assert [*map(len, (answers, answers[20:]))] == [21, 1]
    assert answers[-1] == "... (30 in all whose step has passed)"


def test_of_many_rates_at_one_step_the_last_is_set_and_the_first_are_answered():
    answers, rates = [], []
    handlers = CommandHandlers(rates.append, None, answers.append).by_name
    loop = SimpleNamespace(step=4)
    for number in range(1, 31):
        handlers["lr"](loop, float(number))
    assert rates == [float(number) for number in range(1, 31)]
    assert len(answers) == 21
    assert answers[-1] == "... (further commands at this step are done without an answer)"
    loop.step = 5
    handlers["help"](loop, None)
    assert answers[-1] == HELP


def test_wrong_and_blank_lines_change_nothing():
    commands, answers = typed("nonsense", "", "   ", "# quit", "lr")
    assert [answer.split()[0] for answer in answers] == ["'nonsense'", "'lr':"]
    assert commands.due(1) == []


@given(st.lists(ANY_COMMAND.filter(lambda command: command.step is not None)))
@settings(deadline=None)
def test_pending_commands_survive_saving_and_loading(scheduled):
    commands, _ = typed("save", *map(str, scheduled))
    state = json.loads(json.dumps(commands.state_dict()))
    resumed, answers = typed()
    resumed.load_state_dict(state)
    assert answers == []
    assert resumed.pending == commands.pending == tuple(sorted(scheduled, key=lambda command: command.step))
    assert resumed.state_dict() == state
    last = max((command.step for command in scheduled), default=1)
    due = resumed.due(last)
    assert list(dict.fromkeys(due)) == list(dict.fromkeys(commands.pending))
    assert [each for each in due if each.name == "lr"] == [each for each in commands.pending if each.name == "lr"]


def test_loading_keeps_what_was_typed_and_doubles_nothing():
    commands, _ = typed("quit@40", "eval@30", "save")
    for _ in range(2):
        commands.load_state_dict({"pending": ["eval@20", "quit@40"]})
    assert [str(c) for c in commands.pending] == ["eval@20", "eval@30", "quit@40"]
    assert [str(c) for c in commands.due(40)] == ["eval@20", "quit@40", "eval@30", "save"]


@pytest.mark.parametrize("entry", ["quit", "quti@40", "eval@x"])
def test_a_saved_entry_that_is_no_scheduled_command_is_an_error(entry):
    commands, _ = typed("eval@5")
    with pytest.raises(ValueError, match=re.escape(entry)):
        commands.load_state_dict({"pending": ["save@3", entry]})
    assert commands.state_dict() == {"pending": ["eval@5"]}


def test_every_command_typed_during_steps_is_done_or_answered():
    answers, done = [], []
    commands = CommandQueue(COMMANDS, answers.append)
    typist = threading.Thread(target=lambda: [commands.submit(f"eval@{step}") for step in range(1, 3001)])
    typist.start()
    step = 0
    while typist.is_alive() or commands.pending:
        step += 1
        done += [(command.step, step) for command in commands.due(step)]
    passed = [int(answer.split()[1]) for answer in answers if "has passed" in answer]
    assert sorted([due for due, _ in done] + passed) == list(range(1, 3001))
    assert all(due == at for due, at in done)


class Interrupted(CommandQueue):
    """A queue whose loop reaches step 40 just after the reading thread saw the run at step 39."""

    found: list[Command] | None = None
    seen = 39

    @property
    def _step(self):
        if self.found is not None or not self._lock.locked():
            return self.seen
        self.found = []
        self.loop = threading.Thread(target=lambda: self.found.extend(self.due(40)))
        self.loop.start()
        self.loop.join(0.1)
        return 39

    @_step.setter
    def _step(self, step):
        self.seen = step


def test_a_command_typed_at_the_very_moment_of_its_step_is_due_at_it():
    commands = Interrupted(COMMANDS, lambda message: None)
    commands.submit("eval@40")
    commands.loop.join()
    assert commands.found == [Command("eval", step=40)]


class WithoutDescriptor:
    """A stand-in for standard input that has no `fileno`, as some notebooks install."""


def closed_file():
    file = tempfile.TemporaryFile()  # noqa: SIM115 (it is to be closed already)
    file.close()
    return file


@pytest.mark.parametrize("stream", [io.StringIO("quit\n"), WithoutDescriptor(), closed_file(), None])
def test_a_stream_without_descriptor_reads_nothing(stream, monkeypatch):
    monkeypatch.setattr(sys, "stdin", stream)
    commands = CommandQueue(COMMANDS, pytest.fail)
    commands.start()
    commands.close()
    assert commands.due(1) == []


@pytest.fixture
def pipe():
    """A pipe as (reading stream, writing descriptor)."""
    read_fd, write_fd = os.pipe()
    with open(read_fd, "rb", buffering=0) as stream:
        yield stream, write_fd
    try:
        os.close(write_fd)
    except OSError:
        return


def readers():
    return [thread for thread in threading.enumerate() if thread.name == "commands"]


def gather(commands, count, step=1):
    """Returns the next `count` commands in their typed form, or those that came within 120 s."""
    found, deadline = [], time.monotonic() + 120
    while len(found) < count and time.monotonic() < deadline:
        found += map(str, commands.due(step))
        time.sleep(0.002)
    return found


def wait_until(fact):
    deadline = time.monotonic() + 120
    while not fact() and time.monotonic() < deadline:
        time.sleep(0.005)
    assert fact()


def test_lines_ready_in_a_pipe_are_taken_before_start_returns(pipe, monkeypatch):
    monkeypatch.setattr(module.LineReader, "_run", lambda reader: None)
    stream, write_fd = pipe
    os.write(write_fd, b"save\n# note\n\neval@20\r\nnonsense\nquit@40\n")
    answers = []
    commands = CommandQueue(COMMANDS, answers.append, stream=stream)
    commands.start()
    assert commands.due(1) == [Command("save")]
    assert [str(c) for c in commands.pending] == ["eval@20", "quit@40"]
    assert [answer.split(";")[0] for answer in answers] == [
        "eval at step 20",
        "'nonsense' is no command",
        "quit at step 40",
    ]
    commands.close()


def test_a_pipe_whose_first_line_is_a_command_is_read_and_typing_errors_are_answered(pipe):
    stream, write_fd = pipe
    os.write(write_fd, b"\n  # note\nsave # now\nnonsense\n" + b"typo\n" * 50 + b"eval\n")
    answers = []
    commands = CommandQueue(COMMANDS, answers.append, stream=stream)
    commands.start(peeks=True, warn=pytest.fail)
    assert gather(commands, 2) == ["save", "eval"]
    assert len(answers) == 51
    commands.close()


@pytest.mark.parametrize("pieces", [[b"quit@4", b"0\n"], [b"#", b" a\n", b"\n", b"q", b"uit@40\n"], [b"quit@40"]])
def test_a_first_command_may_come_late_and_in_pieces(pipe, pieces):
    stream, write_fd = pipe
    commands = CommandQueue(COMMANDS, lambda text: None, stream=stream)
    commands.start(peeks=True, warn=pytest.fail)
    for piece in pieces:
        time.sleep(0.15)  # longer than between two looks
        assert not commands.pending
        os.write(write_fd, piece)
    if not pieces[-1].endswith(b"\n"):
        os.close(write_fd)
    wait_until(lambda: [str(c) for c in commands.pending] == ["quit@40"])
    commands.close()


@pytest.mark.parametrize("is_late", [False, True])
@pytest.mark.parametrize(
    "content",
    [
        b"1e-4\n1e-5\n",
        b"1e-4",
        b"savee\nsave\n",
        b"\x00\xff\xfe\n" * 100,
        b"\x80" * 50_000,
        b"x" * 5000,
        b"#\n" * 32768,
        b"# sizes\n\n64\nquit\n",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_nothing_of_a_pipe_with_another_first_line_is_consumed_and_the_remedy_is_printed_once(pipe, content, is_late):
    stream, write_fd = pipe
    warned = []
    commands = CommandQueue(COMMANDS, pytest.fail, stream=stream)
    if is_late:
        commands.start(peeks=True, warn=warned.append)
    os.write(write_fd, content)
    os.close(write_fd)
    if not is_late:
        commands.start(peeks=True, warn=warned.append)
    wait_until(lambda: not readers())
    commands.close()
    assert stream.read() == content
    has_lines = content.replace(b"#\n", b"") != b""
    assert len(warned) == has_lines
    assert all("tracking.stdin=true reads it" in text for text in warned)


def test_an_empty_pipe_that_is_closed_ends_the_reading_without_a_word(pipe):
    stream, write_fd = pipe
    os.close(write_fd)
    commands = CommandQueue(COMMANDS, pytest.fail, stream=stream)
    commands.start(peeks=True, warn=pytest.fail)
    wait_until(lambda: not readers())
    commands.close()


def test_waiting_for_a_first_line_can_be_closed_and_leaves_no_descriptor(pipe):
    stream, write_fd = pipe
    before = len(os.listdir("/proc/self/fd"))
    for content in (b"", b"qui"):
        os.write(write_fd, content)
        commands = CommandQueue(COMMANDS, pytest.fail, stream=stream)
        commands.start(peeks=True, warn=pytest.fail)
        time.sleep(0.25)
        commands.close()
        assert not readers()
    assert len(os.listdir("/proc/self/fd")) == before
    assert os.read(stream.fileno(), 10) == b"qui"


def test_a_system_that_can_not_look_into_pipes_leaves_them_alone_and_warns(pipe, monkeypatch):
    monkeypatch.setattr("runner.control.stdin._tee", None)
    stream, write_fd = pipe
    warned = []
    os.write(write_fd, b"quit\n")
    commands = CommandQueue(COMMANDS, pytest.fail, stream=stream)
    commands.start(peeks=True, warn=warned.append)
    commands.close()
    assert len(warned) == 1
    assert "tracking.stdin=true reads it" in warned[0]
    assert os.read(stream.fileno(), 10) == b"quit\n"


@pytest.mark.parametrize("kind", ["file", "socket", "null"])
def test_files_sockets_and_null_are_read_only_where_asked(kind, tmp_path):
    path = tmp_path / "typed"
    path.write_bytes(b"quit\n")
    one, other = socket.socketpair()
    other.sendall(b"quit\n")
    fds = {"file": lambda: os.open(path, os.O_RDONLY), "socket": one.detach, "null": lambda: os.open(os.devnull, 0)}
    with open(fds[kind](), "rb", buffering=0) as stream, one, other:
        commands = CommandQueue(COMMANDS, pytest.fail, stream=stream)
        commands.start(peeks=True, warn=pytest.fail)
        assert not readers()
        assert commands.due(1) == []
        commands.start()
        assert [str(c) for c in commands.due(1)] == ([] if kind == "null" else ["quit"])
        commands.close()


def test_lines_split_across_writes_and_two_in_one_write_all_arrive(pipe):
    stream, write_fd = pipe
    commands = CommandQueue(COMMANDS, pytest.fail, stream=stream)
    commands.start()
    os.write(write_fd, b"save\nexp")
    assert gather(commands, 1) == ["save"]
    os.write(write_fd, b"ort\nlr 1e")
    assert gather(commands, 1) == ["export"]
    os.write(write_fd, b"-3\neval\nquit")
    assert gather(commands, 2) == ["lr 0.001", "eval"]
    os.close(write_fd)
    assert gather(commands, 1) == ["quit"]
    wait_until(lambda: not readers())
    commands.close()


def test_close_ends_the_thread_and_the_next_instance_reads_on(pipe):
    stream, write_fd = pipe
    for name in ("save", "eval"):
        commands = CommandQueue(COMMANDS, pytest.fail, stream=stream)
        commands.start()
        commands.start()
        assert len(readers()) == 1
        commands.close()
        commands.close()
        assert not readers()
        os.write(write_fd, f"{name}\n".encode())
        commands.start()
        assert gather(commands, 1) == [name]
        commands.close()
    os.write(write_fd, b"rest")
    assert stream.read(4) == b"rest"


def test_reading_leaves_no_descriptor_open(pipe):
    stream, _ = pipe
    before = os.listdir("/dev/fd")
    for source in (stream, open(os.devnull, "rb")):  # noqa: SIM115 (closed below)
        commands = CommandQueue(COMMANDS, pytest.fail, stream=source)
        commands.start()
        commands.close()
    source.close()
    assert os.listdir("/dev/fd") == before


def test_a_second_reader_of_a_consumed_pipe_sees_its_end(pipe):
    stream, write_fd = pipe
    os.write(write_fd, b"quit@40\n")
    os.close(write_fd)
    for expected in (["quit@40"], []):
        commands = CommandQueue(COMMANDS, lambda message: None, stream=stream)
        commands.start()
        assert [str(c) for c in commands.pending] == expected
        wait_until(lambda: not readers())
        commands.close()


def from_file(content):
    """Returns a queue that has read a file with this content to its end, and its list of answers."""
    answers = []
    with tempfile.TemporaryFile() as file:
        file.write(content)
        file.seek(0)
        commands = CommandQueue(COMMANDS, answers.append, stream=file)
        commands.start()
        wait_until(lambda: not readers())
        commands.close()
    return commands, answers


def test_a_file_is_read_to_its_end_and_needs_no_last_newline():
    commands, answers = from_file(b"lr 1\n" * 900 + b"quit")
    due = commands.due(1)
    assert (len(due), due[-1], answers) == (901, Command("quit"), [])


def test_a_flood_stays_unread_until_some_of_it_is_done_and_none_is_lost(monkeypatch):
    monkeypatch.setattr(reader_module, "_LINES_PER_S", 1e9)
    monkeypatch.setattr(reader_module, "_ROOM_S", 0.001)
    answers = []
    with tempfile.TemporaryFile() as file:
        file.write(b"".join(b"lr 1@%d\n" % step for step in range(1, 3000)))
        file.seek(0)
        commands = CommandQueue(COMMANDS, answers.append, stream=file)
        commands.start()
        for done in (0, 400, 900):
            assert len(commands.due(done)) == (0 if not done else 400 if done == 400 else 500)
            wait_until(lambda: len(commands.pending) == 1000)
            assert [command.step for command in commands.pending] == list(range(done + 1, done + 1001))
        assert (
            sum(answer.startswith("1000 commands at once: the rest is read as these are done") for answer in answers)
            == 1
        )
        assert file.tell() < 100_000
        wait_until(lambda: commands.close() or not readers())


def test_quit_passes_a_queue_that_is_full(pipe, monkeypatch):
    monkeypatch.setattr(reader_module, "_LINES_PER_S", 1e9)
    stream, write_fd = pipe
    os.write(write_fd, b"".join(b"lr 1@%d\n" % step for step in range(10, 1010)))
    commands = CommandQueue(COMMANDS, lambda text: None, stream=stream)
    commands.start()
    wait_until(lambda: len(commands.pending) == 1000)
    os.write(write_fd, b" Quit # now\nlr 2@5\n")
    assert gather(commands, 1) == ["quit"]
    assert len(commands.pending) == 1000
    commands.close()


def test_of_a_flood_without_steps_a_thousand_commands_are_done_and_then_a_few_a_second():
    with tempfile.TemporaryFile() as file:
        file.write(b"lr 1\n" * 5000)
        file.seek(0)
        commands = CommandQueue(COMMANDS, lambda text: None, stream=file)
        began = time.monotonic()
        commands.start()
        done = []
        wait_until(lambda: done.extend(commands.due(1)) or len(done) >= 1000)
        assert len(done) <= 1001 + 2 * (time.monotonic() - began)
        commands.close()
        wait_until(lambda: not readers())


def test_bytes_that_are_no_text_are_answered():
    commands, answers = from_file(b"\xff\xfe\x00save\n\x1b[2Jquit\neval\n")
    assert commands.due(1) == [Command("eval")]
    assert len(answers) == 2
    assert all(answer.isprintable() for answer in answers)


@pytest.mark.parametrize("size", [20_000, 70_000, 300_000, 1_000_000])
@pytest.mark.parametrize("letter", ["x", "é", "日"])
def test_an_overlong_line_is_answered_once_and_the_next_one_is_read(size, letter):
    commands, answers = from_file((letter * size).encode() + b"\nquit\n")
    assert commands.due(1) == [Command("quit")]
    assert len(answers) == 1
    assert "too long" in answers[0]


@pytest.mark.parametrize("content", [b"one\n" * 5000, b"\0" * 20_000_000], ids=["a list", "one line"])
def test_an_input_that_is_no_list_of_commands_is_given_up(content):
    commands, answers = from_file(content + b"\nquit\n")
    assert commands.due(1) == []
    assert len(answers) <= 101
    assert answers[-1] == "100 lines in a row were no commands: this input is read no further"


def test_waiting_for_input_does_not_spin(pipe, monkeypatch):
    calls = []
    select = reader_module.select.select
    monkeypatch.setattr(reader_module.select, "select", lambda *words: calls.append(words) or select(*words))
    commands = CommandQueue(COMMANDS, pytest.fail, stream=pipe[0])
    commands.start()
    time.sleep(0.3)
    commands.close()
    assert len(calls) <= 2


# A run in miniature: it steps until `quit` or its last step, and prints what it did and what it was answered.
RUN = """
import os, sys, threading, time
from runner.control.commands import CommandQueue
from runner.control.handlers import COMMANDS
log = lambda *words: os.write(1, (" ".join(map(str, words)) + "\\n").encode())
commands = CommandQueue(COMMANDS, lambda message: log("answer:", message))
commands.start()
for step in range(1, int(sys.argv[1]) + 1):
    due = [str(command) for command in commands.due(step)]
    for command in due:
        log(step, command)
    if any(command.startswith("quit") for command in due):
        break
    time.sleep(0.002)
commands.close()
log("end", threading.active_count())
"""


def python(script, *arguments, **options):
    """Starts a script in another process, with its output piped as text."""
    options.setdefault("stdout", subprocess.PIPE)
    options = {"cwd": ROOT, "text": True, "stderr": subprocess.STDOUT, **options}
    return subprocess.Popen([sys.executable, "-W", "ignore", "-c", textwrap.dedent(script), *arguments], **options)


def output_of(process, typed=None):
    try:
        output, _ = process.communicate(typed, timeout=120)
    finally:
        process.kill()
    assert process.returncode == 0, output
    return output.splitlines()


SESSION = "save\neval@20\nlr 1e-4\nnonsense\nquit@40\n"


def check_session(lines):
    assert [line for line in lines if "answer" not in line] == [
        "1 save",
        "1 lr 0.0001",
        "20 eval@20",
        "40 quit@40",
        "end 1",
    ]
    assert sum("'nonsense' is no command" in line for line in lines) == 1


def test_a_session_from_a_shell_pipe():
    read_fd, write_fd = os.pipe()
    os.write(write_fd, SESSION.encode())
    os.close(write_fd)
    process = python(RUN, "300", stdin=read_fd)
    os.close(read_fd)
    check_session(output_of(process))


def test_a_session_from_a_file(tmp_path):
    (tmp_path / "typed").write_text(SESSION)
    with open(tmp_path / "typed") as file:
        check_session(output_of(python(RUN, "300", stdin=file)))


@pytest.mark.parametrize("redirection", ["< /dev/null", "0<&-", "0> /dev/null"])
def test_a_run_goes_to_its_end_without_any_input(redirection):
    shell = ["sh", "-c", f'exec "$0" -c "$1" 50 {redirection}', sys.executable, RUN]
    result = subprocess.run(shell, cwd=ROOT, capture_output=True, text=True, timeout=30, check=True)
    assert (result.stdout, result.stderr) == ("end 1\n", "")


def test_the_end_of_input_ends_the_thread():
    script = """
    import threading, time
    from runner.control.commands import CommandQueue
    from runner.control.handlers import COMMANDS
    commands = CommandQueue(COMMANDS, print)
    commands.start()
    while threading.active_count() > 1:
        time.sleep(0.01)
    print("ended")
    """
    assert output_of(python(script, stdin=subprocess.DEVNULL)) == ["ended"]


def test_a_worker_forked_while_the_reader_waits_can_end():
    script = """
    import multiprocessing, os, threading, time
    from runner.control.commands import CommandQueue
    from runner.control.handlers import COMMANDS
    commands = CommandQueue(COMMANDS, print)
    commands.start()
    time.sleep(0.2)
    context = multiprocessing.get_context("fork")
    for _ in range(3):
        worker = context.Process(target=os.getpid)
        worker.start()
        worker.join(10)
        print(worker.exitcode, flush=True)
        worker.kill()
    lingering = context.Process(target=time.sleep, args=(60,))
    lingering.start()
    commands.close()
    print(threading.active_count(), flush=True)
    lingering.kill()
    """
    process = python(script, stdin=subprocess.PIPE)
    try:
        process.wait(40)
    finally:
        process.kill()
    assert process.communicate()[0].split() == ["0", "0", "0", "1"]


def in_terminal(script, *arguments):
    """Starts a script in another session with a terminal; returns the process and our end of the terminal."""
    ours, theirs = pty.openpty()
    take_terminal = "import fcntl, termios; fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n"
    script = take_terminal + textwrap.dedent(script)
    process = python(script, *arguments, stdin=theirs, start_new_session=True)
    os.close(theirs)
    return process, ours


def test_commands_are_typed_at_a_terminal():
    process, terminal = in_terminal(RUN, "100000")
    os.write(terminal, b"nonsense\nsave\nexport\n")
    seen = [process.stdout.readline() for _ in range(3)]
    assert "'nonsense'" in seen[0]
    assert [line.split()[1] for line in seen[1:]] == ["save", "export"]
    os.write(terminal, b"quit\n")
    lines = output_of(process)
    os.close(terminal)
    assert [line.split()[1] for line in lines] == ["quit", "1"]


def test_the_end_of_input_at_a_terminal_is_announced_and_the_run_goes_on():
    process, terminal = in_terminal(RUN, "500")
    os.write(terminal, b"\x04")
    lines = output_of(process)
    os.close(terminal)
    assert lines == ["answer: end of input: no more commands are read", "end 1"]


def test_a_terminal_that_goes_away_ends_only_the_reading():
    script = """
    import signal
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    print("ready", flush=True)
    """
    process, terminal = in_terminal(textwrap.dedent(script) + RUN, "500")
    assert process.stdout.readline() == "ready\n"
    os.close(terminal)
    assert output_of(process)[-1] == "end 1"


# A shell in miniature: it starts the run in the background, watches it a while, and brings it to the front.
SHELL = """
import os, signal, subprocess, sys, time
signal.signal(signal.SIGTTOU, signal.SIG_IGN)
print("ready", flush=True)
job = subprocess.Popen([sys.executable, "-c", sys.argv[1], "100000"], preexec_fn=os.setpgrp)
stopped = False
for _ in range(100):
    pid, status = os.waitpid(job.pid, os.WNOHANG | os.WUNTRACED)
    stopped = stopped or (pid and os.WIFSTOPPED(status))
    time.sleep(0.01)
print("stopped" if stopped else "running", flush=True)
os.tcsetpgrp(0, job.pid)
if stopped:
    os.killpg(job.pid, signal.SIGKILL)
job.wait()
"""


# Makes the next two looks find the process in the foreground, as if it left it between the look and the read.
LATE = """
import os
look, looks = os.tcgetpgrp, []
os.tcgetpgrp = lambda fd: looks.append(fd) or (os.getpgrp() if len(looks) <= 2 else look(fd))
"""


@pytest.mark.parametrize("run", [RUN, LATE + RUN], ids=["in the background", "just gone there"])
def test_a_background_job_is_not_stopped_and_reads_when_brought_to_the_front(run):
    process, terminal = in_terminal(SHELL, run)
    assert process.stdout.readline() == "ready\n"
    os.write(terminal, b"save\n")
    assert process.stdout.readline() == "running\n"
    os.write(terminal, b"quit\n")
    lines = output_of(process)
    os.close(terminal)
    assert [line.split()[1] for line in lines] == ["save", "quit", "1"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ((120, 300, 0.2, 24.0), "step 120 of 300, 0:00:24 gone, 0:00:36 to go (0.20 s a step)"),
        ((1, 10**6, 3.0, 90_061.0), "step 1 of 1000000, 25:01:01 gone, 833:19:57 to go (3.00 s a step)"),
        ((7, 10, 2.1e-4, 0.1), "step 7 of 10, 0:00:00 gone, 0:00:00 to go (0.21 ms a step)"),
        ((0, 300, math.nan, 1.0), "step 0 of 300, 0:00:01 gone, (no step timed yet)"),
        ((120, 3000, 0.2, 24.0, 2000), "step 2000 in 0:06:16 (0.20 s a step)"),
        ((0, 3000, 0.0, 1.0, 2000), "step 2000 in a time not known (no step timed yet)"),
        ((120, 300, 0.2, 24.0, 120), "step 120 has passed; now at 120 of 300"),
        ((120, 300, 0.2, 24.0, 301), "step 301 will not be reached: the run ends at 300; now at 120"),
    ],
)
def test_the_time_is_described(arguments, said):
    assert describe_time(*arguments) == said


def test_scheduled_commands_are_described():
    assert describe_events([]) == describe_events(()) == "nothing is scheduled"
    assert describe_events(typed("quit@40", "lr 1e-4@20")[0].pending) == "scheduled: lr 0.0001@20, quit@40"


def test_the_module_imports_the_standard_library_only():
    source = Path(module.__file__).read_text()
    imported = set(re.findall(r"^(?:from|import) (\w+)", source, re.MULTILINE))
    assert imported - {"runner"} <= sys.stdlib_module_names
    assert re.findall(r"from (runner\S*)", source) == ["runner.control.stdin"]
