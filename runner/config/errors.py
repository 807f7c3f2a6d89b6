"""Error messages for a config: one line with the key, the value found, and the nearest correct one."""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Mapping, Sequence
from enum import EnumMeta
from typing import Any

from hydra._internal.config_repository import IConfigRepository
from hydra.core.default_element import GroupDefault
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import OmegaConf
from omegaconf.errors import (
    ConfigAttributeError,
    ConfigKeyError,
    InterpolationResolutionError,
    OmegaConfBaseException,
    ValidationError,
)

from runner.config.schema import Config
from runner.control.signals import EXIT_STATUSES, status_of_interrupt
from runner.utils.utils import describe, escape_controls, find_nearest, one_line, suggest

HEADER = "# @package _global_"
_NULL_CHOICE = "Config group override must be a string or a list"  # Hydra's message for model=null
_CANT_MERGE = "Cannot merge DictConfig with ListConfig"  # OmegaConf's message for both directions
_NO_CHOICES = (
    "it is no group with choices; set its keys: {0}: {{KEY: VALUE}} in YAML, {0}.KEY=VALUE on the command line"
)
_LISTS = ("callbacks", "trackers")  # groups of which several choices are chosen at once
_MAX_VALUE_LENGTH = 200  # characters of a value in a message
_MAX_MESSAGE_LENGTH = 16_000  # characters of a message
_MAX_REASON_LENGTH = 1000  # characters of an error of an untrusted run
_FULL_ERROR = "HYDRA_FULL_ERROR"
_FULL_ERROR_SET_HERE = "RUNNER_SET_HYDRA_FULL_ERROR"  # in this process and its workers: the runner set it, not the user
_COMPOSERS = ("hydra.", "omegaconf.", "yaml.", "antlr4.")
_TYPE_NAMES = {
    int: "a whole number",
    float: "a number",
    bool: "true or false",
    str: "a text",
    list: "a list",
    dict: "a mapping",
    type(None): "null",
}


class ConfigError(ValueError):
    """A mistake of the user, printed as one message without a traceback."""


class RunError(RuntimeError):
    """The reason that ends a run, unless it is a bug: printed as one message, without a traceback."""


def shown(text: str) -> str:
    """Returns a value's text for a message: on one line, and cut after 200 characters."""
    return one_line(text if len(text) <= _MAX_VALUE_LENGTH else text[:_MAX_VALUE_LENGTH] + "…")


def shown_value(value: Any) -> str:
    """Returns a value for a message as `shown` does; null, true and false as in YAML."""
    names = {None: "null", True: "true", False: "false"}
    return names[value] if value is None or isinstance(value, bool) else shown(str(value))


def truncate(text: str, max_length: int = 4000) -> str:
    """Returns a text cut after `max_length` characters, followed by its full length."""
    return text if len(text) <= max_length else f"{text[:max_length]}… ({len(text):,} characters in all)"


def print_message(message: str) -> None:
    """Prints a message of one or more lines to standard error, cut where it is long."""
    print(escape_controls(truncate(message, _MAX_MESSAGE_LENGTH)), file=sys.stderr)


def wants_traceback() -> bool:
    """Returns whether the user set HYDRA_FULL_ERROR=1."""
    return os.environ.get(_FULL_ERROR) == "1" and _FULL_ERROR_SET_HERE not in os.environ


@contextlib.contextmanager
def make_hydra_raise() -> Iterator[None]:
    """Makes Hydra raise errors instead of printing them, within the block and in processes started by it."""
    variables = {} if wants_traceback() else {_FULL_ERROR: "1", _FULL_ERROR_SET_HERE: "1"}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name in variables:
            os.environ.pop(name, None)


_has_hidden_tracebacks = False


def hide_tracebacks(is_on: bool = True) -> None:
    """Prints unexpected errors in one line from now on, because this process runs an untrusted config."""
    global _has_hidden_tracebacks
    _has_hidden_tracebacks = is_on


def are_tracebacks_hidden() -> bool:
    """Returns whether an unexpected error is printed in one line."""
    return _has_hidden_tracebacks and not wants_traceback()


