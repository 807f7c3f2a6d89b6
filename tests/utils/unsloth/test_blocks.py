"""`runner.utils.unsloth`: a model whose blocks are recomputed is, bit for bit, the model that it was."""

from __future__ import annotations

import copy
import gc
import pickle
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode

from runner.utils import unsloth
from runner.utils.unsloth.offload import Offloader
from tests.block_cases import (
    CASES,
    WIDTH,
    Mlp,
    Model,
    Several,
    assert_equal,
    learned,
    made,
    noise,
    skip_without_kernel,
    total,
)
from tests.lazy_device import LazyDevice

ENGINES = ["recomputed", "offloaded"]


def wrapped(model: nn.Module, how: str, **settings: Any) -> LazyDevice | None:
    """Wraps every block, on a device that copies lazily or none."""
    if how == "recomputed":
        unsloth.apply(model, ["blocks.*"])
        return None
    device = LazyDevice()
    engine = Offloader(device, **{"min_bytes": 0, **settings})
    for name, block in model.blocks.named_children():  # type: ignore[union-attr]
        unsloth.wrap(block, engine, name)
    return device


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("case", CASES)
def test_a_wrapped_model_learns_the_same_to_the_bit(case: str, dtype: torch.dtype | None, how: str) -> None:
    model, given = made(case)
    skip_without_kernel(model, given, dtype)
    twin = copy.deepcopy(model)
    device = wrapped(model, how, keep_last=0, in_flight=1)
    for _ in range(2):  # statistics go on
        assert_equal(learned(model, given, dtype), learned(twin, given, dtype))
    if device is not None:
        assert not device.mistakes
        assert device.num_sent


