"""`runner.utils.wrapper`: what is done to a module is told, checked, and can be undone."""

import copy

import pytest
import torch
from torch import nn

from runner.utils import unsloth
from runner.utils.wrapper import freeze, optimize
from runner.utils.wrapper.replace import Rule

pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute")  # torch's own, of whatever is compiled


class Norm(nn.LayerNorm):
    pass


class Linear(nn.Linear):
    pass


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(16), nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(self.norm(x))))


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.head = nn.Linear(16, 2)

    def forward(self, x):
        for block in self.blocks:
            x = block(x)
        return self.head(x)


ALL = {
    "freeze": ["head.*"],
    "lora": {"rank": 2, "exclude": ["head"]},
    "replace": [Rule(nn.LayerNorm, Norm)],
    "compile": {"scope": "blocks", "backend": "eager"},
    "unsloth": {},
}


def test_freezing_takes_whole_names_and_refuses_what_matches_nothing():
    module = nn.ModuleDict({"layer1": nn.Linear(2, 2), "layer10": nn.Linear(2, 2)})
    assert freeze(module, ["layer1.*"]) == ["layer1.weight", "layer1.bias"]
    assert [p.requires_grad for p in module.parameters()] == [False, False, True, True]
    with pytest.raises(ValueError, match=r"'layer2.\*' matches no parameter; there are: layer1.weight"):
        freeze(module, ["layer2.*"])


def test_all_of_it_is_undone():
    model = Model()
    before, names = repr(model), [(name, id(p), p.requires_grad) for name, p in model.named_parameters()]
    attributes = {name: sorted(vars(each)) for name, each in model.named_modules()}
    weights, given = copy.deepcopy(model.state_dict()), torch.randn(2, 16)
    expected = model(given)
    changes = optimize(model, torch.device("cpu"), **ALL)
    done = ["freeze", "lora (rank 2)", "lora, skipped", "replace LayerNorm -> Norm", "compile (eager)", "unsloth"]
    assert [what for what, _ in changes.rows] == [*done, "evaluation mode", "parameters"]
    assert unsloth.is_wrapped(model.blocks[0])
    changes.undo()
    assert repr(model) == before
    assert [(name, id(p), p.requires_grad) for name, p in model.named_parameters()] == names
    assert {name: sorted(vars(each)) for name, each in model.named_modules()} == attributes
    assert all(torch.equal(weights[name], value) for name, value in model.state_dict().items())
    assert torch.equal(model(given), expected)


