"""`runner.utils.unsloth.recompute`: a recomputation has the state of the forward, or an error names the block."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.utils import unsloth
from runner.utils.modules.generators import ObjectGenerators
from runner.utils.unsloth.recompute import block_of, wrap
from tests.block_cases import WIDTH, Mlp, Model, assert_equal, learned, noise, total

OUTSIDE = np.random.default_rng(0)  # of no module


def recomputed(model: Model, is_first: bool = False) -> Model:
    """Returns a copy with recomputed blocks, as in the first step of a run or in a later one."""
    model = copy.deepcopy(model)
    report = unsloth.apply(model, ["blocks.*"])
    if not is_first:
        skip_checks(report)
    return model


def skip_checks(report: unsloth.UnslothReport) -> None:
    """Makes blocks behave as in a later step than their first."""
    report.stop_counting()
    for block in report.blocks.values():
        block.is_verified = True


def outcome(model: Model, given: Tensor) -> list[Tensor]:
    """Returns the results of a training pass, and the numbers that Python and NumPy draw after it."""
    random.seed(0)
    np.random.seed(0)
    found = learned(model, given)
    after = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    return [*found, torch.tensor(after, dtype=torch.float64)]


class Drawing(Mlp):
    """A block that scales its output by random numbers drawn outside of torch."""

    def __init__(self, draw: Callable[[], float], num_draws: int = 1) -> None:
        super().__init__(0.2)
        self.draw, self.num_draws = draw, num_draws

    def forward(self, x: Tensor) -> Tensor:
        scale = sum(self.draw() for _ in range(self.num_draws))
        return torch.tanh(super().forward(x) * (1 + scale))


class Holding(Mlp):
    """A block that draws from its own generator."""

    def __init__(self, held: Any, draw: Callable[[Any], float]) -> None:
        super().__init__()
        self.held, self.draw_from = held, draw

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(super().forward(x) * (1 + self.draw_from(self.held)))


GLOBAL = {
    "random": random.random,
    "gauss": lambda: random.gauss(0, 1),
    "shuffle": lambda: float(random.sample(range(1000), 1)[0]),
    "rand": lambda: np.random.rand(),  # a copy of the function itself draws from a generator of its own
    "randn": lambda: np.random.randn(),
    "choice": lambda: float(np.random.choice(1000)),
}
HELD: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "Random": (lambda: random.Random(1), lambda held: held.random()),
    "Generator": (lambda: np.random.default_rng(1), lambda held: held.standard_normal()),
    "Generator in a list": (lambda: [np.random.default_rng(1)], lambda held: held[0].random()),
    "RandomState": (lambda: np.random.RandomState(1), lambda held: held.randn()),
    "torch in a dict": (
        lambda: {"noise": torch.Generator().manual_seed(1)},
        lambda held: torch.rand((), generator=held["noise"]).item(),
    ),
}


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("num_draws", [1, 700])  # the second makes a twister's key anew
@pytest.mark.parametrize("name", GLOBAL)
def test_what_a_block_draws_from_python_and_numpy_is_replayed(name: str, num_draws: int, is_first: bool) -> None:
    model = Model([Drawing(GLOBAL[name], num_draws) for _ in range(3)])
    given = noise().requires_grad_()
    assert_equal(outcome(recomputed(model, is_first), given), outcome(model, given))


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("name", HELD)
def test_what_a_block_draws_from_a_generator_that_it_holds_is_replayed(name: str, is_first: bool) -> None:
    make, draw = HELD[name]
    given, outcomes = noise().requires_grad_(), []
    for is_recomputed in (True, False):
        torch.manual_seed(0)
        model = Model([Holding(make(), draw) for _ in range(3)])  # a torch.Generator can't be copied
        if is_recomputed:
            report = unsloth.apply(model, ["blocks.*"])
            if not is_first:
                skip_checks(report)
        outcomes.append([*outcome(model, given), *outcome(model, given)])
    assert_equal(*outcomes)


def test_a_block_that_begins_to_draw_later_and_a_graph_that_is_retained() -> None:
    model = Model([Drawing(GLOBAL[name], 0) for name in ("rand", "random", "randn")])
    given, twin = noise().requires_grad_(), recomputed(model)
    for num_draws in (0, 3):
        for each in (*model.blocks, *twin.blocks):
            each.num_draws = num_draws
        assert_equal(outcome(twin, given), outcome(model, given))
    found = []
    for each in (model, twin):
        random.seed(1), np.random.seed(1), torch.manual_seed(1)
        loss = total(each(given))
        np.random.rand(5)  # what is drawn after the forward changes nothing
        found.append([torch.autograd.grad(loss, given, retain_graph=True)[0] for _ in range(2)])
    assert_equal(*found)


class Listing(Mlp):
    """A block that counts its calls in a list, where changes are not found."""

    def __init__(self) -> None:
        super().__init__()
        self.num_calls = [0]

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls[0] += 1
        return super().forward(x) * self.num_calls[0]


def test_what_can_not_be_replayed_is_found_in_the_first_step_and_the_block_is_named() -> None:
    for block in (Drawing(lambda: next(NUMBERS)), Listing()):
        model = recomputed(Model([Mlp(), block]), is_first=True)
        with pytest.raises(RuntimeError, match=r"blocks\.1: recomputing it gave another output than its forward"):
            total(model(noise())).backward()


NUMBERS = (OUTSIDE.random() for _ in itertools.count())  # no walk of objects sees into it


class Holder:
    """A plain object with a generator."""

    __slots__ = ("generator",)

    def __init__(self, generator: Any) -> None:
        self.generator = generator

    def draw(self) -> Tensor:
        return torch.from_numpy(self.generator.choice([-1.0, 1.0], WIDTH)).float()


class Augmented(Mlp):
    """A block that changes signs, drawn by a plain object, once this is enabled."""

    def __init__(self, noise: Any) -> None:
        super().__init__()
        self.noise, self.is_on = noise, True

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        return torch.tanh(x * self.noise.draw()) if self.is_on else torch.tanh(x)


def _closure(generator: Any) -> Any:
    return types.SimpleNamespace(draw=lambda: torch.from_numpy(generator.random(WIDTH)).float())


REACHED: dict[str, Callable[[], Any]] = {
    "slots": lambda: Holder(np.random.default_rng(3)),
    "RandomState": lambda: Holder(np.random.RandomState(3)),
    "Philox": lambda: Holder(np.random.Generator(np.random.Philox(3))),
    "RandomState of PCG64": lambda: Holder(np.random.RandomState(np.random.PCG64(3))),
    "closure": lambda: _closure(np.random.default_rng(3)),
    "global": lambda: types.SimpleNamespace(draw=lambda: torch.full((), OUTSIDE.standard_normal())),
}


def compare_steps(
    make: Callable[[], Model], change: Callable[[Model, int], object] = lambda *_: None, steps: int = 4
) -> Model:
    """Checks that a recomputed model equals the unwrapped one in each step; returns the recomputed one."""
    given, outcomes = noise().requires_grad_(), []
    state = OUTSIDE.bit_generator.state
    for is_recomputed in (False, True):
        OUTSIDE.bit_generator.state = state
        torch.manual_seed(0)
        model = make()  # a torch.Generator can't be copied
        report = unsloth.apply(model, ["blocks.*"]) if is_recomputed else None
        found = []
        for step in range(steps):
            change(model, step)
            found += outcome(model, given)
            if report is not None:
                report.stop_counting()
        outcomes.append(found)
    assert_equal(*outcomes)
    return model


@pytest.mark.parametrize("name", REACHED)
def test_a_generator_that_what_a_block_holds_refers_to_is_replayed(name: str) -> None:
    compare_steps(lambda: Model([Augmented(REACHED[name]()) for _ in range(3)]))


def test_a_block_that_begins_to_draw_in_a_later_step_from_a_plain_object() -> None:
    def begin(model: Model, step: int) -> None:
        for block in model.blocks:
            block.is_on = step >= 2

    compare_steps(lambda: Model([Augmented(Holder(np.random.default_rng(3))) for _ in range(3)]), begin)


def test_a_block_that_is_first_called_in_a_later_step() -> None:
    def begin(model: Model, step: int) -> None:
        model.call = lambda block, x: block(x) if step >= 2 or block is not model.blocks[1] else x

    compare_steps(lambda: Model([Augmented(Holder(np.random.default_rng(3))) for _ in range(3)]), begin)


def test_a_generator_that_is_replaced_between_steps() -> None:
    def replace(model: Model, step: int) -> None:
        if step in (0, 2):
            for seed, block in enumerate(model.blocks):
                block.noise = Holder(np.random.default_rng(seed)) if step else block.noise
                block.noise.generator = np.random.default_rng(seed + step)

    compare_steps(lambda: Model([Augmented(Holder(np.random.default_rng(3))) for _ in range(3)]), replace)


class Lazy(Mlp):
    """A block that makes its generator in the first forward that needs it."""

    def __init__(self, is_declared: bool) -> None:
        super().__init__()
        self.is_on = True
        if is_declared:
            self.generator: Any = None

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        if not self.is_on:
            return torch.tanh(x)
        if getattr(self, "generator", None) is None:
            self.generator = torch.Generator().manual_seed(5)
        return torch.tanh(x * torch.randn(WIDTH, generator=self.generator))


@pytest.mark.parametrize("is_declared", [True, False])
@pytest.mark.parametrize("first", [0, 2])
def test_a_generator_that_a_forward_makes_is_made_alike_when_it_is_recomputed(first: int, is_declared: bool) -> None:
    def begin(model: Model, step: int) -> None:
        for block in model.blocks:
            block.is_on = step >= first

    model = compare_steps(lambda: Model([Lazy(is_declared) for _ in range(3)]), begin)
    assert isinstance(model.blocks[0].generator, torch.Generator)


class Counting(Mlp):
    """A block that counts its calls in plain attributes."""

    num_calls = 0

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.last = 1.0, None
        self.dropout.label = "even"  # type: ignore[assignment]

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        self.scale *= 1.5
        x = super().forward(x).roll(self.num_calls, -1) * self.scale
        if self.dropout.label == "odd":
            x = torch.tanh(x)
        self.dropout.label = "odd" if self.dropout.label == "even" else "even"  # type: ignore[assignment]
        self.last = x.detach()
        return x


@pytest.mark.parametrize("num_calls", [1, 2])
def test_counts_in_plain_attributes_are_replayed_and_go_on_once_a_call(num_calls: int) -> None:
    def call(block: nn.Module, x: Tensor) -> Tensor:
        for _ in range(num_calls):
            x = block(x)
        return x

    model = compare_steps(lambda: Model([Counting(), Mlp(), Counting()], call))
    assert [block.num_calls for block in model.blocks if isinstance(block, Counting)] == [4 * num_calls] * 2


def test_an_attribute_that_is_set_and_cleared_again_and_again_ends_the_search_for_generators(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    num_searches = 0

    class Spy(ObjectGenerators):
        def __init__(self, **roots: Any) -> None:
            nonlocal num_searches
            num_searches += 1
            super().__init__(**roots)

    monkeypatch.setattr("runner.utils.unsloth.replay.ObjectGenerators", Spy)
    block = Augmented(Holder(np.random.default_rng(3)))
    block.mask = None
    wrap(block)
    for _ in range(30):
        block.mask = block.__dict__["mask"] or object()
        block(noise())
        block.mask = None
        block(noise())
    assert num_searches <= 10


def test_a_copy_of_a_block_replays_its_own_generator() -> None:
    model = Model([Augmented(Holder(np.random.default_rng(3))) for _ in range(2)])
    given = noise().requires_grad_()
    unsloth.apply(model, ["blocks.*"])
    learned(model, given)
    copied = copy.deepcopy(model)
    for _ in range(2):
        assert_equal(learned(copied, given), learned(model, given))


class Attending(nn.Module):
    """Passes one tensor three times to an inner block, which computes something else for three different tensors."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.attention = nn.LayerNorm(WIDTH), nn.MultiheadAttention(WIDTH, 2, 0.2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.norm(x)[None]
        return x + self.attention(hidden, hidden, value=hidden, need_weights=False)[0][0]


