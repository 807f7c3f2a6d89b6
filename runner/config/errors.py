"""What a mistake of the user's is told as: one message with the key, what was found, and the nearest right one.

Must not import torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import difflib
import os
import re
import sys
import traceback
import types
import typing
from collections.abc import Iterator, Sequence
from enum import EnumMeta
from typing import Any

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
from runner.control.signals import STATUSES
from runner.utils.utils import describe, escape_controls, one_line

HEADER = "# @package _global_"
_NULL_CHOICE = "Config group override must be a string or a list"  # Hydra's own words, for model=null
_LONGEST_SHOWN = 200  # characters of what was found
_LONGEST_TOLD = 16_000  # characters of a message
_LONGEST_REASON = 1000  # characters of an error of an untrusted run
_FULL_ERROR = "HYDRA_FULL_ERROR"
_OWN_FULL_ERROR = "RUNNER_SET_HYDRA_FULL_ERROR"  # in this process and its workers: the user did not set it
_COMPOSERS = ("hydra.", "omegaconf.", "yaml.", "antlr4.")
_EXPECTED = {int: "a whole number", float: "a number", bool: "true or false", str: "a text", list: "a list"}


class ConfigError(ValueError):
    """A mistake of the user's: printed as one message, without a traceback."""

    is_told = False


def suggest(name: str, choices: list[str]) -> str:
    """Returns ' Did you mean ...?' where something is near, else what there is to choose from."""
    close = difflib.get_close_matches(name, choices, n=1, cutoff=0.5)
    listed = one_line(", ".join(choices))
    return f"did you mean {one_line(close[0])}? (there are: {listed})" if close else f"there are: {listed}"


def shown(text: str) -> str:
    """Returns a text that was found somewhere as a part of a message of one line, cut where it is long."""
    return one_line(text if len(text) <= _LONGEST_SHOWN else text[:_LONGEST_SHOWN] + "…")


def cut(text: str, most: int = 4000) -> str:
    """Returns a text that says so where characters beyond `most` are left out."""
    return text if len(text) <= most else f"{text[:most]}… ({len(text):,} characters in all)"


def tell(message: str) -> None:
    """Prints a message on standard error, cut where it is long; it may have several lines."""
    print(escape_controls(cut(message, _LONGEST_TOLD)), file=sys.stderr)


def wants_traceback() -> bool:
    """Says whether the user has asked for tracebacks."""
    return os.environ.get(_FULL_ERROR) == "1" and _OWN_FULL_ERROR not in os.environ


@contextlib.contextmanager
def raised_by_hydra() -> Iterator[None]:
    """Has Hydra raise what it would print, for the length of a block, here and in processes that this one starts."""
    if wants_traceback():
        yield
        return
    os.environ.update({_FULL_ERROR: "1", _OWN_FULL_ERROR: "1"})
    try:
        yield
    finally:
        for name in (_FULL_ERROR, _OWN_FULL_ERROR):
            os.environ.pop(name, None)


_is_hidden = False


def hide_tracebacks(is_on: bool = True) -> None:
    """Has errors that nobody understands end in one line: this process runs what its user has not written."""
    global _is_hidden
    _is_hidden = is_on


def hides_tracebacks() -> bool:
    """Says whether an error is to be told in one line."""
    return _is_hidden and not wants_traceback()


def describe_hidden(error: BaseException) -> str:
    """Returns an error of an untrusted run as a part of one line, with the way to its traceback."""
    return f"{one_line(cut(describe(error), _LONGEST_REASON))}; {_FULL_ERROR}=1 shows the traceback"


def tell_traceback(error: BaseException) -> None:
    """Prints an error with its traceback on standard error, or in one line where tracebacks are hidden."""
    with contextlib.suppress(OSError):  # whoever read it has gone
        if hides_tracebacks():
            tell(describe_hidden(error))
        else:
            print(escape_controls("".join(traceback.format_exception(error)).rstrip("\n")), file=sys.stderr)


