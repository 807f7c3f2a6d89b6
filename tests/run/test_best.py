import math

import pytest

from runner.run.best import Best

OLD = {"name": "eval/loss", "value": 2.0, "step": 4}


@pytest.mark.parametrize(("is_higher_better", "step"), [(False, 2), (True, 1)])
def test_the_first_evaluation_that_no_later_one_surpasses_is_the_best(is_higher_better, step):
    best = Best("eval/a", is_higher_better)
    values = [3.0, -1.0, -1.0, 3.0, math.nan]
    bests = [
        number for number, value in enumerate(values, 1) if best.update(number, {"eval/a": value, "eval/b": number})
    ]
    assert best.found == {"name": "eval/a", "value": values[step - 1], "step": step}
    assert bests[-1] == step


@pytest.mark.parametrize(
    ("metric", "numbers", "is_kept"),
    [
        ("eval/loss", {}, True),
        (None, {}, True),
        (None, {"eval/loss": 1.0, "eval/b/loss": 2.0}, True),
        (None, {"eval/b/loss": 2.0, "eval/loss": 1.0}, False),
        ("eval/accuracy", {}, False),
        ("eval/accuracy", {"eval/loss": 1.0, "eval/accuracy": 2.0}, False),
    ],
)
def test_what_was_best_counts_on_if_the_same_metric_decides(metric, numbers, is_kept):
    best = Best(metric, False)
    note = best.restore_best(OLD, numbers)
    assert (best.found, note is None) == ((OLD, True) if is_kept else (None, False))
    assert (best.rate({"name": "eval/loss", "value": 2.0}) is not None) == is_kept


def test_another_metric_begins_anew_at_its_first_evaluation_at_the_latest():
    best = Best(None, False)
    assert best.restore_best(OLD, {}) is None
    assert best.update(6, {"eval/a/loss": 7.0, "eval/loss": 3.0})
    assert best.found == {"name": "eval/a/loss", "value": 7.0, "step": 6}


def test_a_metric_is_rated_by_its_mode_and_only_under_its_name():
    metric = {"name": "eval/a", "value": 3.0}
    assert (Best("eval/a", False).rate(metric), Best("eval/a", True).rate(metric)) == (3.0, -3.0)
    assert [Best("eval/b", True).rate(each) for each in (metric, 3.0)] == [None, None]
    assert Best("eval/a", True).metric_of({"eval/b": 1.0, "eval/a": 3}) == metric
    assert Best("eval/a", True).metric_of({"eval/b": 1.0}) is None
