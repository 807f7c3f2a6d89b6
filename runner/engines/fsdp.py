"""FSDP: shards an engine's module over the ranks with torch's FSDP2."""

from __future__ import annotations

import contextlib
import itertools
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

from runner.engines.forward import Forward, LossModule, Number, Output
from runner.engines.optim.optimizer_state import chained_optimizers
from runner.engines.strategies import Strategy, clip_alike, map_tensors, refuse_renormalized, scale_gradients
from runner.utils import distributed
from runner.utils.modules.selection import find_blocks

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_NEED_FULL_WEIGHTS = {  # libraries whose optimizers can't update sharded weights
    "prodigyopt": "it sums over all parameters, and would sum over one rank's parts of them",
    "dadaptation": "it sums over all parameters, and would sum over one rank's parts of them",
    "bitsandbytes": "its kernels don't know parts of weights",
}
_BLOCK_KEYS = ("param_dtype", "reduce_dtype", "output_dtype", "reshard_after_forward")


class FSDP(Strategy):
    """Each rank holds a part of every weight, gradient and optimizer state.

    A block's weights are gathered to run it.

    Args:
        blocks: modules gathered on their own: globs over their names, each with the settings in which it differs from
            the rest ({} for none); None selects the children of every outermost ModuleList or Sequential of two or
            more children of one class.
        reshard_after_forward: frees gathered weights after forward and gathers them again for backward.
        param_dtype: dtype of the gathered weights and so of the arithmetic: fp32, bf16, fp16; None keeps theirs.
        reduce_dtype: dtype in which gradients are reduced; None is that of the weights.
        output_dtype: dtype that the module's outputs, or those of a block with this key, are cast to; None keeps
            theirs. A block whose param_dtype differs from that of the rest returns the dtype of the rest.
        offload_to_cpu: keeps sharded weights on the CPU and moves them to the accelerator when they are needed.
        forward_methods: names of methods beside forward that use the module's weights, such as generate.
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
        self._settings: dict[str, Any] = {
            "param_dtype": param_dtype,
            "reduce_dtype": reduce_dtype,
            "output_dtype": output_dtype,
            "reshard_after_forward": reshard_after_forward,
        }
        for name, changes in (blocks or {}).items():
            if unknown := sorted(set(changes) - set(_BLOCK_KEYS)):
                raise ValueError(f"blocks.{name}.{unknown[0]}: no such key; there are: {', '.join(_BLOCK_KEYS)}")
        for settings in (self._settings, *(blocks or {}).values()):
            for key in _BLOCK_KEYS[:3]:
                if settings.get(key) not in (None, *_DTYPES):
                    raise ValueError(f"{key}={settings[key]!r}: expected one of {', '.join(_DTYPES)}, or null")
        self._blocks, self._offloads, self._methods = blocks, offload_to_cpu, forward_methods
        self._module: Any = None
        self._has_reduced_flag = False
        self._is_first_micro_step = True
        self._reduces_gradients = True  # in the micro-step, as torch's default is
        self._mean_weight: Tensor | None = None

    def shard(self, module: nn.Module) -> None:
        """Shards a module's weights in place, with the values of rank zero."""
        if not distributed.is_distributed():
            return
        refuse_renormalized(module)
        found = find_blocks(module, None if self._blocks is None else list(self._blocks))
        _refuse_ties(module, [name for blocks in found.values() for name in blocks])
        for tensor in (*module.parameters(), *module.buffers()):
            dist.broadcast(tensor.detach(), 0)
        first = next(module.parameters(), None)
        if self._offloads and first is not None and first.device.type == "cpu":
            raise ValueError(
                "offload_to_cpu=true: parts lie in host memory: expected an accelerator to move them to, "
                "found the cpu; set it to false"
            )
        mesh = init_device_mesh(first.device.type if first is not None else "cpu", (distributed.world_size(),))
        for glob, blocks in found.items():
            settings = self._settings_of_block((self._blocks or {}).get(glob, {}), first)
            for block in blocks.values():
                fully_shard(block, mesh=mesh, **self._arguments(settings))
        # Weights outside of blocks stay gathered after forward: backward needs them first.
        self._module = fully_shard(module, mesh=mesh, **self._arguments({"reshard_after_forward": False}))
        for method in self._methods:
            if not hasattr(module, method):
                raise ValueError(f"forward_methods: {type(module).__name__} has no {method!r}")
            register_fsdp_forward_method(module, method)

    def _settings_of_block(self, changes: Mapping[str, Any], first: Tensor | None) -> dict[str, Any]:
        """Returns a block's settings; by default its outputs have the dtype of the rest."""
        outer_dtype = self._settings["param_dtype"]
        is_same = changes.get("param_dtype", outer_dtype) == outer_dtype
        if outer_dtype is None and first is not None:
            outer_dtype = next((name for name, dtype in _DTYPES.items() if dtype is first.dtype), None)
        return {"output_dtype": None if is_same else outer_dtype, **changes}

    def _arguments(self, changes: Mapping[str, Any]) -> dict[str, Any]:
        settings = self._settings | dict(changes)
        dtypes: dict[str, Any] = {key: _DTYPES.get(settings[key]) for key in _BLOCK_KEYS[:3]}
        return {
            "reshard_after_forward": settings["reshard_after_forward"],
            "mp_policy": MixedPrecisionPolicy(**dtypes),
            **({"offload_policy": CPUOffloadPolicy()} if self._offloads else {}),
        }

    def check_optimizer(self, optimizer: Any) -> None:
        """Checks that an optimizer updates sharded weights as it would update full ones.

        Raises:
            ValueError: naming the optimizer, and the reason why it does not.
        """
        for part in chained_optimizers(optimizer):
            reason = _NEED_FULL_WEIGHTS.get(type(part).__module__.partition(".")[0])
            if reason is not None and self._module is not None:
                raise ValueError(
                    f"{type(part).__name__} under FSDP: {reason}; choose distributed=ddp, or another optimizer"
                )

    def wrap_forward(self, loss_module: LossModule, check_loss: Callable[[Output], None] | None) -> Forward:
        """Returns the forward used in training; FSDP2 works by hooks on the module itself."""
        loss_module.explain_error = _explain_error
        if check_loss is None:
            return loss_module

        def forward(batch: Any) -> Any:
            output = loss_module(batch)
            check_loss(output)
            return output

        return forward

    def micro_step(self, is_last: bool, weight: float = 1.0) -> contextlib.AbstractContextManager[Any]:
        """Returns a context for a micro-step.

        Gradients are reduced only in the last of a step.
        """
        self._has_reduced_flag = False
        if self._module is not None:
            if is_last is not self._reduces_gradients:  # it walks over all modules
                self._module.set_requires_gradient_sync(is_last)
                self._reduces_gradients = is_last
            if self._is_first_micro_step:
                self.sync_buffers(self._module)
        self._is_first_micro_step = False
        return contextlib.nullcontext()

    def reset_step(self) -> None:
        super().reset_step()
        self._is_first_micro_step = True
        self._mean_weight = None

    def _all_reduce(self, number: Number) -> Tensor:
        """Returns the sum of a number over the ranks.

        The flag and the weight are reduced in the same collective.
        """
        coordinator = self.coordinator if self.carries_flag else None
        has_messages = coordinator is not None and coordinator.has_messages
        numbers = _stack([number, float(has_messages), 0.0 if self.weight is None else self.weight])
        if distributed.is_distributed():
            dist.all_reduce(numbers)
        if coordinator is not None and not self._has_reduced_flag:
            coordinator.receive_flag(numbers[1])
        self._has_reduced_flag = True
        self._mean_weight = numbers[2] / distributed.world_size()
        return numbers[0]

    def mean_weight(self, scale: Tensor | None) -> Number:
        """Returns the mean of `weight` over the ranks.

        If there was a norm, it was reduced together with that.
        """
        if self._mean_weight is None:
            self._all_reduce(0.0)
        assert self._mean_weight is not None
        return self._mean_weight

    def norm(self, parameters: Sequence[Tensor]) -> Tensor:
        local = nn.utils.get_total_norm(_local_grads(parameters))
        return self._all_reduce(local.to(parameters[0].device) ** 2).sqrt()

    def clip(self, parameters: Sequence[Tensor], max_norm: float, norm: Tensor) -> None:
        if grads := _local_grads(parameters):
            clip_alike(grads, max_norm, norm)

    def scale(self, parameters: Sequence[Tensor], factor: Number) -> None:
        scale_gradients(_local_grads(parameters), factor)

    def leaves(self, parameters: Sequence[Tensor]) -> Sequence[Tensor]:
        """Returns the gathered weights, whose name is private to torch.

        They stay the same tensors from the first gathering on.
        """
        if self._module is None:
            return parameters
        groups = itertools.chain.from_iterable(map(_param_groups, self._fsdp_modules()))
        return [p._unsharded_param for group in groups for p in group.fsdp_params if hasattr(p, "_unsharded_param")]

    def all_ranks_true(self, value: bool) -> bool:
        return self._all_reduce(float(not value)).item() == 0

    def finish_exchange(self) -> None:
        """Reduces the flag, unless the norm or the finite check has done so."""
        if self.carries_flag and not self._has_reduced_flag:
            self._all_reduce(0.0)

    @contextlib.contextmanager
    def unsharded(self) -> Iterator[None]:
        """Returns a context with all weights gathered, for methods other than forward.

        All ranks must enter it.
        """
        parts = [] if self._module is None else self._fsdp_modules()
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

    def _fsdp_modules(self) -> list[Any]:
        return [module for module in self._module.modules() if isinstance(module, FSDPModule)]

    def to_full(self, state: Any) -> Any:
        return map_tensors(state, lambda tensor: tensor.full_tensor() if isinstance(tensor, DTensor) else tensor)

    def to_local(self, weights: Mapping[str, Any], module: nn.Module) -> Mapping[str, Any]:
        sharded = module.state_dict()
        return {name: _shard_like(value, sharded.get(name)) for name, value in weights.items()}

    def optimizer_to_local(self, state: Mapping[str, Any], optimizer: Optimizer) -> Mapping[str, Any]:
        if chained := getattr(optimizer, "optimizers", None):
            pairs = zip(state["optimizers"], chained, strict=True)
            return {**state, "optimizers": [self.optimizer_to_local(full, part) for full, part in pairs]}
        parameters = [p for group in optimizer.param_groups for p in group["params"]]
        local_state = {}
        for index, values in state["state"].items():
            local_state[index] = {name: _shard_like(value, parameters[index]) for name, value in values.items()}
        return {**state, "state": local_state}


