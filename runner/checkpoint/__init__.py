"""Checkpoints: a run's state on disk, committed as a whole, written beside the loop, and sharded over ranks."""
