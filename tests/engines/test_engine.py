import re
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from runner.engines import Engine
from runner.engines.forward import EarlyOutputError, OutputError
from runner.engines.gradients import DeferredFiniteCheck
from runner.engines.optim.schedulers import warmup, warmup_cosine
from runner.utils import io


class Squared(nn.Module):
    """Returns the loss of a linear layer in one of several forms."""

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
    """Runs a micro-step, and ends the step after the last of the accumulated ones."""
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
    with pytest.raises(ValueError, match=r"Tensor of shape \[8, 4\]: expected a scalar loss.*feeder"):
        train(engine, make_batches(1)[0])


@pytest.mark.parametrize(
    ("returned", "expected"),
    [
        (lambda loss: {"loss": float(loss.detach())}, "its loss is a float: expected a tensor with one number"),
        (lambda loss: {"loss": None}, "its loss is a NoneType"),
        (
            lambda loss: (loss, loss),
            r"returned tuple of \(Tensor of shape \[\], Tensor of shape \[\]\): expected a scalar loss",
        ),
        (lambda loss: None, "returned NoneType: expected a scalar loss"),
        (lambda loss: loss.detach(), "returned a loss without gradients; compute it from parameters that are trained"),
        (lambda loss: {"loss": loss.detach().long()}, "returned a loss without gradients"),
    ],
)
def test_a_wrong_return_value_of_the_first_forward_is_a_mistake_and_of_a_later_one_ends_the_run(returned, expected):
    is_wrong = False
    batch = make_batches(1)[0]

    def feed(module, batch):
        loss = module(**batch)
        return returned(loss["loss"] if isinstance(loss, dict) else loss) if is_wrong else loss

    engine = make_engine(feeder=feed)
    train(engine, batch)
    is_wrong = True
    with pytest.raises(OutputError, match=expected) as later:
        train(engine, batch)
    with pytest.raises(EarlyOutputError, match=expected) as first:
        train(make_engine(feeder=feed), batch)
    assert (later.value.is_complete, first.value.is_complete) == (True, False)
    assert not isinstance(later.value, EarlyOutputError)


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
    scaled._train_forward = scaled._loss_module.forward  # the scaler alone, without autocast
    for batch in batches:
        train(plain, batch)
        train(scaled, batch)
    for a, b in zip(scaled.module.parameters(), plain.module.parameters(), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(scaled.state_dict()["grad_norm"], plain.state_dict()["grad_norm"])


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
    assert engine.take_metrics()["lr"] == pytest.approx(0.4 / 4)  # the rate of the update that was made
    engine.set_lr(0.8)
    train(engine, batch)
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
    for engine, lr in ((same, 0.5), (other, 0.7)):
        engine.micro_step(make_batches(1)[0])
        engine.step()
        assert engine.take_metrics()["lr"] == pytest.approx(lr / 6)


def test_a_state_with_another_optimizer_or_schedule_is_refused_or_begins_anew():
    with pytest.raises(ValueError, match="optimizer: this engine has SGD, the saved state AdamW"):
        make_engine().load_state_dict(make_full_engine().state_dict())
    saved, other = make_full_engine(), make_engine(precision="fp16")
    for batch in make_batches(4):
        train(saved, batch)
    assert other.load_state_dict(saved.state_dict(), allows_changes=True) == [
        "optimizer: this engine has SGD, the saved state AdamW: it begins anew",
        "scheduler: this engine has none, the saved state LambdaLR: it begins anew",
        "scaler: this engine has one, the saved state none: it begins anew",
    ]
    assert other.steps == 2
    train(other, make_batches(1)[0])


def test_schedules_made_of_others_take_a_longer_run(tmp_path):
    def make(total_steps):
        module = Squared()
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        parts = [
            torch.optim.lr_scheduler.LinearLR(optimizer, total_iters=2),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, total_steps),
        ]
        return Engine(module, optimizer, torch.optim.lr_scheduler.SequentialLR(optimizer, parts, [2]))

    saved, longer, whole = make(6), make(12), make(12)
    for batch in make_batches(4):
        train(saved, batch)
        train(whole, batch)
    longer.load_state_dict(saved.state_dict())
    for batch in make_batches(4):
        train(longer, batch)
        train(whole, batch)
    assert longer.scheduler._schedulers[1].T_max == 12
    assert longer.optimizer.param_groups[0]["lr"] > 0


