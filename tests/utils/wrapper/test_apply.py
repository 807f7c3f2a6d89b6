"""`optimize` applies optimizations in one order, lists them, checks them, and undoes them."""

import copy

import pytest
import torch
from torch import nn

from runner.config import optimizations
from runner.utils import unsloth
from runner.utils.wrapper import Applied, Purpose, Stage, freeze, optimize

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
    "replace": [{"match": "torch.nn.LayerNorm", "with": f"{__name__}.Norm"}],
    "compile": {"scope": "blocks", "backend": "eager"},
    "unsloth": True,
}

LINEARS = [{"match": "torch.nn.Linear", "with": f"{__name__}.Linear"}]


def optimized(module, device=None, purpose=Purpose.train, **switches):
    """Applies optimizations as a config switches them on."""
    nodes, _ = optimizations.of_engine(optimizations.expand({"optimizations": switches}), "")
    made = {name: optimizations.make_built_in(node) for name, node in nodes.items()}
    return optimize(module, made, device, purpose)


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
    changes = optimized(model, torch.device("cpu"), **ALL)
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
        optimized(model, lora={"rank": 2}, unsloth={"include": ["layers.*"]})
    assert repr(model) == before
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_the_table_tells_to_what_from_how_much_to_how_much():
    (lora, *_, last) = optimized(Model(), **{key: ALL[key] for key in ("lora", "unsloth")}).table()
    assert lora.split(None, 3)[3] == "6: blocks.0.up, blocks.0.down ... blocks.2.down"
    assert last.split(None, 1)[1] == "3,346 (3,346 trained), 0.01 MiB  ->  3,922 (576 trained), 0.01 MiB"
    assert optimized(Model()).table() == []


def test_what_was_put_in_and_never_called_is_an_error():
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2), "used": nn.Linear(8, 8), "idle": nn.Linear(8, 8)})
    changes = optimized(model, lora={"rank": 2})
    changes.watch_calls()
    model["used"](torch.ones(1, 8)).sum().backward()
    with pytest.raises(ValueError, match=r"never called so far: lora: idle; .* put them in exclude"):
        changes.check_calls()
    changes.check_calls()  # said once
    assert not any(module._forward_hooks for module in model.modules())


def test_what_stands_in_a_compiled_graph_is_found_by_its_gradient():
    model = Model()
    changes = optimized(model, lora={"rank": 2}, compile={"scope": "blocks", "backend": "eager"})
    changes.watch_calls()
    assert not any(module._forward_hooks for module in model.modules())  # it would be compiled with it
    model(torch.randn(2, 16)).sum().backward()
    changes.check_calls()


@pytest.mark.parametrize("export", ["merged", "adapter"])
def test_an_exported_state_is_taken_back(export):
    torch.manual_seed(0)
    model = Model()
    twin, given = copy.deepcopy(model), torch.randn(2, 16)
    lora = {"rank": 2, "export": export}
    changes = optimized(model, lora=lora)
    with torch.no_grad():
        for parameter in changes.module.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter) if parameter.requires_grad else 0)
    state = changes.exported(model.state_dict())
    other = optimized(twin, purpose=Purpose.use, lora=lora)
    other.load_exported(state)
    assert torch.allclose(twin(given), model(given), atol=1e-6)
    with pytest.raises(RuntimeError, match="head"):
        other.load_exported({name: value for name, value in state.items() if not name.startswith("head")})


def test_checkpointing_recomputes_and_moves_nothing():
    model = Model()
    changes = optimized(model, checkpointing={"every": 2})
    (monitor,) = changes.monitors
    assert list(monitor.blocks.modules) == ["blocks.0", "blocks.2"]
    assert monitor.blocks.engines == []


@pytest.mark.parametrize("scope", ["blocks", "whole"])
def test_compiling_leaves_names_and_copies_sound(scope):
    model = Model()
    names = list(model.state_dict())
    changes = optimized(model, compile={"scope": scope, "backend": "eager"})
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

    model = Reads()
    changes = optimized(model, replace=LINEARS)
    changes.watch_calls()
    model(torch.ones(1, 8)).sum().backward()
    with pytest.raises(ValueError, match="never called so far: replace: proj"):
        changes.check_calls(is_last=False)


def test_adapters_that_could_not_be_merged_are_refused_at_once():
    model = nn.ModuleDict({"embedding": nn.Embedding(4, 8), "head": nn.Linear(8, 4, bias=False)})
    model["head"].weight = model["embedding"].weight
    lora = {"rank": 2, "include": ["head"]}
    with pytest.raises(ValueError, match=r"head.weight is embedding.weight too, .* set lora.export=adapter"):
        optimized(model, lora=lora)
    assert type(model["head"]) is nn.Linear
    optimized(model, lora={**lora, "export": "adapter"})