@pytest.mark.parametrize("how", ENGINES)
def test_a_generator_of_the_users_own_is_replayed(how: str) -> None:
    class Noisy(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator().manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.rand(x.shape, generator=self.generator)

    outcomes = []
    for is_wrapped in (True, False):
        torch.manual_seed(0)
        model = Model([Noisy() for _ in range(3)])
        if is_wrapped:
            wrapped(model, how)
        found = learned(model, noise().requires_grad_())
        outcomes.append([*found, *(block.generator.get_state() for block in model.blocks)])
    assert_equal(*outcomes)


@pytest.mark.parametrize("how", ENGINES)
def test_the_attention_backend_of_the_forward_is_that_of_the_recomputation(how: str) -> None:
    seen = []

    class Spy(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(torch.backends.cuda.flash_sdp_enabled())
            return super().forward(x)

    model = Model([Spy(), Spy()])
    wrapped(model, how)
    with nn.attention.sdpa_kernel(nn.attention.SDPBackend.MATH):
        loss = total(model(noise()))
    loss.backward()
    assert seen == [False] * 4
    assert torch.backends.cuda.flash_sdp_enabled()


@pytest.mark.parametrize("how", ENGINES)
def test_a_buffer_that_a_forward_changes_is_changed_once_and_warned_of(how: str) -> None:
    class Counting(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("count", torch.zeros(()))

        def forward(self, x: Tensor) -> Tensor:
            self.count += 1
            return super().forward(x) * self.count

    model, twin = Model([Counting(), Counting()]), Model([Counting(), Counting()])
    twin.load_state_dict(model.state_dict())
    wrapped(model, how)
    given = noise()
    with pytest.warns(UserWarning, match="changes the buffer 'count' of Counting"):
        learned(model, given)
    learned(twin, given)
    assert_equal(learned(model, given), learned(twin, given))
    assert [block.count.item() for block in model.blocks] == [2, 2]


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("case", ["dropout", "batch norm", "nested", "two gradient tensors"])
def test_a_retained_graph_gives_the_same_gradients_each_time(case: str, how: str) -> None:
    model, given = made(case)
    twin = copy.deepcopy(model)
    wrapped(model, how)
    found = []
    for each in (model, twin):
        torch.manual_seed(1)
        loss = total(each(given))
        parameters = list(each.parameters())
        twice = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for _ in range(2)]
        for one, other in zip(*twice, strict=True):
            assert (one is None and other is None) or torch.equal(one, other)
        found.append([grad for grad in twice[0] if grad is not None])
    assert_equal(*found)


@pytest.mark.parametrize("how", ENGINES)
def test_double_backward(how: str) -> None:
    model, _ = made("dropout")
    twin = copy.deepcopy(model)
    wrapped(model, how)
    found = []
    for each in (model, twin):
        torch.manual_seed(1)
        x = torch.ones(6, WIDTH, requires_grad=True)
        (grad,) = torch.autograd.grad(total(each(x)), x, create_graph=True)
        grad.square().sum().backward()
        found.append([grad.detach(), x.grad, *(p.grad for p in each.parameters() if p.grad is not None)])
    assert_equal(*found)  # type: ignore[arg-type]


@pytest.mark.parametrize("how", ENGINES)
def test_part_of_the_gradients_alone(how: str) -> None:
    model, given = made("dropout")
    twin = copy.deepcopy(model)
    wrapped(model, how)
    found = []
    for each in (model, twin):
        torch.manual_seed(1)
        last = list(each.blocks[-1].parameters())
        found.append(list(torch.autograd.grad(total(each(given)), last)))
    assert_equal(*found)


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("order", [(0, 1), (1, 0)])
def test_two_live_graphs_in_either_order(order: tuple[int, int], how: str) -> None:
    model, _ = made("dropout")
    twin = copy.deepcopy(model)
    device = wrapped(model, how, keep_last=0, in_flight=1)
    batches = [noise().requires_grad_(), noise().requires_grad_()]
    found = []
    for each in (model, twin):
        torch.manual_seed(1)
        losses = [total(each(batch)) for batch in batches]
        for index in order:
            losses[index].backward()
        found.append([p.grad for p in each.parameters()])
    assert_equal(*found)  # type: ignore[arg-type]
    assert device is None or not device.mistakes


@pytest.mark.parametrize("how", ENGINES)
def test_a_forward_that_is_abandoned_leaves_nothing_behind(how: str) -> None:
    model, given = made("dropout")
    device = wrapped(model, how, keep_last=1, in_flight=1)
    held = []
    for block in model.blocks:
        block.register_forward_pre_hook(lambda _, args: held.append(weakref.ref(args[0])))
    for _ in range(5):
        model(given)
    learned(model, given)
    gc.collect()
    allowed = {id(given)}
    alive = [each() for each in held if each() is not None and id(each()) not in allowed]
    assert len(alive) <= 2  # a copy that is still under way
    assert device is None or (not device.mistakes and device.num_allocated <= 8)


@pytest.mark.parametrize("how", ENGINES)
@pytest.mark.parametrize("num_calls", [1, 4])  # in the first forward, or in the recomputation of the third block
def test_an_error_in_a_block_keeps_none_of_its_tensors_alive(num_calls: int, how: str) -> None:
    seen = []

    class Fails(Mlp):
        calls_left = 0

        def forward(self, x: Tensor) -> Tensor:
            hidden = torch.tanh(self.wide(x))
            seen.extend([weakref.ref(x), weakref.ref(hidden)])
            type(self).calls_left -= 1
            if not type(self).calls_left:
                raise RuntimeError("its own mistake")
            return self.narrow(hidden)

    model = Model([Fails() for _ in range(3)])
    device = wrapped(model, how, keep_last=0, in_flight=1)
    Fails.calls_left = num_calls
    with pytest.raises(RuntimeError, match="its own mistake"):
        total(model(noise())).backward()
    failed = [*seen]
    learned(model, noise())  # copies that were under way are found done
    gc.collect()
    assert [each() for each in failed if each() is not None] == []
    assert device is None or not device.mistakes


@pytest.mark.parametrize("how", ENGINES)
def test_an_input_changed_in_place_raises(how: str) -> None:
    model = Model([Mlp(), Mlp()])
    wrapped(model, how)
    x = noise().requires_grad_() * 1
    loss = total(model(x))
    with torch.no_grad():
        x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_without_gradients_nothing_is_kept_or_recomputed() -> None:
    calls = []
    model = Model([Mlp(), Mlp()])
    unsloth.apply(model)
    model.blocks[0].wide.register_forward_hook(lambda *_: calls.append(1))
    with torch.no_grad():
        model(noise())
    assert calls == [1]


def test_wrapping_twice_and_unwrapping_twice_is_doing_it_once() -> None:
    model = Model([Mlp(), Mlp()])
    before, keys = repr(model), list(model.state_dict())
    attributes = [sorted(vars(block)) for block in model.blocks]
    for _ in range(2):
        report = unsloth.apply(model)
    assert (repr(model), list(model.state_dict())) == (before, keys)
    assert all(unsloth.is_wrapped(block) for block in model.blocks)
    for _ in range(2):
        report.undo()
    assert [sorted(vars(block)) for block in model.blocks] == attributes
    assert not any(unsloth.is_wrapped(block) for block in model.blocks)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
@pytest.mark.parametrize("how", ENGINES)
def test_a_copy_computes_with_its_own_weights(how: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model = nn.Sequential(Mlp(0.2), Mlp(0.2))
    given, engine = noise(), Offloader(LazyDevice(), min_bytes=0)
    for block in model:
        unsloth.wrap(block, None if how == "recomputed" else engine)
    other = copied(model)
    assert_equal(learned(other, given), learned(model, given))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    assert torch.equal(model(given), given)
    assert not torch.equal(other(given), given)
    other(given).sum().backward()
    assert other[0].wide.weight.grad is not None  # type: ignore[index,union-attr]


@pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of any compiled function's inputs
@pytest.mark.parametrize("how", ENGINES)
def test_blocks_compiled_inside(how: str) -> None:
    model, given = made("dropout")
    for block in model.blocks:
        block.forward = torch.compile(block.forward, backend="aot_eager")
    twin = copy.deepcopy(model)
    for mine, theirs in zip(twin.blocks, model.blocks, strict=True):
        mine.load_state_dict(theirs.state_dict())
        mine.forward = torch.compile(type(mine).forward.__get__(mine), backend="aot_eager")
    wrapped(model, how)
    assert_equal(learned(model, given), learned(twin, given))


def test_compiling_the_whole_around_it_is_refused_with_the_reason() -> None:
    model = Model([Mlp(), Mlp()])
    unsloth.apply(model)
    with pytest.raises(Exception, match=r"compile the blocks instead \(optimizations.compile.scope=blocks\)"):
        torch.compile(model, backend="eager")(noise())
    with pytest.raises(ValueError, match="compiled as a whole"):
        unsloth.apply(torch.compile(Model([Mlp(), Mlp()]), backend="eager"))  # type: ignore[arg-type]


def test_every_outermost_list_of_one_class_gives_blocks() -> None:
    model = nn.ModuleDict(
        {
            "encoder": nn.ModuleList([nn.Sequential(Mlp(), Mlp()), nn.Sequential(Mlp(), Mlp())]),
            "decoder": nn.Sequential(Mlp(), Mlp(), Mlp()),
            "head": nn.Sequential(nn.Linear(WIDTH, 4), nn.ReLU()),
        }
    )
    assert list(unsloth.apply(model).modules) == ["encoder.0", "encoder.1", "decoder.0", "decoder.1", "decoder.2"]


def test_globs_choose_and_leave_out() -> None:
    model = Model([Mlp() for _ in range(12)])
    assert list(unsloth.apply(model, ["blocks.1?"], ["blocks.10"]).modules) == ["blocks.11"]
    assert list(unsloth.apply(Model([Mlp() for _ in range(5)]), every=2).modules) == [
        "blocks.0",
        "blocks.2",
        "blocks.4",
    ]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": ["layers.*"]}, r"'layers.\*' matches no module; blocks are: blocks.0, blocks.1"),
        ({"exclude": ["block.*"]}, r"exclude: 'block.\*' matches none of the blocks: blocks.0, blocks.1"),
        ({"exclude": ["blocks.*"]}, "no block is found: all are excluded"),
        ({"offload": "sometimes"}, "offload=sometimes: expected one of auto, always, never"),
        ({"in_flight": 0}, "in_flight=0: expected 1 or more"),
        ({"every": 0, "keep_last": -1}, "every=0: expected 1 or more; keep_last=-1: expected 0 or more"),
    ],
)
def test_what_can_not_be_done_is_an_error(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unsloth.apply(Model([Mlp(), Mlp()]), **settings)


def test_a_model_without_blocks_is_an_error_that_lists_its_modules() -> None:
    with pytest.raises(ValueError, match=r"no block is found: .*Modules are: wide, narrow, dropout"):
        unsloth.apply(Mlp())


def test_blocks_that_are_never_called_are_an_error() -> None:
    model = nn.ModuleDict({"used": Model([Mlp(), Mlp()]), "idle": nn.ModuleList([Mlp(), Mlp()])})
    report = unsloth.apply(model)
    learned(model["used"], noise())
    with pytest.raises(ValueError, match=r"never called so far: idle.0, idle.1; leave them out with exclude"):
        report.check(is_last=False)


def test_a_block_whose_neighbours_are_called_may_be_skipped_at_random() -> None:
    model = Model([Mlp() for _ in range(3)], lambda block, x: x)
    report = unsloth.apply(model)
    model.call = lambda block, x: block(x) if block is not model.blocks[1] else x
    learned(model, noise())
    assert report.check(is_last=False) == ["blocks.1"]
    with pytest.raises(ValueError, match=r"never called so far: blocks.1"):
        report.check()


def test_a_block_that_runs_without_gradients_counts_as_called() -> None:
    model = Model([Mlp(), Mlp()])
    report = unsloth.apply(model)
    with torch.no_grad():
        model(noise())
    assert report.check() == []


def test_the_report_tells_what_the_blocks_were_given_and_what_was_spared() -> None:
    model = Model([Mlp() for _ in range(3)])
    report = unsloth.apply(model)
    total(model(noise().requires_grad_() * 1)).backward()
    report.check()
    assert report.input_bytes == 3 * 6 * WIDTH * 4
    kept = list[Tensor]()
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):  # type: ignore[func-returns-value]
        Mlp()(noise().requires_grad_() * 1)
    of_one = {t.data_ptr(): t.nbytes for t in kept if not (t.is_leaf and t.requires_grad)}
    assert report.spared_bytes == 3 * sum(of_one.values())
    assert report.describe().splitlines()[1].split()[:2] == ["blocks.0", "1"]
    learned(model, noise())
    assert report.spared_bytes == 3 * sum(of_one.values())  # of the first step


def _append(block: nn.Module, x: Any) -> Any:
    x, found = x if isinstance(x, tuple) else (x, [])
    return block(x, found), found


class Appends(Mlp):
    def forward(self, x: Tensor, found: list[Tensor]) -> Tensor:  # type: ignore[override]
        found.append(x.square())
        return super().forward(x)


@pytest.mark.parametrize("how", ENGINES)
def test_what_a_block_puts_into_its_callers_list_is_there(how: str) -> None:
    model = Model([Appends(0.2) for _ in range(3)], _append)
    twin = copy.deepcopy(model)
    wrapped(model, how)
    given = noise().requires_grad_()
    assert len(model(given)[1]) == 3
    assert_equal(learned(model, given), learned(twin, given))


@pytest.mark.parametrize("how", ENGINES)
def test_a_generator_that_is_an_argument_is_replayed(how: str) -> None:
    class Noisy(Mlp):
        def forward(self, x: Tensor, generator: torch.Generator) -> Tensor:  # type: ignore[override]
            return super().forward(x) * torch.rand(x.shape, generator=generator)

    outcomes = []
    for is_wrapped in (True, False):
        torch.manual_seed(0)
        generator = torch.Generator().manual_seed(2)
        model = Model([Noisy() for _ in range(3)], lambda block, x, generator=generator: block(x, generator))
        if is_wrapped:
            wrapped(model, how)
        outcomes.append([*learned(model, noise().requires_grad_()), generator.get_state()])
    assert_equal(*outcomes)


@pytest.mark.filterwarnings("ignore:.*its forward changes the buffer")
def test_buffers_that_are_put_anew_or_change_later_than_others() -> None:
    class Late(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("steps", torch.zeros(()))
            self.register_buffer("mean", torch.ones(WIDTH))

        def forward(self, x: Tensor) -> Tensor:
            self.steps = self.steps + 1
            if self.steps >= 3:
                with torch.no_grad():
                    self.mean.lerp_(x.mean(0), 0.1)
            return super().forward(x) * self.mean.clone()

    model = Model([Late(), Late()])
    twin, given = copy.deepcopy(model), noise().requires_grad_()
    unsloth.apply(model)
    for step in range(5):
        mine, theirs = learned(model, given), learned(twin, given)
        if step not in (0, 2):  # in which a buffer was first seen to change
            assert_equal(mine, theirs)
        for buffer, other in zip(model.buffers(), twin.buffers(), strict=True):
            assert torch.equal(buffer, other)


def test_parameters_changed_between_forward_and_backward_raise() -> None:
    model = Model([Mlp(), Mlp()])
    unsloth.apply(model)
    loss = total(model(noise()))
    with torch.no_grad():
        model.blocks[1].wide.weight.add_(1)
    with pytest.raises(RuntimeError, match=r"weight of Linear in blocks.1, .* was changed after its forward"):
        loss.backward()


def test_a_functional_call_learns_the_parameters_that_it_was_given() -> None:
    model = Model([Mlp(), Mlp()])
    twin, given = copy.deepcopy(model), noise()
    unsloth.apply(model)
    others = {name: (value.detach() * 2).requires_grad_() for name, value in model.named_parameters()}
    found = []
    for each in (model, twin):
        loss = total(torch.func.functional_call(each, others, (given,)))
        found.append(list(torch.autograd.grad(loss, list(others.values()))))
    assert_equal(*found)


@pytest.mark.parametrize("how", ENGINES)
def test_an_error_in_a_block_leaves_nothing_behind(how: str) -> None:
    class Fails(Mlp):
        is_failing = True

        def forward(self, x: Tensor) -> Tensor:
            if self.is_failing:
                raise torch.OutOfMemoryError("made up")
            return super().forward(x)

    model = Model([Mlp(0.2), Fails(0.2), Mlp(0.2)])
    twin, given = copy.deepcopy(model), noise().requires_grad_()
    wrapped(model, how)
    with pytest.raises(torch.OutOfMemoryError) as caught:
        model(given)
    model.blocks[1].is_failing = twin.blocks[1].is_failing = False
    assert_equal(learned(model, given), learned(twin, given))
    assert caught.value is not None  # held all the while, as a debugger does


@pytest.mark.parametrize("how", ENGINES)
def test_a_block_that_changes_its_input_in_place_is_named(how: str) -> None:
    model = Model([nn.Sequential(nn.ReLU(inplace=True), nn.Linear(WIDTH, WIDTH)) for _ in range(2)])
    wrapped(model, how)
    with pytest.raises(RuntimeError, match=r"^\S+: its forward has modified an input by an inplace operation"):
        model(noise().requires_grad_() * 1)


def test_sparse_tensors_are_left_alone() -> None:
    class Graph(Mlp):
        def forward(self, x: Tensor, links: Tensor) -> Tensor:  # type: ignore[override]
            return super().forward(torch.sparse.mm(links, x))

    links = torch.eye(6).to_sparse()
    model = Model([Graph(), Graph()], lambda block, x: block(x, links))
    twin, given = copy.deepcopy(model), noise().requires_grad_()
    unsloth.apply(model)
    assert_equal(learned(model, given), learned(twin, given))


def test_a_forward_of_the_users_own_put_over_it_stays() -> None:
    model = Model([Mlp(), Mlp()])
    report = unsloth.apply(model)
    inner = model.blocks[0].forward
    model.blocks[0].forward = own = lambda x: inner(x) * 2
    unsloth.apply(model)
    model(noise())
    report.undo()
    assert model.blocks[0].forward is own


def test_an_input_that_all_blocks_share_is_moved_once() -> None:
    model = Model([Several() for _ in range(4)])
    device = wrapped(model, "offloaded", keep_last=0, in_flight=1)
    shared = noise().requires_grad_() * 1
    model.call = lambda block, x: block(x, shared)[0]
    learned(model, noise().requires_grad_())
    assert device is not None
    assert device.num_sent == 3 + 1  # the first block is given a leaf, which stays where it is


def on_fake_cuda(module: nn.Module) -> nn.Module:
    """Gives a module parameters that are on a CUDA device by name, and hold nothing."""
    with FakeTensorMode():
        for part in module.modules():
            for name, parameter in part._parameters.items():
                if parameter is not None:
                    part._parameters[name] = nn.Parameter(torch.empty(parameter.shape, device="cuda"))
    return module


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_dropout_that_cudnn_draws_is_refused(kind: type[nn.RNNBase]) -> None:
    """cuDNN keeps a random state of its own, which a recomputation can't restore."""
    block = on_fake_cuda(nn.Sequential(kind(WIDTH, WIDTH, 2, dropout=0.5, device="meta")))
    with pytest.raises(ValueError, match=rf"^blocks.3.0: cuDNN draws the dropout of this {kind.__name__}"):
        unsloth.wrap(block, name="blocks.3")
    assert not unsloth.is_wrapped(block)


@pytest.mark.parametrize(("num_layers", "dropout", "has_cudnn"), [(2, 0.0, True), (2, 0.5, False)])
def test_an_rnn_whose_dropout_can_be_replayed_is_wrapped(num_layers: int, dropout: float, has_cudnn: bool) -> None:
    block = on_fake_cuda(nn.LSTM(WIDTH, WIDTH, num_layers, dropout=dropout, device="meta"))
    with torch.backends.cudnn.flags(enabled=has_cudnn):
        unsloth.wrap(block)
    assert unsloth.is_wrapped(block)


def test_a_block_that_is_captured_in_a_cuda_graph_runs_as_it_is_and_says_so_once(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model, given = made("dropout")
    twin = copy.deepcopy(model)
    unsloth.apply(model)
    for block in model.blocks:
        block.__dict__["_recompute"]._anchor = on_fake_cuda(nn.Linear(1, 1, device="meta")).weight
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    with pytest.warns(UserWarning, match=r"blocks.\d: it is captured in a CUDA graph") as said:
        first = learned(model, given)
    assert len(said) == 4
    assert_equal(first, learned(twin, given))
    calls = []
    model.blocks[0].wide.register_forward_hook(lambda *_: calls.append(1))
    assert_equal(learned(model, given), learned(twin, given))
    assert calls == [1]
