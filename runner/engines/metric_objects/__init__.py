"""Metrics of a config: objects with update, compute and reset."""
