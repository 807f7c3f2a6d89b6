"""`python -m runner.export RUN_OR_CHECKPOINT`: one SafeTensors file an engine, its metadata telling where it is from.

Owns what an exported file holds, written in a run or after it. Must not import torch at the top: `--help` is quick.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner import signals, terminal
from runner.config import to_json
from runner.mistakes import ConfigError, tell, told_in_one_message
from runner.run_folder import OF_THE_COMMAND_LINE, read_record
from runner.utils.utils import escape_controls

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from runner.engines import Engines
    from runner.saved import Saved

DTYPES = {"bf16": "bfloat16", "fp16": "float16", "fp32": "float32"}
_HELP = "modules that the saved config may name, with all under them, beside the runner's own and torch.nn: own,other"


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
    config = {key: value for key, value in plain.items() if key not in OF_THE_COMMAND_LINE}
    finite = {k: v if math.isfinite(v) else None for k, v in (evaluation or {}).items() if v is not None}
    return {
        "config": to_json(config),
        "step": str(step),
        "commit": str((read_record(run).get("git") or {}).get("commit") or ""),
        "metrics": json.dumps({"best": best, "evaluation": finite or None}),
        "runner_version": _version(),
        **({"fingerprint": fingerprint} if fingerprint is not None else {}),
    }


def _version() -> str:
    try:
        return metadata.version("runner")
    except metadata.PackageNotFoundError:  # it runs from its source
        return ""


def last_evaluation(run: Path, step: int) -> dict[str, Any] | None:
    """Returns the step and numbers of the newest evaluation up to a step, as metrics.jsonl has it; None without one."""
    path = run / "metrics.jsonl"
    found = None
    for line in path.read_bytes().splitlines() if path.is_file() else ():
        try:
            values = json.loads(line)
            numbers = {key: value for key, value in values.items() if key.startswith("eval/")}
            if numbers and values["step"] <= step:
                found = {"step": values["step"], **numbers}
        except (ValueError, TypeError, KeyError, AttributeError):
            continue  # torn by a kill in the middle of a write
    return found


def export(saved: Saved, folder: Path | None = None, dtype: str | None = None) -> list[Path]:
    """Writes a saved model's exports, by default beside its run's checkpoints; returns the paths.

    Raises:
        ConfigError: its engines can't be built, or its numbers not be held by the dtype.
    """
    import torch

    from runner import build
    from runner.utils.distributed import kept_generators

    assert saved.run is not None
    with kept_generators():
        saved.check()
    try:
        device = build.build_device(saved.plain)
    except ConfigError:  # another machine's: weights can be written anywhere
        device = torch.device("cpu")
    with kept_generators(device):
        engines = saved.build_engines(device, to_write=True)
    evaluation = last_evaluation(saved.run, saved.step)
    facts = facts_of(saved.plain, saved.run, saved.step, saved.best, evaluation, saved.fingerprint)
    folder = folder or saved.run / "exports"
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        return write(engines, folder, facts, getattr(torch, DTYPES[dtype]) if dtype else None)
    except (ValueError, OSError) as error:
        raise ConfigError(str(error)) from error


def main(arguments: Sequence[str] | None = None) -> None:
    """Runs the command line; a user's mistake prints one message and exits with status 2."""
    terminal.open_missing()
    terminal.escape_unencodable()
    parser = argparse.ArgumentParser(prog="python -m runner.export", description="Writes a saved model's weights.")
    parser.add_argument("saved", metavar="RUN_OR_CHECKPOINT", type=Path, help="a folder")
    parser.add_argument("--output", metavar="FOLDER", type=Path, help="where to; by default the run's exports/")
    parser.add_argument("--dtype", choices=list(DTYPES), help="of the floating-point tensors; by default their own")
    parser.add_argument("--allow-targets", default="", metavar="MODULES", help=_HELP)
    given = parser.parse_args(arguments)
    with told_in_one_message():
        with signals.exit_on_interrupt():
            from runner import saved

            found = saved.open_saved(given.saved, (), [each for each in given.allow_targets.split(",") if each])
        for note in found.notes:
            tell(note)
        for path in export(found, given.output, given.dtype):
            print(escape_controls(str(path)))


if __name__ == "__main__":
    main()
