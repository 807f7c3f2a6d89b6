"""Compares every optimizer of conf/ under FSDP2 with one process; checks dtypes and devices of a sharded module."""

import copy

import pytest
import torch
import yaml
from ranks import run_ranks
from torch import nn

from runner.config.checks import CONF_DIR
from runner.config.targets import locate, split_optimizer_node
from runner.engines import Engine, Engines
from runner.engines.fsdp import FSDP
from runner.engines.strategies import Strategy
from runner.utils import distributed
from runner.utils.distributed.coordinator import Coordinator

REFUSED = {
    "prodigy": r"Prodigy under FSDP: it sums over all parameters.*; choose distributed=ddp",
    "adamw8bit": r"AdamW8bit under FSDP: its kernels don't know parts of weights; choose distributed=ddp",
    "adamw8bit_torchao": r"TorchaoAdamW8bit can't store moments that are spread over the ranks; choose distributed=ddp",
}
CHOICES = sorted(path.stem for path in (CONF_DIR / "optimizer").glob("*.yaml"))


class Net(nn.Module):
    """A module with weights that two ranks can't share evenly, and one weight of zeros."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Linear(5, 7), nn.Linear(7, 3)
        self.layers = nn.ModuleList([nn.Linear(7, 7) for _ in range(2)])
        self.shift = nn.Parameter(torch.zeros(3))
        self.to(dtype)

    def forward(self, x):
        x = torch.tanh(self.first(x))
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return {"loss": (self.last(x) + self.shift).square().mean(), "width": x.float().mean()}


def build(make_layout, choice):
    node = yaml.safe_load((CONF_DIR / "optimizer" / f"{choice}.yaml").read_text())
    node, _ = split_optimizer_node(node)
    target, settings = locate(node.pop("_target_")), {**node, **({"seed": 0} if "seed" in node else {})}
    module, strategy = Net(), make_layout()
    strategy.attach_coordinator(Coordinator(), "model", True)
    strategy.shard(module)
    named = list(module.named_parameters())
    optimizer = target([p for _, p in named] if isinstance(target, type) else named, **settings)
    strategy.check_optimizer(optimizer)
    return Engines(model=Engine(module, optimizer, strategy=strategy, clip_norm=1.0))


def train(make_layout, choice):
    """Returns the weights after one step, and after two more steps with a resume between."""
    engines, found = build(make_layout, choice), []
    for step in range(3):
        if step == 2:
            state = engines["model"].strategy.to_full(engines.state_dict())
            engines = build(make_layout, choice)
            engines.load_state_dict(state)
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        engines.micro_step({"x": x.chunk(distributed.world_size())[distributed.rank()]})
        assert engines.step(engines["model"].strategy.coordinator.poll) == {}
        found.append(copy.deepcopy(engines.export_states()["model"]))
    return found


@pytest.mark.parametrize("choice", [choice for choice in CHOICES if choice not in REFUSED])
def test_a_step_of_an_optimizer_is_that_of_one_process(choice):
    expected = train(Strategy, choice)
    for found in run_ranks(2, train, FSDP, choice):
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("choice", REFUSED)
def test_an_optimizer_that_would_step_otherwise_is_refused_by_name(choice):
    with pytest.raises(AssertionError, match=REFUSED[choice]):
        run_ranks(2, build, FSDP, choice)


def compute(dtype, settings):
    module, strategy = Net(dtype), FSDP(**settings)
    strategy.shard(module)
    output = module(torch.ones(4, 5, dtype=dtype))
    output["loss"].backward()
    gradients = {p.grad.dtype for p in module.parameters()}
    return output["loss"].dtype, output["loss"].item(), gradients == {dtype}


BF16, FP32 = {"param_dtype": "bf16"}, {"param_dtype": "fp32"}


@pytest.mark.parametrize(
    ("dtype", "settings", "expected"),
    [
        (torch.float32, BF16, torch.bfloat16),
        (torch.float32, BF16 | {"output_dtype": "fp32"}, torch.float32),
        (torch.float32, BF16 | {"output_dtype": "fp32", "blocks": {"layers.*": {}}}, torch.float32),
        (torch.float32, BF16 | {"blocks": {"layers.*": FP32}}, torch.bfloat16),
        (torch.float32, BF16 | {"blocks": {"layers.0": FP32, "last": FP32}, "output_dtype": "fp32"}, torch.float32),
        (torch.float32, {"blocks": {"layers.*": BF16}}, torch.float32),
        (torch.bfloat16, {"blocks": {"layers.1": FP32}}, torch.bfloat16),
        (torch.float32, {"output_dtype": "bf16"}, torch.bfloat16),
    ],
)
def test_blocks_return_the_dtype_that_the_rest_computes_in_and_the_module_its_own(dtype, settings, expected):
    exact = float(Net()(torch.ones(4, 5))["loss"].detach())
    for found, loss, has_own_gradients in run_ranks(2, compute, dtype, settings):
        assert found is expected
        assert loss == pytest.approx(exact, rel=0.02)
        assert has_own_gradients


def test_parts_in_host_memory_without_an_accelerator_are_refused_with_the_remedy():
    with pytest.raises(AssertionError, match=r"offload_to_cpu=true: .*expected an accelerator.*; set it to false"):
        run_ranks(2, compute, torch.float32, {"offload_to_cpu": True})
