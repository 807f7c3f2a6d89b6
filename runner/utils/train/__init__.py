"""The training loop: batches through every engine, and at step boundaries metrics, commands and what is due."""

from runner.utils.train.loop import (
    CommandSource,
    Loop,
    LoopCommand,
    ProgressDisplay,
    Stop,
)

__all__ = [
    "CommandSource",
    "Loop",
    "LoopCommand",
    "ProgressDisplay",
    "Stop",
]
