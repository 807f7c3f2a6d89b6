"""Compares two runs: metrics without times, and the weights of a checkpoint, bit for bit."""

from chaos import TIMES, find_difference
from conftest import read_metrics

from runner.utils import io


def read_untimed_metrics(folder):
    """Returns the lines of metrics.jsonl without the values that a clock or the machine decides."""
    return [{key: value for key, value in line.items() if key not in TIMES} for line in read_metrics(folder)]


def load_weights(folder, step):
    """Returns the SafeTensors files of a checkpoint: each engine's weights, then its optimizer."""
    path = folder / "checkpoints" / f"step_{step:08d}"
    return [io.load(file) for file in sorted(path.glob("*.safetensors"), key=lambda file: len(file.name))]


def assert_same_run(one, other, step):
    assert read_untimed_metrics(one) == read_untimed_metrics(other)
    for a, b in zip(load_weights(one, step), load_weights(other, step), strict=True):
        assert_equal(a, b)


def assert_equal(a, b):
    assert find_difference(a, b) is None
