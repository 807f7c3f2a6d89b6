"""Initializes a new run's models with weights of another run or program (`init`, or its short form `init_from`).

Only the weights of the source are read, and matched by name. Its config is not read, and nothing of it is executed.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import nn

from runner.config.errors import ConfigError
from runner.config.spec import InitSpec, find_init
from runner.run.weights.matching import Match, match
from runner.run.weights.placeholders import ModelBuilder
from runner.run.weights.sources import Source, find_source, read_source
from runner.utils.distributed import run_on_rank_zero

_ADAPTERS = (".lora_a", ".lora_b")


class InitialWeights(ModelBuilder):
    """Builds models and loads the weights of their sources into them, matched by name.

    Weights are loaded before the optimizations are applied, so that LoRA adapters keep their initial values. Weights
    that match only afterwards, such as those of a run with the same adapters, are loaded then.

    Args:
        specs: the source and the settings of each engine by the engine's name.
        paths: the file or folder of each source by its text in the config.
    """

    def __init__(self, specs: Mapping[str, InitSpec], paths: Mapping[str, Path]) -> None:
        self._specs = specs
        self._paths = paths
        self._sources: dict[str, Source] = {}
        self._matches: dict[str, Match] = {}  # by engine
        self._names_before: dict[str, set[str]] = {}  # by engine that is not complete before the optimizations

    def build(self, engine: str, key: str, node: Any, make: Callable[[Any], nn.Module]) -> nn.Module:
        """Builds an engine's model and loads the weights of its source if they match.

        Raises:
            ConfigError: the source has no weights of this engine, or can't be read.
        """
        module = make(node)
        if engine not in self._specs:
            return module
        found = self._match(engine, module)
        self._matches[engine] = found
        if not found.is_complete:
            self._names_before[engine] = set(module.state_dict())
        if found.is_complete or not self._specs[engine].strict:
            self._load(engine, module, found)
        return module

    def finish(self, engine: str, module: nn.Module) -> None:
        """Loads the weights that did not match before the optimizations.

        Raises:
            ConfigError: naming weights that are missing, unused or mismatched; or nothing was loaded.
        """
        if engine not in self._names_before:
            return
        spec, before = self._specs[engine], self._matches[engine]
        after = self._match(engine, module)
        if spec.strict and not after.is_complete:
            raise self._refuse(engine, before if before.weights else after)
        if not spec.strict:  # weights of the model as it was built keep what the optimizations have made of them
            new = {name: value for name, value in after.weights.items() if name not in self._names_before[engine]}
            after = replace(after, weights=new)
        self._load(engine, module, after)
        if not spec.strict:
            known = self._names_before[engine]
            unused = [name for name in before.unused if name not in after.weights]
            missing = [name for name in after.missing if name in known]
            after = replace(before, weights=before.weights | after.weights, unused=unused, missing=missing)
        self._matches[engine] = after
        if not after.weights:
            raise self._refuse(engine, before)

    @property
    def lines(self) -> list[str]:
        """Lines for the log about each source, once the models are built: a table for each engine."""
        lines: list[str] = []
        for engine, spec in self._specs.items():
            source = self._sources[spec.path]
            head = f"{spec.key}={spec.path}: weights of {source.description}"
            lines += [head] if head not in lines else []
            lines += [f"  engine {engine}"] if len(self._specs) > 1 else []
            lines += [f"  {line}" for line in (*source.notes, *self._matches[engine].table())]
        return lines

    def _match(self, engine: str, module: nn.Module) -> Match:
        spec = self._specs[engine]
        source = self._read(spec)
        if source.has_engines:
            source = replace(source, states={engine: self._weights_of_engine(spec, source, engine)})
        elif not source.states:
            raise ConfigError(f"{spec.key}={spec.path}: expected a state dict, tensors by name, found none in it")
        try:
            return match(spec, source, engine, module)
        except ValueError as error:
            raise ConfigError(f"{spec.key}={spec.path}: {error}") from error

    def _read(self, spec: InitSpec) -> Source:
        if spec.path not in self._sources:
            path = self._paths[spec.path]
            try:
                self._sources[spec.path] = read_source(path)
            except OSError as error:
                place = error.filename or path
                raise ConfigError(f"{spec.key}={spec.path}: {place}: can't be read ({error.strerror})") from error
            except ValueError as error:
                raise ConfigError(f"{spec.key}={spec.path}: {error}") from error
        return self._sources[spec.path]

    def _weights_of_engine(self, spec: InitSpec, source: Source, engine: str) -> Mapping[str, Any]:
        """Returns the weights of the engine with the same name, or of the only engine if both sides have one."""
        states = source.states
        is_only = len(states) == 1 and (spec.key.startswith("engines.") or len(self._specs) == 1)
        weights = next(iter(states.values())) if is_only else states.get(engine)
        if not isinstance(weights, Mapping) or not all(isinstance(name, str) for name in weights):
            names = ", ".join(sorted(states)) or "none"
            raise ConfigError(f"{spec.key}={spec.path}: expected weights of engine {engine!r}, found those of {names}")
        return weights

    def _load(self, engine: str, module: nn.Module, found: Match) -> None:
        try:
            found.load(module)
        except (RuntimeError, TypeError, ValueError) as error:
            spec = self._specs[engine]
            raise ConfigError(f"{spec.key}={spec.path}: engine {engine}: {error}") from error

    def _refuse(self, engine: str, found: Match) -> ConfigError:
        spec = self._specs[engine]
        head = f"{spec.key}={spec.path}: engine {engine}: expected the weights of its model, found others"
        lines = [*found.remarks, *found.mismatch_lines()]
        adapters = [name for name in found.unused if name.endswith(_ADAPTERS)]
        init = spec.key.removesuffix(".path").removesuffix("_from")
        names = [*found.weights, *found.unused]
        if names and all(name.endswith(_ADAPTERS) for name in names):
            remedy = f"It holds adapters alone, for a run with optimizations.lora: {init}.include=['*.lora_?']"
        elif adapters:
            remedy = "Weights with adapters become those of the model in an export: python -m runner.export RUN"
        else:
            remedy = f"Name what differs in {init}.rename or {init}.exclude, or load what fits with {init}.strict=false"
        if not found.weights:
            lines.append("loaded: nothing, so that the model would start as it is initialized")
        return ConfigError("\n".join([head, *(f"  {line}" for line in lines), remedy]))


def find_initial_weights(plain: Mapping[str, Any]) -> InitialWeights | None:
    """Returns the initial weights that `init` or `init_from` name; None for none. Called by all ranks.

    Raises:
        ConfigError: a path has no weights.
        RankError: on the other ranks.
    """
    specs = {}
    for engine in plain["engines"] or {"model": {}}:
        if (spec := find_init(plain, engine)) is not None:
            specs[engine] = spec
    if not specs:
        return None
    keys = {spec.path: spec.key for spec in specs.values()}
    paths = run_on_rank_zero(lambda: {text: find_source(key, text) for text, key in keys.items()})
    return InitialWeights(specs, paths)
