"""Blocks that keep only their inputs between forward and backward, in host memory, and are recomputed in backward.

For any module: whatever its arguments and outputs are, and whatever stands in it. The technique is Unsloth's
(https://unsloth.ai/blog/long-context): `recompute` recomputes, `offload` moves. Must not import a model library.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from runner.utils.distributed.memory import mib
from runner.utils.modules.selection import find_blocks, matches, split_idle
from runner.utils.unsloth.offload import Offloader
from runner.utils.unsloth.recompute import RecomputedBlock, block_of, is_compiled, is_wrapped, unwrap, wrap
from runner.utils.unsloth.streams import CopyStreams, has_streams

__all__ = ["OFFLOADS", "RecomputedBlock", "UnslothReport", "apply", "is_wrapped", "unwrap", "wrap"]
OFFLOADS = ("auto", "always", "never")


@dataclass
class UnslothReport:
    """Which blocks were wrapped, and, after a step, what each of them did."""

    modules: dict[str, nn.Module]
    offload: str
    engines: list[Offloader] = field(default_factory=list)

    @property
    def blocks(self) -> dict[str, RecomputedBlock]:
        """What is known of each block, by name."""
        return {name: block_of(module) for name, module in self.modules.items() if is_wrapped(module)}

    @property
    def input_bytes(self) -> int:
        """What the blocks were given to keep, in bytes."""
        return sum(block.input_bytes for block in self.blocks.values())

    @property
    def spared_bytes(self) -> int:
        """What autograd would have kept of the blocks' insides, in bytes."""
        return sum(block.spared_bytes for block in self.blocks.values())

    def forget_calls(self) -> None:
        """Begins to count calls anew."""
        for block in self.blocks.values():
            block.calls = 0

    def stop_counting(self) -> None:
        """Ends the counting of bytes, after a first forward."""
        for block in self.blocks.values():
            block.is_counting = False

    def check(self, is_last: bool = True) -> list[str]:
        """Checks, after a step, that every block was called by now; returns what was not, and still may be.

        Args:
            is_last: no block is waited for; else one is whose neighbours were called, for it may be skipped at random.
        Raises:
            ValueError: naming the blocks that were not.
        """
        self.stop_counting()
        called = [name for name, block in self.blocks.items() if block.calls]
        hopeless, waiting = split_idle([name for name, block in self.blocks.items() if not block.calls], called)
        if wrong := [*hopeless, *waiting] if is_last else hopeless:
            remedy = "leave them out with exclude, or name what is called with include"
            raise ValueError(f"blocks never called so far: {', '.join(wrong)}; {remedy}")
        return waiting

    def describe(self) -> str:
        """Returns the blocks' calls, bytes and stalls so far, a line each, and their sums."""
        rows = [("block", "calls", "inputs", "moved", "stalls", "not kept")]
        totals = [0] * 5
        for name, block in self.blocks.items():
            moved, stalls = (block.timer.moved_bytes, block.timer.stalls) if block.timer is not None else (0, 0)
            own = [block.calls, block.input_bytes, moved, stalls, block.spared_bytes]
            totals = [total + each for total, each in zip(totals, own, strict=True)]
            is_left = block.timer is not None and not block.timer.is_worth_it
            rows.append(_row(name, own, " (left alone: moving costs more than it hides)" if is_left else ""))
        rows.append(_row("all", totals))
        widths = [max(len(row[column]) for row in rows) for column in range(6)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)

    def undo(self) -> None:
        """Makes every block what it was."""
        for module in self.modules.values():
            unwrap(module)


def _row(name: str, numbers: Sequence[int], remark: str = "") -> tuple[str, str, str, str, str, str]:
    calls, inputs, moved, stalls, spared = numbers
    return name, str(calls), mib(inputs), mib(moved), str(stalls), mib(spared) + remark


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
        every: wraps the first of so many blocks.
        min_bytes: of a tensor that is moved.
        keep_last: so many inputs, the newest, stay on the device: they are needed first.
        in_flight: so many copies may be under way before computing waits for the oldest.
        prefetch: so many inputs are brought back ahead of need.
        host_limit: bytes of host memory; what goes beyond stays on the device.
    Raises:
        ValueError: a glob that matches nothing, or no block is found, with what there is; an unknown `offload`; a
            number out of range.
    """
    _check_settings(
        offload, every=(every, 1), in_flight=(in_flight, 1), keep_last=(keep_last, 0), prefetch=(prefetch, 0),
        min_bytes=(min_bytes, 0), host_limit=(host_limit or 0, 0),
    )  # fmt: skip
    modules = _choose(model, include, exclude, every)
    engines: dict[torch.device, Offloader] = {}
    for name, module in modules.items():
        device = _device_of(module, model)
        if has_streams(device) and offload != "never" and device not in engines:
            engines[device] = Offloader(
                CopyStreams(device, is_timed=offload == "auto"), is_auto=offload == "auto", min_bytes=min_bytes,
                keep_last=keep_last, in_flight=in_flight, prefetch=prefetch, host_limit=host_limit,
            )  # fmt: skip
        wrap(module, engines.get(device), name)
    return UnslothReport(modules, offload, list(engines.values()))


def _check_settings(offload: str, **numbers: tuple[int, int]) -> None:
    if offload not in OFFLOADS:
        raise ValueError(f"offload={offload!r}: expected one of {', '.join(OFFLOADS)}")
    wrong = [f"{key}={value}: expected {least} or more" for key, (value, least) in numbers.items() if value < least]
    if wrong:
        raise ValueError("; ".join(wrong))


def _choose(
    model: nn.Module, include: Sequence[str] | None, exclude: Sequence[str], every: int
) -> dict[str, nn.Module]:
    """Returns the blocks by name, in the order of the model."""
    if is_compiled(model):
        raise ValueError("the model is compiled as a whole, and recomputed blocks break its graph: compile its blocks")
    found = {name: block for blocks in find_blocks(model, include).values() for name, block in blocks.items()}
    for glob in exclude:
        if not any(matches(name, glob) for name in found):
            raise ValueError(f"exclude: {glob!r} matches none of the blocks: {', '.join(found) or 'there are none'}")
    chosen = {name: block for name, block in found.items() if not any(matches(name, glob) for glob in exclude)}
    if not chosen:
        there_are = ", ".join(dict(model.named_modules())).lstrip(", ")
        what = "no ModuleList or Sequential holds two or more modules of one class" if not found else "all are excluded"
        raise ValueError(f"no block is found: {what}; name them with include. Modules are: {there_are}")
    if compiled := [name for name, block in chosen.items() if is_compiled(block)]:
        raise ValueError(f"{compiled[0]}: it is compiled with its call; compile its forward, which is then recomputed")
    return {name: block for index, (name, block) in enumerate(chosen.items()) if index % every == 0}


def _device_of(block: nn.Module, model: nn.Module) -> torch.device:
    tensors = itertools.chain(block.parameters(), block.buffers(), model.parameters())
    return next((tensor.device for tensor in tensors), torch.device("cpu"))
