"""One pass of engines over evaluation batches: the means of their losses, and their metrics."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

from runner.engines.forward import Number, as_number
from runner.engines.metric_objects.results import flatten
from runner.engines.metrics import read_all
from runner.utils.distributed import is_distributed, is_rank_zero, move, nests
from runner.utils.utils import derive_seed

if TYPE_CHECKING:
    from runner.engines.engines import Engines

# Batch number, number of samples, values by name, and the weights of those values that have one. The ranks exchange
# these: a message holds plain tuples only.
_BatchResult = tuple[int, int, dict[str, float], dict[str, float]]
_CUT, _END = "cut", "end"


class EvaluationPass:
    """One pass of engines over this rank's batches.

    Args:
        batches, is_cut, seed: as of `Engines.evaluate`.
    """

    def __init__(
        self, engines: Engines, batches: Iterable[tuple[int, Any, int]], is_cut: Callable[[], bool], seed: int
    ) -> None:
        self._engines = engines
        self._batches: Iterator[tuple[int, Any, int]] = iter(batches)
        self._is_cut = is_cut
        self._seed = seed
        self._results: list[tuple[int, int, dict[str, Number], dict[str, Number]]] = []
        self._collections = {
            name: engine.metrics for name, engine in engines.items() if engine.metrics and engine.has_own_loss
        }
        self._measured = [(name, engine) for name, engine in engines.items() if engine.has_own_loss]
        self._device = engines.device
        self._is_sharded = engines.is_sharded
        self._update_error: Exception | None = None  # of rank zero's metrics, raised where all ranks learn of it
        self._packed: list[Any] = []  # tensors of the outputs and targets of this rank's last batch

    def run(self, together: Callable[[Callable[[], Any]], list[Any]]) -> dict[str, Any]:
        """Returns the numbers by name, and results of metrics that are texts or pictures."""
        for collection in self._collections.values():
            collection.reset()
        is_exchanged = bool(self._collections) and is_distributed()
        if is_exchanged:
            self._run_in_rounds(together)
        outcomes = together(self._finish if is_exchanged else self._run_alone)
        if any(outcome is None for outcome in outcomes):
            raise InterruptedError("the evaluation was cut short")
        means = _means([result for results, _ in outcomes for result in results])
        return self._add_metrics(means, outcomes[0][1])

    def _run_alone(self) -> Any:
        while isinstance(outputs := self._next(), dict):
            self._update(outputs)
        return None if outputs == _CUT else self._finish()

    def _run_in_rounds(self, together: Callable[[Callable[[], Any]], list[Any]]) -> None:
        """Evaluates one batch of each rank at a time, whose outputs and targets rank zero receives."""
        while True:
            structures = together(self._begin_round)
            if _CUT in structures:
                raise InterruptedError("the evaluation was cut short")
            if all(structure == _END for structure in structures):
                return
            empty = nests.pack({})[0]
            is_over = [structure == _END for structure in structures]
            structures = [empty if is_end else found for found, is_end in zip(structures, is_over, strict=True)]
            for outputs in nests.exchange(structures, self._packed):
                # The rest must be received, whatever becomes of these: the other ranks wait for it.
                if self._update_error is None:
                    try:
                        self._update(outputs)
                    except Exception as error:
                        self._update_error = error

    def _begin_round(self) -> Any:
        self._raise_update_error()
        self._packed = []
        outputs = self._next()
        if not isinstance(outputs, dict):
            return outputs
        structure, self._packed = nests.pack(outputs)
        return structure

    def _next(self) -> dict[str, tuple[Any, Any]] | str:
        """Runs the forwards of the next batch; returns output and target by engine, none for a batch of padding."""
        item = next(self._batches, None)
        if item is None:
            # A rank with sharded weights runs every forward, since the others need its shards.
            return _CUT if self._is_sharded and self._is_cut() else _END
        number, batch, num_samples = item
        engines = self._engines
        engines.seed(derive_seed(self._seed, number))
        if self._is_cut() and not self._is_sharded:
            return _CUT
        batch = move(batch, self._device)
        values: dict[str, Number] = {}
        weights: dict[str, Number] = {}
        outputs: dict[str, tuple[Any, Any]] = {}
        for name, engine in self._measured:
            tokens = engine.tokens
            output = engine.forward(batch)
            engine.tokens = tokens  # an evaluation does not count for throughput
            if name in self._collections:
                outputs[name] = engine.take_output(batch)
            if output.weight is None:
                values |= engines.prefixed(name, {"loss": as_number(output.loss), **output.extras})
            else:
                values |= engines.prefixed(name, output.extras)
                weights |= engines.prefixed(name, dict.fromkeys(output.extras, output.weight.terms))
        self._results.append((number, num_samples, values, weights))
        return outputs if num_samples else {}

    def _update(self, outputs: Mapping[str, tuple[Any, Any]]) -> None:
        for name, (output, target) in outputs.items():
            self._collections[name].update(output, target)

    def _raise_update_error(self) -> None:
        if self._update_error is not None:
            raise self._update_error

    def _finish(self) -> tuple[list[_BatchResult], dict[str, Any]]:
        """Returns this rank's results, and on rank zero the results of the metrics by engine."""
        self._raise_update_error()
        computed = {name: collection.compute() for name, collection in self._collections.items() if is_rank_zero()}
        results = [(number, size, _floats(values), _floats(weights)) for number, size, values, weights in self._results]
        return results, computed

    def _add_metrics(self, means: dict[str, float], computed: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
        named: dict[str, Any] = dict(means)
        for engine_name, results in computed.items():
            for metric_name, plain in results.items():
                found = self._engines.prefixed(engine_name, flatten(metric_name, plain))
                if clash := sorted(named.keys() & found):
                    raise self._engines[engine_name].output_error(
                        f"metrics.{metric_name}: expected a name of its own, found that the forward returns a number "
                        f"{clash[0]!r}; call one of them something else"
                    )
                named |= found
        return named


def evaluate(
    engines: Engines,
    batches: Iterable[tuple[int, Any, int]],
    is_cut: Callable[[], bool],
    seed: int,
    together: Callable[[Callable[[], Any]], list[Any]],
) -> dict[str, Any]:
    """Evaluates engines in evaluation mode; see `Engines.evaluate`."""
    engines.sync_buffers()
    with contextlib.ExitStack() as stack:
        for engine in engines.values():
            stack.enter_context(engine.evaluating())
        return EvaluationPass(engines, batches, is_cut, seed).run(together)


def _floats(values: dict[str, Number]) -> dict[str, float]:
    if all(type(value) is float for value in values.values()):
        return values  # type: ignore[return-value]  # as on the CPU
    return dict(zip(values, read_all(list(values.values())), strict=True))


def _means(results: list[_BatchResult]) -> dict[str, float]:
    """Returns the means over all batches, weighted by terms or samples; nothing without a batch.

    Batches are summed in their order, since ranks return them in any order and the sum of floats depends on it.

    Raises:
        ValueError: a number has a weight in some batches only.
    """
    counted = sorted((result for result in results if result[1]), key=lambda result: result[0])
    sums, total_weights, has_weight = dict[str, float](), dict[str, float](), dict[str, bool]()
    for _, num_samples, values, weights in counted:
        for name, value in values.items():
            if has_weight.setdefault(name, name in weights) is not (name in weights):
                raise ValueError(
                    f"{name}: a forward returned a weight in some batches and not in others; "
                    "return it always or never: the losses would not count alike"
                )
            weight = weights.get(name, num_samples)
            sums[name] = sums.get(name, 0.0) + (value * weight if weight else 0.0)
            total_weights[name] = total_weights.get(name, 0.0) + weight
    return {name: sums[name] / total if total else math.nan for name, total in total_weights.items()}
