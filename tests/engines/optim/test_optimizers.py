import copy as copying

import pytest
import torch
from chaos import find_difference
from torch import nn

from runner.engines.optim.optimizers import ChainedOptimizer, TorchaoAdamW, TorchaoAdamW8bit, muon
from runner.engines.optim.schedulers import warmup
from runner.utils import io


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
        step(other, ChainedOptimizer(by_hand), seed)
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


class Wide(nn.Module):
    """The first and last weights have 8-bit moments (4096 elements); the biases do not."""

    def __init__(self, dtype):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(32, 128), nn.Tanh(), nn.Linear(128, 32)).to(dtype)

    def train_once(self, optimizer, seed):
        generator = torch.Generator().manual_seed(seed)
        x = torch.randn(8, 32, generator=generator).to(self.layers[0].weight.dtype)
        (self.layers(x) - x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()


def make_wide(kind, dtype, **settings):
    torch.manual_seed(0)
    model = Wide(dtype)
    return model, kind(list(model.named_parameters()), **{"lr": 0.01, "betas": [0.9, 0.95], **settings})


def have_equal_weights(one, other):
    return all(torch.equal(a, b) for a, b in zip(one.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(("kind", "tolerance"), [(TorchaoAdamW, 1e-6), (TorchaoAdamW8bit, 0.02)])
def test_torchaos_adamw_moves_weights_as_torchs_does(kind, tolerance):
    model, optimizer = make_wide(kind, torch.float32)
    other, torchs = make_wide(torch.optim.AdamW, torch.float32)
    for seed in range(10):
        model.train_once(optimizer, seed)
        other.train_once(torchs, seed)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=tolerance)


@pytest.mark.parametrize("suffix", ["sft", "pt"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("kind", [TorchaoAdamW, TorchaoAdamW8bit])
def test_torchaos_adamw_goes_on_from_a_file_as_if_it_had_not_stopped(kind, dtype, suffix, tmp_path):
    model, optimizer = make_wide(kind, dtype)
    schedule = warmup(optimizer, warmup_steps=6)
    copy, restored = make_wide(kind, dtype)
    second = warmup(restored, warmup_steps=6)
    for seed in range(3):
        model.train_once(optimizer, seed)
        schedule.step()
    io.save([optimizer.state_dict(), model.state_dict()], tmp_path / f"state.{suffix}")
    state, weights = io.load(tmp_path / f"state.{suffix}")
    restored.load_state_dict(state)
    copy.load_state_dict(weights)
    second.load_state_dict(schedule.state_dict())
    for seed in range(3, 8):
        torch.manual_seed(seed)  # what others have drawn before is no matter
        model.train_once(optimizer, seed)
        copy.train_once(restored, seed)
        schedule.step()
        second.step()
    assert have_equal_weights(model, copy)
    assert restored.param_groups[0]["lr"] == 0.01
    moment = restored.state[copy.layers[0].weight]["exp_avg"]
    assert type(moment).__name__ == ("OptimState8bit" if kind is TorchaoAdamW8bit else "Tensor")


def bytes_of(value):
    if isinstance(value, dict):
        return sum(map(bytes_of, value.values()))
    return value.nbytes if isinstance(value, torch.Tensor) else 0


def test_a_state_of_8_bits_has_a_quarter_of_the_bytes():
    sizes = []
    for kind in (torch.optim.AdamW, TorchaoAdamW8bit):
        weight = nn.Parameter(torch.zeros(512, 512))
        weight.grad = torch.ones(512, 512)
        optimizer = kind([weight], lr=0.1)
        optimizer.step()
        sizes.append(bytes_of(optimizer.state_dict()["state"]))
    assert 0.25 < sizes[1] / sizes[0] < 0.26


def test_updates_below_the_last_bit_of_bf16_count_on_average():
    found = []
    for rounds in (False, True):
        weight = nn.Parameter(torch.ones(4096, dtype=torch.bfloat16))
        optimizer = TorchaoAdamW([weight], lr=1e-4, weight_decay=0.0, stochastic_rounding=rounds)
        for _ in range(20):
            weight.grad = torch.ones_like(weight)
            optimizer.step()
        found.append(weight.double().mean().item())
    assert found[0] == 1.0
    assert found[1] == pytest.approx(1 - 20 * 1e-4, abs=2e-4)


def test_the_rounding_depends_on_seed_and_step_alone_and_leaves_the_generators_alone():
    (one, first), (other, second), (third, reseeded) = (
        make_wide(TorchaoAdamW, torch.bfloat16, seed=seed) for seed in (1, 1, 2)
    )
    for seed in range(3):
        torch.manual_seed(seed)
        expected = torch.rand(3)
        torch.manual_seed(seed)
        one.train_once(first, seed)
        assert torch.equal(torch.rand(3), expected)
        torch.manual_seed(100 + seed)  # as other ranks do
        other.train_once(second, seed)
        third.train_once(reseeded, seed)
    assert have_equal_weights(one, other)
    assert not have_equal_weights(one, third)


def test_moments_in_8_bits_are_refused_where_weights_are_spread():
    class DTensor(torch.Tensor):
        pass

    spread = nn.Parameter(torch.zeros(4).as_subclass(DTensor))
    with pytest.raises(ValueError, match=r"TorchaoAdamW8bit can't store moments that are spread.*distributed=ddp"):
        TorchaoAdamW8bit([spread], lr=0.1)


@pytest.mark.slow
@pytest.mark.parametrize("choice", ["adamw8bit_torchao", "adamw_bf16"])
def test_a_cut_run_of_weights_in_bf16_is_the_same_run(project, choice):
    with (project.folder / "own.py").open("a") as own:
        own.write(
            "\n\nclass Half(Model):\n    def __init__(self):\n        super().__init__(1024)\n        self.bfloat16()\n"
            "\n    def forward(self, x, y):\n        return super().forward(x.bfloat16(), y.bfloat16())\n"
        )
    chosen = ["model._target_=own.Half", f"optimizer={choice}"]
    project.run(*chosen, "hydra.run.dir=whole")
    project.run(*chosen, "hydra.run.dir=cut", typed="lr 5e-3\nquit@5\n")
    project.run(*chosen, "hydra.run.dir=other", typed="lr 5e-3\n")
    project.run("resume=cut", "allow_targets=[own]")
    found = [
        {path.name: io.load(path) for path in (project.folder / name / "checkpoints/step_00000012").glob("*.saf*")}
        for name in ("other", "cut", "whole")
    ]
    assert find_difference(found[0], found[1]) is None
    assert find_difference(found[0], found[2]) is not None
    assert found[0]["model.safetensors"]["first.weight"].dtype is torch.bfloat16
