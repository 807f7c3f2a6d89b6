"""How an engine's module lies over the ranks of a run: alone, replicated (DDP), or sharded (FSDP2).

A layout owns what the ranks exchange in a step. The order in which things go onto a module is settled: freeze and
what replaces or adds modules, compilation by block, recomputation by block; then `place`, before the optimizer is made
of the parameters; averages of the weights as placed; then `wrap`, outermost. Must not import a config.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.engines.forward import FlaggedLossModule, LossModule, Number, Output
from runner.utils import distributed
from runner.utils.distributed.coordinator import Coordinator

Forward = Callable[[Any], Output]


_NOTHING = contextlib.nullcontext()


class Strategy:
    """One process: nothing is exchanged. The other layouts start from it."""

    is_sharded = False  # each rank holds a part of every weight
    weighs = False  # its forward returns losses that count as they are to
    can_shadow = False  # a rank that can't make its share of a step can release the others from it
    _has_sparse_gradients = False  # of which torch has no norm
    coordinator: Coordinator | None = None
    name, carries_flag = "", False
    weight: Number | None = None  # what this rank's weighted losses of a step count for together

    def join(self, coordinator: Coordinator, name: str, carries_flag: bool) -> None:
        """Takes part in a coordinator under an engine's name; its flag rides on the exchanges of one engine."""
        self.coordinator, self.name, self.carries_flag = coordinator, name, carries_flag

    def post_fault(self, fault: str) -> None:
        """Tells the other ranks what is wrong with this one's share of a step."""
        if self.coordinator is not None:
            self.coordinator.post("fault", (self.name, fault))

    def shard(self, module: nn.Module) -> None:
        """Spreads a module's weights, in place: an optimizer is made of what they are then."""

    def check_optimizer(self, optimizer: Any) -> None:
        """Checks that an optimizer updates the weights as they lie."""

    def wrap_forward(self, loss_module: LossModule, look: Callable[[Output], None] | None) -> Forward:
        """Returns the forward to train with.

        Args:
            look: called with each output before its loss is exchanged.
        """
        return loss_module.forward  # the call of a module costs more, and nothing is hooked on this one

    def micro_step(self, is_last: bool, weight: float = 1.0) -> contextlib.AbstractContextManager[Any]:
        """Returns what a micro-step runs in: gradients are exchanged in the last of a step alone."""
        return _NOTHING

    def exchange_weight(self) -> None:
        """Adds up the weights of all ranks, where no other exchange of the step does."""

    def mean_weight(self, scale: Tensor | None) -> Number:
        """Returns the mean over the ranks of `weight`: the gradients of a step divided by it are those of all terms.

        Args:
            scale: what the losses were multiplied with by a scaler.
        """
        assert self.weight is not None
        return self.weight

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Returns the norm (0-d) of all gradients on all ranks."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if not self._has_sparse_gradients:
            try:
                return nn.utils.get_total_norm(grads)
            except NotImplementedError:
                self._has_sparse_gradients = any(grad.is_sparse for grad in grads)
                if not self._has_sparse_gradients:
                    raise
        # Rows that occur several times in a batch are added up first.
        return nn.utils.get_total_norm([grad.coalesce().values() if grad.is_sparse else grad for grad in grads])

    def clip(self, parameters: Sequence[Tensor], largest: float, norm: Tensor) -> None:
        """Scales gradients of that norm down to the largest."""
        nn.utils.clip_grads_with_norm_(parameters, largest, norm)

    def scale(self, parameters: Sequence[Tensor], factor: Number) -> None:
        """Multiplies all gradients."""
        scale([p.grad for p in parameters if p.grad is not None], factor)

    def leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the tensors that gradients of the parameters are first made for, on this rank."""
        return parameters

    def is_true(self, of_mine: bool) -> bool:
        """Says whether it is true of the gradients of every rank."""
        return of_mine

    def finish_exchange(self) -> None:
        """Ends the exchanges of a step, before it is known what to make of it."""

    def reset_step(self) -> None:
        """Forgets what a step left behind."""
        self.weight = None

    def shadow_step(self) -> None:
        """Takes part, with zeros and the flag up, in the exchange of a step that this rank can't make."""

    def sync_buffers(self, module: nn.Module) -> None:
        """Makes buffers on every rank those of the leader."""
        for buffer in module.buffers() if distributed.is_distributed() else ():
            dist.broadcast(buffer, 0)

    def gathered(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context in which any method of the module may be called, on all ranks alike."""
        return contextlib.nullcontext()

    def to_full(self, state: Any) -> Any:
        """Returns a state with its weights whole, on every rank."""
        return state

    def to_local(self, weights: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
        """Returns whole weights as this rank holds them."""
        return weights

    def optimizer_to_local(self, state: Mapping[str, Any], optimizer: Optimizer) -> Mapping[str, Any]:
        """Returns the whole state of an optimizer as this rank holds it."""
        return state


def scale(gradients: list[Tensor], factor: Number) -> None:
    """Multiplies gradients, wherever they lie."""
    if not isinstance(factor, Tensor):
        torch._foreach_mul_(gradients, factor)
        return
    by_device: dict[torch.device, list[Tensor]] = {}
    for gradient in gradients:
        by_device.setdefault(gradient.device, []).append(gradient)
    for device, group in by_device.items():
        torch._foreach_mul_(group, factor.to(device))


# Its name from torch 2.13 on, which warns of the older one.
_IS_RENAMED = "forward_sync_buffers" in inspect.signature(nn.parallel.DistributedDataParallel).parameters
_BROADCAST = "forward_sync_buffers" if _IS_RENAMED else "broadcast_buffers"


class DDP(Strategy):
    """Each rank has all weights; gradients are averaged while backward runs.

    Args:
        bucket_cap_mb: gradients that are exchanged at once, in 2^20 bytes.
        find_unused_parameters: for a forward that does not use every parameter each time; costs a walk of the graph.
        static_graph: the graph is the same at each step; a rank that fails can then not release the others.
        broadcast_buffers: each forward begins with the leader's buffers.
        gradient_as_bucket_view: gradients are views of what is exchanged: less memory, no copy.
    """

    def __init__(
        self,
        *,
        bucket_cap_mb: float = 25.0,
        find_unused_parameters: bool = False,
        static_graph: bool = False,
        broadcast_buffers: bool = True,
        gradient_as_bucket_view: bool = True,
    ) -> None:
        self._settings: dict[str, Any] = {
            "bucket_cap_mb": bucket_cap_mb,
            "find_unused_parameters": find_unused_parameters,
            "static_graph": static_graph,
            _BROADCAST: broadcast_buffers,
            "gradient_as_bucket_view": gradient_as_bucket_view,
        }
        self.can_shadow = not static_graph
        self._module: nn.parallel.DistributedDataParallel | None = None
        self._loss_module: nn.Module | None = None
        self._mean_weight: Tensor | None = None  # of a model without a parameter of fp32 or fp64
        self._is_weighted = False
        self._has_begun = False

    def shard(self, module: nn.Module) -> None:
        """Leaves the weights where they are, the same on every rank.

        Raises:
            ValueError: a forward would change them otherwise on each.
        """
        refuse_renormalized(module)

    def wrap_forward(self, loss_module: LossModule, look: Callable[[Output], None] | None) -> Forward:
        """Returns the forward to train with; without anything to train, the module's own."""
        if not distributed.is_distributed() or not any(p.requires_grad for p in loss_module.parameters()):
            return super().wrap_forward(loss_module, look)
        coordinator = self.coordinator if self.carries_flag else None
        self._loss_module = FlaggedLossModule(
            loss_module, bool if coordinator is None else lambda: coordinator.has_messages, look
        )
        self._module = nn.parallel.DistributedDataParallel(self._loss_module, **self._settings)
        self.weighs = True
        if not self._loss_module.has_terms:
            self.can_shadow = False  # until it is known whether weights have an exchange of their own
        return self._forward

    def _forward(self, batch: Any) -> Output:
        assert self._module is not None
        self._has_begun = True
        try:
            output: Output = self._module(batch)
        except RuntimeError as error:
            if "find_unused_parameters" not in str(error):
                raise
            assert self._loss_module is not None
            self.can_shadow = False  # the exchange of the step before never ended
            names = [name for name, p in self._loss_module.named_parameters() if p.requires_grad]
            found = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            unused = (
                [names[int(index)].removeprefix("loss_module.module.") for index in found[1].split()]
                if found
                else ["some"]
            )
            remedy = "freeze them, or set distributed.strategy.find_unused_parameters=true"
            raise RuntimeError(f"the loss does not depend on parameters {', '.join(unused)}: {remedy}") from None
        return output

    def micro_step(self, is_last: bool, weight: float = 1.0) -> contextlib.AbstractContextManager[Any]:
        """Returns what a micro-step runs in: gradients are exchanged in the last of a step alone."""
        self._has_begun = False
        if isinstance(self._loss_module, FlaggedLossModule):
            self._loss_module.weight = weight
        return contextlib.nullcontext() if is_last or self._module is None else self._module.no_sync()

    def exchange_weight(self) -> None:
        """Adds up the weights of all ranks, where the gradients of all are of 16 bits."""
        if not isinstance(self._loss_module, FlaggedLossModule) or self._loss_module.has_terms:
            return
        self.can_shadow = not self._settings["static_graph"]
        self._is_weighted = self.weight is not None
        if self.weight is not None:
            self._mean_weight = self._reduce(self.weight)

    def _reduce(self, weight: Number) -> Tensor:
        assert isinstance(self._loss_module, FlaggedLossModule)
        total = torch.zeros((), dtype=torch.float32, device=self._loss_module.flag.device) + weight
        dist.all_reduce(total)
        return total / distributed.world_size()

    def mean_weight(self, scale: Tensor | None) -> Number:
        """Returns the mean over the ranks of `weight`."""
        if not isinstance(self._loss_module, FlaggedLossModule):
            return super().mean_weight(scale)
        if self._mean_weight is not None:
            return self._mean_weight
        assert self._loss_module.flag.grad is not None
        total = self._loss_module.flag.grad[1]
        return total if scale is None else total / scale

    def finish_exchange(self) -> None:
        """Tells whether a flag was up."""
        if self._module is not None and self.carries_flag and self.coordinator is not None:
            assert isinstance(self._loss_module, FlaggedLossModule)
            assert self._loss_module.flag.grad is not None
            self.coordinator.receive_flag(self._loss_module.flag.grad[:1])

    def reset_step(self) -> None:
        """Forgets the gradient of the flag."""
        super().reset_step()
        self._mean_weight = None
        self._has_begun = False
        if isinstance(self._loss_module, FlaggedLossModule):
            self._loss_module.flag.grad = None

    def shadow_step(self) -> None:
        """Takes part, with zeros and the flag up, in the exchange of a step that this rank can't make."""
        if self._module is None:
            return
        assert isinstance(self._loss_module, FlaggedLossModule)
        syncs_buffers, self._loss_module.is_shadowing = self._module.require_forward_param_sync, True
        if self._has_begun:  # buffers were exchanged already
            self._module.require_forward_param_sync = False
        try:
            self._module(None)[0].backward()
            if self._is_weighted:
                self._reduce(0.0)
        finally:
            self._loss_module.is_shadowing, self._module.require_forward_param_sync = False, syncs_buffers


def refuse_renormalized(module: nn.Module) -> None:
    """Checks that no embedding shortens its rows in its forward: each rank would do it to those of its samples alone.

    Raises:
        ValueError: naming such an embedding.
    """
    for name, part in module.named_modules() if distributed.is_distributed() else ():
        if isinstance(part, (nn.Embedding, nn.EmbeddingBag)) and part.max_norm is not None:
            raise ValueError(
                f"{name}: max_norm={part.max_norm} shortens the rows of a rank's own samples alone, and the ranks' "
                "weights would differ; leave max_norm out, or train on one process (distributed=single)"
            )


def map_tensors(state: Any, change: Callable[[Tensor], Tensor]) -> Any:
    """Returns a nest of mappings, lists and tuples with its tensors changed; what is tied stays tied."""
    memo: dict[Any, Tensor] = {}

    def visit(node: Any) -> Any:
        if isinstance(node, Tensor):
            key = id(node)
            if key not in memo:
                memo[key] = change(node)
            return memo[key]
        if isinstance(node, Mapping):
            changed: Any = copy.copy(node)  # some kinds have more to them than their items
            for key, value in node.items():
                changed[key] = visit(value)
            return changed
        if type(node) in (list, tuple):
            return type(node)(visit(value) for value in node)
        return node

    return visit(state)
