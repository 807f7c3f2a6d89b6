"""The list of attacks, and helpers that change a run's folder as an attacker does."""

import contextlib
import json
import os
import shutil
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from crc32c import crc32c

SECRET = "hunter2-of-the-environment"
FORGED = "FORGED LINE"
ESCAPES = f"\x1b]0;owned\x07\x1b[2J\r\x9b31m\n{FORGED}\n"
CHECKPOINT = "checkpoints/step_00000004"
EXPORT = "exports/model.safetensors"
OWN, UNTRUSTED = "own", "untrusted"


@dataclass(frozen=True)
class Attack:
    """A hostile folder: `plant(run, decoy)` makes it of a real run's copy.

    What `plant` returns, if anything, is called with an event in a thread while the command runs, until it is set.

    Args:
        commands: that are tried on the folder.
        origins: whose run it is: "own", changed in place by somebody else, or "untrusted", somebody else's.
        arguments: of the command line, beside those of the command.
        typed: standard input.
    """

    name: str
    plant: Callable[[Path, Path], Any]
    commands: tuple[str, ...]
    origins: tuple[str, ...]
    arguments: tuple[str, ...] = ()
    typed: bytes | None = field(default=None, repr=False)


ATTACKS: list[Attack] = []


def attack(*commands: str, of: tuple[str, ...] = (UNTRUSTED,), arguments=(), typed=None, name: str | None = None):
    """Adds a function to the list of attacks, to be tried with some commands."""

    def add(plant):
        own_name = name or plant.__name__.strip("_")
        assert all(own_name != each.name for each in ATTACKS), own_name
        ATTACKS.append(Attack(own_name, plant, commands, of, tuple(arguments), typed))
        return plant

    return add


MOST_OF_A_CLASS = 36


def trials(is_thorough: bool) -> list[tuple[Attack, str, str]]:
    """Returns attacks with an origin and a command each; a sweep is always the user's own.

    Each attack is tried with its first command, and with those that few others have, and of each class of attacks some
    are, spread over it; if it is thorough, all are, with each of their commands and origins.
    """
    by_class: dict[str, list[tuple[Attack, str, str]]] = {}
    for each in ATTACKS:
        for number, command in enumerate(each.commands):
            origins = (OWN,) if command == "sweep" else each.origins
            if not is_thorough:
                is_common = command in ("resume", "evaluate", "export")
                origins = () if number and is_common else (origins[0],) if number == 0 else (origins[-1],)
            chosen = by_class.setdefault(each.plant.__module__, [])
            chosen += [(each, origin, command) for origin in origins]
    if is_thorough:
        return [trial for chosen in by_class.values() for trial in chosen]
    return [trial for chosen in by_class.values() for trial in _spread(chosen, MOST_OF_A_CLASS)]


def _spread(chosen: list[tuple[Attack, str, str]], count: int) -> list[tuple[Attack, str, str]]:
    """Returns a number of elements of a list, at equal distances."""
    step = max(len(chosen) / count, 1.0)
    return [chosen[int(number * step)] for number in range(min(count, len(chosen)))]


def link(path: Path, target: Path) -> None:
    """Puts a relative link in the place of whatever is there."""
    clear(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(os.path.relpath(target, path.parent.resolve()))


def clear(path: Path) -> None:
    """Removes whatever is there."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    with contextlib.suppress(FileNotFoundError):
        path.unlink()


def newest(run: Path) -> Path:
    """Returns the newest checkpoint of a run."""
    return max((run / "checkpoints").glob("step_*"))


def events_of(run: Path) -> Path:
    """Returns the first event file of a run."""
    return min(run.glob("events.out.tfevents.*"))


def command_of(decoy: Path) -> str:
    """Returns a shell command that leaves the canary."""
    return f"touch {decoy / 'canary'}"


def write_canary(path: Path, decoy: Path) -> None:
    """Writes a module that leaves the canary when it is imported."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(
        f"open({str(decoy / 'canary')!r}, 'w').close()\n\n\nclass Model:\n    pass\n\n\ndef main():\n    pass\n"
    )


def read_config(run: Path) -> dict[str, Any]:
    """Returns the config in a run's folder, unresolved."""
    return yaml.safe_load((run / ".hydra" / "config.yaml").read_text())


def set_config(run: Path, values: dict[str, Any]) -> None:
    """Sets values of a run's config by dotted keys."""
    config = read_config(run)
    for key, value in values.items():
        node, names = config, key.split(".")
        for name in names[:-1]:
            if not isinstance(node.get(name), dict):  # such as `compile: false`
                node[name] = {}
            node = node[name]
        node[names[-1]] = value
    (run / ".hydra" / "config.yaml").write_text(yaml.dump(config, sort_keys=False, allow_unicode=True, width=1 << 30))


def set_json(path: Path, values: dict[str, Any]) -> None:
    """Sets values of a JSON file by dotted keys."""
    content = json.loads(path.read_text())
    for key, value in values.items():
        node, names = content, key.split(".")
        for name in names[:-1]:
            node = node[name]
        node[names[-1]] = value
    path.write_text(json.dumps(content))


def measure(path: Path) -> dict[str, Any]:
    """Returns the entry of a file in a manifest."""
    content = path.read_bytes()
    return {"bytes": len(content), "crc32c": f"{crc32c(content):08x}"}


def seal(checkpoint: Path, **changes: Any) -> None:
    """Writes a manifest that fits what lies in a checkpoint now, with changes on top.

    An attacker can do so: sums are no signature.
    """
    path = checkpoint / "MANIFEST.json"
    manifest = json.loads(path.read_text())
    files = sorted(each for each in checkpoint.rglob("*") if each.is_file() and each != path)
    manifest["files"] = {str(each.relative_to(checkpoint)): measure(each) for each in files}
    write_manifest(path, manifest | changes)


def write_manifest(path: Path, manifest: dict[str, Any]) -> None:
    """Writes a manifest with its own sum."""
    manifest = {key: value for key, value in manifest.items() if key != "crc32c"}
    own = f"{crc32c(json.dumps(manifest, sort_keys=True).encode()):08x}"
    path.write_text(json.dumps(manifest | {"crc32c": own}, indent=2) + "\n")


def set_trainer(run: Path, values: dict[str, Any]) -> None:
    """Sets values of the newest checkpoint's trainer.json, and seals it."""
    set_json(newest(run) / "trainer.json", values)
    seal(newest(run))


def set_trainer_text(run: Path, old: str, new: str) -> None:
    """Replaces text of the newest checkpoint's trainer.json, and seals it."""
    path = newest(run) / "trainer.json"
    text = json.dumps(json.loads(path.read_text()))
    assert old in text, text
    path.write_text(text.replace(old, new))
    seal(newest(run))


def rewrite_tensors(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Changes the header of a SafeTensors file: `change` returns another one, as a dict or bytes, or changes it."""
    content = path.read_bytes()
    (length,) = struct.unpack("<Q", content[:8])
    header = json.loads(content[8 : 8 + length])
    changed = change(header)
    changed = header if changed is None else changed
    encoded = changed if isinstance(changed, bytes) else json.dumps(changed).encode()
    path.write_bytes(struct.pack("<Q", len(encoded)) + encoded + content[8 + length :])


def deep(opening: str, closing: str, depth: int = 100_000) -> str:
    """Returns a text of nested brackets."""
    return opening * depth + closing * depth
