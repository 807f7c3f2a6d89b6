"""A module with its feeder as one forward that returns a loss: what a wrapper for many processes is put around.

Must not import a config.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn

from runner.engines.forward import Feeder, Output, Reader


class First(Protocol):
    """What looks at an engine's first step."""

    def prepared(self) -> None: ...
    def updated(self) -> bool: ...


class Fed(nn.Module):
    """Calls feeder(module, batch) and reads its output.

    So a wrapper sees every tensor of the forward, a feeder sees the user's own module, and names stay the user's.
    """

    def __init__(self, module: nn.Module, feeder: Feeder, read: Reader) -> None:
        super().__init__()
        self.module = module
        self._run = lambda batch: read(feeder(module, batch))  # an attribute that is a module is slow
        self.explain: Callable[[RuntimeError], str | None] | None = None  # what an error is to be told as

    def look_once(self, context: AbstractContextManager[None]) -> None:
        """Has the next forward that is trained on run in a context."""
        run = self._run

        def look(batch: Any) -> Output:
            if not torch.is_grad_enabled():
                return run(batch)
            self._run = run
            with context:
                return run(batch)

        self._run = look

    def forward(self, batch: Any) -> Output:
        """Returns what the module makes of a batch."""
        try:
            return self._run(batch)
        except RuntimeError as error:
            if self.explain is not None and (said := self.explain(error)) is not None:
                raise RuntimeError(said) from error
            raise


class Flagged(nn.Module):
    """A `Fed` with a flag beside its loss: a parameter of one zero, whose gradient is 1 where the flag is up.

    It lies in a bucket among the other gradients, so that their exchange tells every rank whether one of them has its
    flag up. The loss is not changed by it, but counts `weight` times: the flag counts always. Where a parameter is of
    fp32 or fp64, the gradient of a second zero is the number of terms in weighted losses: bf16 would round it.

    Args:
        is_raised: asked in each forward whether this rank's flag is up.
        look: called with the output before that, where this rank is to look at its loss.
    """

    def __init__(self, fed: Fed, is_raised: Callable[[], bool], look: Callable[[Output], None] | None) -> None:
        super().__init__()
        self.fed = fed
        trained = [parameter for parameter in fed.parameters() if parameter.requires_grad]
        exact = next((each for dtype in _EXACT for each in trained if each.dtype is dtype), None)
        self.has_terms = exact is not None
        like = trained[0] if exact is None else exact
        self.flag = nn.Parameter(torch.zeros(1 + self.has_terms, device=like.device, dtype=like.dtype))
        self._trained = trained
        up = torch.zeros_like(self.flag.data)
        up[0] = 1
        self._values = torch.zeros_like(up), up
        self._is_raised, self._look = is_raised, look
        self.is_making_up, self.weight = False, 1.0

    def forward(self, batch: Any) -> Output:
        """Returns the same; while it is making up, a loss that gives every parameter a gradient of zeros."""
        if self.is_making_up:
            made_up = torch.stack([parameter.sum() * 0 for parameter in self._trained]).sum()
            return Output(made_up + torch.dot(self.flag, self._values[1]), {}, 0)
        output: Output = self.fed(batch)
        loss, weight = output.loss, output.weight
        if self._look is not None:
            self._look(output)
        if weight is None:
            loss = loss if self.weight == 1.0 else loss * self.weight
        elif self.has_terms:
            loss = loss + self.flag[1] * weight.factor
        return output._replace(loss=loss + torch.dot(self.flag, self._values[self._is_raised()]))


_EXACT = torch.float32, torch.float64
