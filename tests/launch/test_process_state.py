"""A run started from Python leaves its process, and the program's own use of Hydra, as they were."""

import contextlib
import gc
import logging
import os
import random
import signal
import sys
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf
from omegaconf.basecontainer import BaseContainer

import runner
from runner.config import optimizations

SMALL = ["experiment=mine", "trainer.steps=4", "trainer.save_every=2", "trainer.eval_every=2", "data.num_workers=1"]


def list_open_files():
    """Returns what the descriptors of this process refer to, sockets and pipes without their numbers."""
    targets = []
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):  # that of the listing
            targets.append(os.readlink(f"/proc/self/fd/{name}").partition("[")[0])
    return sorted(targets)


def observe():
    """Returns the state of this process that a run must leave as it was."""
    wakeup_fd = signal.set_wakeup_fd(-1)
    signal.set_wakeup_fd(wakeup_fd)
    logger = logging.getLogger("runner")
    return {
        "handlers": {number: signal.getsignal(number) for number in signal.valid_signals()},
        "wakeup_fd": wakeup_fd,
        "environment": dict(os.environ),
        "directory": os.getcwd(),
        "path": list(sys.path),
        "arguments": list(sys.argv),
        "threads": {thread.name for thread in threading.enumerate()},
        "files": list_open_files(),
        "root": (list(logging.root.handlers), logging.root.level),
        "logger": (list(logger.handlers), logger.level, logger.propagate),
        "hooks": (sys.excepthook, threading.excepthook, sys.displayhook),
        "warnings": list(warnings.filters),
        "gc": (gc.isenabled(), gc.get_threshold(), gc.get_freeze_count()),
        "python": random.getstate(),
        "numpy": [str(value) for value in np.random.get_state()],
        "torch": torch.get_rng_state().tolist(),
        "threads of torch": torch.get_num_threads(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic),
        "dtype": torch.get_default_dtype(),
        "matmul": torch.get_float32_matmul_precision(),
        "grad": torch.is_grad_enabled(),
        "group": torch.distributed.is_initialized(),
        "hydra": {kind: id(value) for kind, value in Singleton._instances.items()},
        "job": HydraConfig.instance().cfg,
        "resolvers": dict(BaseContainer._resolvers),
        "sources": dict(SourcesRegistry.instance().types),
        "composer": vars(ConfigLoaderImpl)["_apply_overrides_to_config"],
    }


def wait_for_threads(names):
    deadline = time.monotonic() + 5
    while {thread.name for thread in threading.enumerate()} - names and time.monotonic() < deadline:
        time.sleep(0.01)


@pytest.fixture
def program(home):
    """A program that uses Hydra itself: it has composed a config of its own, with a resolver `now` of its own."""
    Plugins.instance()
    resolvers, instances = dict(BaseContainer._resolvers), dict(Singleton._instances)
    instances.pop(GlobalHydra, None)  # Hydra initializes the object itself, and puts a copy in its place later
    (home.folder / "theirs").mkdir()
    (home.folder / "theirs" / "config.yaml").write_text("optimizations: {mine: true}\nvalue: ${now:1}\n")
    with optimizations.restored_composer(), initialize_config_dir(str(home.folder / "theirs"), version_base="1.2"):
        # Other tests of this process may have called `checks.register_with_hydra`.
        ConfigLoaderImpl._apply_overrides_to_config = staticmethod(optimizations._apply_by_hydra)
        OmegaConf.register_new_resolver("now", lambda text: f"theirs {text}", replace=True)
        HydraConfig.instance()
        yield home
    BaseContainer._resolvers = resolvers
    Singleton._instances = instances


@pytest.mark.parametrize(
    ("overrides", "error"),
    [
        ([], None),
        (["feeder={_target_: own.fail, _partial_: true}"], RuntimeError),
        (["model._target_=own.Mdel"], runner.ConfigError),
        (["model._target_=own.Raises"], runner.ConfigError),
    ],
    ids=["finished", "failed", "misspelt", "not built"],
)
def test_a_run_leaves_the_process_as_it_was(program, overrides, error):
    threads = {thread.name for thread in threading.enumerate()}
    runner.train(runner.compose([*SMALL, "hydra.run.dir=first"], config_dir="conf"))  # imports what a run imports
    wait_for_threads(threads)
    before = observe()
    config = runner.compose([*SMALL, *overrides], config_dir="conf")
    if error is None:
        runner.train(config).engines()
    else:
        with pytest.raises(error):
            runner.train(config)
    gc.collect()  # the frames of an error hold the loader
    wait_for_threads(before["threads"])
    after = observe()
    assert {name: (before[name], after[name]) for name in before if before[name] != after[name]} == {}
    cfg = compose("config")  # by the program's own Hydra
    assert (cfg.value, cfg.optimizations) == ("theirs 1", {"mine": True})


def test_composing_needs_no_hydra_of_the_program_and_starts_none(home):
    GlobalHydra.instance().clear()
    for _ in range(2):
        runner.compose(SMALL, config_dir="conf")
        assert not GlobalHydra.instance().is_initialized()
