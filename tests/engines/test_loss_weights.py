"""Losses with a `weight` (the number of terms in their mean) against the mean over all terms."""

import math
import multiprocessing
import threading
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import run_ranks
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from runner.engines import Engine, Engines, forward, gradients, strategies
from runner.engines import metrics as gathered
from runner.engines.fsdp import FSDP
from runner.engines.strategies import DDP, Strategy
from runner.utils import distributed
from runner.utils.distributed.coordinator import Coordinator
from runner.utils.sampler.batches import rank_slice
from runner.utils.train import Loop
from runner.utils.train.failures import TrainingStopped
from runner.utils.wrapper import optimize
from runner.utils.wrapper.built_in import Checkpointing

TIME, WIDTH = 5, 3
LAYOUTS = {"alone": Strategy, "ddp": DDP, "fsdp": FSDP}
FORMS = {
    "int": lambda count: int(count),
    "numpy": lambda count: np.float32(int(count)),
    "tensor": lambda count: count,
    "column": lambda count: count.double()[None, None],
}


class Masked(nn.Module):
    """A mean over unmasked terms; loss and gradients are NaN if all are masked."""

    def __init__(self, form="tensor", dtype=torch.float64):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 4), nn.Tanh(), nn.Linear(4, 1)).to(dtype)
        self.form = form

    def forward(self, x, mask):
        error = (self.layers(x)[..., 0] - x.sum(-1)) * mask
        count = mask.sum()
        found = {"loss": error.square().sum() / count, "error": (error.abs().sum() / count).detach()}
        return found | ({"weight": FORMS[self.form](count)} if self.form else {})


@dataclass(frozen=True)
class Case:
    """A run; `lengths[step][micro_step]` has the number of terms of each sample."""

    lengths: list
    strategy: str = "alone"
    form: str = "tensor"
    clip_norm: float = 0.0
    optimizer: str = "sgd"
    dtype: torch.dtype = torch.float64

    def batches(self):
        """Returns the full batches by step and micro-step."""
        generator = torch.Generator().manual_seed(3)
        found = []
        for parts in self.lengths:
            found.append([])
            for lengths in parts:
                x = torch.randn(len(lengths), TIME, WIDTH, generator=generator, dtype=torch.float64)
                mask = torch.arange(TIME) < torch.tensor(lengths)[:, None]
                found[-1].append({"x": x.to(self.dtype), "mask": mask.to(torch.int64)})
        return found

    def make_optimizer(self, module):
        if self.optimizer == "adamw":
            return torch.optim.AdamW(module.parameters(), lr=0.01, weight_decay=0.1)
        return torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)


def compute_directly(case):
    """Returns weights, means and the last norm of a plain loop over full batches; a step without terms is skipped."""
    module = Masked("", case.dtype)
    optimizer = case.make_optimizer(module)
    sums, terms, norm = {"loss": 0.0, "error": 0.0}, 0, None
    for parts in case.batches():
        whole = {key: torch.cat([part[key] for part in parts]) for key in ("x", "mask")}
        count = int(whole["mask"].sum())
        if not count:
            continue
        found = module(**whole)
        optimizer.zero_grad()
        found["loss"].backward()
        norm = nn.utils.clip_grad_norm_(module.parameters(), case.clip_norm or math.inf)
        optimizer.step()
        terms += count
        for name in sums:
            sums[name] += count * float(found[name].detach())
    means = {name: value / terms for name, value in sums.items()} if terms else {}
    return module.state_dict(), means, float(norm) if norm is not None and case.clip_norm else None


def make_engines(case, coordinator=None, **settings):
    module = settings.pop("module", None) or Masked(case.form, case.dtype)
    strategy = LAYOUTS[case.strategy]()
    strategy.attach_coordinator(coordinator or Coordinator(), "model", True)
    strategy.shard(module)
    settings = {"clip_norm": case.clip_norm, "on_nonfinite": "stop", "accumulate": len(case.lengths[0])} | settings
    return Engines(model=Engine(module, case.make_optimizer(module), strategy=strategy, **settings))


