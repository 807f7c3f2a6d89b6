"""The `optimizations` and the `ema` of a config: each form of a switch, expanded to a node with `_target_`.

A switch is false, true, a mapping of values over those of `conf/optimization/<name>.yaml`, or `{_target_: own.Class}`.
Imports no torch: a mistake in a built-in optimization is reported before torch is loaded.
"""

from __future__ import annotations

import contextlib
import itertools
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, fields, is_dataclass, replace
from typing import Any, get_type_hints

from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType
from hydra.core.override_parser.types import Override
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from runner.config.composition.interpolation import escape
from runner.config.composition.source import CONF_DIR, FileConfigSource
from runner.config.errors import ConfigError, explain_value, shown_value
from runner.config.schema import EmaConfig, InitConfig
from runner.utils.utils import check_choice, check_fraction, suggest
from runner.utils.wrapper import built_in
from runner.utils.wrapper.protocol import Optimization, check_with_others

Plain = dict[str, Any]

_EMA = "runner.engines.ema.EMA"
# The classes with the arguments of built-in targets; importing another target may load torch.
_CLASSES: dict[str, Any] = {
    f"{built_in.__name__}.{name}": kind for name, kind in vars(built_in).items() if is_dataclass(kind)
}
_CLASSES[_EMA] = EmaConfig
_SWITCH = re.compile(r"(?P<key>(?:engines\.[^.]+\.)?optimizations\.(?P<name>[^.]+))(?:\.(?P<argument>.+))?")
_LISTS = {"freeze": "patterns", "replace": "rules"}  # the argument that a list stands for
_CHECKPOINTING = {"none": False, "full": True}
# A value that switches an optimization off: the configs of earlier runs contain the arguments of every optimization.
_OFF: dict[str, tuple[str, Any]] = {
    "freeze": ("patterns", []),
    "lora": ("rank", 0),
    "replace": ("rules", []),
    "fp8": ("enabled", False),
    "device_map": ("budgets", None),
    "compile": ("scope", ("off", False)),  # YAML reads an unquoted off as false
    "ema": ("decay", 0),
}
_search_path: list[str] = []  # of the command line; Hydra keeps it in a copy of its sources that is not reachable
_apply_by_hydra = ConfigLoaderImpl._apply_overrides_to_config


def expand_when_composed() -> None:
    """Makes Hydra expand the optimizations of each config that it composes."""
    ConfigLoaderImpl._apply_overrides_to_config = staticmethod(_apply_overrides)  # type: ignore[method-assign]


@contextlib.contextmanager
def restored_composer(search_path: list[str] | None = None) -> Iterator[None]:
    """Leaves Hydra's own composition as it was after a block, for a program that uses Hydra itself.

    Args:
        search_path: the places that an earlier composition searched; with them, its config can be expanded again.
    """
    hook = vars(ConfigLoaderImpl)["_apply_overrides_to_config"]
    places = list(_search_path)
    _search_path[:] = search_path or []
    try:
        yield
    finally:
        ConfigLoaderImpl._apply_overrides_to_config = hook  # type: ignore[method-assign]
        _search_path[:] = places


def searched_places() -> list[str]:
    """Returns the places that the last composition searched beside the folders of its command line."""
    return list(_search_path)


