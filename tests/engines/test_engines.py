import copy

import pytest
import torch
from torch import nn

from runner.engines import Engine, Engines


class Regressor(nn.Module):
    def __init__(self, seed):
        super().__init__()
        torch.manual_seed(seed)
        self.linear = nn.Linear(3, 1)
        self.drop = nn.Dropout(0.5)

    def forward(self, x):
        loss = (self.linear(self.drop(x)) ** 2).mean()
        return {"loss": loss, "double": 2 * loss, "tokens": x.numel()}


def make_engines(**settings):
    engines = Engines()
    for seed, (name, kind) in enumerate({"ar-a": torch.optim.SGD, "ar-b": torch.optim.AdamW}.items()):
        module = Regressor(seed)
        engines[name] = Engine(module, kind(module.parameters(), lr=0.1), **settings)
    return engines


def train(engines, batch):
    engines.micro_step(batch)
    assert engines.step() == {}


def make_batches(count, size=4):
    generator = torch.Generator().manual_seed(3)
    return [{"x": torch.randn(size, 3, generator=generator)} for _ in range(count)]


def test_two_engines_see_the_same_batch_and_each_steps_once():
    engines = make_engines()
    seen = {name: [] for name in engines}
    for name, engine in engines.items():
        engine.module.register_forward_pre_hook(
            lambda module, args, kwargs, n=name: seen[n].append(kwargs["x"]), with_kwargs=True
        )
    batches = make_batches(3)
    for batch in batches:
        train(engines, batch)
    assert [e.steps for e in engines.values()] == [3, 3]
    assert all(torch.equal(a, b) for a, b in zip(seen["ar-a"], seen["ar-b"], strict=True))
    assert engines.tokens == 3 * 12


def test_metrics_of_two_engines_do_not_collide():
    engines = make_engines()
    train(engines, make_batches(1)[0])
    values = engines.take_metrics()
    assert {"ar-a/loss", "ar-b/loss", "ar-a/lr", "ar-b/lr", "ar-a/double"} <= values.keys()
    assert values["ar-a/loss"] != values["ar-b/loss"]


def test_one_engine_has_metrics_without_a_prefix():
    engines = Engines(model=make_engines()["ar-a"])
    train(engines, make_batches(1)[0])
    assert {"loss", "double", "lr"} <= engines.take_metrics().keys()


def test_evaluation_weights_batches_by_samples_and_leaves_training_as_it_was():
    engines = Engines(model=make_engines()["ar-a"])
    whole = torch.randn(10, 3)
    train(engines, {"x": whole})
    tokens, weights = engines.tokens, engines["model"].module.linear.weight.detach().clone()
    values = engines.evaluate([(number, {"x": part}, len(part)) for number, part in enumerate(whole.split(4))])
    module = engines["model"].module
    assert module.training
    assert engines.tokens == tokens
    assert torch.equal(weights, module.linear.weight)
    module.eval()
    expected = module(whole)["loss"].item()
    assert values["loss"] == pytest.approx(expected)
    assert values["double"] == pytest.approx(2 * expected)


def test_evaluating_on_nothing_returns_nothing_and_a_cut_ends_it():
    assert make_engines().evaluate([]) == {}
    engines = make_engines()
    with pytest.raises(InterruptedError):
        engines.evaluate([(number, batch, 4) for number, batch in enumerate(make_batches(2))], lambda: True)
    assert all(engine.module.training for engine in engines.values())


def test_state_round_trips_under_the_users_names():
    engines, others = make_engines(), make_engines()
    for batch in make_batches(3):
        train(engines, batch)
    state = engines.state_dict()
    assert list(state) == ["ar-a", "ar-a.optimizer", "ar-b", "ar-b.optimizer"]
    assert list(state["ar-a"]) == ["linear.weight", "linear.bias"]
    others.load_state_dict(copy.deepcopy(state))
    for batch in make_batches(2):
        for each in (engines, others):
            torch.manual_seed(0)
            train(each, batch)
    for name in engines:
        assert torch.equal(engines[name].module.linear.weight, others[name].module.linear.weight)


def test_state_of_other_engines_or_shapes_is_refused():
    engines = make_engines()
    state = engines.state_dict()
    with pytest.raises(ValueError, match=r"here \['ar-a'\], in the saved state \['ar-a', 'ar-b'\]"):
        Engines({"ar-a": engines["ar-a"]}).load_state_dict(state)
    state["ar-a"] = {"linear.weight": torch.zeros(1, 7), "linear.bias": torch.zeros(1)}
    with pytest.raises(ValueError, match="engine ar-a: its saved weights do not fit"):
        engines.load_state_dict(state)


def test_of_two_engines_one_stops_both_before_any_update_and_one_skips_alone():
    for mode, updated in (("stop", [0, 0]), ("skip", [1, 0])):
        engines = make_engines(on_nonfinite=mode)
        with torch.no_grad():
            engines["ar-b"].module.linear.weight.fill_(float("nan"))
        before = engines["ar-a"].module.linear.weight.detach().clone()
        engines.micro_step(make_batches(1)[0])
        faults = engines.step()
        assert list(faults) == ["ar-b"]
        assert engines.is_stopped_by(faults) == (mode == "stop")
        assert [engine.steps for engine in engines.values()] == updated
        assert torch.equal(engines["ar-a"].module.linear.weight, before) == (mode == "stop")
        assert not engines.is_updating


def test_exported_ties_stay_ties():
    module = nn.ModuleDict({"one": nn.Linear(2, 2), "other": nn.Linear(2, 2)})
    module["other"].weight = module["one"].weight
    exported = Engines(model=Engine(module)).export_states()["model"]
    assert exported["one.weight"].data_ptr() == exported["other.weight"].data_ptr()
    assert exported["one.weight"].data_ptr() != module["one"].weight.data_ptr()


def test_exported_weights_are_copies():
    engines = make_engines()
    states = engines.export_states()
    states["ar-a"]["linear.weight"].zero_()
    assert engines["ar-a"].module.linear.weight.abs().sum() > 0
