"""Schedules resumed with changed settings, against a run that was started with these settings."""

import copy
import math
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler as torchs

from runner.engines import Engine
from runner.engines.optim import schedulers
from runner.engines.optim.optimizers import ChainedOptimizer
from runner.engines.optim.schedule_replay import check_optimizer_step, check_scheduler_step, find_lr_decrease

SCHEDULES = {  # how each is made of an optimizer and settings, and two values of each setting
    "none": (lambda o: None, {}),
    "warmup": (schedulers.warmup, {"warmup_steps": (3, 7)}),
    "warmup_cosine": (schedulers.warmup_cosine, {"warmup_steps": (2, 3), "total_steps": (9, 20)}),
    "noam": (schedulers.noam, {"warmup_steps": (3, 5)}),
    "onecycle": (schedulers.onecycle, {"total_steps": (14, 20), "pct_start": (0.3, 0.5)}),
    "StepLR": (torchs.StepLR, {"step_size": (2, 3), "gamma": (0.5, 0.75)}),
    "MultiStepLR": (torchs.MultiStepLR, {"milestones": ([2, 5], [3, 3, 8]), "gamma": (0.5, 0.7)}),
    "ConstantLR": (torchs.ConstantLR, {"factor": (0.5, 0.3), "total_iters": (3, 6)}),
    "LinearLR": (torchs.LinearLR, {"start_factor": (1.0, 0.5), "end_factor": (0.1, 0.0), "total_iters": (6, 12)}),
    "ExponentialLR": (torchs.ExponentialLR, {"gamma": (0.9, 0.8)}),
    "PolynomialLR": (torchs.PolynomialLR, {"total_iters": (6, 12), "power": (1.0, 2.0)}),
    "CosineAnnealingLR": (torchs.CosineAnnealingLR, {"T_max": (6, 12), "eta_min": (0.0, 0.01)}),
    "CosineAnnealingWarmRestarts": (torchs.CosineAnnealingWarmRestarts, {"T_0": (2, 3), "T_mult": (2, 1)}),
    "OneCycleLR": (torchs.OneCycleLR, {"max_lr": (0.5, 0.7), "total_steps": (18, 24), "div_factor": (25.0, 10.0)}),
    "CyclicLR": (
        torchs.CyclicLR,
        {"base_lr": (0.01, 0.02), "max_lr": (0.1, 0.2), "step_size_up": (2, 3), "mode": ("triangular2", "triangular")},
    ),
    "MultiplicativeLR": (
        lambda o, factor: torchs.MultiplicativeLR(o, lambda step: factor),
        {"factor": (0.9, 0.8)},
    ),
    "SequentialLR": (
        lambda o, length, total: torchs.SequentialLR(
            o, [schedulers.warmup(o, warmup_steps=length), torchs.CosineAnnealingLR(o, total)], [length]
        ),
        {"length": (3, 5), "total": (6, 12)},
    ),
    "nested SequentialLR": (
        lambda o, gamma: torchs.SequentialLR(
            o,
            [
                torchs.SequentialLR(o, [torchs.ConstantLR(o), torchs.ExponentialLR(o, gamma)], [2]),
                torchs.LinearLR(o, 1.0, 0.1, 5),
            ],
            [5],
        ),
        {"gamma": (0.9, 0.8)},
    ),
    "ChainedScheduler": (
        lambda o, total, gamma: torchs.ChainedScheduler(
            [torchs.LinearLR(o, 0.1, 1.0, total), torchs.StepLR(o, 2, gamma)]
        ),
        {"total": (3, 6), "gamma": (0.9, 0.8)},
    ),
    "SWALR": (
        lambda o, swa_lr, length: torch.optim.swa_utils.SWALR(o, swa_lr, anneal_epochs=length),
        {"swa_lr": (0.05, 0.02), "length": (4, 8)},
    ),
}


class Pair(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(3))

    def forward(self):
        return self.one.square().sum() + self.other.square().sum()


def make(name, kind=torch.optim.SGD, lr=0.5, metric=None, **chosen):
    module = Pair()
    other = {"params": [module.other], "lr": 0.2 if name != "CyclicLR" else lr}
    extra = {"momentum": 0.9} if kind is torch.optim.SGD else {}
    optimizer = kind([{"params": [module.one]}, other], lr=lr, **extra)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of torch's own, where one SequentialLR holds another
        scheduler = SCHEDULES[name][0](optimizer, **chosen)
    return Engine(module, optimizer, scheduler, metric=metric)