def _apply_overrides(overrides: list[Override], cfg: DictConfig) -> None:
    """Applies the overrides of a command line as Hydra does, then expands the shared optimizations.

    `optimizations.unsloth=true` would delete the values that stand before it: such an override is applied last, and
    only where there is no value.
    """
    typed = [override.value() for override in overrides if override.key_or_group == "hydra.searchpath"]
    _search_path[:] = [str(place) for places in typed if isinstance(places, list) for place in places]
    _check_contradictions(overrides)
    _check_names(overrides, cfg)
    for key in ("optimizations", *(f"engines.{name}.optimizations" for name in cfg.get("engines") or ())):
        if OmegaConf.is_dict(node := OmegaConf.select(cfg, key)):
            OmegaConf.set_struct(node, False)  # a struct refuses a value of a switch that is off
            raw: Any = OmegaConf.to_container(node, resolve=False)
            node.update({name: _spell_out(name, value) for name, value in raw.items()})
    if "ema" in cfg and cfg.ema is None and any(override.key_or_group.startswith("ema.") for override in overrides):
        cfg.ema = _read_preset("ema/default")
    _complete_init(overrides, cfg)
    overrides = [_spell_out_override(override) for override in overrides]
    enabling = [override for override in overrides if _switch_of(override) and override.value() is True]
    _apply_by_hydra([override for override in overrides if override not in enabling], cfg)
    for override in enabling:
        node = OmegaConf.select(cfg, override.key_or_group)
        if not OmegaConf.is_dict(node):
            _apply_by_hydra([override], cfg)
        elif _is_off(name := override.key_or_group.rpartition(".")[2], node):
            del node[_OFF[name][0]]
    _complete_init([], cfg)  # an override may have set it as a whole
    expand_composed(cfg)


def _complete_init(overrides: list[Override], cfg: DictConfig) -> None:
    """Gives `init` all of its keys: an override may set each of them, and a resumed run has the same config."""
    is_set = any(override.key_or_group.startswith("init.") for override in overrides)
    if "init" in cfg and (OmegaConf.is_dict(cfg.init) or (cfg.init is None and is_set)):
        raw: Any = OmegaConf.to_container(cfg, resolve=False)
        cfg.init = asdict(InitConfig()) | (raw["init"] or {})


def expand_composed(cfg: DictConfig) -> None:
    """Expands the shared optimizations and the EMA of a composed config in place; interpolations stay as they are."""
    if OmegaConf.is_dict(cfg.get("optimizations")):
        raw: Any = OmegaConf.to_container(cfg, resolve=False)
        switches, cfg.ema = _expand_shared(raw["optimizations"], raw.get("ema"), is_resolved=False)
        cfg.optimizations = OmegaConf.create(switches, flags={"struct": False})


def _spell_out(name: str, value: Any) -> Any:
    """Returns the mapping that a list stands for, and the switch that a text of `checkpointing` stands for."""
    if isinstance(value, list) and name in _LISTS:
        return {_LISTS[name]: value}
    return _CHECKPOINTING.get(value, value) if name == "checkpointing" and isinstance(value, str) else value


def _spell_out_override(override: Override) -> Override:
    """Returns an override by a list as one of the argument that the list stands for, so that others are kept."""
    name = _switch_of(override)
    if name in _LISTS and isinstance(override.value(), list):
        return replace(override, key_or_group=f"{override.key_or_group}.{_LISTS[name]}")
    return override


def _switch_of(override: Override) -> str | None:
    """Returns the name of an optimization that an override sets as a whole; None if it sets an argument or deletes."""
    match = _SWITCH.fullmatch(override.key_or_group)
    return None if match is None or match["argument"] or override.is_delete() else match["name"]


def _check_names(overrides: list[Override], cfg: DictConfig) -> None:
    """Checks that an optimization that is switched off is one: a misspelt name would be off without effect."""
    for override in overrides:
        name, parent = _switch_of(override), override.key_or_group.rpartition(".")[0]
        if name is not None and override.value() is False:
            nodes = [OmegaConf.select(cfg, key) for key in ("optimizations", parent)]
            if not any(OmegaConf.is_dict(node) and name in node for node in nodes) and name != "ema":
                raise _unknown(override.key_or_group)


def _unknown(place: str) -> ConfigError:
    hint = suggest(place.rpartition(".")[2], _list_presets())
    return ConfigError(f"{place}: no such key; {hint}; one of your own: +{place}={{_target_: own.Class}}")