def describe_without_traceback(error: BaseException) -> str:
    """Returns an error in one line, which also says how to see the traceback."""
    return f"{one_line(truncate(describe(error), _MAX_REASON_LENGTH))}; {_FULL_ERROR}=1 shows the traceback"


def print_traceback(error: BaseException) -> None:
    """Prints an error to standard error: with its traceback, or in one line if tracebacks are hidden."""
    with contextlib.suppress(OSError):  # the terminal or pipe was closed
        if are_tracebacks_hidden():
            print_message(describe_without_traceback(error))
        else:
            print(escape_controls("".join(traceback.format_exception(error)).rstrip("\n")), file=sys.stderr)


def print_error(error: BaseException) -> int:
    """Prints an error to standard error; returns its exit status: 2 for a mistake of the user, 1 for any other."""
    message = format_error(error)
    if message is None:
        print_traceback(error)
        return 1
    print_message(message)
    return 2


def shows_traceback(error: BaseException) -> bool:
    """Returns whether a command raises an error with its traceback, instead of printing a message."""
    return wants_traceback() or (format_error(error) is None and not are_tracebacks_hidden())


@contextlib.contextmanager
def mention_start_directory(directory: str | None) -> Iterator[None]:
    """Adds the run's start directory to an error about a missing file.

    A relative path in a saved config is relative to the directory in which the run was started.

    Args:
        directory: the working directory of the run's start; None if unknown.
    """
    try:
        yield
    except ConfigError as error:
        if not directory or not isinstance(error.__cause__, FileNotFoundError) or directory == os.getcwd():
            raise
        remedy = "start there, or give an absolute path"
        raise ConfigError(f"{error}; the run was started in {directory}: {remedy}") from error.__cause__


@contextlib.contextmanager
def exit_on_config_error() -> Iterator[None]:
    """Turns a mistake of the user into one message and exit status 2, and Ctrl-C or a signal into its status.

    Any other error is raised. While tracebacks are hidden, it is printed in one line and the status is 1.
    """
    hide_tracebacks(False)
    try:
        yield
    except KeyboardInterrupt as interrupt:
        raise SystemExit(EXIT_STATUSES[status_of_interrupt(interrupt)[0]]) from None
    except Exception as error:
        if shows_traceback(error):
            raise
        raise SystemExit(print_error(error)) from None


def format_error(error: BaseException) -> str | None:
    """Returns the message for a mistake in a config, or None for any other error."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _explain_choice(error, error.options)
    if isinstance(error, ValueError) and str(error).startswith(_NULL_CHOICE):
        override = _find_override(error)
        group = shown(override.partition("=")[0]) or "GROUP"
        if group in _LISTS:
            return f"{shown(override)}: expected a list of choices; for none: {group}=[]"
        remedy = f"to leave it out, write override /{group}: null in the defaults of an experiment"
        return f"{shown(override)}: expected the name of a choice; {remedy}"
    if isinstance(error, TypeError) and (message := _explain_listed(error)):
        return message
    if isinstance(error, OverrideParseException):
        reason = one_line(str(error).splitlines()[0])
        return (
            f"{shown(error.override)}: it can't be read as key=value: {reason}; put a text into quotes: key='\"...\"'"
        )
    if isinstance(error, RecursionError) and _is_from_composer(error, depth=100):
        return "defaults: two configs include each other, or one includes itself; delete one of these entries"
    if isinstance(error, (HydraException, OmegaConfBaseException)) or _is_from_composer(error):
        return _explain_hydra(error) or _explain_cause(error)
    return None


def _is_from_composer(error: BaseException, depth: int = 1) -> bool:
    """Returns whether one of the last `depth` frames of an error is in Hydra, OmegaConf or YAML."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(str(frame.f_globals.get("__name__", "")).startswith(_COMPOSERS) for frame in frames[-depth:])


def _location_of(error: BaseException) -> str:
    """Returns the file that Hydra's message begins with, such as "In 'experiment/mine': "."""
    match = re.match(r"In '?([^'\n]+?)'?: ", str(error))
    return f"In '{shown(match.group(1))}': " if match and match.group(1) != "config" else ""


