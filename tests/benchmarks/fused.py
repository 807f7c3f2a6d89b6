"""Compares an update of torch's default with one of the kernel that the runner chooses.

    OMP_NUM_THREADS=1 python tests/benchmarks/fused.py

A row has the CPU time of an update by torch's default and by the choice, in alternation, the minimum of many turns, and
their ratio. The gradients stay the same.
"""

import time

import torch
from torch import nn

from runner.engines.dynamo import avoid_dynamo_import, step_without_dynamo
from runner.engines.optim.fused import describe_kernels, use_fused_kernels
from runner.examples.byte_gpt import ByteGPT
from runner.examples.digits import DigitsNet

TURN_S = 0.004
ROW_S = 0.8
OPTIMIZERS = {
    "Adam": lambda p: torch.optim.Adam(p, lr=1e-5),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=1e-5),
    "SGD": lambda p: torch.optim.SGD(p, lr=1e-5),
    "SGD, decay": lambda p: torch.optim.SGD(p, lr=1e-5, weight_decay=0.1),
    "SGD, momentum": lambda p: torch.optim.SGD(p, lr=1e-5, momentum=0.9),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=1e-5),
}
MODELS = {
    "MLP of 4 tensors": lambda: nn.Sequential(nn.Linear(8, 16), nn.GELU(), nn.Linear(16, 1)),
    "digits": lambda: DigitsNet(width=32, dropout=0.0),
    "byte_gpt": lambda: ByteGPT(width=128, depth=4, heads=4, context=128),
    "100 tensors of 64": lambda: nn.ParameterList([nn.Parameter(torch.randn(64)) for _ in range(100)]),
    "1 tensor of 4 million": lambda: nn.ParameterList([nn.Parameter(torch.randn(2048, 2048))]),
}


def measure(optimizer, num_updates):
    """Returns the microseconds of an update, the mean of some."""
    start_s = time.thread_time()
    for _ in range(num_updates):
        optimizer.step()
    return (time.thread_time() - start_s) / num_updates * 1e6


def make_pair(make_model, make_optimizer):
    """Returns an optimizer of torch's default, and one with the kernel that the runner chooses."""
    optimizers = []
    for is_chosen in (False, True):
        model = make_model()
        for parameter in model.parameters():
            parameter.grad = torch.randn_like(parameter) * 0.01
        optimizer = make_optimizer(model.parameters())
        step_without_dynamo(optimizer)
        if is_chosen:
            use_fused_kernels(optimizer, model)
        optimizers.append(optimizer)
    return optimizers


def main():
    avoid_dynamo_import()
    print(f"torch {torch.__version__}, {torch.get_num_threads()} threads; us of an update")
    print(f"{'':24}{'':16}{'default':>10}{'chosen':>10}{'ratio':>8}")
    for model_name, make_model in MODELS.items():
        for name, make_optimizer in OPTIMIZERS.items():
            pair = make_pair(make_model, make_optimizer)
            update_s = max(measure(optimizer, 3) for optimizer in pair) / 1e6
            num_updates = max(int(TURN_S / update_s), 1)
            num_turns = max(int(ROW_S / 2 / num_updates / update_s), 5)
            turns = [[measure(optimizer, num_updates) for optimizer in pair] for _ in range(num_turns)]
            default, chosen = map(min, zip(*turns, strict=True))
            label = describe_kernels(pair[1]).partition(", ")[2]
            print(f"{model_name:24}{name:16}{default:10.1f}{chosen:10.1f}{chosen / default:8.2f}  {label}", flush=True)


if __name__ == "__main__":
    main()