def test_what_fails_half_way_is_undone():
    model = Model()
    before = repr(model)
    with pytest.raises(ValueError, match="matches no module"):
        optimize(model, lora={"rank": 2}, unsloth={"include": ["layers.*"]})
    assert repr(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_table_tells_to_what_from_how_much_to_how_much():
    (lora, *_, last) = optimize(Model(), **{key: ALL[key] for key in ("lora", "unsloth")}).table()
    assert lora.split(None, 3)[3] == "6: blocks.0.up, blocks.0.down ... blocks.2.down"
    assert last.split(None, 1)[1] == "3,346 (3,346 trained), 0.01 MiB  ->  3,922 (576 trained), 0.01 MiB"
    assert optimize(Model()).table() == []


def test_what_was_put_in_and_never_called_is_an_error():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    changes = optimize(model, lora={"rank": 2})
    changes.watch_calls()
    model["used"](torch.ones(1, 8)).sum().backward()
    with pytest.raises(ValueError, match=r"never called so far: lora: idle; .* put them in exclude"):
        changes.check_calls()
    changes.check_calls()  # said once
    assert not any(module._forward_hooks for module in model.modules())


def test_what_stands_in_a_compiled_graph_is_found_by_its_gradient():
    model = Model()
    changes = optimize(model, lora={"rank": 2}, compile={"scope": "blocks", "backend": "eager"})
    changes.watch_calls()
    assert not any(module._forward_hooks for module in model.modules())  # it would be compiled with it
    model(torch.randn(2, 16)).sum().backward()
    changes.check_calls()


@pytest.mark.parametrize("exports_adapter", [False, True])
def test_an_exported_state_is_taken_back(exports_adapter):
    torch.manual_seed(0)
    model = Model()
    twin, given = copy.deepcopy(model), torch.randn(2, 16)
    changes = optimize(model, lora={"rank": 2}, exports_adapter=exports_adapter)
    with torch.no_grad():
        for parameter in changes.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    state = changes.exported(model.state_dict())
    other = optimize(twin, lora={"rank": 2} if exports_adapter else None, exports_adapter=exports_adapter)
    other.load_exported(state)
    assert torch.allclose(twin(given), model(given), atol=1e-6)
    with pytest.raises(RuntimeError, match="head"):
        other.load_exported({name: value for name, value in state.items() if not name.startswith("head")})


def test_checkpointing_recomputes_and_moves_nothing():
    model = Model()
    changes = optimize(model, checkpointing={"every": 2})
    assert list(changes.recomputed.modules) == ["blocks.0", "blocks.2"]
    assert changes.recomputed.engines == []


@pytest.mark.parametrize("scope", ["blocks", "whole"])
def test_compiling_leaves_names_and_copies_sound(scope):
    model = Model()
    names = list(model.state_dict())
    changes = optimize(model, compile={"scope": scope, "backend": "eager"})
    assert list(model.state_dict()) == names
    other, given = copy.deepcopy(model), torch.randn(2, 16)
    with torch.no_grad():
        other.head.weight.zero_()
        other.head.bias.zero_()
    assert other(given).abs().sum() == 0
    assert model(given).abs().sum() > 0
    changes.undo()
    assert model._compiled_call_impl is None
    assert not any("forward" in vars(module) for module in model.modules())


def test_what_is_read_and_never_called_is_told_though_it_gets_a_gradient():
    class Reads(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.proj = nn.LayerNorm(8), nn.Linear(8, 8)

        def forward(self, x):
            return nn.functional.linear(self.norm(x), self.proj.weight)

    class Own(nn.Linear):
        pass

    model = Reads()
    changes = optimize(model, replace=[Rule(nn.Linear, Own)])
    changes.watch_calls()
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(ValueError, match="never called so far: replace: proj"):
        changes.check_calls(is_last=False)


def test_adapters_that_could_not_be_merged_are_refused_at_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 8), "head": nn.Linear(8, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    lora = {"rank": 2, "include": ["head"]}
    with pytest.raises(ValueError, match=r"head.weight is embedding.weight too, .* set lora.export=adapter"):
        optimize(model, lora=lora)
    assert type(model["head"]) is nn.Linear
    optimize(model, lora=lora, exports_adapter=True)


def test_what_took_adapters_is_not_replaced_once_they_are_merged():
    rules = [Rule(nn.Linear, Linear)]
    trained, used = Model(), Model()
    optimize(trained, lora={"rank": 2, "exclude": ["head"]}, replace=rules)
    optimize(used, lora={"rank": 2, "exclude": ["head"]}, replace=rules, is_merged=True)
    assert {name for name, each in used.named_modules() if type(each) is Linear} == {"head"}
    assert type(trained.head) is Linear


def test_an_adapter_alone_brings_statistics_along():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    twin = copy.deepcopy(model)
    changes = optimize(model, lora={"rank": 2}, exports_adapter=True)
    for _ in range(3):
        model(torch.randn(8, 4) + 3)
    other = optimize(twin, lora={"rank": 2}, exports_adapter=True)
    other.load_exported(changes.exported(model.state_dict()))
    given = torch.randn(2, 4)
    assert torch.equal(twin.eval()(given), model.eval()(given))


def test_float8_that_converts_nothing_is_an_error_and_undone_it_is_the_very_modules():
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=r"fp8: no Linear is converted .*not multiples of 16"):
        optimize(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), fp8={"emulate": True})
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    before, given = list(encoder.modules()), torch.randn(2, 3, 16)
    with torch.no_grad():
        expected = encoder(given)
        changes = optimize(encoder, fp8={"emulate": True})
        assert not torch.equal(encoder(given), expected)  # not past it, in torch's fast path
        changes.undo()
        assert list(map(id, encoder.modules())) == list(map(id, before))
        assert torch.equal(encoder(given), expected)


def test_a_forward_of_a_blocks_own_is_compiled_and_put_back():
    model, given = Model(), torch.randn(2, 16)
    for block in model.blocks:
        block.forward = own = lambda x: x * 2
    expected = model(given)
    changes = optimize(model, compile={"scope": "blocks", "backend": "eager"})
    assert torch.equal(model(given), expected)
    changes.undo()
    assert model.blocks[2].forward is own
    assert torch.equal(model(given), expected)
