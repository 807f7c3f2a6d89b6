"""A small run in this process: its config, a model with two weights, and four samples."""

import torch
from hydra import compose, initialize_config_dir
from torch import nn

from runner.config import checks

CONFIG_FILES = {"config": b"name: power\n", "overrides": b"[]\n"}


class Model(nn.Module):
    """Two weights, whose loss falls with each step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))

    def forward(self, x):
        return {"loss": (self.weight * x).square().mean()}


class Data:
    """Four samples `x`, float32 [2]."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return {"x": torch.full((2,), index + 1.0)}


def small_config(steps, resume=None):
    """Returns the plain config of a run that saves, evaluates and exports every two steps."""
    checks.register_with_hydra()
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        plain = checks.to_plain(compose("config"))
    plain["trainer"] |= {"steps": steps, "save_every": 2, "eval_every": 2, "export_every": 2, "log_every": 1}
    plain["trainer"] |= {"keep_last": 2, "keep_best": 1, "eval_at_start": True}
    data = {"_target_": "small_run.Data"}
    plain["data"] |= {"train": data, "eval": data, "batch_size": 2, "num_workers": 0, "collate": None}
    plain |= {"name": "power", "model": {"_target_": "small_run.Model"}, "report": None, "scheduler": None}
    plain |= {"optimizer": {"_target_": "torch.optim.SGD", "lr": 0.01}, "resume": resume, "pattern": None}
    plain["tracking"] |= {"progress": False, "stdin": False}
    return plain
