"""The command line of `python -m runner`: composes the config, then launches it. Does not import torch."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import hydra
from hydra._internal import defaults_list
from hydra._internal import hydra as hydra_internals
from hydra.types import RunMode
from omegaconf import DictConfig

from runner.config import checks, errors
from runner.config.composition.interpolation import quote_nested
from runner.control import signals
from runner.launch import launcher

_CONFIG = {"config_path": str(checks.CONF_DIR), "config_name": "config", "version_base": "1.3"}
_MULTIRUN_FLAGS = ("-m", "--multirun")


class _SingleRunHydra(hydra_internals.Hydra):
    """Composes the config of a single run once. Hydra itself composes it twice, first only to read `hydra.mode`."""

    _composed: DictConfig | None = None

    def get_mode(self, config_name: str | None, overrides: list[str]) -> Any:
        """Returns `hydra.mode`, and keeps the composed config for `compose_config` if it is that of a single run."""
        with contextlib.suppress(Exception):  # Hydra composes it again: for a sweep, or to raise the error
            cfg = super().compose_config(config_name, overrides, RunMode.RUN, with_log_configuration=True)
            if cfg.hydra.mode in (None, RunMode.RUN):
                self._composed = cfg
                return RunMode.RUN
        return super().get_mode(config_name, overrides)

    def compose_config(self, *args: Any, **kwargs: Any) -> DictConfig:
        """Returns the config that `get_mode` has composed, the first time, or composes one."""
        composed, self._composed = self._composed, None
        if composed is not None and kwargs["run_mode"] == RunMode.RUN:
            return composed
        return super().compose_config(*args, **kwargs)


@contextlib.contextmanager
def _composing_once(arguments: list[str]) -> Iterator[None]:
    """Makes `hydra.main` use `_SingleRunHydra`, except for a sweep, and `_create_map_if_read`."""
    original, original_map = hydra_internals.Hydra, defaults_list._create_interpolation_map
    if not any(flag in arguments for flag in _MULTIRUN_FLAGS):
        hydra_internals.Hydra = _SingleRunHydra  # type: ignore[misc]
    defaults_list._create_interpolation_map = partial(_create_map_if_read, original_map)
    try:
        yield
    finally:
        hydra_internals.Hydra = original  # type: ignore[misc]
        defaults_list._create_interpolation_map = original_map


def _create_map_if_read(
    create_map: Callable[..., DictConfig], overrides: Any, defaults: list[Any], is_self_added: bool
) -> DictConfig:
    """Returns the choices that interpolations in a defaults list read; none if it has no interpolation.

    Hydra creates them for each of 25 files, which takes a fifth of the time of composing.
    """
    if any(default.is_interpolation() for default in defaults):
        return create_map(overrides, defaults, is_self_added)
    return DictConfig({})


def _clean_up(status: int) -> None:
    launcher.end_group(status)
    launcher.remove_unused_folder()


@signals.exit_on_interrupt(_clean_up)
def main() -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    checks.register_with_hydra()
    status = 1
    try:
        with errors.exit_on_config_error():
            if (group_status := launcher.join_group()) is not None:
                sys.exit(group_status)
            arguments = launcher.prepare_arguments([quote_nested(argument) for argument in sys.argv[1:]])
            if launcher.print_resumed_config(arguments):
                sys.exit(0)
            sys.argv[1:] = sorted(arguments, key=lambda a: a not in _MULTIRUN_FLAGS)
            with errors.make_hydra_raise(), _composing_once(sys.argv):
                hydra.main(**_CONFIG)(launcher.launch)()
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else 1
        raise
    finally:
        _clean_up(status)
