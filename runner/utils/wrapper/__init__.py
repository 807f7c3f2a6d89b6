"""Optimizations of a module: the contract, the built-in ones, and `optimize`, which applies them in one order.

Names that need torch are loaded when they are first used, so that a config is checked without torch.
"""

from typing import TYPE_CHECKING, Any

from runner.utils.wrapper.protocol import Applied, Context, Optimization, Purpose, Stage

if TYPE_CHECKING:
    from runner.utils.wrapper.apply import freeze, optimize

__all__ = ["Applied", "Context", "Optimization", "Purpose", "Stage", "freeze", "optimize"]


def __getattr__(name: str) -> Any:
    if name in ("freeze", "optimize"):
        from runner.utils.wrapper import apply

        return getattr(apply, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
