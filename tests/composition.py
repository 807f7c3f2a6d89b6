"""Composes the config of this repository in this process, with overrides."""

from hydra import compose, initialize_config_dir

from runner.config import checks

checks.register_with_hydra()


def composed(*overrides):
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        return compose("config", list(overrides))
