"""One module with all that trains it: optimizer, scheduler, loss scaler, counters, and their state.

Must not import a config or another model's code: what it drives is any `nn.Module`.
"""

from __future__ import annotations

import contextlib
import fnmatch
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

_AUTOCAST = {"fp32": None, "bf16": torch.bfloat16, "fp16": torch.float16}

Feeder = Callable[[nn.Module, Any], Any]


def feed(module: nn.Module, batch: Any) -> Any:
    """Calls `module` with a mapping as keywords, a tuple or list as positions, anything else as it is."""
    if isinstance(batch, Mapping):
        return module(**batch)
    if isinstance(batch, (tuple, list)):
        return module(*batch)
    return module(batch)


def freeze(module: nn.Module, patterns: Sequence[str]) -> list[str]:
    """Freezes the parameters whose whole name matches one of the globs, and returns their names.

    Raises:
        ValueError: a pattern that matches nothing, with the names there are.
    """
    parameters = dict(module.named_parameters(remove_duplicate=False))
    frozen: list[str] = []
    for pattern in patterns:
        matched = fnmatch.filter(parameters, pattern)
        if not matched:
            raise ValueError(f"freeze: {pattern!r} matches no parameter; there are: {', '.join(parameters)}")
        frozen += matched
    for name in frozen:
        parameters[name].requires_grad_(False)
    return list(dict.fromkeys(frozen))


