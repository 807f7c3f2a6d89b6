"""Recomputed and offloaded blocks on a GPU: the same loss, gradients, buffers and generators as the untouched module.

Without a GPU the tests run on the suite's simulated device; those that can't are skipped.
"""

from __future__ import annotations

import contextlib
import gc
import itertools
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

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
from tests.gpu.accelerator import (
    DEVICE,
    HAS_GPU,
    LONG_DELAY_CYCLES,
    Accelerator,
    accelerator,
    needs_gpu,
    overwrite_freed_memory,
)

__all__ = ["accelerator"]
pytestmark = [
    pytest.mark.gpu,
    pytest.mark.filterwarnings("ignore:The AccumulateGrad node's stream"),  # torch's own, of backward on two streams
]
ON_DEVICE = [case for case in CASES if not (case == "lstm" and HAS_GPU)]  # refused there: see the test below
SIZE = 1 << 20 if HAS_GPU else 1 << 16  # numbers in a large input: on a GPU its copy is long enough to be overtaken


def wrap(accelerator: Accelerator, model: nn.Module, how: str, **settings: Any) -> Any:
    """Wraps a model's blocks: only recomputed, or offloaded too. Returns the transport of the latter."""
    if how == "recomputed":
        unsloth.apply(model, ["blocks.*"], offload="never")
        return None
    return accelerator.wrap(model, **settings)


@pytest.mark.parametrize("how", ["recomputed", "offloaded"])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
@pytest.mark.parametrize("case", ON_DEVICE)
def test_a_wrapped_model_trains_to_the_same_bits(
    accelerator: Accelerator, case: str, dtype: torch.dtype | None, how: str
) -> None:
    if case == "lstm" and dtype is torch.float16:
        pytest.skip("torch has no fp16 LSTM on the CPU")
    model, given = made(case, DEVICE)
    skip_without_kernel(model, given, dtype)
    twin, same = made(case, DEVICE)
    transport = wrap(accelerator, model, how, keep_last=0, in_flight=1)
    for _ in range(2):  # statistics go on
        assert_equal(learned(model, given, dtype, scale=128.0), learned(twin, same, dtype, scale=128.0))
    if transport is not None:
        assert transport.num_sent


SETTINGS = [*itertools.product(["always", "auto"], range(4), [0, 2])]


@pytest.mark.parametrize("case", ["dropout", "nested", "batch norm", "attention", "tied and looped"])
@pytest.mark.parametrize(("offload", "prefetch", "keep_last"), SETTINGS)
def test_every_setting_of_offloading_gives_the_same_numbers(
    accelerator: Accelerator, offload: str, prefetch: int, keep_last: int, case: str
) -> None:
    model, given = made(case, DEVICE)
    twin, same = made(case, DEVICE)
    settings = {"prefetch": prefetch, "keep_last": keep_last, "in_flight": 1}
    transport = accelerator.wrap(model, is_auto=offload == "auto", **settings)
    for _ in range(7 if offload == "auto" else 2):  # auto decides after 4 calls of a block
        assert_equal(learned(model, given), learned(twin, same))
    assert transport.num_sent or keep_last  # the shortest models have two inputs to keep; auto moves what it measures


