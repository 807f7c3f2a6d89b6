"""Recomputes blocks in backward.

They keep only their inputs, which are offloaded to host memory.

Names that need torch are imported when they are first used, so that `settings` is read without torch.
"""

from typing import TYPE_CHECKING, Any

from runner.utils.unsloth.settings import OFFLOADS

if TYPE_CHECKING:
    from runner.utils.unsloth.blocks import RecomputedBlock, UnslothReport, apply, is_wrapped, unwrap, wrap

__all__ = ["OFFLOADS", "RecomputedBlock", "UnslothReport", "apply", "is_wrapped", "unwrap", "wrap"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        from runner.utils.unsloth import blocks

        return getattr(blocks, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