def _find_override(error: BaseException) -> str:
    """Returns the override of the command line that caused Hydra's error, from the frames of its traceback."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    overrides = [value for frame in frames for value in frame.f_locals.values() if isinstance(value, Override)]
    kinds = (str, list)  # of the value of a choice
    return next((str(o.input_line) for o in overrides if not o.is_delete() and not isinstance(o.value(), kinds)), "")


def _explain_listed(error: BaseException) -> str | None:
    """Returns the message for a list of choices with an item that is no text, which Hydra itself does not check."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        default, item = frame.f_locals.get("d"), frame.f_locals.get("item", "")
        if isinstance(default, GroupDefault) and not isinstance(item, str):
            if default.group in _LISTS:
                return f"{default.group}: expected a list of the names of choices, found {shown_value(item)} in it"
            return f"{default.group}: expected the name of a choice, found a list"
    return None


def _explain_choice(error: MissingConfigException, options: Sequence[str]) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    location = _location_of(error)
    last = group.rpartition("/")[2]
    if not options and last in field_names(Config):
        repository = _find_repository(error)
        if last == group or (repository is not None and not repository.group_exists(last)):
            return f"{location}{shown(group)}: {_NO_CHOICES.format(last)}"
        return f"{location}{shown(group)}: there is no such group; write override /{shown(f'{last}: {name}')}"
    return f"{location}{shown(f'{group}={name}')}: no such choice; {suggest(name, list(options))}"


def _explain_cause(error: BaseException) -> str | None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if cause is not None and cause.full_key:
        return _explain_key(cause, _location_of(error), str(error))
    if path := _find_merged_key(error):
        return f"{_location_of(error)}{path}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(" ".join(dict.fromkeys(lines))) or None


def _suggest_file(error: BaseException) -> str:
    """Returns the choices of the group whose file Hydra could not load, the nearest first; or nothing."""
    if not isinstance(error, MissingConfigException):
        return ""
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    repository = _find_repository(error)
    is_group = group and ".." not in group.split("/")
    options = repository.get_group_options(group) if repository is not None and is_group else []
    return f"; {suggest(name, options)}" if options else ""


def _find_repository(error: BaseException) -> IConfigRepository | None:
    """Returns the config folders in which Hydra has searched, from the frames of an error's traceback."""
    found = [frame.f_locals.get("repo") for frame, _ in traceback.walk_tb(error.__traceback__)]
    return next((repository for repository in reversed(found) if isinstance(repository, IConfigRepository)), None)


def _find_merged_key(error: BaseException) -> str | None:
    """Returns the message for a list where a mapping is expected, or the reverse, when files are merged.

    The message of OmegaConf names no key. The frames of its traceback do.
    """
    cause: BaseException | None = error
    while cause is not None:
        frames = [frame for frame, _ in traceback.walk_tb(cause.__traceback__)]
        if str(cause).startswith(_CANT_MERGE) and frames and "self" in frames[-1].f_locals:
            keys = [str(f.f_locals["key"]) for f in frames if f.f_code.co_name == "_map_merge" and "key" in f.f_locals]
            key = shown(".".join(keys))
            return f"{key}: {_expected_kind(frames[-1].f_locals['self'])}" if keys else None
        cause = cause.__cause__ or cause.__context__
    return None


def _expected_kind(node: Any, hint: Any = Any) -> str:
    found = "mapping" if OmegaConf.is_list(node) else "list"
    expected = "a list" if found == "mapping" else "a mapping"
    return f"expected {expected if hint is None or hint is Any else describe_type(hint)}, found a {found}"


