"""`runner.utils.losses` against torch's own loss over all logits."""

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from runner.utils.losses import chunked_cross_entropy

VOCABULARY, WIDTH = 11, 6


def draw(positions=13, dtype=torch.float32, seed=0, is_trained=(True, True, True)):
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(positions, WIDTH, generator=generator, dtype=dtype)
    weight = torch.randn(VOCABULARY, WIDTH, generator=generator, dtype=dtype)
    bias = torch.randn(VOCABULARY, generator=generator, dtype=dtype)
    targets = torch.randint(VOCABULARY, (positions,), generator=generator)
    leaves = [leaf.requires_grad_(trains) for leaf, trains in zip((hidden, weight, bias), is_trained, strict=True)]
    return leaves, targets


def whole(leaves, targets, **kwargs):
    hidden, weight, bias = leaves
    logits = F.linear(hidden, weight, bias)
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten(), **kwargs)


def chunked(leaves, targets, **kwargs):
    hidden, weight, bias = leaves
    return chunked_cross_entropy(hidden, weight, targets, bias=bias, **kwargs)


def outcome(loss, leaves, upstream=1.0):
    trained = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return [loss.detach(), *torch.autograd.grad(loss * upstream, trained)]


def assert_equal(found, expected, atol, rtol=0.0):
    torch.testing.assert_close(found, expected, atol=atol, rtol=rtol, equal_nan=True)


@pytest.mark.parametrize(("dtype", "atol"), [(torch.float32, 1e-6), (torch.float64, 1e-10)])
@settings(max_examples=25, deadline=None)
@given(
    positions=st.integers(0, 9),
    chunk=st.integers(1, 10),
    reduction=st.sampled_from(["mean", "sum"]),
    ignored=st.sets(st.integers(0, 8)),
    has_bias=st.booleans(),
    upstream=st.sampled_from([1.0, -0.3, 7.0]),
)
def test_any_chunk_gives_the_value_and_gradients_of_all_logits(
    dtype, atol, positions, chunk, reduction, ignored, has_bias, upstream
):
    leaves, targets = draw(positions, dtype)
    leaves = [*leaves[:2], leaves[2] if has_bias else None]
    targets[[index for index in ignored if index < positions]] = -100
    expected = outcome(whole(leaves, targets, reduction=reduction), leaves, upstream)
    found = outcome(chunked(leaves, targets, reduction=reduction, chunk=chunk), leaves, upstream)
    scale = max(1.0, abs(expected[0].item())) if expected[0].isfinite() else 1.0  # relative to the sum
    assert_equal(found, expected, atol * scale * max(1.0, abs(upstream)))


@pytest.mark.parametrize("is_trained", [(True, False, False), (False, True, False), (False, False, True)])
def test_only_trained_tensors_get_a_gradient(is_trained):
    leaves, targets = draw(is_trained=is_trained)
    chunked(leaves, targets, chunk=4).backward()
    assert [leaf.grad is not None for leaf in leaves] == list(is_trained)
    index = is_trained.index(True)
    assert_equal(leaves[index].grad, outcome(whole(leaves, targets), leaves)[1], 1e-6)


def test_hidden_of_more_dimensions_may_lie_in_any_order():
    leaves, targets = draw(12)
    turned = leaves[0].detach().reshape(4, 3, WIDTH).transpose(0, 1).requires_grad_()
    assert not turned.is_contiguous()
    leaves, targets = [turned, *leaves[1:]], targets.reshape(3, 4)
    assert_equal(outcome(chunked(leaves, targets, chunk=5), leaves), outcome(whole(leaves, targets), leaves), 1e-6)


def test_a_target_of_the_vocabulary_may_be_the_ignored_one():
    leaves, targets = draw()
    expected = outcome(whole(leaves, targets, ignore_index=3), leaves)
    assert_equal(outcome(chunked(leaves, targets, ignore_index=3, chunk=4), leaves), expected, 1e-6)


