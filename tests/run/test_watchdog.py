import re
import subprocess
import sys

# Six processes that hang 60 frames deep at the same time, and are ended by the watchdog.
HANGS = """
import os, sys, time
from pathlib import Path
from runner.run.watchdog import watchdog

def hang(depth):
    time.sleep(60) if not depth else hang(depth - 1)

pids = []
for rank in range(6):
    pids.append(os.fork())
    if not pids[-1]:
        with watchdog(lambda: 0, 1.0, Path(sys.argv[1]), f"rank {rank}"):
            hang(59)
assert [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids] == [1] * 6
"""


def test_the_stacks_of_ranks_that_hang_together_do_not_mix_in_the_log(tmp_path):
    log = tmp_path / "log.txt"
    subprocess.run([sys.executable, "-c", HANGS, log], check=True, timeout=60)
    dumps = re.split(r"rank \d made no step for \d s and is ended; its stacks:\n", log.read_text())
    assert [dump.count("in hang\n") for dump in dumps] == [0] + [60] * 6
