"""Composing a config: reading YAML files, handling interpolations, and bounding their expansion."""
