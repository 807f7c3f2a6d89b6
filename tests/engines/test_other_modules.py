import copy

import pytest
import torch
from torch import nn

from runner.engines import Engine, Engines
from runner.engines.ema import EMA
from runner.engines.other_modules import OtherModuleError, takes_engines
from runner.utils.train.failures import TrainingStopped
from runner.utils.utils import derive_seed


class Generator(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(2, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))

    def forward(self, x):
        return self.net(x)


class Critic(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Dropout(0.5), nn.Linear(5, 1))

    def forward(self, x):
        return self.net(x)


def feed_generator(module, batch, engines):
    return -engines["critic"](module(batch)).mean()


def feed_critic(module, batch, *, engines):
    with torch.no_grad():
        fake = engines["generator"](batch)
    return module(fake).mean() - module(fake.flip(1)).mean()


def make_gan(alternates=False, every=1, accumulate=1):
    torch.manual_seed(0)
    critic, generator = Critic(), Generator()
    engines = Engines(
        critic=Engine(
            critic, torch.optim.Adam(critic.parameters(), lr=0.01), feeder=feed_critic, accumulate=accumulate
        ),
        generator=Engine(
            generator,
            torch.optim.Adam(generator.parameters(), lr=0.01),
            feeder=feed_generator,
            accumulate=accumulate,
        ),
    )
    engines.alternates = alternates
    engines["generator"].every = every
    return engines


def train(engines, steps, accumulate=1, size=8):
    generator = torch.Generator().manual_seed(3)
    batches = iter(torch.randn(size, 2, generator=generator) for _ in range(steps * accumulate))
    for step in range(steps):
        engines.begin_step(step)
        for micro_step in range(accumulate):
            engines.seed(100 * step + micro_step, (step, micro_step))
            engines.micro_step(next(batches))
        assert engines.step() == {}


@pytest.mark.parametrize("is_taken", [True, False])
def test_a_feeder_takes_engines_by_name_or_as_the_third_required_argument(is_taken):
    class Called:
        def __call__(self, module, batch, engines=None): ...

    def third(module, batch, others): ...
    def scaled(module, batch, scale=2.0): ...
    def open_ended(module, *batch): ...

    taking = [Called(), third, feed_generator, feed_critic]
    others = [scaled, open_ended, print, lambda module, batch: module(batch)]
    assert all(takes_engines(feeder) is is_taken for feeder in (taking if is_taken else others))


def test_a_call_of_another_module_leaves_its_gradients_and_statistics_alone():
    engines = make_gan()
    critic, generator = (engines[name].module for name in ("critic", "generator"))
    before = copy.deepcopy(critic.state_dict())
    batch = torch.randn(8, 2)
    with engines["generator"].other_modules:
        torch.manual_seed(1)
        engines["generator"].micro_step(batch)
    assert all(parameter.grad is None and parameter.requires_grad for parameter in critic.parameters())
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())

    # The gradients of the module itself are those through the critic's function, in training mode.
    expected_generator, expected_critic = copy.deepcopy(generator), copy.deepcopy(critic)
    expected_generator.zero_grad()
    torch.manual_seed(1)
    (-expected_critic(expected_generator(batch)).mean()).backward()
    for parameter, expected in zip(generator.parameters(), expected_generator.parameters(), strict=True):
        assert torch.equal(parameter.grad, expected.grad)


def test_a_failed_forward_returns_the_other_module_as_it_was():
    engines = make_gan()
    critic = engines["critic"].module
    before = copy.deepcopy(critic.state_dict())
    critic.net.register_forward_hook(lambda *args: fail())

    def fail():
        raise RuntimeError("out of luck")

    with pytest.raises(RuntimeError, match="out of luck"), engines["generator"].other_modules:
        engines["generator"].micro_step(torch.randn(8, 2))
    assert all(parameter.requires_grad for parameter in critic.parameters())
    assert all(torch.equal(value, before[name]) for name, value in critic.state_dict().items())


def train_by_hand(steps, alternates, every):
    """Returns critic and generator of the GAN above, trained by a plain loop."""
    engines = make_gan()
    critic, generator = (engines[name].module for name in ("critic", "generator"))
    optimizers = {name: engines[name].optimizer for name in engines}
    rng = torch.Generator().manual_seed(3)
    for step in range(steps):
        batch = torch.randn(8, 2, generator=rng)
        is_due = (step + 1) % every == 0
        engines.seed(100 * step, (step, 0))
        generator_before = copy.deepcopy(generator)
        with torch.no_grad():
            fake = generator_before(batch)
        (critic(fake).mean() - critic(fake.flip(1)).mean()).backward()
        if alternates:
            optimizers["critic"].step()
            optimizers["critic"].zero_grad()
            if is_due:
                engines.seed(derive_seed(100 * step, 1), (step, 0, 1))
        if is_due:
            frozen = copy.deepcopy(critic).requires_grad_(False)
            (-frozen(generator(batch)).mean()).backward()
            optimizers["generator"].step()
            optimizers["generator"].zero_grad()
        if not alternates:
            optimizers["critic"].step()
            optimizers["critic"].zero_grad()
    return critic, generator