@contextlib.contextmanager
def told_where_started(directory: str | None) -> Iterator[None]:
    """Adds to the message for a file that is not there where the run was started: a relative path was read there.

    Args:
        directory: the working directory of the run's start; None where it isn't known.
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
    """Ends the program with status 2 and one message where a block meets a mistake of the user's; Ctrl-C, with 130.

    Another error of an untrusted run ends it with status 1 and one line.
    """
    hide_tracebacks(False)
    try:
        yield
    except KeyboardInterrupt:
        raise SystemExit(STATUSES["interrupted"]) from None
    except Exception as error:
        message = format_error(error)
        if message is None and hides_tracebacks():
            tell_traceback(error)
            raise SystemExit(1) from None
        if message is None or wants_traceback():
            raise
        tell(message)
        raise SystemExit(2) from None


def format_error(error: BaseException) -> str | None:
    """Returns the one message for a mistake in a config, or None for any other error."""
    if isinstance(error, ConfigError):
        return str(error)
    if isinstance(error, MissingConfigException) and error.options is not None:
        return _explain_choice(error, error.options)
    if isinstance(error, ValueError) and str(error).startswith(_NULL_CHOICE):
        typed = _find_override(error)
        group = shown(typed.partition("=")[0]) or "GROUP"
        remedy = f"to leave it out, write override /{group}: null in the defaults of an experiment"
        return f"{shown(typed)}: expected the name of a choice; {remedy}"
    if isinstance(error, OverrideParseException):
        reason = one_line(str(error).splitlines()[0])
        return (
            f"{shown(error.override)}: it can't be read as key=value: {reason}; put a text into quotes: key='\"...\"'"
        )
    if isinstance(error, RecursionError) and _is_of_composer(error, depth=100):
        return "defaults: two configs include each other, or one includes itself; delete one of these entries"
    is_of_composer = isinstance(error, (HydraException, OmegaConfBaseException)) or _is_of_composer(error)
    if not is_of_composer:
        return None
    return _explain_hydra(str(error)) or _explain_cause(error)


def _is_of_composer(error: BaseException, depth: int = 1) -> bool:
    """Says whether the libraries that compose a config have raised an error themselves, in the last `depth` frames."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    return any(str(frame.f_globals.get("__name__", "")).startswith(_COMPOSERS) for frame in frames[-depth:])


def _place_of(error: BaseException) -> str:
    """Returns the place in the config that Hydra's message begins with, such as "In 'experiment/mine': "."""
    found = re.match(r"In '?([^'\n]+?)'?: ", str(error))
    return f"In '{shown(found.group(1))}': " if found and found.group(1) != "config" else ""


def _find_override(error: BaseException) -> str:
    """Returns the argument of the command line that Hydra was about, which its error does not name."""
    for frame, _ in traceback.walk_tb(error.__traceback__):
        for value in frame.f_locals.values():
            if (
                isinstance(value, Override)
                and value.is_delete() is False
                and not isinstance(value.value(), (str, list))
            ):
                return str(value.input_line)
    return ""


def _explain_choice(error: MissingConfigException, options: Sequence[str]) -> str:
    group, _, name = str(error.missing_cfg_file).rpartition("/")
    place, inner = _place_of(error), group.rpartition("/")[2]
    if not options and inner in top_level_keys():
        return f"{place}{shown(group)}: there is no such group; write override /{shown(f'{inner}: {name}')}"
    return f"{place}{shown(f'{group}={name}')}: no such choice; {suggest(name, list(options))}"


def _explain_cause(error: BaseException) -> str | None:
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, OmegaConfBaseException):
        cause = cause.__cause__ or cause.__context__
    if cause is not None and cause.full_key:
        return _explain_key(cause, _place_of(error), str(error))
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return one_line(" ".join(dict.fromkeys(lines))) or None


