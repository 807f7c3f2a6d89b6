"""Exported files: one SafeTensors file for each engine, with the origin of its weights as metadata."""

from __future__ import annotations

import contextlib
import json
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from runner.config.checks import to_json
from runner.config.errors import ConfigError
from runner.config.run_folder import COMMAND_LINE_KEYS, read_record, refuse_links
from runner.config.schema import ExportConfig, ExportFormat, Ties
from runner.config.spec import ExperimentSpec
from runner.config.trust import signature
from runner.engines import Engines
from runner.run.build.experiment import build_device
from runner.run.pretrained import check_modules, write_pretrained
from runner.run.weights import placeholders
from runner.tracking.repair import is_step
from runner.tracking.run_record import DISTRIBUTION, find_version
from runner.utils import io
from runner.utils.distributed import preserve_rng_state
from runner.utils.files import disk, iterate_lines, make_folder_below, make_folders, open_regular

if TYPE_CHECKING:
    from runner.run.saved_model import SavedModel

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
_MAX_LINE_BYTES = 1 << 20


def write_exports(
    engines: Engines,
    folder: Path,
    run_metadata: Mapping[str, str],
    settings: ExportConfig | None = None,
    *,
    writes: bool = True,
    suffix: str = "",
) -> list[Path]:
    """Writes each engine's weights, as evaluation uses them; returns the paths.

    They are `<engine>.safetensors`, or a folder `<engine>` that `from_pretrained` loads.

    Args:
        folder: made if it does not exist, but not its parent.
        run_metadata: of `make_metadata`; the name of the engine is added.
        settings: format, dtype and ties; None for files that keep the dtypes, with each name of a tied weight.
        writes: False only joins the all-gather of sharded weights.
        suffix: follows the engines' names in those of the files or folders.
    Raises:
        ValueError: the dtype can't hold a number, or a module refuses to write its weights.
    """
    paths = []
    settings = settings or ExportConfig(ExportFormat.sft, None, Ties.each)
    states = engines.export_states()
    for name, state in states.items() if writes else ():
        weights = _cast(state, DTYPES[settings.dtype]) if settings.dtype else dict(state)
        metadata = {**run_metadata, "engine": name}
        make_folder_below(folder, folder.parent)
        if settings.format.name == "huggingface":
            path = folder / f"{name}{suffix}"
            write_pretrained(engines[name].module, weights, path, metadata, settings.dtype)
        else:
            path = folder / f"{name}{suffix}.safetensors"
            io.save(weights, path, metadata, repeats_ties=settings.ties.name == "each")
        paths.append(path)
        if files := engines[name].applied.exported_files(weights):
            paths.append(_write_adapter(files, folder / f"{name}{suffix}_adapter"))
    return paths


def _write_adapter(files: Mapping[str, Any], folder: Path) -> Path:
    """Writes the files of an adapter in the format of another library into a folder, and returns it."""
    make_folder_below(folder, folder.parent)
    for name, content in files.items():
        path = folder / name
        if path.suffix == ".json":
            io.write_json(content, path)
        else:
            io.save(content, path)
    return folder


def _cast(state: Mapping[str, Any], dtype: torch.dtype) -> dict[str, Any]:
    """Returns a state with its floating-point tensors in another dtype; tied weights stay one tensor."""
    cast: dict[tuple[Any, ...], Tensor] = {}  # by memory and view
    result = dict(state)
    for name, tensor in state.items():
        if not isinstance(tensor, torch.Tensor) or not tensor.is_floating_point():
            continue
        view = (tensor.data_ptr() or name, tensor.shape, tensor.stride(), tensor.dtype)
        if view not in cast:
            cast[view] = tensor.to(dtype)
            if not _is_finite(cast[view]).eq(_is_finite(tensor)).all():
                raise ValueError(f"{name}: holds a number that {dtype} can't; take bf16 or fp32")
        result[name] = cast[view]
    return result


def _is_finite(tensor: Tensor) -> Tensor:
    """Returns which elements are finite; torch's `isfinite` does not support 8-bit dtypes."""
    return (tensor.float() if tensor.dtype.itemsize == 1 else tensor).isfinite()


