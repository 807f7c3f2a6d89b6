"""Specifications of experiments, from the config that is composed without any override."""

import copy
import functools

from hydra import compose, initialize_config_dir

from runner.config import checks
from runner.config.spec import ExperimentSpec


@functools.cache
def _compose():
    checks.register_with_hydra()
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        return checks.to_plain(compose("config"))


def make_spec(**changes):
    """Returns a specification with other values of its keys, or of those of `distributed`."""
    plain = copy.deepcopy(_compose())
    for key, value in changes.items():
        (plain["distributed"] if key in plain["distributed"] else plain)[key] = value
    return ExperimentSpec.from_plain(plain)