def switches_off(off: Override, other: Override) -> bool:
    """Returns True if an override switches off an optimization that another one enables or sets a value of."""
    key, value = _read_override(off)
    other_key, other_value = _read_override(other)
    if value is not False or key != other_key or other_value is False or other.is_delete():
        return False
    # A value such as lora.rank=0 is one beside others, which a sweep may contain; it contradicts `true` alone.
    return off.key_or_group == key or other_value is True


def _read_override(override: Override) -> tuple[str | None, Any]:
    """Returns the key of the optimization that an override is of, and False, True or a mapping of values."""
    match = _SWITCH.fullmatch(override.key_or_group)
    if match is None:
        return None, None
    value: Any = None if override.is_delete() else override.value()
    return match["key"], _read_switch(match["name"], {match["argument"]: value} if match["argument"] else value)


def _check_contradictions(overrides: list[Override]) -> None:
    """Checks that no optimization is switched off and also enabled or given a value on one command line."""
    switches = [override for override in overrides if _SWITCH.fullmatch(override.key_or_group)]
    for off, other in itertools.permutations(switches, 2):
        if switches_off(off, other):
            found = f"{other.input_line} enables it, or sets a value of it"
            raise ConfigError(f"{off.input_line}: it is switched off, and {found}; leave one of the two out")


def expand(plain: Plain) -> Plain:
    """Returns a resolved config with expanded `optimizations` and `ema`, and those of its engines.

    A switch becomes False, or a mapping with `_target_` and all arguments. An engine's own include what they inherit.

    Raises:
        ConfigError: naming the key, the expected and the found.
    """
    switches, ema = plain.get("optimizations") or {}, plain.get("ema")
    if not isinstance(switches, dict):
        raise ConfigError(
            f"optimizations={shown_value(switches)}: expected a mapping of names to true, false or values"
        )
    if ema is not None and "ema" in switches:  # of an earlier run, whose EMA this command line has changed
        switches = {key: value for key, value in switches.items() if key != "ema"}
    switches, ema = _expand_shared(switches, ema, is_resolved=True)
    engines = {
        name: _expand_engine(name, engine, switches, ema) for name, engine in (plain.get("engines") or {}).items()
    }
    return {**plain, "optimizations": switches, "ema": ema, "engines": engines}


def _expand_shared(switches: Plain, ema: Any, *, is_resolved: bool) -> tuple[Plain, Plain | None]:
    expanded = _expand_switches(switches, {}, "optimizations", is_resolved=is_resolved)
    return expanded, _expand_ema(ema, switches.get("ema"), "", is_resolved=is_resolved)


def _expand_engine(name: str, engine: Any, switches: Plain, ema: Plain | None) -> Any:
    """Returns an engine's node with its own optimizations on top of the shared ones."""
    if not isinstance(engine, Mapping):
        return engine
    place = f"engines.{name}."
    own = engine.get("optimizations", {})
    if not isinstance(own, Mapping):
        raise ConfigError(f"{place}optimizations: expected a mapping of keys of optimizations; found {own!r}")
    expanded = dict(engine)
    if "freeze" in engine:
        own = {**own, "freeze": engine["freeze"]}
    if own or "optimizations" in engine:
        expanded["optimizations"] = _expand_switches(own, switches, f"{place}optimizations", is_resolved=True)
    if "ema" in engine or "ema" in own:
        expanded["ema"] = _expand_ema(engine.get("ema", ema), own.get("ema"), place, is_resolved=True)
    return expanded


def _expand_switches(values: Mapping[str, Any], shared: Plain, place: str, *, is_resolved: bool) -> Plain:
    expanded = {}
    for name, value in values.items():
        if name == "freeze_mode":
            expanded[name] = value
            if is_resolved:
                _explain(place, check_choice, name, value, built_in.FREEZE_MODES)
        elif name != "ema":
            switch = _read_switch(name, value)
            if name == "freeze" and isinstance(switch, dict) and (mode := (shared | dict(values)).get("freeze_mode")):
                switch = {"mode": mode} | switch
            preset = f"optimization/{name}"
            expanded[name] = _fill(switch, shared.get(name), preset, f"{place}.{name}", is_resolved=is_resolved)
    return expanded


