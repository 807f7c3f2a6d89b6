"""Seconds from a command to its answer or first step, medians of 5: `python tests/benchmarks/startup.py`."""

import statistics
import subprocess
import sys
import tempfile
import time

# Stands where `python -m runner` does, and tells the moment the first step is done.
FIRST_STEP = """
import sys, time
sys.argv = ["runner", "trainer.eval_every=0", "trainer.eval_at_start=false", "trainer.save_every=0", "trainer.steps=1"]
from runner.__main__ import main
import atexit
def tell():
    print("stepped", moments[0])
atexit.register(tell)
moments = []
import builtins
original = builtins.__import__
def watching(name, *args, **kwargs):
    module = original(name, *args, **kwargs)
    steps = sys.modules.get("runner.utils.train.step")
    if steps is not None and hasattr(steps, "tell") and not hasattr(steps, "is_watched"):
        steps.is_watched = True
        take = steps.Steps.take
        def taken(*arguments):
            take(*arguments)
            moments.append(time.time())
        steps.Steps.take = taken
    return module
builtins.__import__ = watching
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
    found = []
    for _ in range(5):
        with tempfile.TemporaryDirectory() as folder:
            began = time.time()
            settings = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": True}
            done = subprocess.run([sys.executable, *command], cwd=folder, **settings)
            ended = float(done.stdout.split("stepped ")[1].split()[0]) if is_step else time.time()
            found.append(ended - began)
    return statistics.median(found)


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
