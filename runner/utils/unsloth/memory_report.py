"""Reports the memory of a training step by purpose.

Purposes are parameters, gradients, optimizer, block inputs and the rest.
"""

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from runner.utils.distributed.memory import format_mib, memory_range
from runner.utils.unsloth.blocks import UnslothReport


class StepReport:
    """Observes recomputed blocks in the first step of training: their calls, and the memory of the step on this rank.

    Use `forward` as a context around the first forward, call `gradients` after its backward, and `describe` after the
    optimizer's step.

    Args:
        blocks: the blocks that are recomputed in backward, which keep only their inputs.
    """

    def __init__(self, module: nn.Module, blocks: UnslothReport) -> None:
        self._module, self.blocks = module, blocks
        self._saved: dict[int, tuple[int, str]] = {}  # bytes, and shape with dtype, by memory address
        self._gradient_bytes = 0

    @contextlib.contextmanager
    def forward(self) -> Iterator[None]:
        """Records tensors saved outside of recomputed blocks; counts calls from here on, without an evaluation's."""
        for block in self.blocks.blocks.values():
            block.calls = 0

        def pack(tensor: Tensor) -> Tensor:
            found = memory_range(tensor)
            if found is not None and not (tensor.is_leaf and tensor.requires_grad):
                shape = f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"
                self._saved.setdefault(found[0], (found[1], shape))
            return tensor.detach()  # avoids a reference cycle of an output with its own graph

        try:
            with saved_tensors_hooks(pack, lambda tensor: tensor):
                yield
        finally:
            self.blocks.stop_counting()

    def check(self, is_last: bool) -> list[str]:
        """Checks that every block was called; returns those that still may be.

        Raises:
            ValueError: naming the blocks that were not called.
        """
        return self.blocks.check(is_last)

    def gradients(self) -> None:
        """Records the bytes of the gradients; call it after the last backward of the step."""
        self._gradient_bytes = _bytes(p.grad for p in self._module.parameters() if p.grad is not None)

    def describe(self, optimizer: Any) -> str:
        """Returns the table of the blocks and the memory of the step by purpose, after the optimizer's first step.

        One more line follows if the loss uses more memory than the blocks.
        """
        states = [state for part in getattr(optimizer, "optimizers", [optimizer]) for state in part.state.values()]
        blocks = self.blocks.blocks.values()
        input_addresses = set[int]().union(*(block.input_addresses for block in blocks))
        rest = [saved for address, saved in self._saved.items() if address not in input_addresses]
        rest_bytes = sum(num_bytes for num_bytes, _ in rest)
        largest_bytes, largest = max(rest, default=(0, "none"))
        block_bytes = max((block.spared_bytes // max(block.calls, 1) for block in blocks), default=0)
        parts = {
            "parameters": _bytes(self._module.parameters()),
            "gradients": self._gradient_bytes,
            "optimizer": _bytes(value for state in states for value in state.values()),
            "block inputs": self.blocks.input_bytes,
            "the block that is recomputed": block_bytes,
        }
        listed = ", ".join(f"{name} {format_mib(num_bytes)}" for name, num_bytes in parts.items())
        memory = f"Memory of a step: {listed}, the rest and the loss {format_mib(rest_bytes)} (largest: {largest})"
        report = f"{self.blocks.describe()}\n{memory}"
        if rest_bytes + largest_bytes <= block_bytes + self.blocks.input_bytes:
            return report
        return (
            f"{report}\nThe loss sets the peak, and no block does: what it keeps, with the gradient of the largest, is "
            "more than the blocks. If it is logits, runner.utils.losses.chunked_cross_entropy never holds them all"
        )


def _bytes(tensors: Iterable[Any]) -> int:
    """Returns the bytes of tensors, of a DTensor those of this rank.

    Other values are ignored.
    """
    local = [tensor.to_local() if hasattr(tensor, "to_local") else tensor for tensor in tensors]
    return sum(tensor.nbytes for tensor in local if isinstance(tensor, Tensor))
