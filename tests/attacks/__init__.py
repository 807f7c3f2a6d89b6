"""Hostile run folders, each a function that changes a copy of a real run, and the stage on which they are tried."""
