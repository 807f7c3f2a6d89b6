"""The samplers: the order is a pure function of settings, seed, epoch and position."""

import copy
import itertools
import json
import pickle
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader

from runner.utils.sampler import BatchedOrderedSampler, OrderedSampler, PoolSampler, RandomSampler
from runner.utils.sampler import permutation as permutation_module
from runner.utils.sampler import samplers as sampler_module

LENGTHS = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8, 9, 7, 9, 3]
MAKERS: dict[str, Callable[[int, int], Any]] = {
    "ordered": lambda length, seed: OrderedSampler(length),
    "random": lambda length, seed: RandomSampler(length, seed=seed),
    "replacement": lambda length, seed: RandomSampler(length, seed=seed, replacement=True),
    "pool": lambda length, seed: PoolSampler([f"v{i}" for i in range(length)], seed=seed),
    "batched": lambda length, seed: BatchedOrderedSampler(
        (LENGTHS * length)[:length], max_cost=18, shuffle=True, seed=seed
    ),
    "batched_unshuffled": lambda length, seed: BatchedOrderedSampler(
        (LENGTHS * length)[:length], max_size=3, seed=seed
    ),
}
SHUFFLED = ["random", "replacement", "pool", "batched"]
any_maker = pytest.mark.parametrize("make", MAKERS.values(), ids=MAKERS.keys())


def take(sampler: Any, count: int) -> list[Any]:
    """Takes items across epochs, and abandons each iterator as soon as it has enough."""
    taken: list[Any] = []
    while len(taken) < count:
        taken += itertools.islice(iter(sampler), count - len(taken))
    return taken


@any_maker
@settings(max_examples=60, deadline=None)
@given(length=st.integers(1, 200), seed=st.integers(-5, 2**63), data=st.data())
def test_resume_at_any_split_yields_the_remaining_items(
    make: Callable[..., Any], length: int, seed: int, data: st.DataObject
) -> None:
    whole, first, second = (make(length, seed) for _ in range(3))
    total = 3 * len(whole)
    split = data.draw(st.integers(0, total))
    expected = take(whole, total)
    assert take(first, split) == expected[:split]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert take(second, total - split) == expected[split:]
    assert take(first, total - split) == expected[split:]


@any_maker
@settings(max_examples=40, deadline=None)
@given(length=st.integers(1, 200), counts=st.lists(st.integers(0, 150), max_size=6), data=st.data())
def test_items_taken_in_any_portions_are_those_of_iteration(
    make: Callable[..., Any], length: int, counts: list[int], data: st.DataObject
) -> None:
    one, other = make(length, 7), make(length, 7)
    for count in counts:
        kind = data.draw(st.sampled_from(["take", "iterate", "move"]))
        if kind == "move":
            state = one.state_dict() | {"epoch": data.draw(st.integers(0, 3)), "position": count % (len(one) + 1)}
            one.load_state_dict(state)
            other.load_state_dict(state)
        else:
            expected = take(other, count)
            assert (one.take(count) if kind == "take" else take(one, count)) == expected
        assert one.state_dict() == other.state_dict()


def test_nothing_can_be_taken_from_an_empty_sampler() -> None:
    with pytest.raises(ValueError, match="expected items in an epoch"):
        OrderedSampler(0).take(1)


@any_maker
def test_a_block_boundary_does_not_show_in_the_order(make: Callable[..., Any]) -> None:
    length = 3000
    whole = list(make(length, 7))
    for split in (1, 63, 64, 65, 320, 1343, 1344, 1345, len(whole) - 1):
        split = min(split, len(whole) - 1)
        resumed = make(length, 7)
        resumed.load_state_dict({**resumed.state_dict(), "position": split})
        assert list(resumed) == whole[split:]