def step(engine, count, events=None):
    """Runs steps; returns the scheduled values of each group before each step."""
    found = []
    for _ in range(count):
        for action in (events or {}).get(engine.steps, ()):
            action(engine)
        found.append([{k: v for k, v in g.items() if k != "params"} for g in engine.optimizer.param_groups])
        engine.micro_step({})
        engine.step()
    return found


@pytest.mark.parametrize("name", SCHEDULES)
@settings(max_examples=8, deadline=None)
@given(data=st.data())
def test_a_resume_with_other_settings_has_the_rates_of_a_run_started_so(name, data):
    values, kind = SCHEDULES[name][1], data.draw(st.sampled_from([torch.optim.SGD, torch.optim.AdamW]), "kind")
    before = {key: pair[0] for key, pair in values.items()}
    after = {key: data.draw(st.sampled_from(pair), key) for key, pair in values.items()}
    lr = data.draw(st.sampled_from([0.5, 0.25]), "lr")
    split, num_after = data.draw(st.integers(0, 11), "split"), 3
    saved, whole, resumed = make(name, kind, **before), make(name, kind, lr, **after), make(name, kind, lr, **after)
    step(saved, split)
    expected = step(whole, split + num_after)[split:]
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert step(resumed, num_after) == expected
    again = make(name, kind, lr, **after)  # an unchanged resume of a resumed run
    again.load_state_dict(copy.deepcopy(resumed.state_dict()))
    assert step(again, 2) == step(whole, 2)


@pytest.mark.parametrize("name", [name for name in SCHEDULES if name not in ("CyclicLR", "SWALR")])
@pytest.mark.parametrize("is_changed", [False, True])
def test_a_rate_set_live_is_kept_by_a_resume_with_another_schedule(name, is_changed):
    values = SCHEDULES[name][1]
    before = {key: pair[0] for key, pair in values.items()}
    after = {key: pair[is_changed and key not in ("max_lr", "div_factor")] for key, pair in values.items()}
    events = {3: [lambda engine: engine.set_lr(0.3)], 5: [lambda engine: engine.set_lr(0.7)]}
    saved, whole, resumed = make(name, **before), make(name, **after), make(name, **after)
    step(saved, 6, events)
    expected = step(whole, 9, events)[6:]
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert step(resumed, 3) == expected


def test_a_changed_rate_of_one_group_leaves_what_was_set_live_of_another():
    saved, resumed = make("StepLR", step_size=2), make("StepLR", step_size=2)
    step(saved, 1)
    saved.set_lr(1.0)
    for group in resumed.optimizer.param_groups[1:]:
        group["lr"] = group["initial_lr"] = 0.8
    resumed.scheduler.base_lrs[1] = 0.8
    changed = Engine(resumed.module, resumed.optimizer, resumed.scheduler)
    changed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert [group["lr"] for group in changed.optimizer.param_groups] == [1.0, 0.8]


def test_a_state_of_before_schedules_were_recorded_goes_on_with_its_live_rate():
    saved, longer = make("CosineAnnealingLR", T_max=6), make("CosineAnnealingLR", T_max=12)
    step(saved, 4)
    saved.set_lr(1.0)
    state = copy.deepcopy(saved.state_dict())
    del state["schedule"]
    longer.load_state_dict(state)
    assert longer.optimizer.param_groups[0]["lr"] == pytest.approx((1 + math.cos(math.pi * 4 / 12)) / 2)


def test_a_rate_that_is_a_tensor_stays_that_tensor():
    module = Pair()
    optimizer = torch.optim.AdamW(module.parameters(), lr=torch.tensor(0.5))
    engine = Engine(module, optimizer, torchs.StepLR(optimizer, 1, 0.5))
    rate = optimizer.param_groups[0]["lr"]
    step(engine, 1)
    engine.set_lr(0.25)
    assert optimizer.param_groups[0]["lr"] is rate
    assert rate == 0.125


def test_a_schedule_of_another_kind_begins_with_its_own_rate():
    saved, other = make("StepLR", step_size=1, gamma=0.1), make("CosineAnnealingLR", T_max=10)
    step(saved, 4)
    saved.set_lr(2.0)
    (note,) = other.load_state_dict(copy.deepcopy(saved.state_dict()), allows_changes=True)
    assert note == "scheduler: this engine has CosineAnnealingLR, the saved state StepLR: it begins anew"
    assert step(other, 3) == step(make("CosineAnnealingLR", T_max=10), 3)


