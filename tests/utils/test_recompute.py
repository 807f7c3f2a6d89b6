"""`runner.utils.recompute`: a block that is recomputed finds all that its forward depended on, or is named."""

from __future__ import annotations

import copy
import dataclasses
import itertools
import random
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from runner.utils import unsloth
from runner.utils.recompute import block_of, wrap
from tests.block_cases import WIDTH, Mlp, Model, assert_equal, learned, noise, total

OUTSIDE = np.random.default_rng(0)  # of no module


def recomputed(model: Model, is_first: bool = False) -> Model:
    """Returns a copy whose blocks are recomputed, as in a run's first step or later."""
    model = copy.deepcopy(model)
    report = unsloth.apply(model, ["blocks.*"])
    if not is_first:
        skip_checks(report)
    return model


def skip_checks(report: unsloth.Report) -> None:
    """Has blocks run as in a later step than their first."""
    report.stop_counting()
    for block in report.blocks.values():
        block.is_proven = True


def outcome(model: Model, given: Tensor) -> list[Tensor]:
    """Returns what a pass learns, and what Python and NumPy draw after it."""
    random.seed(0)
    np.random.seed(0)
    found = learned(model, given)
    after = [random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn()]
    return [*found, torch.tensor(after, dtype=torch.float64)]


class Drawing(Mlp):
    """Scales its output by numbers that it draws outside of torch."""

    def __init__(self, draw: Callable[[], float], num_draws: int = 1) -> None:
        super().__init__(0.2)
        self.draw, self.num_draws = draw, num_draws

    def forward(self, x: Tensor) -> Tensor:
        scale = sum(self.draw() for _ in range(self.num_draws))
        return torch.tanh(super().forward(x) * (1 + scale))


class Holding(Mlp):
    """Draws from a generator of its own."""

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


class Counting(Mlp):
    num_calls = 0

    def forward(self, x: Tensor) -> Tensor:
        self.num_calls += 1
        return super().forward(x) * self.num_calls


def test_what_can_not_be_replayed_is_found_in_the_first_step_and_the_block_is_named() -> None:
    for block in (Drawing(lambda: OUTSIDE.random()), Counting()):
        model = recomputed(Model([Mlp(), block]), is_first=True)
        with pytest.raises(RuntimeError, match=r"blocks\.1: recomputing it gave another output than its forward"):
            total(model(noise())).backward()


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
    assert [block.is_proven for block in report.blocks.values()] == [True, False, True]
    model.call = lambda block, x: block(x)
    SCALES += [1.0, 2.0]
    with pytest.raises(RuntimeError, match=r"blocks\.1: recomputing it gave another output"):
        total(model(noise())).backward()
    SCALES += [1.0, 1.0]
    total(model(noise())).backward()
    assert report.blocks["blocks.1"].is_proven


class Rrelu(Mlp):
    """Ends in an operation that fills what it keeps only after it has handed it to autograd."""

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
    """Counts how often the last operation of its block runs; it keeps nothing."""

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
    block_of(block).is_counting, block_of(block).is_proven = False, True
    block(noise().requires_grad_()).sum().backward()
    assert block.num_runs == 1


class Masked(Counted):
    """Ends in an operation that keeps a tensor which was given, and is not trained."""

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
    block_of(block).is_counting, block_of(block).is_proven = False, True
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
    """Shortens long rows of its output, and calls the limit as an embedding does."""

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
    """Shortens the rows of its weight in each forward, as in EEGNet."""

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
    """Shortens the rows of its table by a function, so that no module says so."""

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
