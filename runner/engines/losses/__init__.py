"""Losses of a config, and error messages about the return value of a forward."""
