import sys

import pytest
import torch
from torch import nn

from runner.utils.wrapper.float8 import _check_devices, import_torchao, to_float8
from runner.utils.wrapper.settings import RECIPES


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.up, self.down = nn.Linear(width, 2 * width), nn.Linear(2 * width, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Net(nn.Module):
    def __init__(self, width=32):
        super().__init__()
        self.layers = nn.ModuleList([Block(width), Block(width)])
        self.odd = nn.Linear(width, 10)

    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.odd(x)


@pytest.fixture
def net():
    torch.manual_seed(0)
    return Net()


def converted_in(module):
    return [name for name, each in module.named_modules() if type(each).__name__ == "Float8Linear"]


@pytest.mark.parametrize("recipe", RECIPES)
def test_it_trains_the_same_parameters_under_the_same_names(net, recipe):
    before, keys = dict(net.named_parameters()), list(net.state_dict())
    optimizer = torch.optim.AdamW(net.parameters(), lr=0.01)
    to_float8(net, recipe=recipe, emulate=True)
    assert list(net.state_dict()) == keys
    assert all(type(p) is nn.Parameter and p is before[name] for name, p in net.named_parameters())
    x, classes = torch.randn(16, 32), torch.arange(16) % 10
    losses = []
    for _ in range(20):
        loss = nn.functional.cross_entropy(net(x), classes)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert torch.isfinite(torch.tensor(losses)).all()
    assert losses[-1] < 0.5 * losses[0]


def test_what_comes_out_is_near_what_did_and_is_that_again_once_undone(net):
    x = torch.randn(4, 32)
    expected, names = net.eval()(x), list(dict(net.named_modules()))
    found = to_float8(net, emulate=True)
    assert not net.layers[0].up.training
    assert not torch.equal(net(x), expected)
    torch.testing.assert_close(net(x), expected, rtol=0.1, atol=0.1)
    found.undo()
    assert torch.equal(net(x), expected)
    assert list(dict(net.named_modules())) == names
    assert type(net.layers[0].down) is nn.Linear


def test_globs_match_names_of_linears_segment_by_segment(net):
    found = to_float8(net, include=["layers.*.up", "layers.1.*"], exclude=["*.1.down"], emulate=True)
    assert found.names == converted_in(net) == ["layers.0.up", "layers.1.up"]
    assert found.skipped == {}


def test_what_cannot_be_changed_is_skipped_with_the_reason(net):
    net.layers[0].up.register_forward_hook(lambda *_: None)
    found = to_float8(net, emulate=True)
    assert found.names == ["layers.0.down", "layers.1.up", "layers.1.down"]
    assert found.skipped == {
        "layers.0.up": "it has hooks, which would be lost",
        "odd": "32 to 10: not multiples of 16",
    }


def test_a_linear_in_two_places_stays_one_and_a_class_made_of_it_is_left_alone():
    class Own(nn.Linear):
        pass

    module = nn.ModuleDict({"a": nn.Linear(16, 16), "own": Own(16, 16)})
    module["b"] = module["a"]
    before = module["a"]
    found = to_float8(module, emulate=True)
    assert found.names == ["a", "b"]
    assert module["a"] is module["b"]
    assert type(module["own"]) is Own
    found.undo()
    assert module["a"] is module["b"] is before


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"include": ["layers.*"]}, r"'layers.\*' matches no Linear; there are: layers.0.up, layers.0.down"),
        ({"exclude": ["head"]}, "'head' matches no Linear"),
        ({"recipe": "blockwise"}, "recipe=blockwise: expected one of tensorwise, rowwise"),
        ({"emulate": False}, r"the weights are on cpu, and fp8 needs a GPU .* 8.9 or more; set emulate=true"),
    ],
)
def test_a_mistake_is_told_and_changes_nothing(net, settings, message):
    with pytest.raises(ValueError, match=message):
        to_float8(net, **{"emulate": True, **settings})
    assert converted_in(net) == []


def test_an_older_gpu_is_named(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "A100")
    with pytest.raises(ValueError, match=r"A100 has compute capability 8.0, and fp8 needs .* 8.9 or more"):
        _check_devices({torch.device("cuda", 0)})


def test_a_module_that_is_itself_a_linear_is_refused():
    with pytest.raises(ValueError, match=r"itself a Linear.*wrap it"):
        to_float8(nn.Linear(16, 16), emulate=True)


def test_without_torchao_the_extra_is_named(net, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchao"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(sys, "path", [])
    with pytest.raises(ImportError, match=r'torchao is not installed; pip install "exact-runner\[torchao\]"'):
        to_float8(net)


def test_a_module_that_torchao_lacks_is_not_taken_for_a_missing_torchao():
    with pytest.raises(ModuleNotFoundError, match="nonesuch"):
        import_torchao("torchao.nonesuch")
