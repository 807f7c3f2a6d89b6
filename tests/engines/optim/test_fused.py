"""Fused kernels are used where they are right, left in time where they are not, and kept by runs that resume."""

import copy

import pytest
import torch
from ranks import run_ranks
from torch import nn
from torch.optim import SGD, Adagrad, Adam, AdamW

from runner.engines import Engine, Engines
from runner.engines.fsdp import FSDP
from runner.engines.optim.fused import describe_kernels, use_fused_kernels
from runner.engines.optim.optimizers import ChainedOptimizer, muon
from runner.engines.strategies import DDP, Strategy
from runner.utils import distributed
from runner.utils.distributed.coordinator import Coordinator

MOMENTUM = {"lr": 0.25, "momentum": 0.5}


class Net(nn.Module):
    def __init__(self, is_strided=False):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 3))
        if is_strided:
            self.layers[0].weight = nn.Parameter(self.layers[0].weight.detach().t().contiguous().t())

    def forward(self, x):
        return self.layers(x).square().mean()


class Subclass(torch.Tensor):
    pass


class OwnAdamW(AdamW):
    pass


def ones(*shape, **settings):
    return nn.Parameter(torch.ones(*shape, **settings))


def without_own_dtype():
    parameter = ones(2)
    parameter.grad_dtype = None  # its gradients may have any
    return parameter


def built(make, *parameters):
    """Returns `fused` of each group of an optimizer of these parameters, beside those of an embedding."""
    module = nn.Module()
    module.all, module.table = nn.ParameterList(parameters), nn.Embedding(2, 2, sparse=True)
    optimizer = make(parameters or [module.table.weight])
    use_fused_kernels(optimizer, module)
    assert getattr(optimizer, "_step_supports_amp_scaling", False) is False
    return [group.get("fused") for group in optimizer.param_groups]


