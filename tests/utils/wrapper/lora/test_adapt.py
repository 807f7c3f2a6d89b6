"""`runner.utils.wrapper.lora`: adapters that change nothing until they are trained, and leave no trace when undone."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import nn

from runner.utils.wrapper.lora import LoRALinear, add_lora


def make_model() -> nn.Module:
    torch.manual_seed(0)
    layers = nn.ModuleList(nn.Linear(4, 4, bias=n % 2 == 0) for n in range(11))
    return nn.ModuleDict({"layer": layers, "norm": nn.LayerNorm(4), "head": nn.Linear(4, 6)})


def call(module: Any, x: torch.Tensor) -> torch.Tensor:
    for each in module["layer"]:
        x = each(x).tanh()
    return module["head"](module["norm"](x))


def train(module: Any) -> None:
    """Makes one step, on lora_b alone where nothing else is trained, then one on all that is."""
    optimizer = torch.optim.SGD([each for each in module.parameters() if each.requires_grad], lr=0.01)
    for _ in range(2):
        optimizer.zero_grad()
        call(module, torch.randn(8, 4)).square().sum().backward()
        optimizer.step()


def test_outputs_are_equal_until_a_step_is_made() -> None:
    module, x = make_model(), torch.randn(3, 4)
    before = call(module, x)
    modules, parameters = list(module.modules()), dict(module.named_parameters())
    adapted = add_lora(module, rank=2)
    assert torch.equal(call(module, x), before)
    assert list(module.modules()) == modules
    assert all(module.get_parameter(name) is each for name, each in parameters.items())
    assert adapted.names == [*(f"layer.{n}" for n in range(11)), "head"]
    train(module)
    assert not torch.equal(call(module, x), before)


def test_gradients_reach_the_adapters_and_what_is_named() -> None:
    module = make_model()
    add_lora(module, rank=2, include=["layer.1", "head"], also_train=["norm.*"])
    train(module)
    trained = {name for name, each in module.named_parameters() if each.grad is not None}
    adapters = {f"{name}.lora_{which}" for name in ("layer.1", "head") for which in "ab"}
    assert trained == adapters | {"norm.weight", "norm.bias"}
    assert {name for name, each in module.named_parameters() if each.requires_grad} == trained


@pytest.mark.parametrize(("alpha", "scale"), [(None, 1.0), (1, 0.5), (6.0, 3.0)])
def test_the_output_is_that_of_the_formula(alpha: float | None, scale: float) -> None:
    linear, x = nn.Linear(4, 6), torch.randn(2, 3, 4)
    expected = linear(x)
    add_lora(linear, rank=2, alpha=alpha)
    nn.init.normal_(linear.lora_b)
    expected = expected + scale * (x @ linear.lora_a.T @ linear.lora_b.T)
    torch.testing.assert_close(linear(x), expected)
    assert repr(linear) == f"LoRALinear(in_features=4, out_features=6, bias=True, rank=2, scale={scale:g}, dropout=0)"


def test_dropout_is_on_the_adapter_alone_and_only_in_training() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(64, 4)
    expected = linear(x)
    add_lora(linear, rank=2, dropout=0.5)
    assert torch.equal(linear(x), expected)
    nn.init.ones_(linear.lora_b)
    assert not torch.equal(linear(x), linear(x))
    linear.eval()
    assert torch.equal(linear(x), linear(x))


def test_adapters_are_drawn_as_a_weight_is_from_the_global_generator() -> None:
    linear = nn.Linear(4, 6)
    torch.manual_seed(3)
    add_lora(linear, rank=2)
    torch.manual_seed(3)
    assert torch.equal(linear.lora_a, nn.Linear(4, 2, bias=False).weight)
    assert torch.equal(linear.lora_b, torch.zeros(6, 2))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_adapters_have_the_dtype_of_the_weight(dtype: torch.dtype) -> None:
    module = make_model().to(dtype)
    add_lora(module, rank=2)
    assert {each.dtype for each in module.parameters()} == {dtype}
    assert call(module, torch.randn(2, 4, dtype=dtype)).dtype == dtype


def test_a_merged_state_has_the_names_and_the_outputs_of_the_model_before() -> None:
    module, x = make_model(), torch.randn(3, 4)
    keys, plain = list(module.state_dict()), copy.deepcopy(module)
    adapted = add_lora(module, rank=2, alpha=3, exclude=["layer.2"])
    train(module)
    state = module.state_dict()
    whole = copy.deepcopy(state)
    merged = adapted.merged(state)
    assert list(merged) == keys
    assert merged._metadata == state._metadata
    assert merged["norm.weight"] is state["norm.weight"]
    assert all(torch.equal(each, whole[name]) for name, each in state.items())
    plain.load_state_dict(merged)
    torch.testing.assert_close(call(plain, x), call(module, x), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_merging_is_done_in_float32_or_wider(dtype: torch.dtype) -> None:
    linear = nn.Linear(4, 6, dtype=dtype)
    adapted = add_lora(linear, rank=2, alpha=3)
    nn.init.normal_(linear.lora_b)
    wide = torch.promote_types(dtype, torch.float32)
    added = 1.5 * (linear.lora_b.detach().to(wide) @ linear.lora_a.detach().to(wide))
    merged = adapted.merged(linear.state_dict())
    assert list(merged) == ["weight", "bias"]
    assert torch.equal(merged["weight"], (linear.weight.detach().to(wide) + added).to(dtype))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_layer_at_two_names_has_one_adapter_and_one_merged_weight(dtype: torch.dtype) -> None:
    linear = nn.Linear(4, 4, dtype=dtype)
    module = nn.ModuleDict({"a": linear, "b": linear})
    adapted = add_lora(module, rank=2, include=["b"])
    assert adapted.names == ["a", "b"]
    merged = adapted.merged(module.state_dict())
    assert merged["a.weight"] is merged["b.weight"]
    assert list(merged) == ["a.weight", "a.bias", "b.weight", "b.bias"]


def test_an_adapter_is_what_is_trained() -> None:
    module = make_model()
    adapted = add_lora(module, rank=2, include=["layer.1"], also_train=["head.bias"])
    state = module.state_dict()
    adapter = adapted.adapter(state)
    assert sorted(adapter) == ["head.bias", "layer.1.lora_a", "layer.1.lora_b"]
    assert all(each is state[name] for name, each in adapter.items())
    with pytest.raises(
        ValueError, match=r"merged: the state has no layer.1.weight; give a state of the adapted module"
    ):
        adapted.merged(adapter)
    with pytest.raises(ValueError, match=r"adapter: the state has no head.bias, layer.1.lora_a"):
        adapted.adapter({})


def test_undo_leaves_no_trace() -> None:
    module = make_model().eval()
    module["head"].weight.requires_grad_(False)
    module["layer"][3].train()
    seen: list[int] = []
    module["head"].register_forward_hook(lambda *_: seen.append(1))
    before = {name: dict(vars(each)) for name, each in module.named_modules()}
    state, flags = copy.deepcopy(module.state_dict()), [each.requires_grad for each in module.parameters()]
    kinds = [type(each) for each in module.modules()]
    adapted = add_lora(module, rank=2)
    call(module, torch.randn(2, 4))
    assert seen == [1]
    train(module)
    adapted.undo()
    adapted.undo()
    assert [type(each) for each in module.modules()] == kinds
    assert {name: dict(vars(each)) for name, each in module.named_modules()} == before
    assert [each.requires_grad for each in module.parameters()] == flags
    assert list(module.state_dict()) == list(state)
    assert all(torch.equal(each, state[name]) for name, each in module.state_dict().items())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda module: pickle.loads(pickle.dumps(module))])
def test_a_copy_is_adapted_too_and_stands_for_itself(duplicate: Any) -> None:
    module, x = make_model(), torch.randn(3, 4)
    adapted = add_lora(module, rank=2, alpha=3)
    train(module)
    expected = call(module, x)
    twin = duplicate(module)
    adapted.undo()
    assert isinstance(twin["head"], LoRALinear)
    assert torch.equal(call(twin, x), expected)
    module.load_state_dict(adapted.merged(twin.state_dict()))
    torch.testing.assert_close(call(module, x), expected, rtol=1e-6, atol=1e-6)


def make_tied() -> nn.ModuleDict:
    module = nn.ModuleDict({"embed": nn.Embedding(6, 4), "mix": nn.Linear(4, 4), "head": nn.Linear(4, 6, bias=False)})
    module["head"].weight = module["embed"].weight
    return module


def test_a_tied_head_is_left_alone_by_default_and_stays_tied() -> None:
    module = make_tied()
    adapted = add_lora(module, rank=2)
    assert adapted.names == ["mix"]
    assert adapted.skipped == {"head": "its weight is embed.weight too; to adapt it, name it in include"}
    assert module["head"].weight is module["embed"].weight


def test_a_tied_head_that_is_named_is_adapted_and_not_merged() -> None:
    module, x = make_tied(), torch.randn(2, 4)
    expected, embedded = module["head"](x), module["embed"].weight.clone()
    adapted = add_lora(module, rank=2, include=["head"])
    nn.init.ones_(module["head"].lora_b)
    assert not torch.equal(module["head"](x), expected)
    assert torch.equal(module["embed"].weight, embedded)
    with pytest.raises(ValueError, match=r"head.weight is embed.weight too, .* put 'head' in exclude"):
        adapted.merged(module.state_dict())


def test_globs_are_by_whole_segments_and_exclude_alone_leaves_the_rest_in() -> None:
    assert add_lora(make_model(), rank=1, include=["layer.1"]).names == ["layer.1"]
    adapted = add_lora(make_model(), rank=1, exclude=["layer.1"])
    assert adapted.names == [*(f"layer.{n}" for n in range(11) if n != 1), "head"]
    assert adapted.skipped == {"layer.1": "'layer.1' excludes it"}


def test_a_subclass_and_a_computed_weight_are_left_alone() -> None:
    attention, normed = nn.MultiheadAttention(4, 2), nn.Linear(4, 4)
    del normed.weight
    normed.weight = torch.zeros(4, 4)
    module = nn.ModuleDict({"attention": attention, "normed": normed, "linear": nn.Linear(4, 4)})
    adapted = add_lora(module, rank=1)
    assert adapted.names == ["linear"]
    assert adapted.skipped == {
        "attention.out_proj": "MultiheadAttention reads its weight and does not call it",
        "normed": "its weight is no parameter of a floating-point dtype",
    }


@pytest.mark.parametrize("is_grad", [True, False])
def test_evaluation_in_a_fused_encoder_layer_has_the_adapters(is_grad: bool) -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 2).eval()
    plain, x = copy.deepcopy(encoder), torch.randn(2, 3, 4)
    plain.use_nested_tensor = False  # such tensors warn of being a prototype
    fused = [dict(vars(each)) for each in encoder.modules()]
    adapted = add_lora(encoder, rank=2)
    for layer in encoder.layers:
        nn.init.normal_(layer.linear1.lora_b)
    plain.load_state_dict(adapted.merged(encoder.state_dict()))
    padding = torch.tensor([[False, False, True], [False, False, False]])
    with torch.set_grad_enabled(is_grad):
        torch.testing.assert_close(encoder(x), plain(x), rtol=1e-5, atol=1e-5)
        masked, expected = (each(x, src_key_padding_mask=padding) for each in (encoder, plain))
        torch.testing.assert_close(masked[~padding], expected[~padding], rtol=1e-5, atol=1e-5)
    adapted.undo()
    assert [vars(each) for each in encoder.modules()] == fused


def test_weights_drawn_anew_make_the_adapter_neutral_again() -> None:
    linear, x = nn.Linear(4, 4), torch.randn(2, 4)
    add_lora(linear, rank=2)
    nn.init.ones_(linear.lora_b)
    linear.reset_parameters()
    assert torch.equal(linear(x), nn.functional.linear(x, linear.weight, linear.bias))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 0}, "rank=0: expected a whole number, 1 or more"),
        ({"rank": 1.5}, "rank=1.5: expected a whole number, 1 or more"),
        ({"alpha": 0}, "alpha=0: expected a finite number above 0, or null for the rank"),
        ({"dropout": 1.0}, "dropout=1.0: expected at least 0 and less than 1"),
        ({"dropout": float("nan")}, "dropout=nan: expected at least 0 and less than 1"),
        ({"include": ["layers.*"]}, r"'layers.\*' matches no module; there are: layer.0"),
        ({"include": "head"}, r"expected a list of globs, found the string 'head'"),
        ({"exclude": ["tail"]}, r"'tail' matches no module"),
        (
            {"include": ["head", "norm"]},
            r"'norm' matches no layer that can be adapted but norm, a LayerNorm; .*: attention, layer.0, layer.1",
        ),
        (
            {"include": ["attention.*"]},
            r"no layer that can be adapted but attention.out_proj, a NonDynamicallyQuantizableLinear; expected a ",
        ),
        ({"include": ["head"], "exclude": ["h*"]}, r"found none; skipped: head, as 'h\*' excludes it"),
        ({"also_train": ["norm"]}, r"also_train: 'norm' matches no parameter; there are: norm.bias, norm.weight"),
        ({"also_train": "norm.*"}, r"also_train: expected a list of globs"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(settings: dict[str, Any], message: str) -> None:
    module = make_model()
    module["attention"] = nn.MultiheadAttention(4, 2)
    names, generator = list(module.state_dict()), torch.get_rng_state()
    with pytest.raises(ValueError, match=message):
        add_lora(module, **{"rank": 2, **settings})
    assert list(module.state_dict()) == names
    assert all(each.requires_grad for each in module.parameters())
    assert torch.equal(torch.get_rng_state(), generator)


def test_adapters_are_not_added_twice() -> None:
    module = make_model()
    add_lora(module, rank=2, include=["head"])
    with pytest.raises(ValueError, match="the module has adapters already"):
        add_lora(module, rank=2, include=["layer.1"])
