"""Every reader of a run folder, checkpoint or export, fed with anything: only the documented exceptions come out.

`RUNNER_FUZZ=10000` tries so many examples of each (README.md).
"""

import copy
import json
import os
import shutil
import struct
import tempfile
import zipfile
from pathlib import Path

import pytest
import torch
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from tensorboard.compat.proto.event_pb2 import Event
from torch import nn

from runner.checkpoint import checkpoints as checkpoint
from runner.checkpoint import shards
from runner.checkpoint.checkpoints import CheckpointError, Checkpoints
from runner.config import checkpoint_facts, checks, errors, run_folder
from runner.config.composition.expansion import _ExpansionCounter
from runner.config.errors import ConfigError
from runner.control.commands import CommandQueue
from runner.control.handlers import COMMANDS
from runner.engines import Engine, Engines
from runner.run import exports, run
from runner.run.best import Best
from runner.tracking import event_file
from runner.tracking.repair import read_lines
from runner.tracking.run_record import RunRecord
from runner.tracking.tracker import TrackerThread
from runner.utils import io
from runner.utils.files.strict_json import parse_json

EXAMPLES = int(os.environ.get("RUNNER_FUZZ", "50"))
fuzzed = settings(
    max_examples=EXAMPLES,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large],
)


def refusal(call, *kinds):
    """Returns the error of a kind that a call has raised, or None; an error of another kind fails the test."""
    try:
        call()
    except kinds as error:
        return error
    return None


# ── anything ──

TEXTS = st.text(st.characters(exclude_categories=()), max_size=8)
NUMBERS = st.integers() | st.floats() | st.sampled_from([0, 1, -1, 1 << 31, 1 << 53, 1 << 63, -(1 << 63), 1 << 64, 0.5])
VALUES = st.recursive(
    st.none() | st.booleans() | NUMBERS | TEXTS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXTS, inner, max_size=3),
    max_leaves=6,
)
SPECIAL = [
    "9" * 400, "9" * 5000, "-" + "9" * 400, "1e999", "-1e999", "1e-999", "NaN", "Infinity", "-0", "1.0", "true", "",
    '"\\ud800"', '"\\u0000"', '"\\n\\u001b[31m"', '{"a": 1, "a": 2}', "[" * 99 + "]" * 99, "[" * 5000 + "]" * 5000,
    '{"a":' * 150 + "1" + "}" * 150, "[1,", "'a'", "\x00", '"' + "x" * 5000 + '"',
]  # fmt: skip
JSON_TEXTS = st.sampled_from(SPECIAL) | VALUES.map(json.dumps)
_MARK = "@@ here @@"


def paths_in(value, path=()):
    yield path
    if isinstance(value, (dict, list, tuple)):
        for key, child in value.items() if isinstance(value, dict) else enumerate(value):
            yield from paths_in(child, (*path, key))


def replaced(value, path, new):
    """Returns a copy of a nest with another value at a path."""
    if not path:
        return new
    key, *rest = path
    if isinstance(value, dict):
        return {**value, key: replaced(value[key], rest, new)}
    return type(value)(replaced(child, rest, new) if at == key else child for at, child in enumerate(value))


@st.composite
def mutated_json(draw, document, most=2):
    """JSON texts of a document with other values at random places, keys removed, or keys added."""
    texts = []
    for _ in range(draw(st.integers(1, most))):
        path = draw(st.sampled_from(list(paths_in(document))))
        kind = draw(st.sampled_from(["replace", "replace", "remove", "add"]))
        if kind == "remove" and path and isinstance(path[-1], str):
            parent = document
            for key in path[:-1]:
                parent = parent[key]
            if isinstance(parent, dict):
                document = replaced(document, path[:-1], {k: v for k, v in parent.items() if k != path[-1]})
                continue
        if kind == "add" and not path and isinstance(document, dict):
            document = {**document, draw(TEXTS): draw(VALUES)}
            continue
        document = replaced(document, path, f"{_MARK}{len(texts)}")
        texts.append(draw(JSON_TEXTS))
    whole = json.dumps(document)
    for number, text in enumerate(texts):
        whole = whole.replace(json.dumps(f"{_MARK}{number}"), text)
    return whole


