"""Copies of a state on the host, made while it is trained."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from itertools import groupby, islice
from typing import Any, NamedTuple

import torch
from torch import Tensor

from runner.utils.serialization.flatten import (
    SFT_DTYPES,
    FlattenedState,
    describe_stored,
    encode_sft_entries,
    order_in_file,
    to_contiguous,
    to_stored_dtype,
)
from runner.utils.serialization.template import ChangedError, Template

_Description = tuple[str, torch.dtype, Sequence[int]]  # name, dtype and shape of a tensor in a SafeTensors file
_GROUP_BYTES = 32 << 20  # of tensors that are copied together, while those copied before are written


class HostSnapshot(FlattenedState):
    """A flattened copy of a value with its tensors on the CPU; later changes of the value do not affect it.

    Args:
        copy_now: copies the tensors at once. Otherwise call `copy`; another thread may meanwhile wait for each tensor.
        reuse: an earlier snapshot that is no longer needed. Overwriting its memory is two to three times faster than
            allocating, and if only numbers and contents have changed, the value is not flattened again.
    """

    _template: Template | None  # None if the value must be flattened each time
    _memory: HostMemory  # for the tensors of the template, or all
    _positions: list[int]  # of these tensors in the template
    _groups: list[_Group]
    _sources: list[list[Tensor]]  # of each group

    def __init__(self, value: Any, copy_now: bool = True, reuse: HostSnapshot | None = None) -> None:
        if reuse is None or not self._repeat(value, reuse):
            super().__init__(value)
            self._template = Template.record(value, self)
            names = self.tensors if self._template is None else dict.fromkeys(self._template.names)
            leading = {name: self.tensors[name] for name in names}
            self._memory = HostMemory(leading, None if reuse is None else reuse._memory.buffer)
            self._positions = self._template.positions_of(self._memory.names) if self._template is not None else []
            self._prepare([leading[name] for name in self._memory.names])
        self._is_copied = [threading.Event() for _ in self._groups]
        self._error: BaseException | None = None
        if copy_now:
            self.copy()

    def _repeat(self, value: Any, earlier: HostSnapshot) -> bool:
        """Takes over the encoding and memory of an earlier snapshot; returns False if the value does not fit it."""
        template = earlier._template
        if template is None:
            return False
        try:
            state, tensors = template.repeat(value, earlier._memory.tensors)
        except ChangedError:
            return False
        self.tensors, self.dtensors, self.is_picklable = state.tensors, {}, state.is_picklable
        self.encoding, self.document = state.encoding, state.document
        self._template, self._memory = template, earlier._memory
        self._positions = earlier._positions
        self._prepare([tensors[position] for position in self._positions])
        return True

    def _prepare(self, leading: list[Tensor]) -> None:
        """Sets the tensors to copy, and those to copy them to.

        Args:
            leading: those to copy to `_memory`, in its order. The others are copied to memory of their own.
        """
        others = dict(islice(self.tensors.items(), len(leading), None))
        memory = HostMemory(others)
        self.tensors |= self._memory.tensors | memory.tensors
        sources = iter([*leading, *(others[name] for name in memory.names)])
        copies = [(group, [*islice(sources, len(group.names))]) for group in [*self._memory.groups, *memory.groups]]
        # The sort is stable: of equal size, the others come last, as in the value.
        copies.sort(key=lambda pair: -pair[0].itemsize)
        self._groups = [group for group, _ in copies]
        self._sources = [tensors for _, tensors in copies]

    @property
    def num_bytes(self) -> int:
        """The size of the tensors that are copied."""
        return sum(group.content.nbytes for group in self._groups)

    def copy(self) -> None:
        """Copies the tensors, once; an error is also raised in threads that wait for a tensor."""
        if not self._sources:
            return
        try:
            with torch.no_grad():
                for group, sources, is_copied in zip(self._groups, self._sources, self._is_copied, strict=True):
                    torch._foreach_copy_(group.tensors, sources)
                    is_copied.set()
        except BaseException as error:
            self._error = error
            raise
        finally:
            self._sources = []
            for is_copied in self._is_copied:
                is_copied.set()

    def wait_for_copy(self, name: str) -> None:
        self._wait_for_group(self._group_by_name[name])

    @cached_property
    def _group_by_name(self) -> dict[str, int]:
        return {name: index for index, group in enumerate(self._groups) for name in group.names}

    def _wait_for_group(self, index: int) -> None:
        self._is_copied[index].wait()
        if self._error is not None:
            raise RuntimeError(f"the copy was not made: {self._error}")

    def stored_tensor(self, name: str) -> Tensor:
        self.wait_for_copy(name)
        tensor = self.tensors[name]
        if not tensor.nbytes:
            return to_contiguous(tensor)
        start = tensor.storage_offset() * tensor.itemsize
        storage = tensor.untyped_storage()[start : start + tensor.nbytes]
        return torch.empty(0, dtype=tensor.dtype).set_(storage, 0, tensor.shape, tensor.stride())

    def sft_entries(self) -> str:
        """Returns the tensors' part of the header of a SafeTensors file, encoded again only if tensors have changed."""
        others = [self._describe(name) for name in islice(self.tensors, len(self._memory.tensors), None)]
        if self._memory.sft_entries is None or self._memory.sft_entries[0] != others:
            described = (self._describe(name) for group in self._groups for name in group.names)
            self._memory.sft_entries = others, encode_sft_entries(described)
        return self._memory.sft_entries[1]

    def _describe(self, name: str) -> _Description:
        return name, *describe_stored(self.tensors[name])

    def contents(self) -> Iterator[Tensor]:
        """Yields the bytes of all tensors in the order of a SafeTensors file, in large pieces."""
        for index, group in enumerate(self._groups):
            self._wait_for_group(index)
            yield group.content