class Engine:
    """Trains one module: forward, backward, and a step after every `accumulate` of them.

    Args:
        module: any module whose forward returns a loss: a 0-d tensor; a mapping with `loss` (its other 0-d
            tensors become metrics, `tokens` counts for throughput); an object with `loss`; or nothing of
            these, while its modules keep `loss` attributes, which are added up.
        optimizer: over the parameters that are to be trained; None for a module that is only evaluated.
        scheduler: steps after each optimizer step that was taken.
        precision: fp32, bf16 or fp16 (autocast; fp16 with a loss scaler).
        accumulate: micro-steps a step; each loss counts for 1 / accumulate.
        clip_norm: largest norm of all gradients; 0 does not clip.
        feeder: called as feeder(module, batch) in place of the module.
    """

    def __init__(
        self,
        module: nn.Module,
        optimizer: Optimizer | None = None,
        scheduler: LRScheduler | None = None,
        *,
        precision: str = "fp32",
        accumulate: int = 1,
        clip_norm: float = 0.0,
        feeder: Feeder | None = None,
    ) -> None:
        if precision not in _AUTOCAST:
            raise ValueError(f"precision={precision!r}: expected one of {', '.join(_AUTOCAST)}")
        self.module = module
        self.optimizer = optimizer
        self.scheduler = scheduler
        self.accumulate = accumulate
        self.clip_norm = clip_norm
        self.steps = self.micro_steps = self.skipped_steps = self.tokens = 0
        self.grad_norm: Tensor | None = None
        self._feeder = feeder or feed
        first = next(module.parameters(), None)
        self.device = first.device if first is not None else torch.device("cpu")
        self._dtype = _AUTOCAST[precision]
        self._scaler = torch.amp.GradScaler(self.device.type) if precision == "fp16" and optimizer else None
        self._trained = [p for group in optimizer.param_groups for p in group["params"]] if optimizer else []
        self._configured_lrs = self._base_lrs()
        self._losses: list[Tensor] = []
        self._extras: list[dict[str, Tensor]] = []
        self.train()

    def micro_step(self, batch: Any) -> None:
        """Runs forward and backward on one batch, and the step when it is the last of the accumulated ones."""
        loss, extras = self.forward(batch)
        self._losses.append(loss.detach())
        if extras:
            self._extras.append({name: value.detach() for name, value in extras.items()})
        self.backward(loss)
        if self.optimizer is not None and self.micro_steps % self.accumulate == 0:
            self.step()

    def forward(self, batch: Any) -> tuple[Tensor, dict[str, Tensor]]:
        """Returns the loss (0-d) of a batch and the forward's other numbers (0-d each)."""
        if self._dtype is None:
            return self._read(self._feeder(self.module, batch))
        with torch.autocast(self.device.type, self._dtype):
            return self._read(self._feeder(self.module, batch))

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of loss / accumulate."""
        if self.accumulate > 1:
            loss = loss / self.accumulate
        if self._scaler is not None:
            loss = self._scaler.scale(loss)
        loss.backward()
        self.micro_steps += 1

    def step(self) -> bool:
        """Unscales, clips, updates, and clears the gradients; returns False where the scaler skipped the update."""
        assert self.optimizer is not None
        if self._scaler is not None:
            self._scaler.unscale_(self.optimizer)
        if self.clip_norm:
            self.grad_norm = nn.utils.clip_grad_norm_(self._trained, self.clip_norm)
        taken = self._update(self.optimizer)
        self.optimizer.zero_grad(set_to_none=True)
        if not taken:
            self.skipped_steps += 1
            return False
        self.steps += 1
        if self.scheduler is not None:
            self.scheduler.step()
        return True

    def _update(self, optimizer: Optimizer) -> bool:
        if self._scaler is None:
            optimizer.step()
            return True
        before = self._scaler.get_scale()
        self._scaler.step(optimizer)
        self._scaler.update()
        return self._scaler.get_scale() >= before

    def _read(self, output: Any) -> tuple[Tensor, dict[str, Tensor]]:
        if isinstance(output, Tensor) and output.numel() == 1:
            return (output.reshape(()) if output.ndim else output), {}
        if isinstance(output, Mapping) and "loss" in output:
            self.tokens += int(output.get("tokens", 0))
            extras = {
                str(name): value for name, value in output.items()
                if isinstance(value, Tensor) and value.ndim == 0 and name not in ("loss", "tokens")
            }  # fmt: skip
            return output["loss"], extras
        loss = getattr(output, "loss", None)
        if not isinstance(loss, Tensor):
            loss = self._collect_losses()
        if loss is None:
            raise TypeError(
                f"{type(self.module).__name__}.forward returned {_describe(output)}: expected a scalar loss, a mapping "
                "or object with `loss`, or `loss` attributes on its modules; or give a feeder that returns one of these"
            )
        return loss, {}

    def _collect_losses(self) -> Tensor | None:
        total: Tensor | None = None
        for module in self.module.modules():
            loss = vars(module).get("loss")
            if isinstance(loss, Tensor):
                total = loss if total is None else total + loss
                module.loss = None  # type: ignore[assignment]  # a stale one must not count twice
        return total

    def train(self) -> None:
        """Puts the module, and an optimizer that tells the two apart, into training mode."""
        self.module.train()
        getattr(self.optimizer, "train", _do_nothing)()

    def eval(self) -> None:
        """Puts the module, and an optimizer that tells the two apart, into evaluation mode."""
        self.module.eval()
        getattr(self.optimizer, "eval", _do_nothing)()

    @contextlib.contextmanager
    def evaluating(self) -> Any:
        """Evaluation mode, without gradients, for the length of a block."""
        self.eval()
        try:
            with torch.no_grad():
                yield self
        finally:
            self.train()

    def take_metrics(self) -> dict[str, float]:
        """Returns the means since the last call, the gradient norm and the learning rate of each group."""
        values: dict[str, float] = {}
        if self._losses:
            values["loss"] = _mean(self._losses)
        for name in self._extras[-1] if self._extras else ():
            values[name] = _mean([extras[name] for extras in self._extras if name in extras])
        self._losses, self._extras = [], []
        if self.grad_norm is not None:
            values["grad_norm"] = float(self.grad_norm)
        for index, group in enumerate(self.optimizer.param_groups if self.optimizer else ()):
            values[f"lr_{index}" if index else "lr"] = float(group["lr"])
        if self._scaler is not None:
            values["loss_scale"] = self._scaler.get_scale()
        return values

    def set_lr(self, lr: float) -> None:
        """Makes `lr` the base rate of the first group, scaling the others alike; the schedule goes on from it."""
        bases = self._base_lrs()
        for index, base in enumerate(bases):
            self._set_base_lr(index, lr if base == bases[0] else lr * base / bases[0])

    def _base_lrs(self) -> list[float]:
        return [float(g.get("initial_lr", g["lr"])) for g in self.optimizer.param_groups] if self.optimizer else []

    def _set_base_lr(self, index: int, lr: float) -> None:
        assert self.optimizer is not None
        group = self.optimizer.param_groups[index]
        base = float(group.get("initial_lr", group["lr"]))
        ratio = lr / base if base else 1.0
        group["lr"] = lr if group["lr"] == base else group["lr"] * ratio
        for key in group.keys() & {"max_lr", "min_lr"}:  # of torch's cyclic schedules
            group[key] *= ratio
        if self.scheduler is not None:
            group["initial_lr"] = lr
            self.scheduler.base_lrs[index] = lr

    def state_dict(self) -> dict[str, Any]:
        """Returns all but the weights: optimizer, scheduler, scaler, counters, and metrics not yet taken."""
        return {
            "optimizer": self.optimizer.state_dict() if self.optimizer else None,
            "scheduler": self.scheduler.state_dict() if self.scheduler else None,
            "scaler": self._scaler.state_dict() if self._scaler else None,
            "counters": {name: getattr(self, name) for name in ("steps", "micro_steps", "skipped_steps", "tokens")},
            "configured_lrs": self._configured_lrs,
            "grad_norm": None if self.grad_norm is None else self.grad_norm.detach().clone(),
            "losses": list(self._losses),
            "extras": list(self._extras),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Takes a state back, its tensors as its own; a learning rate changed in the config since then takes effect."""
        for name in ("optimizer", "scheduler", "scaler"):
            part = getattr(self, "_scaler" if name == "scaler" else name)
            if (part is None) != (state[name] is None):
                has, had = ("none", "one") if part is None else ("one", "none")
                raise ValueError(f"{name}: this engine has {has}, the saved state {had}; resume with the same config")
            if part is not None:
                part.load_state_dict(state[name])
        for name, value in state["counters"].items():
            setattr(self, name, value)
        for index, (new, old) in enumerate(zip(self._configured_lrs, state["configured_lrs"], strict=True)):
            if new != old:
                self._set_base_lr(index, new)
        self.grad_norm = state["grad_norm"]
        self._losses, self._extras = list(state["losses"]), list(state["extras"])
        self.train()


def _mean(values: Sequence[Tensor]) -> float:
    if len(values) == 1:
        return float(values[0])
    return sum(torch.stack([value.float() for value in values]).tolist()) / len(values)


def _do_nothing() -> None:
    return None


def _describe(output: Any) -> str:
    shape = getattr(output, "shape", None)
    return type(output).__name__ if shape is None else f"{type(output).__name__} of shape {list(shape)}"
