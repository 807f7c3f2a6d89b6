"""Composition by Hydra: the source of YAML files, interpolations and the bounds of their expansion."""
