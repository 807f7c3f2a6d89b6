"""Parses the text of a YAML file as OmegaConf does, and explains a mistake in it."""

from __future__ import annotations

import contextlib
import functools
import re
from typing import Any

import yaml
from omegaconf import DictConfig, OmegaConf
from omegaconf._utils import get_yaml_loader
from omegaconf.errors import OmegaConfBaseException

from runner.config.errors import ConfigError, shown

# libyaml recurses into nested values without a limit, so that a text of some 25,000 brackets ends the process.
_MAX_LIBYAML_CHARACTERS = 8192
# What libyaml reads otherwise than PyYAML: tabs, other characters than ASCII, `?` in flow style, a tag without a name,
# and a comment right after | or >.
_READ_DIFFERENTLY = re.compile(r"[^\n -~]|[?!]|[|>][-+0-9]*#")


def parse_yaml(name: str, text: str) -> DictConfig:
    """Returns the mapping in a text of YAML.

    Args:
        name: the file, for messages.
        text: its content.

    Raises:
        ConfigError: naming the file, line and column of a mistake.
    """
    try:
        content = _load_yaml(text)
        if isinstance(content, dict) or content is None:  # None: only comments
            return OmegaConf.create(content or {})
    except yaml.YAMLError as error:
        raise ConfigError(_describe_yaml_error(name, text, error)) from error
    except RecursionError:
        raise ConfigError(f"{name}: it is nested too deeply, or an alias holds itself") from None
    except OmegaConfBaseException as error:
        key = f"{error.full_key}: " if error.full_key else ""
        raise ConfigError(f"{name}: {shown(key + str(error).splitlines()[0])}") from error
    except (ValueError, LookupError, AttributeError) as error:  # such as !!int before a text that is no number
        reason = f" ({shown(str(error))})" if isinstance(error, ValueError) else ""
        problem = f"a value can't be read as a number, or as its tag !!... says{reason}"
        raise ConfigError(f"{name}: {problem}; put it into quotes, or delete the tag") from error
    kind = "a list" if isinstance(content, list) else shown(repr(content))
    raise ConfigError(f"{name}: expected a mapping (key: value) at the top level, found {kind}")


def _load_yaml(text: str) -> Any:
    """Reads a text as OmegaConf does, by libyaml where that reads it equally, in a tenth of the time."""
    python_loader, libyaml_loader = _loaders()
    is_read_equally = len(text) <= _MAX_LIBYAML_CHARACTERS and not _READ_DIFFERENTLY.search(text)
    if libyaml_loader is not None and is_read_equally:
        with contextlib.suppress(yaml.YAMLError):  # PyYAML then says what is wrong
            return yaml.load(text, Loader=libyaml_loader)
    return yaml.load(text, Loader=python_loader)


@functools.cache
def _loaders() -> tuple[Any, Any]:
    """Returns OmegaConf's loader, and the same with libyaml's parser, or None where PyYAML was built without it."""
    python_loader: Any = get_yaml_loader()
    if not yaml.__with_libyaml__:
        return python_loader, None

    class LibyamlLoader(yaml.cyaml.CParser, python_loader):
        def __init__(self, stream: str) -> None:
            yaml.cyaml.CParser.__init__(self, stream)
            yaml.constructor.SafeConstructor.__init__(self)
            yaml.resolver.Resolver.__init__(self)

    return python_loader, LibyamlLoader


_QUOTE_REMEDY = "put a text that begins with such a character into quotes"
_BRACKET_REMEDY = "check brackets, commas and indentation"
_YAML_REMEDIES = {  # by a part of PyYAML's message
    "found undefined alias": "define it by &NAME before, or put a text that begins with * into quotes",
    "could not determine a constructor": "only plain YAML is read; put a text that begins with ! into quotes",
    "cannot start any token": _QUOTE_REMEDY,
    "found '?'": _QUOTE_REMEDY,
    "expected alphabetic": _QUOTE_REMEDY,
    "mapping values are not allowed": "put a text with a colon into quotes, and check the indentation",
    "expected ',' or": _BRACKET_REMEDY,
    "did not find expected": _BRACKET_REMEDY,
    "expected <block end>": _BRACKET_REMEDY,
}


def _describe_yaml_error(name: str, text: str, error: yaml.YAMLError) -> str:
    if isinstance(error, yaml.reader.ReaderError):
        before = text[: error.position]
        line, column = before.count("\n") + 1, error.position - before.rfind("\n")
        return f"{name}:{line}:{column}: expected text, found the character {shown(chr(error.character))}; delete it"
    if not isinstance(error, yaml.MarkedYAMLError):
        return f"{name}: {shown(str(error))}"
    problem = error.problem or error.context or "it is no YAML"
    mark = error.problem_mark or error.context_mark
    is_quote = bool(error.context) and "quoted scalar" in str(error.context)
    if is_quote and error.context_mark is not None:
        mark, problem, remedy = error.context_mark, "the quote that opens here is never closed", "close it"
    elif "'\\t'" in problem or (mark is not None and _has_tab(text, mark.line)):
        problem, remedy = "expected spaces, found a tab", "indent with spaces"
    elif problem.startswith("found duplicate key"):
        key = problem.removeprefix("found duplicate key ")
        problem, remedy = f"the key {key} stands twice in one mapping", "leave one of them"
    elif "expected a single document" in str(error.context) or "another document" in problem:
        problem, remedy = "expected one document, found another", "delete the line ---"
    else:
        remedy = next((remedy for part, remedy in _YAML_REMEDIES.items() if part in problem), "")
    location = name if mark is None else f"{name}:{mark.line + 1}:{mark.column + 1}"
    return f"{location}: {shown(problem)}" + (f"; {remedy}" if remedy else "")


def _has_tab(text: str, line: int) -> bool:
    """Returns whether a line is indented with a tab."""
    lines = text.splitlines()
    content = lines[line] if line < len(lines) else ""
    return "\t" in content[: len(content) - len(content.lstrip())]
