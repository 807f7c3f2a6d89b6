"""The `optimizations` of a config: read, checked, and as arguments of what carries them out.

An engine's own stand on top of those of all. Must not import torch at the top: a mistake is told before.
"""

from __future__ import annotations

from collections.abc import Mapping
from enum import Enum
from typing import TYPE_CHECKING, Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config.composition.interpolation import escape
from runner.config.errors import ConfigError, suggest
from runner.config.schema import CheckpointingConfig, OptimizationsConfig, RuleConfig, UnslothConfig

if TYPE_CHECKING:
    import torch
    from torch import nn

    from runner.utils.wrapper.applied import AppliedOptimizations
    from runner.utils.wrapper.replace import Rule

Plain = dict[str, Any]


_ON_GPUS = "liger_kernel."


class Purpose(Enum):
    """What engines are built for: to train, or evaluate what trained; to use exported weights; to write weights."""

    train = "train"
    use = "use"
    write = "write"


def read(shared: Mapping[str, Any], own: Mapping[str, Any] | None = None, place: str = "optimizations") -> Plain:
    """Returns the settings of one engine as plain values, each section with all its keys.

    `unsloth` and `checkpointing` become a mapping, or None where they are off.

    Raises:
        ConfigError: naming the key, what was expected and what was found.
    """
    typed = OmegaConf.structured(OptimizationsConfig)
    merged = _merged(typed, dict(shared), "optimizations")
    plain = _plain(_merged(merged, dict(own or {}), place))
    plain["unsloth"] = _read_unsloth(plain["unsloth"], place)
    plain["checkpointing"] = _read_checkpointing(plain["checkpointing"], place)
    plain["replace"] = [_read_rule(rule, f"{place}.replace[{i}]") for i, rule in enumerate(plain["replace"])]
    if mistake := _find_contradiction(plain):
        raise ConfigError(f"{place}.{mistake}")
    return plain


def _merged(typed: Any, values: Plain, place: str) -> Any:
    try:
        return OmegaConf.merge(typed, escape(values))
    except OmegaConfBaseException as error:
        key = f"{place}.{error.full_key}" if error.full_key else place
        known = [str(name) for name in error.parent_node] if OmegaConf.is_dict(error.parent_node) else []
        message = str(error.msg or error).splitlines()[0]
        if known and error.key not in known:
            message = f"no such key; {suggest(str(error.key), known)}"
        raise ConfigError(f"{key}: {message}") from error


def _plain(cfg: Any) -> Plain:
    plain = OmegaConf.to_container(cfg, resolve=True, enum_to_str=True)
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _read_unsloth(value: Any, place: str) -> Plain | None:
    if isinstance(value, dict):
        return _plain(_merged(OmegaConf.structured(UnslothConfig), value, f"{place}.unsloth"))
    if not isinstance(value, bool):
        raise ConfigError(f"{place}.unsloth={value}: expected true, false, or a mapping such as {{keep_last: 2}}")
    return _plain(OmegaConf.structured(UnslothConfig)) if value else None


def _read_checkpointing(value: Any, place: str) -> Plain | None:
    if isinstance(value, dict):
        return _plain(_merged(OmegaConf.structured(CheckpointingConfig), value, f"{place}.checkpointing"))
    if value in ("none", None):
        return None
    if value == "full":
        return _plain(OmegaConf.structured(CheckpointingConfig))
    expected = "expected none, full, or a mapping such as {every: 2}, {include: [layers.*]}, {memory_budget: 0.5}"
    raise ConfigError(f"{place}.checkpointing={value}: {expected}")


def _read_rule(value: Any, place: str) -> Plain:
    if not isinstance(value, dict) or not isinstance(value.get("with"), str):
        raise ConfigError(f"{place}: expected {{match: class path, with: class or converter path}}; found {value!r}")
    rest = {key: each for key, each in value.items() if key != "with"}
    if not isinstance(rest.get("match"), str):
        raise ConfigError(f"{place}.match: expected the path of a class of modules; found {rest.get('match')!r}")
    read = _plain(_merged(OmegaConf.structured(RuleConfig), rest, place))
    return {**read, "with": value["with"]}


