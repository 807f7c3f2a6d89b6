"""Optimizers and learning-rate schedulers, with hyperparameters and saved state."""
