"""`runner.control.terminal`: printing after the terminal was closed."""

import os
import pty
import subprocess
import sys

import pytest

PRINTS = """
import sys
from pathlib import Path
from runner.control import terminal

terminal.survive_closed_terminal()
print("before", end="")
sys.stdout.flush()
sys.stdin.readline()  # comes when the terminal is closed
for _ in range(3):
    print("after", flush=True)
    print("after", file=sys.stderr)
Path("done").write_text(f"{sys.stdout.isatty()} {sys.stdout.encoding}")
"""


@pytest.mark.parametrize("options", [[], ["-u"]])
def test_a_program_prints_on_after_its_terminal_was_closed(tmp_path, options):
    ours, theirs = pty.openpty()
    command = [sys.executable, *options, "-c", PRINTS]
    pipes = {"stdin": subprocess.PIPE, "stdout": theirs, "stderr": theirs}
    # a session of its own, as a worker has: no signal comes when the terminal is closed
    process = subprocess.Popen(command, cwd=tmp_path, start_new_session=True, **pipes)
    os.close(theirs)
    assert os.read(ours, 100) == b"before"
    os.close(ours)
    process.communicate(b"\n", timeout=60)
    assert process.returncode == 0
    assert (tmp_path / "done").read_text() == "False utf-8"


def test_streams_that_are_no_terminal_are_left_alone(tmp_path):
    program = (
        "import sys\nfrom runner.control import terminal\nbefore = sys.stdout\nterminal.survive_closed_terminal()\n"
    )
    program += "print(sys.stdout is before)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert found.stdout == "True\n"


CLOSED = """
import os
from runner.control import terminal

terminal.survive_closed_terminal()
ours, theirs = os.pipe()
print(min(ours, theirs) > 2, os.get_inheritable(2), file=open("done", "w"))
os.write(2, b"a line of a C library")
"""


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_no_file_of_a_program_takes_the_number_of_a_closed_stream(tmp_path, closed):
    (tmp_path / "program.py").write_text(CLOSED)
    subprocess.run(f'exec "{sys.executable}" program.py {closed}', shell=True, cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "done").read_text() == "True True\n"
