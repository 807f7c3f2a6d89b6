"""Mistakes in a user's own YAML files: one message with the file, the line and the column."""

import pytest
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.object_type import ObjectType

from runner.config import checks, errors

checks.register_with_hydra()
HEADER = "# @package _global_\n"
BASED = HEADER + "defaults: [base]\n"
BASE = HEADER + "defaults: [override /model: digits_net, override /data: digits]\nname: base\n"


@pytest.fixture
def experiment(tmp_path, monkeypatch):
    """Composes an experiment of some bytes; returns its config, or the message."""
    folder = tmp_path / "conf" / "experiment"
    folder.mkdir(parents=True)
    (folder / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)

    def compose_it(content, **others):
        for name, text in {"own": content, **others}.items():
            (folder / f"{name}.yaml").write_bytes(text if isinstance(text, bytes) else text.encode())
        overrides = [f"hydra.searchpath=[file://{tmp_path}/conf]", "experiment=own"]
        try:
            with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
                return compose("config", overrides)
        except Exception as error:
            return errors.format_error(error)

    return compose_it


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        (BASED + "trainer:\n\tsteps: 3\n", "conf/experiment/own.yaml:4:1: expected spaces, found a tab"),
        (BASED + "trainer:\n  steps: 3\n\teval_every: 0\n", "own.yaml:5:1: expected spaces, found a tab"),
        (BASED + "trainer: {steps: 3, steps: 4}\n", "own.yaml:3:21: the key steps stands twice in one mapping"),
        (BASED + "name: 'abc\n", "own.yaml:3:7: the quote that opens here is never closed"),
        (BASED + "trainer: {steps: 3\n", "own.yaml:4:1: expected ',' or '}'"),
        (BASED + "name: a: b\n", "own.yaml:3:8: mapping values are not allowed here; put a text with a colon into"),
        (BASED + "name: @x\n", "own.yaml:3:7: found character '@' that cannot start any token; put a text that"),
        (BASED + "name: *x\n", "own.yaml:3:7: found undefined alias 'x'; define it"),
        (BASED + "name: !x y\n", "own.yaml:3:7: could not determine a constructor for the tag '!x'; only plain YAML"),
        (BASED + "name: a\n---\nname: b\n", "own.yaml:4:1: expected one document, found another"),
        (BASED + "name: &a [*a]\n", "own.yaml: it is nested too deeply, or an alias holds itself"),
        (BASED + "name: 'a\x1b[31m'\n", "own.yaml:3:9: expected text, found the character \\x1b; delete it"),
        ((BASED + "name: caf\xe9\n").encode("latin-1"), "own.yaml:3:10: expected UTF-8, found byte 0xe9"),
        (HEADER.encode("utf-16"), "own.yaml:1:1: expected UTF-8, found byte 0xff"),
        ("", "own.yaml: the file is empty; an experiment begins with the line"),
        (HEADER + "- a\n", "own.yaml: expected a mapping (key: value) at the top level, found a list"),
        ("hello\n", "own.yaml: expected a mapping (key: value) at the top level, found 'hello'"),
        (HEADER + "defaults: mine\n", "own.yaml: defaults: expected a list, found 'mine'"),
        (HEADER + "defaults: [3]\n", "own.yaml: defaults: expected a name, or a group with its choice, found 3"),
        (HEADER + "defaults: [nowhere]\n", "experiment/nowhere: there is no such file in the config folders"),
        (BASED + "optimizer: {groups: {match: x}}\n", "optimizer.groups: expected a list, found a mapping"),
        (
            BASED + "data: {train: {_target_: a.b, sizes: {c: [1]}}}\ndistributed: {strategy: [x]}\n",
            "distributed.strategy: expected a mapping, found a list",
        ),
        (
            HEADER + "defaults: [override /export: huggingface]\n",
            "override export: it is no group with choices; set its keys",
        ),
        (
            HEADER + "defaults: [/export: huggingface]\n",
            "export: it is no group with choices; set its keys: export: {KEY: VALUE}",
        ),
        (
            HEADER + "defaults: [optimizer: sgd]\n",
            "experiment/optimizer: there is no such group; write override /optimizer: sgd",
        ),
        (
            BASED + "name: !!timestamp x\n",
            "own.yaml: a value can't be read as a number, or as its tag !!... says; put it",
        ),
        (HEADER + "defaults: [own]\n", "defaults: two configs include each other, or one includes itself"),
        (HEADER + "defaults: [base, override /optimzer: sgd]\n", "no such group; did you mean optimizer?"),
        (HEADER + "defaults: [base, override /optimizer: sgdd]\n", "optimizer=sgdd: no such choice; did you mean sgd?"),
        (HEADER + "defaults: [base, optimizer: sgd]\n", "there is no such group; write override /optimizer: sgd"),
        ("# @package _globl_\nname: x\n", "own.yaml:1: # @package _globl_: no such place in the config; did you mean"),
        ("name: x\n", 'experiment/own.yaml: expected the first line "# @package _global_"'),
        ("# a comment\n", 'experiment/own.yaml: expected the first line "# @package _global_"'),
        ("defaults: [override /model: null]\n", 'experiment/own.yaml: expected the first line "# @package _global_"'),
        (BASED + "trainer: 3\n", "own.yaml: trainer=3: expected a mapping of steps, accumulate,"),
        (BASED + "trainer: null\n", "own.yaml: trainer=null: expected a mapping of steps, accumulate,"),
        (BASED + "model: []\n", "own.yaml: model=[]: expected a mapping with _target_, found a list"),
        (BASED + "modle: {width: 3}\n", "In 'experiment/own': modle: no such key; did you mean model?"),
        (BASED + "trainer: {on_oom: off}\n", "on_oom=false: expected one of stop, skip; YAML"),
        (BASED + "trainer: {steps: 1e1}\n", "trainer.steps=10.0: expected a whole number; write 10"),
        (BASED + 'trainer: {precision: "a\\nb\\u001b[31m"}\n', "trainer.precision=a\\nb\\x1b[31m: expected one of"),
    ],
)
def test_a_mistake_in_a_file_is_one_line_with_location_and_remedy(experiment, content, expected):
    message = experiment(content)
    assert expected in message
    assert "\n" not in message


def test_two_files_that_include_each_other_are_reported(experiment):
    message = experiment(HEADER + "defaults: [other]\n", other=HEADER + "defaults: [own]\n")
    assert message.startswith("defaults: two configs include each other")


@pytest.mark.parametrize("content", [BASED + "name: marked\n", BASED.replace("\n", "\r\n") + "name: marked\r\n"])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["plain", "marked"])
def test_byte_order_marks_and_carriage_returns_are_ignored(experiment, mark, content):
    assert experiment(mark + content.encode()).name == "marked"


def test_each_listed_group_is_one_that_a_command_line_can_choose():
    with initialize_config_dir(str(checks.CONF_DIR), version_base="1.3"):
        loader = GlobalHydra.instance().config_loader()
        groups = [group for group in loader.get_group_options("", ObjectType.GROUP) if group != "hydra"]
        assert "optimizations" in groups
        defaults = compose("config", return_hydra_config=True).hydra.runtime.choices
        for group in groups:
            choice = loader.get_group_options(group)[0]
            prefix = "" if group in defaults else "+"
            compose("config", [f"{prefix}{group}={choice}"])
