import copy
import importlib
import subprocess
import sys

import pytest
import torch
from torch import nn

from runner.engines.dynamo import avoid_dynamo_import, backward, step_without_dynamo
from runner.engines.optim.optimizers import muon

SCRIPT = """
import sys, torch
from runner.engines.dynamo import avoid_dynamo_import, step_without_dynamo
avoid_dynamo_import()
parameter = torch.nn.Parameter(torch.ones(3))
optimizer = torch.optim.{name}([parameter], lr=0.1)
step_without_dynamo(optimizer)
scheduler = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
for _ in range(2):
    parameter.square().sum().backward()
    optimizer.step()
    scheduler.step()
    optimizer.zero_grad()
optimizer.load_state_dict(optimizer.state_dict())
assert parameter.grad is None and parameter.max() < 1
assert "torch._dynamo" not in sys.modules
compiled = torch.compile(lambda x: x.sin() + 1, backend="eager")
assert torch.equal(compiled(parameter.detach()), parameter.detach().sin() + 1)
for _ in range(2):
    compiled(parameter).sum().backward()
    optimizer.step()
    optimizer.zero_grad()
print("done", optimizer.param_groups[0]["lr"])
"""


@pytest.mark.parametrize("name", ["AdamW", "SGD"])
def test_a_step_loads_no_compiler_and_goes_on_after_something_else_has(name):
    script = SCRIPT.format(name=name)
    done = subprocess.run([sys.executable, "-W", "error", "-c", script], capture_output=True, text=True)
    assert done.stdout.split() == ["done", "0.025"], done.stderr


def train(optimizer, module, steps=4):
    for step in range(steps):
        module(torch.full((2, 5), step / 3)).square().sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    return module.state_dict()


@pytest.mark.parametrize(
    "make",
    [
        lambda module: torch.optim.AdamW(module.parameters(), lr=0.1),
        lambda module: torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9, nesterov=True),
        lambda module: muon(module.named_parameters(), lr=0.1),
    ],
)
def test_the_steps_are_torchs_own_bit_for_bit(make, monkeypatch):
    module = nn.Sequential(nn.Linear(5, 7), nn.Linear(7, 3))
    other = copy.deepcopy(module)
    expected = train(make(module), module)
    for loaded in [name for name in sys.modules if name == "torch._dynamo"]:
        monkeypatch.delitem(sys.modules, loaded)
    avoid_dynamo_import()
    optimizer = make(other)
    step_without_dynamo(optimizer)
    found = train(optimizer, other)
    assert all(torch.equal(found[name], expected[name]) for name in expected)


def test_hooks_of_a_step_are_called():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    step_without_dynamo(optimizer)
    seen = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before"))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    optimizer.step()
    assert seen == ["before", "after"]


def test_an_optimizer_that_is_not_torchs_keeps_its_step():
    class Own(torch.optim.Optimizer):
        def __init__(self, parameters):
            super().__init__(parameters, {})

        def step(self, closure=None):
            self.is_stepped = True

    optimizer = Own([nn.Parameter(torch.ones(2))])
    step_without_dynamo(optimizer)
    optimizer.step()
    assert optimizer.is_stepped
    assert "step" not in vars(optimizer)


def test_a_profiler_sees_the_step():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    step_without_dynamo(optimizer)
    parameter.grad = torch.ones(2)
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        optimizer.step()
    assert "Optimizer.step#SGD.step" in {event.key for event in profile.key_averages()}


@pytest.mark.parametrize("register", ["register_optimizer_step_pre_hook", "register_optimizer_step_post_hook"])
def test_a_hook_of_all_optimizers_is_called(register):
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    step_without_dynamo(optimizer)
    seen = []
    handle = getattr(importlib.import_module("torch.optim.optimizer"), register)(lambda *_: seen.append(register))
    try:
        optimizer.step()
    finally:
        handle.remove()
    optimizer.step()
    assert seen == [register]


def test_a_step_that_fails_leaves_the_gradient_mode_as_it_was():
    parameter = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    step_without_dynamo(optimizer)

    def fail():
        raise ValueError("in the step")

    with torch.enable_grad(), pytest.raises(ValueError, match="in the step"):
        optimizer.step(fail)
    assert torch.is_grad_enabled()
    parameter.grad = torch.ones(2)
    optimizer.step()
    assert torch.is_grad_enabled()
    assert torch.equal(parameter, torch.full((2,), 0.9))


class Doubled(torch.Tensor):
    """A subclass of tensors that counts the backwards."""

    backwards = 0

    @classmethod
    def __torch_function__(cls, func, types, args=(), kwargs=None):
        cls.backwards += func is torch.Tensor.backward
        return super().__torch_function__(func, types, args, kwargs or {})


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_backward_is_torchs_own_bit_for_bit(dtype):
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)).to(dtype)
    other = copy.deepcopy(module)
    for part, run in ((module, torch.Tensor.backward), (other, backward)):
        for scale in (1.0, 3.0):  # the second adds to the gradients of the first
            run(part(torch.full((4, 5), scale, dtype=dtype)).square().mean())
    pairs = zip(module.parameters(), other.parameters(), strict=True)
    assert all(torch.equal(a.grad, b.grad) for a, b in pairs)


def test_a_parameter_that_is_the_loss_gets_a_gradient_of_its_own():
    parameter = nn.Parameter(torch.ones(1))
    for _ in range(2):
        backward(parameter.reshape(()))
        assert parameter.grad == 1
        parameter.grad.mul_(5)
        parameter.grad = None


def test_a_tensor_subclass_runs_its_own_backward():
    parameter = nn.Parameter(torch.ones(2))
    backward(parameter.as_subclass(Doubled).sum())
    assert Doubled.backwards == 1
    assert torch.equal(parameter.grad, torch.ones(2))


def test_a_loss_that_has_no_gradients_or_is_complex_is_refused_as_by_torch():
    for loss in (torch.ones(()), torch.ones((), dtype=torch.complex64, requires_grad=True) * 1):
        with pytest.raises(RuntimeError) as expected:
            loss.backward()
        with pytest.raises(RuntimeError) as found:
            backward(loss)
        assert str(found.value) == str(expected.value)
