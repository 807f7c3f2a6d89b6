"""From a composed config to a run: its folder, then the run itself, in this process.

Must not import torch at the top: what is wrong in the config is told before that.
"""

from __future__ import annotations

import copy
import re
import shutil
import sys
from pathlib import Path
from typing import Any, NoReturn

from hydra.core.hydra_config import HydraConfig
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict, read_write

from runner import config
from runner.config import ConfigError

OUTPUTS = Path("outputs")


class RunFolder(Callback):
    """Checks the config and claims the run's folder, before Hydra writes into it."""

    def on_run_start(self, config: DictConfig, **_: Any) -> None:
        """Ends the program with one message where the config is wrong: nothing was made yet."""
        task = copy.deepcopy(config)
        with read_write(task), open_dict(task):
            del task["hydra"]
        try:
            _check(task)
            folder = _claim(config, task)
        except ConfigError as error:  # Hydra turns what a callback raises into a warning
            _end(error)
        with read_write(config):
            config.hydra.run.dir = str(folder)


def _check(cfg: DictConfig) -> None:
    config.check(cfg)
    from runner import targets  # what they name is imported, and torch with it, once the rest is right

    targets.check_targets(config.to_plain(cfg))


def _claim(cfg: DictConfig, task: DictConfig) -> Path:
    wanted = Path(cfg.hydra.run.dir)
    is_asked_for = any(str(o).startswith("hydra.run.dir=") for o in cfg.hydra.overrides.hydra)
    if task.resume is not None:
        if not is_asked_for:
            raise ConfigError(f"resume={task.resume}: give it on the command line; it stands in a YAML file")
        return wanted
    folder = wanted
    for number in range(2, 1000):
        try:
            folder.mkdir(parents=True, exist_ok=is_asked_for)
        except FileExistsError:
            folder = wanted.with_name(f"{wanted.name}-{number}")  # another run of the same second
        except OSError as error:
            raise ConfigError(f"hydra.run.dir={folder}: can't be made ({error.strerror})") from error
        else:
            break
    if (folder / "run.json").exists():
        raise ConfigError(f"hydra.run.dir={folder}: holds a run already; resume={folder} goes on with it")
    return folder


def launch(cfg: DictConfig) -> None:
    """Runs the composed config in this process; ends the program where the run was cut short."""
    hydra_config = HydraConfig.get()
    folder = Path(hydra_config.runtime.output_dir)
    if hydra_config.mode == RunMode.MULTIRUN:
        _check_job(cfg, folder)
    from runner import run

    try:
        status = run.run(cfg, folder)
    except ConfigError as error:
        if hydra_config.mode == RunMode.MULTIRUN:  # the other jobs go on; Hydra tells at the end
            raise
        _end(error)
    if status:
        raise SystemExit(status)


def _end(error: ConfigError) -> NoReturn:
    print(error, file=sys.stderr)
    raise SystemExit(2) from None


def _check_job(cfg: DictConfig, folder: Path) -> None:
    try:
        if cfg.resume is not None:
            raise ConfigError("resume: a sweep makes new runs; resume each of its folders by itself")
        _check(cfg)
    except ConfigError as error:
        shutil.rmtree(folder / ".hydra", ignore_errors=True)
        folder.rmdir()
        raise ConfigError(f"{folder.name}: {error}") from None


def with_resumed_overrides(arguments: list[str]) -> list[str]:
    """Returns the command line with what `resume=` stands for: the run's folder and overrides, beside the new ones.

    Raises:
        ConfigError: there is nothing to resume at that place.
    """
    given = next((a.partition("=")[2] for a in reversed(arguments) if a.startswith("resume=")), "null")
    if given in ("null", "") or {"--multirun", "-m"} & set(arguments):
        return arguments
    own = [argument for argument in arguments if not argument.startswith("resume=")]
    if given == "latest":
        experiment = next((a for a in own if a.startswith("experiment=")), None)
        folder = checkpoint = _latest_run(experiment)
    else:
        folder, checkpoint = _run_folder_of(Path(given.strip("'\"")))
    saved = [o for o in _saved_overrides(folder) if _key(o) != "resume"]
    keys = {_key(argument) for argument in own}
    kept = [override for override in saved if _key(override) not in keys]
    return [*own, *kept, f"resume={_quote(checkpoint)}", f"hydra.run.dir={_quote(folder)}"]


def _latest_run(experiment: str | None) -> Path:
    runs = {folder.parent.parent: folder.stat().st_mtime for folder in sorted(OUTPUTS.glob("*/*/checkpoints/step_*"))
            if (folder / "MANIFEST.json").is_file()}  # fmt: skip
    of_it = [run for run in runs if experiment in (None, *_saved_overrides(run)) or experiment is None]
    if not of_it:
        raise ConfigError(
            f"resume=latest: no run{f' of {experiment}' if experiment else ''} with a checkpoint under "
            f"{OUTPUTS.resolve()}; start one, or give its path"
        )
    return max(of_it, key=lambda run: runs[run])


def _run_folder_of(path: Path) -> tuple[Path, Path]:
    if (path / "checkpoints").is_dir():
        return path, path
    if re.fullmatch(r"step_\d{8,}", path.resolve().name) and path.is_dir():
        return path.resolve().parent.parent, path
    found = "no such folder" if not path.exists() else "neither a run folder nor a checkpoint"
    raise ConfigError(f"resume={path}: {found}; expected latest, a run folder, or one of its checkpoints/step_*")


def _saved_overrides(folder: Path) -> list[str]:
    path = folder / ".hydra" / "overrides.yaml"
    return [str(override) for override in OmegaConf.load(path)] if path.is_file() else []


def _key(override: str) -> str:
    return override.partition("=")[0].lstrip("+~")


def _quote(path: Path) -> str:
    return "'" + str(path).replace("'", "\\'") + "'"