def _explain_hydra(message: str) -> str | None:
    """Returns what to do about a mistake that Hydra tells without the remedy, or None for any other."""
    place = re.match(r"In '?(experiment/[^'\n]+?)'?: ", message)
    if place and (re.search(r"@experiment\b|full_key: experiment$", message, re.MULTILINE)):
        return (
            f'{shown(place.group(1))}.yaml: expected the first line "{HEADER}": its keys are those of the whole config'
        )
    if found := re.search(r"Could not load '([^']*)'", message):
        return f"{place.group() if place else ''}{shown(found.group(1))}: there is no such file in the config folders"
    if found := re.search(r"Could not override '(\w*)'\. No match", message):
        key = found.group(1)
        return f"{place.group() if place else ''}override {key}: no such group; {suggest(key, top_level_keys())}"
    if found := re.match(r"Multiple values for ([^\s]+)\. ", message):
        key = shown(found.group(1)).rstrip(".")
        return f"{key}: it is chosen twice in the defaults; write override /{key}: in the second"
    if found := re.match(r"Error merging override ~+([^\s=]+)", message):
        key = found.group(1)
        remedy = f"leave it out, or set {key}=null" if _may_be_null(key) else "leave it out"
        return f"~{shown(key)}: this key can't be deleted; {remedy}"
    if found := re.match(r"Could not delete from config. '([^']*)' does not exist", message):
        key = shown(found.group(1))
        if _hint_of(key) is not None:
            return f"~{key}: this key is null already; leave ~{key} out"
        return f"~{key}: there is no such key to delete"
    return None


def describe_several(key: str, found: str) -> str:
    """Returns the mistake of a key of one dataset that was given several."""
    remedy = "join them: {_target_: torch.utils.data.ConcatDataset, datasets: [...]}"
    if key.endswith("eval"):
        remedy += "; or evaluate others in a report of your own, whose arguments may be datasets"
    return f"{key}: expected one dataset, found {found}; {remedy}"


def _explain_key(cause: OmegaConfBaseException, where: str, context: str) -> str:
    full_key = shown(str(cause.full_key))
    message = shown(str(cause.msg or cause).splitlines()[0])
    parent = cause.parent_node
    is_unknown_key = isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and OmegaConf.is_dict(parent)
    found = re.fullmatch(r"(data\.(?:train|eval))\.[^.]+", full_key)
    if is_unknown_key and found and re.search(r"^To append.*\b_target_\b", context, re.MULTILINE):
        return describe_several(found.group(1), "several")
    if not is_unknown_key or cause.key in parent:
        return where + (_explain_type(cause, full_key) or f"{full_key}: {message}")
    key = shown(str(cause.key))
    if str(cause.key) in (str(key) for key in parent):
        mapping = full_key.rpartition(".")[0]
        return f"{where}{full_key}: expected a number as the key, found a text; set {mapping}={{{key}: ...}}"
    keys = [str(key) for key in parent if key != "hydra"] + (["experiment"] if "." not in full_key else [])
    hint = suggest(str(cause.key), keys) if keys else f"to add it: +{full_key}=..."
    if OmegaConf.get_type(parent) is dict and keys:
        hint += f"; to pass an argument of its _target_ that the YAML leaves out: +{full_key}=..."
    return f"{where}{full_key}: no such key; {hint}"


def _explain_type(cause: OmegaConfBaseException, full_key: str) -> str | None:
    """Returns what was expected of a value of another type and what was found, or None for another mistake."""
    hint = _hint_of(full_key)
    if full_key in BUILT and "ListConfig" in str(cause.msg):
        return f"{full_key}: expected a mapping with _target_, found a list"
    is_of_value = isinstance(cause, (ValidationError, TypeError)) and not isinstance(
        cause, InterpolationResolutionError
    )
    if not is_of_value or hint is None or hint is Any:
        return None
    value = cause.value
    if OmegaConf.is_config(value):
        value = OmegaConf.to_container(value, resolve=False)
    if value is None and str(cause.msg).startswith("Cannot merge DictConfig with ListConfig"):
        return f"{full_key}: expected {describe_hint(hint)}, found a mapping"
    found = f"{full_key}={shown(_as_yaml(value))}"
    return f"{found}: expected {describe_hint(hint)}{_remedy_for(value, hint)}"


