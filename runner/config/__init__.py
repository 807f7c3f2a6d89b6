"""The config of a run: its schema, its checks, what it names, and the run folder that keeps it. Imports no torch."""
