import copy as copying

import torch
from torch import nn

from runner.engines.optimizers import Joined, muon
from runner.engines.schedulers import warmup


def make(seed=0):
    torch.manual_seed(seed)
    model = nn.ModuleDict({"embed": nn.Embedding(8, 4), "hidden": nn.Linear(4, 4), "head": nn.Linear(4, 8)})
    return model, muon(model.named_parameters(), lr=0.02, adamw_lr=0.003, adamw_only=["*embed*", "head.*"])


def step(model, optimizer, seed):
    torch.manual_seed(seed)
    x = torch.randint(8, (5,))
    nn.functional.cross_entropy(model["head"](model["hidden"](model["embed"](x))), x).backward()
    optimizer.step()
    optimizer.zero_grad()


def test_matrices_go_to_muon_and_the_rest_to_adamw():
    model, optimizer = make()
    muon_part, adamw_part = optimizer.optimizers
    assert isinstance(muon_part, torch.optim.Muon)
    assert isinstance(adamw_part, torch.optim.AdamW)
    assert [p is model["hidden"].weight for group in muon_part.param_groups for p in group["params"]] == [True]
    assert sum(len(group["params"]) for group in adamw_part.param_groups) == 4


def test_joined_equals_stepping_each_by_hand():
    model, optimizer = make()
    other = make()[0]
    by_hand = [
        torch.optim.Muon([other["hidden"].weight], lr=0.02, momentum=0.95, weight_decay=0.1),
        torch.optim.AdamW(
            [p for n, p in other.named_parameters() if n != "hidden.weight"],
            lr=0.003,
            betas=(0.9, 0.95),
            weight_decay=0.1,
        ),
    ]
    for seed in range(4):
        step(model, optimizer, seed)
        step(other, Joined(by_hand), seed)
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), other.parameters(), strict=True))


def test_a_scheduler_moves_both_parts_also_after_loading_a_state():
    model, optimizer = make()
    schedule = warmup(optimizer, warmup_steps=4)
    step(model, optimizer, 0)
    schedule.step()
    copy, restored = make()
    second = warmup(restored, warmup_steps=4)
    restored.load_state_dict(copying.deepcopy(optimizer.state_dict()))
    copy.load_state_dict(model.state_dict())
    second.load_state_dict(schedule.state_dict())
    for seed in range(1, 4):
        step(model, optimizer, seed)
        schedule.step()
        step(copy, restored, seed)
        second.step()
    assert [o.param_groups[0]["lr"] for o in restored.optimizers] == [0.02, 0.003]
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), copy.parameters(), strict=True))


def test_a_model_of_vectors_alone_gets_adamw():
    assert isinstance(muon([("bias", nn.Parameter(torch.zeros(3)))], lr=0.1), torch.optim.AdamW)
