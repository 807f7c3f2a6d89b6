"""Earlier paths of modules: configs and programs that name them keep working.

Imports the standard library only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

MOVED = {
    "runner.engines.averages": "runner.engines.ema",
    "runner.engines.eager": "runner.engines.dynamo",
    "runner.engines.faults": "runner.engines.gradients",
    "runner.engines.fed": "runner.engines.forward",
    "runner.engines.gathered": "runner.engines.metrics",
    "runner.engines.group_values": "runner.engines.optim.group_values",
    "runner.engines.layouts": "runner.engines.strategies",
    "runner.engines.optimizer_state": "runner.engines.optim.optimizer_state",
    "runner.engines.optimizers": "runner.engines.optim.optimizers",
    "runner.engines.schedule": "runner.engines.optim.schedule",
    "runner.engines.schedulers": "runner.engines.optim.schedulers",
    "runner.engines.settings": "runner.engines.optim.hyperparameters",
    "runner.engines.sharded": "runner.engines.fsdp",
    "runner.examples.audio_codec": "runner.examples.audio.audio_codec",
    "runner.examples.code_gpt": "runner.examples.audio.code_gpt",
    "runner.examples.speech": "runner.examples.audio.speech",
    "runner.examples.speech_codes": "runner.examples.audio.speech_codes",
    "runner.utils.adoption": "runner.utils.wrapper.transfer",
    "runner.utils.agenda": "runner.utils.train.loop",
    "runner.utils.agreement": "runner.utils.distributed.coordinator",
    "runner.utils.altered": "runner.utils.wrapper.applied",
    "runner.utils.attribution": "runner.utils.unsloth.memory_report",
    "runner.utils.batches": "runner.utils.sampler.batches",
    "runner.utils.blocks": "runner.utils.modules.selection",
    "runner.utils.comparison": "runner.utils.unsloth.comparison",
    "runner.utils.compiled": "runner.utils.wrapper.compile",
    "runner.utils.composites": "runner.utils.serialization.composites",
    "runner.utils.device_map": "runner.utils.wrapper.device_map",
    "runner.utils.disk": "runner.utils.files.disk",
    "runner.utils.early_stop": "runner.utils.unsloth.early_stop",
    "runner.utils.float8": "runner.utils.wrapper.float8",
    "runner.utils.frozen": "runner.utils.modules.frozen",
    "runner.utils.generators": "runner.utils.modules.generators",
    "runner.utils.host_memory": "runner.utils.unsloth.pinned_memory",
    "runner.utils.layout": "runner.utils.pattern",
    "runner.utils.lora": "runner.utils.wrapper.lora",
    "runner.utils.media": "runner.tracking.media",
    "runner.utils.memory": "runner.utils.distributed.memory",
    "runner.utils.message": "runner.utils.files.message",
    "runner.utils.mishaps": "runner.utils.train.failures",
    "runner.utils.offload": "runner.utils.unsloth.offload",
    "runner.utils.open_files": "runner.utils.files.open_files",
    "runner.utils.pace": "runner.utils.train.throughput",
    "runner.utils.packing": "runner.utils.serialization",
    "runner.utils.permutation": "runner.utils.sampler.permutation",
    "runner.utils.place": "runner.launch.environment",
    "runner.utils.positional": "runner.utils.unsloth.flat_call",
    "runner.utils.pt_file": "runner.utils.serialization.pt_file",
    "runner.utils.recompute": "runner.utils.unsloth.recompute",
    "runner.utils.replace": "runner.utils.wrapper.replace",
    "runner.utils.rng_state": "runner.utils.unsloth.rng_state",
    "runner.utils.samples": "runner.utils.sampler.samples",
    "runner.utils.selection": "runner.utils.modules.selection",
    "runner.utils.steps": "runner.utils.train.step",
    "runner.utils.streams": "runner.utils.unsloth.streams",
    "runner.utils.strict_json": "runner.utils.files.strict_json",
    "runner.utils.surroundings": "runner.utils.unsloth.replay",
    "runner.utils.weights": "runner.utils.modules.weights",
}
_PATH_KEYS = ("_target_", "match", "with")  # keys of a config whose values are dotted paths


def current_path(path: str) -> str:
    """Returns today's dotted path of what a path names: `runner.engines.layouts.DDP` is in another module now."""
    parts = path.split(".")
    for length in range(len(parts), 1, -1):
        module = ".".join(parts[:length])
        if module in MOVED:
            return ".".join([MOVED[module], *parts[length:]])
    return path


def update_paths(value: Any) -> Any:
    """Returns a nest of plain values with today's paths wherever `_target_` or a rule {match, with} names another."""
    if isinstance(value, list):
        return [update_paths(each) for each in value]
    if not isinstance(value, dict):
        return value
    updated = {}
    for key, each in value.items():
        is_path = key in _PATH_KEYS and isinstance(each, str)
        updated[key] = current_path(each) if is_path else update_paths(each)
    return updated


def install() -> None:
    """Makes modules importable by their earlier paths."""
    if not any(isinstance(finder, _MovedFinder) for finder in sys.meta_path):
        sys.meta_path.append(_MovedFinder())


class _MovedFinder(MetaPathFinder):
    """Finds a module by its earlier path."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        return ModuleSpec(fullname, _MovedLoader()) if fullname in MOVED else None


class _MovedLoader(Loader):
    """Loads a module from its new path, so that both paths name one module."""

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        module = importlib.import_module(MOVED[spec.name])
        self._spec = module.__spec__
        return module

    def exec_module(self, module: ModuleType) -> None:
        # Importlib has replaced the module's own spec, by which it is reloaded.
        module.__spec__ = self._spec
