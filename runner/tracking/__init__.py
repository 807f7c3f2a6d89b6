"""Tracking: metrics, TensorBoard event files, the console, and the record of a run."""