def test_what_took_adapters_is_not_replaced_once_they_are_merged():
    trained, used = Model(), Model()
    optimized(trained, lora={"rank": 2, "exclude": ["head"]}, replace=LINEARS)
    optimized(used, purpose=Purpose.use, lora={"rank": 2, "exclude": ["head"]}, replace=LINEARS)
    assert {name for name, each in used.named_modules() if type(each) is Linear} == {"head"}
    assert type(trained.head) is Linear


def test_an_adapter_alone_brings_statistics_along():
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    twin = copy.deepcopy(model)
    changes = optimized(model, lora={"rank": 2, "export": "adapter"})
    for _ in range(3):
        model(torch.randn(8, 4) + 3)
    other = optimized(twin, lora={"rank": 2, "export": "adapter"})
    other.load_exported(changes.exported(model.state_dict()))
    given = torch.randn(2, 4)
    assert torch.equal(twin.eval()(given), model.eval()(given))


def test_float8_that_converts_nothing_is_an_error_and_undone_it_is_the_very_modules():
    pytest.importorskip("torchao")
    with pytest.raises(ValueError, match=r"fp8: no Linear is converted .*not multiples of 16"):
        optimized(nn.Sequential(nn.Linear(3, 3), nn.ReLU()), fp8={"emulate": True})
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(16, 2, 32, batch_first=True), 2).eval()
    before, given = list(encoder.modules()), torch.randn(2, 3, 16)
    with torch.no_grad():
        expected = encoder(given)
        changes = optimized(encoder, fp8={"emulate": True})
        assert not torch.equal(encoder(given), expected)  # not past it, in torch's fast path
        changes.undo()
        assert list(map(id, encoder.modules())) == list(map(id, before))
        assert torch.equal(encoder(given), expected)


def test_a_forward_of_a_blocks_own_is_compiled_and_put_back():
    model, given = Model(), torch.randn(2, 16)
    for block in model.blocks:
        block.forward = own = lambda x: x * 2
    expected = model(given)
    changes = optimized(model, compile={"scope": "blocks", "backend": "eager"})
    assert torch.equal(model(given), expected)
    changes.undo()
    assert model.blocks[2].forward is own
    assert torch.equal(model(given), expected)


class Scale:
    """A user's own optimization: doubles the head's weights, and halves them in exports."""

    def __init__(self, log, stage=None):
        self.log = log
        if stage is not None:
            self.stage = stage

    def apply(self, module, context):
        self.log.append([name for name, part in module.named_modules() if type(part) in (Norm, Linear)])
        module.head.weight.data.mul_(2)

        def undo():
            module.head.weight.data.div_(2)

        return Applied(
            undo=undo,
            skipped={"blocks": "they have no head"},
            export=lambda state: {**state, "head.weight": state["head.weight"] / 2},
            load=lambda state: module.load_state_dict({**state, "head.weight": state["head.weight"] * 2}),
        )


def test_an_own_optimization_stands_in_the_table_and_is_exported_loaded_and_undone():
    model, log = Model(), []
    before = copy.deepcopy(model.state_dict())
    changes = optimize(model, {"mine": Scale(log)})
    assert changes.rows[:2] == [("mine", "Scale"), ("mine, skipped", "blocks: they have no head")]
    exported = changes.exported(model.state_dict())
    assert all(torch.equal(before[name], value) for name, value in exported.items())
    twin = Model()
    optimize(twin, {"mine": Scale(log)}).load_exported(exported)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in twin.state_dict().items())
    changes.undo()
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


@pytest.mark.parametrize(("stage", "num_replaced"), [(None, 3), (Stage.FREEZE, 0), (Stage.COMPILE, 3)])
def test_an_own_stage_decides_the_order(stage, num_replaced):
    nodes, _ = optimizations.of_engine(optimizations.expand({"optimizations": {"replace": ALL["replace"]}}), "")
    replace, log = optimizations.make_built_in(nodes["replace"]), []
    optimize(Model(), {"replace": replace, "mine": Scale(log, stage)})
    assert [len(names) for names in log] == [num_replaced]


def test_an_own_check_refuses_others_before_anything_is_changed():
    class Refuses(Scale):
        def check(self, others):
            raise ValueError(f"mine: not with {', '.join(others)}")

    model, log = Model(), []
    with pytest.raises(ValueError, match="mine: not with other"):
        optimize(model, {"other": Scale(log), "mine": Refuses(log)})
    assert log == []
