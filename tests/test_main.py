"""`python -m runner` as a program: how it ends."""

import subprocess
import sys

import pytest

# A cycle that nothing refers to keeps a file open; `_disable_gc` is what the program calls first.
PROGRAM = """
from runner.__main__ import _disable_gc
_disable_gc()
import torch

class Report:
    def __init__(self):
        self.itself = self
        self.file = open("report.txt", "w")
        self.file.write("accuracy 0.98")

{statement}
"""


@pytest.mark.parametrize("statement", ["Report()", "report = Report()"])
def test_a_file_that_was_left_open_is_complete_when_the_program_ends(tmp_path, statement):
    program = PROGRAM.format(statement=statement)
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "report.txt").read_text() == "accuracy 0.98"
