"""Modules of a model: found by name, kept frozen, loaded, and the random generators that they hold."""