def test_without_gradients_the_loss_is_the_same():
    leaves, targets = draw()
    expected = chunked(leaves, targets, chunk=4).detach()
    with torch.no_grad():
        found = chunked(leaves, targets, chunk=4)
    assert torch.equal(found, expected)
    assert not found.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_under_autocast_the_matmul_is_that_of_a_linear_layer(dtype):
    leaves, targets = draw()
    with torch.autocast("cpu", dtype):
        logits = F.linear(*leaves)
        found = chunked(leaves, targets, chunk=4)
    assert logits.dtype == dtype
    assert found.dtype == torch.float32
    assert_equal(found, F.cross_entropy(logits.float(), targets), 1e-6)
    grads = torch.autograd.grad(found, leaves)
    assert [grad.dtype for grad in grads] == [torch.float32] * 3
    exact = outcome(whole(leaves, targets), leaves)[1:]
    for grad, reference in zip(grads, exact, strict=True):
        assert (grad - reference).norm() < 0.02 * reference.norm()


def test_gradients_of_low_precision_are_scaled_before_they_are_rounded():
    leaves, targets = draw(dtype=torch.float16)
    found = torch.autograd.grad(chunked(leaves, targets, reduction="sum"), leaves[0])[0]
    scaled = torch.autograd.grad(chunked(leaves, targets, reduction="sum") * 1.001, leaves[0])[0]
    assert scaled.dtype == torch.float16
    assert torch.equal(scaled, (found.float() * 1.001).half())
    assert not torch.equal(scaled, found)


def test_a_loss_scale_preserves_gradients_that_underflow_in_fp16():
    leaves, targets = draw(dtype=torch.float16)
    factor = 2.0**-20  # like the mean over a million positions
    loss = chunked(leaves, targets, reduction="sum") * factor
    grad = torch.autograd.grad(loss / factor, leaves[0])[0]
    assert torch.equal(grad, torch.autograd.grad(chunked(leaves, targets, reduction="sum"), leaves[0])[0])


def test_backward_may_run_twice():
    leaves, targets = draw()
    loss = chunked(leaves, targets, chunk=4) * 3
    once = torch.autograd.grad(loss, leaves, retain_graph=True)
    assert_equal(torch.autograd.grad(loss, leaves), once, 0.0)


def test_gradients_of_gradients_are_refused():
    leaves, targets = draw()
    with pytest.raises(RuntimeError, match="no gradients of gradients: leave out create_graph"):
        torch.autograd.grad(chunked(leaves, targets), leaves, create_graph=True)


class Largest(TorchDispatchMode):
    """Records the number of elements of the largest result of any operation."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor):
            self.elements = max(self.elements, result.numel())
        return result


def test_no_tensor_is_larger_than_a_chunk_of_logits_or_a_gradient():
    leaves, targets = draw(400)
    with Largest() as largest:
        chunked(leaves, targets, chunk=16).backward()
    assert largest.elements == max(16 * VOCABULARY, 400 * WIDTH, VOCABULARY * WIDTH) < 400 * VOCABULARY


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"weight": torch.zeros(5, WIDTH + 1)}, r"hidden \[13, 6\] and weight \[5, 7\]: expected \[\.\.\., width\]"),
        ({"targets": torch.zeros(12, dtype=torch.int64)}, r"targets \[12\]: expected \[13\]"),
        ({"targets": torch.zeros(13)}, "targets are torch.float32: expected torch.int64"),
        ({"bias": torch.zeros(3)}, r"bias \[3\]: expected \[11\]"),
        ({"chunk": 0}, "chunk=0: expected 1 or more"),
        ({"reduction": "none"}, "reduction='none': expected mean or sum"),
    ],
)
def test_an_argument_that_does_not_fit_is_an_error_that_names_it(change, message):
    (hidden, weight, bias), targets = draw()
    with pytest.raises(ValueError, match=message):
        chunked_cross_entropy(**{"hidden": hidden, "weight": weight, "bias": bias, "targets": targets} | change)


@pytest.mark.parametrize("target", [VOCABULARY, -1])
def test_a_target_outside_of_the_vocabulary_is_an_error(target):
    leaves, targets = draw()
    targets[5] = target
    with pytest.raises(RuntimeError, match="out of bounds"):
        chunked(leaves, targets, chunk=4)
