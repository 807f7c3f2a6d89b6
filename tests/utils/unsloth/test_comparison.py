"""`runner.utils.unsloth.comparison`: sums that distinguish two outputs, but not rounding."""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from runner.utils.unsloth.comparison import is_close, sums_of, tensors_of, tolerance_of

CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "signs": lambda x: x * (torch.randint(0, 2, x.shape, device=x.device) * 2 - 1),
    "negated": lambda x: -x,
    "permuted": lambda x: x[..., torch.randperm(x.shape[-1], device=x.device)],
    "rolled by one": lambda x: x.roll(1, -1),
    "rows rolled": lambda x: x.roll(1, 0),
    "transposed": lambda x: x.mT if x.shape[-1] == x.shape[-2] else x.flip(0),
    "scaled": lambda x: x * 1.01,
}
DTYPES = [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.complex64]


def is_same(one: Any, other: Any) -> bool:
    tolerance = tolerance_of([*tensors_of(one)])
    return all(is_close(*pair, tolerance) for pair in zip(sums_of(one), sums_of(other), strict=True))


SHAPES = [(2, 8), (300, 17), (4, 1 << 14)]  # part of a row, one row, several
LARGE = [((1 << 9, 1 << 14), torch.bfloat16), ((1 << 9, 1 << 14), torch.float32)]  # two pieces


@pytest.mark.parametrize(("shape", "dtype"), [*itertools.product(SHAPES, DTYPES), *LARGE], ids=str)
def test_signs_and_places_are_told_apart(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    x = torch.randn(shape, dtype=dtype)
    assert is_same(x, x.clone())
    for name, change in CHANGES.items():
        assert not is_same(x, change(x)), name


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rounding_is_no_difference(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    for size in (1 << 16, 1 << 20):
        x = torch.randn(size, dtype=torch.promote_types(dtype, torch.float64))
        moved = x * (1 + (torch.rand(size) - 0.5) * torch.finfo(dtype).eps * 1e-4)
        assert is_same(x.to(dtype), moved.to(dtype))


def test_a_sum_in_another_order_is_no_difference() -> None:
    torch.manual_seed(0)
    parts = torch.randn(64, 100_000)
    assert is_same(parts.sum(0), parts.flip(0).sum(0))
    assert is_same(parts.sum(0), sum(parts))


def test_autocast_and_a_coarse_dtype_set_the_tolerance_of_what_is_computed_with_them() -> None:
    x = torch.ones(2)
    assert tolerance_of([x]) == 1e-5
    assert tolerance_of([x, x.to(torch.float8_e4m3fn)]) == tolerance_of([x, x.bfloat16()]) == 2**-5
    with torch.autocast("cpu", torch.bfloat16):
        assert tolerance_of([x]) == 2**-5


@pytest.mark.parametrize("value", [float("inf"), -float("inf"), float("nan"), 1e30])
def test_numbers_that_are_not_finite_are_the_same_as_themselves_alone(value: float) -> None:
    x = torch.randn(10)
    x[3] = value
    assert is_same(x, x.clone())
    assert not is_same(x, torch.ones(10))


@dataclasses.dataclass
class Output:
    hidden: Tensor
    rest: Any = None


def test_dataclasses_and_complex_tensors_are_opened_and_other_leaves_passed_over() -> None:
    x = torch.randn(4, dtype=torch.complex64)
    output = Output(x.real, {"a": [Output(x.conj())], "b": "text", "kind": Output})
    output.rest["itself"] = output
    assert [tuple(each.shape) for each in tensors_of(output)] == [(4,), (4,)]
    assert len(sums_of(output)) == 2
    assert not is_same(Output(x), Output(x.conj()))
    assert sums_of([torch.ones(2, dtype=torch.int64), torch.ones(2).to_sparse(), torch.ones(2, device="meta")]) == []
    assert is_same(
        [torch.zeros(0), torch.zeros(0, 3), torch.tensor(2.0)],
        [torch.zeros(0), torch.zeros(0, 3), x.real.new_tensor(2.0)],
    )


def test_a_large_output_is_not_converted_as_a_whole() -> None:
    x, sizes = torch.ones(3 << 22, dtype=torch.bfloat16), []

    class Spy(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            found = func(*args, **(kwargs or {}))
            sizes.extend(each.nbytes for each in tensors_of(found) if each.dtype != x.dtype)
            return found

    with Spy():
        sums_of(x)
    assert max(sizes) == (1 << 22) * 4
