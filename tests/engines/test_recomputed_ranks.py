"""Recomputed blocks on real gloo ranks: DDP and FSDP2 train the same weights, bit for bit, as without."""

import pytest
import torch
from lazy_device import LazyDevice
from ranks import run_ranks
from torch import nn

from runner.engines import Engine, Engines
from runner.engines.fsdp import FSDP
from runner.engines.strategies import DDP
from runner.utils import distributed, unsloth
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.unsloth.offload import Offloader


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.wide, self.narrow, self.drop = nn.Linear(8, 16), nn.Linear(16, 8), nn.Dropout(0.2)

    def forward(self, x, *, gate):
        return x + self.drop(self.narrow(torch.tanh(self.wide(x)))) * gate


class Net(nn.Module):
    def __init__(self, is_tied=False, has_unused=False):
        super().__init__()
        self.first, self.last = nn.Linear(5, 8), nn.Linear(8, 8)
        self.blocks = nn.ModuleList([Block() for _ in range(3)])
        if is_tied:
            self.blocks[2].wide.weight = self.blocks[0].wide.weight
        self.unused = nn.Linear(8, 8) if has_unused else None

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x, gate=x.cos())
        return self.last(x).square().mean()


def train(make_layout, how, kind, accumulate):
    torch.set_num_threads(1)
    torch.manual_seed(0)
    module, device = Net(**kind), LazyDevice()
    if how == "recomputed":
        unsloth.apply(module)
    elif how == "offloaded":
        engine = Offloader(device, min_bytes=0, keep_last=0, in_flight=1)
        for block in module.blocks:
            unsloth.wrap(block, engine)
    coordinator, strategy = Coordinator(), make_layout()
    strategy.attach_coordinator(coordinator, "one", True)
    strategy.shard(module)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.01)
    engines = Engines(one=Engine(module, optimizer, strategy=strategy, accumulate=accumulate, clip_norm=0.5))
    generator = torch.Generator().manual_seed(4)
    for step in range(3):
        for _ in range(accumulate):
            batch = torch.randn(8, 5, generator=generator).chunk(2)[distributed.rank()]
            torch.manual_seed(step)
            engines.micro_step({"x": batch})
        assert engines.step(coordinator.poll) == {}
    assert not device.mistakes
    assert (device.num_sent > 0) is (how == "offloaded")
    return engines.take_metrics(), engines.export_states()["one"]


def together(make_layout, kind, accumulate):
    """Trains in three ways in the same two processes."""
    return [train(make_layout, how, kind, accumulate) for how in ("plain", "recomputed", "offloaded")]


def static_ddp():
    return DDP(static_graph=True)


def searching_ddp():
    return DDP(find_unused_parameters=True)


@pytest.mark.parametrize(
    ("make_layout", "kind", "accumulate"),
    [
        (DDP, {}, 1),
        (DDP, {}, 3),
        (static_ddp, {}, 1),
        (searching_ddp, {"has_unused": True}, 1),
        (DDP, {"is_tied": True}, 1),
        (FSDP, {}, 1),
        (FSDP, {}, 2),
    ],
    ids=["plain", "accumulated", "static graph", "unused parameters", "tied", "fsdp", "fsdp accumulated"],
)
def test_recomputed_blocks_train_the_same_to_the_bit(make_layout, kind, accumulate):
    for found in run_ranks(2, together, make_layout, kind, accumulate):
        (metrics, weights), *others = found
        for other_metrics, other_weights in others:
            assert other_metrics == metrics
            assert list(other_weights) == list(weights)
            assert all(torch.equal(other_weights[name], weights[name]) for name in weights)
