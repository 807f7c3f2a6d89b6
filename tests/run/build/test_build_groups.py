"""Parameter groups of the config reach every optimizer, resume by name, and are changed or refused on resume."""

from dataclasses import replace

import pytest
import torch
import yaml
from conftest import read_metrics
from ranks import Ranks
from run_comparison import assert_same_run
from specs import make_spec
from torch import nn

from runner.config.checks import CONF_DIR
from runner.config.errors import ConfigError
from runner.config.targets import check_targets
from runner.run.build.optimizers import make_optimizer

GROUPS = "optimizer.groups=[{match: '*.bias', weight_decay: 0}, {match: 'first.*', lr_scale: 0.5}]"
DECAY = "optimizer.layer_decay={rate: 0.5, layers: 'layers.*'}"
CHOICES = sorted(path.stem for path in (CONF_DIR / "optimizer").glob("*.yaml"))
LAYERED = '''

class Layered(nn.Module):
    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([nn.Linear(4, 4) for _ in range(3)])
        self.head = nn.Linear(4, 1)

    def forward(self, x, y):
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return (self.head(x) - y).square().mean()


def flat(named, lr=0.01):
    return torch.optim.SGD([p for _, p in named], lr=lr)


class Groups(torch.optim.SGD):
    """Has an argument that is named as a key of the runner."""

    def __init__(self, params, groups, lr=0.01):
        super().__init__([{"params": [p], "lr": lr * scale} for p, scale in zip(params, groups)])
'''


@pytest.fixture
def own(project):
    with (project.folder / "own.py").open("a") as file:
        file.write(LAYERED)
    return project


def make(node, module, prefix=""):
    return make_optimizer(0, replace(make_spec().engines["model"], prefix=prefix, optimizer=node), module)


def make_net():
    torch.manual_seed(0)
    return nn.ModuleDict({"hidden": nn.Linear(64, 64), "norm": nn.LayerNorm(64), "last": nn.Linear(64, 64)})


@pytest.mark.parametrize("choice", CHOICES)
def test_every_optimizer_of_conf_takes_groups_with_rates_and_settings_of_their_own(choice):
    node = yaml.safe_load((CONF_DIR / "optimizer" / f"{choice}.yaml").read_text())
    pytest.importorskip(node["_target_"].partition(".")[0])
    if "torchao" in choice or choice == "adamw_bf16":
        pytest.importorskip("torchao")
    node |= {"seed": 0} if "seed" in node else {}
    scale = 1 if choice == "prodigy" else 0.5  # which takes one rate
    groups = [{"match": ["*.bias", "*norm*"], "weight_decay": 0.25}, {"match": "last.*", "lr_scale": scale}]
    module, alone = make_net(), make_net()
    optimizer, plain = make(node | {"groups": groups}, module), make(node, alone)
    base = {id(p): group["lr"] for group in plain.param_groups for p in group["params"]}
    names = {id(p): name for name, p in module.named_parameters()}
    rates = {}
    for group in optimizer.param_groups:
        for parameter in group["params"]:
            name = names[id(parameter)]
            rates[name] = group["lr"] / base[id(alone.get_parameter(name))]
            has_decay = name in ("hidden.weight", "last.weight")
            assert group["weight_decay"] == (node["weight_decay"] if has_decay else 0.25)
    assert rates == {name: scale if name.startswith("last") else 1 for name in names.values()}
    getattr(optimizer, "train", bool)()
    before = {name: parameter.clone() for name, parameter in module.named_parameters()}
    for step in range(2):
        x = torch.randn(4, 64, generator=torch.Generator().manual_seed(step))
        module["last"](module["norm"](module["hidden"](x))).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
    assert not any(torch.equal(before[name], parameter) for name, parameter in module.named_parameters())


def test_prodigy_refuses_several_rates_before_its_first_step():
    pytest.importorskip("prodigyopt")
    node = {"_target_": "prodigyopt.Prodigy", "groups": [{"match": "last.*", "lr_scale": 0}]}
    with pytest.raises(ConfigError, match=r"optimizer.groups: Prodigy takes one learning rate .*found 1, 0; leave"):
        make(node, make_net())


