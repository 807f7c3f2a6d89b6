"""Strategies distribute an engine's module over the ranks.

This module has `Strategy` (one process) and `DDP`; `fsdp` has FSDP.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.optim import Optimizer

from runner.engines.forward import FlaggedLossModule, Forward, LossModule, Number, Output, is_readable
from runner.utils import distributed
from runner.utils.distributed.coordinator import Coordinator

_NO_CONTEXT = contextlib.nullcontext()
_EARLIER_NAMES = {  # of methods and attributes that a user's strategy may define
    "can_make_up": "can_shadow",
    "clear": "reset_step",
    "exchange_weight": "all_reduce_weight",
    "fitted": "to_local",
    "fitted_optimizer": "optimizer_to_local",
    "gathered": "unsharded",
    "is_true": "all_ranks_true",
    "join": "attach_coordinator",
    "make_up": "shadow_step",
    "place": "shard",
    "say_fault": "post_fault",
    "settle": "finish_exchange",
    "weighs": "weights_losses",
    "whole": "to_full",
    "wrap": "wrap_forward",
}


class Strategy:
    """One process: nothing is exchanged.

    Base class of `DDP`, `FSDP` and of a user's own strategy. A strategy of your own is a subclass, chosen by
    `distributed.strategy._target_`. One object serves one engine. It may override any method below; the defaults are
    right for a module that is not distributed. The order of calls:

    1. Building: `attach_coordinator`; then `shard(module)`, after all optimizations were applied to the module
       (freezing, replaced and added modules, compilation and recomputation by block) and before the optimizer is made
       of its parameters; then `check_optimizer(optimizer)`. The EMA copies the sharded weights. `wrap_forward` is last
       and outermost.
    2. Each micro-step: `micro_step(is_last, weight)` returns the context of forward and backward. The callable that
       `wrap_forward` returned is called in it. `leaves` is called before a backward whose weight may be 0. After the
       backward of the last micro-step comes `all_reduce_weight`.
    3. The end of each step: `norm` if gradients are clipped, else `all_ranks_true` if they are checked; `mean_weight`
       if the losses are weighted; `clip` or `scale`; `finish_exchange`; then the optimizer's step; `reset_step`. A
       discarded step ends with `reset_step` too.
    4. A rank that can't complete a step calls `shadow_step` and `finish_exchange`, if `can_shadow` is true.
    5. Evaluation: `sync_buffers` before it; `unsharded` around a user's report.
    6. Checkpoints and exports: `to_full` when saving; `to_local` and `optimizer_to_local` when loading.

    All ranks make the same calls in the same order, so each method may use collectives.

    Attributes:
        is_sharded: each rank holds a part of every weight.
        weights_losses: the wrapped forward multiplies the loss by the weight that `micro_step` was called with.
        can_shadow: this rank can join the all-reduce of a step that it can't complete.
        coordinator: exchanges messages between the ranks; None on one process.
        name: name of the engine, used in messages.
        carries_flag: this engine's all-reduce also reduces the coordinator's flag; true for the last one of the engines
            that are updated together.
        weight: sum of the factors of this rank's weighted losses in this step; None if losses are not weighted.
    """

    is_sharded = False
    weights_losses = False
    can_shadow = False
    coordinator: Coordinator | None = None
    name = ""
    carries_flag = False
    weight: Number | None = None
    _has_sparse_gradients = False  # `get_total_norm` does not support them

    def __init_subclass__(cls) -> None:
        """Refuses the earlier name of a method, which nothing would call."""
        super().__init_subclass__()
        renamed = [f"{old} is {new} now" for old, new in _EARLIER_NAMES.items() if old in vars(cls)]
        if renamed:
            raise TypeError(f"{cls.__qualname__}: methods of a strategy were renamed: {', '.join(renamed)}")

    @property
    def is_distributed(self) -> bool:
        """True for every subclass: gradients are exchanged between ranks."""
        return type(self) is not Strategy

    def attach_coordinator(self, coordinator: Coordinator, name: str, carries_flag: bool) -> None:
        """Sets the coordinator and the engine's name.

        `carries_flag` is true for one engine of a run: its all-reduce also reduces the coordinator's flag.
        """
        self.coordinator, self.name, self.carries_flag = coordinator, name, carries_flag

    def post_fault(self, fault: str) -> None:
        """Reports a fault of this rank's part of a step to the other ranks."""
        if self.coordinator is not None:
            self.coordinator.post("fault", (self.name, fault))

    def shard(self, module: nn.Module) -> None:
        """Distributes a module's weights, in place; called before the optimizer is made."""

    def check_optimizer(self, optimizer: Any) -> None:
        """Checks that an optimizer can update the distributed weights.

        Raises ValueError if not.
        """

    def wrap_forward(self, loss_module: LossModule, check_loss: Callable[[Output], None] | None) -> Forward:
        """Returns the forward used in training; called once, when the engine is made.

        Args:
            loss_module: called with a batch, it returns an `Output`.
            check_loss: to be called with each output before its loss is exchanged; None if losses are not checked.
        """
        return loss_module.forward  # faster than the call of a module; no hooks are registered on this one

    def micro_step(self, is_last: bool, weight: float = 1.0) -> contextlib.AbstractContextManager[Any]:
        """Returns a context for forward and backward of a micro-step.

        Args:
            is_last: the last micro-step of a step, in which gradients are exchanged.
            weight: weight of this rank's batch, relative to a mean of 1 over the ranks.
        """
        return _NO_CONTEXT

    def all_reduce_weight(self) -> None:
        """Sums `weight` over the ranks, if no other all-reduce of the step does."""

    def mean_weight(self, scale: Tensor | None) -> Number:
        """Returns the mean of `weight` over the ranks.

        Dividing gradients by it gives those of the mean of all terms.

        Args:
            scale: the loss scale (0-d) that losses were multiplied by; None without a loss scaler.
        """
        assert self.weight is not None
        return self.weight

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Returns the total norm (0-d) of all gradients on all ranks."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if are_alike(grads):
            with torch.no_grad():  # the operations of `get_total_norm`, which first groups and checks tensors
                return torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        if not self._has_sparse_gradients:
            try:
                return nn.utils.get_total_norm(grads)
            except NotImplementedError:
                self._has_sparse_gradients = any(grad.is_sparse for grad in grads)
                if not self._has_sparse_gradients:
                    raise
        # `coalesce` sums the rows that occur several times in a batch.
        return nn.utils.get_total_norm([grad.coalesce().values() if grad.is_sparse else grad for grad in grads])

    def clip(self, parameters: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
        """Scales gradients, whose total norm is `norm`, down to `max_norm`."""
        grads = [p.grad for p in parameters if p.grad is not None]
        if are_alike(grads):
            clip_alike(grads, max_norm, norm)
        else:
            nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)

    def scale(self, parameters: Sequence[Tensor], factor: Number) -> None:
        """Multiplies all gradients by a factor."""
        scale_gradients([p.grad for p in parameters if p.grad is not None], factor)

    def leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the leaf tensors for which backward computes this rank's gradients."""
        return parameters

    def all_ranks_true(self, value: bool) -> bool:
        """Returns whether the value is true on every rank."""
        return value

    def finish_exchange(self) -> None:
        """Completes the exchanges of a step, before the ranks decide whether to update."""

    def reset_step(self) -> None:
        """Clears the values that a step has stored in this object."""
        self.weight = None

    def shadow_step(self) -> None:
        """Joins the pending all-reduce of a step with zero gradients and the flag set."""

    def sync_buffers(self, module: nn.Module) -> None:
        """Broadcasts the buffers of rank zero."""
        for buffer in module.buffers() if distributed.is_distributed() else ():
            dist.broadcast(buffer, 0)

    def unsharded(self) -> contextlib.AbstractContextManager[Any]:
        """Returns a context for methods of the module other than its forward.

        All ranks must enter it.
        """
        return contextlib.nullcontext()

    def to_full(self, state: Any) -> Any:
        """Returns a state with full instead of sharded tensors, on every rank."""
        return state

    def to_local(self, weights: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
        """Returns full weights sharded as those of the module."""
        return weights

    def optimizer_to_local(self, state: Mapping[str, Any], optimizer: Optimizer) -> Mapping[str, Any]:
        """Returns the full state of an optimizer sharded as its parameters."""
        return state


def are_alike(gradients: Sequence[Tensor]) -> bool:
    """Returns whether gradients are dense tensors of torch's own, of one dtype and on one device, and there are any."""
    if not gradients or gradients[0].device.type not in ("cpu", "cuda"):
        return False
    device, dtype = gradients[0].device, gradients[0].dtype
    return all(
        type(g) is Tensor and g.dtype is dtype and g.device == device and g.layout is torch.strided for g in gradients
    )


@torch.no_grad()
def clip_alike(gradients: list[Tensor], max_norm: float, norm: Tensor) -> None:
    """Scales gradients that are alike down to `max_norm`, by the operations of `clip_grads_with_norm_`."""
    factor = torch.clamp(max_norm / (norm + 1e-6), max=1.0)
    # Where that needs no wait for a device, a pass over the gradients is spared if it would multiply by 1.
    if not is_readable(factor) or factor.item() != 1.0:
        torch._foreach_mul_(gradients, factor)


def scale_gradients(gradients: list[Tensor], factor: Number) -> None:
    """Multiplies gradients, on whichever devices, by a factor."""
    if not isinstance(factor, Tensor):
        torch._foreach_mul_(gradients, factor)
        return
    for device in {gradient.device for gradient in gradients}:
        torch._foreach_mul_([gradient for gradient in gradients if gradient.device == device], factor.to(device))


# Torch 2.13 renamed the argument, and warns of the older name.
_BROADCAST_KEY = next(
    key
    for key in ("forward_sync_buffers", "broadcast_buffers")
    if key in inspect.signature(nn.parallel.DistributedDataParallel).parameters
)


class DDP(Strategy):
    """Each rank holds all weights; gradients are averaged during backward.

    Args:
        bucket_cap_mb: size of a bucket of gradients that are reduced together, in 2^20 bytes.
        find_unused_parameters: for a forward that does not use every parameter each time; costs a walk of the graph.
        static_graph: the graph is the same at each step; a rank that fails can then not release the others.
        broadcast_buffers: each forward begins with the buffers of rank zero.
        gradient_as_bucket_view: gradients are views of the buckets: less memory, no copy.
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
            _BROADCAST_KEY: broadcast_buffers,
            "gradient_as_bucket_view": gradient_as_bucket_view,
        }
        self.can_shadow = not static_graph
        self._module: nn.parallel.DistributedDataParallel | None = None
        self._loss_module: FlaggedLossModule | None = None
        self._mean_weight: Tensor | None = None  # if the flag can't carry weights: no parameter is fp32 or fp64
        self._is_weighted = False
        self._has_run_forward = False

    def shard(self, module: nn.Module) -> None:
        """Leaves the weights as they are, the same on every rank.

        Raises:
            ValueError: the forward changes weights, differently on each rank.
        """
        refuse_renormalized(module)

    def wrap_forward(self, loss_module: LossModule, check_loss: Callable[[Output], None] | None) -> Forward:
        """Returns the forward used in training.

        It runs DDP, unless there is one process or nothing to train.
        """
        if not distributed.is_distributed() or not any(p.requires_grad for p in loss_module.parameters()):
            return super().wrap_forward(loss_module, check_loss)
        self._loss_module = FlaggedLossModule(loss_module, self._is_flag_set, check_loss)
        self._module = nn.parallel.DistributedDataParallel(self._loss_module, **self._settings)
        self.weights_losses = True
        if not self._loss_module.carries_weight:
            self.can_shadow = False  # until it is known whether the weights need an all-reduce of their own
        return partial(self._forward, self._module, self._loss_module)

    def _is_flag_set(self) -> bool:
        return self.carries_flag and self.coordinator is not None and self.coordinator.has_messages

    def _forward(self, module: nn.Module, loss_module: FlaggedLossModule, batch: Any) -> Output:
        self._has_run_forward = True
        try:
            return module(batch)
        except RuntimeError as error:
            if "find_unused_parameters" not in str(error):
                raise
            self.can_shadow = False  # the all-reduce of the previous step never ended
            names = [name for name, p in loss_module.named_parameters() if p.requires_grad]
            match = re.search(r"did not receive grad for rank \d+: ([\d ]+)", str(error))
            indices = match[1].split() if match else ()
            unused = [names[int(index)].removeprefix("loss_module.module.") for index in indices] or ["some"]
            raise RuntimeError(
                f"the loss does not depend on parameters {', '.join(unused)}: "
                "freeze them, or set distributed.strategy.find_unused_parameters=true"
            ) from None

    def micro_step(self, is_last: bool, weight: float = 1.0) -> contextlib.AbstractContextManager[Any]:
        """Returns a context that exchanges gradients only in the last micro-step."""
        self._has_run_forward = False
        if self._loss_module is not None:
            self._loss_module.batch_weight = weight
        return _NO_CONTEXT if is_last or self._module is None else self._module.no_sync()

    def all_reduce_weight(self) -> None:
        """Sums `weight` over the ranks if the flag can't carry it (16-bit gradients)."""
        if self._loss_module is None or self._loss_module.carries_weight:
            return
        self.can_shadow = not self._settings["static_graph"]
        self._is_weighted = self.weight is not None
        if self.weight is not None:
            self._mean_weight = self._reduce(self._loss_module, self.weight)

    def _reduce(self, loss_module: FlaggedLossModule, weight: Number) -> Tensor:
        total = torch.zeros((), dtype=torch.float32, device=loss_module.flag.device) + weight
        dist.all_reduce(total)
        return total / distributed.world_size()

    def mean_weight(self, scale: Tensor | None) -> Number:
        if self._loss_module is None:
            return super().mean_weight(scale)
        if self._mean_weight is not None:
            return self._mean_weight
        assert self._loss_module.flag.grad is not None
        mean_weight = self._loss_module.flag.grad[1]
        return mean_weight if scale is None else mean_weight / scale

    def finish_exchange(self) -> None:
        """Hands the reduced flag to the coordinator."""
        if self._loss_module is not None and self.carries_flag and self.coordinator is not None:
            assert self._loss_module.flag.grad is not None
            self.coordinator.receive_flag(self._loss_module.flag.grad[:1])

    def reset_step(self) -> None:
        """Clears the gradient of the flag."""
        super().reset_step()
        self._mean_weight = None
        self._has_run_forward = False
        if self._loss_module is not None:
            self._loss_module.flag.grad = None

    def shadow_step(self) -> None:
        if self._module is None or self._loss_module is None:
            return
        syncs_buffers = self._module.require_forward_param_sync
        self._loss_module.is_shadowing = True
        # After a forward the buffers of this step were broadcast already.
        self._module.require_forward_param_sync = syncs_buffers and not self._has_run_forward
        try:
            self._module(None)[0].backward()
            if self._is_weighted:
                self._reduce(self._loss_module, 0.0)
        finally:
            self._loss_module.is_shadowing = False
            self._module.require_forward_param_sync = syncs_buffers


def refuse_renormalized(module: nn.Module) -> None:
    """Checks that no embedding renormalizes its rows in forward.

    Each rank would change other rows.

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
    """Returns a nest of mappings, lists and tuples with its tensors changed.

    Tied tensors stay tied.
    """
    changed_by_id: dict[int, Tensor] = {}

    def visit(node: Any) -> Any:
        if isinstance(node, Tensor):
            if id(node) not in changed_by_id:
                changed_by_id[id(node)] = change(node)
            return changed_by_id[id(node)]
        if isinstance(node, Mapping):
            changed: Any = copy.copy(node)  # some mappings have attributes beside their items
            for key, value in node.items():
                changed[key] = visit(value)
            return changed
        if type(node) in (list, tuple):
            return type(node)(visit(value) for value in node)
        return node

    return visit(state)
