"""Optimizations of a module that is there already: in one order, and all reversible."""

from runner.utils.wrapper.optimize import (
    freeze,
    optimize,
)

__all__ = [
    "freeze",
    "optimize",
]
