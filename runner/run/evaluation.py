"""The evaluation of a model, in a run and after it: both give the same numbers. Imports torch where it is needed."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runner.config.errors import ConfigError, tell
from runner.run.fingerprint import find_change
from runner.utils.utils import encodable, one_line

if TYPE_CHECKING:
    from runner.engines import Engines
    from runner.run.build import Report
    from runner.run.saved_model import SavedModel
    from runner.utils.sampler.batches import EvaluationData


def measure(
    engines: Engines,
    evaluation: EvaluationData,
    report: Report | None,
    *,
    seed: int,
    step: int,
    is_cut: Callable[[], bool] = bool,
    together: Callable[[Callable[[], Any]], list[Any]] | None = None,
) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns an evaluation's numbers by `eval/<name>`, and the texts and pictures of its report likewise.

    What is drawn at random on the way depends on seed and step alone. Of several ranks each evaluates its batches, and
    all make the report.

    Args:
        together: calls a function on every rank and returns what each gave.

    Raises:
        InterruptedError: where `is_cut`, asked before each batch, said so.
        ValueError: there is no batch.
    """
    from runner.utils import distributed
    from runner.utils.modules.generators import HeldGenerators
    from runner.utils.utils import derive_seed

    together = together or distributed.run_on_all_ranks
    values: dict[str, Any] = dict(engines.evaluate(evaluation, is_cut, derive_seed(seed, step, -1), together))
    if report is not None:
        engines.seed(derive_seed(seed, step, -2))
        roots = {"report": report} if evaluation.seed is None else {"data": evaluation.dataset, "report": report}
        HeldGenerators(**roots).seed(derive_seed(seed, step, -2))  # a report may fetch samples
        shown: dict[str, Any] = {}
        together(lambda: shown.update(engines.report(report, evaluation.dataset)))
        if clash := sorted(values.keys() & shown):
            raise ValueError(f"report: it shows a {clash[0]!r}, as the evaluation does: call it something else")
        values |= shown
    named = {f"eval/{encodable(str(name))}": value for name, value in values.items()}
    numbers = {name: float(value) for name, value in named.items() if _is_number(value)}
    return numbers, {name: value for name, value in named.items() if not _is_number(value)}


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) or (hasattr(value, "item") and getattr(value, "ndim", 0) == 0)


def show(
    tracker: Any, log: logging.Logger, folder: Path, step: int, shown: Mapping[str, Any], *, writes: bool = True
) -> None:
    """Shows what a report gave: all in TensorBoard, texts in the log too, and sounds as files if it `writes`."""
    from runner.tracking.media import Audio
    from runner.utils.files import make_folder, replace_file

    for name, value in shown.items():
        if isinstance(value, str):
            tracker.text(step, name, value)
            log.info("%s:\n%s", one_line(name), value)
        elif isinstance(value, Audio):
            tracker.audio(step, name, value)
            if writes:
                path = folder / "audio" / f"{name.removeprefix('eval/')}-{step:08d}.wav"
                make_folder(path.parent, folder)
                replace_file(path, [value.encode()])
                log.info("%s: %s", one_line(name), one_line(str(path)))
        else:
            tracker.image(step, name, value)


def evaluate(saved: SavedModel) -> tuple[dict[str, float], dict[str, Any]]:
    """Returns the numbers, texts and pictures of a saved model's evaluation.

    Raises:
        ConfigError: there is nothing to evaluate on, or something can't be built.
    """
    from runner.run import build
    from runner.utils.distributed import preserve_rng_state
    from runner.utils.train.failures import describe_failure

    plain = saved.plain
    if plain["data"]["eval"] is None:
        raise ConfigError(f"{saved.path}: data.eval has no dataset to evaluate on; set data.eval={{_target_: ...}}")
    with preserve_rng_state():
        saved.check("data.eval", "data.collate", "report")
    device = build.build_device(plain)
    with preserve_rng_state(device):
        engines = saved.build_engines(device)
        evaluation, report = build.build_evaluation(plain), build.build_report(plain)
        assert evaluation is not None
        changed = find_change(evaluation.dataset, saved.fingerprint)
        for note in filter(None, [changed, *build.find_unseeded(plain, None, evaluation)]):
            tell(note)
        try:
            return measure(engines, evaluation, report, seed=plain["seed"], step=saved.step)
        except Exception as error:
            told = describe_failure(error, "in the evaluation", device)
            # What a dataset raised has its index in a note, and is shown with its traceback.
            if told is None and isinstance(error, ValueError) and not getattr(error, "__notes__", ()):
                told = str(error)
            if told is None:
                raise
            raise ConfigError(f"{saved.path}: {told}") from error