@st.composite
def mutated_bytes(draw, content, most=3):
    """Bytes of a file that were flipped, cut, moved, doubled or put in."""
    content = bytearray(content)
    for _ in range(draw(st.integers(1, most))):
        first, last = sorted(draw(st.tuples(*[st.integers(0, len(content))] * 2)))
        kind = draw(st.sampled_from(["flip", "cut", "splice", "double", "insert", "end"]))
        if kind == "flip" and first < len(content):
            content[first] ^= 1 << draw(st.integers(0, 7))
        elif kind == "cut":
            del content[first:last]
        elif kind == "splice":
            place = draw(st.integers(0, len(content)))
            content[place:place] = content[first:last]
        elif kind == "double":
            content[last:last] = content[first:last]
        elif kind == "end":
            del content[first:]
        else:
            content[first:first] = draw(st.binary(min_size=1, max_size=20))
    return bytes(content)


@pytest.fixture(scope="module")
def folder():
    with tempfile.TemporaryDirectory() as made:
        (Path(made) / ".hydra").mkdir()
        yield Path(made)


class Files(dict):
    """Bytes by name, which a failed test does not print."""

    __repr__ = object.__repr__


@pytest.fixture(scope="module")
def real(finished_run):
    """The small files of a real run, by name."""
    newest, _ = Checkpoints(finished_run / "checkpoints").newest()
    files = [finished_run / name for name in ("run.json", "metrics.jsonl")]
    files += [*finished_run.glob(".hydra/*"), *newest.glob("*.json"), next(finished_run.glob("events.out.*"))]
    found = {path.name: path.read_bytes() for path in files if path.suffix in (".json", ".jsonl", ".yaml")}
    return Files(found | {"events": files[-1].read_bytes(), "checkpoint": newest})


# ── YAML: a run's config, overrides, Hydra's ──

INTERPOLATIONS = st.sampled_from(
    ["${a}", "${b.c}", "${.a}", "${..a}", "x${a}", "${a}${b}", "${", "\\${a}", "${a.${b}}"]
)
CONFIGS = st.recursive(
    st.none() | st.booleans() | NUMBERS | st.text("ab ${}.:'\"[],\\", max_size=12) | INTERPOLATIONS,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from("abc"), inner, max_size=3),
    max_leaves=12,
)


def read_whole_config(folder, content):
    """Reads a config as a resume does, up to its values; what it is refused by is one message."""
    (folder / ".hydra" / "config.yaml").write_bytes(content)
    error = refusal(
        lambda: checks.to_plain(OmegaConf.create(run_folder.read_config(folder))), ConfigError, OmegaConfBaseException
    )
    assert error is None or errors.format_error(error)


@fuzzed
@given(st.binary(max_size=60) | CONFIGS.map(lambda value: json.dumps(value).encode()))
@example(b"a: " + b"[" * 100_000)
@example(b"a: " + b"{a: " * 500)
@example(b"a: " + b"1:" * 300_000 + b"1")
@example(b"a: " + b"9" * 5000)
@example(b"a: !!int '1'")
@example(b"? [a, b]\n: 1")
@example(b"a: 1\na: 2")
@example(b"a: ${" + b"a" * 20_000)
@example(b"a: '" + b"${" * 4_000 + b"'")
@example(b"a: ${a.${a}}")
@example(b"\xff\xfe")
@example(b"")
def test_any_config_is_read_or_refused_in_one_message(folder, content):
    read_whole_config(folder, content)


@fuzzed
@given(st.data())
def test_a_config_that_was_changed_is_read_or_refused_in_one_message(folder, real, data):
    read_whole_config(folder, data.draw(mutated_bytes(real["config.yaml"])))


@fuzzed
@given(st.data())
def test_overrides_and_hydras_config_are_read_or_refused_in_one_message(folder, real, data):
    texts = st.lists(st.text("a1.=[]{}()'\"$,:+~ \\", max_size=20), max_size=3).map(json.dumps).map(str.encode)
    (folder / ".hydra" / "overrides.yaml").write_bytes(data.draw(texts | mutated_bytes(real["overrides.yaml"])))
    (folder / ".hydra" / "hydra.yaml").write_bytes(data.draw(mutated_bytes(real["hydra.yaml"])))

    def read():
        for override in run_folder.read_overrides(folder):
            OverridesParser.create().parse_override(override)

    def read_hydra():
        cfg = OmegaConf.create({"name": "x", "a": "${hydra:job.name}", "b": "${hydra:run}"})
        with run_folder.recorded_hydra_config(folder, cfg):
            checks.to_plain(cfg)

    checks.register_with_hydra()
    for each in (read, read_hydra):
        error = refusal(each, ConfigError, HydraException, OmegaConfBaseException)
        assert error is None or errors.format_error(error)


