"""The training loop: batches through every engine, and metrics, commands and actions at step boundaries."""

from runner.utils.train.loop import Loop, Stop
from runner.utils.train.protocols import CommandSource, LoopCommand, ProgressDisplay

__all__ = [
    "CommandSource",
    "Loop",
    "LoopCommand",
    "ProgressDisplay",
    "Stop",
]
