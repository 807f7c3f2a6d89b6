"""An engine's module sharded over the ranks: torch's FSDP2, block by block.

Must not import a config.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import (
    CPUOffloadPolicy,
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer

from runner.engines.forward import LossModule, Number, Output
from runner.engines.strategies import Forward, Strategy, map_tensors, refuse_renormalized, scale
from runner.utils import distributed
from runner.utils.modules.selection import find_blocks

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_WHOLE_ALONE = {  # libraries whose optimizers can't update parts of weights
    "prodigyopt": "it sums over all parameters, and would sum over one rank's parts of them",
    "dadaptation": "it sums over all parameters, and would sum over one rank's parts of them",
    "bitsandbytes": "its kernels don't know parts of weights",
}
_BY_BLOCK = ("param_dtype", "reduce_dtype", "output_dtype", "reshard_after_forward")


class FSDP(Strategy):
    """Each rank holds a part of every weight, gradient and optimizer state; a block's weights are gathered to run it.

    Args:
        blocks: modules gathered on their own: globs over their names, each with what it has otherwise than the rest
            ({} for nothing); None is every outermost ModuleList or Sequential of two or more children of one class.
        reshard_after_forward: weights are given up after forward and gathered again for backward.
        param_dtype: of the gathered weights, and so of the arithmetic: fp32, bf16, fp16; None leaves them.
        reduce_dtype: of gradients while they are exchanged; None is that of the weights.
        output_dtype: what the module's outputs, or those of a block that has this key, are cast to; None leaves them. A
            block of another param_dtype than the rest returns that of the rest.
        offload_to_cpu: parts lie on the CPU, and are moved to an accelerator where they are needed.
        forward_methods: of the module, beside forward, that use its weights, such as generate.
    """

    is_sharded = True

    def __init__(
        self,
        *,
        blocks: Mapping[str, Mapping[str, Any]] | None = None,
        reshard_after_forward: bool = True,
        param_dtype: str | None = None,
        reduce_dtype: str | None = None,
        output_dtype: str | None = None,
        offload_to_cpu: bool = False,
        forward_methods: Sequence[str] = (),
    ) -> None:
        own = (param_dtype, reduce_dtype, output_dtype, reshard_after_forward)
        self._settings: dict[str, Any] = dict(zip(_BY_BLOCK, own, strict=True))
        for name, changes in (blocks or {}).items():
            if unknown := sorted(set(changes) - set(_BY_BLOCK)):
                raise ValueError(f"blocks.{name}.{unknown[0]}: no such key; there are: {', '.join(_BY_BLOCK)}")
        for settings in (self._settings, *(blocks or {}).values()):
            for key in _BY_BLOCK[:3]:
                if settings.get(key) not in (None, *_DTYPES):
                    raise ValueError(f"{key}={settings[key]!r}: expected one of {', '.join(_DTYPES)}, or null")
        self._blocks, self._offloads, self._methods = blocks, offload_to_cpu, forward_methods
        self._globs = None if blocks is None else list(blocks)
        self._module: Any = None
        self._is_settled, self._is_first = False, True
        self._mean_weight: Tensor | None = None

    def shard(self, module: nn.Module) -> None:
        """Spreads a module's weights, in place, as they are on the leader."""
        if not distributed.is_distributed():
            return
        refuse_renormalized(module)
        found = find_blocks(module, self._globs)
        _refuse_ties(module, [name for blocks in found.values() for name in blocks])
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)
        first = next(module.parameters(), None)
        if self._offloads and first is not None and first.device.type == "cpu":
            reason = "expected an accelerator to move them to, found the cpu"
            raise ValueError(f"offload_to_cpu=true: parts lie in host memory: {reason}; set it to false")
        mesh = init_device_mesh(first.device.type if first is not None else "cpu", (distributed.world_size(),))
        for glob, blocks in found.items():
            settings = self._of_block((self._blocks or {}).get(glob, {}), first)
            for block in blocks.values():
                fully_shard(block, mesh=mesh, **self._arguments(settings))
        # What stands in no block stays gathered after forward: backward begins with it.
        self._module = fully_shard(module, mesh=mesh, **self._arguments({"reshard_after_forward": False}))
        for method in self._methods:
            if not hasattr(module, method):
                raise ValueError(f"forward_methods: {type(module).__name__} has no {method!r}")
            register_fsdp_forward_method(module, method)

    def _of_block(self, changes: Mapping[str, Any], first: Tensor | None) -> dict[str, Any]:
        """Returns what a block has otherwise: it returns the dtype that the rest computes in, unless that is given."""
        around = self._settings["param_dtype"]
        is_same = changes.get("param_dtype", around) == around
        if around is None and first is not None:
            around = next((name for name, dtype in _DTYPES.items() if dtype is first.dtype), None)
        return {"output_dtype": None if is_same else around, **changes}

    def _arguments(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        settings = self._settings | dict(changes)
        dtypes: dict[str, Any] = {key: _DTYPES.get(settings[key]) for key in _BY_BLOCK[:3]}
        return {
            "reshard_after_forward": settings["reshard_after_forward"],
            "mp_policy": MixedPrecisionPolicy(**dtypes),
            **({"offload_policy": CPUOffloadPolicy()} if self._offloads else {}),
        }

    def check_optimizer(self, optimizer: Any) -> None:
        """Checks that an optimizer updates parts of weights as it would the whole ones.

        Raises:
            ValueError: naming it, and why it does not.
        """
        for part in getattr(optimizer, "optimizers", None) or [optimizer]:
            reason = _WHOLE_ALONE.get(type(part).__module__.partition(".")[0])
            if reason is not None and self._module is not None:
                remedy = "choose distributed=ddp, or another optimizer"
                raise ValueError(f"{type(part).__name__} under FSDP: {reason}; {remedy}")

    def wrap_forward(self, loss_module: LossModule, look: Callable[[Output], None] | None) -> Forward:
        """Returns the forward to train with: the module itself does what is to be done."""
        loss_module.explain = _explain
        if look is None:
            return loss_module

        def forward(batch: Any) -> Any:
            output = loss_module(batch)
            look(output)
            return output

        return forward

    def micro_step(self, is_last: bool, weight: float = 1.0) -> contextlib.AbstractContextManager[Any]:
        """Returns what a micro-step runs in: gradients are exchanged in the last of a step alone."""
        self._is_settled = False
        if self._module is not None:
            self._module.set_requires_gradient_sync(is_last)
            if self._is_first:
                self.sync_buffers(self._module)
        self._is_first = False
        return contextlib.nullcontext()

    def reset_step(self) -> None:
        """Forgets what a step left behind."""
        super().reset_step()
        self._is_first, self._mean_weight = True, None

    def _sum(self, number: Tensor) -> Tensor:
        """Returns the sum of a number over the ranks; whether a flag was up, and the weights, come with it."""
        coordinator = self.coordinator if self.carries_flag else None
        is_raised = coordinator is not None and coordinator.has_messages
        weight: Number = 0.0 if self.weight is None else self.weight
        number = number.to(weight.device, torch.float32) if isinstance(weight, Tensor) else number.float()
        flag, total = torch.full_like(number, float(is_raised)), torch.zeros_like(number) + weight
        numbers = torch.stack([number, flag, total.float()])
        if distributed.is_distributed():
            dist.all_reduce(numbers)
        if coordinator is not None and not self._is_settled:
            coordinator.receive_flag(numbers[1])
        self._is_settled = True
        self._mean_weight = numbers[2] / distributed.world_size()
        return numbers[0]

    def mean_weight(self, scale: Tensor | None) -> Number:
        """Returns the mean over the ranks of `weight`, which came with the norm where there was one."""
        if self._mean_weight is None:
            self._sum(torch.zeros(()))
        assert self._mean_weight is not None
        return self._mean_weight

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        """Returns the norm (0-d) of all gradients on all ranks."""
        local = nn.utils.get_total_norm(_locals(parameters))
        return self._sum(local.to(parameters[0].device) ** 2).sqrt()

    def clip(self, parameters: Sequence[Tensor], largest: float, norm: Tensor) -> None:
        """Scales gradients of that norm down to the largest."""
        if grads := _locals(parameters):
            torch._foreach_mul_(grads, torch.clamp(largest / (norm + 1e-6), max=1.0))

    def scale(self, parameters: Sequence[Tensor], factor: Number) -> None:
        """Multiplies all gradients."""
        scale(_locals(parameters), factor)

    def leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the whole weights, which stay the same tensors once they were gathered: a name private to torch."""
        if self._module is None:
            return parameters
        groups = [group for part in self._parts() for group in _groups(part)]
        return [p._unsharded_param for group in groups for p in group.fsdp_params if hasattr(p, "_unsharded_param")]

    def is_true(self, of_mine: bool) -> bool:
        """Says whether it is true of the gradients of every rank."""
        return self._sum(torch.tensor(float(not of_mine))).item() == 0

    def finish_exchange(self) -> None:
        """Ends the exchanges of a step: without a norm the flags have one of their own."""
        if self.carries_flag and not self._is_settled:
            self._sum(torch.zeros(()))

    @contextlib.contextmanager
    def gathered(self) -> Iterator[None]:
        """Returns a context in which any method of the module may be called, on all ranks alike."""
        parts = [] if self._module is None else self._parts()
        for part in parts:
            part.set_reshard_after_forward(False, recurse=False)
            part.unshard()
        try:
            yield
        finally:
            for part in parts:
                part.reshard()
                is_block = part is not self._module
                part.set_reshard_after_forward(is_block and self._settings["reshard_after_forward"], recurse=False)

    def _parts(self) -> list[Any]:
        return [module for module in self._module.modules() if isinstance(module, FSDPModule)]

    def to_full(self, state: Any) -> Any:
        """Returns a state with its weights whole, on every rank."""
        return map_tensors(state, lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)

    def to_local(self, weights: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
        """Returns whole weights as this rank holds them."""
        own = module.state_dict()
        return {name: _fit(value, own.get(name)) for name, value in weights.items()}

    def optimizer_to_local(self, state: Mapping[str, Any], optimizer: Optimizer) -> Mapping[str, Any]:
        """Returns the whole state of an optimizer as this rank holds it."""
        if joined := getattr(optimizer, "optimizers", None):
            parts = zip(state["optimizers"], joined, strict=True)
            return {**state, "optimizers": [self.optimizer_to_local(part, own) for part, own in parts]}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        fitted = {
            index: {name: _fit(value, parameters[index]) for name, value in values.items()}
            for index, values in state["state"].items()
        }
        return {**state, "state": fitted}


def _explain(error: RuntimeError) -> str | None:
    if "mixed torch.Tensor and DTensor" not in str(error):
        return None
    return "a method other than forward used the module's weights: name it in distributed.strategy.forward_methods"


def _refuse_ties(module: nn.Module, blocks: Sequence[str]) -> None:
    """Checks that no weight is shared between two blocks, or a block and what stands in none: they come untied."""
    owners: dict[int, tuple[str, str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        block = next((each for each in blocks if name.startswith(each + ".")), "")
        other, first = owners.setdefault(id(parameter), (block, name))
        if other != block:
            remedy = "give both to one block, or leave both out of distributed.strategy.blocks"
            raise ValueError(f"blocks: {first} and {name} are one weight, in two blocks; {remedy}")


def _groups(part: Any) -> Sequence[Any]:
    """Returns the groups of weights that a part gathers; before torch 2.13 there is one or none."""
    state = part._get_fsdp_state()
    groups: Sequence[Any] | None = getattr(state, "_fsdp_param_groups", None)
    return groups if groups is not None else list(filter(None, [state._fsdp_param_group]))


def _locals(parameters: Sequence[Tensor]) -> list[Tensor]:
    """Returns this rank's part of each gradient."""
    grads = [p.grad for p in parameters if p.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


def _fit(value: Any, like: Any) -> Any:
    """Returns a whole tensor spread as another of its shape is."""
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    spread = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return spread.requires_grad_(value.requires_grad)