def _read_switch(name: str, value: Any) -> Any:
    """Returns False, True or a mapping for each form of a switch; a value of another kind as it is."""
    value = _spell_out(name, value)
    if value is None or (isinstance(value, dict) and _is_off(name, value)):
        return False
    if name == "fp8" and isinstance(value, dict) and value.get("enabled") is True:
        return {key: argument for key, argument in value.items() if key != "enabled"}
    return value


def _is_off(name: str, values: Mapping[str, Any]) -> bool:
    """Returns True if one of the values switches an optimization off."""
    argument, off = _OFF.get(name, ("", None))
    if argument not in values or ("_target_" in values and (off is None or str(values["_target_"]) not in _CLASSES)):
        return False
    return values[argument] in off if isinstance(off, tuple) else bool(values[argument] == off)


def _fill(switch: Any, base: Any, preset: str, place: str, *, is_resolved: bool) -> Any:
    """Returns a switch with all arguments: its own values on top of a base's, or else of a preset's."""
    if switch is False or (not is_resolved and isinstance(switch, str) and "${" in switch):
        return switch
    values = switch if isinstance(switch, dict) else {}
    if not isinstance(base, dict):
        kind = _CLASSES.get(str(values.get("_target_")))
        is_complete = kind is not None and all(field.name in values for field in fields(kind))
        base = {} if is_complete else _read_preset(preset) or {}
    target = values.get("_target_", base.get("_target_"))
    name = place.rpartition(".")[2]
    if target is None:
        raise _unknown(place)
    if switch is not True and switch is not values:
        forms = {"checkpointing": "full, none, ", **dict.fromkeys(_LISTS, "a list, ")}.get(name, "")
        found = "a text" if isinstance(switch, str) else "another value"
        expected = f"expected true, false, {forms}or a mapping of values, found {found}"
        raise ConfigError(f"{place}={shown_value(switch)}: {expected}; true takes the values of conf/{preset}.yaml")
    kind = _CLASSES.get(str(target))
    merged = OmegaConf.structured(kind) if kind else OmegaConf.create({})
    for layer in [values] if base.get("_target_") != target else [base, values]:
        for key, value in _arguments(layer).items():
            merged = _merge(merged, {key: value}, place, is_resolved=is_resolved)
    content: Any = OmegaConf.to_container(merged, resolve=is_resolved, enum_to_str=True)
    if name in _LISTS and content.get(_LISTS[name]) == []:
        raise ConfigError(f"{place}.{_LISTS[name]}=[]: expected one or more; or set {place}=false")
    return {"_target_": target, **{str(key): value for key, value in content.items()}}


def _arguments(node: Plain) -> Plain:
    return {key: value for key, value in node.items() if key != "_target_"}


def _merge(node: Any, argument: Plain, place: str, *, is_resolved: bool) -> Any:
    """Returns a node with an argument set, of the type that the node's class gives it."""
    try:
        return OmegaConf.merge(node, escape(argument) if is_resolved else argument)
    except OmegaConfBaseException as error:
        (name,) = argument
        if name not in node.keys():  # noqa: SIM118 - a key without a value is not in a node
            raise ConfigError(
                f"{place}.{name}: no such key; {suggest(str(name), [str(key) for key in node])}"
            ) from error
        hint = get_type_hints(OmegaConf.get_type(node)).get(name, Any)
        raise ConfigError(explain_value(f"{place}.{name}", argument[name], hint)) from error


