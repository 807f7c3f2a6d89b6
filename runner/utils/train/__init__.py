"""The training loop: batches through every engine, and at step boundaries metrics, commands and what is due."""

from runner.utils.train.loop import (
    Inbox,
    Loop,
    Screen,
    Stop,
    Typed,
)

__all__ = [
    "Inbox",
    "Loop",
    "Screen",
    "Stop",
    "Typed",
]
