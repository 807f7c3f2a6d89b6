"""The config of a run: schema, checks, `_target_` paths and the run folder that stores it. Imports no torch."""
