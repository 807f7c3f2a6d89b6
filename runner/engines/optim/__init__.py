"""Optimizers and learning-rate schedulers, their hyperparameters and their saved state."""
