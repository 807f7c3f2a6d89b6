"""Callbacks: objects that a run calls at its start, steps, evaluations, saves and end."""
