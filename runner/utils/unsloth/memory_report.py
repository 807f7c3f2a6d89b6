"""What the memory of a step is made of: what lies there anyway, what blocks keep, and what the rest of a forward does.

Imports torch and siblings only.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from runner.utils.distributed.memory import mib, place_of
from runner.utils.unsloth import UnslothReport


class MemoryReport:
    """The bytes of one step by what they are for, on this process.

    Args:
        recomputed: the blocks that are recomputed, which keep their inputs alone.
    """

    def __init__(self, module: nn.Module, recomputed: UnslothReport) -> None:
        self._module, self._recomputed = module, recomputed
        self._kept: dict[int, tuple[int, str]] = {}
        self._gradient_bytes = self._optimizer_bytes = 0

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Looks at what autograd is given to keep in a forward, beside the insides of the blocks."""

        def pack(tensor: Tensor) -> Tensor:
            found = place_of(tensor)
            if found is not None and not (tensor.is_leaf and tensor.requires_grad):
                shape = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                self._kept.setdefault(found[0], (found[1], shape))
            return tensor.detach()  # an output that held itself would never be freed

        try:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
        finally:
            self._recomputed.stop_counting()

    def gradients(self) -> None:
        """Looks at the gradients, once they are all there."""
        self._gradient_bytes = _bytes(p.grad for p in self._module.parameters() if p.grad is not None)

    def optimizer(self, optimizer: Any) -> None:
        """Looks at an optimizer's state, after its first step."""
        parts = getattr(optimizer, "optimizers", [optimizer])
        self._optimizer_bytes = _bytes(
            each for part in parts for state in part.state.values() for each in state.values()
        )

    def describe(self) -> str:
        """Returns one line, and a second where the loss, and no block, sets the peak."""
        inputs = set[int]().union(*(block.input_places for block in self._recomputed.blocks.values()))
        rest = [found for place, found in self._kept.items() if place not in inputs]
        rest_bytes, (largest_bytes, largest) = sum(num_bytes for num_bytes, _ in rest), max(rest, default=(0, "none"))
        blocks = self._recomputed.blocks.values()
        in_a_block = max((block.spared_bytes // max(block.calls, 1) for block in blocks), default=0)
        parts = {
            "parameters": _bytes(self._module.parameters()), "gradients": self._gradient_bytes,
            "optimizer": self._optimizer_bytes, "block inputs": self._recomputed.input_bytes,
            "the block that is recomputed": in_a_block,
        }  # fmt: skip
        listed = ", ".join(f"{name} {mib(num_bytes)}" for name, num_bytes in parts.items())
        line = f"Memory of a step: {listed}, the rest and the loss {mib(rest_bytes)} (largest: {largest})"
        if rest_bytes + largest_bytes <= in_a_block + self._recomputed.input_bytes:
            return line
        return (
            f"{line}\nThe loss sets the peak, and no block does: what it keeps, with the gradient of the largest, is "
            "more than the blocks. If it is logits, runner.utils.losses.chunked_cross_entropy never holds them all"
        )


def _bytes(tensors: Iterable[Any]) -> int:
    """Returns the bytes that this process holds of tensors; other values count for nothing."""
    own = [each.to_local() if hasattr(each, "to_local") else each for each in tensors]
    return sum(each.nbytes for each in own if isinstance(each, torch.Tensor))