@pytest.mark.parametrize(
    "overrides",
    [["a=" + "[" * 3000], ["a=" + "{a:" * 300], ["a=[" + "1," * 2000 + "1]"], ["a=1"] * 1001, ["a=" + "x" * 20_000]],
    ids=["brackets", "braces", "commas", "many", "long"],
)
def test_overrides_that_take_long_to_parse_are_refused(folder, overrides):
    (folder / ".hydra" / "overrides.yaml").write_text(json.dumps(overrides))
    with pytest.raises(ConfigError, match=r"overrides\.yaml: "):
        run_folder.read_overrides(folder)


@fuzzed
@given(CONFIGS, CONFIGS, CONFIGS)
def test_what_a_config_expands_to_is_not_more_than_was_counted(a, b, c):
    """OmegaConf resolves what was not refused, without exhausting the stack."""
    plain = {"a": a, "b": b, "c": c}
    error = refusal(lambda: checks.to_plain(OmegaConf.create(plain)), ConfigError, OmegaConfBaseException)
    if error is not None:
        assert "RecursionError" not in str(error)
        return
    resolved = OmegaConf.to_container(OmegaConf.create(plain), resolve=True)
    counted = _ExpansionCounter(plain, is_strict=False).expand(())
    assert len(list(paths_in(resolved))) <= counted.values
    assert len(json.dumps(resolved, default=str)) <= 8 * counted.characters + 20 * counted.values


@fuzzed
@given(st.data())
def test_an_exports_config_is_read_or_refused(data):
    whole = json.loads(checks.to_json({"model": {"_target_": "own.Model", 1: b"x"}, "a": [1, None, "${b}"]}))
    text = data.draw(mutated_json(whole) | JSON_TEXTS)
    error = refusal(lambda: checks.from_json(text), ValueError, TypeError)
    assert error is None or str(error)


# ── records ──


def use_record(folder):
    """Reads run.json as every command does."""
    record = run_folder.read_record(folder)
    run_folder.is_crashed(record)
    assert isinstance(run._describe_runner(folder), str)
    assert all(isinstance(value, str) for value in exports.make_metadata({}, folder, 1, None, None).values())
    reader = RunRecord(folder, lambda directory: True)
    if error := refusal(reader.read, ValueError):
        assert "not the record of a run" in str(error)
        return
    valid = reader.read()
    (folder / "run.json").write_text(json.dumps(valid))
    assert reader.read() == valid
    assert reader.faults == []
    assert round(sum(session["duration_s"] for session in valid["sessions"]), 3) >= 0


@fuzzed
@given(st.data())
def test_a_record_of_any_content_is_read_and_what_is_left_of_it_is_valid(folder, real, data):
    content = mutated_json(json.loads(real["run.json"])).map(lambda text: text.encode("utf-8", "surrogatepass"))
    (folder / "run.json").write_bytes(data.draw(content | mutated_bytes(real["run.json"])))
    use_record(folder)


@pytest.mark.parametrize("text", SPECIAL)
def test_a_record_with_a_value_of_any_kind_in_each_place_is_read(folder, text):
    whole = {"status": "s", "pid": 1, "host": "h", "started": "s", "last_step": 1, "git": {"commit": "c"}, "best": {}}
    whole["sessions"] = [{"status": "s", "pid": 1, "host": "h", "duration_s": 1.0, "started": "s"}]
    for path in paths_in(whole):
        written = json.dumps(replaced(whole, path, _MARK)).replace(json.dumps(_MARK), text)
        (folder / "run.json").write_text(written)
        use_record(folder)


def test_what_is_left_out_of_a_record_is_named(tmp_path):
    session = {"status": "finished", "pid": 1, "host": "h", "duration_s": 1.0}
    content = {"started": 5, "sessions": [session, {**session, "pid": "x"}, 7], "last_step": -1, "best": [], "own": 1}
    (tmp_path / "run.json").write_text(json.dumps(content))
    record = RunRecord(tmp_path, lambda directory: True)
    assert record.read() == {"own": 1, "sessions": [session]}
    assert sorted(record.faults) == ["best: []", "last_step: -1", "sessions.1.pid: 'x'", "sessions.2: 7", "started: 5"]