def _explain_hydra(error: BaseException) -> str | None:
    """Returns a message with a remedy for an error of Hydra's that has none, or None for any other error."""
    message = str(error)
    location = re.match(r"In '?(experiment/[^'\n]+?)'?: ", message)
    prefix = location.group() if location else ""
    if location and re.search(r"@experiment\b|full_key: experiment$", message, re.MULTILINE):
        expected = f'expected the first line "{HEADER}": its keys are those of the whole config'
        return f"{shown(location.group(1))}.yaml: {expected}"
    if match := re.search(r"Could not load '([^']*)'", message):
        return f"{prefix}{shown(match.group(1))}: there is no such file in the config folders{_suggest_file(error)}"
    if match := re.search(r"Could not override '(\w*)'\. No match", message):
        key = match.group(1)
        if key in field_names(Config):
            return f"{prefix}override {key}: {_NO_CHOICES.format(key)}"
        return f"{prefix}override {key}: no such group; {suggest(key, field_names(Config))}"
    if match := re.match(r"Multiple values for ([^\s]+)\. ", message):
        key = shown(match.group(1)).rstrip(".")
        return f"{key}: it is chosen twice in the defaults; write override /{key}: in the second"
    if match := re.match(r"Error merging override ~+([^\s=]+)", message):
        key = match.group(1)
        remedy = f"leave it out, or set {key}=null" if _is_nullable(key) else "leave it out"
        return f"~{shown(key)}: this key can't be deleted; {remedy}"
    if match := re.match(r"Could not delete from config. '([^']*)' does not exist", message):
        key = shown(match.group(1))
        if _type_of(key) is not None:
            return f"~{key}: this key is null already; leave ~{key} out"
        return f"~{key}: there is no such key to delete"
    return None


def describe_multiple_datasets(key: str, found: str) -> str:
    """Returns the message for several datasets under a key that holds one, such as `data.train`."""
    remedy = "join them: {_target_: torch.utils.data.ConcatDataset, datasets: [...]}"
    if key.endswith("eval"):
        remedy += "; or name each: {a: {_target_: ...}, b: {_target_: ...}}; _target_: null removes one beside them"
    elif key.endswith("train"):
        remedy += "; or draw from them by weight: data.mix"
    return f"{key}: expected one dataset, found {found}; {remedy}"


def _explain_key(cause: OmegaConfBaseException, location: str, context: str) -> str:
    full_key = shown(str(cause.full_key))
    message = shown(str(cause.msg or cause).splitlines()[0])
    parent = cause.parent_node
    is_unknown_key = isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and OmegaConf.is_dict(parent)
    dataset = re.fullmatch(r"(data\.(?:train|eval))\.[^.]+", full_key)
    name = re.escape(full_key.rpartition(".")[2])
    is_dataset = rf"^To append.*(\b{name}: ?{{[^{{}}]*|\.{name}\.)_target_\b"
    if is_unknown_key and dataset and re.search(is_dataset, context, re.MULTILINE):
        key = dataset.group(1)
        remedy = f"; on the command line +{key}=..., which adds names" if key == "data.eval" else ""
        return describe_multiple_datasets(key, "several") + remedy
    if not is_unknown_key or cause.key in parent:
        return location + (_explain_type(cause, full_key) or f"{full_key}: {message}")
    key = shown(str(cause.key))
    if str(cause.key) in (str(key) for key in parent):
        mapping = full_key.rpartition(".")[0]
        return f"{location}{full_key}: expected a number as the key, found a text; set {mapping}={{{key}: ...}}"
    keys = [str(key) for key in parent if key != "hydra"] + (["experiment"] if "." not in full_key else [])
    hint = suggest(str(cause.key), keys) if keys else f"to add it: +{full_key}=..."
    if OmegaConf.get_type(parent) is dict and keys:
        hint += f"; to pass an argument of its _target_ that the YAML leaves out: +{full_key}=..."
    return f"{location}{full_key}: no such key; {hint}"


def _explain_type(cause: OmegaConfBaseException, full_key: str) -> str | None:
    """Returns the message for a value of the wrong type, or None for another mistake."""
    hint = _type_of(full_key)
    if full_key in INSTANTIATED_KEYS and "ListConfig" in str(cause.msg):
        return f"{full_key}: expected a mapping with _target_, found a list"
    if str(cause.msg).startswith(_CANT_MERGE):
        return f"{full_key}: {_expected_kind(cause.parent_node, hint)}"
    is_type_error = isinstance(cause, (ValidationError, TypeError))
    if not is_type_error or isinstance(cause, InterpolationResolutionError) or hint is None or hint is Any:
        return None
    value = cause.value
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=False)
    return explain_value(full_key, value, hint)


def explain_value(full_key: str, value: Any, hint: Any) -> str:
    """Returns the message for a value that has not the type of its hint."""
    return f"{full_key}={shown_value(value)}: expected {describe_type(hint)}{_remedy_for(value, hint)}"


