"""Sparse gradients: norm, clipping, faults and all-reduce equal those of dense gradients."""

import pytest
import torch
from ranks import run_ranks
from torch import nn

from runner.engines import Engine, Engines
from runner.engines.optim.hyperparameters import check_sparse
from runner.engines.optim.optimizers import ChainedOptimizer, muon
from runner.engines.strategies import DDP, Strategy
from runner.utils import distributed
from runner.utils.distributed.coordinator import Coordinator


class Table(nn.Module):
    def __init__(self, sparse=True):
        super().__init__()
        torch.manual_seed(0)
        self.table, self.out = nn.Embedding(6, 4, sparse=sparse), nn.Linear(4, 1)

    def forward(self, i):
        return self.out(self.table(i)).square().mean()


BATCHES = [torch.tensor(rows) for rows in ([1, 1, 2, 5], [3, 3, 3, 3], [0, 1, 2, 3], [5, 5, 0, 0])]
CASES = {
    "clipped": {"clip_norm": 0.05},
    "not clipped": {"clip_norm": 0.0},
    "accumulated": {"clip_norm": 0.05, "accumulate": 2},
    "looked at": {"clip_norm": 0.0, "on_nonfinite": "stop"},
    "scaled": {"clip_norm": 0.05, "precision": "fp16"},
}


def train(sparse, make_layout, settings):
    module, strategy, coordinator = Table(sparse), make_layout(), Coordinator()
    strategy.attach_coordinator(coordinator, "model", True)
    strategy.shard(module)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.5)
    engine = Engine(module, optimizer, strategy=strategy, **settings)
    engines, norms = Engines(model=engine), []
    for batch in BATCHES:
        engines.micro_step({"i": batch.chunk(distributed.world_size())[distributed.rank()]})
        if engine.micro_steps % engine.accumulate == 0:
            assert engines.step(coordinator.poll) == {}
            norms.append(engines.take_metrics().get("grad_norm"))
    return norms, [parameter.detach().clone() for parameter in module.parameters()]


@pytest.mark.parametrize("case", CASES)
def test_sparse_gradients_train_as_dense_ones(case):
    found, expected = train(True, Strategy, CASES[case]), train(False, Strategy, CASES[case])
    torch.testing.assert_close(found, expected, equal_nan=True)


@pytest.mark.parametrize("case", ["clipped", "accumulated"])
def test_sparse_gradients_are_exchanged(case):
    expected = train(False, Strategy, CASES[case])
    for found in run_ranks(2, train, True, DDP, CASES[case]):
        torch.testing.assert_close(found, expected, equal_nan=True)


def test_sparse_gradients_that_are_not_finite_are_named():
    module = Table()
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=0.5), on_nonfinite="stop", clip_norm=1.0)
    with torch.no_grad():
        module.out.weight[0, 0] = float("inf")
    engine.micro_step({"i": BATCHES[0]})
    fault = engine.step()
    assert "table.weight (" in fault
    assert " not finite)" in fault


def test_an_optimizer_that_takes_no_sparse_gradients_is_refused_with_the_layers_named():
    module = Table()
    parameters, table, out = list(module.parameters()), [module.table.weight], list(module.out.parameters())
    sgd, adamw = torch.optim.SGD(parameters, lr=0.1), torch.optim.AdamW(parameters)
    check_sparse(module, sgd, is_sharded=False)
    check_sparse(Table(sparse=False), torch.optim.AdamW(parameters), is_sharded=True)
    check_sparse(module, ChainedOptimizer([torch.optim.SparseAdam(table), torch.optim.AdamW(out)]), is_sharded=False)
    refused = [
        (adamw, False, r"AdamW can't take the sparse gradients of table; set sparse=false there, or choose SparseAdam"),
        (sgd, True, r"SGD under FSDP can't take the sparse gradients of table; set sparse=false there$"),
        (torch.optim.SGD(parameters, lr=0.1, momentum=0.9), False, r"SGD with momentum can't"),
        (torch.optim.Adagrad(parameters, weight_decay=0.1), False, r"Adagrad with weight_decay can't"),
        (torch.optim.SparseAdam(parameters), False, r"SparseAdam takes sparse gradients alone; give dense"),
        (muon(module.named_parameters(), lr=0.1), False, r"Muon can't take the sparse gradients of table"),
    ]
    for optimizer, is_sharded, message in refused:
        with pytest.raises(ValueError, match=message):
            check_sparse(module, optimizer, is_sharded)
    module.table.weight.requires_grad_(False)
    check_sparse(module, adamw, is_sharded=False)