def make_metadata(
    plain: Mapping[str, Any],
    run: Path,
    step: int,
    best: Mapping[str, Any] | None,
    evaluation: Mapping[str, Any] | None,
    fingerprint: str | None = None,
) -> dict[str, str]:
    """Returns the metadata of an exported file: config, step, commit, metrics, the runner's version, a signature.

    Args:
        plain: the resolved config.
        best: the best evaluation's name, value and step.
        evaluation: the newest evaluation's step and numbers.
        fingerprint: of the data, if it has one.
    """
    config = to_json({key: value for key, value in plain.items() if key not in COMMAND_LINE_KEYS})
    weights = placeholders.export_metadata(run)
    finite = {k: v if math.isfinite(v) else None for k, v in (evaluation or {}).items() if v is not None}
    return {
        "config": config,
        "step": str(step),
        "commit": _commit_of(run),
        "metrics": json.dumps({"best": best, "evaluation": finite or None}),
        "runner_version": find_version(DISTRIBUTION) or "",
        **({"fingerprint": fingerprint} if fingerprint is not None else {}),
        **_sign(placeholders.signed_text(config, weights), run),
        **weights,
    }


def _sign(text: str, run: Path) -> dict[str, str]:
    """Returns the signature of an export's config and record, if this user has signed the run."""
    try:
        return {"signature": signature.sign_text(text, signature.check_signature(run))}
    except (signature.SignatureError, OSError):
        return {}


def _commit_of(run: Path) -> str:
    git = read_record(run).get("git")
    commit = git.get("commit") if isinstance(git, dict) else None
    return commit if isinstance(commit, str) and re.fullmatch(r"[0-9a-f]{7,64}", commit) else ""


def last_evaluation(run: Path, step: int) -> dict[str, Any] | None:
    """Returns step and numbers of the newest evaluation in metrics.jsonl up to a step; None without one.

    The first line of a step counts: callbacks log numbers of their own after it, such as eval/swa/loss.
    """
    newest = None
    try:
        with open_regular(run / "metrics.jsonl") as file:
            for evaluation in map(_read_evaluation, iterate_lines(file, _MAX_LINE_BYTES)):
                if evaluation is None or evaluation["step"] > step:
                    continue
                if newest is None or evaluation["step"] != newest["step"]:
                    newest = evaluation
    except OSError:  # there are no lines, or the run itself reports the error
        return None
    return newest


def _read_evaluation(line: bytes | None) -> dict[str, Any] | None:
    """Returns step and numbers of a line of an evaluation; None for any other line."""
    try:
        values = json.loads(line or b"")
        numbers = {key: value for key, value in values.items() if key.startswith("eval/")}
        is_valid = is_step(values["step"]) and all(value is None or _is_number(value) for value in numbers.values())
        return {"step": values["step"], **numbers} if numbers and is_valid else None
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError):
        return None  # such as a line that a kill has cut


def _is_number(value: Any) -> bool:
    return type(value) is float or (type(value) is int and abs(value) < 1 << 53)


def export(saved: SavedModel, folder: Path | None = None, **changes: str | None) -> list[Path]:
    """Writes a saved model's exports, by default into its run's folder; returns the paths.

    Args:
        changes: values of `export` other than those of the config; None keeps the config's.
    Raises:
        ConfigError: its engines can't be built, the dtype can't hold its numbers, or the run's folder has a link.
    """
    run = saved.run
    assert run is not None
    links = saved.origin.links if saved.origin else {}
    with contextlib.ExitStack() as stack:
        try:
            stack.enter_context(disk.confine(run, links))
        except OSError as error:
            raise ConfigError(f"{run}: can't be read ({error.strerror})") from error
        folder = folder or run / "exports"
        if disk.is_confined(folder):
            refuse_links(run, links, "--sign" if saved.origin else "")
        chosen = {key: value for key, value in changes.items() if value is not None}
        spec = ExperimentSpec.from_plain({**saved.plain, "export": {**saved.plain["export"], **chosen}})
        used = saved.without_forward()
        with preserve_rng_state():
            used.check_roles()
        try:
            device = build_device(saved.spec)
        except ConfigError:  # of another machine; weights can be written without it
            device = torch.device("cpu")
        with preserve_rng_state(device):
            engines = used.build_engines(device, to_write=True)
        check_modules(spec, engines)
        evaluation = last_evaluation(run, saved.step)
        metadata = make_metadata(saved.plain, run, saved.step, saved.best, evaluation, saved.fingerprint)
        try:
            make_folders(folder)
            return write_exports(engines, folder, metadata, spec.export)
        except FileExistsError as error:
            raise ConfigError(f"{error.filename}: expected a folder, found a file") from error
        except OSError as error:
            raise ConfigError(f"{error.filename or folder}: can't be written ({error.strerror or error})") from error
        except ValueError as error:
            raise ConfigError(str(error)) from error
