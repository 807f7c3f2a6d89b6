"""The evaluation of a model, in a run and after it, with the same numbers."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.errors import ConfigError, print_message
from runner.engines import Engines
from runner.run.build.data import build_evaluations, find_unseeded, name_seed
from runner.run.build.experiment import Report, build_device, build_report
from runner.run.state import find_change
from runner.tracking.media import Audio
from runner.utils import distributed
from runner.utils.files import make_folder_below, replace_file
from runner.utils.modules.generators import ObjectGenerators
from runner.utils.sampler.batches import EvaluationData
from runner.utils.train.failures import describe_failure
from runner.utils.utils import derive_seed, encodable, one_line

if TYPE_CHECKING:
    from runner.run.saved_model import SavedModel


def measure(
    engines: Engines,
    evaluations: Mapping[str, EvaluationData],
    report: Report | None,
    *,
    seed: int,
    step: int,
    should_stop: Callable[[], bool] = bool,
    run_on_ranks: Callable[[Callable[[], Any]], list[Any]] = distributed.run_on_all_ranks,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the numbers of an evaluation by `eval/<name>`, and likewise the texts, pictures and sounds of its report.

    Those of a named dataset are `eval/<dataset>/<name>`, and each dataset has its own report. Random draws depend on
    seed, step and the dataset's name alone. Each rank evaluates its own batches, and every rank makes the reports.

    Args:
        evaluations: by the name of the dataset; a single one has the empty name.
        should_stop: called before each batch.
        run_on_ranks: calls a function on every rank and returns the results.

    Raises:
        InterruptedError: `should_stop` returned True.
        OutputError: a dataset has no sample.
    """
    named: dict[str, Any] = {}
    for dataset, evaluation in evaluations.items():
        own_seed = name_seed(dataset)
        values: dict[str, Any] = dict(
            engines.evaluate(evaluation, should_stop, derive_seed(seed, step, -1, *own_seed), run_on_ranks)
        )
        if not values:
            key = f"data.eval.{dataset}".removesuffix(".")
            first = next(iter(engines.values()))
            raise first.output_error(f"{key}: the dataset is empty; there is nothing to evaluate on")
        if report is not None:
            shown = _make_report(engines, evaluation, report, derive_seed(seed, step, -2, *own_seed), run_on_ranks)
            if clash := sorted(values.keys() & shown):
                raise ValueError(f"report: it shows a {clash[0]!r}, as the evaluation does: call it something else")
            values |= shown
        prefix = f"eval/{dataset}/" if dataset else "eval/"
        named |= {f"{prefix}{encodable(str(name))}": value for name, value in values.items()}
    numbers = {name: float(value) for name, value in named.items() if _is_number(value)}
    return numbers, {name: value for name, value in named.items() if not _is_number(value)}


def _make_report(
    engines: Engines,
    evaluation: EvaluationData,
    report: Report,
    seed: int,
    run_on_ranks: Callable[[Callable[[], Any]], list[Any]],
) -> dict[str, Any]:
    engines.seed(seed)
    roots = {"report": report} if evaluation.seed is None else {"data": evaluation.dataset, "report": report}
    ObjectGenerators(**roots).seed(seed)  # a report may fetch samples
    shown: dict[str, Any] = {}
    run_on_ranks(lambda: shown.update(engines.report(report, evaluation.dataset)))
    return shown


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 0) == 0)


def show(
    tracker: Any, log: logging.Logger, folder: Path, step: int, shown: Mapping[str, Any], *, writes: bool = True
) -> None:
    """Shows the results of a report in TensorBoard, texts also in the log; if it `writes`, sounds also as files."""
    for name, value in shown.items():
        if isinstance(value, str):
            tracker.text(step, name, value)
            log.info("%s:\n%s", one_line(name), value)
        elif isinstance(value, Audio):
            tracker.audio(step, name, value)
            if writes:
                path = folder / "audio" / f"{name.removeprefix('eval/')}-{step:08d}.wav"
                make_folder_below(path.parent, folder)
                replace_file(path, [value.encode()])
                log.info("%s: %s", one_line(name), one_line(str(path)))
        else:
            tracker.image(step, name, value)


def evaluate(saved: SavedModel) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the numbers of a saved model's evaluation, and the results of its report.

    Raises:
        ConfigError: it has no evaluation data, or something can't be built.
    """
    spec = saved.spec
    if not spec.eval_datasets:
        raise ConfigError(f"{saved.path}: data.eval has no dataset to evaluate on; set data.eval={{_target_: ...}}")
    with distributed.preserve_rng_state():
        saved.check_roles("data.eval", "data.collate", "report", "metrics")
    device = build_device(spec)
    with distributed.preserve_rng_state(device):
        engines = saved.build_engines(device)
        evaluations, report = build_evaluations(spec), build_report(spec)
        changes = [find_change(evaluation.dataset, saved.fingerprint) for evaluation in evaluations.values()]
        for warning in filter(None, [*changes, *find_unseeded(spec, None, evaluations)]):
            print_message(warning)
        try:
            with contextlib.ExitStack() as stack:
                for evaluation in evaluations.values():
                    stack.callback(evaluation.close)
                return measure(engines, evaluations, report, seed=spec.seed, step=saved.step)
        except Exception as error:
            reason = describe_failure(error, "in the evaluation", device)
            # An error of a dataset has a note with the index of its sample, and is shown with its traceback.
            if reason is None and isinstance(error, ValueError) and not getattr(error, "__notes__", ()):
                reason = str(error)
            if reason is None:
                raise
            raise ConfigError(f"{saved.path}: {reason}") from error