def _explain_error(error: RuntimeError) -> str | None:
    message = "a method other than forward used the module's weights: name it in distributed.strategy.forward_methods"
    return message if "mixed torch.Tensor and DTensor" in str(error) else None


def _refuse_ties(module: nn.Module, blocks: Sequence[str]) -> None:
    """Checks that no weight is tied across blocks: FSDP2 would untie it."""
    owners: dict[int, tuple[str, str]] = {}
    for name, parameter in module.named_parameters(remove_duplicate=False):
        block = next((block for block in blocks if name.startswith(block + ".")), "")
        other, first = owners.setdefault(id(parameter), (block, name))
        if other != block:
            raise ValueError(
                f"blocks: {first} and {name} are one weight, in two blocks; "
                "give both to one block, or leave both out of distributed.strategy.blocks"
            )


def _param_groups(module: Any) -> Sequence[Any]:
    """Returns torch's groups of parameters that a module gathers.

    Before torch 2.13 there is one or none.
    """
    state = module._get_fsdp_state()
    groups: Sequence[Any] | None = getattr(state, "_fsdp_param_groups", None)
    return groups if groups is not None else list(filter(None, [state._fsdp_param_group]))


def _stack(numbers: Sequence[Number]) -> Tensor:
    """Returns numbers as one float32 tensor: on the accelerator where one of them is, without a wait for it."""
    devices = [number.device for number in numbers if isinstance(number, Tensor) and number.device.type != "cpu"]
    if not devices:
        return torch.tensor([n.item() if isinstance(n, Tensor) else n for n in numbers], dtype=torch.float32)
    zero = torch.zeros((), dtype=torch.float32, device=devices[0])
    return torch.stack([n.to(zero) if isinstance(n, Tensor) else zero + n for n in numbers])


def _local_grads(parameters: Sequence[Tensor]) -> list[Tensor]:
    grads = [p.grad for p in parameters if p.grad is not None]
    return [grad.to_local() if isinstance(grad, DTensor) else grad for grad in grads]


def _shard_like(value: Any, like: Any) -> Any:
    """Returns a full tensor sharded like a DTensor of the same shape.

    Any other value as it is.
    """
    if not isinstance(like, DTensor) or not isinstance(value, Tensor) or value.shape != like.shape:
        return value
    sharded = distribute_tensor(value.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
    return sharded.requires_grad_(value.requires_grad)
