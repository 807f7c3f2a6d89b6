import sys

import pytest
from conftest import CANARY
from omegaconf import OmegaConf

from runner.config import checks
from runner.config.errors import ConfigError
from runner.config.trust import allowlist
from runner.config.trust.allowlist import Allowlist

OWN = "import importlib\nfrom torch.nn import Linear\n\n\ndef mine():\n    return 1\n"


@pytest.fixture
def hostile_folder(tmp_path, monkeypatch):
    """A folder with a module `evil` that leaves a canary when it is imported, and `own`, which is the user's."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    (tmp_path / "evil.py").write_text(CANARY)
    (tmp_path / "own.py").write_text(OWN)
    monkeypatch.setenv("HYDRA_INSTANTIATE_ALLOWLIST_OVERRIDE", "evil.Evil:os.system:shutil.rmtree")
    yield tmp_path
    assert "evil" not in sys.modules
    assert not (tmp_path / "canary").exists()
    sys.modules.pop("own", None)


def refused(node, *prefixes, own=()):
    """The message for a config that names what it may not; nothing if it is allowed."""
    trusted = Allowlist("file.yaml", prefixes, own)
    try:
        allowlist.check_paths({"model": node}, trusted)
        allowlist.check_resolved_objects({"model": node}, trusted)
    except ConfigError as error:
        return str(error)
    return ""


@pytest.mark.parametrize(
    "target",
    [
        "torch.nn.Linear",
        "torch.optim.AdamW",
        "torch.optim.lr_scheduler.OneCycleLR",
        "runner.examples.byte_gpt.ByteGPT",
        "runner.engines.optim.schedulers.warmup",
        "runner.engines.optim.optimizers.muon",
        "runner.utils.sampler.PoolSampler",
    ],
)
def test_what_the_runner_and_torch_bring_is_allowed(hostile_folder, target):
    assert refused({"_target_": target}) == ""


def test_every_target_of_the_runners_own_choices_is_allowed():
    checks.register_with_hydra()
    for path in checks.CONF_DIR.glob("*/*.yaml"):
        if path.stem not in SENDING_TRACKERS:
            allowlist.check_paths({path.parent.name: OmegaConf.to_container(OmegaConf.load(path))}, Allowlist(path))


SENDING_TRACKERS = ("wandb", "mlflow", "trackio")


@pytest.mark.parametrize("name", SENDING_TRACKERS)
def test_an_untrusted_config_can_send_the_numbers_of_a_run_nowhere(name):
    node = OmegaConf.to_container(OmegaConf.load(checks.CONF_DIR / "trackers" / f"{name}.yaml"))
    assert "its module is not on the allow-list" in refused(node[name])


@pytest.mark.parametrize(
    ("target", "reason"),
    [
        ("evil.Evil", "not on the allow-list"),
        ("os.system", "not on the allow-list"),
        ("builtins.eval", "not on the allow-list"),
        ("hydra.utils.instantiate", "not on the allow-list"),
        ("runner.launch.launcher.shutil.rmtree", "not on the allow-list"),
        ("runner.examplesevil.X", "not on the allow-list"),
        ("torch.nnevil.X", "not on the allow-list"),
        ("torch.load", "not on the allow-list"),
        ("torch.nn.functional.importlib.import_module", "goes through the module importlib"),
        ("runner.examples.digits.importlib.import_module", "goes through the module importlib"),
        ("runner.examples.digits.torch.hub.load", "goes through the module torch"),
        ("runner.examples.digits.require", "expected a class"),
        ("runner.engines.engine.Engine.forward", "expected a class"),
        ("runner.engines.engine.feed", "expected a class"),
        ("torch.nn.functional.relu", "expected a class"),
        ("torch.nn.utils.clip_grad_norm_", "expected a class"),
        ("torch.nn.Linear.__init__", "expected the dotted path"),
        ("torch.nn", "defined in None"),
        ("", "expected the dotted path"),
        ("../evil", "expected the dotted path"),
        (None, "expected the dotted path"),
        ({"_target_": "evil.Evil"}, "expected the dotted path"),
    ],
    ids=str,
)
def test_all_else_is_refused_with_key_target_file_and_reason_and_not_imported(hostile_folder, target, reason):
    message = refused({"_target_": target})
    assert message.startswith("file.yaml: ")
    assert f"model._target_={'null' if target is None else target}: " in message
    assert reason in message
    assert "[None]" not in message


@pytest.mark.parametrize(
    "node",
    [
        [{"_target_": "evil.Evil"}],
        {"_target_": "torch.nn.Linear", "_args_": [4, {"_target_": "evil.Evil"}]},
        {"_target_": "torch.nn.Linear", "_partial_": True, "_recursive_": False, "a": [[{"_target_": "evil.Evil"}]]},
        {"": {" ": {"_target_": "evil.Evil", "_partial_": True}}},
    ],
)  # fmt: skip
def test_a_target_is_found_at_any_depth(hostile_folder, node):
    assert "_target_=evil.Evil: its module is not on the allow-list" in refused(node)


def test_all_that_is_refused_is_reported_at_once_with_the_remedy(hostile_folder):
    message = refused([{"_target_": "evil.Evil"}, {"_target_": "other.Thing"}, {"_target_": "os.system"}])
    assert message.count("_target_=") == 3
    assert message.endswith("allow_targets=[evil,other]")  # no remedy opens the standard library


@pytest.mark.parametrize(("prefix", "is_allowed"), [("own", True), ("own.mine", True), ("ow", False), ("owner", False)])
def test_a_prefix_allows_a_module_and_what_is_under_it(hostile_folder, prefix, is_allowed):
    assert (refused({"_target_": "own.mine"}, prefix) == "") == is_allowed


def test_what_a_trusted_module_has_from_elsewhere_is_judged_by_where_it_is_from(hostile_folder):
    assert "goes through the module importlib" in refused({"_target_": "own.importlib.import_module"}, "own")
    assert refused({"_target_": "own.Linear"}, "own") == ""
    (hostile_folder / "own.py").write_text(
        "from os import system\nfrom functools import partial\nlater = partial(system)\n"
    )
    sys.modules.pop("own", None)
    assert "is defined in posix" in refused({"_target_": "own.system"}, "own")
    assert "is defined in functools" in refused({"_target_": "own.later"}, "own")


def test_what_the_users_own_config_names_letter_for_letter_is_allowed(hostile_folder):
    own = [{"data": [{"_target_": "own.mine"}, {"_target_": "hydra.utils.get_method", "path": "own.mine"}]}]
    assert refused({"_target_": "own.mine", "a": 1}, own=own) == ""
    assert "not on the allow-list" in refused({"_target_": "own.mine2"}, own=own)
    assert refused({"_target_": "hydra.utils.get_method", "path": "own.mine"}, own=own) == ""
    assert "not on the allow-list" in refused({"_target_": "hydra.utils.get_method", "path": "os.system"}, own=own)


@pytest.mark.parametrize(
    ("text", "is_refused"),
    [
        ("${oc.env:SECRET}", True),
        ("a ${ oc.env : SECRET } b", True),
        ("${oc.${kind}:SECRET}", True),
        ("${a.${oc.env:SECRET}}", True),
        ("${now:${oc.env:SECRET}}", True),
        ("${hydra:runtime.cwd}", False),  # the run's own hydra.yaml tells it
        (r"\${oc.env:SECRET}", False),  # a text, which is never resolved
        (r"\\${oc.env:SECRET}", True),
        ("${data.train.context}", False),
        ("${..width}/${a.${b}}", False),
        ("${now:%H:%M}-${run_label:x}", False),
        ("$5 {x}", False),
    ],
)
def test_an_interpolation_that_reads_the_machine_is_refused(text, is_refused):
    nested = {"a": [{"b": text}]}
    if is_refused:
        with pytest.raises(ConfigError, match=r"a\.0\.b=.*resolver"):
            allowlist.check_interpolations(nested, Allowlist("file.yaml"))
    else:
        allowlist.check_interpolations(nested, Allowlist("file.yaml"))
    allowlist.check_interpolations(nested, Allowlist("file.yaml", (), [nested]))


def test_a_librarys_function_is_the_users_own_only_with_the_users_own_arguments(hostile_folder):
    loaded = {"_target_": "torch.load", "f": "good.pt", "weights_only": False}
    own = {"data": {"train": {"_target_": "own.mine", "table": loaded}}}
    assert refused(loaded, own=[own]) == ""
    assert "not on the allow-list" in refused({**loaded, "f": "evil.pt"}, own=[own])
    assert refused({"_target_": "own.mine", "other": 1}, own=[own]) == ""  # the user's own code
