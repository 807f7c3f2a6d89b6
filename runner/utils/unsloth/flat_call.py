"""Represents a call with any arguments as a function of its tensors alone.

Torch's checkpoint needs such a function.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_unflatten

from runner.utils.unsloth.rng_state import Generator, find_generators

_LEAVES = (Tensor, type(None), bool, int, float, str, torch.dtype)


class FlatCall:
    """One call of a function, as a callable of the tensors among its arguments.

    `tensors` lists the tensors, also those in nests and keywords, until the call has run. A tensor that occurs several
    times is listed once, since a function may test whether two of its arguments are the same.

    The first call with these tensors uses the original arguments, so that the function can append to a list of its
    caller. Later calls (recomputations) use copies of the nests. An error of the first call is stored in `error`
    instead of raised, because torch's checkpoint does not clean up after an error.
    """

    def __init__(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        self._function = function
        self._arguments: tuple[tuple[Any, ...], Mapping[str, Any]] | None = (args, kwargs)
        self.error: BaseException | None = None
        leaves = [*args, *kwargs.values()]
        keywords: list[str] | None = list(kwargs)
        indices = _tensor_indices(leaves)
        if len(indices) < len(leaves) and not all(isinstance(leaf, _LEAVES) for leaf in leaves):
            leaves, self._spec = tree_flatten((args, kwargs))
            indices, keywords = _tensor_indices(leaves), None
        tensors = [leaves[index] for index in indices]
        for index in indices:
            leaves[index] = None  # checkpoint decides which tensors are kept
        self._duplicates: Sequence[tuple[int, int]] = ()  # index of a repeated tensor, and of its first occurrence
        if len(tensors) > 1 and len(set(map(id, tensors))) < len(tensors):
            tensors, indices = self._remove_duplicates(tensors, indices)
        self.tensors: Sequence[Tensor] = tensors
        self._leaves, self._indices = leaves, indices
        self._keywords = keywords  # of the last leaves; None if the arguments were flattened

    @property
    def generators(self) -> list[Generator]:
        return [] if self._keywords is not None else find_generators(self._leaves)

    def __call__(self, *tensors: Tensor) -> Any:
        if self._arguments is not None:
            args, kwargs = self._arguments
            self._arguments, self.tensors = None, ()
            try:
                return self._function(*args, **kwargs)
            except BaseException as error:
                self.error = error
                return None
        self.tensors = tensors
        try:
            return self._recompute(tensors)
        finally:
            self.tensors = ()

    def _remove_duplicates(self, tensors: list[Tensor], indices: list[int]) -> tuple[list[Tensor], list[int]]:
        """Returns each tensor once, with its first index.

        Stores the other indices in `_duplicates`.
        """
        first_index: dict[int, int] = {}
        for tensor, index in zip(tensors, indices, strict=True):
            first_index.setdefault(id(tensor), index)
        firsts = [first_index[id(tensor)] for tensor in tensors]
        self._duplicates = [(index, first) for index, first in zip(indices, firsts, strict=True) if index != first]
        by_id = {id(tensor): tensor for tensor in tensors}  # in the order of the first occurrences
        return list(by_id.values()), list(first_index.values())

    def _recompute(self, tensors: Sequence[Tensor]) -> Any:
        leaves = list(self._leaves)
        for index, tensor in zip(self._indices, tensors, strict=False):
            leaves[index] = tensor
        for index, first in self._duplicates:
            leaves[index] = leaves[first]
        if self._keywords is None:
            args, kwargs = tree_unflatten(leaves, self._spec)
            return self._function(*args, **kwargs)
        num_args = len(leaves) - len(self._keywords)
        return self._function(*leaves[:num_args], **dict(zip(self._keywords, leaves[num_args:], strict=True)))


def _tensor_indices(leaves: Sequence[Any]) -> list[int]:
    return [index for index, leaf in enumerate(leaves) if isinstance(leaf, Tensor)]
