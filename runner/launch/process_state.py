"""Leaves a Python program as a run found it: Hydra's globals, environment, paths, signal handlers and generators.

A command that ends with its run needs none of this.
"""

from __future__ import annotations

import contextlib
import gc
import os
import signal
import sys
import threading
import warnings
from collections.abc import Iterator
from typing import Any

from hydra import version
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from hydra.core.utils import JobRuntime
from omegaconf.basecontainer import BaseContainer

from runner.config import checks, errors, optimizations
from runner.config.composition import source

_PER_PROGRAM = (GlobalHydra, HydraConfig, JobRuntime, version.VersionBase)  # Hydra's state of the present program


_lock = threading.RLock()


@contextlib.contextmanager
def own_hydra(search_path: list[str] | None = None, *, is_brief: bool = True) -> Iterator[None]:
    """Lets a block use Hydra as the command line does; the program's own use of it stays as it was.

    Args:
        search_path: as of `optimizations.restored_composer`.
        is_brief: no other thread begins or ends such a block meanwhile. A run takes long, and lets others compose.
    """
    with contextlib.ExitStack() as brief, contextlib.ExitStack() as state:
        if is_brief:
            brief.enter_context(_lock)
        with _lock:
            state.enter_context(_replaced_globals())
            state.enter_context(source.restored_sources())
            state.enter_context(optimizations.restored_composer(search_path))
            version.setbase("1.3")
            checks.register_with_hydra()
        try:
            yield
        finally:
            with _lock:
                state.close()


@contextlib.contextmanager
def _replaced_globals() -> Iterator[None]:
    """Replaces Hydra's global objects and OmegaConf's resolvers within a block, and restores them after it."""
    Plugins.instance()  # registers the sources of YAML files, which a new object would lack
    objects = {kind: Singleton._instances.pop(kind, None) for kind in _PER_PROGRAM}
    resolvers = dict(BaseContainer._resolvers)
    try:
        yield
    finally:
        for kind, instance in objects.items():
            Singleton._instances.pop(kind, None)
            if instance is not None:
                Singleton._instances[kind] = instance
        BaseContainer._resolvers = resolvers


@contextlib.contextmanager
def preserved_process(*, keeps_path: bool = False) -> Iterator[None]:
    """Restores the state of this process after a block that imports modules and trains.

    Settings that a user's module makes when it is imported stay: a second run does not import it again.

    Args:
        keeps_path: directories that the block adds to `sys.path` stay, for modules that are imported later.
    """
    environment, directory, path, arguments = dict(os.environ), os.getcwd(), list(sys.path), list(sys.argv)
    handlers = _signal_handlers()
    is_collecting = gc.isenabled()
    are_hidden = errors.are_tracebacks_hidden()
    with warnings.catch_warnings(), _preserved_generators():
        try:
            yield
        finally:
            os.environ.clear()
            os.environ.update(environment)
            os.chdir(directory)
            if not keeps_path:
                sys.path[:] = path
            sys.argv[:] = arguments
            for number, handler in handlers.items():
                if signal.getsignal(number) is not handler:  # such as of torch's loader, of SIGCHLD
                    signal.signal(number, handler)
            if not is_collecting:
                gc.disable()
            errors.hide_tracebacks(are_hidden)


def _signal_handlers() -> dict[int, Any]:
    """Returns the handlers of all signals that Python knows; none in a thread, which can't set them."""
    if threading.current_thread() is not threading.main_thread():
        return {}
    found = {number: signal.getsignal(number) for number in signal.valid_signals()}
    return {number: handler for number, handler in found.items() if handler is not None}


@contextlib.contextmanager
def _preserved_generators() -> Iterator[None]:
    """Restores the global random generators of Python, NumPy and torch, also those of GPUs in use."""
    import torch

    from runner.utils.distributed import preserve_rng_state

    is_on_gpu = torch.cuda.is_available() and torch.cuda.is_initialized()
    states = torch.cuda.get_rng_state_all() if is_on_gpu else []
    try:
        with preserve_rng_state():
            yield
    finally:
        if states:
            torch.cuda.set_rng_state_all(states)
