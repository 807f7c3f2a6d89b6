import pytest
from torch import nn

from runner.utils.wrapper import freeze


def test_freezing_matches_whole_names_and_leaves_those_parameters_alone():
    module = nn.ModuleDict({f"layer{n}": nn.Linear(2, 2) for n in (1, 10)})
    assert freeze(module, ["layer1.*"]) == ["layer1.weight", "layer1.bias"]
    assert all(p.requires_grad for p in module["layer10"].parameters())
    with pytest.raises(ValueError, match=r"'layer2.*' matches no parameter; there are: layer1.weight"):
        freeze(module, ["layer2.*"])