def _as_yaml(value: Any) -> str:
    """Returns a value as YAML writes it."""
    return {"None": "null", "True": "true", "False": "false"}.get(str(value), str(value))


def _remedy_for(value: Any, hint: Any) -> str:
    choices, expected = _choices_of(hint), describe_hint(hint)
    if isinstance(value, bool) and choices:
        return "; YAML reads off, no, on and yes as false and true: put it into quotes"
    if isinstance(value, str) and choices:
        close = difflib.get_close_matches(value, choices, n=1, cutoff=0.5)
        return f"; did you mean {close[0]}?" if close else ""
    if isinstance(value, float) and value.is_integer() and "whole" in expected:
        return f"; write {int(value)}"
    return ", found a text" if isinstance(value, str) and "number" in expected else ""


def describe_hint(hint: Any) -> str:
    """Returns what a type hint of the schema says of a value, as a person says it."""
    kinds = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    return " or ".join(_describe_kind(kind) for kind in kinds)


def _describe_kind(kind: Any) -> str:
    if kind is type(None):
        return "null"
    if isinstance(kind, EnumMeta):
        return "one of " + ", ".join(_choices_of(kind))
    if dataclasses.is_dataclass(kind):
        return "a mapping of " + ", ".join(field.name for field in dataclasses.fields(kind))
    if typing.get_origin(kind) is dict:
        return "a mapping"
    inner = typing.get_args(kind)
    if typing.get_origin(kind) is list and inner == (str,):
        return "a list of texts"
    return _EXPECTED.get(typing.get_origin(kind) or kind, "another value")


def _choices_of(hint: Any) -> list[str]:
    return [str(name) for name in hint.__members__] if isinstance(hint, EnumMeta) else []


def top_level_keys() -> list[str]:
    """Returns the keys of the config that the runner owns."""
    return [field.name for field in dataclasses.fields(Config)]


def _hint_of(key: str) -> Any:
    """Returns the type that the schema gives a key, or an element of its list; None for keys that it lacks."""
    hint: Any = Config
    for name in re.split(r"[.\[]", key.replace("]", "")):
        if typing.get_origin(hint) is list and name.isdigit():
            hint = typing.get_args(hint)[0]
            continue
        hints = typing.get_type_hints(hint) if dataclasses.is_dataclass(hint) else {}
        hint = hints.get(name)
    return hint


def find_misplaced(content: Any, hint: Any = Config, key: str = "") -> Iterator[str]:
    """Yields what is of another kind than its key: OmegaConf merges no number into a mapping, and tells no key."""
    is_open = content is None or isinstance(content, str)  # an interpolation, or a mistake that is told with its key
    place = f"{key}={shown(str(content))}"
    if dataclasses.is_dataclass(hint) and isinstance(content, dict):
        hints = typing.get_type_hints(hint)
        for name in content.keys() & hints.keys():
            yield from find_misplaced(content[name], hints[name], f"{key}.{name}".lstrip("."))
    elif dataclasses.is_dataclass(hint) and not (is_open and "${" in str(content)):
        yield f"{place if content is not None else f'{key}=null'}: expected {describe_hint(hint)}"
    elif isinstance(content, list) and (typing.get_origin(hint) is dict or key in BUILT):
        yield f"{place}: expected {'a mapping with _target_' if key in BUILT else 'a mapping'}, found a list"
    elif isinstance(content, dict) and typing.get_origin(hint) is list:
        yield f"{place}: expected {describe_hint(hint)}, found a mapping"


BUILT = ("model", "data.train", "data.eval", "data.collate", "sampler", "optimizer", "scheduler", "feeder", "report")


def _may_be_null(key: str) -> bool:
    hint = _hint_of(key)
    return (hint is Any and key in (*BUILT, "distributed.strategy")) or type(None) in typing.get_args(hint)
