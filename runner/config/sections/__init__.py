"""Checks of single sections of a config."""
