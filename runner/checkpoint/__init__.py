"""Checkpoints: the state of a run on disk, saved by one process or by all ranks."""
