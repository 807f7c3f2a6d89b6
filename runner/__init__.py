"""A Hydra-configured, model-agnostic PyTorch experiment runner: `python -m runner`."""