class Drifting(nn.Module):
    """A module that writes to its buffers in every possible way."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("average", torch.zeros(2))
        self.register_buffer("none_yet", None)
        self.register_buffer("grows", torch.zeros(1))

    def forward(self, x):
        self.average.data.mul_(0.9).add_(x.mean(0))
        self.none_yet = x.clone()
        self.grows = torch.zeros(len(self.grows) + 1)
        return (self.weight * x).sum()


def test_buffers_are_taken_back_however_they_were_written_to():
    module = Drifting()
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=0.1))
    engine.micro_step({"x": torch.ones(3, 2)})
    engine.step()
    before = {name: None if b is None else b.clone() for name, b in module._buffers.items()}
    engine.micro_step({"x": torch.full((3, 2), 5.0)})
    engine.discard()
    for name, buffer in module._buffers.items():
        assert torch.equal(buffer, before[name]), name


def test_a_scaler_that_has_come_down_to_one_hides_no_gradient_that_is_not_finite():
    module = ReachesTheEdge()
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=1.0), on_nonfinite="stop", precision="fp16")
    fault, num_skipped = None, 0
    while fault is None and num_skipped < 40:
        engine.micro_step({"x": torch.ones(2)})
        fault = engine.step()
        num_skipped += fault is None
    assert fault.startswith("its gradients are not finite")
    assert num_skipped == 16  # from a scale of 65536 on


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


@pytest.mark.parametrize("name", ["lr", "grad_norm"])
def test_a_forward_may_not_take_a_name_of_the_engines_own(name):
    engine = make_engine(feeder=lambda module, batch: {"loss": module(**batch), name: torch.ones(())}, clip_norm=1.0)
    with pytest.raises(ValueError, match=f"number named '{name}'"):
        engine.micro_step(make_batches(1)[0])


def test_an_engine_without_an_optimizer_is_run_and_not_trained():
    engine = Engine(Squared("mapping"))
    before = engine.module.linear.weight.detach().clone()
    train(engine, make_batches(1)[0])
    assert torch.equal(engine.module.linear.weight, before)
    assert engine.module.linear.weight.grad is None
    assert engine.take_metrics().keys() == {"loss", "error"}


def test_settings_changed_in_the_config_take_effect_on_resume_and_others_stay():
    def make(lr=0.1, weight_decay=0.1, total_steps=6):
        module = Squared()
        optimizer = torch.optim.AdamW(module.parameters(), lr=lr, weight_decay=weight_decay)
        schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=lr, total_steps=total_steps)
        return Engine(module, optimizer, schedule)

    saved = make()
    for batch in make_batches(4):
        train(saved, batch)
    saved.optimizer.param_groups[0]["eps"] = 1e-3  # changed by hand, not by the config
    other = make(weight_decay=0.5, total_steps=12)
    other.load_state_dict(saved.state_dict())
    group = other.optimizer.param_groups[0]
    assert (group["weight_decay"], group["eps"]) == (0.5, 1e-3)
    for batch in make_batches(8):
        train(other, batch)
    assert other.steps == 12


def test_a_longer_schedule_takes_effect_with_the_next_step():
    def make(total_steps):
        module = Squared()
        optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
        return Engine(module, optimizer, warmup_cosine(optimizer, warmup_steps=0, total_steps=total_steps))

    saved, same, longer, whole = make(4), make(4), make(400), make(400)
    for batch in make_batches(4):
        train(saved, batch)
        train(whole, batch)
    for engine in (same, longer):
        engine.load_state_dict(saved.state_dict())
    assert same.optimizer.param_groups[0]["lr"] == saved.optimizer.param_groups[0]["lr"]
    assert longer.optimizer.param_groups[0]["lr"] == whole.optimizer.param_groups[0]["lr"]


@pytest.mark.parametrize("make_schedule", [
    lambda o: torch.optim.lr_scheduler.SequentialLR(
        o, [torch.optim.lr_scheduler.ConstantLR(o), torch.optim.lr_scheduler.ExponentialLR(o, 0.9)], [2]),
    lambda o: torch.optim.lr_scheduler.CosineAnnealingLR(o, 10),
    lambda o: torch.optim.lr_scheduler.ReduceLROnPlateau(o),
])  # fmt: skip
def test_a_rate_can_be_typed_under_any_schedule(make_schedule):
    module = Squared()
    optimizer = torch.optim.SGD(module.parameters(), lr=1.0)
    engine = Engine(module, optimizer, make_schedule(optimizer))
    before = optimizer.param_groups[0]["lr"]
    engine.set_lr(0.5)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(before / 2)


class WithStatistics(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.norm, self.linear = nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, x, y):
        self.seen = self.seen + 1  # rebound, not written to
        loss = ((self.linear(self.norm(x)) - y) ** 2).mean()
        return {"loss": loss, "tokens": len(x)}


def make_statistical(**settings):
    module = WithStatistics()
    return Engine(module, torch.optim.AdamW(module.parameters(), lr=0.1), accumulate=2, clip_norm=1.0, **settings)


@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("num_micro_steps", [1, 2])
@pytest.mark.parametrize("is_prepared", [False, True])
def test_a_discarded_step_leaves_nothing_behind(precision, num_micro_steps, is_prepared):
    whole, cut = make_statistical(precision=precision), make_statistical(precision=precision)
    batches = make_batches(6)
    for batch in batches[:2]:
        train(whole, batch)
        train(cut, batch)
    for batch in batches[4 : 4 + num_micro_steps]:
        cut.micro_step(batch)
    if is_prepared:
        cut.prepare()
    cut.discard()
    assert_same_weights(cut.module, whole.module)  # buffers too
    for batch in batches[2:4]:
        train(whole, batch)
        train(cut, batch)
    assert_same_weights(cut.module, whole.module)
    assert (cut.steps, cut.micro_steps, cut.tokens) == (whole.steps, whole.micro_steps, whole.tokens)
    assert cut.take_metrics() == whole.take_metrics()


def poisoned(kind):
    x = torch.ones(8, 4)
    x[0, 0] = {"nan": float("nan"), "inf": float("inf")}[kind]
    return {"x": x, "y": torch.zeros(8, 1)}


@pytest.mark.parametrize("mode", ["stop", "skip"])
@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
@pytest.mark.parametrize("kind", ["nan", "inf"])
def test_a_loss_that_is_not_finite_is_found_before_the_update_with_the_gradients_named(mode, clip_norm, kind):
    engine = make_engine(on_nonfinite=mode, clip_norm=clip_norm)
    engine.micro_step(poisoned(kind))
    assert re.fullmatch(
        r"its loss is (nan|inf); largest gradients: linear.weight \(\d of 4 not finite\), linear.bias .*", engine.step()
    )
    assert engine.steps == 0


class ReachesTheEdge(nn.Module):
    """A module with a finite loss whose gradient is not finite."""

    def __init__(self):
        super().__init__()
        self.weight, self.fine = nn.Parameter(torch.zeros(3)), nn.Parameter(torch.ones(2))

    def forward(self, x):
        return self.weight.sqrt().sum() + self.fine.sum() * x.sum()


@pytest.mark.parametrize("clip_norm", [0.0, 1.0])
def test_gradients_that_are_not_finite_are_found_though_the_loss_is(clip_norm):
    module = ReachesTheEdge()
    engine = Engine(module, torch.optim.SGD(module.parameters(), lr=1.0), on_nonfinite="skip", clip_norm=clip_norm)
    engine.micro_step({"x": torch.ones(2)})
    fault = engine.step()
    assert fault == "its gradients are not finite; largest: weight (3 of 3 not finite), fine (up to 2)"
    engine.skip()
    assert (engine.steps, engine.skipped_steps) == (0, 1)
    assert module.weight.grad is None
    assert engine.take_metrics().keys() == {"lr"}
    ignoring = Engine(module, torch.optim.SGD(module.parameters(), lr=1.0))
    ignoring.micro_step({"x": torch.ones(2)})
    assert ignoring.step() is None


def test_a_loss_on_the_cpu_and_a_norm_on_an_accelerator_are_noted_on_the_accelerator():
    late = DeferredFiniteCheck()
    late.add(1, [torch.tensor(1.0), torch.tensor(2.0, device="meta")])
    assert late._sums[0][2].device.type == "meta"


def test_steps_that_nobody_asks_about_are_kept_as_one_number():
    late = DeferredFiniteCheck()
    for step in range(1, 3001):
        late.add(step, [torch.tensor(float("inf") if step == 7 else 1.0), torch.tensor(2.0)])
    assert len(late._sums) <= 1024
    assert late.find_fault().startswith("in one of its steps 1 to 2047 the loss or the gradients were not finite")
    assert late.find_fault() is None


def test_a_device_that_is_not_waited_for_tells_of_the_first_bad_step_later():
    engine = make_engine(on_nonfinite="stop")
    assert not engine.defers_finite_check
    engine._gradients.defers_check, engine._checks_in_prepare = True, False  # as on an accelerator
    good = make_batches(3)
    for batch in [*good[:2], poisoned("nan"), good[2]]:
        engine.micro_step(batch)
        assert engine.step() is None
    assert engine.find_late_fault().startswith("in its step 3 the loss or the gradients")
    assert engine.find_late_fault() is None


def test_metrics_of_many_steps_take_no_more_room_and_have_the_same_mean():
    seldom, often = make_engine("mapping", lr=0.0), make_engine("mapping", lr=0.0)
    batches = make_batches(4)
    losses = []
    for step in range(3000):
        batch = batches[step % 4]
        train(seldom, batch)
        train(often, batch)
        losses.append(often.take_metrics()["loss"])
    state = seldom.state_dict()["gathered"]
    assert sum(t.numel() for t in state["apart"].values() if t is not None) < 2100
    restored = make_engine("mapping", lr=0.0)
    restored.load_state_dict(seldom.state_dict())
    assert restored.take_metrics() == (found := seldom.take_metrics())
    assert found["loss"] == pytest.approx(sum(losses) / 3000, rel=1e-6)
