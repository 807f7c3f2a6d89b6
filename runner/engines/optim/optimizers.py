"""Optimizers: a chain of several, Muon for sharded matrices, torchao's AdamW."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from runner.utils.distributed import default_generator
from runner.utils.serialization import is_dtensor
from runner.utils.utils import derive_seed
from runner.utils.wrapper.float8 import import_torchao


class ChainedOptimizer(Optimizer):
    """Several optimizers over different parameters, stepped as one.

    `param_groups` lists the groups of all.
    """

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([{"params": group["params"]} for o in self.optimizers for group in o.param_groups], {})
        self._collect_groups()

    def _collect_groups(self) -> None:
        self.param_groups = [group for o in self.optimizers for group in o.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps each optimizer; a closure is called once, before that."""
        loss = _call_closure(closure)
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of each optimizer, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._collect_groups()


class Muon(torch.optim.Muon):
    """Torch's Muon for sharded matrices.

    Each is gathered in turn to be orthogonalized. Torch would multiply the shards and sum the products in bf16, which
    rounds differently than one process does.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the matrices; a closure is called once, before that."""
        loss = _call_closure(closure)
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.param_groups = [{**group, "params": [parameter]}]
                        self._step_full(parameter)
        finally:
            self.param_groups = groups
        return loss

    def _step_full(self, parameter: Any) -> None:
        sharded_grad, state = parameter.grad, self.state[parameter]
        parameter.grad = _gather(sharded_grad)
        if "momentum_buffer" in state:
            state["momentum_buffer"] = _gather(state["momentum_buffer"])
        super().step()
        parameter.grad = sharded_grad
        state["momentum_buffer"] = state["momentum_buffer"].redistribute(placements=parameter.placements)


def _gather(sharded: Any) -> Any:
    from torch.distributed.tensor import Replicate

    return sharded.redistribute(placements=[Replicate()] * sharded.device_mesh.ndim)


def _call_closure(closure: Callable[[], float] | None) -> float | None:
    if closure is None:
        return None
    with torch.enable_grad():
        return closure()


def muon(
    params: Iterable[Any],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    adamw_lr: float = 3e-3,
    adamw_betas: Sequence[float] = (0.9, 0.95),
    adamw_only: Sequence[str] = (),
) -> Optimizer:
    """Returns Muon for matrices and AdamW for other parameters, stepped as one.

    Args:
        params: (name, parameter) pairs, or groups of these with settings: each part takes the settings that it has.
        adamw_only: globs over names of matrices, such as embeddings and heads, that AdamW updates instead.
    Source: https://kellerjordan.github.io/posts/muon
    """
    params = list(params)
    groups = params if params and isinstance(params[0], dict) else [{"params": params}]
    matrices: list[dict[str, Any]] = []
    rest: list[dict[str, Any]] = []
    for group in groups:
        hidden: list[tuple[str, Tensor]] = []
        others: list[tuple[str, Tensor]] = []
        for name, parameter in group["params"]:
            is_hidden = parameter.ndim == 2 and not any(fnmatch.fnmatch(name, glob) for glob in adamw_only)
            (hidden if is_hidden else others).append((name, parameter))
        matrices += _without_settings({**group, "params": hidden}, ("betas", "eps")) if hidden else []
        rest += _without_settings({**group, "params": others}, ("momentum", "nesterov", "ns_steps")) if others else []
    optimizers: list[Optimizer] = []
    if matrices:
        is_sharded = any(is_dtensor(parameter) for group in matrices for _, parameter in group["params"])
        muon_class = Muon if is_sharded else torch.optim.Muon
        optimizers.append(muon_class(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay))
    if rest:
        first, second = adamw_betas
        optimizers.append(torch.optim.AdamW(rest, lr=adamw_lr, betas=(first, second), weight_decay=weight_decay))
    return optimizers[0] if len(optimizers) == 1 else ChainedOptimizer(optimizers)


def _without_settings(group: Mapping[str, Any], names: Sequence[str]) -> list[dict[str, Any]]:
    """Returns a group without the settings of another optimizer, in a list."""
    return [{name: value for name, value in group.items() if name not in names}]


