"""Initializes a new run's models with the weights of another run (`init_from`).

Only the weights of the other run are read, and matched by name. Its config is not read, and nothing of it is executed.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from runner.checkpoint import checkpoints
from runner.config import run_folder
from runner.config.errors import ConfigError
from runner.run.weights.placeholders import ModelBuilder
from runner.utils import io
from runner.utils.distributed import run_on_rank_zero
from runner.utils.modules.weights import load_weights

CONFIG_KEY = "init_from"
_EXPORT_SUFFIXES = (".safetensors", ".sft")
_EXPECTED = "expected a run's folder, one of its checkpoints/step_*, or an export (a .safetensors file)"
_MAX_NUM_NAMES, _MAX_NAME_LENGTH = 20, 200  # in a message


@dataclass(frozen=True)
class WeightsSource:
    """The source of an engine's initial weights: key and value in the config, and its checkpoint or export."""

    key: str
    text: str
    path: Path

    def read_weights(self) -> tuple[dict[str, Any], str]:
        """Returns the weights by engine, and a description of the source.

        The key is "" for an export that names no engine.

        Raises:
            ConfigError: the source is incomplete or can't be read.
        """
        try:
            if self.path.is_dir():
                weights = checkpoints.load(self.path, lambda part: "." not in part)
                return weights, f"step {int(self.path.name.partition('_')[2])} of {self.path.parent.parent}"
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
    """Builds models and loads the weights of another run into them, matched by name.

    Weights are loaded before the optimizations are applied, so that LoRA adapters keep their initial values. Weights
    that match only afterwards, such as those of a run with the same adapters, are loaded then.

    Args:
        sources: the source of each engine by the engine's name.
    """

    def __init__(self, sources: Mapping[str, WeightsSource]) -> None:
        self._sources = sources
        self._loaded: dict[Path, tuple[dict[str, Any], str]] = {}
        self._mismatches: dict[str, str] = {}  # by engine, before the optimizations

    def build(self, engine: str, key: str, node: Any, make: Callable[[Any], nn.Module]) -> nn.Module:
        """Builds an engine's model and loads the weights of its source if they match.

        Raises:
            ConfigError: the source has no weights of this engine, or can't be read.
        """
        module = make(node)
        if engine in self._sources and (mismatch := self._load(engine, module)) is not None:
            self._mismatches[engine] = mismatch
        return module

    def finish(self, engine: str, module: nn.Module) -> None:
        """Loads the weights that did not match before the optimizations.

        Raises:
            ConfigError: naming weights that are missing, unexpected or of another shape.
        """
        if engine in self._mismatches and self._load(engine, module) is not None:
            raise ConfigError(self._mismatches[engine])

    @property
    def lines(self) -> list[str]:
        """A line for the log about each source, once the models are built."""
        return list(
            dict.fromkeys(f"{source}: weights of {self._loaded[source.path][1]}" for source in self._sources.values())
        )

    def _load(self, engine: str, module: nn.Module) -> str | None:
        """Loads an engine's weights and returns None; if they do not match, loads none and returns the reason."""
        source = self._sources[engine]
        weights = self._find_weights(engine)
        mismatches = _find_mismatches(module, weights)
        if not mismatches:
            try:
                load_weights(module, weights)
                return None
            except (RuntimeError, TypeError, ValueError) as error:
                mismatches = [str(error)]
        head = f"{source}: engine {engine}: expected the weights of its model, found others"
        remedy = "Weights with adapters become those of the model in an export: python -m runner.export RUN"
        has_adapters = any(name.endswith(".lora_a") for name in weights)
        return "\n".join([head, *(f"  {line}" for line in mismatches), *([remedy] if has_adapters else [])])

    def _find_weights(self, engine: str) -> Mapping[str, Any]:
        """Returns the weights of the engine with the same name, or of the only engine if both sides have one."""
        source = self._sources[engine]
        if source.path not in self._loaded:
            self._loaded[source.path] = source.read_weights()
        parts, _ = self._loaded[source.path]
        is_only = len(parts) == 1 and (source.key != CONFIG_KEY or len(self._sources) == 1)
        weights = next(iter(parts.values())) if is_only else parts.get(engine)
        if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
            names = _join_names(sorted(parts)) or "none"
            raise ConfigError(f"{source}: expected weights of engine {engine!r}, found those of {names}")
        return weights


def find_initial_weights(plain: Mapping[str, Any]) -> InitialWeights | None:
    """Returns the initial weights that `init_from` names, or None if no engine has any. Called by all ranks.

    Raises:
        ConfigError: the path has no complete checkpoint or export.
        RankError: on the other ranks.
    """
    settings: dict[str, tuple[str, str]] = {}  # key and value of the config by engine
    for name, engine in (plain["engines"] or {"model": {}}).items():
        key = f"engines.{name}.{CONFIG_KEY}" if CONFIG_KEY in engine else CONFIG_KEY
        if (text := engine.get(CONFIG_KEY, plain.get(CONFIG_KEY))) is not None:
            settings[name] = key, text
    if not settings:
        return None
    distinct = dict.fromkeys(settings.values())
    paths = run_on_rank_zero(lambda: {(key, text): _find_source(key, text) for key, text in distinct})
    return InitialWeights({name: WeightsSource(*setting, paths[setting]) for name, setting in settings.items()})


def _find_source(key: str, text: str) -> Path:
    """Returns the checkpoint or export at a path of `init_from`; for a run, its newest complete checkpoint."""
    path = Path(text)
    if path.is_file():
        if path.suffix not in _EXPORT_SUFFIXES:
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


def _find_mismatches(module: nn.Module, weights: Mapping[str, Any]) -> list[str]:
    """Returns a line each for weights that are missing, unexpected, or of another shape; none if all match."""
    state = module.state_dict()
    shapes = []
    for name, expected in state.items():
        found = weights.get(name)
        if isinstance(expected, Tensor) and isinstance(found, Tensor) and expected.shape != found.shape:
            shapes.append(f"{name} (expected {[*expected.shape]}, found {[*found.shape]})")
    mismatches = {
        "missing": [name for name in state if name not in weights],
        "unexpected": [name for name in weights if name not in state],
        "of another shape": shapes,
    }
    return [f"{kind}: {_join_names(names)}" for kind, names in mismatches.items() if names]


def _join_names(names: list[str]) -> str:
    more = f" and {len(names) - _MAX_NUM_NAMES} more" if len(names) > _MAX_NUM_NAMES else ""
    return ", ".join(name[:_MAX_NAME_LENGTH] for name in names[:_MAX_NUM_NAMES]) + more