def test_a_schedule_that_ends_before_the_steps_made_is_refused_by_name():
    saved, shorter = make("OneCycleLR", max_lr=0.5, total_steps=14), make("OneCycleLR", max_lr=0.5, total_steps=5)
    step(saved, 8)
    with pytest.raises(ValueError, match=r"OneCycleLR can't go on after step 8 with these settings: Tried to"):
        shorter.load_state_dict(saved.state_dict())


class Secretive(torchs.LRScheduler):
    """A scheduler whose rates depend on random numbers, which only its own state contains."""

    def __init__(self, optimizer, gamma=0.5):
        self.gamma, self.drawn = gamma, 1.0
        super().__init__(optimizer)

    def get_lr(self):
        return [base * self.drawn for base in self.base_lrs]

    def state_dict(self):
        return {"drawn": self.drawn, "last_epoch": self.last_epoch, "base_lrs": list(self.base_lrs)}

    def load_state_dict(self, state):
        vars(self).update(state)


def make_secretive(lr=0.5, **chosen):
    module = Pair()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    return Engine(module, optimizer, Secretive(optimizer, **chosen))


def test_a_schedule_with_a_state_of_its_own_keeps_it_and_refuses_other_settings_by_name():
    saved, same, faster = make_secretive(), make_secretive(), make_secretive(lr=1.0)
    saved.scheduler.drawn = 0.3
    step(saved, 2)
    same.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert step(same, 1)[0][0]["lr"] == 0.5 * 0.3
    faster.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert step(faster, 1)[0][0]["lr"] == 1.0 * 0.3
    with pytest.raises(ValueError, match=r"Secretive keeps a state of its own.*: gamma 0.5 -> 0.9; leave"):
        make_secretive(gamma=0.9).load_state_dict(saved.state_dict())


def make_plateau(lr=0.5, metric="eval/loss", **chosen):
    module = Pair()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    scheduler = torchs.ReduceLROnPlateau(optimizer, **{"patience": 1, "factor": 0.5, **chosen})
    return Engine(module, optimizer, scheduler, metric=metric)


VALUES = [5.0, 4.0, 4.5, 4.5, float("nan"), 4.5, 6.0, 3.0, 3.5, 3.5, 3.5, 3.5]


def observe(engine, values):
    """Steps the scheduler before each value; returns the rates after it."""
    found = []
    for value in values:
        step(engine, 1)
        for _ in range(2):  # the second evaluation at a step doesn't count
            engine.schedule.observe({"eval/loss": value, "eval/other": 0.0})
        found.append(engine.optimizer.param_groups[0]["lr"])
    return found


def plateau_by_hand(values, lr=0.5, **chosen):
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=lr)
    scheduler = torchs.ReduceLROnPlateau(optimizer, **{"patience": 1, "factor": 0.5, **chosen})
    found = []
    for value in values:
        scheduler.step(value)
        found.append(optimizer.param_groups[0]["lr"])
    return found


@pytest.mark.parametrize("after", [{}, {"patience": 2}, {"mode": "max"}, {"lr": 0.2}, {"factor": 0.9, "cooldown": 1}])
@pytest.mark.parametrize("cut", [0, 3, 7])
def test_a_plateau_follows_its_metric_and_a_resume_repeats_the_metrics_before(cut, after):
    saved, resumed = make_plateau(), make_plateau(**after)
    assert observe(saved, VALUES[:cut]) == plateau_by_hand(VALUES)[:cut]
    resumed.load_state_dict(copy.deepcopy(saved.state_dict()))
    assert observe(resumed, VALUES[cut:]) == plateau_by_hand(VALUES, **after)[cut:]


def test_a_metric_that_no_evaluation_has_is_named_with_those_that_there_are():
    with pytest.raises(ValueError, match=r"scheduler.metric=eval/acc: expected one of eval/loss, eval/other"):
        make_plateau(metric="eval/acc").schedule.observe({"eval/loss": 1.0, "eval/other": 0.0})


class Greedy(torchs.StepLR):
    def step(self, one, other):
        pass


