import json
import re
import subprocess
import sys

import pytest
from composition import composed
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import InterpolationKeyError

from runner.config import checks, errors, targets
from runner.config.errors import ConfigError
from runner.config.spec import ExperimentSpec


def told(*overrides):
    """The message for overrides that are a mistake."""
    try:
        checks.check_config(composed(*overrides))
    except Exception as error:
        return errors.format_error(error) or f"not explained: {error}"
    raise AssertionError(f"{overrides} was accepted")


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        ("trainer.stepz=3", "trainer.stepz: no such key; did you mean steps?"),
        ("optimizations.unsloht=true", "optimizations.unsloht: no such key; did you mean unsloth?"),
        ("trainer.steps=many", "trainer.steps=many: expected a whole number, found a text"),
        ("sampler=poool", "sampler=poool: no such choice; did you mean pool? (there are: batched_ordered, ordered,"),
        ("model.no_such_arg=1", "model.no_such_arg: no such key; there are: "),
        ("samplr=pool", "samplr: no such key; did you mean sampler?"),
        ("trainer.precision=fp8", "trainer.precision=fp8: expected one of fp32, bf16, fp16; did you mean fp32?"),
        ("trainer.steps=0", "trainer.steps=0: expected 1 or more"),
        ("tracking.stdin=1", "tracking.stdin=1: expected auto, true or false"),
        ("tracking.stdin=pipe", "tracking.stdin=pipe: expected auto, true or false"),
        ("trainer.save_every=-1", "trainer.save_every=-1: expected 0 or more"),
        ("+trainer.no_such=1", "trainer.no_such: no such key"),
        ("+no_such=1", "no_such: no such key"),
        ("+engines.a.optimiser=1", "engines.a.optimiser: no such key; did you mean optimizer?"),
        ("+engines._a.model=1", "engines._a: expected a letter"),
        ("name=a/b", "name='a/b': expected letters"),
        ("trainer.accumulate=5", "data.batch_size=12: expected a multiple of trainer.accumulate=5"),
        ("data.eval=null", "trainer.eval_every=100: data.eval has no dataset"),
        ("+engines.a=3", "engines.a: expected a mapping of model, optimizer, "),
        (
            "pattern=delayed",
            "pattern.num_codebooks: this data does not tell it; set pattern.num_codebooks=... (a model",
        ),
        ("pattern=delayed pattern.num_codebooks=2", "pattern: nothing takes it; a model takes it by an argument"),
        ("trainer.steps=???", "Missing mandatory value: trainer.steps"),
        ("trainer.clip_norm=???", "trainer.clip_norm: has no value"),
    ],
)
def test_a_mistake_is_told_in_one_message_that_names_the_key(override, expected):
    assert expected in told(*override.split())


@pytest.mark.parametrize(
    ("override", "expected"),
    [
        (
            "+model.weights.1=9",
            "model.weights.1: expected a number as the key, found the text '1'; set model.weights={1:",
        ),
        (
            "model.weights.0=9",
            "model.weights.0: expected a number as the key, found a text; set model.weights={0: ...}",
        ),
        ("+model.more={null: 1}", "model.more: Incompatible key type 'NoneType'"),
    ],
)
def test_a_dotted_key_that_cannot_name_a_number_is_told(override, expected):
    assert told("+model.weights={0: 1.0}", override).startswith(expected)


def test_several_mistakes_are_told_at_once():
    message = told("trainer.steps=0", "trainer.keep_last=-3")
    assert "trainer.steps" in message
    assert "trainer.keep_last" in message


def test_an_error_that_is_no_config_mistake_is_not_explained():
    assert errors.format_error(RuntimeError("in the user's model")) is None


NEEDED = {"finetune": ["init.path=base"], "distill": ["engines.teacher.init_from=teacher"]}  # values without a default


def test_every_choice_of_every_group_composes_and_passes():
    groups = {path.name for path in checks.CONF_DIR.iterdir() if path.is_dir()} - {"hydra", "optimization"}
    for group in sorted(groups):
        choices = sorted(p.stem for p in (checks.CONF_DIR / group).glob("*.yaml"))
        assert choices or group == "experiment"
        for choice in choices:
            model = "code_gpt" if group == "pattern" else "digits_net"  # it takes any data
            codes = ["data=speech_codes", "pattern=delayed"] if (group, choice) == ("model", "code_gpt") else []
            codes = ["data=speech_codes"] if group == "pattern" else codes
            models = [] if group == "experiment" else [f"model={model}"]  # it brings its own
            checks.check_config(composed(*models, *codes, f"{group}={choice}", *NEEDED.get(choice, [])))


def test_every_value_in_yaml_has_a_comment_that_gives_its_meaning():
    for path in checks.CONF_DIR.glob("*/*.yaml"):
        if path.parent.name in ("hydra", "experiment"):
            continue
        inherited = path.read_text().count("- default")
        for line in path.read_text().splitlines():
            key, _, value = line.partition(":")
            is_key = not line.lstrip().startswith(("#", "-")) and key.strip() not in ("_target_", "defaults")
            is_plain = value.strip() and is_key
            assert not is_plain or "#" in line or inherited, f"{path}: {line}"


