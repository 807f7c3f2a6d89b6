"""Records of a run with values of any type, size or depth, and floods of typed commands."""

import json
import os
import random
import struct

from crc32c import crc32c
from tensorboard.compat.proto.event_pb2 import Event
from tensorboard.compat.proto.summary_pb2 import Summary

from attacks.plants import ESCAPES, OWN, attack, deep, events_of, set_json

BOTH = (OWN, "untrusted")


def _line(short, line, *commands, of=("untrusted",), before=False):
    """Adds an attack with one more line in metrics.jsonl."""

    def plant(run, decoy):
        path = run / "metrics.jsonl"
        added = line.encode("utf-8", "surrogatepass") if isinstance(line, str) else line
        content = path.read_bytes()
        path.write_bytes(added + b"\n" + content if before else content + added + b"\n")

    attack(*commands, of=of, name=f"metrics_{short}")(plant)


_ESCAPED = json.dumps(ESCAPES)[1:-1]
_line("of_a_long_number", '{"step": 1, "time_s": ' + "9" * 400 + "}", "resume", "export", of=BOTH)
_line("of_a_longer_number", '{"step": 1, "time_s": 1.0, "eval/loss": ' + "9" * 5000 + "}", "resume", "export", "sweep")
_line("of_a_long_step", '{"step": ' + "9" * 400 + ', "time_s": 1.0, "eval/loss": 1}', "resume", "export")
_line("of_infinity", '{"step": 1, "time_s": 1e999, "train/loss": 1e999}', "resume", "export", of=BOTH)
_line("of_named_infinity", '{"step": 1, "time_s": 1, "eval/loss": -Infinity, "eval/x": NaN}', "resume", "export")
_line("that_is_deep", deep('{"a":', "}"), "resume", "export", "requeue")
_line("that_is_a_deep_list", '{"step": 1, "time_s": 1, "eval/loss": ' + deep("[", "]") + "}", "resume", "export")
_line("of_a_surrogate", '{"step": 1, "time_s": 1, "\\ud800": 1, "eval/\\udfff": 2}', "resume", "export")
_line("of_other_bytes", b'{"step": 1, "\xff\xfe": 1}\x00\x00', "resume", "export")
_line(
    "of_escapes",
    f'{{"step": 1, "time_s": 1, "eval/{_ESCAPED}": 1, "train/{_ESCAPED}": 1}}',
    "resume",
    "export",
    of=BOTH,
)
_line("of_raw_escapes", '{"step": 1, "time_s": 1, "\x1b[2Jx": 1}', "resume")
_line("of_other_types", '{"step": {}, "time_s": [], "eval/loss": "x"}', "resume", "export")
_line("of_truths", '{"step": true, "time_s": false, "eval/loss": true}', "resume", "export")
_line("of_texts", '{"step": "1", "time_s": "1", "eval/loss": {"a": 1}}', "resume", "export")
_line("of_a_half_step", '{"step": 1.5, "time_s": 1e308, "eval/loss": 1}', "resume")
_line("of_a_negative_step", '{"step": -1, "time_s": -1e308, "eval/loss": 1}', "resume")
_line("of_a_key_twice", '{"step": 1, "step": 2, "time_s": 1, "time_s": 2}', "resume")
_line("that_is_a_list", "[1, 2]", "resume", "export")
_line("that_is_a_number", "5", "resume", "export")
_line("of_50_mb", '{"step": 1, "x": "' + "a" * 50_000_000 + '"}', "resume", "export")
_line(
    "of_many_keys",
    "{" + ",".join(f'"eval/x{n}": 1' for n in range(50_000)) + ', "step": 1, "time_s": 1}',
    "resume",
    "export",
)
_line("that_is_many", '{"step": 4, "time_s": 1, "train/loss": 1}\n' * 20_000, "resume")
_line("of_empty_lines", "\n" * 500_000, "resume", "export")
_line("that_is_first", deep("[", "]"), "resume", before=True)
_line("of_a_mark", b"\xef\xbb\xbf{}", "resume", before=True)


def _record(short, values, *commands, of=("untrusted",)):
    attack(*commands, of=of, name=f"record_{short}")(lambda run, decoy: set_json(run / "run.json", values))


def _record_text(short, text, *commands):
    attack(*commands, name=f"record_{short}")(lambda run, decoy: (run / "run.json").write_text(text))