class TorchaoAdamW(Optimizer):
    """Wraps torchao's AdamW, which rounds bf16 weights stochastically.

    Updates below the last bit count on average. The wrapper keeps rates as floats, as in any optimizer, and saves a
    state of plain tensors. The random numbers of the rounding depend on seed and step alone: they are the same after a
    resume, and on all ranks that hold the same weights.

    Args:
        params: parameters, or (name, parameter) pairs.
        stochastic_rounding: rounds bf16 weights stochastically; other weights are updated in their own precision.
        seed: of the rounding.
        compile: fuses the update with torch.compile, once a shape; None compiles if the weights are on an accelerator.
    Raises:
        ImportError: torchao is not installed.
        ValueError: 8-bit moments can't be stored for sharded weights.
    Source: https://arxiv.org/abs/2010.06192
    """

    _torchao_class = "_AdamW"
    _quantized_class: tuple[str, str] | None = None  # module and class of 8-bit moments

    def __init__(
        self,
        params: Iterable[Any],
        *,
        lr: float,
        betas: Sequence[float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        stochastic_rounding: bool = True,
        seed: int = 0,
        compile: bool | None = None,
    ) -> None:
        make = getattr(import_torchao("torchao.optim"), self._torchao_class)
        quantized = self._quantized_class
        self._quantized: Any = None if quantized is None else getattr(import_torchao(quantized[0]), quantized[1])
        first, second = betas
        param_list = list(params)
        self._inner: Optimizer = make(
            param_list,
            lr=lr,
            betas=(first, second),
            eps=eps,
            weight_decay=weight_decay,
            bf16_stochastic_round=stochastic_rounding,
        )
        groups = self._inner.param_groups
        for group, param in zip(groups, param_list, strict=False):  # torchao has rounded the rates to float32
            group["lr"] = param.get("lr", lr) if isinstance(param, dict) else lr
        super().__init__([{"params": group["params"]} for group in groups], self._inner.defaults)
        self._share_inner_state()
        parameters = [p for group in groups for p in group["params"]]
        if self._quantized is not None and any(map(is_dtensor, parameters)):
            raise ValueError(
                f"{type(self).__name__} can't store moments that are spread over the ranks; "
                "choose distributed=ddp, or an optimizer with whole moments such as adamw_bf16"
            )
        self._devices = {p.device for p in parameters}
        self._compiles = any(device.type != "cpu" for device in self._devices) if compile is None else compile
        self._rounds = stochastic_rounding and any(p.dtype is torch.bfloat16 for p in parameters)
        self._seed, self._num_steps = seed, 0

    def _share_inner_state(self) -> None:
        self.param_groups, self.state = self._inner.param_groups, self._inner.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters; a closure is called before that."""
        loss = _call_closure(closure)
        self._num_steps += 1
        stance = contextlib.nullcontext() if self._compiles else torch.compiler.set_stance("force_eager")
        with self._rates_as_tensors(), self._seeded(), stance:
            self._inner.step()
        return loss

    @contextlib.contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """Returns a context in which rates are tensors, as torchao requires.

        Outside of it they are floats, which schedulers and commands set.
        """
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(float(rate))
        try:
            yield
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    @contextlib.contextmanager
    def _seeded(self) -> Iterator[None]:
        """Returns a context with seeded generators for the rounding.

        Restores the generators afterwards.
        """
        generators = [default_generator(device) for device in self._devices] if self._rounds else []
        states = [generator.get_state() for generator in generators]
        for generator in generators:
            generator.manual_seed(derive_seed(self._seed, self._num_steps, -4))
        try:
            yield
        finally:
            for generator, state in zip(generators, states, strict=True):
                generator.set_state(state)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state in torch's layout.

        An 8-bit moment is a dict of the tensors that it consists of.
        """
        inner = self._inner.state_dict()
        return {**inner, "state": _map_values(self._flatten, inner["state"]), "num_steps": self._num_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        state = _map_values(self._unflatten, state_dict["state"])
        self._inner.load_state_dict({"state": state, "param_groups": state_dict["param_groups"]})
        self._num_steps = state_dict["num_steps"]
        self._share_inner_state()

    def _flatten(self, value: Any) -> Any:
        if self._quantized is None or not isinstance(value, self._quantized):
            return value
        names, context = value.__tensor_flatten__()
        return {name: getattr(value, name) for name in names} | {"context": list(context)}

    def _unflatten(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        parts = {name: part for name, part in value.items() if name != "context"}
        return self._quantized.__tensor_unflatten__(parts, value["context"])


def _map_values(change: Callable[[Any], Any], state: Mapping[int, Mapping[str, Any]]) -> dict[int, dict[str, Any]]:
    changed = {}
    for index, values in state.items():
        changed[index] = {name: change(value) for name, value in values.items()}
    return changed


class TorchaoAdamW8bit(TorchaoAdamW):
    """`TorchaoAdamW` with 8-bit moments: blocks of 256 share a scale.

    Tensors under 4096 elements stay unquantized.

    Source: https://arxiv.org/abs/2110.02861
    """

    _torchao_class = "AdamW8bit"
    _quantized_class = ("torchao.optim.subclass_8bit", "OptimState8bit")