def test_plain_resolves_interpolations_and_names_enums():
    plain = checks.to_plain(composed("seed=7", "trainer.precision=bf16"))
    assert plain["sampler"]["seed"] == 7
    assert plain["trainer"]["precision"] == "bf16"


def test_a_resolved_config_stands_for_itself_so_a_text_is_resolved_once():
    cfg = composed(r"+model.text=\${seed}", "+model.copy=${model.text}", "+model.bad=${nowhere}")
    with pytest.raises(InterpolationKeyError):
        checks.to_plain(cfg)
    del cfg.model.bad
    assert checks.to_plain(cfg)["model"]["copy"] == checks.to_plain(cfg)["model"]["text"] == "${seed}"


keys = st.one_of(st.integers(), st.booleans(), st.floats(allow_nan=False), st.text(), st.binary())
scalars = st.one_of(st.none(), keys)
nests = st.recursive(scalars, lambda inner: st.one_of(st.lists(inner), st.dictionaries(keys, inner)), max_leaves=8)


@given(st.one_of(nests, st.just({"_items_": [[1, 2]]}), st.just({"_bytes_": "AA=="})))
def test_json_of_a_config_gives_it_back_in_value_and_type_of_keys_too(plain):
    assert repr(checks.from_json(checks.to_json(plain))) == repr(plain)


def test_json_of_a_config_with_texts_as_keys_is_what_any_program_reads():
    plain = checks.to_plain(composed())
    assert json.loads(checks.to_json(plain)) == plain


def test_a_section_of_a_resolved_config_is_its_dataclass():
    cfg = composed("trainer.precision=bf16", "trainer.best_metric=eval/x")
    spec = checks.check_config(cfg)
    assert spec.trainer == OmegaConf.to_object(cfg.trainer)
    assert spec.plain == checks.to_plain(cfg)


def test_an_engine_has_the_parts_of_the_top_level_that_it_leaves_out():
    spec = checks.check_config(
        composed("+engines.first={}", "+engines.second.optimizer=null", "+engines.second.freeze=[a]")
    )
    first, second = spec.engines.values()
    assert (first.name, first.prefix, first.optimizer) == ("first", "engines.first.", spec.plain["optimizer"])
    assert first.model == second.model == spec.plain["model"]
    assert second.optimizer is None
    assert "freeze" not in first.optimizations
    assert second.optimizations["freeze"]["patterns"] == ["a"]


def test_an_engine_without_an_optimizer_has_a_loss_if_its_entry_has_one():
    feeder = "{_target_: own.feed}"
    spec = checks.check_config(
        composed(f"feeder={feeder}", "+engines.a={}", "+engines.teacher={optimizer: null}",
            f"+engines.measured={{optimizer: null, feeder: {feeder}}}")
    )  # fmt: skip
    assert {name: engine.has_own_loss for name, engine in spec.engines.items()} == {
        "a": True, "teacher": False, "measured": True,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ("{every: 0}", "engines.b.every=0: expected a whole number of steps from 1 on"),
        ("{every: true}", "engines.b.every=True: expected a whole number of steps from 1 on"),
        ("{every: 2, optimizer: null}", "engines.b.every=2: it is never trained, for its optimizer is null"),
    ],
)
def test_the_interval_of_an_engine_is_checked(entry, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        checks.check_config(composed("+engines.a={}", f"+engines.b={entry}"))


def test_a_specification_is_the_same_when_it_was_sent_as_plain_values():
    spec = checks.check_config(composed("trainer.precision=bf16", "+engines.first={}"))
    assert ExperimentSpec.from_plain(json.loads(json.dumps(spec.plain))) == spec


@pytest.mark.parametrize(
    ("node", "expected"),
    [
        ({0: 1}, "report.0: expected an argument's name, found 0; put such keys into a mapping of its own"),
        ({"a": {"_target_": "torch.nn.ReLU", True: 1}}, "report.a.True: expected an argument's name, found True"),
        ({"_partial_": "yes"}, "report._partial_=yes: expected true or false"),
        ({"_convert_": "none"}, "report._convert_=none: a target is given plain values"),
    ],
)
def test_what_is_no_argument_of_a_target_is_told(node, expected):
    plain = checks.to_plain(composed())
    plain["report"] = {"_target_": "runner.examples.digits.HardestMistakes", **node}
    with pytest.raises(ConfigError) as caught:
        targets.check_targets(plain)
    assert expected in str(caught.value)


def test_a_config_error_of_omegaconf_alone_is_explained_too():
    cfg = OmegaConf.create({"a": "${b}"})
    with pytest.raises(Exception, match="b") as caught:
        _ = cfg.a
    assert "b" in (errors.format_error(caught.value) or "")


def test_composing_does_not_import_torch():
    imports = "from runner.config import checks; from runner.launch import command_line, launcher"
    script = f"import sys; {imports}; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", script], check=True)


def test_config_error_is_a_value_error():
    assert issubclass(ConfigError, ValueError)