# ── numbers ──


def resume_numbers(folder, step, recorded=None):
    """Resumes the numbers in a folder, which no content of its files may end; returns what is warned of."""
    warnings = []
    tracker = TrackerThread(folder, resume_step=step, recorded=recorded, warn=warnings.append)
    tracker.log(step + 1, {"train/loss": 1.0})
    tracker.close()
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_bytes().splitlines()]
    assert lines[-1]["step"] == step + 1
    assert all(0 <= line["step"] <= step + 1 for line in lines)
    return warnings


def put_numbers(folder, lines, events):
    for path in [*folder.glob("events.out.*"), folder / "metrics.jsonl"]:
        path.unlink(missing_ok=True)
    (folder / "metrics.jsonl").write_bytes(lines)
    (folder / "events.out.tfevents.0000000001.host.1.0").write_bytes(events)


@st.composite
def lines_of_anything(draw, content):
    lines = content.splitlines()
    for _ in range(draw(st.integers(1, 3))):
        place = draw(st.integers(0, len(lines) - 1))
        text = draw(mutated_json(json.loads(content.splitlines()[0])) | JSON_TEXTS)
        lines.insert(place, text.encode("utf-8", "surrogatepass"))
    return b"\n".join(lines) + b"\n"


@st.composite
def events_of_anything(draw, content):
    """A real event file with records put in, of right checksums and any payload."""
    records = []
    for _ in range(draw(st.integers(1, 3))):
        event = Event(wall_time=draw(st.floats() | st.just(1.0)), step=draw(st.integers(-(1 << 63), (1 << 63) - 1)))
        for tag in draw(st.lists(st.text(max_size=3) | st.sampled_from(["step", "time_s", "eval/a"]), max_size=2)):
            event.summary.value.add(tag=tag, simple_value=draw(st.floats(width=32)))
        payload = event.SerializeToString()
        records.append(event_file.frame(draw(st.just(payload) | st.binary(max_size=20) | mutated_bytes(payload))))
    first = event_file.frame(Event(wall_time=1.0, file_version="brain.Event:2").SerializeToString())
    return draw(st.sampled_from([content + b"".join(records), b"".join(records) + content, first + b"".join(records)]))


@fuzzed
@given(st.data(), st.integers(0, 12))
def test_numbers_of_any_content_are_resumed(tmp_path_factory, real, data, step):
    folder = Path(tempfile.mkdtemp(dir=tmp_path_factory.getbasetemp()))
    lines = st.just(real["metrics.jsonl"]) | mutated_bytes(real["metrics.jsonl"])
    events = st.just(real["events"]) | mutated_bytes(real["events"])
    lines, events = lines | lines_of_anything(real["metrics.jsonl"]), events | events_of_anything(real["events"])
    put_numbers(folder, data.draw(lines), data.draw(events))
    numbers = exports.last_evaluation(folder, step)
    assert numbers is None or all(value is None or isinstance(value, (int, float)) for value in numbers.values())
    exports.make_metadata({}, folder, step, None, numbers)
    resume_numbers(folder, step, data.draw(st.sampled_from([{}, {"lines": 9, "events": 9, "step": 1 << 52}])))
    shutil.rmtree(folder)


@pytest.mark.parametrize(
    "text",
    [*[text for text in SPECIAL if text != "-0"], "\u2028", '{"step": 1}', '{"step": 1, "time_s": 1.0, "a": {}}'],
)
def test_a_line_that_no_run_writes_is_damaged(tmp_path, text):
    whole = b'{"step": 1, "time_s": 0.5, "a": 1.5}\n'
    for place in ["step", "time_s", "a", None]:
        line = {"step": 1, "time_s": 0.5, "a": 1.5}
        written = text if place is None else json.dumps({**line, place: _MARK}).replace(json.dumps(_MARK), text)
        (tmp_path / "metrics.jsonl").write_bytes(whole + written.encode() + b"\n" + whole)
        log = read_lines(tmp_path / "metrics.jsonl", 10, False)
        assert [record.content for record in log.records if record.content == whole] == [whole, whole]
        resume_numbers(tmp_path, 1)


