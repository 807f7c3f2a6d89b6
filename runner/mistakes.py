"""What a mistake of the user's is told as: one message with the key, what was found, and the nearest right one.

Must not import torch.
"""

from __future__ import annotations

import contextlib
import difflib
import os
import re
import sys
from collections.abc import Iterator

from hydra.errors import HydraException, MissingConfigException
from omegaconf import OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException

from runner.signals import STATUSES

_NULL_CHOICE = "Config group override must be a string or a list"  # Hydra's own words, for model=null


class ConfigError(ValueError):
    """A mistake of the user's: printed as one message, without a traceback."""

    is_told = False


def nearest(name: str, choices: list[str]) -> str:
    """Returns ' Did you mean ...?' where something is near, else what there is to choose from."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    listed = ", ".join(choices)
    return f"did you mean {close[0]}? (there are: {listed})" if close else f"there are: {listed}"


@contextlib.contextmanager
def told_in_one_message() -> Iterator[None]:
    """Ends the program with status 2 and one message where a block meets a mistake of the user's; Ctrl-C, with 130."""
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(STATUSES["interrupted"]) from None
    except Exception as error:
        message = explain(error)
        if message is None or os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        print(message, file=sys.stderr)
        raise SystemExit(2) from None


def explain(error: BaseException) -> str | None:
    """Returns the one message for a mistake in a config, or None for any other error."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        group, _, name = str(error.missing_cfg_file).rpartition("/")
        return f"{group}={name}: no such choice; {nearest(name, list(error.options))}"
    if isinstance(error, ValueError) and str(error).startswith(_NULL_CHOICE):
        return f"{error}; to leave it out, write override /GROUP: null in the defaults of an experiment"
    if not isinstance(error, (HydraException, OmegaConfBaseException)):
        return None
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__
    if cause is not None and cause.full_key:
        return _explain_key(cause, str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return " ".join(dict.fromkeys(lines)) or None


def _explain_key(cause: OmegaConfBaseException, context: str) -> str:
    full_key = str(cause.full_key)
    message = str(cause.msg or cause).splitlines()[0]
    place = re.match(r"In '[^']+'", context)
    where = f"{place.group()}: " if place else ""
    parent = cause.parent_node
    is_unknown_key = isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and OmegaConf.is_dict(parent)
    if not is_unknown_key or cause.key in parent:
        return f"{where}{full_key}: {message}"
    if str(cause.key) in (str(key) for key in parent):
        mapping = full_key.rpartition(".")[0]
        return f"{where}{full_key}: expected a number as the key, found a text; set {mapping}={{{cause.key}: ...}}"
    keys = [str(key) for key in parent] + (["experiment"] if "." not in full_key else [])
    hint = nearest(str(cause.key), keys)
    if OmegaConf.get_type(parent) is dict:
        hint += f"; to pass an argument of its _target_ that the YAML leaves out: +{full_key}=..."
    return f"{where}{full_key}: no such key; {hint}"
