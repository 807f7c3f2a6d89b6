"""Blocks that keep only their inputs between forward and backward, in host memory, and are recomputed in backward.

Works for any module, arguments and outputs. The technique is Unsloth's (https://unsloth.ai/blog/long-context):
`recompute` recomputes, `offload` moves the inputs.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from runner.utils.distributed.devices import has_streams
from runner.utils.distributed.memory import format_mib
from runner.utils.modules.selection import find_blocks, matches_glob, split_uncalled
from runner.utils.unsloth.offload import Offloader
from runner.utils.unsloth.recompute import RecomputedBlock, block_of, is_compiled, is_wrapped, unwrap, wrap
from runner.utils.unsloth.settings import check_settings
from runner.utils.unsloth.streams import CopyStreams

__all__ = ["RecomputedBlock", "UnslothReport", "apply", "is_wrapped", "unwrap", "wrap"]


@dataclass
class UnslothReport:
    """The blocks that were wrapped and, after a step, their calls and bytes."""

    modules: dict[str, nn.Module]
    offload: str
    engines: list[Offloader] = field(default_factory=list)

    @property
    def blocks(self) -> dict[str, RecomputedBlock]:
        """The state of each block, by name."""
        return {name: block_of(module) for name, module in self.modules.items() if is_wrapped(module)}

    @property
    def input_bytes(self) -> int:
        """The bytes of the inputs that the blocks keep."""
        return sum(block.input_bytes for block in self.blocks.values())

    @property
    def spared_bytes(self) -> int:
        """The bytes inside the blocks that autograd would have kept."""
        return sum(block.spared_bytes for block in self.blocks.values())

    def stop_counting(self) -> None:
        """Stops counting bytes, after a first forward."""
        for block in self.blocks.values():
            block.is_counting = False

    def check(self, is_last: bool = True) -> list[str]:
        """Checks, after a step, that every block was called; returns those that still may be.

        Args:
            is_last: no block is waited for; else one is whose neighbours were called, for it may be skipped at random.
        Raises:
            ValueError: naming the blocks that were not called.
        """
        self.stop_counting()
        called = [name for name, block in self.blocks.items() if block.calls]
        hopeless, waiting = split_uncalled([name for name, block in self.blocks.items() if not block.calls], called)
        if wrong := [*hopeless, *waiting] if is_last else hopeless:
            remedy = "leave them out with exclude, or name what is called with include"
            raise ValueError(f"blocks never called so far: {', '.join(wrong)}; {remedy}")
        return waiting

    def describe(self) -> str:
        """Returns a table of the blocks' calls, bytes and stalls so far, with their sums."""
        rows = [("block", "calls", "inputs", "moved", "stalls", "not kept")]
        totals = [0] * 5
        for name, block in self.blocks.items():
            moved, stalls = (block.timer.moved_bytes, block.timer.stalls) if block.timer is not None else (0, 0)
            numbers = [block.calls, block.input_bytes, moved, stalls, block.spared_bytes]
            totals = [total + number for total, number in zip(totals, numbers, strict=True)]
            is_left = block.timer is not None and not block.timer.is_worth_it
            rows.append(_row(name, numbers, " (left alone: moving costs more than it hides)" if is_left else ""))
        rows.append(_row("all", totals))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def undo(self) -> None:
        for module in self.modules.values():
            unwrap(module)


def _row(name: str, numbers: Sequence[int], remark: str = "") -> tuple[str, str, str, str, str, str]:
    calls, inputs, moved, stalls, spared = numbers
    return name, str(calls), format_mib(inputs), format_mib(moved), str(stalls), format_mib(spared) + remark


def apply(
    model: nn.Module,
    include: Sequence[str] | None = None,
    exclude: Sequence[str] = (),
    *,
    offload: str = "auto",
    every: int = 1,
    min_bytes: int = 1 << 20,
    keep_last: int = 1,
    in_flight: int = 2,
    prefetch: int = 1,
    host_limit: int | None = None,
) -> UnslothReport:
    """Wraps a model's blocks.

    Args:
        include: globs over names of modules, segment by segment; by default the children of every outermost ModuleList
            or Sequential of two or more of one class.
        exclude: globs over the names of those that are left out.
        offload: always moves the blocks' inputs to host memory, auto those for which it pays, never none. Without an
            accelerator there is nowhere to move them to, and blocks are recomputed all the same.
        every: wraps the first of this many blocks.
        min_bytes: least bytes of a tensor that is moved.
        keep_last: number of the newest inputs that stay on the device: they are needed first.
        in_flight: number of copies that may be under way before computing waits for the oldest.
        prefetch: number of inputs that are brought back ahead of need.
        host_limit: bytes of host memory; inputs beyond it stay on the device.
    Raises:
        ValueError: a glob that matches nothing, or no block is found, with the names there are; an unknown `offload`; a
            number out of range.
    """
    check_settings(
        offload, every=every, in_flight=in_flight, keep_last=keep_last, prefetch=prefetch, min_bytes=min_bytes,
        host_limit=host_limit,
    )  # fmt: skip
    modules = _choose(model, include, exclude, every)
    engines: dict[torch.device, Offloader] = {}
    for name, module in modules.items():
        tensors = itertools.chain(module.parameters(), module.buffers(), model.parameters())
        device = next((tensor.device for tensor in tensors), torch.device("cpu"))
        if has_streams(device) and offload != "never" and device not in engines:
            engines[device] = Offloader(
                CopyStreams(device, is_timed=offload == "auto"), is_auto=offload == "auto", min_bytes=min_bytes,
                keep_last=keep_last, in_flight=in_flight, prefetch=prefetch, host_limit=host_limit,
            )  # fmt: skip
        wrap(module, engines.get(device), name)
    return UnslothReport(modules, offload, list(engines.values()))


def _choose(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str], every: int
) -> dict[str, nn.Module]:
    if is_compiled(model):
        raise ValueError("the model is compiled as a whole, and recomputed blocks break its graph: compile its blocks")
    found = {name: block for blocks in find_blocks(model, include).values() for name, block in blocks.items()}
    excluded: set[str] = set()
    for glob in exclude:
        matching = {name for name in found if matches_glob(name, glob)}
        if not matching:
            raise ValueError(f"exclude: {glob!r} matches none of the blocks: {', '.join(found) or 'there are none'}")
        excluded |= matching
    chosen = {name: block for name, block in found.items() if name not in excluded}
    if not chosen:
        there_are = ", ".join(dict(model.named_modules())).lstrip(", ")
        what = "no ModuleList or Sequential holds two or more modules of one class" if not found else "all are excluded"
        raise ValueError(f"no block is found: {what}; name them with include. Modules are: {there_are}")
    if compiled := [name for name, block in chosen.items() if is_compiled(block)]:
        raise ValueError(f"{compiled[0]}: it is compiled with its call; compile its forward, which is then recomputed")
    return {name: block for index, (name, block) in enumerate(chosen.items()) if index % every == 0}
