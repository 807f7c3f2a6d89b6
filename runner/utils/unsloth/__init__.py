"""Blocks that keep only their inputs between forward and backward, in host memory, and are recomputed in backward."""

from runner.utils.unsloth.apply import OFFLOADS, RecomputedBlock, UnslothReport, apply, is_wrapped, unwrap, wrap

__all__ = ["OFFLOADS", "RecomputedBlock", "UnslothReport", "apply", "is_wrapped", "unwrap", "wrap"]