_SESSION = {"status": "running", "duration_s": 1.0, "pid": 1, "host": ESCAPES}
_record("of_other_sessions", {"sessions": 5}, "resume", "evaluate")
_record("of_null_sessions", {"sessions": None}, "resume", "requeue")
_record("of_mixed_sessions", {"sessions": [5, None, {}, "x"]}, "resume", "sweep")
_record(
    "of_escaped_sessions", {"sessions": [_SESSION], "status": ESCAPES, "reason": ESCAPES}, "resume", "evaluate", of=BOTH
)
_record("of_infinite_sessions", {"sessions": [_SESSION | {"duration_s": float("inf")}]}, "resume")
_record("of_long_sessions", {"sessions": [_SESSION | {"duration_s": 10**400, "pid": 10**400}]}, "resume")
_record("of_many_sessions", {"sessions": [_SESSION] * 3000}, "resume")
_record("of_another_process", {"status": "running", "pid": 10**30, "host": os.uname().nodename}, "evaluate", "export")
_record("of_a_negative_process", {"status": "running", "pid": -1, "host": os.uname().nodename}, "evaluate")
_record("of_git_in_a_text", {"git": "text"}, "export", "resume")
_record("of_escaped_git", {"git": {"commit": ESCAPES}}, "export", "resume")
_record("of_a_deep_commit", {"git": {"commit": [[[{}]]]}}, "export")
_record("of_other_facts", {"best": 5, "last_step": "x", "launch": {}, "started": [], "ranks": -1}, "resume", "evaluate")
_record("of_a_best_of_escapes", {"best": {"name": ESCAPES, "value": ESCAPES, "step": ESCAPES}}, "resume")
_record_text("that_is_deep", deep("[", "]"), "resume", "evaluate", "export")
_record_text("that_is_a_deep_mapping", deep('{"sessions":', "}"), "resume", "evaluate")
_record_text("of_a_long_number", '{"pid": ' + "9" * 5000 + "}", "resume", "evaluate")
_record_text("of_a_surrogate", '{"sessions": [], "name": "\\ud800", "git": {"commit": "\\ud800"}}', "resume", "export")
_record_text("that_is_a_list", "[]", "resume", "evaluate", "sweep")
_record_text("that_is_a_word", "word", "resume", "evaluate")
_record_text("of_50_mb", '{"x": "' + "a" * 50_000_000 + '"}', "resume", "evaluate")


def _framed(data):
    """Returns an event file's record, with its sums."""
    length = struct.pack("<Q", len(data))
    return length + _masked(length) + data + _masked(data)


def _masked(data):
    total = crc32c(data)
    return struct.pack("<I", (((total >> 15) | (total << 17)) + 0xA282EAD8) & 0xFFFFFFFF)


def _scalar(step, tag, wall_time=1.0):
    value = Summary.Value(tag=tag, simple_value=1.0)
    return Event(step=step, wall_time=wall_time, summary=Summary(value=[value])).SerializeToString()


def _nested(depth):
    """Returns a message that contains itself as an unknown group, up to a depth."""
    return b"\x7b" * depth + b"\x7c" * depth


def _event(short, content, *commands):
    def plant(run, decoy):
        with events_of(run).open("ab") as file:
            file.write(content)

    attack(*commands, name=f"events_{short}")(plant)


_event("of_a_long_record", struct.pack("<Q", 2**63) + _masked(struct.pack("<Q", 2**63)) + b"x", "resume")
_event("of_wrong_sums", b"\x05" + b"\0" * 30, "resume")
_event("of_garbage", bytes(range(256)) * 400, "resume", "sweep")
_event("of_a_broken_message", _framed(b"\xff" * 100), "resume")
_event("of_a_deep_message", _framed(_nested(50_000)), "resume")
_event("of_escaped_tags", _framed(_scalar(1, ESCAPES)), "resume", "sweep")
_event("of_other_steps", _framed(_scalar(-(2**63), "train/loss")) + _framed(_scalar(2**63 - 1, "train/x")), "resume")
_event(
    "of_other_times", _framed(_scalar(2, "train/loss", float("inf"))) + _framed(_scalar(3, "x", float("nan"))), "resume"
)
_event("of_a_large_tag", _framed(_scalar(1, "x" * 20_000_000)), "resume")
_event("of_many_records", _framed(_scalar(4, "train/loss")) * 20_000, "resume")
_event("of_empty_records", _framed(b"") * 50_000, "resume")


@attack("resume")
def many_event_files(run, decoy):
    content = events_of(run).read_bytes()
    for number in range(100):
        (run / f"events.out.tfevents.{number}.x.{number}.0").write_bytes(content[:200])


@attack("resume")
def event_file_of_another_name(run, decoy):
    (run / f"events.out.tfevents.{ESCAPES}".replace("/", "")).write_bytes(events_of(run).read_bytes())
    (run / ("events.out.tfevents." + "9" * 200)).write_bytes(b"")


@attack("resume", "export")
def log_of_other_bytes(run, decoy):
    (run / "log.txt").write_bytes(b"\xff\x1b[2J\x00" * 100_000)


TYPED = ("tracking.stdin=true",)
attack("resume", of=BOTH, arguments=TYPED, typed=b"eval@1000000\n" * 20_000, name="typed_flood")(
    lambda run, decoy: None
)
attack("resume", arguments=TYPED, typed=random.Random(0).randbytes(200_000), name="typed_garbage")(
    lambda run, decoy: None
)
attack("resume", arguments=TYPED, typed=f"save{ESCAPES}lr 1e-3 \x1b[31m\n".encode(), name="typed_escapes")(
    lambda run, decoy: None
)
