"""`runner.run.first_step`: parameters that the optimizer would not train end the run before its first step counts."""

import pytest
import torch
from torch import nn
from torch.nn.utils import prune
from torch.utils._pytree import tree_leaves

from runner.engines import Engine
from runner.run.build.engines import check_sized
from runner.run.first_step import log_model_summary
from runner.utils import io
from runner.utils.train.failures import TrainingStopped


class Net(nn.Module):
    """Changes itself in its first forward, in a way that a test gives."""

    def __init__(self, change=lambda module: None):
        super().__init__()
        self.first, self.last, self.change = nn.Linear(4, 4), nn.Linear(4, 1), change
        self.last.bias.requires_grad_(False)
        self.parts = nn.ParameterList([torch.ones(())])
        self.register_buffer("unset", None)

    def forward(self, x):
        change, self.change = self.change, lambda module: None
        change(self)
        return self.last(torch.tanh(self.first(x))).square().mean()


def replace_weight(module):
    module.first.weight = nn.Parameter(module.first.weight.detach() * 1)


def replace_frozen(module):
    module.last.bias = nn.Parameter(module.last.bias.detach() * 1, requires_grad=False)


CHANGES = {
    "a module": (lambda module: setattr(module, "head", nn.Linear(4, 1)), "head.weight, head.bias"),
    "a module deep inside": (lambda module: module.first.add_module("own", nn.Linear(4, 1)), "first.own.weight"),
    "a parameter": (lambda module: setattr(module, "scale", nn.Parameter(torch.ones(()))), "scale"),
    "one of a list": (lambda module: module.parts.append(torch.ones(())), "parts.1"),
    "a frozen one": (lambda module: module.register_parameter("scale", nn.Parameter(torch.ones(1), False)), "scale"),
    "a weight replaced": (replace_weight, "first.weight"),
    "a weight replaced by a frozen one": (
        lambda module: setattr(module.first, "weight", nn.Parameter(module.first.weight.detach(), False)),
        "first.weight",
    ),
    "a module replaced": (lambda module: setattr(module, "first", nn.Linear(4, 4)), "first.weight, first.bias"),
    "a weight deleted": (lambda module: module.parts.__setitem__(0, torch.ones(())), "parts.0"),
    "weight norm": (lambda module: nn.utils.parametrizations.weight_norm(module.first), "first.weight"),
    "a parametrization": (
        lambda module: nn.utils.parametrize.register_parametrization(module.first, "weight", nn.Identity()),
        "first.weight, first.parametrizations.weight.original",
    ),
    "pruning": (lambda module: prune.identity(module.first, "weight"), "first.weight"),
    "unfreezing": (lambda module: module.last.bias.requires_grad_(True), "last.bias"),
}
BUFFERS = {
    "a new one": (lambda module: module.register_buffer("mean", torch.zeros(4)), "mean"),
    "one that was None": (lambda module: setattr(module, "unset", torch.zeros(4)), "unset"),
}
ALLOWED = {
    "nothing": lambda module: None,
    "a frozen one replaced": replace_frozen,
    "freezing": lambda module: module.first.bias.requires_grad_(False),
    "a buffer of no state": lambda module: module.register_buffer("cache", torch.zeros(4), persistent=False),
    "the same anew": lambda module: setattr(module.first, "weight", module.first.weight),
}


def step(change, evaluates=False):
    module = Net(change)
    before = module.last.weight.detach().clone()
    engine = Engine(module, torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1))
    log_model_summary("model", engine, lambda text: None)
    try:
        if evaluates:
            with engine.evaluating():
                engine.forward(torch.randn(2, 4))
        engine.micro_step(torch.randn(2, 4))
        engine.step()
    finally:
        assert torch.equal(module.last.weight, before) is (engine.steps == 0)
    return engine


@pytest.mark.parametrize("evaluates", [False, True])  # an evaluation at the start is the first forward
@pytest.mark.parametrize("name", CHANGES)
def test_parameters_that_would_not_be_trained_end_the_first_step_by_name(name, evaluates):
    change, names = CHANGES[name]
    with pytest.raises(TrainingStopped, match=f"model: its first forward has created, .* parameters: .*{names}"):
        step(change, evaluates)


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_a_resumed_run_would_not_have_end_it_too(name):
    change, names = BUFFERS[name]
    with pytest.raises(TrainingStopped, match=rf"created or removed buffers: {names}\. "):
        step(change)


def later(change):
    """Returns the known tensors of a module whose second forward changes them."""
    module = Net()
    engine = Engine(module, torch.optim.SGD([p for p in module.parameters() if p.requires_grad], lr=0.1))
    tensors = log_model_summary("model", engine, lambda text: None)
    for module.change in (lambda module: None, change):
        engine.micro_step(torch.randn(2, 4))
        engine.step()
    return tensors


@pytest.mark.parametrize("name", CHANGES)
def test_parameters_that_a_later_forward_changes_are_told_likewise(name):
    change, names = CHANGES[name]
    tensors = later(change)
    for check in (tensors.check_tensors, tensors.check_quickly):
        with pytest.raises(
            TrainingStopped, match=f"model: a forward up to step 2 has created, .* parameters: .*{names}"
        ) as halt:
            check("a forward up to step 2")
        assert not halt.value.is_complete