def test_a_tensor_that_is_given_several_times_to_a_block_in_a_block_is_one_tensor_again() -> None:
    model, given = Model([Attending() for _ in range(2)]), noise().requires_grad_()
    twin = recomputed(model, is_first=True)
    for block in twin.blocks:
        wrap(block.attention)  # type: ignore[arg-type]
    for _ in range(2):
        assert_equal(learned(twin, given), learned(model, given))


@dataclasses.dataclass
class Output:
    hidden: Tensor


HIDDEN: dict[str, Callable[[Tensor], Any]] = {  # what the 1-norm of the output doesn't show
    "signs": lambda x: x * (-1) ** next(CALLS),
    "places": lambda x: x.roll(next(CALLS), -1),
    "a complex output": lambda x: torch.complex(x, x) * next(CALLS),
    "a dataclass": lambda x: Output(x * next(CALLS)),
}
CALLS = itertools.count(1)  # no walk of objects sees into it


class Outputs(Mlp):
    def __init__(self, change: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.change = change

    def forward(self, x: Tensor) -> Any:
        return self.change(super().forward(x))


@pytest.mark.parametrize("name", HIDDEN)
def test_outputs_that_differ_in_signs_and_places_and_those_of_any_kind_are_compared(name: str) -> None:
    model = recomputed(Model([Mlp(), Outputs(HIDDEN[name])]), is_first=True)
    output = model(noise())
    with pytest.raises(RuntimeError, match=r"blocks\.1: recomputing it gave another output than its forward"):
        (output.hidden if isinstance(output, Output) else output).abs().square().sum().backward()


def test_a_block_is_checked_in_its_own_first_step_and_in_no_later_one() -> None:
    model = Model([Mlp(), Outputs(lambda x: x * SCALES.pop()), Mlp()])
    SCALES = [1.0] * 2
    model.call = lambda block, x: block(x) if isinstance(block, Mlp) and type(block) is Mlp else x
    report = unsloth.apply(model, ["blocks.*"])
    for _ in range(3):  # in which one block is skipped
        total(model(noise())).backward()
        report.stop_counting()
    assert [block.is_verified for block in report.blocks.values()] == [True, False, True]
    model.call = lambda block, x: block(x)
    SCALES += [1.0, 2.0]
    with pytest.raises(RuntimeError, match=r"blocks\.1: recomputing it gave another output"):
        total(model(noise())).backward()
    SCALES += [1.0, 1.0]
    total(model(noise())).backward()
    assert report.blocks["blocks.1"].is_verified


class Rrelu(Mlp):
    """Ends in an operation that fills a tensor only after autograd has saved it."""

    def __init__(self, inplace: bool = False, then: Callable[[Tensor], Tensor] = lambda x: x) -> None:
        super().__init__()
        self.rrelu, self.then = nn.RReLU(inplace=inplace), then

    def forward(self, x: Tensor) -> Tensor:
        return self.then(self.rrelu(super().forward(x)))


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("then", [lambda x: x, lambda x: x + 1, lambda x: x.T.contiguous().T, lambda x: x * 2, F.relu])
@pytest.mark.parametrize("inplace", [False, True])
def test_a_recomputation_ends_only_when_the_kept_noise_is_filled(
    inplace: bool, then: Callable[[Tensor], Tensor], is_first: bool
) -> None:
    model, given = Model([Rrelu(inplace, then) for _ in range(3)]), noise().requires_grad_()
    twin = recomputed(model, is_first)
    for _ in range(3):  # what was never written is not the same each time
        torch.rand(64, WIDTH)
        assert_equal(learned(twin, given), learned(model, given))


class Counted(nn.Module):
    """Counts the runs of the last operation of its block, which saves nothing."""

    def __init__(self, own: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.linear, self.own, self.num_runs = nn.Linear(WIDTH, WIDTH), own, 0

    def forward(self, x: Tensor) -> Tensor:
        x = self.own(self.linear(torch.tanh(x)))
        self.num_runs += 1
        return x


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_recomputation_ends_before_the_last_linear_is_computed_again(is_frozen: bool) -> None:
    block = Counted(lambda x: x + 1)
    block.linear.weight.requires_grad_(not is_frozen)
    wrap(block)
    block_of(block).is_counting, block_of(block).is_verified = False, True
    block(noise().requires_grad_()).sum().backward()
    assert block.num_runs == 1


class Masked(Counted):
    """Ends in an operation that saves an input that is not trained."""

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        x = torch.tanh(x) * self.own(mask)
        self.num_runs += 1
        return x


@pytest.mark.parametrize(
    ("view", "num_runs"), [(lambda mask: mask, 1), (lambda mask: mask[:1], 1), (lambda mask: mask + 0, 2)]
)
def test_an_input_is_known_to_be_filled_and_a_tensor_made_meanwhile_is_not(
    view: Callable[[Tensor], Tensor], num_runs: int
) -> None:
    block = Masked(view)
    wrap(block)
    block_of(block).is_counting, block_of(block).is_verified = False, True
    for keywords in ({}, {"mask": torch.rand(3, WIDTH)}):
        given = [noise(3, WIDTH).requires_grad_(), *([] if keywords else [torch.rand(3, WIDTH)])]
        block.num_runs = 0
        block(*given, **keywords).sum().backward()
        assert block.num_runs == num_runs


class Embedding(nn.Module):
    def __init__(self, kind: type[nn.Module] = nn.Embedding) -> None:
        super().__init__()
        self.embedding, self.linear = kind(10, WIDTH, max_norm=0.5), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.embedding(x)).tanh()


@pytest.mark.parametrize("is_first", [True, False])
@pytest.mark.parametrize("scale", [1, 1000])  # rows of the second are not shortened the same when it is done again
@pytest.mark.parametrize("kind", [nn.Embedding, nn.EmbeddingBag])
def test_an_embedding_with_max_norm_is_renormalized_once(kind: type[nn.Module], scale: int, is_first: bool) -> None:
    torch.manual_seed(0)
    model = Model([Embedding(kind)])
    with torch.no_grad():
        model.blocks[0].embedding.weight.mul_(scale)  # type: ignore[union-attr]
    twin, indices = recomputed(model, is_first), torch.tensor([[1, 2, 3], [3, 3, 9]])
    for _ in range(2):
        assert_equal(learned(twin, indices), learned(model, indices))
        assert_equal(list(twin.parameters()), list(model.parameters()))
        assert twin.blocks[0].embedding.max_norm == 0.5  # type: ignore[union-attr]


class Shared(nn.Module):
    def __init__(self, embedding: nn.Embedding) -> None:
        super().__init__()
        self.embedding = embedding

    def forward(self, given: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        x, indices = given
        return torch.tanh(x + self.embedding(indices)), indices.roll(1)


def test_an_embedding_with_max_norm_that_blocks_share() -> None:
    torch.manual_seed(0)
    embedding = nn.Embedding(10, WIDTH, max_norm=0.5)
    model = Model([Shared(embedding) for _ in range(3)])
    given = noise(4, WIDTH).requires_grad_(), torch.tensor([1, 2, 3, 4])
    twin = recomputed(model)
    found = []
    for each in (twin, model):
        loss = each(given)[0].square().sum()
        loss.backward()
        found.append([loss, *(parameter.grad for parameter in each.parameters()), *each.parameters()])
    assert_equal(*found)


class Clamping(Mlp):
    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            self.wide.weight.clamp_(-0.1, 0.1)
        return super().forward(x)


def test_a_forward_that_changes_a_parameter_in_place_is_refused_by_name() -> None:
    model = recomputed(Model([Mlp(), Clamping()]))
    with pytest.raises(RuntimeError, match=r"blocks\.1: its forward has modified the parameter 'weight' of Linear"):
        model(noise())


class Limited(Mlp):
    """Renormalizes rows of its output; its attribute for the limit has the name that an embedding uses."""

    def __init__(self) -> None:
        super().__init__()
        self.max_norm = 1.5

    def forward(self, x: Tensor) -> Tensor:
        x = super().forward(x)
        limit = self.max_norm or float("inf")
        return torch.tanh(x * (limit / x.norm(dim=-1, keepdim=True)).clamp(max=1))


@pytest.mark.parametrize("is_first", [True, False])
def test_an_attribute_called_max_norm_of_another_module_is_left_alone(is_first: bool) -> None:
    model, given = Model([Limited() for _ in range(3)]), noise().requires_grad_()
    assert_equal(learned(recomputed(model, is_first), given), learned(model, given))


class Constrained(nn.Linear):
    """Renormalizes the rows of its weight in each forward, as in EEGNet."""

    def __init__(self) -> None:
        super().__init__(WIDTH, WIDTH)
        self.max_norm = 0.5

    def forward(self, x: Tensor) -> Tensor:
        self.weight.data = torch.renorm(self.weight.data, 2, 0, self.max_norm)
        return super().forward(x)


def test_a_forward_that_puts_other_values_into_a_parameter_is_refused_by_name() -> None:
    model = recomputed(Model([Mlp(), nn.Sequential(Constrained(), nn.Tanh())]), is_first=True)
    with pytest.raises(
        RuntimeError, match=r"blocks\.1: .* parameter 'weight' of Constrained by an assignment to its data"
    ):
        model(noise())


class Lookup(nn.Module):
    """Renormalizes the rows of its table by a function, which no module attribute shows."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.ones(4, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return x + nn.functional.embedding(torch.tensor([1]), self.table, max_norm=1.0)


def test_a_lookup_that_shortens_rows_is_refused_with_the_module_that_does_it_once() -> None:
    message = r"parameter 'table' of Lookup .*; use torch\.nn\.Embedding\(max_norm=\.\.\.\) where .* with exclude"
    with pytest.raises(RuntimeError, match=message):
        recomputed(Model([Lookup()]))(noise())


@pytest.mark.parametrize("change", [lambda model: model.eval(), lambda model: model.blocks[1].dropout.eval()])
def test_a_mode_changed_between_forward_and_backward_names_the_block(change: Callable[[Model], Any]) -> None:
    model = recomputed(Model([Mlp(), Mlp(0.5)]))
    loss = total(model(noise()))
    change(model)
    message = r"blocks\.1: .* was put into evaluation mode between its forward and its backward"
    with pytest.raises(RuntimeError, match=message):
        loss.backward()


def test_a_forward_in_evaluation_mode_and_one_that_sets_a_mode_itself_are_recomputed_as_they_were() -> None:
    class Setting(Mlp):
        def forward(self, x: Tensor) -> Tensor:
            self.dropout.eval()
            return super().forward(x)

    model, given = Model([Setting(0.5), Mlp(0.5)]), noise().requires_grad_()
    for each in (model, model.eval()):
        assert_equal(learned(recomputed(each), given), learned(each, given))