def test_a_line_without_end_is_damaged_and_takes_no_memory(tmp_path):
    with open(tmp_path / "metrics.jsonl", "wb") as file:
        file.write(b'{"step": 1, "time_s": 0.5, "a": 1.5}\n{"step": 2')
    os.truncate(tmp_path / "metrics.jsonl", 1 << 24)  # of a hole, which the disk does not store
    log = read_lines(tmp_path / "metrics.jsonl", 10, False)
    assert [record.step for record in log.records] == [1]
    assert log.is_damaged
    assert exports.last_evaluation(tmp_path, 10) is None


def test_records_that_contain_each_other_end_soon(tmp_path):
    """The checksums of all would take the square of the file's length."""
    head = b""
    size = 1 << 18
    for at in range(0, size, 12):
        length = struct.pack("<Q", size - at)
        head += length + event_file._masked_crc(length)
    (tmp_path / "events.out.tfevents.1.host").write_bytes(head + bytes(2 * size))
    assert event_file.read_log(tmp_path / "events.out.tfevents.1.host", 10).records == []


def test_steps_far_apart_are_told_as_a_range(tmp_path):
    lines = [f'{{"step": {step}, "time_s": 1.0, "a": 1.0}}\n' for step in (1, 1 << 50)]
    put_numbers(tmp_path, "damaged\n".join(lines).encode(), b"")
    warnings = resume_numbers(tmp_path, 1 << 52, {"lines": 9, "events": 9, "step": 1 << 52})
    assert f"to {1 << 52} are missing" in warnings[-1]


def test_what_is_no_regular_file_is_told_by_name(tmp_path):
    os.mkfifo(tmp_path / "events.out.tfevents.1.host.1.0")
    assert "is a FIFO" in resume_numbers(tmp_path, 0)[0]
    (tmp_path / "metrics.jsonl").unlink()
    os.mkfifo(tmp_path / "metrics.jsonl")
    with pytest.raises(OSError, match=r"metrics\.jsonl: is a FIFO"):
        TrackerThread(tmp_path, resume_step=1)
    assert exports.last_evaluation(tmp_path, 1) is None


# ── checkpoints ──


def forge(path, manifest):
    """Writes a manifest with its checksum: whoever forges a file can forge that too."""
    try:
        content = json.loads(manifest)
        content.pop("crc32c", None)
        manifest = json.dumps(content | {"crc32c": checkpoint._checksum(content)}) + "}\n"[:0] + "\n"
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass
    (path / "MANIFEST.json").write_bytes(manifest.encode("utf-8", "surrogatepass"))


@pytest.fixture(scope="module")
def copied(real, folder):
    """A copy of a checkpoint, alone in its folder."""
    path = folder / "checkpoints" / "step_00000012"
    shutil.copytree(real["checkpoint"], path)
    return path


@fuzzed
@given(st.data())
def test_a_manifest_of_any_content_is_verified_or_refused(copied, real, data):
    forge(copied, data.draw(mutated_json(json.loads(real["MANIFEST.json"]), 3)))
    checkpoints = Checkpoints(copied.parent, rate=Best("eval/loss", False).rate)
    if error := refusal(lambda: checkpoint.verify(copied), CheckpointError):
        assert "step_00000012: " in str(error)
        assert not checkpoints.has(12)
    checkpoints.rank_best(count=3)
    checkpoints.newest()


def load_facts(text):
    """Checks a checkpoint's facts, and loads of them what can be loaded without a run."""
    loaded = parse_json(text)
    checkpoint_facts.check_content({"trainer.json": loaded})
    CommandQueue(COMMANDS, print).load_state_dict(loaded["commands"])
    Best(None, False).restore_best(loaded["best"], {})
    Best("eval/loss", True).restore_best(loaded["best"], {"eval/loss": 1.0})


