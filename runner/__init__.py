"""A Hydra-configured, model-agnostic PyTorch experiment runner: `python -m runner`, or from Python:

    import runner

    run = runner.train(runner.compose(["experiment=digits", "optimizer.lr=1e-3"]))
    run.metrics()["eval/accuracy"]

The names below are imported when they are first used: `import runner` imports neither torch nor Hydra.
"""

from typing import TYPE_CHECKING, Any

from runner.config.trust import import_path

# `python -m runner.evaluate` imports this package first: nothing was imported from the current directory yet.
import_path.leave_out_run_folder()

from runner.config import aliases  # noqa: E402

aliases.install_aliases()

if TYPE_CHECKING:
    from runner.api import Checkpoint, Config, Run, compose, open, train
    from runner.config.errors import ConfigError, RunError

__all__ = ["Checkpoint", "Config", "ConfigError", "Run", "RunError", "compose", "open", "train"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from runner import api
    from runner.config import errors

    return getattr(errors if name.endswith("Error") else api, name)


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