def _expand_ema(ema: Any, shorthand: Any, place: str, *, is_resolved: bool) -> Plain | None:
    """Returns the node of an EMA, with the values of `optimizations.ema` on top; None for none."""
    key, switch = f"{place}ema", _read_switch("ema", ema)
    if shorthand is not None:
        key, typed = f"{place}optimizations.ema", _read_switch("ema", shorthand)
        values = {} if typed is True else typed  # true keeps those of the config
        switch = switch | values if isinstance(switch, dict) and isinstance(values, dict) else typed
    return _fill(switch, None, "ema/default", key, is_resolved=is_resolved) or None


def _read_preset(path: str) -> Plain | None:
    """Returns the values of a file of conf/, or of the user's directories where Hydra composes; None for no file."""
    for source in _sources() if re.fullmatch(r"\w+/\w+", path) else ():
        if source.is_config(path):
            content: Any = OmegaConf.to_container(source.load_config(path).config, resolve=False)
            return dict(content)
    return None


def _list_presets() -> list[str]:
    sources = [source for source in _sources() if source.is_group("optimization")]
    return [name for source in sources for name in source.list("optimization", ObjectType.CONFIG)]


def _sources() -> list[Any]:
    hydra = GlobalHydra.instance()
    conf = [FileConfigSource("runner", f"file://{CONF_DIR}")]
    sources = hydra.config_loader().get_sources() if hydra.is_initialized() else conf
    return [*(FileConfigSource("typed", place) for place in _search_path if place.startswith("file://")), *sources]


def of_engine(plain: Plain, name: str) -> tuple[Plain, Plain | None]:
    """Returns an engine's optimizations that are on, as nodes by name, and its EMA or None, of an expanded config."""
    engine = plain["engines"].get(name) or {}
    switches = plain["optimizations"] | engine.get("optimizations", {})
    nodes = {key: node for key, node in switches.items() if isinstance(node, dict)}
    return nodes, engine.get("ema", plain["ema"])


def make_built_in(node: Plain) -> Optimization | None:
    """Returns a built-in optimization of its node; None for another target.

    Raises:
        ValueError: a value out of its range.
    """
    kind: Callable[..., Optimization] | None = _CLASSES.get(str(node["_target_"]))
    return None if kind is None else kind(**_arguments(node))


def make_optimization(node: Plain, instantiate: Callable[[Plain], Any]) -> Any:
    """Returns the optimization of a node. Nothing is seeded: adapters are drawn after the model's weights."""
    return make_built_in(node) or instantiate(node)


def find_mistakes(plain: Plain) -> list[str]:
    """Returns the mistakes of the optimizations of a resolved config, of the shared ones and of each engine's own."""
    engines = plain.get("engines") or {}
    mistakes = dict[str, None]()
    for name in ("", *engines):
        try:
            _check_engine({**plain, "engines": {name: engines[name]} if name else {}}, name)
        except ConfigError as error:
            mistakes[str(error)] = None  # once, though each engine has the shared ones
    return list(mistakes)


def _check_engine(plain: Plain, name: str) -> None:
    """Checks the values of the built-in optimizations of one engine, and that they may be combined."""
    nodes, ema = of_engine(expand(plain), name)
    own = plain["engines"].get(name) or {}
    place = f"engines.{name}.optimizations" if "optimizations" in own else "optimizations"
    made = {key: _explain(f"{place}.{key}", make_built_in, node) for key, node in nodes.items()}
    optimizations = {key: optimization for key, optimization in made.items() if optimization is not None}
    for key in optimizations:
        _explain(f"{place}.{key}", check_with_others, key, optimizations)
    if ema is not None and ema["_target_"] == _EMA:
        is_own = "ema" in own or "ema" in own.get("optimizations", {})
        _explain(f"engines.{name}.ema" if is_own else "ema", check_fraction, "decay", ema["decay"])


def _explain(place: str, check: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a check; its ValueError becomes a ConfigError with the key, and the argument where the message names it."""
    try:
        return check(*arguments)
    except ValueError as error:
        message = str(error)
        separator = "." if re.match(r"\w+[=.\[]", message) else ": "
        raise ConfigError(f"{place}{separator}{message}") from error