def _remedy_for(value: Any, hint: Any) -> str:
    choices = list(hint.__members__) if isinstance(hint, EnumMeta) else []
    expected = describe_type(hint)
    if isinstance(value, bool) and choices:
        return "; YAML reads off, no, on and yes as false and true: put it into quotes"
    if isinstance(value, str) and choices:
        nearest = find_nearest(value, choices)
        return f"; did you mean {nearest}?" if nearest else ""
    if isinstance(value, float) and value.is_integer() and "whole" in expected:
        return f"; write {int(value)}"
    return ", found a text" if isinstance(value, str) and "number" in expected else ""


def describe_type(hint: Any) -> str:
    """Returns a type hint of the schema in words, such as "a whole number or null"."""
    alternatives = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(_describe_alternative(alternative) for alternative in alternatives)


def _describe_alternative(kind: Any) -> str:
    if isinstance(kind, EnumMeta):
        return "one of " + ", ".join(kind.__members__)
    if dataclasses.is_dataclass(kind):
        return "a mapping of " + ", ".join(field.name for field in dataclasses.fields(kind))
    if typing.get_origin(kind) is list and typing.get_args(kind) == (str,):
        return "a list of texts"
    return _TYPE_NAMES.get(typing.get_origin(kind) or kind, "another value")


def field_names(section: type) -> list[str]:
    """Returns the keys of a section of the config, or of `Config` itself, that the runner owns."""
    return [field.name for field in dataclasses.fields(section)]


def _type_of(key: str) -> Any:
    """Returns the schema's type of a key, or of an element of its list; None if the schema lacks the key."""
    hint: Any = Config
    for name in re.split(r"[.\[]", key.replace("]", "")):
        if typing.get_origin(hint) is list and name.isdigit():
            hint = typing.get_args(hint)[0]
        else:
            hint = typing.get_type_hints(hint).get(name) if dataclasses.is_dataclass(hint) else None
    return hint


def find_kind_mismatches(content: Any, hint: Any = Config, key: str = "") -> Iterator[str]:
    """Yields a message for each value that is a mapping, a list or a scalar where the schema has another of these.

    OmegaConf's own error for these names no key.
    """
    is_interpolation = isinstance(content, str) and "${" in content
    assignment = f"{key}={shown_value(content)}"
    if dataclasses.is_dataclass(hint) and isinstance(content, dict):
        hints = typing.get_type_hints(hint)
        for name in content.keys() & hints.keys():
            yield from find_kind_mismatches(content[name], hints[name], f"{key}.{name}".lstrip("."))
    elif dataclasses.is_dataclass(hint) and not is_interpolation:
        yield f"{assignment}: expected {describe_type(hint)}"
    elif isinstance(content, list) and key in INSTANTIATED_KEYS:
        yield f"{assignment}: expected a mapping with _target_, found a list"
    elif isinstance(content, list) and typing.get_origin(hint) is dict:
        yield f"{assignment}: expected a mapping, found a list"
    elif isinstance(content, dict) and typing.get_origin(hint) is list:
        yield f"{assignment}: expected {describe_type(hint)}, found a mapping"


def find_type_mistakes(section: type, values: Mapping[str, Any], key: str) -> list[str]:
    """Returns a message for each value of a mapping whose type is not that of a section's key."""
    mistakes = []
    hints = typing.get_type_hints(section)
    for name in values.keys() & hints.keys():
        try:
            OmegaConf.merge(OmegaConf.structured(section), {name: values[name]})
        except OmegaConfBaseException:
            mistakes.append(explain_value(f"{key}.{name}", values[name], hints[name]))
    return sorted(mistakes)


INSTANTIATED_KEYS = (
    "model",
    "data.train",
    "data.eval",
    "data.collate",
    "sampler",
    "optimizer",
    "scheduler",
    "feeder",
    "report",
    "loss",
)


def _is_nullable(key: str) -> bool:
    hint = _type_of(key)
    return (hint is Any and key in (*INSTANTIATED_KEYS, "distributed.strategy")) or type(None) in typing.get_args(hint)
