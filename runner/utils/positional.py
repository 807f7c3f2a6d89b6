"""A call of any function, with whatever arguments, as a function of its tensors alone. Imports torch, one sibling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from runner.utils.rng_state import Generator, find_generators

_LEAVES = (Tensor, type(None), bool, int, float, str, torch.dtype)


class Call:
    """One call of a function: `tensors` are what it was given, in nests and keywords too.

    Called with as many tensors it runs, the first time with the very arguments that were given, so that what the
    function puts into a list of its caller's is there; later with copies of these nests. An error of the first time is
    kept, not raised: what runs it is left whole.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._function = function
        self._given: tuple[tuple[Any, ...], Mapping[str, Any]] | None = (args, kwargs)
        self.error: BaseException | None = None
        values = [*args, *kwargs.values()]
        if all(isinstance(value, _LEAVES) for value in values):  # the ordinary call, without a walk through nests
            self._names: list[str] | None = list(kwargs)
            self._leaves = values
        else:
            self._names = None
            self._leaves, self._spec = tree_flatten((args, kwargs))
        self._places = [index for index, leaf in enumerate(self._leaves) if isinstance(leaf, Tensor)]
        self.tensors: Sequence[Tensor] = [self._leaves[index] for index in self._places]
        for index in self._places:
            self._leaves[index] = None  # it is for others to keep them

    @property
    def generators(self) -> list[Generator]:
        """The random generators among the arguments."""
        return [] if self._names is not None else find_generators(self._leaves)

    def __call__(self, *tensors: Tensor) -> Any:
        if self._given is not None:
            (args, kwargs), self._given, self.tensors = self._given, None, ()
            try:
                return self._function(*args, **kwargs)
            except BaseException as error:
                self.error = error
                return None
        leaves = list(self._leaves)
        for index, tensor in zip(self._places, tensors, strict=False):
            leaves[index] = tensor
        if self._names is None:
            args, kwargs = tree_unflatten(leaves, self._spec)
            return self._function(*args, **kwargs)
        num_args = len(leaves) - len(self._names)
        return self._function(*leaves[:num_args], **dict(zip(self._names, leaves[num_args:], strict=True)))
