"""Texts of YAML are read as OmegaConf's own loader reads them, whichever parser is used."""

import threading
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf._utils import get_yaml_loader

from runner.config import checks
from runner.config.composition import yaml_text
from runner.config.composition.yaml_text import parse_yaml
from runner.config.errors import ConfigError

FILES = sorted(Path(checks.CONF_DIR).rglob("*.yaml"))
TEXTS = [path.read_text() for path in FILES]
INSERTED = [
    "'",
    '"',
    ":",
    "#",
    "\t",
    "\n",
    "\r\n",
    "- ",
    "? ",
    "|",
    ">-\n  x\n",
    "[",
    "}",
    "&a ",
    "*a",
    "<<: ",
    "!!int ",
]
INSERTED += [
    "!",
    "! ",
    "!k ",
    "---\n",
    "%YAML 1.1\n",
    "yes",
    "~",
    "1_000",
    "1e3",
    "0o7",
    "1:30",
    "2001-01-01",
    "\x85",
    "\ufeff",
    "é",
]


def read(text, load):
    try:
        return load(text)
    except (yaml.YAMLError, ConfigError, ValueError, LookupError, RecursionError):
        return "refused"


def load_as_omegaconf(text):
    content = yaml.load(text, Loader=get_yaml_loader())
    return (content or {}) if isinstance(content, dict | None) else "refused"


def load(text):
    return OmegaConf.to_container(parse_yaml("own.yaml", text), resolve=False)


@given(st.sampled_from(TEXTS), st.lists(st.tuples(st.integers(0, 400), st.sampled_from(INSERTED)), max_size=4))
def test_a_text_has_the_values_that_omegaconf_reads(text, changes):
    for position, inserted in changes:
        text = text[:position] + inserted + text[position:]
    expected = read(text, load_as_omegaconf)
    found = read(text, load)
    assert found == expected or found == "refused"  # keys that are no text are refused later


@pytest.mark.parametrize(
    "text", ["a:\tb\n", "a: [b? c]\n", "a: |# c\n  b\n", "\x85\ufeffa: b\n", "a: b\t\n", "a: !\nb: 1\n", "a: [!, b]\n"]
)
def test_what_the_parsers_read_differently_is_read_by_omegaconfs(text):
    assert read(text, load) == read(text, load_as_omegaconf)


@pytest.mark.parametrize("value", ["!!int ", "!!int x", "!!bool x", "!!float x", "!!timestamp x", "0x_", "0b_"])
def test_a_value_that_does_not_fit_its_tag_is_reported(value):
    with pytest.raises(ConfigError, match=r"own.yaml: a value can't be read as a number, or as its tag"):
        parse_yaml("own.yaml", f"a: {value}\n")


@pytest.mark.parametrize("opened", ["[", "{a: ", "- ", "a: [["])
@pytest.mark.parametrize("length", [yaml_text._MAX_LIBYAML_CHARACTERS, 200_000])
def test_deep_nesting_is_reported_in_any_thread(opened, length):
    messages = []

    def parse():
        try:
            parse_yaml("own.yaml", (opened * length)[:length])
        except ConfigError as error:
            messages.append(str(error))

    thread = threading.Thread(target=parse)
    thread.start()
    thread.join()
    assert [message.partition(":")[0] for message in messages] == ["own.yaml"]
