from types import SimpleNamespace

import pytest
import torch
from torch import nn

from runner.engines import Engine, freeze
from runner.engines.schedulers import warmup
from runner.utils import io


class Squared(nn.Module):
    """Loss of a linear map, in the form asked for."""

    def __init__(self, form: str = "tensor") -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 1)
        self.form = form

    def forward(self, x, y):
        loss = ((self.linear(x) - y) ** 2).mean()
        if self.form == "mapping":
            return {"loss": loss, "error": loss.sqrt(), "tokens": x.numel(), "logits": x}
        if self.form == "object":
            return SimpleNamespace(loss=loss)
        if self.form == "attribute":
            self.linear.loss, self.loss = loss / 4, 3 * loss / 4
            return None
        return loss


def make_engine(form="tensor", lr=0.1, optimizer=torch.optim.SGD, **settings):
    module = Squared(form)
    return Engine(module, optimizer(module.parameters(), lr=lr), **settings)


def train(engine, batch):
    """A micro-step, and the step when it is the last of the accumulated ones."""
    engine.micro_step(batch)
    if engine.micro_steps % engine.accumulate == 0:
        assert engine.step() is None


def make_batches(count, size=8, scale=1.0):
    generator = torch.Generator().manual_seed(1)
    return [
        {"x": scale * torch.randn(size, 4, generator=generator), "y": torch.randn(size, 1, generator=generator)}
        for _ in range(count)
    ]