class _Group(NamedTuple):
    """Tensors that are copied together. `content` is their memory, `itemsize` that of their dtypes in the file."""

    itemsize: int
    names: list[str]
    tensors: list[Tensor]
    content: Tensor


class HostMemory:
    """Memory of the host for tensors, in the order of a SafeTensors file.

    Args:
        described: tensors whose shapes and dtypes it has.
        buffer: memory to use again, if it is large enough.
    Attributes:
        names: of the tensors, in the order of the memory.
        tensors: by name, contiguous.
        groups: they divide the tensors; each has adjacent memory.
        sft_entries: other tensors of the last snapshot, and the part of the header for these and its own.
    """

    sft_entries: tuple[list[_Description], str] | None = None

    def __init__(self, described: Mapping[str, Tensor], buffer: Tensor | None = None) -> None:
        num_bytes = sum(tensor.nbytes for tensor in described.values() if tensor.dtype in SFT_DTYPES)
        if buffer is None or buffer.nbytes < num_bytes:
            buffer = torch.empty(num_bytes, dtype=torch.uint8)
        self.buffer = buffer
        self.groups: list[_Group] = []
        self._tensors: dict[str, Tensor] = {}
        end = 0
        self.names = order_in_file({name: to_stored_dtype(tensor.dtype) for name, tensor in described.items()})
        for dtype, run in groupby(self.names, lambda name: described[name].dtype):
            end += self._add_run({name: described[name].shape for name in run}, dtype, end)
        self.tensors = {name: self._tensors[name] for name in described}

    def _add_run(self, shapes: Mapping[str, torch.Size], dtype: torch.dtype, start: int) -> int:
        """Adds tensors of one dtype that follow each other; returns the number of bytes of the buffer that they have.

        A dtype that the file lacks may not be aligned in the buffer: such a tensor has memory of its own.
        """
        if dtype not in SFT_DTYPES:
            for name, shape in shapes.items():
                tensor = self._tensors[name] = torch.empty(shape, dtype=dtype)
                self.groups.append(_Group(1, [name], [tensor], tensor.reshape(-1).view(torch.uint8)))
            return 0
        sizes = [shape.numel() for shape in shapes.values()]
        memory = self.buffer[start : start + sum(sizes) * dtype.itemsize]
        pieces = memory.view(dtype).split(sizes)
        tensors = [piece.view(shape) for piece, shape in zip(pieces, shapes.values(), strict=True)]
        self._tensors |= zip(shapes, tensors, strict=True)
        self._divide([*shapes], tensors, memory)
        return memory.nbytes

    def _divide(self, names: list[str], tensors: list[Tensor], memory: Tensor) -> None:
        """Divides tensors that have all of a memory into groups."""
        first, start, end = 0, 0, 0
        for index, tensor in enumerate(tensors, 1):
            end += tensor.nbytes
            if end - start >= _GROUP_BYTES or index == len(tensors):
                content = memory[start:end]
                self.groups.append(_Group(tensor.itemsize, names[first:index], tensors[first:index], content))
                first, start = index, end