def large_model(num_blocks: int = 6) -> tuple[Model, Tensor]:
    torch.manual_seed(0)
    model = Model([Mlp(0.1) for _ in range(num_blocks)]).to(DEVICE)
    return model, noise(SIZE // WIDTH, WIDTH).to(DEVICE).requires_grad_()


def put_under_pressure(model: Model, accelerator: Accelerator, around: Callable[[], Any]) -> None:
    """Overwrites freed memory at once after each block, in forward and in backward.

    Args:
        around: returns what each block runs in, such as a stream.
    """

    def overwrite(gradient: Tensor) -> None:
        overwrite_freed_memory(gradient)
        accelerator.delay_computing()

    def call(block: nn.Module, x: Tensor) -> Tensor:
        accelerator.delay_computing()
        x = x * 1.0  # an input that nothing but the block holds
        with around():
            output: Tensor = block(x)
        del x
        overwrite_freed_memory(output)
        output.register_hook(overwrite)
        return output

    model.call = call


@pytest.mark.parametrize("late", ["copies", "computing"])
@pytest.mark.parametrize("stream", ["default", "own", "in turn"])
@pytest.mark.parametrize(("keep_last", "in_flight", "prefetch"), [(0, 1, 0), (0, 2, 1), (1, 2, 1), (2, 1, 3)])
def test_freed_memory_may_be_overwritten_at_once(
    accelerator: Accelerator, keep_last: int, in_flight: int, prefetch: int, stream: str, late: str
) -> None:
    accelerator.computing_is_late, accelerator.delay_cycles = late == "computing", LONG_DELAY_CYCLES
    model, given = large_model()
    twin, same = large_model()
    accelerator.wrap(model, keep_last=keep_last, in_flight=in_flight, prefetch=prefetch)
    around = accelerator.other_stream if stream == "in turn" else contextlib.nullcontext
    for each in (model, twin):
        put_under_pressure(each, accelerator, around)
    for _ in range(3):
        expected = learned(twin, same)
        with accelerator.other_stream() if stream == "own" else contextlib.nullcontext():
            found = learned(model, given)
        assert_equal(found, expected)


def test_an_input_that_blocks_on_two_streams_share_is_moved_once(accelerator: Accelerator) -> None:
    def build() -> tuple[Model, Tensor]:
        torch.manual_seed(0)
        model = Model([Several(0.1) for _ in range(6)]).to(DEVICE)
        return model, noise(SIZE // WIDTH, WIDTH).to(DEVICE).requires_grad_()

    found = []
    for is_wrapped in (True, False):
        model, given = build()
        transport = accelerator.wrap(model, keep_last=0, in_flight=1) if is_wrapped else None
        shared = given.detach().sin().requires_grad_() * 1.0

        def call(block: nn.Module, x: Tensor, shared: Tensor = shared) -> Tensor:
            with accelerator.other_stream():
                output: Tensor = block(x, shared)[0]
            overwrite_freed_memory(output)
            output.register_hook(overwrite_freed_memory)
            return output

        model.call = call
        found.append(learned(model, given))
        if transport is not None:
            assert transport.num_sent == 5 + 1  # the first block is given a leaf, which stays
    assert_equal(*found)


def test_overwriting_finds_a_source_that_is_freed_before_its_copy_is_done(accelerator: Accelerator) -> None:
    class Careless(Offloader):
        """Frees a source as soon as its copy is asked for."""

        def _offload(self, handle: Any) -> None:
            super()._offload(handle)
            self._copies.clear()
            handle.source = None

    accelerator.delay_cycles = LONG_DELAY_CYCLES
    model, given = large_model()
    twin, same = large_model()
    transport = accelerator.offloader().streams
    careless = Careless(transport, min_bytes=0, keep_last=0, in_flight=1)
    for name, block in model.blocks.named_children():
        unsloth.wrap(block, careless, name)
    for each in (model, twin):
        put_under_pressure(each, accelerator, contextlib.nullcontext)
    accelerator.transports.clear()  # its mistakes are expected
    expected = learned(twin, same)
    try:
        found = learned(model, given)
        is_equal = all(torch.equal(mine, theirs) for mine, theirs in zip(found, expected, strict=True))
    except RuntimeError as error:  # the check of a block's first recomputation comes first
        if "recomputing it gave another output" not in str(error):
            raise
        is_equal = False
    assert not is_equal or getattr(transport, "mistakes", [])


@pytest.mark.filterwarnings("ignore:unsloth. host_limit")
@pytest.mark.parametrize("num_inputs", [0, 1, 3])
def test_at_the_host_limit_inputs_stay_on_the_device(accelerator: Accelerator, num_inputs: int) -> None:
    model, given = large_model()
    twin, same = large_model()
    limit = num_inputs * 4 * SIZE
    transport = accelerator.wrap(model, keep_last=0, in_flight=1, host_limit=limit)
    for each in (model, twin):
        put_under_pressure(each, accelerator, contextlib.nullcontext)
    assert_equal(learned(model, given), learned(twin, same))
    assert transport.num_sent == num_inputs
    assert model.blocks[0].__dict__["_recompute"].offloader.pool.peak_bytes <= limit


def test_unusual_shapes_strides_and_types_are_restored(accelerator: Accelerator) -> None:
    offloader = accelerator.offloader(keep_last=0, in_flight=1)
    torch.manual_seed(0)

    def computed(*shape: int) -> Tensor:
        return torch.randn(shape, device=DEVICE).requires_grad_() * 1

    base = computed(7, 11, 13)
    tensors = [
        base, base.permute(2, 0, 1), base[:, None], computed(1), computed(), computed(0, 3), computed(4097),
        computed(3, 5, 7, 9).to(memory_format=torch.channels_last), base.expand(2, 7, 11, 13), base[:, ::2],
        base[1:, 2:, 3:], base.to(torch.complex64), base.double().transpose(0, 1), base.half(), base.bfloat16(),
    ]  # fmt: skip
    expected = [(tensor.detach().clone(), tensor.stride()) for tensor in tensors]
    packed = [offloader.pack(tensor) for tensor in tensors]
    del tensors
    overwrite_freed_memory(computed(7, 11, 13))
    for held, (value, stride) in reversed([*zip(packed, expected, strict=True)]):
        found = offloader.unpack(held)
        assert torch.equal(found, value)
        assert (found.stride(), found.dtype, found.device) == (stride, value.dtype, value.device)


@pytest.mark.parametrize("width", [1, 3, 257, 1000])
def test_unusual_widths_train_to_the_same_values(accelerator: Accelerator, width: int) -> None:
    def build() -> Model:
        torch.manual_seed(0)
        blocks = [nn.Sequential(nn.Linear(width, width), nn.Dropout(0.2), nn.GELU()) for _ in range(5)]
        return Model(blocks).to(DEVICE)  # type: ignore[arg-type]

    model, twin = build(), build()
    accelerator.wrap(model, keep_last=0, in_flight=1)
    given = noise(13, width).to(DEVICE)
    assert_equal(learned(model, given), learned(twin, given))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_training_with_autocast_and_a_loss_scaler_is_the_same(accelerator: Accelerator, dtype: torch.dtype) -> None:
    outcomes = []
    for is_wrapped in (True, False):
        model, given = made("dropout", DEVICE)
        if is_wrapped:
            accelerator.wrap(model, keep_last=0, in_flight=1)
        optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
        before = [p.detach().clone() for p in model.parameters()]
        scaler = torch.amp.GradScaler(DEVICE.type, init_scale=2.0**22, growth_interval=3)  # in fp16 it skips some steps
        losses = []
        for step in range(12):
            torch.manual_seed(step)
            with torch.autocast(DEVICE.type, dtype):
                loss = total(model(given))
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
            losses.append(loss.detach())
        outcomes.append([*losses, *(p.detach() for p in model.parameters()), torch.tensor(scaler.get_scale())])
        assert not any(torch.equal(p, was) for p, was in zip(model.parameters(), before, strict=True))
    has_skipped = bool(outcomes[0][-1] < 2.0**26)  # 12 steps, growing every third
    assert has_skipped is (dtype is torch.float16)
    assert_equal(*outcomes)


@pytest.mark.parametrize("how", ["recomputed", "offloaded"])
@pytest.mark.parametrize("case", ["dropout", "batch norm", "nested", "attention"])
def test_two_backward_passes_give_the_same_gradients(accelerator: Accelerator, case: str, how: str) -> None:
    found = []
    for is_wrapped in (True, False):
        model, given = made(case, DEVICE)
        if is_wrapped:
            wrap(accelerator, model, how, keep_last=0, in_flight=1)
        torch.manual_seed(1)
        loss = total(model(given))
        parameters = list(model.parameters())
        twice = [torch.autograd.grad(loss, parameters, retain_graph=True, allow_unused=True) for _ in range(2)]
        found += [[grad for grad in grads if grad is not None] for grads in twice]
    for grads in found[1:]:
        assert_equal(grads, found[0])


@pytest.mark.parametrize("how", ["recomputed", "offloaded"])
def test_two_live_graphs_in_either_order(accelerator: Accelerator, how: str) -> None:
    found = []
    for order, is_wrapped in itertools.product([(0, 1), (1, 0)], [True, False]):
        model, given = large_model()
        if is_wrapped:
            wrap(accelerator, model, how, keep_last=0, in_flight=1)
        torch.manual_seed(1)
        losses = [total(model(given * scale)) for scale in (1.0, 0.5)]
        for index in order:
            losses[index].backward()
        found.append([p.grad for p in model.parameters()])
    assert_equal(found[0], found[1])
    assert_equal(found[2], found[3])


def test_a_forward_without_backward_returns_its_memory(accelerator: Accelerator) -> None:
    model, given = large_model()
    twin, same = large_model()
    accelerator.wrap(model, keep_last=1, in_flight=1)
    for each in (model, twin):
        put_under_pressure(each, accelerator, contextlib.nullcontext)
    learned(model, given)
    accelerator.check()
    before = torch.cuda.memory_allocated() if HAS_GPU else 0
    for _ in range(5):
        model(given)
    accelerator.check()
    after = torch.cuda.memory_allocated() if HAS_GPU else 0
    assert after - before <= 3 * 4 * SIZE  # copies still under way, found done at the next call
    assert_equal(learned(model, given), learned(twin, same))


def test_a_generator_of_the_device_that_a_block_holds_is_replayed(accelerator: Accelerator) -> None:
    class Noisy(Mlp):
        def __init__(self) -> None:
            super().__init__()
            self.generator = torch.Generator(DEVICE).manual_seed(3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) * torch.rand(x.shape, generator=self.generator, device=x.device)

    outcomes = []
    for is_wrapped in (True, False):
        torch.manual_seed(0)
        model = Model([Noisy() for _ in range(3)]).to(DEVICE)
        if is_wrapped:
            accelerator.wrap(model, keep_last=0, in_flight=1)
        found = learned(model, noise().to(DEVICE).requires_grad_())
        outcomes.append([*found, *(block.generator.get_state() for block in model.blocks)])
    assert_equal(*outcomes)


@needs_gpu
def test_dropout_of_cudnn_is_rejected() -> None:
    torch.manual_seed(0)
    model = Model([nn.LSTM(WIDTH, WIDTH, 2, dropout=0.5) for _ in range(2)]).to(DEVICE)
    with pytest.raises(ValueError, match=r"blocks.0: cuDNN draws the dropout of this LSTM"):
        unsloth.apply(model, ["blocks.*"])
    with torch.backends.cudnn.flags(enabled=False):
        assert list(unsloth.apply(model, ["blocks.*"]).modules) == ["blocks.0", "blocks.1"]


@needs_gpu
@pytest.mark.parametrize("how", ["recomputed", "offloaded"])
def test_an_lstm_without_dropout_trains_to_the_same_values(accelerator: Accelerator, how: str) -> None:
    def build() -> Model:
        torch.manual_seed(0)
        blocks = [nn.LSTM(WIDTH, WIDTH, 2, batch_first=True) for _ in range(3)]
        return Model(blocks, lambda block, x: block(x)[0]).to(DEVICE)  # type: ignore[arg-type]

    model, twin = build(), build()
    wrap(accelerator, model, how, keep_last=0, in_flight=1)
    given = noise(3, 5, WIDTH).to(DEVICE).requires_grad_()
    assert_equal(learned(model, given), learned(twin, given))


@needs_gpu
@pytest.mark.parametrize("offload", ["never", "always"])
def test_blocks_captured_in_a_cuda_graph_replay_the_same_numbers(accelerator: Accelerator, offload: str) -> None:
    """The blocks are run as they are, and each says so once."""
    outcomes = []
    for is_wrapped in (False, True):
        torch.manual_seed(0)
        model = Model([Mlp() for _ in range(4)]).to(DEVICE)
        if is_wrapped:
            unsloth.apply(model, ["blocks.*"], offload=offload, min_bytes=0, keep_last=0)
        given = noise().to(DEVICE)
        with accelerator.other_stream():  # torch asks for some passes before a capture, on another stream
            for _ in range(3):
                learned(model, given)
        model.zero_grad()
        gc.collect()  # what is freed during a capture would break it
        graph = torch.cuda.CUDAGraph()
        with warnings.catch_warnings(record=True) as caught, torch.cuda.graph(graph):
            warnings.simplefilter("always")
            loss = total(model(given))
            loss.backward()
        said = [str(each.message) for each in caught if "captured in a CUDA graph" in str(each.message)]
        assert [line.partition(":")[0] for line in said] == [f"blocks.{i}" for i in range(4)] * is_wrapped
        graph.replay()
        torch.cuda.synchronize()
        outcomes.append([loss.detach().clone(), *(p.grad.clone() for p in model.parameters())])
    assert_equal(*outcomes)


class WithTail(Model):
    """Blocks, and a part behind them that was captured in a CUDA graph."""

    tail: Any  # set when it is captured; a value here would hide the module

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.tail(super().forward(x))
        return output


@needs_gpu
def test_a_captured_part_behind_offloaded_blocks_changes_nothing(accelerator: Accelerator) -> None:
    outcomes = []
    for is_wrapped in (False, True):
        torch.manual_seed(0)
        model = WithTail([Mlp() for _ in range(4)]).to(DEVICE)
        given = noise().to(DEVICE).requires_grad_()
        example = noise().to(DEVICE).requires_grad_()
        model.tail = torch.cuda.make_graphed_callables(Mlp().to(DEVICE), (example,))
        if is_wrapped:
            accelerator.wrap(model, keep_last=0, in_flight=1)
        outcomes.append([tensor.clone() for tensor in learned(model, given)])
    assert_equal(*outcomes)


@needs_gpu
@pytest.mark.parametrize("offload", ["always", "auto"])
def test_the_public_call_frees_memory_and_gives_the_same_numbers(accelerator: Accelerator, offload: str) -> None:
    kept, results = [], []
    for is_wrapped in (True, False):
        model, given = large_model(num_blocks=12)
        if is_wrapped:
            report = unsloth.apply(model, ["blocks.*"], offload=offload)
        for _ in range(6):
            results.append(learned(model, given))
        torch.cuda.synchronize()
        before = torch.cuda.memory_allocated()
        loss = total(model(given))
        torch.cuda.synchronize()
        kept.append(torch.cuda.memory_allocated() - before)
        loss.backward()
    for mine, theirs in zip(results[:6], results[6:], strict=True):
        assert_equal(mine, theirs)
    assert kept[0] < kept[1]
    if offload == "always":
        assert kept[0] <= 6 * 4 * SIZE  # of 12 inputs, the newest and two whose copies are under way; the output
    assert report.input_bytes


@needs_gpu
def test_auto_moves_the_inputs_of_heavy_blocks_only() -> None:
    class Heavy(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layers = nn.Sequential(*(nn.Linear(4096, 4096) for _ in range(8)))

        def forward(self, x: Tensor) -> Tensor:
            output: Tensor = self.layers(x)  # 2 x 8 x 4096 operations a number: far longer than its copy
            return output

    class Light(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.scale = nn.Parameter(torch.ones(()))

        def forward(self, x: Tensor) -> Tensor:
            return x * self.scale  # as long as the device's own memory takes: far shorter than its copy

    for block, is_moved in ((Heavy, True), (Light, False)):
        model = Model([block() for _ in range(4)]).to(DEVICE)
        report = unsloth.apply(model, ["blocks.*"], offload="auto")
        given = torch.randn(2048, 4096, device=DEVICE, requires_grad=True)
        for _ in range(8):
            model(given).sum().backward()
            torch.cuda.synchronize()
        middle = [report.blocks[f"blocks.{index}"] for index in (1, 2)]  # the first input is a leaf, the last stays
        assert [each.timer is not None and each.timer.is_worth_it for each in middle] == [is_moved] * 2


@needs_gpu
def test_saved_tensor_hooks_of_the_user_around_offloaded_blocks(accelerator: Accelerator) -> None:
    model, given = large_model()
    twin, same = large_model()
    accelerator.wrap(model, keep_last=0, in_flight=1)
    with saved_tensors_hooks(lambda tensor: (tensor.to("cpu"), tensor.device), lambda held: held[0].to(held[1])):
        found = learned(model, given)
    assert_equal(found, learned(twin, same))
