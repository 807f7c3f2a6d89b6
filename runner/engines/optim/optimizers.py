"""Optimizers that torch has only in parts, and a library's that are to be kept as torch's own are."""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from runner.utils.distributed import default_generator
from runner.utils.serialization import is_spread
from runner.utils.utils import derive_seed
from runner.utils.wrapper.float8 import import_torchao


class ChainedOptimizer(Optimizer):
    """Several optimizers over different parameters, stepped as one; their groups stand in one list."""

    def __init__(self, optimizers: Sequence[Optimizer]) -> None:
        self.optimizers = list(optimizers)
        super().__init__([{"params": group["params"]} for o in self.optimizers for group in o.param_groups], {})
        self._share_groups()

    def _share_groups(self) -> None:
        self.param_groups = [group for o in self.optimizers for group in o.param_groups]

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Steps each optimizer; a closure runs once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for optimizer in self.optimizers:
            optimizer.step()
        return loss

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Clears the gradients of all parameters."""
        for optimizer in self.optimizers:
            optimizer.zero_grad(set_to_none)

    def state_dict(self) -> dict[str, Any]:
        """Returns the state of each, in order."""
        return {"optimizers": [optimizer.state_dict() for optimizer in self.optimizers]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        for optimizer, state in zip(self.optimizers, state_dict["optimizers"], strict=True):
            optimizer.load_state_dict(state)
        self._share_groups()


class Muon(torch.optim.Muon):
    """Torch's, of matrices that are spread over the ranks: each is made whole in turn to be orthogonalized.

    Products of parts, which torch would add up in bf16, round to other updates than one process has.
    """

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the matrices; a closure runs once, before them."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        groups = self.param_groups
        try:
            for group in groups:
                for parameter in group["params"]:
                    if parameter.grad is not None:
                        self.param_groups = [{**group, "params": [parameter]}]
                        self._step_whole(parameter)
        finally:
            self.param_groups = groups
        return loss

    def _step_whole(self, parameter: Any) -> None:
        spread, state = parameter.grad, self.state[parameter]
        parameter.grad = _as_whole(spread)
        if "momentum_buffer" in state:
            state["momentum_buffer"] = _as_whole(state["momentum_buffer"])
        super().step()
        parameter.grad = spread
        state["momentum_buffer"] = state["momentum_buffer"].redistribute(placements=parameter.placements)


def _as_whole(spread: Any) -> Any:
    """Returns a DTensor that every rank has the whole of."""
    from torch.distributed.tensor import Replicate

    return spread.redistribute(placements=[Replicate()] * spread.device_mesh.ndim)


def muon(
    params: Iterable[tuple[str, Tensor]],
    *,
    lr: float,
    momentum: float = 0.95,
    weight_decay: float = 0.1,
    adamw_lr: float = 3e-3,
    adamw_betas: Sequence[float] = (0.9, 0.95),
    adamw_only: Sequence[str] = (),
) -> Optimizer:
    """Gives matrices to torch's Muon and all else to AdamW.

    Args:
        params: (name, parameter) pairs.
        adamw_only: globs over names: matrices, such as embeddings and heads, that AdamW takes all the same.
    Source: https://kellerjordan.github.io/posts/muon
    """
    matrices: list[tuple[str, Tensor]] = []
    rest: list[tuple[str, Tensor]] = []
    for name, parameter in params:
        is_hidden = parameter.ndim == 2 and not any(fnmatch.fnmatch(name, glob) for glob in adamw_only)
        (matrices if is_hidden else rest).append((name, parameter))
    optimizers: list[Optimizer] = []
    if matrices:
        kind = Muon if any(is_spread(parameter) for _, parameter in matrices) else torch.optim.Muon
        optimizers.append(kind(matrices, lr=lr, momentum=momentum, weight_decay=weight_decay))
    if rest:
        first, second = adamw_betas
        optimizers.append(torch.optim.AdamW(rest, lr=adamw_lr, betas=(first, second), weight_decay=weight_decay))
    return optimizers[0] if len(optimizers) == 1 else ChainedOptimizer(optimizers)


class TorchaoAdamW(Optimizer):
    """torchao's AdamW, which rounds bf16 weights stochastically: updates below a weight's last bit count on average.

    Around it, rates are floats as in any optimizer, a state is plain tensors, and what the rounding draws is a function
    of seed and step alone: the same after a resume, and on all ranks that hold the same weights.

    Args:
        params: parameters, or (name, parameter) pairs.
        stochastic_rounding: of weights in bf16; any others are updated in their own precision.
        seed: of the rounding.
        compile: fuses the update by torch.compile, once a shape; None does where the weights are on an accelerator.
    Raises:
        ImportError: torchao is not installed.
        ValueError: the moments can't be kept so.
    Source: https://arxiv.org/abs/2010.06192
    """

    _kind = "_AdamW"
    _packed_kind: tuple[str, str] | None = None  # module and class of the moments

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
        make = getattr(import_torchao("torchao.optim"), self._kind)
        self._packed: Any = None
        if self._packed_kind is not None:
            self._packed = getattr(import_torchao(self._packed_kind[0]), self._packed_kind[1])
        first, second = betas
        given = list(params)
        self._inner: Optimizer = make(
            given,
            lr=lr,
            betas=(first, second),
            eps=eps,
            weight_decay=weight_decay,
            bf16_stochastic_round=stochastic_rounding,
        )
        groups = self._inner.param_groups
        for group, each in zip(groups, given, strict=False):  # it has rounded them to float32
            group["lr"] = each.get("lr", lr) if isinstance(each, dict) else lr
        super().__init__([{"params": group["params"]} for group in groups], self._inner.defaults)
        self._share()
        parameters = [p for group in groups for p in group["params"]]
        if self._packed is not None and any(map(is_spread, parameters)):
            remedy = "choose distributed=ddp, or an optimizer with whole moments such as adamw_bf16"
            raise ValueError(f"{type(self).__name__} can't store moments that are spread over the ranks; {remedy}")
        self._devices = {p.device for p in parameters}
        self._compiles = any(device.type != "cpu" for device in self._devices) if compile is None else compile
        self._rounds = stochastic_rounding and any(p.dtype is torch.bfloat16 for p in parameters)
        self._seed, self._num_steps = seed, 0

    def _share(self) -> None:
        self.param_groups, self.state = self._inner.param_groups, self._inner.state

    def step(self, closure: Callable[[], float] | None = None) -> float | None:  # type: ignore[override]
        """Updates the parameters; a closure runs before that."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        self._num_steps += 1
        stance = contextlib.nullcontext() if self._compiles else torch.compiler.set_stance("force_eager")
        with self._rates_as_tensors(), self._drawing(), stance:
            self._inner.step()
        return loss

    @contextlib.contextmanager
    def _rates_as_tensors(self) -> Iterator[None]:
        """What torchao insists on, and what schedules and live changes would not keep up."""
        rates = [group["lr"] for group in self.param_groups]
        for group, rate in zip(self.param_groups, rates, strict=True):
            group["lr"] = torch.tensor(float(rate))
        try:
            yield
        finally:
            for group, rate in zip(self.param_groups, rates, strict=True):
                group["lr"] = rate

    @contextlib.contextmanager
    def _drawing(self) -> Iterator[None]:
        """Seeds what the rounding draws from, and leaves the generators as they were."""
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
        """Returns the state in torch's layout; a moment of a class of torchao's is a dict of what it is made of."""
        whole = self._inner.state_dict()
        state = {index: {n: self._flatten(v) for n, v in values.items()} for index, values in whole["state"].items()}
        return {**whole, "state": state, "num_steps": self._num_steps}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Takes back what `state_dict` gave."""
        state = {i: {n: self._unflatten(v) for n, v in values.items()} for i, values in state_dict["state"].items()}
        self._inner.load_state_dict({"state": state, "param_groups": state_dict["param_groups"]})
        self._num_steps = state_dict["num_steps"]
        self._share()

    def _flatten(self, value: Any) -> Any:
        if self._packed is None or not isinstance(value, self._packed):
            return value
        names, context = value.__tensor_flatten__()
        return {name: getattr(value, name) for name in names} | {"context": list(context)}

    def _unflatten(self, value: Any) -> Any:
        if not isinstance(value, Mapping):
            return value
        parts = {name: part for name, part in value.items() if name != "context"}
        return self._packed.__tensor_unflatten__(parts, value["context"])


class TorchaoAdamW8bit(TorchaoAdamW):
    """The same with its moments in 8 bits, blocks of 256 sharing a scale; small tensors (under 4096 elements) don't.

    Source: https://arxiv.org/abs/2110.02861
    """

    _kind = "AdamW8bit"
    _packed_kind = ("torchao.optim.subclass_8bit", "OptimState8bit")
