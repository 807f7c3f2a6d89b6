"""`runner.utils.wrapper.replace`: what stands for a module has its weights, flags, mode and hooks, and goes again."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from runner.utils.wrapper.replace import Rule, replace


class Doubled(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return 2 * super().forward(input)


class Scale(nn.Module):
    """Is made of the arguments of an nn.LayerNorm."""

    def __init__(self, normalized_shape: tuple[int, ...], eps: float = 1.0, bias: bool = True) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.randn(normalized_shape))
        self.register_parameter("bias", nn.Parameter(torch.randn(normalized_shape)) if bias else None)


class Unlike(nn.Module):
    def __init__(self, width: int, in_features: int = 0) -> None:
        super().__init__()
        self.gain = nn.Parameter(torch.ones(width))


def make_list() -> nn.Module:
    torch.manual_seed(0)
    return nn.ModuleDict({"layer": nn.ModuleList(nn.Linear(3, 3) for _ in range(11)), "norm": nn.LayerNorm(3)})


def test_weights_are_the_very_objects_with_their_dtype_and_flags() -> None:
    module = make_list().double()
    module["layer"][1].weight.requires_grad_(False)
    before = dict(module.named_parameters())
    report = replace(module, [Rule(nn.Linear, Doubled)])
    after = dict(module.named_parameters())
    assert list(after) == list(before)
    assert all(after[name] is each for name, each in before.items())
    assert not module["layer"][1].weight.requires_grad
    assert report.replaced == [{f"layer.{n}": "Linear -> Doubled" for n in range(11)}]
    assert report.skipped == [{}]
    assert report.left_out == []


def test_building_spends_no_random_number_and_no_memory() -> None:
    module = make_list()
    state = torch.get_rng_state()
    replace(module, [Rule(nn.LayerNorm, Scale)])
    assert torch.equal(torch.get_rng_state(), state)
    assert not any(each.is_meta for each in module.parameters())


def test_a_class_that_draws_on_a_device_of_its_own_leaves_the_generator_alone() -> None:
    class Drawn(nn.Linear):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            torch.rand(4, device="cpu")

    module = make_list()
    state = torch.get_rng_state()
    replace(module, [Rule(nn.Linear, Drawn)])
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("bias", [True, False])
def test_arguments_are_told_by_the_old_module_and_given_ones_win(bias: bool) -> None:
    module = nn.Sequential(nn.LayerNorm(3, eps=0.5, bias=bias))
    report = replace(module, [Rule(nn.LayerNorm, Scale)])
    assert (module[0].eps, module[0].bias is not None) == (0.5, bias)
    report.undo()
    replace(module, [Rule(nn.LayerNorm, Scale, arguments={"eps": 0.25})])
    assert module[0].eps == 0.25


def test_undo_puts_back_the_same_modules_and_bits() -> None:
    module = make_list()
    x = torch.randn(2, 3)
    modules, state = list(module.named_modules()), copy.deepcopy(module.state_dict())
    report = replace(module, [Rule(nn.Linear, Doubled), Rule(Doubled, nn.Linear, include=["layer.3"])])
    assert torch.equal(module["layer"][1](x), 2 * modules[3][1](x))
    report.undo()
    report.undo()
    assert list(module.named_modules()) == modules
    assert all(torch.equal(each, state[name]) for name, each in module.state_dict().items())


def test_undo_hands_back_what_became_of_tensors_and_mode() -> None:
    class Other(nn.BatchNorm1d):
        pass

    module = nn.Sequential(nn.BatchNorm1d(3))
    report = replace(module, [Rule(nn.BatchNorm1d, Other)])
    module(torch.ones(2, 3))
    module.double().eval()
    report.undo()
    assert type(module[0]) is nn.BatchNorm1d
    assert not module[0].training
    assert torch.equal(module[0].running_mean, torch.full((3,), 0.1).double())


def test_a_module_at_two_names_is_replaced_once_and_at_both() -> None:
    linear = nn.Linear(3, 3)
    module = nn.ModuleDict({"a": nn.Sequential(linear), "b": nn.Sequential(linear)})
    report = replace(module, [Rule(nn.Linear, Doubled, include=["a.*"])])
    assert module["a"][0] is module["b"][0]
    assert report.replaced == [{"a.0": "Linear -> Doubled", "b.0": "Linear -> Doubled"}]
    report.undo()
    assert module["a"][0] is linear is module["b"][0]


def test_tied_weights_stay_tied() -> None:
    module = nn.ModuleDict({"embed": nn.Embedding(5, 3), "head": nn.Linear(3, 5, bias=False)})
    module["head"].weight = module["embed"].weight
    replace(module, [Rule(nn.Linear, Doubled)])
    assert module["head"].weight is module["embed"].weight


def test_mode_is_kept_by_submodule() -> None:
    class Same(nn.Sequential):
        @classmethod
        def from_module(cls, old: nn.Sequential) -> nn.Module:
            return cls(*(nn.Dropout() for _ in old))

    module = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Dropout()))
    module[0].eval()
    module[0][1].train()
    replace(module, [Rule(nn.Sequential, Same, exclude=[""])])
    assert [each.training for each in module[0].modules()] == [False, False, True]


def test_hooks_are_carried_over_and_their_handles_still_remove_them() -> None:
    module, seen = nn.Sequential(nn.Linear(3, 3)), []
    old = module[0]
    handles = [
        old.register_forward_pre_hook(lambda *_: seen.append("pre")),
        old.register_forward_hook(lambda *_, **__: seen.append("forward"), with_kwargs=True),
        old.register_full_backward_hook(lambda *_: seen.append("backward")),
        old.register_state_dict_post_hook(lambda *_: seen.append("state")),
    ]
    loading = old.register_load_state_dict_pre_hook(lambda module, *_: seen.append(type(module).__name__))
    report = replace(module, [Rule(nn.Linear, Doubled)])
    module(torch.ones(1, 3, requires_grad=True)).sum().backward()
    module.load_state_dict(module.state_dict())
    assert seen == ["pre", "forward", "backward", "state", "Doubled"]
    seen.clear()
    for handle in handles:
        handle.remove()
    module(torch.ones(1, 3, requires_grad=True)).sum().backward()
    module.state_dict()
    assert seen == []
    report.undo()
    module.load_state_dict(module.state_dict())
    assert seen == ["Linear"]
    loading.remove()


def test_a_method_that_the_old_class_hooked_stays_with_it() -> None:
    class Hooked(nn.Linear):
        def __init__(self, *args: Any) -> None:
            super().__init__(*args)
            self.register_forward_hook(self.refuse)

        def refuse(self, *_: Any) -> None:
            raise AssertionError("the old module's own")

    module = nn.Sequential(Hooked(3, 3))
    replace(module, [Rule(Hooked, nn.Linear)])
    module(torch.ones(1, 3))


def test_globs_are_by_whole_segments() -> None:
    module = make_list()
    report = replace(module, [Rule(nn.Linear, Doubled, include=["layer.1"])])
    assert report.replaced == [{"layer.1": "Linear -> Doubled"}]
    assert type(module["layer"][10]) is nn.Linear


def test_exclude_alone_leaves_the_rest_in() -> None:
    report = replace(make_list(), [Rule(nn.Linear, Doubled, exclude=["layer.1"])])
    assert list(report.replaced[0]) == [f"layer.{n}" for n in range(11) if n != 1]
    assert report.skipped == [{"layer.1": "'layer.1' excludes it"}]


def test_a_subclass_is_left_alone_and_said_to_be() -> None:
    module = nn.ModuleDict({"attention": nn.MultiheadAttention(4, 2), "linear": nn.Linear(4, 4), "own": Doubled(4, 4)})
    report = replace(module, [Rule(nn.Linear, nn.Linear, subclasses=True), Rule(nn.Linear, Doubled)])
    reads = "MultiheadAttention reads its weight and does not call it"
    assert report.replaced[0] == {"linear": "Linear -> Linear", "own": "Doubled -> Linear"}
    assert report.skipped[0] == {"attention.out_proj": reads}
    report.undo()
    report = replace(module, [Rule(nn.Linear, Doubled)])
    assert report.skipped[0]["own"] == "Doubled is a subclass of Linear"


def test_rules_run_in_order_on_the_result_of_those_before() -> None:
    module = nn.Sequential(nn.Linear(3, 3))
    report = replace(module, [Rule(nn.Linear, lambda old: nn.Sequential(old)), Rule(nn.Linear, Doubled)])
    assert report.replaced == [{"0": "Linear -> Sequential"}, {"0.0": "Linear -> Doubled"}]
    report.undo()
    assert [type(each) for each in module.modules()] == [nn.Sequential, nn.Linear]


def test_the_outer_of_two_that_match_is_replaced() -> None:
    module = nn.ModuleDict({"a": nn.Sequential(nn.Sequential(nn.Linear(1, 1)))})
    report = replace(module, [Rule(nn.Sequential, lambda old: nn.ModuleList(old))])
    assert report.replaced == [{"a": "Sequential -> ModuleList"}]
    assert report.skipped == [{"a.0": "it stands within a, which is replaced"}]


def test_nested_weights_are_adopted_by_dotted_names() -> None:
    class Own(nn.MultiheadAttention):
        pass

    module = nn.ModuleList([nn.MultiheadAttention(4, 2)])
    before = dict(module.named_parameters())
    replace(module, [Rule(nn.MultiheadAttention, Own)])
    assert type(module[0]) is Own
    assert all(each is before[name] for name, each in module.named_parameters())


def test_a_recurrent_module_computes_with_the_weights_it_adopts() -> None:
    class Own(nn.GRU):
        def __init__(self, input_size: int, hidden_size: int) -> None:
            super().__init__(input_size, hidden_size)

    module, x = nn.ModuleList([nn.GRU(3, 2)]), torch.randn(4, 3)
    expected = module[0](x)[0]
    replace(module, [Rule(nn.GRU, Own)])
    assert torch.equal(module[0](x)[0], expected)


def test_a_fused_encoder_layer_calls_what_was_replaced_within_it() -> None:
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(4, 2, 8, batch_first=True), 1).eval()
    x, fused = torch.randn(2, 3, 4), [encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu]
    with torch.no_grad():
        before = encoder(x)
        report = replace(encoder, [Rule(nn.Linear, Doubled, include=["layers.*.linear?"])])
        assert not torch.allclose(encoder(x), before)
        report.undo()
        assert torch.equal(encoder(x), before)
    assert [encoder.use_nested_tensor, encoder.layers[0].activation_relu_or_gelu] == fused


def test_a_converter_keeps_tensors_of_its_own_and_reports_what_it_leaves_out() -> None:
    def convert(old: nn.LayerNorm, eps: float) -> nn.Module:
        new = nn.RMSNorm(old.normalized_shape, eps)
        new.gate = nn.Parameter(torch.full((1,), 7.0))
        return new

    module = nn.Sequential(nn.LayerNorm(3))
    weight = module[0].weight
    report = replace(module, [Rule(nn.LayerNorm, convert, arguments={"eps": 0.5})])
    assert (module[0].weight is weight, module[0].gate.item(), module[0].eps) == (True, 7, 0.5)
    assert report.left_out == ["0.bias"]


def test_a_weight_that_the_converter_used_is_not_used_twice() -> None:
    class Held(nn.Module):
        def __init__(self, old: nn.Linear) -> None:
            super().__init__()
            self.base, self.bias = old.weight, old.bias
            self.weight = nn.Parameter(torch.zeros(3, 3))

    module = nn.Sequential(nn.Linear(3, 3))
    weight = module[0].weight
    replace(module, [Rule(nn.Linear, lambda old: Held(old))])
    assert module[0].base is weight
    assert torch.equal(module[0].weight, torch.zeros(3, 3))


def test_what_a_converter_goes_on_using_keeps_its_own_mode_and_hooks() -> None:
    module, seen = nn.Sequential(nn.Sequential(nn.Dropout(), nn.Linear(3, 3))), []
    dropout, linear = module[0]
    dropout.eval()
    linear.register_forward_hook(lambda *_: seen.append(1))
    replace(module, [Rule(nn.Sequential, lambda old: nn.Sequential(nn.Identity(), *old), exclude=[""])])
    module(torch.ones(1, 3))
    assert seen == [1]
    assert (dropout.training, linear.training) == (False, True)


def test_a_quantized_weight_of_a_converter_is_its_own() -> None:
    class Packed(torch.Tensor):
        pass

    def pack(old: nn.Linear) -> nn.Module:
        new = nn.Linear(3, 3, bias=False)
        new.weight = nn.Parameter(old.weight.detach().round().as_subclass(Packed))
        return new

    module = nn.Sequential(nn.Linear(3, 3))
    report = replace(module, [Rule(nn.Linear, pack)])
    assert type(module[0].weight) is Packed
    assert report.left_out == ["0.weight", "0.bias"]


def test_an_argument_with_the_name_of_a_method_is_not_told_by_it() -> None:
    class Typed(nn.Linear):
        def __init__(self, type: str = "plain", **settings: Any) -> None:
            super().__init__(**settings)
            self.kind = type

    module = nn.Sequential(nn.Linear(3, 3))
    replace(module, [Rule(nn.Linear, Typed)])
    assert module[0].kind == "plain"


def test_a_child_is_replaced_where_a_class_of_its_own_calls_it() -> None:
    class Calling(nn.MultiheadAttention):
        def forward(self, x: Tensor) -> Tensor:  # type: ignore[override]
            return self.out_proj(x)

    module, x = Calling(4, 2), torch.randn(2, 4)
    expected = 2 * module(x)
    replace(module, [Rule(nn.Linear, Doubled, subclasses=True)])
    assert torch.equal(module(x), expected)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        (Rule(nn.Conv2d, nn.Linear), r"rule 0 \(Conv2d -> Linear\): fits no module; classes are: .*Linear"),
        (
            Rule(nn.Linear, Doubled, include=["norm"]),
            r"fits no module; modules of that class are: layer.0, .* and 3 more",
        ),
        (
            Rule(nn.Linear, Doubled, include=["layers.*"]),
            r"'layers.\*' matches no module; there are: layer.0, layer.1, .* and 5 more",
        ),
        (Rule(nn.Linear, Doubled, exclude=["layer.11"]), r"'layer.11' matches no module; there are: layer.1"),
        (Rule(nn.Linear, Doubled, exclude=["layer.*"]), r"fits no module; skipped: layer.0, as 'layer.\*' excludes it"),
        (Rule(nn.Linear, Doubled, include="layer.1"), r"expected a list of globs, found the string 'layer.1'"),
        (Rule(nn.ModuleDict, nn.ModuleDict), r"the root module can't be replaced"),
        (Rule(nn.Linear, Unlike), r"layer.0: a Linear does not tell the argument width; give it in arguments"),
        (
            Rule(nn.Linear, Unlike, arguments={"width": 3}),
            r"gain has no like in the old module; parameter weight would be lost; parameter bias would be lost",
        ),
        (Rule(nn.Linear, nn.Linear, arguments={"out_features": 4}), r"weight is \[4, 3\] and was \[3, 3\]"),
        (Rule(nn.LayerNorm, nn.RMSNorm), r"norm: parameter bias would be lost"),
        (Rule(nn.Linear, Doubled, arguments={"width": 4}), r"not built of .*unexpected keyword argument 'width'"),
        (Rule(nn.Linear, lambda old: old), r"the converter returned the old module"),
        (Rule(nn.Linear, lambda old: 1), r"the converter returned 1, expected a module"),
        (Rule(nn.Linear, lambda old: nn.Linear(3, 3).half()), r"weight is torch.float16 and was torch.float32"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(rule: Rule, message: str) -> None:
    module = make_list()
    modules = list(module.named_modules())
    with pytest.raises(ValueError, match=message):
        replace(module, [rule])
    assert list(module.named_modules()) == modules


def test_a_later_rule_that_fails_undoes_the_earlier_ones() -> None:
    module = make_list()
    modules = list(module.named_modules())
    with pytest.raises(ValueError, match=r"rule 1 \(Conv1d -> Conv1d\)"):
        replace(module, [Rule(nn.Linear, Doubled), Rule(nn.Conv1d, nn.Conv1d)])
    assert list(module.named_modules()) == modules


def test_an_old_module_that_an_attribute_holds_is_an_error() -> None:
    module = make_list()
    module.order = [module["layer"][0]]
    with pytest.raises(ValueError, match=r"layer.0: the attribute order would still hold the old module"):
        replace(module, [Rule(nn.Linear, Doubled)])


def test_hooks_of_a_child_that_is_gone_are_an_error() -> None:
    module = nn.ModuleList([nn.Sequential(nn.Linear(1, 1))])
    module[0][0].register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="0 has hooks and the new module has no 0"):
        replace(module, [Rule(nn.Sequential, lambda old: nn.Identity())])


@pytest.mark.parametrize("settings", [{"match": 1, "make": nn.Linear}, {"match": nn.Linear, "make": int}])
def test_a_rule_is_of_classes_of_modules(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="expected a class of modules"):
        Rule(**settings)
