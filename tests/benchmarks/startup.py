"""Seconds from a command to its output or its first step, medians of 5: `python tests/benchmarks/startup.py`."""

import statistics
import subprocess
import sys
import tempfile
import time

# Runs `python -m runner`, and prints the time at which the first step ended.
FIRST_STEP = """
import sys, time
sys.argv = ["runner", "trainer.eval_every=0", "trainer.eval_at_start=false", "trainer.save_every=0", "trainer.steps=1"]
from runner.__main__ import main
import atexit
end_times = []
atexit.register(lambda: print("stepped", end_times[0]))
import builtins
original_import = builtins.__import__
def patching_import(name, *args, **kwargs):
    module = original_import(name, *args, **kwargs)
    step = sys.modules.get("runner.utils.train.step")
    is_imported = step is not None and not step.__spec__._initializing
    if is_imported and not hasattr(step, "is_patched"):
        step.is_patched = True
        original_run = step.StepRunner.run
        def timed_run(*arguments):
            original_run(*arguments)
            end_times.append(time.time())
        step.StepRunner.run = timed_run
    return module
builtins.__import__ = patching_import
main()
"""


BARE_STEP = """
import torch
parameter = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.AdamW([parameter])
parameter.sum().backward()
optimizer.step()
"""


def measure(command, is_step=False):
    seconds = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            settings = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": True}
            done = subprocess.run([sys.executable, *command], cwd=folder, **settings)
            ended = float(done.stdout.split("stepped ")[1].split()[0]) if is_step else time.time()
            seconds.append(ended - began)
    return statistics.median(seconds)


def main():
    torch_s = measure(["-c", "import torch"])
    step_s = measure(["-c", FIRST_STEP], is_step=True)
    print(f"import torch                         {torch_s:.2f} s")
    print(f"import torch, one bare AdamW step    {measure(['-c', BARE_STEP]):.2f} s (torch loads its compiler for it)")
    print(f"python -m runner --help              {measure(['-m', 'runner', '--help']):.2f} s")
    print(f"python -m runner --cfg job           {measure(['-m', 'runner', '--cfg', 'job']):.2f} s")
    print(f"python -m runner, to the first step  {step_s:.2f} s, {step_s - torch_s:.2f} s above import torch")


if __name__ == "__main__":
    main()
