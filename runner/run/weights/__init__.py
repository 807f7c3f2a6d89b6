"""Weights that a run reads from other files: initial weights, and files that its models are built from."""
