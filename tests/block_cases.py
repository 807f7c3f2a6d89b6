"""Small models with blocks of every kind, and one training pass whose results are compared bit for bit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map

from runner.utils.wrapper import freeze

WIDTH = 8


class Mlp(nn.Module):
    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.wide, self.narrow, self.dropout = nn.Linear(WIDTH, 16), nn.Linear(16, WIDTH), nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.dropout(self.narrow(torch.tanh(self.wide(x))))


class Keyword(Mlp):
    def forward(self, *, x: Tensor, gate: Tensor | None = None, scale: float = 1.0) -> Tensor:  # type: ignore[override]
        mixed = super().forward(x) * scale
        return mixed if gate is None else mixed * gate


class Nested(Mlp):
    def forward(self, given: dict[str, Any]) -> dict[str, Any]:  # type: ignore[override]
        x, (gate, other) = given["x"], given["rest"]
        return {"x": super().forward(x) * gate, "rest": (gate.sin(), other + x)}


class Several(Mlp):
    def forward(self, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:  # type: ignore[override]
        return super().forward(x * y.cos()), super().forward(y)


class Views(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).view(2, -1, WIDTH).transpose(0, 1).flatten(0, 1)


class Normed(Mlp):
    def __init__(self, momentum: float | None = 0.1) -> None:
        super().__init__()
        self.norm, self.other = nn.BatchNorm1d(WIDTH, momentum=momentum), nn.InstanceNorm1d(3, track_running_stats=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(super().forward(x))
        return self.other(x.view(-1, 3, WIDTH)).view(-1, WIDTH)


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(WIDTH, WIDTH, 2, dropout=0.5, batch_first=True)

    def forward(self, x: Tensor, state: Any = None) -> Any:
        return self.lstm(x, state)


class Attention(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        heads = super().forward(x).view(2, -1, 2, WIDTH // 2).transpose(1, 2)
        mixed = nn.functional.scaled_dot_product_attention(heads, heads, heads, dropout_p=0.3)
        return mixed.transpose(1, 2).reshape(-1, WIDTH)


class Model(nn.Module):
    def __init__(self, blocks: list[nn.Module], call: Callable[[nn.Module, Any], Any] | None = None) -> None:
        super().__init__()
        self.blocks, self.call = nn.ModuleList(blocks), call or (lambda block, x: block(x))

    def forward(self, x: Any) -> Any:
        for block in self.blocks:
            x = self.call(block, x)
        return x


def noise(*shape: int) -> Tensor:
    return torch.randn(*(shape or (6, WIDTH)))


def _looped() -> Model:
    block = Mlp(0.3)
    tied = Mlp(0.3)
    tied.wide.weight = block.wide.weight
    return Model([block, tied, Mlp()], lambda each, x: each(each(x)))


def _frozen() -> Model:
    model = Model([Mlp(0.1) for _ in range(3)])
    freeze(model, ["blocks.0.*", "blocks.2.wide.*"])
    return model


def _keyword_call(block: nn.Module, x: Any) -> Any:
    return block(x=x, gate=torch.rand_like(x), scale=0.5)


def _lstm_call(block: nn.Module, x: Any) -> Any:
    out, state = block(x) if isinstance(x, Tensor) else block(x[0], x[1])
    return out, state


CASES: dict[str, tuple[Callable[[], Model], Callable[[], Any]]] = {
    "dropout": (lambda: Model([Mlp(0.5) for _ in range(4)]), noise),
    "keywords": (lambda: Model([Keyword(0.5) for _ in range(4)], _keyword_call), noise),
    "nested": (
        lambda: Model([Nested(0.2) for _ in range(4)]),
        lambda: {"x": noise().requires_grad_(), "rest": (noise().requires_grad_(), torch.ones(6, WIDTH))},
    ),
    "two gradient tensors": (
        lambda: Model([Several(0.2) for _ in range(4)], lambda block, pair: block(*pair)),
        lambda: (noise().requires_grad_(), noise().requires_grad_()),
    ),
    "inputs without gradient": (lambda: Model([Mlp(0.1), Mlp(0.1)]), noise),
    "transposed input": (lambda: Model([Mlp() for _ in range(3)], lambda b, x: b(x.T.contiguous().T)), noise),
    "tied and looped": (_looped, noise),
    "views": (lambda: Model([Views(0.1) for _ in range(3)]), noise),
    "lstm": (lambda: Model([Recurrent() for _ in range(3)], _lstm_call), lambda: noise(3, 5, WIDTH).requires_grad_()),
    "batch norm": (lambda: Model([Normed() for _ in range(3)]), noise),
    "cumulative batch norm": (lambda: Model([Normed(None) for _ in range(3)]), noise),
    "frozen": (_frozen, noise),
    "attention": (lambda: Model([Attention(0.1) for _ in range(3)]), noise),
}


def made(case: str, device: torch.device | str = "cpu") -> tuple[Model, Any]:
    """Returns a case's model and its input, the same numbers on every device."""
    torch.manual_seed(0)
    build, give = CASES[case]
    model, given = build(), give()
    return model.to(device), tree_map(lambda leaf: _moved(leaf, device), given)


def _moved(tensor: Tensor, device: torch.device | str) -> Tensor:
    return tensor.detach().to(device).requires_grad_(tensor.requires_grad)


def total(output: Any) -> Tensor:
    """Returns a loss that depends on every tensor of an output."""
    leaves = tree_leaves(output)
    return torch.stack([leaf.square().mean() for leaf in leaves if isinstance(leaf, Tensor)]).sum()


def learned(model: nn.Module, given: Any, dtype: torch.dtype | None = None, *, scale: float = 1.0) -> list[Tensor]:
    """Returns loss, gradients, buffers and the generators' states after one pass.

    Args:
        dtype: of autocast; None does without.
        scale: of the loss before backward, as a loss scaler does.
    """
    torch.manual_seed(1)
    inputs = [leaf for leaf in tree_leaves(given) if leaf.requires_grad]
    for each in (*model.parameters(), *inputs):
        each.grad = None
    device = next(model.parameters()).device
    with torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None):
        loss = total(model(given))
    (loss * scale).backward()
    grads = [torch.zeros(()) if each.grad is None else each.grad for each in (*model.parameters(), *inputs)]
    states = [torch.get_rng_state()]
    if device.type != "cpu":
        states.append(torch.get_device_module(device).get_rng_state())
    return [loss.detach(), *grads, *(buffer.clone() for buffer in model.buffers()), *states]


def skip_without_kernel(model: nn.Module, given: Any, dtype: torch.dtype | None) -> None:
    """Skips a test on a machine whose oneDNN has no kernel for the untouched module, as for an LSTM of bf16 on AVX2."""
    try:
        learned(copy.deepcopy(model), given, dtype)
    except RuntimeError as error:
        if "could not create a primitive descriptor" not in str(error):
            raise
        pytest.skip(f"the untouched module fails on this CPU too: {error}")


def assert_equal(one: list[Tensor], other: list[Tensor]) -> None:
    """Checks that two results are equal bit for bit; NaN is an error, since it could hide one."""
    assert len(one) == len(other)
    for mine, theirs in zip(one, other, strict=True):
        assert torch.equal(mine, theirs)
