"""Instantiates the nodes of a config; the only module that calls Hydra's `instantiate`."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from hydra.errors import InstantiationException
from hydra.utils import instantiate

from runner.config.errors import ConfigError
from runner.config.targets import hint_at_text_numbers, is_number_text, is_used_directly, locate, seed_imports
from runner.utils.files.open_files import describe_limit, is_out_of_files
from runner.utils.utils import derive_seed

HYDRA_KEYS = ("_target_", "_partial_", "_recursive_", "_convert_")


_SEED_NUMBERS = {"data.train": -2, "data.eval": -3}


def make_object(seed: int, key: str, node: Any, *arguments: Any) -> Any:
    """Instantiates the node at a key with every global generator seeded for the key."""
    if node is None:
        return None
    later = {"_partial_": True} if is_used_directly(key, locate(node["_target_"])) else {}
    seed_for_key(seed, key)
    return explain_errors(key, lambda: instantiate_node(node | later, *arguments), node)


def instantiate_node(node: Any, *positional: Any) -> Any:
    """Instantiates a resolved node as Hydra does.

    Hydra's `instantiate` would resolve the node's texts again, so it gets the target alone.
    """
    if isinstance(node, list):
        return [instantiate_node(child) for child in node]
    if not isinstance(node, dict):
        return node
    if "_target_" not in node:
        return {key: instantiate_node(value) for key, value in node.items()}
    arguments = {key: value for key, value in node.items() if key not in HYDRA_KEYS}
    if node.get("_recursive_", True):
        arguments = {key: instantiate_node(value) for key, value in arguments.items()}
    positional = positional or arguments.pop("_args_", ())
    target = instantiate({"_target_": node["_target_"], "_partial_": True})
    if node.get("_partial_"):
        return partial(target, *positional, **arguments)
    return target(*positional, **arguments)


def seed_for_key(seed: int, key: str) -> None:
    """Seeds every global generator from the run's seed and a key, the same on every rank.

    So an object that is added or left out does not change what the others draw. For `model` the seed is the run's own.
    """
    if key != "model":
        seed = derive_seed(seed, _SEED_NUMBERS.get(key) or zlib.crc32(key.encode()))
    torch.manual_seed(seed)  # of every device
    seed_imports(seed)


def explain_errors(key: str, make: Callable[[], Any], node: Mapping[str, Any] | None = None) -> Any:
    """Calls `make`; an error becomes a ConfigError that names the key."""
    try:
        return make()
    except (Exception, SystemExit) as error:
        cause = error.__cause__ if isinstance(error, InstantiationException) and error.__cause__ else error
        has_message = isinstance(cause, (ValueError, TypeError, ImportError, OSError))
        hint = _hint_at_numbers(node) if isinstance(cause, (TypeError, ValueError)) else ""
        remedy = f"; {describe_limit()}" if is_out_of_files(cause) else ""
        raise ConfigError(f"{key}: {cause if has_message else repr(cause)}{hint}{remedy}") from error


def _hint_at_numbers(node: Mapping[str, Any] | None) -> str:
    """Returns a remedy if an argument is a text that looks like a number, such as one from the environment."""
    texts = {name: value for name, value in (node or {}).items() if is_number_text(value)}
    shown = ", ".join(f"{name}={value!r}" for name, value in texts.items())
    remedy = f"; {shown}: a text; ${{oc.decode:...}} makes it a number" if texts else ""
    return remedy + (hint_at_text_numbers(node) if node else "")
