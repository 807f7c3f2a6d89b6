"""A workload that every peer trains: its model, its data and its settings, which are those of the runner's example."""

import math
import sys
from dataclasses import dataclass
from pathlib import Path

LR, BETAS, WEIGHT_DECAY = 3e-3, (0.9, 0.95), 0.1
WARMUP_STEPS, FINAL_FACTOR = 20, 0.1
CLIP_NORM = 1.0
WEIGHTS = "initial.safetensors"  # in the folder of a run


@dataclass
class Workload:
    """Steps, and how often something is logged, evaluated and saved; `make` builds the model and both datasets."""

    make: object
    batch_size: int
    steps: int
    every: int  # steps between evaluations, and between checkpoints
    log_every: int

    def make_optimizer(self, model):
        from torch.optim import AdamW
        from torch.optim.lr_scheduler import LambdaLR

        optimizer = AdamW(model.parameters(), lr=LR, betas=BETAS, weight_decay=WEIGHT_DECAY)
        return optimizer, LambdaLR(optimizer, make_factor(WARMUP_STEPS, self.steps, FINAL_FACTOR))


def make_factor(warmup_steps, total_steps, final_factor):
    """Returns a linear rise, then half a cosine down, as the factor of a LambdaLR."""

    def factor(step):
        if step < warmup_steps:
            return (step + 1) / warmup_steps
        part = min((step - warmup_steps) / max(total_steps - warmup_steps, 1), 1.0)
        return final_factor + (1 - final_factor) * (1 + math.cos(math.pi * part)) / 2

    return factor


def make_digits():
    from runner.examples.digits import Digits, DigitsNet

    return DigitsNet(), Digits(augment=True), Digits("validation")


def make_byte_gpt():
    from runner.examples.byte_gpt import ByteGPT
    from runner.examples.source_code import SourceCode

    return ByteGPT(context=256), SourceCode(), SourceCode("validation", max_windows=256)


WORKLOADS = {
    "digits": Workload(make_digits, batch_size=64, steps=400, every=100, log_every=20),
    "byte_gpt": Workload(make_byte_gpt, batch_size=12, steps=40, every=20, log_every=10),
}


def open_workload():
    """Returns the workload that the command line names, its folder, and its model with the initial weights and data."""
    from safetensors.torch import load_file

    name, folder = sys.argv[1:]
    workload = WORKLOADS[name]
    model, train, validation = workload.make()
    model.load_state_dict(load_file(Path(folder, WEIGHTS)))
    return workload, Path(folder), model, train, validation


def endless(loader):
    """Yields the batches of a loader, epoch after epoch."""
    while True:
        yield from loader
