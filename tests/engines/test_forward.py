"""Reads the numbers that a forward returns at once, in training and in evaluation alike."""

import dataclasses
import logging
from collections.abc import Mapping
from fractions import Fraction
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from torch import nn

from runner.engines import Engine, Engines, forward, metrics
from runner.engines.metrics import MetricAccumulator

BATCH = torch.ones(4, 3)


class Counting(nn.Module):
    """A module that overwrites the numbers that it has returned."""

    def __init__(self, dtype=torch.float32):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.scales = nn.Parameter(torch.ones(2))
        self.register_buffer("count", torch.zeros((), dtype=dtype))
        self.register_buffer("counts", torch.zeros(2, 1, dtype=dtype))
        self.array = np.zeros(1)

    def forward(self, x):
        self.count += 1
        self.counts += 1
        self.array += 1
        loss = (self.linear(x) * self.scales.sum()).square().mean()
        aliases = {"buffer": self.count, "part": self.counts[1], "detached": self.count.detach(), "array": self.array}
        weights = {"weight_part": self.scales[0], "weight_copied": self.scales[0].item()}
        return {"loss": loss, **aliases, **weights, "copied": self.count.item()}


def train(module, *, num_steps=5, **settings):
    engines = Engines(model=Engine(module, torch.optim.SGD(module.parameters(), lr=0.1), **settings))
    for _ in range(num_steps):
        engines.micro_step(BATCH)
        assert engines.step() == {}
    return engines


def evaluate(engines, num_batches=3):
    return engines.evaluate([(number, BATCH, 4) for number in range(num_batches)])


@pytest.mark.parametrize("feeder", [None, lambda module, batch: {**module(batch), "own": module.count}])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.int64])
def test_a_number_is_that_of_the_moment_it_was_returned(dtype, feeder):
    engines = train(Counting(dtype), feeder=feeder)
    for values in (engines.take_metrics(), evaluate(engines)):
        names = {"buffer", "part", "detached", "array"} | ({"own"} if feeder else set())
        assert {values[name] for name in names} == {values["copied"]}
        assert values["weight_part"] == pytest.approx(values["weight_copied"], rel=1e-12)
    assert values["copied"] == 7.0  # 6, 7 and 8


def test_a_number_on_an_accelerator_is_copied_there(monkeypatch):
    for module in (forward, metrics):
        monkeypatch.setattr(module, "is_readable", lambda tensor: False)
    engines = train(Counting(), feeder=lambda module, batch: module(batch) | {"one": torch.ones(1)})
    values = engines.take_metrics()
    assert values["buffer"] == values["part"] == values["detached"] == values["copied"] == 3.0