@any_maker
def test_an_item_counts_once_it_is_yielded(make: Callable[..., Any]) -> None:
    sampler, resumed = make(20, 0), make(20, 0)
    items = iter(sampler)
    next(items)
    second = next(items)
    state = sampler.state_dict()
    assert state["position"] == 2
    resumed.load_state_dict(state)
    third = next(iter(resumed))
    assert third == next(items)
    assert third != second or make is MAKERS["replacement"]


@any_maker
def test_the_state_after_the_last_item_resumes_with_the_next_epoch(make: Callable[..., Any]) -> None:
    sampler, resumed = make(20, 3), make(20, 3)
    items = iter(sampler)
    for _ in range(len(sampler)):
        next(items)
    state = sampler.state_dict()
    assert (state["epoch"], state["position"]) == (1, 0)
    assert next(items, "end") == "end"
    resumed.load_state_dict(state)
    assert list(resumed) == list(sampler) != []


@any_maker
def test_a_state_at_the_very_end_of_an_epoch_is_the_start_of_the_next(make: Callable[..., Any]) -> None:
    sampler = make(20, 3)
    sampler.load_state_dict({**sampler.state_dict(), "position": len(sampler)})
    assert sampler.state_dict()["epoch"] == 1
    assert len(list(sampler)) == len(sampler)


@any_maker
def test_state_is_a_small_snapshot_of_plain_values(make: Callable[..., Any]) -> None:
    sampler = make(200, np.int64(3))
    before = sampler.state_dict()
    kept = copy.deepcopy(before)
    take(sampler, 5)
    assert before == kept
    before["position"] = 99
    assert sampler.state_dict()["position"] == 5
    assert len(json.dumps(before)) < 1024
    assert {type(value) for value in before.values()} <= {int, str, bool, float, type(None)}


@any_maker
def test_the_next_iterator_continues_an_abandoned_one(make: Callable[..., Any]) -> None:
    sampler, whole = make(50, 1), list(make(50, 1))
    head = [item for item, _ in zip(sampler, range(3), strict=False)]
    # zip takes a fourth item before it sees the end of its second argument.
    assert head == whole[:3]
    assert list(sampler) == whole[4:]


@any_maker
def test_two_live_iterators_share_one_position(make: Callable[..., Any]) -> None:
    sampler, whole = make(90, 1), list(make(90, 1))
    left, right = iter(sampler), iter(sampler)
    alternating = [next(left if i % 2 else right) for i in range(len(whole))]
    assert alternating == whole


@any_maker
def test_a_live_iterator_follows_a_loaded_position(make: Callable[..., Any]) -> None:
    sampler, whole = make(90, 1), list(make(90, 1))
    items = iter(sampler)
    state = sampler.state_dict()
    next(items), next(items)
    sampler.load_state_dict(state)
    assert next(items) == whole[0]
    sampler.load_state_dict({**state, "epoch": 5})
    assert next(items, "end") == "end"
    assert sampler.state_dict()["position"] == 0


@any_maker
def test_a_length_of_zero_yields_nothing(make: Callable[..., Any]) -> None:
    sampler = make(0, 0)
    assert len(sampler) == 0
    assert list(sampler) == list(sampler) == []
    assert (sampler.state_dict()["epoch"], sampler.state_dict()["position"]) == (0, 0)
    sampler.load_state_dict(sampler.state_dict())


@any_maker
def test_a_sampler_survives_pickling_in_the_middle(make: Callable[..., Any]) -> None:
    sampler = make(50, 1)
    take(sampler, 7)
    assert list(pickle.loads(pickle.dumps(sampler))) == list(sampler)


@pytest.mark.parametrize("name", SHUFFLED)
def test_epochs_and_seeds_give_different_orders(name: str) -> None:
    sampler = MAKERS[name](300, 0)
    orders = [
        list(sampler),
        list(sampler),
        *(list(MAKERS[name](300, seed)) for seed in (1, 2, -1, 2**32, 2**63)),
    ]
    assert len({str(order) for order in orders}) == len(orders)
    assert orders[0] == list(MAKERS[name](300, 0))