@pytest.mark.parametrize("name", BUFFERS)
def test_buffers_that_a_later_forward_makes_are_told_before_they_are_saved(name):
    change, names = BUFFERS[name]
    with pytest.raises(
        TrainingStopped, match=rf"model: a forward up to step 2 has created or removed buffers: {names}\. "
    ):
        later(change).check_tensors("a forward up to step 2")


@pytest.mark.parametrize("name", ALLOWED)
def test_what_a_later_forward_may_change_is_let_be(name):
    tensors = later(ALLOWED[name])
    tensors.check_tensors()
    tensors.check_quickly("a forward")


@pytest.mark.parametrize("name", ALLOWED)
def test_what_is_trained_and_resumed_all_the_same_is_let_be(name):
    assert step(ALLOWED[name]).steps == 1


LAZY = {
    "linear": (nn.LazyLinear, (4,), (2, 3), "0.weight, 0.bias"),
    "norm": (nn.LazyBatchNorm1d, (), (2, 3), "0.weight, 0.bias ... 0.running_var"),
    "convolution": (nn.LazyConv1d, (4, 1), (2, 3, 5), "0.weight, 0.bias"),
}


@pytest.mark.parametrize("name", LAZY)
def test_parameters_without_a_shape_are_refused_by_name_until_they_have_one(name):
    make, arguments, shape, names = LAZY[name]
    module = nn.Sequential(make(*arguments))
    with pytest.raises(ValueError, match=f"^{names} get their shape in the first forward"):
        check_sized(module)
    module(torch.randn(shape))
    check_sized(module)


MODEL = """

class Lazy(Model):
    def __init__(self, is_sized=False):
        super().__init__(dropout=0.0)
        self.first = nn.LazyLinear(8)
        if is_sized:
            self(torch.zeros(1, 4), torch.zeros(1, 1))


class Late(Model):
    def __init__(self):
        super().__init__()
        self.second = None

    def forward(self, x, y):
        if self.second is None:
            self.second = nn.Linear(8, 1)
        return super().forward(x, y)


class Later(Model):
    def __init__(self, step):
        super().__init__()
        self.num_steps, self.step = 0, step

    def forward(self, x, y):
        self.num_steps += self.training
        if self.num_steps == self.step:
            self.third = nn.Linear(8, 1)
        return super().forward(x, y)
"""


@pytest.fixture
def changing(project):
    with (project.folder / "own.py").open("a") as file:
        file.write(MODEL)
    return project


def test_a_lazy_model_is_refused_with_the_remedy_which_then_trains_and_goes_on(changing):
    said = changing.run("model._target_=own.Lazy", status=2)
    assert said.startswith("model: first.weight, first.bias get their shape in the first forward")
    assert "call the module on a sample batch at the end of its __init__" in said
    sized = ["model._target_=own.Lazy", "+model.is_sized=true"]
    changing.run(*sized, "hydra.run.dir=whole", "optimizations.ema.decay=0.9")
    changing.copy("whole", "cut")
    changing.run("resume=cut/checkpoints/step_00000008", "allow_targets=[own]")
    one, other = (tensors_of(changing.folder / run / "checkpoints" / "step_00000012") for run in ("whole", "cut"))
    assert len(one) > 20
    assert all(map(torch.equal, one, other))


def tensors_of(checkpoint):
    loaded = [io.load(checkpoint / f"{key}.safetensors") for key in ("model", "model.optimizer")]
    return [leaf for leaf in tree_leaves(loaded) if isinstance(leaf, torch.Tensor)]


@pytest.mark.parametrize(("log_every", "step"), [(5, 5), (0, 6)])  # looked at with the metrics, or the evaluation
def test_a_run_whose_later_forward_makes_a_layer_keeps_the_checkpoint_before_it(changing, log_every, step):
    settings = ["trainer.save_every=3", "trainer.eval_every=6", f"trainer.log_every={log_every}"]
    said = changing.run("model._target_=own.Later", "+model.step=4", "hydra.run.dir=later", *settings, status=1)
    changed = f"model: a forward up to step {step} has created, replaced, removed or unfrozen parameters: third.weight"
    assert changed in said
    assert "Traceback" not in said
    assert [path.name for path in (changing.folder / "later" / "checkpoints").glob("step*")] == ["step_00000003"]
    assert "Finished at step 6" in changing.run("resume=later", "trainer.steps=6", "allow_targets=[own]")


@pytest.mark.parametrize(
    "ranks", [(), *(pytest.param((f"distributed={each}",), marks=pytest.mark.slow) for each in ("ddp", "fsdp"))]
)
def test_a_run_whose_first_forward_makes_a_layer_ends_at_once_and_saves_nothing(changing, ranks):
    processes = ["distributed.nproc_per_node=2", "distributed.device=cpu"] if ranks else []
    said = changing.run("model._target_=own.Late", "hydra.run.dir=late", *ranks, *processes, status=1)
    assert "created, replaced, removed or unfrozen parameters: second.weight, second.bias" in said
    assert "Traceback" not in said
    assert not list((changing.folder / "late").glob("checkpoints/*"))
