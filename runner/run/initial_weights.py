"""The weights of another run that a new run's models begin with (`init_from`).

Of the other run only the weights are read, by name; its config is not needed, and nothing in it is run. Must not import
hydra.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from runner.checkpoint import checkpoints
from runner.config import run_folder
from runner.config.errors import ConfigError
from runner.run.warm_start import ModelBuilder
from runner.utils import io
from runner.utils.distributed import run_on_rank_zero
from runner.utils.modules.weights import load_weights

KEY = "init_from"
_EXPORTS = (".safetensors", ".sft")
_EXPECTED = "expected a run's folder, one of its checkpoints/step_*, or an export (a .safetensors file)"
_MOST_NAMES, _LONGEST_NAME = 20, 200  # in a message


@dataclass(frozen=True)
class Source:
    """Where an engine's first weights are: the key and value of the config, and the checkpoint or export of it."""

    key: str
    text: str
    path: Path

    def load(self) -> tuple[dict[str, Any], str]:
        """Returns the weights by engine (under "" where the file does not tell), and what they are of.

        Raises:
            ConfigError: it is not whole, or can't be read.
        """
        try:
            if self.path.is_dir():
                weights = checkpoints.load(self.path, lambda part: "." not in part)
                step = int(self.path.name.partition("_")[2])
                return weights, f"step {step} of {self.path.parent.parent}"
            metadata, weights = io.read_metadata(self.path), io.load(self.path)
        except OSError as error:
            raise ConfigError(f"{self}: {self.path} can't be read ({error.strerror})") from error
        except ValueError as error:
            raise ConfigError(f"{self}: {error}") from error
        step_text = metadata.get("step", "")
        of_step = f"step {step_text} of " if re.fullmatch(r"\d{1,18}", step_text, re.ASCII) else ""
        return {metadata.get("engine", ""): weights}, f"{of_step}{self.path}"

    def __str__(self) -> str:
        return f"{self.key}={self.text}"


class InitialWeights(ModelBuilder):
    """Builds models that begin with the weights of another run, matched by name.

    They are loaded before the optimizations, so that adapters are fresh. Weights that fit only after them, such as
    those of a run with the same adapters, are loaded then.

    Args:
        sources: by engine.
    Attributes:
        lines: which weights were loaded, for the log.
    """

    def __init__(self, sources: Mapping[str, Source]) -> None:
        self.lines: list[str] = []
        self._sources = sources
        self._loaded: dict[Path, tuple[dict[str, Any], str]] = {}
        self._unfit: dict[str, str] = {}  # by engine: why its weights did not fit before the optimizations

    def build(self, engine: str, key: str, node: Any, make: Callable[[Any], nn.Module]) -> nn.Module:
        """Returns the model with the weights of its source, where they fit already.

        Raises:
            ConfigError: the source has no weights of this engine, or can't be read.
        """
        module = make(node)
        if engine in self._sources and (misfit := self._load(engine, module)) is not None:
            self._unfit[engine] = misfit
        return module

    def finish(self, engine: str, module: nn.Module) -> None:
        """Loads the weights that did not fit before the optimizations.

        Raises:
            ConfigError: naming weights that are missing, unexpected or of another shape.
        """
        if engine in self._unfit and self._load(engine, module) is not None:
            raise ConfigError(self._unfit[engine])
        if line := self._describe(engine):
            self.lines += [line] if line not in self.lines else []

    def _load(self, engine: str, module: nn.Module) -> str | None:
        """Loads an engine's weights; returns why they do not fit, and then has loaded none."""
        source, weights = self._sources[engine], self._find(engine)
        misfit = _find_misfit(module, weights)
        if not misfit:
            try:
                load_weights(module, weights)
            except (RuntimeError, TypeError, ValueError) as error:
                misfit = [str(error)]
        if not misfit:
            return None
        head = f"{source}: engine {engine}: expected the weights of its model, found others"
        remedy = "Weights with adapters become those of the model in an export: python -m runner.export RUN"
        has_adapters = any(name.endswith(".lora_a") for name in weights)
        return "\n".join([head, *(f"  {line}" for line in misfit), *([remedy] if has_adapters else [])])

    def _find(self, engine: str) -> Mapping[str, Any]:
        """Returns the weights of the engine of that name, or of the only one on both sides."""
        source = self._sources[engine]
        if source.path not in self._loaded:
            self._loaded[source.path] = source.load()
        parts, _ = self._loaded[source.path]
        is_only = len(parts) == 1 and (source.key != KEY or len(self._sources) == 1)
        weights = next(iter(parts.values())) if is_only else parts.get(engine)
        if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
            there_are = _list(sorted(parts)) or "none"
            raise ConfigError(f"{source}: expected weights of engine {engine!r}, found those of {there_are}")
        return weights

    def _describe(self, engine: str) -> str | None:
        source = self._sources.get(engine)
        return None if source is None else f"{source}: weights of {self._loaded[source.path][1]}"


def find(plain: Mapping[str, Any]) -> InitialWeights | None:
    """Returns what a new run's engines begin with by `init_from`; None where no engine has one. All ranks call it.

    Raises:
        ConfigError: there is nothing whole at that place.
        RankError: on the other ranks.
    """
    texts: dict[str, tuple[str, str]] = {}
    for name, own in (plain["engines"] or {"model": {}}).items():
        key = f"engines.{name}.{KEY}" if KEY in own else KEY
        if (text := own.get(KEY, plain.get(KEY))) is not None:
            texts[name] = key, text
    if not texts:
        return None
    paths = run_on_rank_zero(lambda: {(key, text): _locate(key, text) for key, text in dict.fromkeys(texts.values())})
    return InitialWeights({name: Source(*found, paths[found]) for name, found in texts.items()})


def _locate(key: str, text: str) -> Path:
    """Returns the checkpoint or export that a value of `init_from` stands for: of a run its newest whole one."""
    path = Path(text)
    if path.is_file():
        if path.suffix not in _EXPORTS:
            raise ConfigError(f"{key}={text}: {_EXPECTED}; found another file")
        return path
    try:
        run_folder.find_run(path)
    except ConfigError as error:
        raise ConfigError(f"{key}={error}; {_EXPECTED}") from None
    if not (path / "checkpoints").is_dir():
        return path.resolve()
    newest, faults = checkpoints.Checkpoints(path / "checkpoints").newest()
    if newest is None:
        raise ConfigError(f"{key}={text}: has no whole checkpoint. {' '.join(faults)}")
    for fault in faults:
        print(f"Passed over: {fault}")
    return newest


def _find_misfit(module: nn.Module, weights: Mapping[str, Any]) -> list[str]:
    """Returns which weights are missing, unexpected and of another shape, a line each; none where all fit."""
    own = module.state_dict()
    shapes = [
        f"{name} (expected {[*own[name].shape]}, found {[*weights[name].shape]})"
        for name in own
        if isinstance(own[name], Tensor)
        and isinstance(weights.get(name), Tensor)
        and own[name].shape != weights[name].shape
    ]
    found = {
        "missing": [name for name in own if name not in weights],
        "unexpected": [name for name in weights if name not in own],
        "of another shape": shapes,
    }
    return [f"{what}: {_list(names)}" for what, names in found.items() if names]


def _list(names: Iterable[str]) -> str:
    listed = list(names)
    more = f" and {len(listed) - _MOST_NAMES} more" if len(listed) > _MOST_NAMES else ""
    return ", ".join(name[:_LONGEST_NAME] for name in listed[:_MOST_NAMES]) + more
