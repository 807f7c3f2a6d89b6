"""`python -m runner` as a program: how it ends."""

import gzip
import subprocess
import sys

import pytest

# The calls with which a command begins, before modules of the user's are imported, and a call of `Trainer.fit`.
COMMAND = """
import gc
from runner.__main__ import _disable_gc
from runner.launch.launcher import _freeze_torch
_disable_gc()
_freeze_torch()
import mine
gc.enable()
assert gc.get_freeze_count() > 100_000
"""
# As in any program, functions refer to the module's variables: only the garbage collector finds that all are unused.
MODULE = """
import gzip
class Report:
    def __init__(self):
        self.file = {opening}
        self.file.write("accuracy 0.98")

def read():
    return report

report = Report()
"""


@pytest.mark.parametrize("program", ["import torch, mine", COMMAND])
@pytest.mark.parametrize(("name", "open_file"), [("report.txt", open), ("report.gz", gzip.open)])
def test_a_file_that_a_module_left_open_is_complete_when_the_program_ends(tmp_path, program, name, open_file):
    opening = f"{'gzip.' if open_file is gzip.open else ''}open({name!r}, 'wt')"
    (tmp_path / "mine.py").write_text(MODULE.format(opening=opening))
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], cwd=tmp_path, check=True, timeout=60)
    with open_file(tmp_path / name, "rt") as file:
        assert file.read() == "accuracy 0.98"