def test_a_step_that_needs_an_argument_is_found_before_the_first():
    module = Pair()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    lbfgs, plateau = torch.optim.LBFGS(module.parameters()), torchs.ReduceLROnPlateau(optimizer)
    for each in (optimizer, ChainedOptimizer([optimizer])):
        check_optimizer_step(each)
    for each in (lbfgs, ChainedOptimizer([optimizer, torch.optim.LBFGS(Pair().parameters())])):
        with pytest.raises(ValueError, match=r"LBFGS.step needs closure.*choose another optimizer"):
            check_optimizer_step(each)
    check_scheduler_step(None, None)
    check_scheduler_step(torchs.StepLR(optimizer, 1), None)
    check_scheduler_step(plateau, "eval/loss")
    with pytest.raises(ValueError, match=r"ReduceLROnPlateau.step needs metrics: .*\+scheduler.metric=eval/loss"):
        check_scheduler_step(plateau, None)
    for each in (None, torchs.StepLR(optimizer, 1)):
        with pytest.raises(ValueError, match=r"found metric=eval/loss, which .* doesn't take; leave it out"):
            check_scheduler_step(each, "eval/loss")
    chained = torchs.ChainedScheduler([torchs.StepLR(optimizer, 1)])
    chained._schedulers.append(Greedy.__new__(Greedy))
    for metric in (None, "eval/loss"):
        with pytest.raises(ValueError, match=r"Greedy.step needs one, other"):
            check_scheduler_step(chained, metric)


class OwnLBFGS(torch.optim.LBFGS):
    def step(self, closure=None):
        return super().step(closure)


def test_an_optimizer_that_needs_a_closure_is_found_whatever_its_subclass_says():
    with pytest.raises(ValueError, match=r"OwnLBFGS.step needs closure.*choose another optimizer"):
        check_optimizer_step(OwnLBFGS(Pair().parameters()))


class Triangle(torchs.LRScheduler):
    def get_lr(self):
        factor = 1 - abs(self.last_epoch - 70) / 70
        return [base * factor for base in self.base_lrs]


def rise_then_fall(optimizer):
    parts = [torchs.LinearLR(optimizer, total_iters=50), torchs.ExponentialLR(optimizer, gamma=0.9)]
    return torchs.SequentialLR(optimizer, parts, milestones=[50])


FALLS = {  # the first step of 100 whose rate is lower than one before
    "none": (lambda optimizer: None, None),
    "constant": (schedulers.constant, None),
    "warmup": (lambda o: schedulers.warmup(o, warmup_steps=20), None),
    "a peak at the end": (lambda o: schedulers.warmup_cosine(o, warmup_steps=100, total_steps=200), None),
    "LinearLR that rises": (torchs.LinearLR, None),
    "LinearLR that falls": (lambda o: torchs.LinearLR(o, 1.0, 0.5), 1),
    "ConstantLR": (lambda o: torchs.ConstantLR(o, factor=1.0), None),
    "ConstantLR that rises": (lambda o: torchs.ConstantLR(o, factor=0.3, total_iters=30), None),
    "ExponentialLR": (lambda o: torchs.ExponentialLR(o, gamma=0.9), 1),
    "ExponentialLR of factor 1": (lambda o: torchs.ExponentialLR(o, gamma=1.0), None),
    "StepLR": (lambda o: torchs.StepLR(o, 99), 99),
    "StepLR after the end": (lambda o: torchs.StepLR(o, 100), None),
    "MultiplicativeLR": (lambda o: torchs.MultiplicativeLR(o, lambda step: 1.01), None),
    "SequentialLR": (rise_then_fall, 51),
    "ChainedScheduler": (lambda o: torchs.ChainedScheduler([torchs.LinearLR(o), torchs.StepLR(o, 40)]), 40),
    "OneCycleLR": (lambda o: torchs.OneCycleLR(o, max_lr=0.5, total_steps=101), 31),
    "CyclicLR": (lambda o: torchs.CyclicLR(o, 0.01, 0.1, step_size_up=60), 61),
    "a plateau": (torchs.ReduceLROnPlateau, 12),
    "an own one": (Triangle, 71),
}


@pytest.mark.parametrize("name", FALLS)
def test_falling_rates_are_known_before_the_run(name):
    make, fall = FALLS[name]
    modules = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": [*module.parameters()]} for module in modules]
    optimizer = torch.optim.SGD(groups, lr=0.1, momentum=0.9)
    scheduler = make(optimizer)
    before = copy.deepcopy((optimizer.state_dict(), None if scheduler is None else scheduler.state_dict()))
    assert find_lr_decrease(scheduler, 100) == fall
    assert (optimizer.state_dict(), None if scheduler is None else scheduler.state_dict()) == before


def test_a_schedule_of_functions_is_looked_at_over_a_run_of_any_length():
    optimizer = torch.optim.SGD([nn.Parameter(torch.ones(1))], lr=0.1)
    assert find_lr_decrease(schedulers.noam(optimizer, warmup_steps=9 * 10**8), 10**9) > 9 * 10**8