@pytest.mark.parametrize("make", [RandomSampler, PoolSampler])
def test_every_length_up_to_2000_is_permuted(make: Callable[..., Any]) -> None:
    for length in range(1, 2001):
        assert sorted(make(length, seed=length)) == list(range(length))


def test_the_network_permutes_every_length_that_is_usually_sorted(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(permutation_module, "_LARGEST_SORTED", 2)
    for length in range(3, 1100):
        assert sorted(RandomSampler(length, seed=length)) == list(range(length))


@pytest.mark.parametrize("length", [2, 3, 4])
def test_every_order_of_few_items_is_about_as_frequent(length: int) -> None:
    num_seeds = 6000
    counts = Counter(tuple(RandomSampler(length, seed=seed)) for seed in range(num_seeds))
    orders = list(itertools.permutations(range(length)))
    expected = num_seeds / len(orders)
    chi_square = sum((counts[order] - expected) ** 2 / expected for order in orders)
    assert chi_square < len(orders) - 1 + 5 * (2 * (len(orders) - 1)) ** 0.5


@pytest.mark.parametrize("length", [7, 16, 1030])
def test_every_item_is_as_likely_at_every_position(length: int) -> None:
    num_epochs, num_cells = 800, min(length, 20)
    counts = np.zeros((num_cells, num_cells))
    cells = np.arange(length) * num_cells // length
    sampler = RandomSampler(length, seed=11)
    for _ in range(num_epochs):
        np.add.at(counts, (cells, cells[list(sampler)]), 1)
    sizes = np.bincount(cells)
    expected = num_epochs * np.outer(sizes, sizes) / length
    freedom = (num_cells - 1) ** 2
    chi_square = float(((counts - expected) ** 2 / expected).sum())
    assert abs(chi_square - freedom) < 5 * (2 * freedom) ** 0.5


@pytest.mark.parametrize("length", [1000, 10**6, 10**9, 2**62])
def test_neighbours_epochs_and_seeds_are_uncorrelated(length: int) -> None:
    def head(seed: int, epoch: int) -> np.ndarray[Any, Any]:
        sampler = RandomSampler(length, seed=seed)
        sampler.load_state_dict({**sampler.state_dict(), "epoch": epoch})
        return np.array(list(itertools.islice(sampler, min(length, 50_000))), dtype=np.float64)

    one = head(0, 0)
    pairs = [(one[:-1], one[1:]), (one, head(0, 1)), (one, head(1, 0)), (one, np.arange(len(one)))]
    for left, right in pairs:
        assert abs(np.corrcoef(left, right)[0, 1]) < 5 / len(left) ** 0.5


@pytest.mark.parametrize("make", [RandomSampler, PoolSampler])
@pytest.mark.parametrize("length", [10**9, 2**62])
def test_any_position_of_a_huge_epoch_is_reached_at_once(make: Callable[..., Any], length: int) -> None:
    sampler = make(length, seed=3)
    heads = []
    for position in (0, length // 2, length - 3):
        sampler.load_state_dict({**sampler.state_dict(), "epoch": 0, "position": position})
        heads += list(itertools.islice(sampler, 3))
    assert len(set(heads)) == 9
    assert all(0 <= index < length for index in heads)
    assert sampler.state_dict()["epoch"] == 1


def test_replacement_repeats_indices_and_spreads_them_evenly() -> None:
    draws = Counter(
        RandomSampler(50, seed=seed, replacement=True) and i
        for seed in range(400)
        for i in RandomSampler(50, seed=seed, replacement=True)
    )
    assert set(draws) == set(range(50))
    chi_square = sum((draws[i] - 400) ** 2 / 400 for i in range(50))
    assert abs(chi_square - 49) < 5 * (2 * 49) ** 0.5
    assert len(set(RandomSampler(50, replacement=True))) < 50


def test_the_ordered_sampler_counts_up_in_every_epoch() -> None:
    sampler = OrderedSampler(5)
    assert [*sampler, *sampler] == [0, 1, 2, 3, 4] * 2


class TestPool:
    def test_iterating_ends_when_the_bag_is_empty_and_holds_every_value_once(self) -> None:
        values = ["a", "a", None, 2.5, ("t",)]
        pool = PoolSampler(values)
        for _ in range(3):
            assert Counter(pool) == Counter(values)

    @settings(max_examples=50, deadline=None)
    @given(st.lists(st.booleans(), max_size=120), st.integers(1, 40))
    def test_sampling_and_iterating_draw_from_the_same_bag(self, draws: list[bool], length: int) -> None:
        pool = PoolSampler(length, seed=4)
        drawn = [pool.sample() if by_sample else next(iter(pool)) for by_sample in draws]
        assert drawn == take(PoolSampler(length, seed=4), len(draws))

    def test_a_loop_that_also_samples_still_empties_the_bag(self) -> None:
        pool = PoolSampler(100)
        drawn = [pair for value in pool for pair in (value, pool.sample())]
        assert sorted(drawn) == list(range(100))

    def test_sample_refills_an_empty_bag_in_a_new_order(self) -> None:
        pool = PoolSampler(range(10, 40), seed=1)
        first, second = ([pool.sample() for _ in range(30)] for _ in range(2))
        assert sorted(first) == sorted(second) == list(range(10, 40))
        assert first != second

    def test_sample_goes_on_from_a_loaded_state(self) -> None:
        pool, resumed = PoolSampler(5000, seed=1), PoolSampler(5000, seed=1)
        for _ in range(777):
            pool.sample()
        state = pool.state_dict()
        expected = [pool.sample() for _ in range(5000)]
        resumed.sample()
        resumed.load_state_dict(state)
        assert [resumed.sample() for _ in range(5000)] == expected
        pool.load_state_dict(state)
        assert [pool.sample() for _ in range(5000)] == expected

    def test_a_bag_without_values_can_not_be_sampled(self) -> None:
        with pytest.raises(IndexError, match="built without any"):
            PoolSampler([]).sample()

    def test_a_list_that_changes_later_does_not_change_the_bag(self) -> None:
        values = [1, 2, 3]
        pool = PoolSampler(values)
        values.clear()
        assert sorted(pool) == [1, 2, 3]

    @pytest.mark.parametrize("values", [np.arange(6), torch.arange(6), "abcdef", range(6), np.int64(6)])
    def test_any_sequence_is_a_bag(self, values: Any) -> None:
        assert len(set(map(str, PoolSampler(values)))) == 6


def naive_batches(lengths: list[float], max_size: int | None, max_cost: float | None, cost: str) -> list[list[int]]:
    """The specification taken literally: a batch ends before the item that would exceed a limit."""
    batches: list[list[int]] = []
    for i, length in enumerate(lengths):
        if batches:
            joined = [lengths[j] for j in batches[-1]] + [length]
            total = max(joined) * len(joined) if cost == "padded" else sum(joined)
            if len(joined) <= (max_size or len(joined)) and total <= (max_cost or total):
                batches[-1].append(i)
                continue
        batches.append([i])
    return batches


class TestBatched:
    @settings(max_examples=300, deadline=None)
    @given(
        lengths=st.one_of(
            st.lists(st.integers(0, 30), max_size=60),
            st.lists(st.sampled_from([0.0, 0.1, 0.2, 0.3, 0.7, 1.1, 29.9, 1e-300]), max_size=60),
        ),
        max_size=st.none() | st.integers(1, 70),
        max_cost=st.none() | st.sampled_from([0.3, 0.6, 1, 7, 30, 30.5, 100, 10**6]),
        cost=st.sampled_from(["padded", "sum"]),
    )
    def test_batches_are_those_of_the_definition(
        self, lengths: list[float], max_size: int | None, max_cost: float | None, cost: Any
    ) -> None:
        if max_size is None and max_cost is None:
            max_size = 4
        options: dict[str, Any] = {"max_size": max_size, "max_cost": max_cost, "cost": cost}
        batches = list(BatchedOrderedSampler(lengths, **options, oversized="single"))
        assert batches == naive_batches(lengths, max_size, max_cost, cost)

    @pytest.mark.parametrize("cost", ["padded", "sum"])
    def test_packing_does_not_depend_on_its_chunks(self, cost: Any, monkeypatch: pytest.MonkeyPatch) -> None:
        lengths = np.random.default_rng(0).integers(1, 50, 2000)
        whole = list(BatchedOrderedSampler(lengths, max_cost=300, cost=cost))
        monkeypatch.setattr(sampler_module, "_CHUNK", 7)
        assert list(BatchedOrderedSampler(lengths, max_cost=300, cost=cost)) == whole

    def test_padded_cost_counts_the_new_item_as_the_longest(self) -> None:
        lengths = [1] * 9 + [91]
        assert list(BatchedOrderedSampler(lengths, max_cost=100)) == [list(range(9)), [9]]
        assert list(BatchedOrderedSampler(lengths, max_cost=100, cost="sum")) == [list(range(10))]

    def test_a_limit_on_items_alone_is_enough(self) -> None:
        assert list(BatchedOrderedSampler([5, 5, 5, 5, 5], max_size=2)) == [[0, 1], [2, 3], [4]]

    def test_an_oversized_item_is_an_error_that_names_it(self) -> None:
        with pytest.raises(ValueError, match=r"lengths\[2\]=120.0: expected 0 <= length <= 100.*oversized"):
            BatchedOrderedSampler([1, 100, 120, 3], max_cost=100)

    @pytest.mark.parametrize("cost", ["padded", "sum"])
    def test_an_oversized_item_is_a_batch_of_its_own_by_choice(self, cost: Any) -> None:
        sampler = BatchedOrderedSampler([120, 1, 0, 120, 120, 0, 2], max_cost=100, cost=cost, oversized="single")
        assert list(sampler) == [[0], [1, 2], [3], [4], [5, 6]]

    @pytest.mark.parametrize(
        ("lengths", "options", "num_left"),
        [
            ([1] * 10, {"max_size": 5}, 2),
            ([1] * 11, {"max_size": 5}, 2),
            ([2] * 10, {"max_cost": 10}, 2),
            ([2] * 9, {"max_cost": 10}, 1),
            ([2, 2, 2, 2, 5], {"max_cost": 10}, 1),
            ([2, 2, 2, 2, 2, 5, 5], {"max_cost": 10}, 2),
            ([4, 6, 4, 5], {"max_cost": 10, "cost": "sum"}, 1),
            ([4, 6, 4, 6], {"max_cost": 10, "cost": "sum"}, 2),
            ([4, 60], {"max_cost": 10, "oversized": "single"}, 2),
            ([1] * 10, {"max_size": 10}, 1),
        ],
    )
    def test_drop_last_drops_exactly_a_last_batch_with_room(
        self, lengths: list[int], options: dict[str, Any], num_left: int
    ) -> None:
        kept = list(BatchedOrderedSampler(lengths, **options))
        assert list(BatchedOrderedSampler(lengths, **options, drop_last=True)) == kept[:num_left]

    @pytest.mark.parametrize("options", [{"max_size": 11}, {"max_cost": 11}, {"max_cost": 11, "cost": "sum"}])
    def test_drop_last_that_leaves_nothing_warns(self, options: dict[str, Any]) -> None:
        with pytest.warns(UserWarning, match="leaves nothing of 10 items"):
            sampler = BatchedOrderedSampler([1] * 10, **options, drop_last=True)
        assert list(sampler) == []

    def test_shuffle_moves_whole_batches(self) -> None:
        lengths = np.random.default_rng(0).integers(1, 50, 500)
        still, moved = (BatchedOrderedSampler(lengths, max_cost=200, shuffle=s) for s in (False, True))
        order = list(still)
        first, second = list(moved), list(moved)
        assert sorted(first) == sorted(second) == order
        assert len({str(first), str(second), str(order)}) == 3

    @pytest.mark.parametrize("kind", [list, np.array, torch.tensor, lambda v: np.array(v, dtype=np.float32)])
    def test_lengths_are_a_list_an_array_or_a_tensor(self, kind: Callable[..., Any]) -> None:
        expected = naive_batches(LENGTHS, None, 20, "padded")  # type: ignore[arg-type]
        assert list(BatchedOrderedSampler(kind(LENGTHS), max_cost=20)) == expected

    @pytest.mark.parametrize(
        ("lengths", "options", "error", "message"),
        [
            ([1], {}, ValueError, "max_size, max_cost or both, found neither"),
            ([1], {"max_size": 0}, ValueError, "max_size: expected an integer >= 1, found 0"),
            ([1], {"max_size": True}, TypeError, "max_size: expected an integer, found True"),
            ([1], {"max_size": 2.0}, TypeError, "max_size: expected an integer, found 2.0"),
            ([1], {"max_cost": 0}, ValueError, "max_cost: expected a finite number > 0, found 0"),
            ([1], {"max_cost": "9"}, ValueError, "max_cost: expected a finite number > 0, found '9'"),
            ([1], {"max_cost": float("nan")}, ValueError, "max_cost.*found nan"),
            ([1], {"max_size": 1, "cost": "max"}, ValueError, r"cost: expected one of \('padded', 'sum'\)"),
            ([1], {"max_size": 1, "oversized": "skip"}, ValueError, "oversized: expected one of"),
            ([1], {"max_size": 1, "shuffle": "false"}, ValueError, "shuffle: expected one of"),
            ([1], {"max_size": 1, "drop_last": 1}, ValueError, "drop_last: expected one of"),
            ([3, -1], {"max_size": 1}, ValueError, r"lengths\[1\]=-1.0: expected 0 <= length"),
            ([3, float("nan")], {"max_size": 1}, ValueError, r"lengths\[1\]=nan"),
            ([3, float("inf")], {"max_size": 1}, ValueError, r"lengths\[1\]=inf"),
            ([[1, 2]], {"max_size": 1}, TypeError, "expected a vector of numbers, found 2 axes"),
            (["a"], {"max_size": 1}, TypeError, "expected a vector of numbers"),
            ([True], {"max_size": 1}, TypeError, "expected a vector of numbers, found 1 axes of bool"),
        ],
    )
    def test_wrong_arguments_are_named(
        self, lengths: Any, options: dict[str, Any], error: type[Exception], message: str
    ) -> None:
        with pytest.raises(error, match=message):
            BatchedOrderedSampler(lengths, **options)

    @pytest.mark.parametrize(
        ("lengths", "change", "message"),
        [
            ([1] * 9, {}, r"length=10, .*length=9"),
            ([1] * 10, {"max_cost": 5}, r"max_cost=4.0, .*max_cost=5.0"),
            ([1] * 9 + [3], {}, "bounds_crc32"),
            ([1] * 10, {"shuffle": False}, "shuffle=True, .*shuffle=False"),
            ([1] * 10, {"seed": 2}, "seed=0, .*seed=2"),
        ],
    )
    def test_the_state_of_other_batches_is_refused(
        self, lengths: list[int], change: dict[str, Any], message: str
    ) -> None:
        options: dict[str, Any] = {"max_cost": 4, "shuffle": True}
        state = BatchedOrderedSampler([1] * 10, **options).state_dict()
        with pytest.raises(ValueError, match=message):
            BatchedOrderedSampler(lengths, **{**options, **change}).load_state_dict(state)


@pytest.mark.parametrize("make", [OrderedSampler, RandomSampler, PoolSampler])
@pytest.mark.parametrize(
    ("length", "error", "message"),
    [
        (-1, ValueError, "expected an integer >= 0, found -1"),
        (2**62 + 1, ValueError, "expected an integer <= 4611686018427387904"),
        (True, TypeError, "expected an integer, found True"),
        (3.0, TypeError, "expected an integer, found 3.0"),
        (None, TypeError, "expected an integer, found None"),
    ],
)
def test_a_wrong_length_is_named(make: Callable[..., Any], length: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"{make.__name__}.*{message}"):  # type: ignore[attr-defined]
        make(length)


@pytest.mark.parametrize("make", [RandomSampler, PoolSampler])
@pytest.mark.parametrize("seed", [True, 1.0, "1", None])
def test_a_wrong_seed_is_named(make: Callable[..., Any], seed: Any) -> None:
    with pytest.raises(TypeError, match="seed: expected an integer"):
        make(10, seed=seed)


@pytest.mark.parametrize("values", [{1, 2}, {0: "a"}, (i for i in range(3))])
def test_a_bag_without_an_order_is_refused(values: Any) -> None:
    with pytest.raises(TypeError, match="unless a sequence"):
        PoolSampler(values)


def test_a_wrong_replacement_is_named() -> None:
    with pytest.raises(ValueError, match="replacement: expected one of"):
        RandomSampler(10, replacement="no")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("make", "change", "error", "message"),
    [
        (lambda: RandomSampler(9), {}, ValueError, "length=10, this sampler has length=9"),
        (lambda: RandomSampler(10, seed=1), {}, ValueError, "seed=0, this sampler has seed=1"),
        (lambda: RandomSampler(10, replacement=True), {}, ValueError, "replacement=False"),
        (lambda: PoolSampler(10), {}, ValueError, "sampler='RandomSampler', .*sampler='PoolSampler'"),
        (lambda: RandomSampler(10), {"position": 11}, ValueError, "position: expected an integer <= 10"),
        (lambda: RandomSampler(10), {"position": -1}, ValueError, "position: expected an integer >= 0"),
        (lambda: RandomSampler(10), {"epoch": 1.5}, TypeError, "epoch: expected an integer, found 1.5"),
        (lambda: RandomSampler(10), {"epoch": None}, TypeError, "epoch: expected an integer, found None"),
        (lambda: RandomSampler(10), {"length": None}, ValueError, "length=None"),
    ],
)
def test_a_refused_state_says_both_values_and_moves_nothing(
    make: Callable[[], Any], change: dict[str, Any], error: type[Exception], message: str
) -> None:
    sampler = make()
    take(sampler, 3)
    before = sampler.state_dict()
    with pytest.raises(error, match=message):
        sampler.load_state_dict({**RandomSampler(10).state_dict(), "position": 5, **change})
    assert sampler.state_dict() == before


@pytest.mark.parametrize("name", ["ordered", "random", "pool"])
def test_a_plain_loader_takes_them_as_its_sampler(name: str) -> None:
    dataset = {f"v{i}": i for i in range(23)} if name == "pool" else list(range(23))
    sampler = MAKERS[name](23, 5)
    loader = DataLoader(dataset, sampler=sampler, batch_size=4)  # type: ignore[arg-type]
    assert len(loader) == 6
    epochs = [torch.cat(list(loader)).tolist() for _ in range(2)]
    twin = MAKERS[name](23, 5)
    assert epochs == [[dataset[i] for i in twin] for _ in range(2)]


def test_a_plain_loader_takes_batches_as_its_batch_sampler() -> None:
    sampler = MAKERS["batched"](40, 5)
    loader = DataLoader(list(range(40)), batch_sampler=sampler)  # type: ignore[arg-type]
    assert len(loader) == len(sampler)
    assert [batch.tolist() for batch in loader] == list(MAKERS["batched"](40, 5))


def test_samplers_leave_the_global_generators_alone() -> None:
    before = torch.get_rng_state(), np.random.get_state()[1].copy()  # type: ignore[index, union-attr]
    for make in MAKERS.values():
        take(make(50, 0), 60)
    assert torch.equal(torch.get_rng_state(), before[0])
    assert (np.random.get_state()[1] == before[1]).all()  # type: ignore[index]
