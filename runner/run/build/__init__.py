"""The objects of an experiment, from its specification."""