@fuzzed
@given(st.data())
def test_facts_of_any_content_are_taken_or_refused_by_name(real, data):
    text = data.draw(mutated_json(json.loads(real["trainer.json"])))
    error = refusal(lambda: load_facts(text), ValueError)
    assert error is None or str(error)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("loop",), 1),
        (("loop", "step"), 1.5),
        (("loop", "step"), 1 << 60),
        (("loop", "owed"), ["rm"]),
        (("loop", "skipped"), None),
        (("batches", "ordinal"), "1"),
        (("batches", "sampler"), []),
        (("commands", "pending"), ["rm -rf@3"]),
        (("commands", "pending"), ["save"]),
        (("best", "value"), 10**400),
        (("fingerprint",), {}),
        (("numbers", "lines"), -1),
    ],
    ids=lambda value: ".".join(value) if isinstance(value, tuple) else "",
)
def test_a_run_is_opened_at_the_newest_checkpoint_whose_facts_are_right(tmp_path, finished_run, path, value):
    shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
    newest = tmp_path / "checkpoints" / "step_00000012"
    content = io.read_json(newest / "trainer.json")
    (newest / "trainer.json").write_text(json.dumps(replaced(content, path, value)))
    manifest = io.read_json(newest / "MANIFEST.json")
    manifest["files"]["trainer.json"] = checkpoint._measure(newest / "trainer.json")
    forge(newest, json.dumps(manifest))
    found, _, faults = run_folder.find_checkpoint(tmp_path)
    assert found.name == "step_00000008"
    assert len(faults) == 1
    assert f"step_00000012: trainer.json: {path[0]}" in faults[0]
    with pytest.raises(ConfigError, match=r"trainer\.json: "):
        run_folder.find_checkpoint(newest)


def test_a_run_with_corrupt_records_is_resumed_from_what_is_right(trained):
    folder = trained.folder / "run"
    with open(folder / "metrics.jsonl", "a") as file:
        for text in SPECIAL[:12]:
            file.write(f'{{"step": 1, "time_s": {text}}}\n')
    record = json.loads((folder / "run.json").read_text())
    record |= {"sessions": [*record["sessions"], {"pid": "x"}], "git": [], "best": 5, "last_step": 10**400}
    (folder / "run.json").write_text(json.dumps(record))
    newest = folder / "checkpoints" / "step_00000012"
    facts_of_run = io.read_json(newest / "trainer.json")
    (newest / "trainer.json").write_text(json.dumps(replaced(facts_of_run, ("loop", "skipped"), {"a": "b"})))
    manifest = io.read_json(newest / "MANIFEST.json")
    manifest["files"]["trainer.json"] = checkpoint._measure(newest / "trainer.json")
    forge(newest, json.dumps(manifest))
    printed = trained.run("resume=run", "allow_targets=[own]")
    assert "Passed over: " in printed
    assert "trainer.json: loop.skipped: expected a number from 0 on, found dict" in printed
    assert "run.json: left out best: 5" in printed
    assert "run.json: left out sessions.1" in printed
    assert "Going on after step 8" in printed
    assert "Traceback" not in printed
    assert [json.loads(line)["step"] for line in (folder / "metrics.jsonl").read_text().splitlines()][-1] == 12
    assert len(json.loads((folder / "run.json").read_text())["sessions"]) == 2


@pytest.mark.parametrize("name", ["config.yaml", "overrides.yaml", "hydra.yaml"])
def test_a_fifo_in_place_of_a_config_is_told_at_once(tmp_path, name):
    (tmp_path / ".hydra").mkdir()
    (tmp_path / ".hydra" / "config.yaml").write_text("a: ${hydra:run.dir}")
    (tmp_path / ".hydra" / name).unlink(missing_ok=True)
    os.mkfifo(tmp_path / ".hydra" / name)
    with pytest.raises(ConfigError, match=rf"{name}: can't be read \(is a FIFO, expected a regular file\)"):
        (run_folder.read_overrides if name == "overrides.yaml" else run_folder.read_config)(tmp_path)


@pytest.mark.parametrize("name", ["MANIFEST.json", "trainer.json", "model.safetensors"])
def test_a_fifo_in_place_of_a_file_of_a_checkpoint_is_passed_over(tmp_path, finished_run, name):
    shutil.copytree(finished_run / "checkpoints", tmp_path / "checkpoints")
    file = tmp_path / "checkpoints" / "step_00000012" / name
    file.unlink()
    os.mkfifo(file)
    found, _, faults = run_folder.find_checkpoint(tmp_path)
    assert found.name == "step_00000008"
    assert name in faults[0]


def make_engines():
    module = nn.Linear(2, 1)
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    engine = Engine(module, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2), feeder=lambda m, b: m(b).sum())
    return Engines(model=engine)


def train(engines):
    engines.micro_step(torch.ones(3, 2))
    engines.step()
    return engines


ODD = VALUES | st.sampled_from([torch.zeros(()), torch.zeros(3), torch.ones(2, 1, dtype=torch.int64), (), b"", 1j])


