"""Losses of a config, and messages for what a forward returns."""
