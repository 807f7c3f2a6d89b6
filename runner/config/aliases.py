"""Earlier paths of modules and names of functions: configs and programs that have them keep working.

Imports the standard library only.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from types import ModuleType
from typing import Any

MOVED = {
    "runner.engines.averages": "runner.engines.ema",
    "runner.engines.eager": "runner.engines.dynamo",
    "runner.engines.faults": "runner.engines.gradients",
    "runner.engines.fed": "runner.engines.forward",
    "runner.engines.gathered": "runner.engines.metrics",
    "runner.engines.group_values": "runner.engines.restore",
    "runner.engines.hugging_face": "runner.engines.losses.transformers_loss_terms",
    "runner.engines.layouts": "runner.engines.strategies",
    "runner.engines.optimizer_state": "runner.engines.optim.optimizer_state",
    "runner.engines.optimizers": "runner.engines.optim.optimizers",
    "runner.engines.schedule": "runner.engines.optim.schedule_replay",
    "runner.engines.schedulers": "runner.engines.optim.schedulers",
    "runner.engines.settings": "runner.engines.optim.hyperparameters",
    "runner.engines.sharded": "runner.engines.fsdp",
    "runner.examples.audio_codec": "runner.examples.audio.audio_codec",
    "runner.examples.code_gpt": "runner.examples.audio.code_gpt",
    "runner.examples.speech": "runner.examples.audio.speech",
    "runner.examples.speech_codes": "runner.examples.audio.speech_codes",
    "runner.run.warm_start": "runner.run.weights.placeholders",
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
    "runner.utils.wrapper.optimization": "runner.utils.wrapper.protocol",
    "runner.utils.wrapper.optimizations": "runner.utils.wrapper.built_in",
}
RENAMED = {
    "runner.engines.ema": {"Averages": "EMA"},
    "runner.engines.metrics": {"Gathered": "MetricAccumulator"},
    "runner.engines.optim.hyperparameters": {"lrs": "current_lrs", "put": "set_group_value", "walk": "walk_schedulers"},
    "runner.engines.optim.optimizers": {"Joined": "ChainedOptimizer"},
    "runner.engines.optim.schedule_replay": {"Schedule": "LRSchedule"},
    "runner.engines.strategies": {"Alone": "Strategy"},
    "runner.examples.audio.speech_codes": {"Encoded": "EncodedSpeech"},
    "runner.utils.distributed": {
        "LeftError": "RankAbortError",
        "LostError": "RankLostError",
        "connect": "create_store",
        "gather": "all_gather_object",
        "generator_of": "default_generator",
        "is_leader": "is_rank_zero",
        "is_many": "is_distributed",
        "is_of_connection": "is_connection_error",
        "kept_generators": "preserve_rng_state",
        "num_ranks": "world_size",
        "of_leader": "run_on_rank_zero",
        "together": "run_on_all_ranks",
        "wait_for": "wait_for_keys",
    },
    "runner.utils.distributed.coordinator": {"Agreement": "Coordinator", "Word": "Message"},
    "runner.utils.distributed.memory": {
        "Peak": "PeakMemory",
        "describe": "describe_memory",
        "mib": "format_mib",
        "place_of": "memory_range",
    },
    "runner.utils.modules.selection": {"fits": "matches_any", "list_near": "list_nearest", "matches": "matches_glob"},
    "runner.utils.sampler.batches": {"slice_of": "rank_slice"},
    "runner.utils.sampler.samples": {"Samples": "SampleFetcher"},
    "runner.utils.serialization": {
        "Packed": "FlattenedState",
        "Snapshot": "HostSnapshot",
        "as_stored": "to_storable",
        "compact": "to_contiguous",
        "dtype_of": "parse_dtype",
        "is_spread": "is_dtensor",
        "name_of": "torch_name",
        "restore_raw": "restore_dtypes",
        "text_of": "format_key",
        "unpack": "unflatten",
        "where": "format_path",
    },
    "runner.utils.train": {"Inbox": "CommandSource", "Screen": "ProgressDisplay", "Typed": "LoopCommand"},
    "runner.utils.train.failures": {
        "Cut": "StepAborted",
        "EarlyMistake": "SetupError",
        "Elsewhere": "RemoteFailure",
        "Halt": "TrainingStopped",
        "Policy": "FailurePolicy",
        "explain": "describe_failure",
        "told": "disk_errors_as",
    },
    "runner.utils.unsloth": {"Report": "UnslothReport"},
    "runner.utils.unsloth.recompute": {"Block": "RecomputedBlock"},
    "runner.utils.utils": {"mix": "derive_seed"},
    "runner.utils.wrapper.device_map": {"DeviceMap": "DevicePlan"},
}
_MAX_PARTS = max(module.count(".") + 1 for module in MOVED)
_PATH_KEYS = ("_target_", "match", "with")  # keys of a config whose values are dotted paths


def current_path(path: str) -> str:
    """Returns today's dotted path of a class or function: `runner.engines.layouts.DDP` is in another module now."""
    parts = path.split(".")
    for length in range(min(len(parts), _MAX_PARTS), 1, -1):  # a path in an untrusted config may be very long
        module = ".".join(parts[:length])
        if module in MOVED:
            parts = [*MOVED[module].split("."), *parts[length:]]
            break
    renamed = RENAMED.get(".".join(parts[:-1]), {})
    return ".".join([*parts[:-1], renamed.get(parts[-1], parts[-1])])


def update_paths(value: Any) -> Any:
    """Returns a nest of plain values with today's paths wherever `_target_` or a rule {match, with} has others."""
    if isinstance(value, list):
        return [update_paths(element) for element in value]
    if not isinstance(value, dict):
        return value
    updated = {}
    for key, child in value.items():
        is_path = key in _PATH_KEYS and isinstance(child, str)
        updated[key] = current_path(child) if is_path else update_paths(child)
    return updated


def install_aliases() -> None:
    """Makes modules importable by their earlier paths, and their attributes by their earlier names."""
    if not any(isinstance(finder, _AliasFinder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _AliasFinder())


class _AliasFinder(MetaPathFinder):
    """Finds a module by its earlier path, and a module that has attributes with earlier names."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None = None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname in MOVED:
            return ModuleSpec(fullname, _MovedLoader())
        spec = PathFinder.find_spec(fullname, path, target) if fullname in RENAMED else None
        if spec is not None and isinstance(spec.loader, SourceFileLoader):
            spec.loader = _RenamedLoader(spec.loader.name, spec.loader.path)
        return spec


class _MovedLoader(Loader):
    """Loads a module from its new path, so that both paths name one module."""

    def exec_module(self, module: ModuleType) -> None:
        # Importlib returns the module that it finds in sys.modules after this call, not the empty one that it made.
        sys.modules[module.__name__] = importlib.import_module(MOVED[module.__name__])


class _RenamedLoader(SourceFileLoader):
    """Loads a module that finds attributes by their earlier names, too."""

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        own_getattr = vars(module).get("__getattr__")
        module.__getattr__ = partial(_find_renamed, module, own_getattr)  # type: ignore[method-assign]


def _find_renamed(module: ModuleType, own_getattr: Callable[[str], Any] | None, name: str) -> Any:
    if name in RENAMED[module.__name__]:
        return getattr(module, RENAMED[module.__name__][name])
    if own_getattr is not None:  # of a module that imports some of its attributes when they are first used
        return own_getattr(name)
    raise AttributeError(f"module {module.__name__!r} has no attribute {name!r}")
