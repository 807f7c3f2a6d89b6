"""A Hydra-configured, model-agnostic PyTorch experiment runner: `python -m runner`."""

from runner.config.trust import import_path

# `python -m runner.evaluate` imports this package first: nothing was imported from the current directory yet.
import_path.leave_out_run_folder()

from runner.config import aliases  # noqa: E402

aliases.install_aliases()
