"""Reads YAML files for Hydra, and reports a mistake with its file, line and column."""

from __future__ import annotations

import contextlib
import copy
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from hydra._internal.core_plugins import file_config_source, structured_config_source
from hydra._internal.sources_registry import SourcesRegistry
from hydra.core.object_type import ObjectType
from hydra.plugins.config_source import ConfigResult
from omegaconf import DictConfig, OmegaConf

from runner.config.composition.yaml_text import parse_yaml
from runner.config.errors import HEADER, ConfigError, field_names, find_kind_mismatches, shown, suggest
from runner.config.schema import Config

_PACKAGE = Path(__file__).resolve().parents[2]
_WHEEL_CONF = _PACKAGE / "conf"
CONF_DIR = _WHEEL_CONF if _WHEEL_CONF.is_dir() else _PACKAGE.parent / "conf"

_SCHEMA = "schema"  # in the defaults of conf/config.yaml
_PACKAGES = ["_global_", "_group_", "_name_", "hydra"]
_DEFAULTS_REMEDY = "write entries such as `- mine`, `- model: digits_net` and `- override /optimizer: sgd`"
_BYTE_ORDER_MARK = "\ufeff"


def register_config_sources() -> None:
    """Makes Hydra read configs with the sources of this module.

    They have the names of Hydra's classes, so that Hydra does not register those again.
    """
    types = SourcesRegistry.instance().types
    types["file"] = FileConfigSource
    types["structured"] = StructuredConfigSource


@contextlib.contextmanager
def restored_sources() -> Iterator[None]:
    """Makes Hydra read configs again as before a block, for a program that uses Hydra itself."""
    sources = SourcesRegistry.instance().types
    before = dict(sources)
    try:
        yield
    finally:
        sources.clear()
        sources.update(before)


class FileConfigSource(file_config_source.FileConfigSource):
    """Reads YAML files as Hydra's own source does, and also those that begin with a byte order mark."""

    def load_config(self, config_path: str) -> ConfigResult:
        """Returns the content of a file.

        Raises:
            ConfigError: naming the file, line and column of a mistake.
        """
        if config_path == _SCHEMA:
            content = OmegaConf.structured(Config)
            return ConfigResult(self.provider, _SCHEMA, content, header={"package": None})
        path = os.path.join(self.path, self._normalize_file_name(config_path))
        relative = os.path.relpath(path)
        name = shown(path if relative.startswith("..") else relative)
        text = _read(path, name)
        header = _read_header(name, text)
        content = parse_yaml(name, text)
        _check_defaults(name, content)
        plain = OmegaConf.to_container(content, resolve=False) if header["package"] == "_global_" else {}
        if mismatches := list(find_kind_mismatches(plain)):
            raise ConfigError("\n".join(f"{name}: {mismatch}" for mismatch in mismatches))
        return ConfigResult(
            config=content, path=f"{self.scheme()}://{self.path}", provider=self.provider, header=header
        )

    def list(self, config_path: str, results_filter: ObjectType | None) -> list[str]:
        """Lists the configs and groups of a folder, at the top level without `optimization/`.

        `optimizations.NAME=true` takes the values from there; `optimization=NAME` is no choice.
        """
        names = super().list(config_path, results_filter)
        return names if config_path else [name for name in names if name != "optimization"]

    def is_config(self, config_path: str) -> bool:
        """Returns whether a path is that of a file, or of the schema.

        The schema is not in Hydra's ConfigStore, whose nodes `--help` would copy for each group.
        """
        return config_path == _SCHEMA or super().is_config(config_path)


class StructuredConfigSource(structured_config_source.StructuredConfigSource):
    """Reads Hydra's ConfigStore as Hydra's own source does, and shares the store with its copies.

    Hydra copies its sources for each composition, and three times for each group that `--help` lists.
    """

    def __deepcopy__(self, memo: dict[int, Any]) -> StructuredConfigSource:
        """Returns a shallow copy: `ConfigStore.load` copies each config that it returns."""
        return copy.copy(self)


def _read(path: str, name: str) -> str:
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ConfigError(f"{name}: can't be read ({error.strerror})") from error
    try:
        text = content.decode("utf-8").removeprefix(_BYTE_ORDER_MARK)
    except UnicodeDecodeError as error:
        before = content[: error.start]
        line, column = before.count(b"\n") + 1, error.start - before.rfind(b"\n")
        found = f"found byte 0x{content[error.start]:02x}"
        raise ConfigError(f"{name}:{line}:{column}: expected UTF-8, {found}; save the file as UTF-8") from error
    if not text.strip():
        raise ConfigError(f'{name}: the file is empty; an experiment begins with the line "{HEADER}"')
    return text


def _read_header(name: str, text: str) -> dict[str, str | None]:
    try:
        header = FileConfigSource._get_header_dict(text[:512])
    except ValueError as error:
        raise ConfigError(f'{name}:1: {error}; write "{HEADER}"') from error
    package = header["package"]
    packages = [*_PACKAGES, *field_names(Config)]
    if package and package.partition(".")[0] not in packages and "@" not in package:
        remedy = suggest(package.partition(".")[0], packages)
        raise ConfigError(f"{name}:1: # @package {shown(package)}: no such place in the config; {remedy}")
    return header


def _check_defaults(name: str, content: DictConfig) -> None:
    """Checks the form of a defaults list; Hydra's own messages for a mistake in it name no file.

    Raises:
        ConfigError: it is not a list of names and of mappings from a group to a choice.
    """
    if "defaults" not in content:
        return
    plain: Any = OmegaConf.to_container(content, resolve=False)
    defaults = plain["defaults"]
    if not isinstance(defaults, list):
        raise ConfigError(f"{name}: defaults: expected a list, found {shown(repr(defaults))}; {_DEFAULTS_REMEDY}")
    for item in defaults:
        is_choice = isinstance(item, dict) and len(item) == 1 and _is_choice(*next(iter(item.items())))
        if not isinstance(item, str) and not is_choice:
            expected = "expected a name, or a group with its choice"
            raise ConfigError(f"{name}: defaults: {expected}, found {shown(repr(item))}; {_DEFAULTS_REMEDY}")


def _is_choice(group: Any, choice: Any) -> bool:
    is_list = isinstance(choice, list) and all(isinstance(name, str) for name in choice)
    return isinstance(group, str) and (choice is None or isinstance(choice, str) or is_list)