def test_mistakes_name_the_key_of_the_engine_and_reserved_keys_are_no_arguments():
    node = {"_target_": "torch.optim.SGD", "lr": 0.1, "groups": [{"match": "*", "weigth_decay": 0}]}
    with pytest.raises(ConfigError, match=r"^engines.a.optimizer.groups.0.weigth_decay: SGD has no such setting"):
        make(node, make_net(), "engines.a.")
    plain = make_spec(model=None, data={"train": None, "eval": None}, optimizer=node).plain
    check_targets(plain | {"engines": {"a": {"optimizer": node | {"layer_decay": None}}}})
    with pytest.raises(ConfigError, match=r"optimizer.layer_decai: .* takes no such argument; did you mean layer_dec"):
        check_targets(plain | {"optimizer": node | {"layer_decai": None}})
    scheduler = {"_target_": "torch.optim.lr_scheduler.ConstantLR", "groups": []}
    with pytest.raises(ConfigError, match=r"scheduler.groups: .* takes no such argument"):
        check_targets(plain | {"scheduler": scheduler})


def test_an_argument_of_an_optimizer_is_its_own_and_a_function_that_takes_no_groups_is_refused(own):
    conf = own.folder / "conf" / "optimizer"
    conf.mkdir()
    (conf / "takes_groups.yaml").write_text("{_target_: own.Groups, groups: [1, 1, 2, 2]}\n")
    (conf / "flat.yaml").write_text("{_target_: own.flat, groups: [{match: '*.bias', lr_scale: 2}]}\n")
    own.run("optimizer=takes_groups", "trainer.steps=2", "scheduler.warmup_steps=0", "hydra.run.dir=run")
    rates = read_metrics(own.folder / "run")[1]
    assert rates["train/lr_2"] == 2 * rates["train/lr_1"] > 0
    assert "given groups of (name, parameter) pairs" in own.run("optimizer=flat", status=2)


@pytest.mark.parametrize("chosen", [(GROUPS,), ("optimizer=muon", GROUPS), (DECAY, "model._target_=own.Layered")])
def test_a_cut_run_with_groups_resumes_bit_for_bit_and_its_rates_are_scaled_by_typed_ones(own, chosen):
    chosen = [*chosen, "ema=default", "trainer.export_every=12"]
    printed = own.run(*chosen, "hydra.run.dir=whole", typed="lr 0.02@7\n")
    assert "model, parameter groups:" in printed
    own.run(*chosen, "hydra.run.dir=cut", typed="quit@5\n")
    own.run("resume=cut", typed="lr 0.02@7\n")
    assert_same_run(own.folder / "whole", own.folder / "cut", 12)
    rates = {line["step"]: line for line in read_metrics(own.folder / "whole") if "train/lr" in line}
    names = [name for name in rates[1] if name.startswith("train/lr")]
    assert len(names) > 2
    for name in names:
        ratio = rates[1][name] / rates[1]["train/lr"]
        assert all(line[name] / line["train/lr"] == pytest.approx(ratio, rel=1e-9) for line in rates.values())
    own.run("resume=whole", "trainer.steps=13", "trainer.eval_every=0")


def test_a_changed_setting_takes_effect_on_resume_and_changed_groups_are_refused(own):
    own.run(GROUPS, "hydra.run.dir=cut", typed="quit@5\n")
    own.copy("cut", "refused")
    printed = own.run("resume=cut", GROUPS.replace("0.5", "0.25").replace("decay: 0", "decay: 0.7"))
    lines = [line for line in read_metrics(own.folder / "cut") if "train/lr_2" in line]
    ratios = {line["step"]: line["train/lr_2"] / line["train/lr"] for line in lines}
    assert ratios == {step: 0.5 if step <= 5 else 0.25 for step in range(1, 13)}
    assert "0.7" in next(line for line in printed.splitlines() if line.split()[:1] == ["lr_1"])
    printed = own.run("resume=refused", GROUPS.replace("first.*", "first.weight"), status=2)
    assert "its parameters are grouped anew: expected second.weight | " in printed
    assert "resume with the groups as they were" in printed
    own.run("resume=refused")


def test_two_ranks_train_the_groups_of_one_process(own):
    import torch.distributed.fsdp  # noqa: F401  the forked runs share it
    from conftest import shared_zygote

    chosen = [*own.command[3:], GROUPS, "+model.dropout=0", "hydra.run.dir=two", "distributed=ddp"]
    Ranks(shared_zygote()).run(own.folder, 2, *chosen)
    own.run(GROUPS, "+model.dropout=0", "hydra.run.dir=one")
    one, two = (read_metrics(own.folder / name) for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert {n: v for n, v in a.items() if "lr" in n} == {n: v for n, v in b.items() if "lr" in n}
        if "train/loss" in a:
            assert a["train/loss"] == pytest.approx(b["train/loss"], rel=1e-5)
