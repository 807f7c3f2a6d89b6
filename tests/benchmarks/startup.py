"""Seconds from a command to its output or first step, beside a minimal Hydra app: `python tests/benchmarks/startup.py`.

Commands run in alternation, with compiled modules, after one turn that is not counted. Medians of wall time and of
processor time (user and system).
"""

import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROUNDS = 5
HYDRA_APP = """
import hydra
from omegaconf import OmegaConf

@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(cfg):
    print(OmegaConf.to_yaml(cfg))

main()
"""
HYDRA_CONFIG = {
    "config": "defaults: [{model: small}, {optimizer: sgd}, _self_]\nsteps: 100\nbatch_size: 8\n",
    "model/small": "width: 8\ndepth: 2\n",
    "optimizer/sgd": "lr: 0.1\nmomentum: 0.9\n",
}
IMPORT_TORCH = """
import time, torch
print("stepped", time.time(), time.process_time())
"""
# Runs `python -m runner`, and prints the time at which the first step ended.
SETTINGS = ["trainer.eval_every=0", "trainer.eval_at_start=false", "trainer.save_every=0", "trainer.steps=1"]
FIRST_STEP = """
import sys, time
sys.argv = ["runner", *{SETTINGS}]
from runner.__main__ import _disable_gc, main
_disable_gc()
import atexit
end_times = []
atexit.register(lambda: print("stepped", *end_times[0]))
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
            end_times.append((time.time(), time.process_time()))
        step.StepRunner.run = timed_run
    return module
builtins.__import__ = patching_import
main()
""".replace("{SETTINGS}", repr(SETTINGS))


BARE_STEP = """
import torch
parameter = torch.nn.Parameter(torch.zeros(2))
optimizer = torch.optim.AdamW([parameter])
parameter.sum().backward()
optimizer.step()
"""


def write_app(folder):
    files = {"app.py": HYDRA_APP} | {f"conf/{name}.yaml": text for name, text in HYDRA_CONFIG.items()}
    for name, text in files.items():
        path = Path(folder, name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return str(Path(folder, "app.py"))


def environment():
    """Returns the environment without the variable that keeps Python from storing compiled modules."""
    return {name: value for name, value in os.environ.items() if name != "PYTHONDONTWRITEBYTECODE"}


def run(command, is_step):
    """Returns wall and processor seconds of a command, to its end or to its first step."""
    with tempfile.TemporaryDirectory() as folder:
        before = resource.getrusage(resource.RUSAGE_CHILDREN)
        settings = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True, "check": True}
        began = time.time()
        done = subprocess.run([sys.executable, *command], cwd=folder, env=environment(), **settings)
        seconds = time.time() - began
        after = resource.getrusage(resource.RUSAGE_CHILDREN)
    if is_step:
        ended, cpu_s = map(float, done.stdout.split("stepped ")[1].split()[:2])
        return ended - began, cpu_s
    return seconds, after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime


def compare(commands):
    """Prints the seconds of commands by name: of each (arguments, True if it ends at its first step, its peer)."""
    measured = {name: [] for name in commands}
    for turn in range(ROUNDS + 1):
        for name, (command, is_step, _) in commands.items():
            seconds = run(command, is_step)
            if turn:
                measured[name].append(seconds)
    medians = {
        name: [statistics.median(column) for column in zip(*rows, strict=True)] for name, rows in measured.items()
    }
    for name, (_, _, peer) in commands.items():
        wall_s, cpu_s = medians[name]
        ratios = [mine / other for mine, other in zip(medians[name], medians[peer], strict=True)]
        print(f"{name:44} {wall_s:5.2f} s, ratio {ratios[0]:.2f}; processor {cpu_s:5.2f} s, ratio {ratios[1]:.2f}")


def imported_ms(command):
    """Returns the milliseconds that each package takes to import, without what it imports in turn."""
    done = subprocess.run(
        [sys.executable, "-X", "importtime", *command], stdin=subprocess.DEVNULL, capture_output=True, text=True,
        env=environment(), cwd=tempfile.gettempdir(),
    )  # fmt: skip
    by_module = {}
    for line in done.stderr.splitlines():
        if line.startswith("import time:") and "[us]" not in line:
            own_us, _, module = line.removeprefix("import time:").split("|")
            by_module[module.strip()] = int(own_us) / 1000
    return by_module


REASONS = {
    "torch": "the tensors",
    "hydra": "composes the config",
    "omegaconf": "holds the config",
    "antlr4": "OmegaConf's and Hydra's grammars",
    "yaml": "reads the config",
    "attr": "OmegaConf imports it if it is installed",
    "numpy": "seeded with torch; torch imports the rest of it",
    "runner": "the runner",
    "google": "TensorBoard's messages",
    "tensorboard": "the event file",
    "crc32c": "checksums of checkpoints",
    "safetensors": "checkpoints",
}


def print_imports():
    """Prints what a run imports until it ends after one step, beside what torch imports by itself."""
    of_torch = imported_ms(["-c", "import torch"])
    by_package = {}
    for module, ms in imported_ms(["-m", "runner", *SETTINGS]).items():
        package = "torch and what it imports" if module in of_torch else module.partition(".")[0]
        by_package.setdefault(package, []).append(ms)
    print("\nimported for a run, with Python's -X importtime, which slows imports:")
    for package, ms in sorted(by_package.items(), key=lambda item: -sum(item[1])):
        if sum(ms) >= 1:
            print(f"{package:26} {sum(ms):6.0f} ms {len(ms):5} modules  {REASONS.get(package, '')}")


def main():
    runner = ["-m", "runner"]
    with tempfile.TemporaryDirectory() as folder:
        app = [write_app(folder)]
        for flags in (["--help"], ["--cfg", "job"]):
            peer = f"Hydra app {' '.join(flags)}"
            names = {peer: ([*app, *flags], False, peer), f"runner {' '.join(flags)}": ([*runner, *flags], False, peer)}
            compare(names)
    commands = {
        "import torch, to the end of the process": (["-c", "import torch"], False),
        "import torch, as the process sees it": (["-c", IMPORT_TORCH], True),
        "import torch, one bare AdamW step": (["-c", BARE_STEP], False),
        "runner, to the first step": (["-c", FIRST_STEP], True),
        "runner, one step, to the end of the process": ([*runner, *SETTINGS], False),
    }
    compare({name: (*command, next(iter(commands))) for name, command in commands.items()})
    print_imports()


if __name__ == "__main__":
    main()
