"""Modules of a model: selection by name, frozen modules, loading of weights, and random generators."""