def _find_contradiction(plain: Plain) -> str | None:
    blocks, scope = plain["checkpointing"], plain["compile"]["scope"]
    budget = None if blocks is None else blocks["memory_budget"]
    if plain["unsloth"] is not None and blocks is not None:
        return "checkpointing: unsloth recomputes the blocks already; set one of the two"
    if scope == "whole" and (plain["unsloth"] is not None or (blocks is not None and budget is None)):
        return "compile.scope=whole: recomputed blocks break the graph of the whole; take scope=blocks"
    if budget is not None and (scope == "off" or not 0 <= budget <= 1):
        return f"checkpointing.memory_budget={budget}: expected 0 to 1, where compile.scope is blocks or whole"
    if budget is not None and plain["compile"]["backend"] == "eager":
        return "checkpointing.memory_budget: the backend eager compiles nothing that would heed it; take inductor"
    if not 0 <= plain["lora"]["dropout"] < 1:
        return f"lora.dropout={plain['lora']['dropout']}: expected at least 0 and less than 1"
    if not plain["device_map"]["bytes_factor"] > 0:
        return f"device_map.bytes_factor={plain['device_map']['bytes_factor']}: expected more than 0"
    budgets = plain["device_map"]["budgets"]
    if isinstance(budgets, dict) and (odd := [name for name in budgets if str(name).startswith("meta")]):
        return f"device_map.budgets.{odd[0]}: nothing is computed there; expected devices such as cuda:0 and cpu"
    if budgets is not None and not (isinstance(budgets, dict) and budgets):
        return f"device_map.budgets={budgets}: expected devices with bytes, such as {{cpu: 8GB}}, or null"
    if plain["lora"]["rank"] < 0:
        return f"lora.rank={plain['lora']['rank']}: expected 1 or more, or 0 for none"
    if not 0 <= plain["ema"]["decay"] < 1:
        return f"ema.decay={plain['ema']['decay']}: expected at least 0, for none, and less than 1"
    return None


def find_mistakes(cfg: DictConfig) -> list[str]:
    """Returns what is wrong with the optimizations of a composed config, of all engines and each one's own."""
    shared = OmegaConf.to_container(cfg.optimizations, resolve=True)
    assert isinstance(shared, dict)
    names = OmegaConf.select(cfg, "engines") or []
    engines = {name: OmegaConf.select(cfg, f"engines.{name}.optimizations") for name in names}
    places: dict[str, Any] = {
        "optimizations": None,
        **{f"engines.{n}.optimizations": own for n, own in engines.items()},
    }
    mistakes = []
    for place, own in places.items():
        try:
            if own is not None and not OmegaConf.is_dict(own):
                raise ConfigError(f"{place}: expected a mapping of keys of optimizations; found {own!r}")
            read({str(key): value for key, value in shared.items()}, None if own is None else _plain(own), place)
        except ConfigError as error:
            mistakes.append(str(error))
    return list(dict.fromkeys(mistakes))


def of_engine(plain: Plain, name: str) -> Plain:
    """Returns the settings of an engine of a resolved config; its own stand on top."""
    own = (plain["engines"] or {}).get(name, {})
    place = f"engines.{name}.optimizations" if "optimizations" in own else "optimizations"
    settings = read(plain["optimizations"], own.get("optimizations"), place)
    return {**settings, "freeze": own["freeze"]} if "freeze" in own else settings


def carry_out(
    module: nn.Module, device: torch.device, settings: Plain, purpose: Purpose = Purpose.train
) -> AppliedOptimizations:
    """Changes a module as the settings say; returns what was done.

    Raises:
        ConfigError, ValueError: something can't be done, and nothing was.
    """
    from runner.utils.wrapper import optimize

    return optimize(module, device, **arguments(settings, device, purpose))


def arguments(settings: Plain, device: torch.device, purpose: Purpose = Purpose.train) -> Plain:
    """Returns the arguments with which `wrapper.optimize` carries settings out.

    Raises:
        ConfigError: a rule names what this device can't run.
    """
    lora, fp8, compiled, spread = (dict(settings[key]) for key in ("lora", "fp8", "compile", "device_map"))
    export, is_fp8, scope = lora.pop("export"), fp8.pop("enabled"), compiled["scope"]
    checkpointing = dict(settings["checkpointing"] or {})
    budget = checkpointing.pop("memory_budget", None)
    recomputes = settings["checkpointing"] is not None and budget is None
    is_trained, is_run = purpose is Purpose.train, purpose is not Purpose.write
    return {
        "freeze": settings["freeze"] if is_trained else [],
        "freeze_mode": settings["freeze_mode"],
        "lora": lora if lora["rank"] > 0 else None,
        "exports_adapter": export == "adapter",
        "is_merged": purpose is Purpose.use and export == "merged",
        "replace": [_rule(each, device) for each in settings["replace"]],
        "fp8": fp8 if is_fp8 and is_run else None,
        "device_map": spread if spread["budgets"] is not None and is_run else None,
        "compile": {**compiled, "memory_budget": budget} if scope != "off" and is_run else None,
        "unsloth": settings["unsloth"] if is_trained else None,
        "checkpointing": checkpointing if recomputes and is_trained else None,
    }


def _rule(settings: Plain, device: torch.device) -> Rule:
    from runner.config.targets import locate
    from runner.utils.wrapper.replace import Rule

    if settings["with"].startswith(_ON_GPUS) and device.type == "cpu":
        raise ConfigError(f"replace: {settings['with']} is made of kernels for a GPU, and the run is on the CPU")
    rest = {key: settings[key] for key in ("include", "exclude", "subclasses", "arguments")}
    return Rule(locate(settings["match"]), locate(settings["with"]), **rest)
