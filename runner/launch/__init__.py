"""Launching: the processes of a run, from the command line to the workers."""