@pytest.mark.parametrize("kind", [Adam, AdamW, Adagrad, lambda p: SGD(p, **MOMENTUM), lambda p: SGD(p, weight_decay=1)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_fused_kernel_is_used_where_it_is_right(kind, dtype):
    assert built(kind, ones(2, 3, dtype=dtype), ones((), dtype=dtype)) == [True]


def test_each_group_has_a_kernel_of_its_own():
    strided, table = nn.Parameter(torch.ones(3, 2).t()), nn.Embedding(2, 2, sparse=True).weight
    groups = [{"params": [ones(2)]}, {"params": [strided, table]}, {"params": [ones(2)], "fused": False}]
    assert built(lambda _: AdamW(groups), ones(1)) == [True, None, False]
    assert built(lambda p: muon([("a", p[0]), ("b", p[1])], lr=0.1), ones(2, 2), ones(2)) == [None, True]


@pytest.mark.parametrize(
    ("make", "parameters", "kept"),
    [
        (lambda p: AdamW(p, fused=False), [ones(2)], False),
        (lambda p: AdamW(p, fused=True), [ones(2)], True),
        (lambda p: AdamW(p, foreach=True), [ones(2)], None),
        (lambda p: AdamW(p, foreach=False), [ones(2)], None),
        (lambda p: AdamW(p, capturable=True), [ones(2)], None),
        (lambda p: AdamW(p, differentiable=True), [ones(2)], None),
        (lambda p: AdamW(p, lr=torch.tensor(0.1)), [ones(2)], None),
        (OwnAdamW, [ones(2)], None),
        (SGD, [ones(2)], None),  # without momentum and decay it is as fast
        (Adagrad, [], None),  # of the sparse embedding
        (AdamW, [nn.Parameter(torch.ones(4, 6)[:, :3])], None),
        (AdamW, [ones(1, 2, 3, 3).data.to(memory_format=torch.channels_last).requires_grad_()], None),
        (AdamW, [ones(2, dtype=torch.complex64)], None),
        (AdamW, [ones(2), ones(2, device="meta")], None),
        (AdamW, [nn.Parameter(torch.ones(2).as_subclass(Subclass))], None),
        (lambda p: SGD(p, **MOMENTUM), [without_own_dtype()], None),
        (lambda p: SGD(p, **MOMENTUM), [ones(16, dtype=torch.bfloat16)], None),  # torch's kernel makes other numbers
        (lambda p: SGD(p, **MOMENTUM), [ones(16, dtype=torch.float16)], None),
        (lambda p: AdamW(p, lr=0.1), [ones(16, dtype=torch.bfloat16)], True),
    ],
)
def test_torchs_default_or_the_users_choice_stays_where_a_kernel_would_be_wrong(make, parameters, kept):
    assert built(make, *parameters) == [kept]


@pytest.mark.filterwarnings("ignore:Sparse CSR tensor support is in beta")
def test_a_sparse_parameter_is_left_to_torchs_default():
    assert built(AdamW, nn.Parameter(torch.ones(2, 2).to_sparse_csr())) == [None]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", [Adam, AdamW, lambda p, **settings: SGD(p, momentum=0.9, **settings), Adagrad])
def test_numbers_are_those_of_torchs_default_up_to_rounding(kind, dtype):
    optimizers = []
    for is_fused in (False, True):
        # Sizes around the widths of vector registers, as one fused kernel is wrong only beside them.
        parameters = [nn.Parameter(torch.linspace(-1, 1, size).to(dtype)) for size in (*range(1, 35), 70, 4097)]
        optimizer = kind(parameters, lr=0.01)
        optimizer.param_groups[0]["eps"] = 1e-3  # 1e-8 is 0 in 16 bits, where the default divides by it
        if is_fused:
            use_fused_kernels(optimizer, nn.ParameterList(parameters))
        for step in range(3):
            generator = torch.Generator().manual_seed(step)
            for parameter in parameters:
                gradient = torch.randn(parameter.shape, generator=generator)
                parameter.grad = (gradient + gradient.sign()).to(dtype)  # squares of small ones are 0 in 16 bits
            optimizer.step()
        optimizers.append(torch.cat([p.detach() for p in parameters]))
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5}.get(dtype, 2e-2)
    torch.testing.assert_close(*optimizers, rtol=tolerance, atol=tolerance)


def step_each(optimizer, parameters, steps):
    """Updates parameters with the gradients of each step; None for a parameter without one."""
    for gradients in steps:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = None if gradient is None else gradient.clone()
        optimizer.step()
    return [parameter.detach() for parameter in parameters]


SPARSE = torch.sparse_coo_tensor([[1]], torch.ones(1, 2), (3, 2), check_invariants=False)
STRIDED = torch.arange(6.0).reshape(2, 3).t()
LATE = {  # the gradients of the first parameter, and the reason to leave the kernel
    "sparse": ([torch.ones(3, 2), SPARSE], "a gradient is sparse"),
    "sparse first": ([SPARSE, SPARSE], "a gradient is sparse"),
    "strided": ([torch.ones(3, 2), STRIDED], "a gradient is not contiguous"),
    "first momentum": ([None, torch.ones(3, 2)], "a parameter has its first gradient after others"),
}
GOES_ON = "torch's default updates its group from here on"


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("late", LATE)
@pytest.mark.parametrize("make", [lambda p: SGD(p, **MOMENTUM), Adagrad])
@pytest.mark.parametrize("num_groups", [1, 2])
def test_an_update_that_a_kernel_would_refuse_or_make_wrongly_is_that_of_torchs_default(make, late, num_groups, caplog):
    found = []
    for is_fused in (False, True):
        parameters = [ones(3, 2), ones(2)]
        # The group with the special gradient is the last one: a failure would come after an update.
        groups = [{"params": [p]} for p in reversed(parameters)] if num_groups == 2 else [{"params": parameters}]
        optimizer = make(groups)
        if is_fused:
            use_fused_kernels(optimizer, nn.ParameterList(parameters))
        found.append(step_each(optimizer, parameters, [[gradient, torch.ones(2)] for gradient in LATE[late][0]]))
    torch.testing.assert_close(*found, rtol=0, atol=1e-7)
    leaves = late != "first momentum" or (type(optimizer) is SGD and num_groups == 1)
    assert [group["fused"] for group in optimizer.param_groups] == [
        *[True] * (num_groups - 1),
        None if leaves else True,
    ]
    assert caplog.messages == ([f"{type(optimizer).__name__}: {LATE[late][1]}; {GOES_ON}"] if leaves else [])


def test_adamw_takes_a_strided_gradient_as_torchs_default_does():
    gradient = torch.arange(1.0, 7.0).reshape(2, 3).t()
    found = []
    for is_fused in (False, True):
        parameter = ones(3, 2)
        optimizer = AdamW([parameter], lr=0.1)
        if is_fused:
            use_fused_kernels(optimizer, nn.ParameterList([parameter]))
        found += step_each(optimizer, [parameter], [[gradient]] * 2)
    assert torch.equal(*found)


def make(optimizer=AdamW, is_chosen=True, layout=Strategy, settings=None, is_strided=False, **engine_settings):
    """Returns engines of one model, as a run builds them."""
    module, strategy = Net(is_strided), layout()
    strategy.attach_coordinator(Coordinator(), "model", True)
    strategy.shard(module)
    optimizer = optimizer(module.parameters(), **({"lr": 0.1} | (settings or {})))
    engine = Engine(module, optimizer, strategy=strategy, **engine_settings)
    if is_chosen:
        use_fused_kernels(optimizer, module)
    return Engines(model=engine)


def train(engines, steps):
    for step in steps:
        x = torch.randn(8, 5, generator=torch.Generator().manual_seed(step))
        engines.micro_step({"x": x.chunk(distributed.world_size())[distributed.rank()]})
        assert engines.step(engines["model"].strategy.coordinator.poll) == {}
    return engines


def resumed(saved, **settings):
    engines = make(**settings)
    engines.load_state_dict(copy.deepcopy(saved.state_dict()))
    return engines


def kernel(engines):
    return engines["model"].optimizer.param_groups[0]["fused"]


def chained(parameters, lr):
    first, *rest = parameters
    return ChainedOptimizer([AdamW([first], lr=lr), SGD(rest, lr=lr, momentum=0.9)])


def assert_same(one, other):
    for a, b in zip(one["model"].module.parameters(), other["model"].module.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("optimizer", [AdamW, Adam, lambda p, lr: SGD(p, lr=lr, momentum=0.9), Adagrad, chained])
@pytest.mark.parametrize("precision", ["fp32", "fp16"])
@pytest.mark.parametrize("is_chosen", [False, True])
def test_a_run_goes_on_with_the_kernel_that_it_began_with(optimizer, precision, is_chosen):
    whole = train(make(optimizer, is_chosen, precision=precision), range(6))
    cut = resumed(
        train(make(optimizer, is_chosen, precision=precision), range(3)), optimizer=optimizer, precision=precision
    )
    assert kernel(cut) is (True if is_chosen else None)
    assert_same(whole, train(cut, range(3, 6)))


def test_a_choice_of_the_user_on_resume_takes_effect():
    fused, default = train(make(), range(2)), train(make(is_chosen=False), range(2))
    assert kernel(resumed(fused, settings={"fused": False})) is False
    assert kernel(resumed(default, settings={"fused": True})) is True
    turned_off = train(make(settings={"fused": False}), range(2))
    assert kernel(resumed(turned_off, settings={"fused": False})) is False
    assert kernel(resumed(turned_off)) is True  # the setting was removed
    with_foreach = resumed(fused, settings={"foreach": True})
    assert (kernel(with_foreach), describe_kernels(with_foreach["model"].optimizer)) == (None, "AdamW, foreach")
    for engines in (with_foreach, resumed(default, settings={"fused": True})):
        train(engines, range(2, 4))


def test_a_run_goes_on_with_torchs_default_where_its_kernel_is_wrong():
    saved = train(make(), range(3))
    moved = resumed(saved, is_strided=True)
    assert kernel(moved) is None
    for engines in (saved, moved):
        train(engines, [3])
    for a, b in zip(saved["model"].module.parameters(), moved["model"].module.parameters(), strict=True):
        torch.testing.assert_close(a, b)


def test_a_saved_moment_with_other_strides_is_laid_out_as_its_parameter():
    saved = train(make(), range(3))
    state = copy.deepcopy(saved.state_dict())
    moments = state["model.optimizer"]["optimizer"]["state"][0]
    moments["exp_avg"] = moments["exp_avg"].t().contiguous().t()
    moved = make()
    moved.load_state_dict(state)
    for engines in (saved, moved):
        train(engines, [3])
    assert_same(saved, moved)


@pytest.mark.parametrize("name", ["exp_avg", "exp_avg_sq", "step"])
@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_a_saved_moment_of_another_shape_is_refused_before_a_kernel_writes_outside_of_it(name, settings):
    state = copy.deepcopy(train(make(), range(1)).state_dict())
    state["model.optimizer"]["optimizer"]["state"][0][name] = torch.zeros(2)
    with pytest.raises(ValueError, match=rf"{name}: expected the shape .*, found \[2\]"):
        make(settings=settings).load_state_dict(state)


@pytest.mark.parametrize("settings", [{}, {"fused": True}])
def test_a_first_step_that_the_loss_scaler_skips_leaves_no_momentum(settings):
    engines = make(SGD, settings=MOMENTUM | settings, precision="fp16")
    engine = engines["model"]
    before = [parameter.detach().clone() for parameter in engine.module.parameters()]
    engines.micro_step({"x": torch.full((8, 5), 1e30)})
    engines.step()
    assert (engine.steps, engine.skipped_steps) == (0, 1)
    assert all(map(torch.equal, before, engine.module.parameters()))
    assert not engine.optimizer.state
    expected = make(SGD, False, settings=MOMENTUM)
    for trained in (engines, expected):
        train(trained, range(3))
    for a, b in zip(engine.module.parameters(), expected["model"].module.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=5e-3)


def move_to_shards(optimizer, settings):
    """Trains on DDP, goes on with FSDP, and back; returns the kernels of both, and the final weights."""
    on_ddp = train(make(optimizer, layout=DDP, settings=settings), range(2))
    sharded = make(optimizer, layout=FSDP, settings=settings)
    sharded.load_state_dict(copy.deepcopy(on_ddp.state_dict()))
    train(sharded, range(2, 4))
    state = sharded["model"].strategy.to_full(sharded.state_dict())
    back = make(optimizer, layout=DDP, settings=settings)
    back.load_state_dict(copy.deepcopy(state))
    return [kernel(on_ddp), kernel(sharded), kernel(back)], state["model"]


@pytest.mark.parametrize(
    ("optimizer", "settings", "kernels"),
    [(AdamW, {}, [True, True, True]), (SGD, MOMENTUM, [True, None, None]), (Adagrad, {}, [True, None, None])],
)
def test_shards_are_updated_as_by_one_process_also_without_a_rule_for_the_kernel(optimizer, settings, kernels):
    expected = train(make(optimizer, settings=settings), range(4))["model"].module.state_dict()
    for found, weights in run_ranks(2, move_to_shards, optimizer, settings):
        assert found == kernels
        torch.testing.assert_close(dict(weights), dict(expected), rtol=1e-5, atol=1e-6)


def test_the_description_names_each_kernel():
    optimizer = AdamW([{"params": [ones(2)]}, {"params": [ones(2)], "foreach": False}, {"params": [ones(2)]}])
    use_fused_kernels(optimizer, nn.Module())
    assert describe_kernels(optimizer) == "AdamW, fused (2 of 3 groups), one parameter at a time (1 of 3 groups)"
    assert describe_kernels(SGD([ones(2)])) == "SGD, torch's default"
    assert describe_kernels(torch.optim.LBFGS([ones(2)])) == "LBFGS"