@fuzzed
@given(st.data())
def test_an_engines_state_of_any_content_is_taken_or_refused(data):
    state = train(make_engines()).state_dict()
    path = data.draw(st.sampled_from([path for path in paths_in(state) if path]))
    state = replaced(dict(state), path, data.draw(ODD))
    facts_of_run = {"loop": {"step": 1, "skipped": 0, "owed": []}, "commands": {"pending": []}, "best": None}
    facts_of_run["batches"] = {"sampler": {}, "ordinal": 0}
    engines = make_engines()

    def load():
        checkpoint_facts.check_content({**state, "trainer.json": facts_of_run})
        engines.load_state_dict(state)
        engines.take_metrics()

    error = refusal(load, ValueError)
    assert error is None or str(error)


# ── tensors ──

VALUE = {
    "weight": torch.arange(6.0).reshape(2, 3), "list": [1, None, "x", (2.5, True)], "bytes": b"ab", "big": 1 << 70,
    "array": torch.arange(3).numpy(), "complex": torch.zeros(2, dtype=torch.complex128),
    "sparse": torch.eye(2).to_sparse(),
}  # fmt: skip
PLAIN = {"weight": torch.arange(6.0).reshape(2, 3), "list": [1, None, "x", (2.5, True)], "bytes": b"ab"}


@pytest.fixture(scope="module")
def stored(folder):
    """Bytes of a `.sft` and two `.pt` files, and the parts of the first: structure and tensors."""
    found = {}
    for name, value in (("a.sft", VALUE), ("b.pt", PLAIN), ("c.pt", VALUE)):
        io.save(value, folder / name)
        found[name] = (folder / name).read_bytes()
    (size,) = struct.unpack_from("<Q", found["a.sft"])
    header = json.loads(found["a.sft"][8 : 8 + size])
    structure = json.loads(header["__metadata__"]["runner.structure"])
    return Files(found | {"header": header, "structure": structure, "size": size})


def load_or_refuse(path):
    for read in (io.load, io.read_metadata):
        error = refusal(lambda read=read: read(path), ValueError)
        assert error is None or str(error).startswith(str(path))


@fuzzed
@given(st.data(), st.sampled_from(["a.sft", "b.pt", "c.pt"]))
def test_a_changed_file_of_tensors_is_read_or_refused_by_name(folder, stored, data, name):
    path = folder / f"changed.{name}"
    path.write_bytes(data.draw(mutated_bytes(stored[name])))
    load_or_refuse(path)


@fuzzed
@given(st.data())
def test_a_structure_of_any_content_is_read_or_refused_by_name(folder, stored, data):
    header = copy.deepcopy(stored["header"])
    header["__metadata__"]["runner.structure"] = data.draw(mutated_json(stored["structure"], 3))
    encoded = json.dumps(header).encode("utf-8", "replace")
    content = struct.pack("<Q", len(encoded)) + encoded + stored["a.sft"][8 + stored["size"] :]
    (folder / "changed.sft").write_bytes(content)
    load_or_refuse(folder / "changed.sft")


@fuzzed
@given(st.data(), st.sampled_from(["b.pt", "c.pt"]))
def test_a_pickle_of_any_content_is_read_or_refused_by_name(folder, stored, data, name):
    (folder / "source.pt").write_bytes(stored[name])
    with zipfile.ZipFile(folder / "source.pt") as source, zipfile.ZipFile(folder / "changed.pt", "w") as changed:
        for member in source.namelist():
            content = source.read(member)
            is_changed = member.endswith("data.pkl")
            changed.writestr(member, data.draw(mutated_bytes(content)) if is_changed else content)
    load_or_refuse(folder / "changed.pt")


@fuzzed
@given(st.data())
def test_an_index_of_shards_of_any_content_is_read_or_refused(folder, data):
    path = folder / "shards"
    if not path.is_dir():
        path.mkdir()
        shards.write({"model/w": torch.ones(2, 3), "model/b": torch.ones(0)}, path)
        shutil.copy(path / "shards.json", folder / "whole.json")
    text = data.draw(mutated_json(io.read_json(folder / "whole.json")))
    (path / "shards.json").write_bytes(text.encode("utf-8", "surrogatepass"))
    error = refusal(lambda: shards.read(path), ValueError)
    assert error is None or str(path) in str(error)