def assert_same_weights(one, other):
    for (name, a), b in zip(one.state_dict().items(), other.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


def train_by_hand(batches, lr=0.1, clip=None):
    module = Squared()
    optimizer = torch.optim.SGD(module.parameters(), lr=lr)
    for batch in batches:
        optimizer.zero_grad()
        module(**batch).backward()
        if clip:
            nn.utils.clip_grad_norm_(module.parameters(), clip)
        optimizer.step()
    return module


@pytest.mark.parametrize("form", ["tensor", "mapping", "object", "attribute"])
def test_every_form_of_loss_trains_like_a_bare_loop(form):
    engine, batches = make_engine(form), make_batches(5)
    for batch in batches:
        train(engine, batch)
    assert_same_weights(engine.module, train_by_hand(batches))


def test_a_tuple_is_passed_by_position_and_a_feeder_may_do_as_it_likes():
    batches = make_batches(3)
    engine = make_engine()
    fed = make_engine(feeder=lambda module, batch: module(batch["first"], batch["second"]))
    for batch in batches:
        train(engine, (batch["x"], batch["y"]))
        train(fed, {"first": batch["x"], "second": batch["y"]})
    assert_same_weights(engine.module, train_by_hand(batches))
    assert_same_weights(fed.module, engine.module)


def test_a_forward_without_a_loss_is_an_error_that_says_what_is_expected():
    engine = make_engine(feeder=lambda module, batch: batch["x"])
    with pytest.raises(TypeError, match=r"Tensor of shape \[8, 4\]: expected a scalar loss.*feeder"):
        train(engine, make_batches(1)[0])


def test_a_loss_left_on_a_module_counts_once():
    engine = make_engine("attribute")
    train(engine, make_batches(1)[0])
    assert engine.module.loss is None
    assert engine.module.linear.loss is None


def test_accumulation_steps_after_each_fourth_micro_step_and_equals_the_whole_batch():
    engine = make_engine(accumulate=4)
    parts = make_batches(8, size=2)
    steps = []
    for part in parts:
        train(engine, part)
        steps.append(engine.steps)
    assert steps == [0, 0, 0, 1, 1, 1, 1, 2]
    wholes = [{k: torch.cat([p[k] for p in parts[i : i + 4]]) for k in "xy"} for i in (0, 4)]
    for a, b in zip(engine.module.parameters(), train_by_hand(wholes).parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_clipping_equals_torch_and_zero_does_not_clip():
    batches = make_batches(4, scale=10.0)
    clipped, free = make_engine(clip_norm=0.5), make_engine(clip_norm=0.0)
    for batch in batches:
        train(clipped, batch)
        train(free, batch)
    assert_same_weights(clipped.module, train_by_hand(batches, clip=0.5))
    assert_same_weights(free.module, train_by_hand(batches))
    assert clipped.take_metrics()["grad_norm"] > 0.5
    assert "grad_norm" not in free.take_metrics()


def test_clipping_comes_after_unscaling():
    batches = make_batches(3, scale=10.0)
    plain, scaled = make_engine(clip_norm=0.5), make_engine(clip_norm=0.5, precision="fp16")
    scaled._dtype = None  # the scaler alone
    for batch in batches:
        train(plain, batch)
        train(scaled, batch)
    for a, b in zip(scaled.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(scaled.grad_norm, plain.grad_norm)


def test_a_step_that_the_scaler_skips_moves_neither_scheduler_nor_counter():
    module = Squared()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    engine = Engine(module, optimizer, warmup(optimizer, warmup_steps=10), precision="fp16")
    before = [p.clone() for p in module.parameters()]
    lr, scale = engine.take_metrics()["lr"], engine.take_metrics()["loss_scale"]
    train(engine, {"x": torch.full((2, 4), 1e30), "y": torch.zeros(2, 1)})
    assert (engine.steps, engine.skipped_steps, engine.micro_steps) == (0, 1, 1)
    assert engine.take_metrics()["lr"] == lr
    assert engine.take_metrics()["loss_scale"] == scale / 2
    assert all(torch.equal(a, b) for a, b in zip(before, module.parameters(), strict=True))


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_learns_and_keeps_weights_in_fp32(precision):
    engine = make_engine(precision=precision)
    batch = make_batches(1)[0]
    seen = []
    engine.module.linear.register_forward_hook(lambda module, args, output: seen.append(output.dtype))
    for _ in range(20):
        train(engine, batch)
    assert set(seen) == {torch.bfloat16 if precision == "bf16" else torch.float16}
    first = Squared()(**batch)
    assert engine.module(**batch) < first
    assert engine.module.linear.weight.dtype == torch.float32


def test_an_unknown_precision_is_an_error_that_lists_the_names():
    with pytest.raises(ValueError, match=r"fp8.*fp32, bf16, fp16"):
        make_engine(precision="fp8")


def test_freezing_matches_whole_names_and_leaves_those_parameters_alone():
    module = nn.ModuleDict({f"layer{n}": nn.Linear(2, 2) for n in (1, 10)})
    assert freeze(module, ["layer1.*"]) == ["layer1.weight", "layer1.bias"]
    assert all(p.requires_grad for p in module["layer10"].parameters())
    with pytest.raises(ValueError, match=r"'layer2.*' matches no parameter; there are: layer1.weight"):
        freeze(module, ["layer2.*"])


def test_metrics_are_the_means_since_the_last_call():
    engine, batches = make_engine("mapping", lr=0.0), make_batches(4)
    losses = [Squared()(**batch).item() for batch in batches]
    for batch in batches[:3]:
        train(engine, batch)
    values = engine.take_metrics()
    assert values["loss"] == pytest.approx(sum(losses[:3]) / 3)
    assert values["error"] == pytest.approx(sum(loss**0.5 for loss in losses[:3]) / 3)
    assert "logits" not in values
    assert engine.tokens == 3 * 32
    train(engine, batches[3])
    assert engine.take_metrics()["loss"] == losses[3]


def test_set_lr_scales_the_schedule_from_there_on():
    module = Squared()
    optimizer = torch.optim.SGD(
        [{"params": [module.linear.weight]}, {"params": [module.linear.bias], "lr": 0.2}], lr=0.4
    )
    engine = Engine(module, optimizer, warmup(optimizer, warmup_steps=4))
    batch = make_batches(1)[0]
    train(engine, batch)
    assert engine.take_metrics()["lr"] == pytest.approx(0.4 * 2 / 4)
    engine.set_lr(0.8)
    values = engine.take_metrics()
    assert (values["lr"], values["lr_1"]) == pytest.approx((0.8 * 2 / 4, 0.4 * 2 / 4))
    train(engine, batch)
    assert engine.take_metrics()["lr"] == pytest.approx(0.8 * 3 / 4)


def make_full_engine(lr=0.1, precision="fp32"):
    module = Squared("mapping")
    optimizer = torch.optim.AdamW(module.parameters(), lr=lr)
    return Engine(
        module, optimizer, warmup(optimizer, warmup_steps=6), precision=precision, accumulate=2, clip_norm=1.0
    )


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("cut", [1, 2, 5])
def test_a_restored_engine_goes_on_bit_for_bit_even_between_micro_steps(cut, precision, tmp_path):
    batches = make_batches(10)
    whole, first, second = (make_full_engine(precision=precision) for _ in range(3))
    for batch in batches[: 2 * cut]:
        train(whole, batch)
        train(first, batch)
    io.save(first.state_dict(), tmp_path / "engine.safetensors")
    second.load_state_dict(io.load(tmp_path / "engine.safetensors"))
    second.module.load_state_dict(first.module.state_dict())
    for batch in batches[2 * cut :]:
        train(whole, batch)
        train(second, batch)
    assert_same_weights(second.module, whole.module)
    assert second.take_metrics() == whole.take_metrics()
    assert (second.steps, second.micro_steps, second.tokens) == (whole.steps, whole.micro_steps, whole.tokens)


def test_a_learning_rate_changed_in_the_config_takes_effect_and_one_typed_live_is_kept():
    live = make_full_engine()
    live.set_lr(0.5)
    same, other = make_full_engine(lr=0.1), make_full_engine(lr=0.7)
    same.load_state_dict(live.state_dict())
    other.load_state_dict(live.state_dict())
    assert same.take_metrics()["lr"] == pytest.approx(0.5 / 6)
    assert other.take_metrics()["lr"] == pytest.approx(0.7 / 6)


def test_a_state_with_another_scheduler_is_refused():
    with pytest.raises(ValueError, match="scheduler: this engine has none, the saved state one"):
        make_engine().load_state_dict(make_full_engine().state_dict())


def test_an_optimizer_that_tells_training_from_evaluation_is_told():
    import schedulefree

    module = Squared()
    engine = Engine(module, schedulefree.AdamWScheduleFree(module.parameters(), lr=0.1))
    for batch in make_batches(5):
        train(engine, batch)
    training = module.linear.weight.detach().clone()
    with engine.evaluating():
        assert not module.training
        assert not torch.equal(module.linear.weight, training)
    torch.testing.assert_close(module.linear.weight.detach(), training)