class Smoothed(nn.Module):
    """A module that keeps an average of its loss and writes to it in place; the first loss is the average itself."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.average = None

    def forward(self, x):
        loss = self.linear(x).square().mean()
        if self.average is None:
            self.average = loss.detach()
        self.average += 1
        return {"loss": loss, "copied": loss.item() - 1}


@pytest.mark.parametrize("is_on_accelerator", [False, True])
def test_a_loss_that_the_module_keeps_and_writes_to_is_that_of_its_return(is_on_accelerator, monkeypatch):
    if is_on_accelerator:
        for module in (forward, metrics):
            monkeypatch.setattr(module, "is_readable", lambda tensor: False)
    module = Smoothed()
    engines = train(module, num_steps=1)
    module.average += 100
    values = engines.take_metrics()
    assert values["loss"] == values["copied"] + 1


def test_a_loss_that_is_a_buffer_is_read_as_well():
    module = Counting()
    engines = Engines(model=Engine(module, feeder=lambda module, batch: module(batch)["buffer"]))
    for _ in range(3):
        engines.micro_step(BATCH)
    assert engines.take_metrics()["loss"] == 2.0
    assert evaluate(engines)["loss"] == 5.0


class Returning(nn.Module):
    """A module that returns a loss beside the given fields."""

    def __init__(self, given, kind=dict):
        super().__init__()
        self.linear = nn.Linear(3, 1)
        self.given, self.kind = given, kind

    def forward(self, x):
        return self.kind(loss=self.linear(x).square().mean(), **self.given)


TENTH = 0.1
ACCEPTED = {
    "a float": TENTH,
    "an int": 3,
    "a large int": 2**60,
    "a bool": True,
    "numpy's float": np.float64(TENTH),
    "numpy's half": np.float16(TENTH),
    "numpy's int": np.int8(-3),
    "numpy's bool": np.bool_(True),
    "an array": np.full((1, 1), TENTH),
    "a flag": torch.tensor(True),
    "an integer": torch.tensor(3),
    "a half": torch.tensor(TENTH, dtype=torch.bfloat16),
    "a double": torch.tensor(TENTH, dtype=torch.float64),
    "a column": torch.full((1, 1, 1), TENTH, dtype=torch.float64),
    "with a graph": torch.tensor(TENTH, dtype=torch.float64, requires_grad=True),
}


def test_every_kind_of_number_is_logged_exactly_and_alike_in_training_and_evaluation(caplog):
    engines = train(Returning(ACCEPTED), num_steps=1)
    one, other = engines.take_metrics(), evaluate(engines, 1)
    for name, value in ACCEPTED.items():
        expected = value.item() if hasattr(value, "item") else value
        assert one[name] == other[name] == expected, name
    assert caplog.records == []


def test_a_number_of_another_type_each_time_is_a_mean_of_all():
    numbers = iter([torch.tensor(1), torch.tensor(0.5, dtype=torch.float64), 0.25, np.float32(0.125), True] * 2)
    module = Returning({})
    feeder = lambda module, batch: {**module(batch), "mixed": next(numbers)}  # noqa: E731
    engines = train(module, feeder=feeder)
    assert engines.take_metrics()["mixed"] == pytest.approx(0.575)
    assert evaluate(engines, 5)["mixed"] == pytest.approx(0.575)


REFUSED = {
    "text": "0.5",
    "logits": torch.ones(4, 2),
    "nothing": None,
    "complex": torch.tensor(1j),
    "complex of Python": 1j,
    "empty": torch.ones(0),
    "list": [0.5],
    "array": np.ones(2),
    "word": np.str_("0.5"),
    "time": np.datetime64("2026-01-01"),
    "endless": 10**400,
    "fraction": Fraction(1, 2),
}


def test_a_value_that_is_no_metric_is_named_once(caplog):
    engines = train(Returning(REFUSED), num_steps=3)
    evaluate(engines)
    assert not engines.take_metrics().keys() & REFUSED.keys()
    assert len(caplog.records) == len(REFUSED)
    for record, (name, value) in zip(caplog.records, REFUSED.items(), strict=True):
        assert record.levelno == logging.WARNING
        assert f"Returning.forward: {name!r} is a {type(value).__name__}" in record.getMessage()


RESERVED = ["lr", "lr_1", "grad_norm", "loss_scale", "step_time_s", "samples_per_s", "tokens_per_s", "memory_gb"]


@pytest.mark.parametrize("name", RESERVED)
def test_a_name_of_the_runners_own_is_refused_before_a_step_and_in_an_evaluation(name):
    module = Returning({name: 1.0})
    before = module.linear.weight.detach().clone()
    with pytest.raises(ValueError, match=f"named '{name}', as the runner names one of its own: call it something else"):
        train(module)
    assert torch.equal(module.linear.weight, before)
    with pytest.raises(ValueError, match=f"named '{name}'"):
        evaluate(Engines(model=Engine(module)))


@pytest.mark.parametrize("name", ["lr_scale", "learning_rate", "grad_norm_2", "step", "time_s", "a/b", "", 7])
def test_names_that_only_look_like_the_runners_own_are_logged(name):
    engines = train(nn.Linear(3, 1), feeder=lambda module, batch: {"loss": module(batch).mean(), name: 0.5})
    assert engines.take_metrics()[str(name)] == 0.5


@dataclasses.dataclass
class Found:
    loss: Any
    accuracy: Any


@dataclasses.dataclass(slots=True)
class Slotted:
    loss: Any
    accuracy: Any


class Named(NamedTuple):
    loss: Any
    accuracy: Any


class Plain:
    def __init__(self, **values):
        vars(self).update(values)


@pytest.mark.parametrize("kind", [Found, Slotted, Named, Plain])
def test_the_numbers_of_an_object_are_metrics_too(kind):
    engines = train(Returning({"accuracy": 0.5}, kind))
    assert engines.take_metrics()["accuracy"] == evaluate(engines)["accuracy"] == 0.5


class Pair(tuple):
    """A tuple that is a mapping as well."""

    __slots__ = ()


Mapping.register(Pair)


@pytest.mark.parametrize("batch", [Pair((1, 2)), (1, 2), [1, 2], {"x": 1}, 3])
def test_a_batch_has_the_same_arguments_with_and_without_a_strategy(batch):
    positional, named = forward.arguments_of(batch)
    assert forward.feed(lambda *args, **kwargs: (args, kwargs), batch) == (tuple(positional), dict(named))


def test_a_number_on_the_cpu_beside_one_that_is_not_stays_there():
    kept = MetricAccumulator()
    for value in (1.0, 2.0):  # of another dtype, as of another device, and so not stacked with the other
        kept.add({"loss": torch.tensor(value, dtype=torch.bfloat16), "accuracy": value / 10})
    assert kept.take() == {"loss": 1.5, "accuracy": pytest.approx(0.15)}