def train(case, **settings):
    """Trains on this rank's slices of the batches; returns weights, metrics and the faults of each step."""
    coordinator = Coordinator()
    engines = make_engines(case, coordinator, **settings)
    rank, count = distributed.rank(), distributed.world_size()
    faults = []
    for parts in case.batches():
        for part in parts:
            size = len(part["x"])
            start, end = rank_slice(size, rank, count)
            own = {key: value[start:end] if start < end else value[:1] for key, value in part.items()}
            engines.micro_step(own, (end - start) * count / size)
        faults.append(
            engines.step(lambda: {word.topic: word for word in coordinator.poll() if word.topic != "weighted"})
        )
    metrics = engines.take_metrics()
    return engines.export_states()["model"], metrics, faults


def check(case, found, tolerance=1e-6):
    weights, means, norm = compute_directly(case)
    state, metrics, faults = found
    for name, value in weights.items():
        torch.testing.assert_close(state[name], value, rtol=tolerance, atol=tolerance)
    assert {"loss", "error"} & metrics.keys() == means.keys()
    assert all(metrics[name] == pytest.approx(mean, rel=tolerance) for name, mean in means.items())
    if norm is not None:
        assert metrics["grad_norm"] == pytest.approx(norm, rel=max(tolerance, 1e-5))  # FSDP adds norms in fp32
    is_empty = [not sum(map(sum, parts)) for parts in case.lengths]
    assert [bool(fault) for fault in faults] == is_empty


LENGTHS = st.integers(1, 4).flatmap(  # micro-steps a step
    lambda parts: st.lists(
        st.lists(st.lists(st.integers(0, TIME), min_size=1, max_size=4), min_size=parts, max_size=parts),
        min_size=2, max_size=3,
    )
)  # fmt: skip
CASES = {
    "lengths": LENGTHS,
    "form": st.sampled_from(list(FORMS)),
    "clip_norm": st.sampled_from([0.0, 0.3]),
    "optimizer": st.sampled_from(["sgd", "adamw"]),
}


@settings(max_examples=60, deadline=None)
@given(st.builds(Case, strategy=st.just("alone"), **CASES))
def test_one_process_trains_as_computed_directly(case):
    check(case, train(case))


def serve(pipes):
    """Trains each case that it receives and sends the result, until it receives None."""
    pipe = pipes[distributed.rank()]
    while (case := pipe.recv()) is not None:
        try:
            pipe.send(train(case))
        except Exception as error:
            pipe.send(error)


@pytest.fixture(scope="module")
def train_on_two_ranks():
    """Returns a function that trains a case on two processes, which are started once."""
    here, there = zip(*(multiprocessing.Pipe() for _ in range(2)), strict=True)
    ranks = threading.Thread(target=run_ranks, args=(2, serve, there), kwargs={"timeout_s": 120.0})
    ranks.start()

    def call(case):
        for pipe in here:
            pipe.send(case)
        assert all(pipe.poll(30.0) for pipe in here)
        found = [pipe.recv() for pipe in here]
        if failed := [each for each in found if isinstance(each, Exception)]:
            raise failed[0]
        return found

    yield call
    for pipe in here:
        pipe.send(None)
    ranks.join()


@settings(max_examples=40, deadline=None)
@given(st.builds(Case, strategy=st.sampled_from(["ddp", "fsdp"]), **CASES))
def test_two_ranks_train_as_computed_directly(train_on_two_ranks, case):
    for found in train_on_two_ranks(case):
        check(case, found)


@pytest.mark.parametrize("size", [1, 8, 64])
def test_an_evaluation_is_the_mean_over_all_terms_for_any_batch_size(size):
    lengths = [index % (TIME + 1) for index in range(40)]
    case = Case([[lengths]], dtype=torch.float32)
    whole = case.batches()[0][0]
    module = Masked()
    parts = zip(*(value.split(size) for value in whole.values()), strict=True)
    batches = [(number, dict(zip(whole, part, strict=True)), len(part[0])) for number, part in enumerate(parts)]
    found = make_engines(case).evaluate(batches)
    expected = module.float()(**whole)
    for name in ("loss", "error"):
        assert found[name] == pytest.approx(float(expected[name].detach()), rel=1e-6)


