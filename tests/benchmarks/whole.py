"""Seconds of whole trainings, from the command to its end.

    python tests/benchmarks/whole.py [--rounds N] [--only NAME ...] [WORKLOAD ...]

The same model, initial weights, data, optimizer, schedule and steps, with evaluations, checkpoints, TensorBoard and a
progress bar, by each script of `peers/` and by `python -m runner`. Each is a process of its own on a terminal, with a
folder of its own. They take turns; the first round warms caches up and is not counted. The last evaluated loss of each
shows that they have trained the same.
"""

import argparse
import contextlib
import importlib.util
import json
import os
import pty
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch
from peers.workload import BETAS, CLIP_NORM, FINAL_FACTOR, LR, WARMUP_STEPS, WEIGHT_DECAY, WEIGHTS, WORKLOADS
from safetensors.torch import save_file

PEERS = Path(__file__).parent / "peers"
BY_HAND, RUNNER = "torch by hand", "runner"
PACKAGES = {"HF Trainer": "transformers", "Accelerate": "accelerate", "Lightning": "lightning"}
SCRIPTS = {
    BY_HAND: "by_hand.py",
    "HF Trainer": "with_trainer.py",
    "Accelerate": "with_accelerate.py",
    "Lightning": "with_lightning.py",
}


def command_of(name, workload_name, folder):
    """Returns the command line of a contender."""
    if name != RUNNER:
        return [sys.executable, str(PEERS / SCRIPTS[name]), workload_name, str(folder)]
    workload = WORKLOADS[workload_name]
    experiment = [] if workload_name == "byte_gpt" else [f"experiment={workload_name}"]  # the default experiment
    return [
        *(sys.executable, "-m", "runner", *experiment),
        f"hydra.run.dir={folder / RUNNER}",
        f"init.path={folder / WEIGHTS}",
        f"data.batch_size={workload.batch_size}",
        f"optimizer.lr={LR}",
        f"optimizer.betas=[{BETAS[0]},{BETAS[1]}]",
        f"optimizer.weight_decay={WEIGHT_DECAY}",
        f"scheduler.warmup_steps={WARMUP_STEPS}",
        f"scheduler.final_factor={FINAL_FACTOR}",
        f"trainer.clip_norm={CLIP_NORM}",
        f"trainer.steps={workload.steps}",
        f"trainer.log_every={workload.log_every}",
        f"trainer.eval_every={workload.every}",
        f"trainer.save_every={workload.every}",
        "trainer.eval_at_start=false",
        "~report",
    ]


def run_on_terminal(command, folder):
    """Runs a command to its end; returns what it printed, its seconds, and the CPU seconds of its processes."""
    terminal, other_end = pty.openpty()
    began = time.perf_counter()
    process = subprocess.Popen(command, cwd=folder, stdin=other_end, stdout=other_end, stderr=other_end)
    os.close(other_end)
    printed = b""
    with contextlib.suppress(OSError):  # no process has the terminal open any more
        while chunk := os.read(terminal, 65536):
            printed += chunk
    _, status, usage = os.wait4(process.pid, 0)
    seconds = time.perf_counter() - began
    process.returncode = os.waitstatus_to_exitcode(status)
    os.close(terminal)
    if process.returncode:
        raise RuntimeError(f"{command}: status {process.returncode}: {printed.decode(errors='replace')[-3000:]}")
    return printed.decode(errors="replace"), seconds, usage.ru_utime + usage.ru_stime


def measure(name, workload_name, weights):
    """Trains once; returns the seconds, the CPU seconds, and the last evaluated loss."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        save_file(weights, folder / WEIGHTS)
        printed, seconds, cpu_s = run_on_terminal(command_of(name, workload_name, folder), folder)
        if name == RUNNER:
            lines = [json.loads(line) for line in (folder / RUNNER / "metrics.jsonl").read_text().splitlines()]
            loss = [line["eval/loss"] for line in lines if "eval/loss" in line][-1]
        else:
            loss = float(printed.split("eval/loss ")[-1].split()[0])
    return seconds, cpu_s, loss


def print_table(workload_name, found):
    workload = WORKLOADS[workload_name]
    print(f"{workload_name}, {workload.steps} steps; torch {torch.__version__}, {torch.get_num_threads()} threads")
    print(f"{'':16}{'seconds':>9}{'ratio':>8}{'CPU s':>8}{'ratio':>8}{'eval/loss':>11}")
    for name, rounds in found.items():
        seconds, cpu_s, loss = (statistics.median(values) for values in zip(*rounds, strict=True))
        pairs = list(zip(rounds, found[BY_HAND], strict=True))
        ratio = statistics.median(own[0] / base[0] for own, base in pairs)
        cpu_ratio = statistics.median(own[1] / base[1] for own, base in pairs)
        print(f"{name:16}{seconds:9.2f}{ratio:8.2f}{cpu_s:8.2f}{cpu_ratio:8.2f}{loss:11.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("workloads", nargs="*", default=list(WORKLOADS), help=", ".join(WORKLOADS))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", default=[*PACKAGES, RUNNER], help="contenders besides the script by hand")
    asked = parser.parse_args()
    contenders = [BY_HAND]
    for name in asked.only:
        if name in PACKAGES and importlib.util.find_spec(PACKAGES[name]) is None:
            print(f'{name}: not measured; pip install "exact-runner[benchmarks]"', file=sys.stderr)
        else:
            contenders.append(name)
    for workload_name in asked.workloads:
        torch.manual_seed(0)
        weights = WORKLOADS[workload_name].make()[0].state_dict()
        found = {name: [] for name in contenders}
        for number in range(asked.rounds + 1):
            for name, rounds in found.items():
                measured = measure(name, workload_name, weights)
                if number:
                    rounds.append(measured)
        print_table(workload_name, found)


if __name__ == "__main__":
    main()
