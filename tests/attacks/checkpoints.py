"""Checkpoints and exports with pickles, archives that expand, headers and manifests that lie, and odd states."""

import functools
import io as streams
import json
import os
import pickle
import shutil
import struct
import zipfile
import zlib

import torch

from attacks.plants import (
    CHECKPOINT,
    ESCAPES,
    EXPORT,
    OWN,
    attack,
    clear,
    command_of,
    deep,
    newest,
    rewrite_tensors,
    seal,
    set_trainer,
    set_trainer_text,
    write_manifest,
)

BOTH = (OWN, "untrusted")


class Calls:
    """Its pickle calls a function when it is read."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def _put_pickle(run, content, name="model"):
    """Puts a .pt file in the place of a SafeTensors file of the newest checkpoint."""
    checkpoint = newest(run)
    (checkpoint / f"{name}.safetensors").unlink(missing_ok=True)
    (checkpoint / f"{name}.pt").write_bytes(content)
    seal(checkpoint)


def _archive(data, others=(), compression=zipfile.ZIP_STORED):
    """Returns a file as torch writes it, with another pickle in it."""
    stream = streams.BytesIO()
    with zipfile.ZipFile(stream, "w", compression) as archive:
        for name, content in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n"), *others):
            archive.writestr(f"archive/{name}", content)
    return stream.getvalue()


def _tensor_pickle(size, stride, number=1):
    """Returns the pickle of a dict with a tensor of so few stored numbers and that size and stride."""
    out = b"\x80\x02}X\x0c\x00\x00\x00first.weightctorch._utils\n_rebuild_tensor_v2\n((X\x07\x00\x00\x00storage"
    out += b"ctorch\nFloatStorage\nX\x01\x00\x00\x000X\x03\x00\x00\x00cpu"
    out += _integer(number) + b"tQK\x00" + _integers(size) + _integers(stride) + b"\x89ccollections\nOrderedDict\n)RtR"
    return out + b"s."


def _integer(value):
    encoded = value.to_bytes(9, "little", signed=True)
    return b"\x8a" + bytes([len(encoded)]) + encoded


def _integers(values):
    return b"(" + b"".join(_integer(value) for value in values) + b"t"


def _called_by_pickle(name, make, *commands, of=("untrusted",)):
    attack(*commands, of=of, name=f"pickle_{name}")(lambda run, decoy: _put_pickle(run, make(decoy)))


def _saved(value):
    stream = streams.BytesIO()
    torch.save(value, stream)
    return stream.getvalue()


_called_by_pickle(
    "of_a_shell", lambda decoy: _saved(Calls(os.system, command_of(decoy))), "evaluate", "resume", "export", of=BOTH
)
_called_by_pickle("of_code", lambda decoy: _saved(Calls(exec, f"open({str(decoy / 'canary')!r}, 'w')")), "evaluate")
_called_by_pickle("that_is_bare", lambda decoy: pickle.dumps(Calls(os.system, command_of(decoy))), "evaluate", "resume")
_called_by_pickle("of_protocol_0", lambda decoy: b"cos\nsystem\n(V" + command_of(decoy).encode() + b"\ntR.", "evaluate")
_called_by_pickle(
    "of_a_module",
    lambda decoy: _archive(b"\x80\x02ctorch.hub\nload\n(X\x01\x00\x00\x00.X\x01\x00\x00\x00xtR."),
    "evaluate",
)
_called_by_pickle(
    "in_an_archive_of_script",
    lambda decoy: _archive(b".", [("code/x.py", b"import os"), ("constants.pkl", b".")]),
    "evaluate",
)
_called_by_pickle("that_is_empty", lambda decoy: b"", "evaluate")
_called_by_pickle("of_a_list", lambda decoy: _saved([1, 2]), "evaluate", "resume")
_called_by_pickle(
    "of_other_values",
    lambda decoy: _saved({"first.weight": "x", 3: None, ESCAPES: torch.ones(2)}),
    "evaluate",
    "resume",
)
_called_by_pickle(
    "that_is_deep", lambda decoy: _archive(b"\x80\x02" + b"]" * 100_000 + b"a" * 99_999 + b"."), "evaluate"
)
_called_by_pickle("of_doubled_lists", lambda decoy: _archive(_doubled()), "evaluate", "resume")
_called_by_pickle(
    "of_a_long_number", lambda decoy: _archive(b"\x80\x02\x8b" + struct.pack("<i", 2**30) + b"1."), "evaluate"
)
_called_by_pickle(
    "of_a_long_text", lambda decoy: _archive(b"\x80\x02X" + struct.pack("<I", 2**32 - 1) + b"."), "evaluate"
)
_called_by_pickle(
    "of_a_large_memo", lambda decoy: _archive(b"\x80\x02Nr" + struct.pack("<I", 2**32 - 1) + b"."), "evaluate"
)
_called_by_pickle(
    "of_stride_0", lambda decoy: _archive(_tensor_pickle([10**12], [0]), [("data/0", b"\0" * 4)]), "evaluate", "resume"
)
_called_by_pickle(
    "of_negative_size", lambda decoy: _archive(_tensor_pickle([-5], [1]), [("data/0", b"\0" * 4)]), "evaluate"
)
_called_by_pickle(
    "of_a_large_storage",
    lambda decoy: _archive(_tensor_pickle([8, 4], [4, 1], 2**40), [("data/0", b"\0" * 4)]),
    "evaluate",
)
_called_by_pickle(
    "that_expands",
    lambda decoy: _deflated(_tensor_pickle([3 << 27], [1], 3 << 27), 3 << 29),
    "evaluate",
    "resume",
)
_called_by_pickle("of_overlapping_members", lambda decoy: _overlapping(), "evaluate")


def _doubled():
    """Returns a pickle of a list that holds the one before it twice, 60 times over."""
    out = b"\x80\x02]q\x00"
    for number in range(1, 60):
        out += b"]q" + bytes([number]) + b"(h" + bytes([number - 1]) + b"h" + bytes([number - 1]) + b"e"
    return out + b"."


@functools.cache
def _deflated(data, size):
    """Returns an archive whose storage of zeros is deflated to a thousandth."""
    block, total = b"\0" * (1 << 24), 0
    packer = zlib.compressobj(1, zlib.DEFLATED, -15)
    packed = packer.compress(block) + packer.flush(zlib.Z_FULL_FLUSH)
    for _ in range(size >> 24):
        total = zlib.crc32(block, total)
    content = packed * (size >> 24) + packer.flush()
    stream = streams.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        for name, each in (("data.pkl", data), ("byteorder", b"little"), ("version", b"3\n"), ("data/0", content)):
            archive.writestr(f"archive/{name}", each)
    return _declare(stream.getvalue(), b"archive/data/0", size, total)


def _declare(content, name, size, total):
    """Returns an archive whose stored member is declared to be deflated, and of another size."""
    out = bytearray(content)
    at = out.find(b"PK\x03\x04", out.find(name) - 40)
    struct.pack_into("<H", out, at + 8, 8)
    struct.pack_into("<I", out, at + 14, total)
    struct.pack_into("<I", out, at + 22, size)
    at = out.rfind(b"PK\x01\x02", 0, out.rfind(name))
    struct.pack_into("<H", out, at + 10, 8)
    struct.pack_into("<I", out, at + 16, total)
    struct.pack_into("<I", out, at + 24, size)
    return bytes(out)


def _overlapping():
    """Returns an archive whose directory lists one member a hundred thousand times."""
    content = _archive(_tensor_pickle([8, 4], [4, 1], 1 << 18), [("data/0", b"\0" * (1 << 20))])
    start = content.rfind(b"PK\x05\x06")
    last = content.rfind(b"PK\x01\x02", 0, start)
    (first,) = struct.unpack("<I", content[start + 16 : start + 20])
    entry, count = content[last:start], 30_000
    directory = content[first:last] + entry * count
    number = 3 + count
    end = struct.pack("<4sHHHHIIH", b"PK\x05\x06", 0, 0, number, number, len(directory), first, 0)
    return content[:first] + directory + end


@attack("resume", "evaluate")
def pickle_in_the_place_of_the_trainer(run, decoy):
    (newest(run) / "trainer.json").unlink()
    _put_pickle(run, _saved(Calls(os.system, command_of(decoy))), "trainer")


@attack("resume", of=BOTH)
def pickle_in_the_place_of_the_optimizer(run, decoy):
    _put_pickle(run, _saved(Calls(os.system, command_of(decoy))), "model.optimizer")


@attack("resume", "evaluate")
def pickles_with_other_names(run, decoy):
    for name in ("shards.pt", "extra.pth", "x.pkl", ".metadata"):
        (newest(run) / name).write_bytes(_saved(Calls(os.system, command_of(decoy))))
    seal(newest(run))


@attack("evaluate")
def a_hundred_thousand_files_in_a_checkpoint(run, decoy):
    manifest = json.loads((newest(run) / "MANIFEST.json").read_text())
    for number in range(20_000):
        manifest["files"][f"x{number}.json"] = {"bytes": 0, "crc32c": "00000000"}
    write_manifest(newest(run) / "MANIFEST.json", manifest)


def _headed(short, change, *commands, place=f"{CHECKPOINT}/model.safetensors"):
    """Adds an attack whose SafeTensors file has another header."""

    def plant(run, decoy):
        rewrite_tensors(run / place, change)
        if place != EXPORT:
            seal(newest(run))

    attack(*commands, name=f"header_{short}")(plant)


def _change(**values):
    return lambda header: header["first.weight"].update(values)


_headed("that_is_deep", lambda header: deep("[", "]").encode(), "evaluate", "resume")
_headed("that_is_a_deep_mapping", lambda header: deep('{"a":', "}").encode(), "evaluate")
_headed("of_negative_offsets", _change(data_offsets=[-8, 8]), "evaluate")
_headed("of_swapped_offsets", _change(data_offsets=[64, 0]), "evaluate")
_headed("of_far_offsets", _change(data_offsets=[0, 2**63]), "evaluate")
_headed("of_a_large_shape", _change(shape=[2**40, 2**40]), "evaluate")
_headed("of_a_shape_of_zeros", _change(shape=[0, 2**62], data_offsets=[0, 0]), "evaluate")
_headed("of_a_negative_shape", _change(shape=[-1, -32]), "evaluate")
_headed("of_an_unknown_type", _change(dtype=ESCAPES), "evaluate", "resume")
_headed("of_many_tensors", lambda header: header | {f"x{n}": header["first.bias"] for n in range(100_000)}, "evaluate")
_headed("of_tied_tensors", lambda header: header | {"first.weight": header["second.weight"]}, "evaluate", "resume")
_headed(
    "of_escaped_names",
    lambda header: {ESCAPES if k == "first.weight" else k: v for k, v in header.items()},
    "evaluate",
    "resume",
)
_headed("of_paths", lambda header: {"../../x" if k == "first.weight" else k: v for k, v in header.items()}, "evaluate")
_headed("of_other_metadata", lambda header: header | {"__metadata__": {"a": 5}}, "evaluate")
_headed("of_bytes", lambda header: b'{"\xff": 1}', "evaluate")
_headed("that_is_empty", lambda header: b"", "evaluate")


def _structured(document):
    def change(header):
        header["__metadata__"]["runner.structure"] = document if isinstance(document, str) else json.dumps(document)

    return change


_headed("of_a_deep_structure", _structured(deep("[", "]")), "evaluate", "resume")
_headed("of_a_structure_that_is_none", _structured("{"), "evaluate")
_headed(
    "of_a_structure_of_other_types",
    _structured({"version": 2, "raw": 5, "objects": {}, "tree": {"tensor": -1}}),
    "evaluate",
)
_headed(
    "of_a_structure_of_large_objects",
    _structured(
        {"version": 2, "raw": {"x": ["complex128", [2**60]]}, "objects": [], "tree": {"int": "0x" + "f" * 10**6}}
    ),
    "evaluate",
)


@attack("evaluate", "resume", "evaluate_export")
def header_longer_than_the_file(run, decoy):
    for path in (newest(run) / "model.safetensors", run / EXPORT):
        path.write_bytes(struct.pack("<Q", 2**63 - 1) + path.read_bytes()[8:])
    seal(newest(run))


def _metadata(**values):
    return lambda header: header["__metadata__"].update(values)


for _name, _values in {
    "of_a_deep_config": {"config": deep("[", "]")},
    "of_a_deep_mapping": {"config": deep('{"a":', "}")},
    "of_no_config": {"config": "[1]"},
    "of_a_long_step": {"step": "9" * 10_000},
    "of_escapes": {"engine": ESCAPES, "step": "5", "fingerprint": ESCAPES},
    "of_a_surrogate": {"config": '{"name": "\\ud800"}'},
    "of_interpolations": {"config": '{"name": "${oc.env:ATTACK_SECRET}", "model": "${data}"}'},
}.items():
    _headed(f"of_an_export_{_name}", _metadata(**_values), "evaluate_export", place=EXPORT)


def _listed(short, change, /, *commands, **others):
    """Adds an attack whose manifest lists other files, or says other things."""

    def plant(run, decoy):
        path = newest(run) / "MANIFEST.json"
        manifest = json.loads(path.read_text())
        changed = change(manifest["files"], run, decoy) if change else None
        write_manifest(path, manifest | ({} if changed is None else {"files": changed}) | others)

    attack(*commands, name=f"manifest_{short}")(plant)


def _named(name):
    return lambda files, run, decoy: files | {name.replace("DECOY", str(decoy)): {"bytes": 11, "crc32c": "00000000"}}


_listed("that_goes_up", _named("../../x.json"), "resume", "evaluate")
_listed("that_goes_up_to_the_run", _named("shards/../../../run.json"), "resume")
_listed("of_an_absolute_path", _named("DECOY/diary.json"), "resume", "evaluate")
_listed("of_a_dot", _named(".."), "evaluate")
_listed("of_an_empty_name", _named(""), "evaluate")
_listed("of_a_zero", _named("a\x00.json"), "resume", "evaluate")
_listed("of_escapes", _named(f"{ESCAPES}.json"), "resume", "evaluate")
_listed("of_a_surrogate", _named("\ud800.json"), "resume", "evaluate")
_listed("of_a_long_name", _named("x" * 5000 + ".json"), "evaluate")
_listed(
    "without_sums",
    lambda files, run, decoy: {name: {"crc32c": f"{number:08x}"} for number, name in enumerate(files)},
    "resume",
    "evaluate",
)
_listed("of_wrong_sizes", lambda files, run, decoy: {key: {"bytes": -1, "crc32c": None} for key in files}, "evaluate")
_listed("of_texts_for_sizes", lambda files, run, decoy: dict.fromkeys(files, ESCAPES), "evaluate", "resume")
_listed("of_a_list", lambda files, run, decoy: [*files], "resume", "evaluate")
_listed("of_nothing", lambda files, run, decoy: {}, "resume", "evaluate", "export")
_listed("of_null", None, "evaluate", files=None)
_listed("of_many_files", lambda files, run, decoy: files | {f"{n}.json": 0 for n in range(200_000)}, "evaluate")
_listed("of_another_metric", None, "resume", metric=[[{}]])
_listed("of_a_large_metric", None, "resume", metric={"name": ESCAPES, "value": 10**400})
_listed("of_an_infinite_metric", None, "resume", metric=float("inf"))
_listed("of_another_step", None, "resume", "evaluate", step=10**18)
_listed("of_another_format", None, "evaluate", format=ESCAPES)


def _written(short, text, *commands):
    attack(*commands, name=f"manifest_{short}")(lambda run, decoy: (newest(run) / "MANIFEST.json").write_text(text))


_written("that_is_deep", deep("[", "]") + "}\n", "evaluate", "resume")
_written("of_a_deep_format", '{"format": 2, "x": ' + deep("[", "]") + "}\n", "evaluate")
_written("of_a_long_number", '{"format": ' + "9" * 5000 + "}\n", "evaluate")
_written("that_is_no_mapping", "[{}\n", "evaluate")


@attack("resume", "evaluate", "export")
def checkpoint_of_a_long_number(run, decoy):
    shutil.copytree(newest(run), run / "checkpoints" / ("step_" + "9" * 200))


@attack("evaluate", "resume")
def checkpoint_of_other_digits(run, decoy):
    shutil.copytree(newest(run), run / "checkpoints" / "step_٠٠٠٠٠٠٩٩")


@attack("evaluate", "resume")
def checkpoint_of_escapes(run, decoy):
    shutil.copytree(newest(run), run / "checkpoints" / f"step_00000099{ESCAPES}".replace("/", ""))


def _state(short, values, *commands, of=("untrusted",)):
    attack(*commands, of=of, name=f"trainer_{short}")(lambda run, decoy: set_trainer(run, values))


_state("of_a_large_step", {"loop.step": 10**18}, "resume", "evaluate", "export")
_state("of_a_huge_step", {"loop.step": 10**400}, "resume", "evaluate", "export")
_state("of_a_negative_step", {"loop.step": -1, "loop.skipped": -5}, "resume", "evaluate")
_state("of_a_text_step", {"loop.step": ESCAPES}, "resume", "evaluate")
_state("of_a_list_step", {"loop": [1]}, "resume", "evaluate")
_state(
    "without_parts", {"loop": None, "batches": None, "commands": None, "best": 5, "numbers": []}, "resume", "evaluate"
)
_state("of_owed_work", {"loop.owed": ["export", ESCAPES, {"a": 1}, "eval"] * 100}, "resume")
_state("of_another_position", {"batches.sampler.position": 10**18, "batches.ordinal": 10**400}, "resume")
_state("of_another_length", {"batches.sampler.length": 10**12, "batches.sampler.epoch": 10**18}, "resume")
_state("of_another_sampler", {"batches.sampler": {"sampler": "os.system", "x": ESCAPES}}, "resume")
_state("of_a_best_of_other_types", {"best": {"name": ["a"], "value": "x", "step": {}}}, "resume", "export")
_state("of_a_best_of_escapes", {"best": {"name": ESCAPES, "value": 1e308, "step": 2}}, "resume", "export", "evaluate")
_state("of_a_fingerprint_of_escapes", {"fingerprint": ESCAPES}, "resume", "evaluate", "export")
_state("of_a_fingerprint_of_another_type", {"fingerprint": [{}]}, "resume", "evaluate", "export")
_state("of_many_numbers", {"numbers": {"lines": 10**400, "events": -1, "step": "x"}}, "resume")
_state(
    "of_pending_commands",
    {"commands.pending": ["quit@5", "export@6", f"save {ESCAPES}@5", "lr 1e999@6"]},
    "resume",
    of=BOTH,
)
_state(
    "of_pending_shells",
    {"commands.pending": ["!touch canary", "../../decoy/notes@5", "export decoy/notes@5"]},
    "resume",
)
_state("of_many_pending_commands", {"commands.pending": ["eval@5"] * 50_000}, "resume")
_state("of_pending_rates", {"commands.pending": ["lr 1e-4@5", "lr 2e-4@5"] * 1000}, "resume")
_state("of_a_pending_rate_that_overflows", {"commands.pending": ["lr 1e300@5"]}, "resume", of=BOTH)
_state("of_a_best_with_a_long_name", {"best.name": "y" * 1_000_000}, "resume", "export")
_state("of_pending_commands_of_other_types", {"commands.pending": {"a": 1}}, "resume")
_state("of_a_pending_mapping", {"commands": {"pending": [{"a": 1}, None, 5]}}, "resume")


@attack("resume", "evaluate", "export")
def trainer_that_is_deep(run, decoy):
    set_trainer_text(run, '"best": ', '"deep": ' + deep("[", "]") + ', "best": ')


@attack("resume", "evaluate")
def trainer_of_infinities(run, decoy):
    set_trainer_text(run, '"value": ', '"value": 1e999, "x": ')


@attack("resume")
def trainer_of_a_key_twice(run, decoy):
    set_trainer_text(run, '"best": ', '"best": null, "best": ')


@attack("resume", "evaluate")
def trainer_that_is_a_list(run, decoy):
    (newest(run) / "trainer.json").write_text("[]")
    seal(newest(run))


@attack("resume", "evaluate")
def structure_of_shards(run, decoy):
    checkpoint = newest(run)
    (checkpoint / "structure.json").write_text(json.dumps({"model": {"tree": {"tensor": 10**9}}, ESCAPES: 5}))
    (checkpoint / "shards").mkdir()
    index = {"format": 1, "files": ["../../x", "shard-00000.safetensors"], "tensors": {"model/x": ["F32", [2**40]]}}
    (checkpoint / "shards" / "shards.json").write_text(json.dumps(index))
    (checkpoint / "shards" / "shard-00000.safetensors").write_bytes(b"\xff" * 100)
    seal(checkpoint)


@attack("evaluate")
def shards_that_are_deep(run, decoy):
    checkpoint = newest(run)
    (checkpoint / "structure.json").write_text(deep("[", "]"))
    (checkpoint / "shards").mkdir()
    (checkpoint / "shards" / "shards.json").write_text(deep('{"a":', "}"))
    seal(checkpoint)


@attack("resume", "evaluate")
def weights_of_an_engine_that_is_not_there(run, decoy):
    checkpoint = newest(run)
    shutil.copy(checkpoint / "model.safetensors", checkpoint / "other.safetensors")
    clear(checkpoint / "model.safetensors")
    seal(checkpoint)
