"""Exported files: one SafeTensors file an engine, its metadata telling where it is from."""

from __future__ import annotations

import contextlib
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.checks import to_json
from runner.config.errors import ConfigError
from runner.config.run_folder import OF_THE_COMMAND_LINE, read_record, refuse_links
from runner.config.trust import signature
from runner.config.trust.signature import SignatureError
from runner.run import warm_start
from runner.tracking.repair import is_step
from runner.tracking.run_record import DISTRIBUTION
from runner.utils.files import disk, iterate_lines, open_regular

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from runner.engines import Engines
    from runner.run.saved_model import SavedModel

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_MAX_LINE_BYTES = 1 << 20


def write(
    engines: Engines,
    folder: Path,
    facts: Mapping[str, str],
    dtype: torch.dtype | None = None,
    *,
    writes: bool = True,
) -> list[Path]:
    """Writes each engine's weights, as evaluation uses them, to `<engine>.safetensors`; returns the paths.

    Args:
        folder: made where it does not exist, but not the one above it.
        facts: the metadata, beside the engine's name.
        dtype: of the floating-point tensors; None leaves each its own.
        writes: False only takes part in making weights whole that are spread over ranks.
    Raises:
        ValueError: a number that the dtype can't hold.
    """
    from runner.utils import io
    from runner.utils.files import make_folder

    paths = []
    states = engines.export_states()
    for name, state in states.items() if writes else ():
        path = folder / f"{name}.safetensors"
        weights = _cast(state, dtype)
        make_folder(folder, folder.parent)
        io.save(weights, path, {**facts, "engine": name})
        paths.append(path)
    return paths


def _cast(state: Mapping[str, Any], dtype: torch.dtype | None) -> dict[str, Any]:
    """Returns a state with its floating-point tensors in another dtype; what is tied stays one tensor."""
    if dtype is None:
        return dict(state)
    import torch

    cast: dict[tuple[Any, ...], Tensor] = {}
    found = dict(state)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        view = (tensor.data_ptr() or name, tensor.shape, tensor.stride(), tensor.dtype)
        if view not in cast:
            cast[view] = tensor.to(dtype)
            if not _is_finite(cast[view]).eq(_is_finite(tensor)).all():
                raise ValueError(f"{name}: holds a number that {dtype} can't; take bf16 or fp32")
        found[name] = cast[view]
    return found


def _is_finite(tensor: Tensor) -> Tensor:
    """Returns which elements are finite; torch does not tell of a dtype of 8 bits."""
    return (tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite()


def facts_of(
    plain: Mapping[str, Any],
    run: Path,
    step: int,
    best: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    fingerprint: str | None = None,
) -> dict[str, str]:
    """Returns what an exported file tells of where it is from: config, step, commit, metrics and the runner's version.

    Args:
        plain: the resolved config.
        evaluation: the newest one's step and numbers.
        fingerprint: of the data, where it has one.
    """
    config = to_json({key: value for key, value in plain.items() if key not in OF_THE_COMMAND_LINE})
    weights = warm_start.exported(run)
    finite = {k: v if math.isfinite(v) else None for k, v in (evaluation or {}).items() if v is not None}
    return {
        "config": config,
        "step": str(step),
        "commit": _commit_of(run),
        "metrics": json.dumps({"best": best, "evaluation": finite or None}),
        "runner_version": _version(),
        **({"fingerprint": fingerprint} if fingerprint is not None else {}),
        **_sign(warm_start.join(config, weights), run),
        **weights,
    }


def _sign(text: str, run: Path) -> dict[str, str]:
    """Returns the signature of an export's config and record, where this user has signed the run's."""
    try:
        return {"signature": signature.sign_text(text, signature.check(run))}
    except (SignatureError, OSError):
        return {}


def _commit_of(run: Path) -> str:
    git = read_record(run).get("git")
    commit = git.get("commit") if isinstance(git, dict) else None
    return commit if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{7,64}", commit) else ""


def _version() -> str:
    try:
        return metadata.version(DISTRIBUTION)
    except metadata.PackageNotFoundError:  # it runs from its source
        return ""


def last_evaluation(run: Path, step: int) -> dict[str, Any] | None:
    """Returns the step and numbers of the newest evaluation up to a step, as metrics.jsonl has it; None without one."""
    path = run / "metrics.jsonl"
    found = None
    if not os.path.lexists(path):
        return None
    try:
        with open_regular(path) as file:
            for line in iterate_lines(file, _MAX_LINE_BYTES):
                evaluation = _read_evaluation(line)
                if evaluation is not None and evaluation["step"] <= step:
                    found = evaluation
    except OSError:  # the run whose folder it is tells it
        return None
    return found


def _read_evaluation(line: bytes | None) -> dict[str, Any] | None:
    """Returns the step and numbers of an evaluation's line; None of another line, or one that no run has written."""
    try:
        values = json.loads(line or b"")
        numbers = {key: value for key, value in values.items() if key.startswith("eval/")}
        is_valid = is_step(values["step"]) and all(value is None or _is_number(value) for value in numbers.values())
        return {"step": values["step"], **numbers} if numbers and is_valid else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # torn by a kill in the middle of a write


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 53)


def export(saved: SavedModel, folder: Path | None = None, dtype: str | None = None) -> list[Path]:
    """Writes a saved model's exports, by default beside its run's checkpoints; returns the paths.

    Raises:
        ConfigError: its engines can't be built, or its numbers not be held by the dtype; or the exports go to the
            run's folder, and that has a link.
    """
    assert saved.run is not None
    links = saved.origin.links if saved.origin else {}
    with _confined(saved.run, links):
        folder = folder or saved.run / "exports"
        if disk.is_confined(folder):
            refuse_links(saved.run, links, "--sign" if saved.origin else "")
        return _export(saved, saved.run, folder, dtype)


@contextlib.contextmanager
def _confined(run: Path, links: Mapping[str, str]) -> Iterator[None]:
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(disk.confine(run, links))
        except OSError as error:
            raise ConfigError(f"{run}: can't be read ({error.strerror})") from error
        yield


def _export(saved: SavedModel, run: Path, folder: Path, dtype: str | None) -> list[Path]:
    import torch

    from runner.run import build
    from runner.utils.distributed import preserve_rng_state
    from runner.utils.files import make_folders

    used = saved.without_feeder()
    with preserve_rng_state():
        used.check()
    try:
        device = build.build_device(saved.plain)
    except ConfigError:  # another machine's: weights can be written anywhere
        device = torch.device("cpu")
    with preserve_rng_state(device):
        engines = used.build_engines(device, to_write=True)
    evaluation = last_evaluation(run, saved.step)
    facts = facts_of(saved.plain, run, saved.step, saved.best, evaluation, saved.fingerprint)
    try:
        make_folders(folder.parent)
        return write(engines, folder, facts, getattr(torch, DTYPES[dtype]) if dtype else None)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error
