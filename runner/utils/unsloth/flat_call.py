"""A call of any function, with whatever arguments, as a function of its tensors alone. Imports torch, one sibling."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from runner.utils.unsloth.rng_state import Generator, find_generators

_LEAVES = (Tensor, type(None), bool, int, float, str, torch.dtype)


class FlatCall:
    """One call of a function: `tensors` are what it was given, in nests and keywords too, until it has run.

    A tensor that was given several times is one of them, for a function may ask whether two of its arguments are the
    same.

    Called with as many tensors it runs, the first time with the very arguments that were given, so that what the
    function puts into a list of its caller's is there; later with copies of these nests. An error of the first time is
    kept, not raised: what runs it is left whole.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._function = function
        self._given: tuple[tuple[Any, ...], Mapping[str, Any]] | None = (args, kwargs)
        self.error: BaseException | None = None
        leaves = [*args, *kwargs.values()]
        names: list[str] | None = list(kwargs)
        places = _places(leaves)
        if len(places) < len(leaves) and not all(isinstance(leaf, _LEAVES) for leaf in leaves):
            leaves, self._spec = tree_flatten((args, kwargs))
            places, names = _places(leaves), None
        tensors = [leaves[place] for place in places]
        for place in places:
            leaves[place] = None  # it is for others to keep them
        self._repeats: Sequence[tuple[int, int]] = ()  # places, and those of the same tensors before
        if len(tensors) > 1 and len(set(map(id, tensors))) < len(tensors):
            tensors, places = self._take_repeats(tensors, places)
        self.tensors: Sequence[Tensor] = tensors
        self._leaves, self._places = leaves, places
        self._names = names  # of the last leaves, where these are no nests

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
        self.tensors = tensors
        try:
            return self._run_again(tensors)
        finally:
            self.tensors = ()

    def _take_repeats(self, tensors: list[Tensor], places: list[int]) -> tuple[list[Tensor], list[int]]:
        """Returns each tensor and its first place once; notes its other places."""
        first: dict[int, int] = {}
        for tensor, place in zip(tensors, places, strict=True):
            first.setdefault(id(tensor), place)
        named = list(zip(tensors, places, strict=True))
        self._repeats = [(place, first[id(tensor)]) for tensor, place in named if first[id(tensor)] != place]
        kept = [(tensor, place) for tensor, place in named if first[id(tensor)] == place]
        return [tensor for tensor, _ in kept], [place for _, place in kept]

    def _run_again(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self._leaves)
        for index, tensor in zip(self._places, tensors, strict=False):
            leaves[index] = tensor
        for index, source in self._repeats:
            leaves[index] = leaves[source]
        if self._names is None:
            args, kwargs = tree_unflatten(leaves, self._spec)
            return self._function(*args, **kwargs)
        num_args = len(leaves) - len(self._names)
        return self._function(*leaves[:num_args], **dict(zip(self._names, leaves[num_args:], strict=True)))


def _places(leaves: Sequence[Any]) -> list[int]:
    return [place for place, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