def test_an_evaluation_without_a_single_term_has_no_mean():
    case = Case([[[0, 0]]])
    assert math.isnan(make_engines(case).evaluate([(0, case.batches()[0][0], 2)])["loss"])


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_a_step_without_terms_is_left_out_and_changes_nothing_whatever_on_nonfinite_says(optimizer):
    case = Case([[[3], [2]], [[0], [0]], [[1], [4]]], optimizer=optimizer)
    for mode in ("stop", "skip", "ignore"):
        engines = make_engines(case, on_nonfinite=mode)
        first, empty, last = case.batches()
        for part in first:
            engines.micro_step(part)
        assert engines.step() == {}
        before = [parameter.clone() for parameter in engines["model"].module.parameters()]
        for part in empty:
            engines.micro_step(part)
        faults = engines.step()
        assert faults == {"model": "the weights of its losses add up to 0: there is nothing to learn from"}
        assert not engines.is_stopped_by(faults)
        assert all(map(torch.equal, before, engines["model"].module.parameters()))
        for part in last:
            engines.micro_step(part)
        assert engines.step() == {}
        assert (engines["model"].steps, engines["model"].skipped_steps) == (2, 1)
        check(case, (engines.export_states()["model"], engines.take_metrics(), [{}, faults, {}]))


class NoReading(TorchDispatchMode):
    """Makes a read of a tensor fail, since it would wait for an accelerator."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        assert func is not torch.ops.aten._local_scalar_dense.default, "a tensor is read"
        assert func is not torch.ops.aten.nonzero.default, "a size depends on a tensor"
        return func(*args, **(kwargs or {}))


@pytest.fixture
def unreadable(monkeypatch):
    """Makes engines treat CPU tensors as those of an accelerator, which must not be waited for."""
    for module in (forward, gathered, gradients, strategies):
        monkeypatch.setattr(module, "is_readable", lambda tensor: False)


@pytest.mark.usefixtures("unreadable")
@pytest.mark.parametrize("clip_norm", [0.0, 0.3])
@pytest.mark.parametrize("is_accumulated", [False, True])
def test_a_device_is_not_waited_for(clip_norm, is_accumulated, caplog):
    lengths = [[[3, 0], [0, 0], [5]], [[0], [1, 2], [0]], [[0], [0], [0, 0]]]
    if not is_accumulated:
        lengths = [[[length for part in parts for length in part]] for parts in lengths]
    case, counted = Case(lengths, clip_norm=clip_norm), Case(lengths[:2], clip_norm=clip_norm)
    engines = make_engines(case, on_nonfinite="ignore")
    states = []
    for parts in case.batches():
        with NoReading():
            for part in parts:
                engines.micro_step(part)
            assert engines.step() == {}
        states.append(engines.export_states()["model"])
    weights, means, _ = compute_directly(counted)
    for name, value in weights.items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-6, atol=1e-6)
        assert torch.isfinite(states[2][name]).all()  # its gradients were 0, and its momentum was not
    assert caplog.records == []
    metrics = engines.take_metrics()
    assert "In 1 steps the weights of its losses add up to 0; their gradients were taken as 0" in caplog.text
    assert all(metrics[name] == pytest.approx(mean, rel=1e-6) for name, mean in means.items())


def one_thousand_and_three_terms(strategy, dtype, weighted):
    """Trains a linear model whose ranks have 1003 and 1 terms; returns weights, faults and the collectives."""
    coordinator, rank = Coordinator(), distributed.rank()
    module = nn.Linear(1, 1, bias=False).to(dtype)
    with torch.no_grad():
        module.weight.fill_(0.0)
    made = LAYOUTS[strategy]()
    made.attach_coordinator(coordinator, "model", True)
    made.shard(module)

    def feed(module, batch):
        loss = (module(batch) * (1.0 if rank else 0.0)).float().sum()
        return {"loss": loss} | ({"weight": 1 if rank else 1003} if weighted else {})

    settings = {"feeder": feed, "strategy": made, "clip_norm": 10.0, "on_nonfinite": "stop"}
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=1004.0), **settings)
    calls = []
    for _ in range(3):
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
            engine.micro_step(torch.ones(1, 1, dtype=dtype))
            assert engine.prepare() is None
            coordinator.poll()
            engine.update()
        calls.append([event.name for event in profile.events() if event.name.startswith("gloo:")])
    weight = Engines(model=engine).export_states()["model"]["weight"].item()
    return weight, len(calls[-1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_the_weights_of_all_ranks_are_added_exactly_and_in_an_exchange_that_there_is(strategy, dtype):
    found = run_ranks(2, one_thousand_and_three_terms, strategy, dtype, True)
    (_, without), _ = run_ranks(2, one_thousand_and_three_terms, strategy, dtype, False)
    for weight, num_collectives in found:
        assert weight == -3.0  # 1 of 1004 terms has a gradient of 1, at a rate of 1004; of 1005 it would be less
        assert num_collectives == without + (strategy == "ddp" and dtype is torch.bfloat16)


def train_low(case, engines=None, steps=slice(None), layout_rank=(0, 1)):
    """Trains in fp16 with losses of a thousand terms, whose gradients would overflow if they were summed."""
    rank, count = layout_rank

    def feed(module, batch):
        found = module(**batch)
        return found | {"loss": 0.1 * found["loss"], "weight": 1000 * found["weight"]}

    coordinator = Coordinator()
    engines = engines or make_engines(case, coordinator, precision="fp16", feeder=feed, on_nonfinite="ignore")
    for parts in case.batches()[steps]:
        for part in parts:
            engines.micro_step({key: value.chunk(count)[rank] for key, value in part.items()})
        engines.step()
    return engines


LOW = Case([[[5, 5, 5, 4], [5, 1, 2, 3]]] * 6, dtype=torch.float32, clip_norm=0.05)


def test_gradients_of_fp16_stay_in_range_and_resume_as_they_were():
    whole, cut = train_low(LOW), train_low(LOW, steps=slice(0, 4))
    assert (whole["model"].steps, whole["model"].skipped_steps) == (5, 1)
    again = train_low(LOW, steps=slice(0, 0))
    again.load_state_dict(cut.state_dict())
    assert again["model"]._reader.reference_weight == pytest.approx(30e3)
    train_low(LOW, again, slice(4, 6))
    assert all(map(torch.equal, whole["model"].module.parameters(), again["model"].module.parameters()))
    assert again.take_metrics() == whole.take_metrics()


def train_low_on_a_rank(strategy):
    engines = train_low(replace(LOW, strategy=strategy), layout_rank=(distributed.rank(), distributed.world_size()))
    return engines.export_states()["model"], engines.take_metrics(), engines["model"].steps


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_ranks_of_fp16_train_as_one_process(strategy):
    whole = train_low(LOW)
    weights, metrics = whole.export_states()["model"], whole.take_metrics()
    for state, found, steps in run_ranks(2, train_low_on_a_rank, strategy):
        assert steps == 5
        for name, value in weights.items():
            torch.testing.assert_close(state[name], value, rtol=2e-3, atol=2e-3)
        assert found["loss"] == pytest.approx(metrics["loss"], rel=2e-3)
        assert found["grad_norm"] == pytest.approx(metrics["grad_norm"], rel=2e-2)


def release_others():
    """Runs 4 steps with bf16 weights; rank 1 fails in the third. Returns the messages and the weights."""
    coordinator, case = Coordinator(), Case([[[3, 1]]] * 4, "ddp", dtype=torch.bfloat16)
    engines = make_engines(case, coordinator, feeder=lambda module, batch: {**module(**batch), "weight": 2})
    heard, can_release = [], []
    for step, (part,) in enumerate(case.batches()):
        can_release.append(engines.can_shadow)
        if step == 2 and distributed.rank() == 1:
            coordinator.post("error", "mine")
            engines.shadow_step()
        else:
            engines.micro_step(part)
            engines["model"].prepare()
        heard.append([tuple(word) for word in coordinator.poll() if word.topic == "error"])
        if heard[-1]:
            engines.discard()
        else:
            engines["model"].update()
    return heard, can_release, [each.tolist() for each in engines["model"].module.parameters()]


def test_a_rank_that_can_not_make_a_step_joins_the_exchange_of_weights_too():
    one, other = run_ranks(2, release_others)
    assert one == other
    assert one[:2] == ([[], [], [(1, "error", "mine")], []], [False, True, True, True])


def test_sparse_gradients_of_a_batch_without_terms_are_none():
    module = nn.Embedding(5, 2, sparse=True)
    before = module.weight.detach().clone()

    def feed(module, batch):
        indices, weight = batch
        return {"loss": module(indices).sum() / weight, "weight": torch.tensor(weight)}

    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=1.0), feeder=feed, accumulate=2)
    engine.micro_step((torch.tensor([1]), 0.0))
    engine.micro_step((torch.tensor([2]), 4.0))
    assert engine.step() is None
    expected = before.clone()
    expected[2] -= 0.25
    torch.testing.assert_close(module.weight.detach(), expected)


@pytest.mark.parametrize("weight", [-1, math.nan, math.inf, "many", torch.ones(2)])
def test_a_weight_that_is_no_number_of_terms_is_refused(weight):
    case = Case([[[1]]])
    engines = make_engines(case, feeder=lambda module, batch: module(**batch) | {"weight": weight})
    with pytest.raises(
        ValueError, match=r"returned weight=.*: expected the number of terms in its mean loss, 0 or more"
    ):
        engines.micro_step(case.batches()[0][0])


def test_a_weight_is_returned_always_or_never():
    case = Case([[[2], [3]]])
    first, second = case.batches()[0]
    engines = make_engines(case)
    engines.micro_step(first)
    engines["model"].module.form = ""
    with pytest.raises(ValueError, match="a weight in some forwards and not in others; return it always or never"):
        engines.micro_step(second)
    weighs = iter(["tensor", ""])

    def feed(module, batch):
        module.form = next(weighs)
        return module(**batch)

    other = make_engines(case, feeder=feed)
    with pytest.raises(ValueError, match="a weight in some forwards and not in others"):
        other.evaluate([(0, first, 1), (1, second, 1)])
    third = make_engines(case)
    third.evaluate([(0, first, 1)])
    third["model"].module.form = ""
    with pytest.raises(ValueError, match="a weight in some forwards and not in others"):
        third.micro_step(first)


def weigh_on_one_rank(strategy):
    """Runs a step of a `Loop` whose model has a weight on rank 0 only; returns the error."""
    case, coordinator = Case([[[2, 3]]], strategy), Coordinator()
    engines = make_engines(case, coordinator, module=Masked("" if distributed.rank() else "tensor", torch.float64))
    loop = Loop(engines, Stream(case), steps=3, coordinator=coordinator)
    with pytest.raises((TrainingStopped, distributed.RankAbortError)) as caught:
        loop.run()
    return str(caught.value), engines["model"].steps


class Stream:
    """Yields the same batch forever."""

    weight, num_samples_total = 1.0, 0

    def __init__(self, case):
        self.batch = case.batches()[0][0]

    def __next__(self):
        self.num_samples_total += len(self.batch["x"])
        return self.batch

    def position(self):
        return self.num_samples_total

    def seek(self, position):
        self.num_samples_total = position


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_a_weight_on_some_ranks_alone_ends_all_before_an_update(strategy):
    for message, steps in run_ranks(2, weigh_on_one_rank, strategy):
        assert "model: the forward returned a weight on some ranks and not on others" in message
        assert steps == 0


def test_recomputed_blocks_have_no_gradients_of_a_batch_without_terms():
    case = Case([[[3, 1], [0, 0]], [[0], [5]]])
    module = Masked()
    optimize(module, {"checkpointing": Checkpointing(1, ["layers.0", "layers.2"], [], None)})
    check(case, train(case, module=module))


def test_several_engines_are_each_weighted_by_their_own_terms():
    case = Case([[[3, 1], [2]], [[5], [4]]])
    one, other = make_engines(case), make_engines(case, feeder=lambda module, batch: module(**flipped(batch)))
    both = Engines(one=one["model"], other=other["model"])
    for parts in case.batches():
        for part in parts:
            both.micro_step(part)
        assert both.step() == {}
    values = both.take_metrics()
    expected = compute_directly(case)
    assert values["one/loss"] == pytest.approx(expected[1]["loss"], rel=1e-6)
    assert values["other/loss"] != pytest.approx(expected[1]["loss"], rel=1e-3)
    for name, value in expected[0].items():
        torch.testing.assert_close(both["one"].module.state_dict()[name], value, rtol=1e-6, atol=1e-6)


def flipped(batch):
    return {"x": batch["x"], "mask": batch["mask"].flip(1)}


def test_metrics_of_a_window_that_is_cut_are_those_of_the_whole():
    case = Case([[[3, 1], [2]], [[5], [4]], [[1], [1]]])

    def run(engines, steps):
        for parts in case.batches()[steps]:
            for part in parts:
                engines.micro_step(part)
            engines.step()
        return engines

    whole, cut, again = run(make_engines(case), slice(0, 3)), run(make_engines(case), slice(0, 1)), make_engines(case)
    again.load_state_dict(cut.state_dict())
    assert run(again, slice(1, 3)).take_metrics() == whole.take_metrics()