@pytest.mark.parametrize("alternates", [False, True])
@pytest.mark.parametrize("every", [1, 3])
def test_training_equals_a_plain_loop(alternates, every):
    engines = make_gan(alternates, every)
    train(engines, 7)
    expected = train_by_hand(7, alternates, every)
    for engine, module in zip(engines.values(), expected, strict=True):
        for name, value in module.state_dict().items():
            assert torch.equal(engine.module.state_dict()[name], value), name
    assert [engine.steps for engine in engines.values()] == [7, 7 // every]


def test_alternating_engines_accumulate_all_micro_steps_before_the_next_one_begins():
    updates = []
    engines = make_gan(alternates=True, accumulate=2)
    for name, engine in engines.items():
        engine.module.register_forward_pre_hook(lambda module, args, name=name: updates.append(name))
        engine.optimizer.register_step_pre_hook(lambda *args, name=name: updates.append(f"{name} updated"))
    train(engines, 1, accumulate=2)
    forward = ["generator", "critic", "critic"]
    back = ["generator", "critic"]
    assert updates == [*forward, *forward, "critic updated", *back, *back, "generator updated"]


def test_a_fault_before_the_first_update_is_discarded_and_a_later_one_ends_the_run():
    engines = make_gan(alternates=True)
    for engine in engines.values():
        engine.on_nonfinite = "stop"
        engine._checks_in_prepare = True
    before = copy.deepcopy({name: engine.module.state_dict() for name, engine in engines.items()})
    engines.begin_step(0)
    engines.micro_step(torch.full((8, 2), torch.nan))
    assert list(engines.step()) == ["critic"]
    assert not engines.is_updating
    engines.discard()
    for name, engine in engines.items():
        assert all(torch.equal(value, before[name][key]) for key, value in engine.module.state_dict().items())

    engines.micro_step(torch.randn(8, 2))
    engines["generator"].module.net[2].bias.data.fill_(torch.nan)
    with pytest.raises(TrainingStopped, match="generator: its loss is nan"):
        engines.step()
    assert engines.is_updating


class Teaching(nn.Module):
    """A feeder that is a module."""

    def forward(self, module, batch, engines):
        target = engines["teacher"](batch)
        return (module(batch) - target).square().mean()


def test_a_teacher_runs_no_forward_of_its_own_and_stays_in_evaluation_mode():
    torch.manual_seed(0)
    student, teacher = nn.Linear(3, 1), Critic()
    calls = []
    teacher.register_forward_pre_hook(lambda module, args: calls.append(module.training))
    before = copy.deepcopy(teacher.state_dict())
    engines = Engines(
        teacher=Engine(teacher),
        student=Engine(student, torch.optim.SGD(student.parameters(), lr=0.1), feeder=Teaching()),
    )
    engines["teacher"].has_own_loss = False
    engines.micro_step(torch.randn(4, 3))
    assert engines.step() == {}
    numbers = engines.evaluate([(0, torch.randn(4, 3), 4)])
    assert calls == [False, False]
    assert list(numbers) == ["student/loss"]
    assert all(torch.equal(value, before[name]) for name, value in teacher.state_dict().items())
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_an_unknown_engine_is_named_with_the_nearest_one():
    engines = make_gan()
    others = engines["generator"].other_modules
    with pytest.raises(OtherModuleError, match=r"feeder of generator asks for engine 'critik': did you mean critic\?"):
        others["critik"]
    assert others.get("critik") is None
    assert "critic" in others
    assert list(others) == ["critic", "generator"]


def test_in_an_evaluation_modules_are_in_evaluation_mode_with_averaged_weights():
    engines = make_gan()
    critic = engines["critic"]
    critic.ema = EMA(critic.module, decay=0.5)
    train(engines, 3)
    averages = copy.deepcopy(engines.export_states()["critic"])
    batch = torch.randn(8, 2)
    numbers = engines.evaluate([(0, batch, 8)])
    generator, averaged = copy.deepcopy(engines["generator"].module).eval(), Critic().eval()
    averaged.load_state_dict(averages)
    with torch.no_grad():
        assert numbers["generator/loss"] == (-averaged(generator(batch)).mean()).item()
